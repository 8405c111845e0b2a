"""
The plan of a study of arms: a base and changes to it, read from one short file, and all that can be known of them
before the first is trained: whether each can be built, its parameters, its operations, its updates.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch as th

from . import checks, config, ema, generate, program, script_util, sizes
from .checkpoint import ema_name, model_name
from .config import RunOptions
from .network_options import ClassifierOptions, DiffusionOptions, ModelOptions
from .sampling_options import ClassifierSampleOptions, SampleOptions
from .training_options import ClassifierTrainOptions, TrainOptions, WatchOptions

ENTRIES = {
    "extends": "", "title": "", "data": "", "held_out": "", "seeds": [0, 1, 2], "match": "", "axis": "", "budget": {},
    "train": {}, "classifier": {}, "sample": {}, "judge": {}, "evaluation": {}, "arms": {}, "claims": {},
}  # fmt: skip
EVALUATION = {"samples": 500, "extractor": "inception", "weights": "", "reference": "", "batch_size": 64, "points": 0}
BUDGET = {"images": 0, "seconds": 0.0}
MATCHES = ("", "parameters", "compute", "training")
LOOKS = "looks"  # as an axis: evaluations of the network for a sample
OF_LOOKS = "steps", "timestep_respacing"  # what sets them
OF_A_CLASSIFIER = (ClassifierTrainOptions, ClassifierOptions, DiffusionOptions, RunOptions)
GROUPS = {
    "train": (TrainOptions, WatchOptions, ModelOptions, DiffusionOptions, RunOptions),
    "classifier": OF_A_CLASSIFIER,
    "judge": OF_A_CLASSIFIER,
    "sample": (SampleOptions, ModelOptions, DiffusionOptions, RunOptions),
    "guided sample": (ClassifierSampleOptions, ModelOptions, DiffusionOptions, ClassifierOptions, RunOptions),
}
# Options that a study sets itself, by what it runs.
OWN = set("data_dir val_data_dir seed log_dir device resume resume_checkpoint checkpoint_dir max_minutes".split())
OWN |= set("model_path classifier_path num_samples save_as frames grid eval_every eval_extractor keep_last".split())
# What two networks must agree on, taken from the diffusion model unless it is said.
INHERITED = {"classifier": "image_size image_channels num_classes noise_schedule diffusion_steps rescale_timesteps",
             "judge": "image_size image_channels num_classes"}  # fmt: skip
JUDGE_SEED = 1234
BASE = "base"


@dataclass
class Arm:
    """One configuration of a study, planned."""

    name: str
    changes: dict
    typed: dict  # {section: {option: value}} as the file has them, base and changes together
    args: dict  # {section: Namespace} of the same, all options of the programs
    parameters: int = 0
    operations: int = 0  # FLOP of one look of the network at one image, a multiply-add counting as two
    evaluations: int = 0  # looks of the diffusion network at each image that is drawn
    iterations: int = 0
    near: str = ""  # how near `match` came
    against: tuple = ()  # names of the arms it is compared with
    at: float | None = None  # its place on the study's axis
    line: str = ""  # the curve it is a point of: what it changes besides

    @property
    def checkpoint(self):
        """The file that samples are drawn with: the first average, or the weights if there is none."""
        train = self.args["train"]
        averages = ema.parse(train.ema_rate, train.ema_halflife, train.ema_power)
        return ema_name(averages[0].name, self.iterations) if averages else model_name(self.iterations)

    def flags(self):
        """{name: value} of every option of the diffusion network and its process."""
        return config.flags_of(self.args["train"], ModelOptions, DiffusionOptions)


# ----------------------------------------------------------------------------------------------------------- the file


def read(path):
    """
    The content of a study file, TOML or json, with what it leaves out from the file that it `extends`, if it does, and
    else by default.

    :raises FileNotFoundError: if there is none.
    :raises ValueError: for what cannot be read, an unknown entry, naming the nearest, one of the wrong kind, or files
        that extend each other.
    """
    study = ENTRIES | _written(Path(path))
    study["evaluation"] = _known("[evaluation]", study["evaluation"], EVALUATION)
    study["budget"] = _known("[budget]", study["budget"], BUDGET)
    _check(study)
    return study


def _written(path, below=()):
    """
    What stands in a file, over what stands in the one it extends; of the entries that are tables, name by name, but an
    empty table empties.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such study file")
    if path.resolve() in below:
        raise ValueError(f"{path}: a study cannot extend itself")
    text = path.read_text(encoding="utf-8")
    try:
        found = json.loads(text) if path.suffix == ".json" else _toml().loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is no {path.suffix.lstrip('.') or 'toml'} file: {error}") from error
    other = _known(str(path), found, ENTRIES)["extends"]
    under = _written(path.parent / other, (*below, path.resolve())) if other else {}
    tables = {name for name in found if isinstance(found[name], dict) and isinstance(under.get(name), dict)}
    return under | found | {name: under[name] | found[name] for name in tables if found[name]}


