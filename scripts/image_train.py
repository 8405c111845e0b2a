"""Train a diffusion model on images."""

from guided_diffusion import checks, config, sizes
from guided_diffusion.config import RunOptions
from guided_diffusion.network_options import DiffusionOptions, ModelOptions
from guided_diffusion.training_options import TrainOptions, WatchOptions

OPTIONS = TrainOptions, WatchOptions, ModelOptions, DiffusionOptions, RunOptions
config.answer_help(__name__, __doc__, *OPTIONS)  # before what takes seconds to import

import numpy as np

from guided_diffusion import dist_util, logger, pictures, program
from guided_diffusion.image_datasets import load_data
from guided_diffusion.resample import create_named_schedule_sampler
from guided_diffusion.script_util import create_model_and_diffusion
from guided_diffusion.train_util import TrainLoop
from guided_diffusion.watch import Watch


def main():
    args = config.parse(__doc__, *OPTIONS)
    checks.check_watching(args)
    device, folder = program.start(args)
    flags = program.network_flags(args, folder, "diffusion", ModelOptions, DiffusionOptions)
    model, diffusion = create_model_and_diffusion(**flags)
    data = program.open_training_data(args, flags, flags["class_cond"])
    loop = TrainLoop(
        model=model.to(device),
        diffusion=diffusion,
        data=data,
        precision=program.precision_of(args, flags, "use_fp16"),
        fp16_scale_growth=args.fp16_scale_growth,
        schedule_sampler=create_named_schedule_sampler(args.schedule_sampler, diffusion),
        ema_rate=args.ema_rate,
        ema_warmup=args.ema_warmup,
        ema_halflife=args.ema_halflife,
        ema_power=args.ema_power,
        val_data=program.open_validation_data(args, flags, flags["class_cond"], data.class_names),
        lr_anneal_steps=args.lr_anneal_steps,
        drop=program.dropping(flags),
        watchers=watchers(args, flags, diffusion, data.class_names),
        **program.loop_options(args, flags),
    )
    texts = {"text_encoder": data.text_encoder} if data.text_encoder else {}
    program.begin_run(args, folder, "diffusion", flags, data, **texts)
    loop.run_loop()


def watchers(args, flags, diffusion, names):
    """What WatchOptions ask for, as `Trainer` takes it."""
    how = {"num_classes": len(names or []), "steps": args.sample_steps, "batch_size": args.batch_size}
    watch = Watch(diffusion, flags, logger.get_dir(), seed=args.seed, **how)
    found = [(args.sample_interval, watch.picture)] if args.sample_interval else []
    if args.eval_every:
        made = []  # on the first process, which alone looks at images
        dist_util.from_main(lambda: made.append(distance_to_data(args, flags)))
        found.append((args.eval_every, lambda trainer: watch.score(trainer, args.eval_samples, *(made or [None]))))
    return found


def distance_to_data(args, flags):
    """A function from samples, uint8 [N,H,W,C], to {"fid": their Frechet distance to images of the data}."""
    from evaluations import metrics
    from evaluations.features import extract, make_extractor

    data = load_data(
        data_dir=args.val_data_dir or args.data_dir, batch_size=args.batch_size, image_size=sizes.size_of(flags),
        image_channels=flags["image_channels"], random_flip=False, num_workers=0, seed=args.seed, once=True,
        background=args.background, skip_bad_images=args.skip_bad_images,
    )  # fmt: skip
    extractor = make_extractor(args.eval_extractor, dist_util.dev())
    parts, count = [], 0
    for x, _ in data:
        parts.append(extract(extractor, pictures.nearest_uint8(x).numpy()).pool)
        count += len(x)
        if count >= args.eval_samples:
            break
    reference = np.concatenate(parts)[: args.eval_samples]            # [M,D]

    def scores(images):
        return {"fid": metrics.frechet_distance_from_features(reference, extract(extractor, images).pool)}

    return scores


if __name__ == "__main__":
    program.run(main)
