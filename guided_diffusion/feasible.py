"""
Whether what a study asks for can be done: what its programs would refuse when their turn comes, perhaps after hours, is
refused before the first of them begins.
"""

import contextlib

from . import checkpoint, checks, config, image_datasets, program, published, sizes, train_util
from .network_options import ClassifierOptions, DiffusionOptions, ModelOptions
from .script_util import open_diffusion

IMAGES = "image_size", "image_channels"  # in which all networks of a study must agree


def check(study, arms, judge):
    """
    Look at all that is known of a study before its first program runs.

    :param study, arms, judge: as `ablation.read`, `arms_of` and `judge_of` give them.
    :return: {arm's name: (fingerprint, number) of the images that it is trained on}.
    :raises ValueError: naming the arm, for data that do not suit it, or options of training, of a classifier or of
        sampling that cannot be.
    """
    data, found, base, count = _Data(study), {}, arms[0].flags(), study["evaluation"]["samples"]
    for arm in arms:
        train, flags, where = arm.args["train"], arm.flags(), f"arm {arm.name!r}"
        with naming(where):
            _check_images(flags, base)
            images = data.opened(train, flags, flags["class_cond"])
            checks.check_watching(train)
            _check_training(train, "use_fp16", validated=False)
        found[arm.name] = images.fingerprint, images.num_images
        classes, names = flags["num_classes"] if flags["class_cond"] else 0, images.class_names
        if "classifier" in arm.args:
            with naming(f"{where}, classifier"):
                its, names = _check_classifier(arm.args["classifier"], data)
                program.check_guiding(flags, its)
                classes = its["num_classes"]
        with naming(f"{where}, sample"):
            _check_sampling(arm.args["sample"], flags)
            checks.parse_classes(arm.args["sample"].classes, len(names or ()) or classes, count, names)
    if judge:
        with naming("[judge]"):
            if "noised" in judge[1].explicit and judge[1].noised:
                raise ValueError("it looks at images without noise: drop noised = true")
            _check_images(_check_classifier(judge[1], data)[0], base)
    return found


@contextlib.contextmanager
def naming(where):
    """Let errors within begin with what they are about."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"{where}: {error}") from error


class _Data:
    """The images of a study, opened once for all who read them alike."""

    def __init__(self, study):
        self.study, self.known = study, {}

    def opened(self, args, flags, labelled):
        """The stream of images that training with these options would read. Raises ValueError if it cannot."""
        how = {
            "batch_size": args.batch_size, "image_size": sizes.size_of(flags), "background": args.background,
            "image_channels": flags["image_channels"], "class_cond": labelled, "label_from": args.label_from,
            "num_classes": flags["num_classes"] if labelled else None, "num_workers": 0,
            "vector_channels": flags.get("vector_channels", 0),
        }  # fmt: skip
        if str(how) not in self.known:
            data = image_datasets.load_data(data_dir=self.study["data"], **how)
            if "classifier_depth" in flags and self.study["held_out"]:
                image_datasets.load_data(data_dir=self.study["held_out"], class_names=data.class_names, **how)
            self.known[str(how)] = data
        return self.known[str(how)]


def _check_images(flags, base):
    for name in IMAGES:
        if flags[name] != base[name]:
            raise ValueError(
                f"{name} is {flags[name]}, and the base has {base[name]}: only scores of images of one kind compare;"
                " keep it, or make another study"
            )


def _check_training(args, half, validated):
    if args.num_workers < 0:
        raise ValueError(f"--num_workers must be 0 or more, not {args.num_workers}")
    half_counts = getattr(args, half) and (half in args.explicit or not args.precision)
    precision = checks.precision_of(args.precision, half_counts, half)
    train_util.check_options(vars(args) | {"precision": precision, "val_data": validated or None})


def _check_classifier(args, data):
    """(the flags of a classifier to train, the names of its classes)."""
    flags = config.flags_of(args, ClassifierOptions, DiffusionOptions)
    if args.iterations < 1:
        raise ValueError(f"iterations must be 1 or more, not {args.iterations}")
    _check_training(args, "classifier_use_fp16", validated=bool(data.study["held_out"]))
    return flags, data.opened(args, flags, True).class_names


def _check_sampling(args, flags):
    """Raise ValueError for options that sampling from a model of these flags would refuse, but for its walk."""
    checks.check_counts(args, batch=0)
    checks.check_reuse(args)
    checks.check_prompts(args, flags)
    checks.parse_interval(args.guidance_interval)
    network = config.options(ModelOptions).keys() & args.explicit - set(checkpoint.PASSING)
    for name in sorted(network):
        if getattr(args, name) != flags[name]:
            raise ValueError(f"{name} {getattr(args, name)}: the network is trained with {flags[name]}: drop it here")
    if args.guide_path:
        path = published.locate(args.guide_path)
        program.check_worse(path, flags, open_diffusion(path, device="meta")[2])