def _toml():
    try:
        import tomllib
    except ImportError:  # Python 3.10
        import tomli as tomllib
    return tomllib


def _known(where, given, entries):
    """`entries` with what is given in their place, each of its kind. Raises ValueError."""
    if not isinstance(given, dict):
        raise ValueError(f"{where} must be a table of entries, not {given!r}")
    for name, value in given.items():
        if name not in entries:
            raise ValueError(f"{where} has an unknown entry {name!r}{config.nearest(name, entries)}")
        kinds = (int, float) if isinstance(entries[name], (int, float)) else (type(entries[name]),)
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise ValueError(f"{where}: {name} must be of the kind of {entries[name]!r}, not {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{where}: {name} must be a finite number, not {value!r}")
        if type(entries[name]) is int and value != int(value):
            raise ValueError(f"{where}: {name} must be a whole number, not {value!r}")
    whole = {name: int(value) for name, value in given.items() if type(entries[name]) is int}
    return entries | given | whole


def _check(study):
    seeds, budget = study["seeds"], study["budget"]
    if not seeds or len(set(seeds)) < len(seeds) or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise ValueError(f"seeds {seeds}: give different whole numbers of 0 or more, as [0, 1, 2]")
    if study["match"] not in MATCHES:
        raise ValueError(f"match {study['match']!r} is none of {', '.join(map(repr, MATCHES))}")
    if (budget["images"] > 0) == (budget["seconds"] > 0) or min(budget.values()) < 0:
        raise ValueError(f"[budget] {budget}: give images, as 64000, or seconds of training, as 60: one of them")
    if not study["arms"]:
        raise ValueError('[arms] is empty: give an arm a line, as "four blocks" = { num_res_blocks = 4 }')
    if BASE in study["arms"]:
        raise ValueError(f"an arm is called {BASE!r}, as what all arms are compared with: give it another name")
    known = {LOOKS, *(name for groups in GROUPS.values() for name in config.options(*groups))}
    if study["axis"] and study["axis"] not in known:
        raise ValueError(f"axis {study['axis']!r} is neither an option nor {LOOKS!r}"
                         f"{config.nearest(study['axis'], known)}")  # fmt: skip
    for name, least in (("batch_size", 1), ("points", 0)):
        if study["evaluation"][name] < least:
            raise ValueError(f"[evaluation] {name} must be {least} or more, not {study['evaluation'][name]}")
    if not study["data"]:
        raise ValueError("the study names no data: give data = the folder or file of the training images")


# ------------------------------------------------------------------------------------------------------------ the arms


def arms_of(study):
    """
    The arms of a study, the base first, each with its options read, its network built (of no memory) and its sampling
    planned.

    :raises ValueError: naming the arm, for an unknown option or one that the study sets, a network, process or walk
        that cannot be, or two arms that are equal.
    """
    arms = [_arm(study, name, changes) for name, changes in [(BASE, {}), *study["arms"].items()]]
    _match(study, arms)
    _compare(arms)
    for arm in arms if study["axis"] else []:
        arm.at, arm.line = _place(study["axis"], arm)
    seen = {}
    for arm in arms:
        content = json.dumps({section: chosen(args) for section, args in arm.args.items()}, sort_keys=True)
        other = seen.setdefault(content, arm.name)
        if other != arm.name:
            raise ValueError(f"arms {other!r} and {arm.name!r} are equal: change or drop one of them")
    return arms


def _compare(arms):
    """Give each arm the names of those it is compared with: `against`, as it is written, or the base."""
    names = [arm.name for arm in arms]
    for arm in arms[1:]:
        against = arm.changes.get("against", BASE)
        arm.against = tuple(against if isinstance(against, list) else [against])
        for other in arm.against:
            if other not in names or other == arm.name:
                raise ValueError(f"arm {arm.name!r} is to be compared with {other!r}, which is no other arm"
                                 f"{config.nearest(str(other), names)}")  # fmt: skip
        arm.changes = {option: value for option, value in arm.changes.items() if option != "against"}


