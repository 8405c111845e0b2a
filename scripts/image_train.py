"""Train a diffusion model on images."""

from functools import partial

from guided_diffusion import checkpoint, config, dist_util, guidance, program
from guided_diffusion.config import DiffusionOptions, ModelOptions, RunOptions, TrainOptions
from guided_diffusion.resample import create_named_schedule_sampler
from guided_diffusion.script_util import create_model_and_diffusion
from guided_diffusion.train_util import TrainLoop


def main():
    args = config.parse(__doc__, TrainOptions, ModelOptions, DiffusionOptions, RunOptions)
    device, folder = program.start(args)
    flags = program.network_flags(args, args.resume_checkpoint, ModelOptions, DiffusionOptions)
    model, diffusion = create_model_and_diffusion(**flags)
    null = config.nulls(flags)
    drop = partial(guidance.dropped, null=null, rate=flags["class_dropout"]) if null else None
    data = program.open_training_data(args, flags, flags["class_cond"])
    loop = TrainLoop(
        model=model.to(device),
        diffusion=diffusion,
        data=data,
        use_fp16=flags["use_fp16"],
        fp16_scale_growth=args.fp16_scale_growth,
        schedule_sampler=create_named_schedule_sampler(args.schedule_sampler, diffusion),
        ema_rate=args.ema_rate,
        ema_warmup=args.ema_warmup,
        lr_anneal_steps=args.lr_anneal_steps,
        drop=drop,
        **program.loop_options(args, flags),
    )
    if dist_util.is_main():  # only now is it known that all options fit
        texts = {"text_encoder": data.text_encoder} if data.text_encoder else {}
        checkpoint.write_config(folder, "diffusion", flags, class_names=data.class_names, **texts)
    loop.run_loop()


if __name__ == "__main__":
    program.run(main)