def _place(axis, arm):
    """(the number where an arm stands on the axis, a text of all that it changes besides)."""
    usual = [vars(args)[axis] for args in arm.args.values() if axis in vars(args)]
    typed = [options[axis] for options in arm.typed.values() if axis in options]
    at = arm.evaluations if axis == LOOKS else (typed[::-1] or usual or [None])[0]  # a sampler's word is the last
    try:
        at = float(at)
    except (TypeError, ValueError):
        raise ValueError(f"axis {axis!r}: arm {arm.name!r} has {at!r} there, which is no number") from None
    own = OF_LOOKS if axis == LOOKS else (axis,)
    return at, ", ".join(" ".join(map(str, each)) for each in flat(arm.changes) if each[-2] not in own) or BASE


def flat(changes):
    """The words of each change: (option, value), or (section, option, value)."""
    for name, value in changes.items():
        yield from ((name, *each) for each in flat(value)) if isinstance(value, dict) else [(name, value)]


def words(options):
    """{option: value} as words of a command line."""
    return [word for name, value in options.items() for word in (f"--{name}", *_texts(value))]


def _texts(value):
    return list(map(str, value)) if isinstance(value, list) else [str(value)]


def chosen(args):
    """{option: value} of all that is not as by default, without what a study sets itself."""
    names = vars(args).keys() - {"explicit"}
    usual = next(each for each in (config.defaults(*groups) for groups in GROUPS.values()) if each.keys() == names)
    return {name: vars(args)[name] for name in usual if name not in OWN and vars(args)[name] != usual[name]}


def sections(study):
    """The programs that each arm runs: train, perhaps classifier, and sample; and judge, if the study trains one."""
    return ["train", *(["classifier"] if study["classifier"] else []), "sample"]


def _arm(study, name, changes):
    where = f"arm {name!r}"
    if not isinstance(changes, dict):
        raise ValueError(f"{where} must be a table of what it changes, as {{ num_res_blocks = 4 }}, not {changes!r}")
    apart = {section: changes.get(section, {}) for section in ("classifier", "sample")}
    for section, given in apart.items():
        if not isinstance(given, dict):
            raise ValueError(f"{where}: {section} must be a table of options, as {{ batch_size = 50 }}, not {given!r}")
    if apart["classifier"] and not study["classifier"]:
        raise ValueError(f"{where} changes a classifier, and the study has none: give it a section [classifier]")
    apart["train"] = {option: value for option, value in changes.items() if option not in (*apart, "against")}
    typed, args = {}, {}
    for section in sections(study):
        typed[section] = study[section] | apart[section]
        args[section] = _options(study, section, typed, where)
    arm = Arm(name, changes, typed, args)
    try:
        arm.parameters, arm.operations, arm.evaluations = _measure(arm)
    except (ValueError, ArithmeticError, NotImplementedError) as error:
        raise ValueError(f"{where} cannot be built: {' '.join(str(error).split())}") from error
    return arm


def judge_of(study, base):
    """({option: value}, Namespace) of the classifier that the study trains to judge, or None."""
    if not study["judge"]:
        return None
    typed = {"judge": dict(study["judge"]), "train": base.typed["train"]}
    args = _options(study, "judge", typed, "[judge]")
    _build("classifier", config.flags_of(args, ClassifierOptions, DiffusionOptions), args)
    return typed["judge"], args


def _options(study, section, typed, where):
    """The Namespace of a program's options; adds to typed[section] what it takes from the diffusion model."""
    given = typed[section]
    groups = GROUPS["guided sample" if section == "sample" and study["classifier"] else section]
    for name in given:
        if name in OWN:
            raise ValueError(f"{where}: {name} is set by the study itself: drop it")
        if section == "train" and name == "iterations":
            raise ValueError(f"{where}: iterations follow from [budget] and batch_size: drop them")
        other = [key for key in ("sample", "classifier") if name in config.options(*GROUPS[key])]
        if section == "train" and other and name not in config.options(*groups):
            raise ValueError(f"{where}: {name} is no option of training: write {other[0]} = {{ {name} = ... }}")
        field = config.options(*groups).get(name)
        if isinstance(given[name], list) and field and not isinstance(field.default, tuple):
            raise ValueError(f"{where}: {name} takes one value, not {given[name]}: make an arm of each")
    usual = config.from_preset(typed["train"], config.options(*GROUPS["train"])) | typed["train"]
    for name in INHERITED.get(section, "").split():
        if name in usual:
            given.setdefault(name, usual[name])
    try:
        return config.parse("", *groups, argv=words(given))
    except ValueError as error:
        raise ValueError(f"{where}, {section}: {error}") from error


def _measure(arm):
    """(parameters, operations of one look, evaluations of one sample); raises what cannot be built."""
    train, sample, flags = arm.args["train"], arm.args["sample"], arm.flags()
    ema.parse(train.ema_rate, train.ema_halflife, train.ema_power)
    net = _build("diffusion", flags, train)
    if "classifier" in arm.args:
        args = arm.args["classifier"]
        _build("classifier", config.flags_of(args, ClassifierOptions, DiffusionOptions), args)
        checks.check_classifier_guidance(sample)
    else:
        checks.check_classes(flags, sample.classes)
    checks.check_guidance(sample, checks.nulls(flags))
    changed = {name: value for name, value in config.explicit_flags(sample).items() if name in flags}
    diffusion = script_util.process_of(flags | changed)
    twice = sample.guidance_scale != 1
    evaluations = generate.count_evaluations(diffusion, **program.walk_of(sample)) * (1 + twice)
    return sum(p.numel() for p in net.parameters()), operations(net, flags), evaluations


def _build(kind, flags, args):
    """A network without memory. ValueError if it cannot be."""
    if args.batch_size < 1:
        raise ValueError(f"--batch_size must be 1 or more, not {args.batch_size}")
    script_util.process_of(flags if kind == "diffusion" else flags | {"predict": "x0", "predict_xstart": False})
    with th.device("meta"):
        return script_util.build(kind, flags)


def operations(net, flags):
    """FLOP of a diffusion network without memory looking at one image, a multiply-add counting as two."""
    from torch.utils.flop_counter import FlopCounterMode

    place = th.device("meta")
    x = th.empty(1, flags["image_channels"], *sizes.size_of(flags), device=place)
    cond = {"y": th.zeros(1, dtype=th.long, device=place)} if flags["class_cond"] else {}
    if flags["vector_channels"]:
        cond["vector"] = th.empty(1, flags["vector_channels"], device=place)
    with FlopCounterMode(display=False) as counter, th.no_grad():
        net(x, th.zeros(1, device=place), **cond)
    return counter.get_total_flops()


# ------------------------------------------------------------------------------------------------------------ matching


def _match(study, arms):
    """Give the arms the width whose parameters, or operations, come nearest to those of the base."""
    if study["match"] not in ("parameters", "compute"):
        return
    what = {"parameters": "parameters", "compute": "operations"}[study["match"]]
    wanted = getattr(arms[0], what)
    for arm in arms[1:]:
        if "num_channels" in arm.changes:
            raise ValueError(f"arm {arm.name!r} sets num_channels, which match = {study['match']!r} would: drop one")
        near, width = nearest_width(arm.flags(), what, wanted)
        arm.typed["train"] |= {"num_channels": width}
        arm.args["train"].num_channels = width
        arm.args["train"].explicit.add("num_channels")
        arm.parameters, arm.operations, arm.evaluations = _measure(arm)
        arm.near = f"width {width}: {near:.2f} of the base's {what}"


def nearest_width(flags, what, wanted):
    """
    (count / wanted, num_channels) of the width with which a network of these flags has most nearly `wanted` parameters
    or operations, by ratio, of all widths that its norms and heads allow.
    """
    best = None
    for width in range(8, 16 * flags["num_channels"] + 1, 8):
        tried = flags | {"num_channels": width}
        try:
            with th.device("meta"):
                net = script_util.build("diffusion", tried)
        except ValueError:
            continue
        count = operations(net, tried) if what == "operations" else sum(p.numel() for p in net.parameters())
        found = (count / wanted, width)
        best = min(best or found, found, key=lambda each: abs(math.log(each[0])))
        if count > wanted:
            break
    if best is None:
        raise ValueError(f"no width up to {16 * flags['num_channels']} suits these flags")
    return best


def set_iterations(study, arms, images_a_second=None):
    """
    Give each arm its updates: by images, the budget over the batch; by seconds, as many as the measured speed allows;
    with match = "training", times the base's operations over the arm's.

    :param images_a_second: {arm's name: measured speed}, needed for a budget in seconds.
    """
    budget = study["budget"]
    for arm in arms:
        images = budget["images"] or budget["seconds"] * images_a_second[arm.name]
        if study["match"] == "training":
            images *= arms[0].operations / arm.operations
        arm.iterations = max(1, math.ceil(images / arm.args["train"].batch_size - 1e-9))
        annealed = arm.args["train"].lr_anneal_steps
        if 0 < annealed < arm.iterations:
            raise ValueError(
                f"arm {arm.name!r}: lr_anneal_steps {annealed} would end its training before the {arm.iterations}"
                f" updates of the budget: give {arm.iterations} or more, or 0"
            )
        if study["match"] == "training":
            done = arm.iterations * arm.args["train"].batch_size * arm.operations
            wanted = (budget["images"] or budget["seconds"] * images_a_second[BASE]) * arms[0].operations
            arm.near = f"{done / wanted:.2f} of the base's operations in training"
