"""Train a diffusion model on images."""

from guided_diffusion import config, program
from guided_diffusion.config import DiffusionOptions, ModelOptions, RunOptions, TrainOptions
from guided_diffusion.resample import create_named_schedule_sampler
from guided_diffusion.script_util import create_model_and_diffusion
from guided_diffusion.train_util import TrainLoop


def main():
    args = config.parse(__doc__, TrainOptions, ModelOptions, DiffusionOptions, RunOptions)
    device, folder = program.start(args)
    flags = program.network_flags(args, folder, "diffusion", ModelOptions, DiffusionOptions)
    model, diffusion = create_model_and_diffusion(**flags)
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
        ema_halflife=args.ema_halflife,
        ema_power=args.ema_power,
        val_data=program.open_validation_data(args, flags, flags["class_cond"], data.class_names),
        lr_anneal_steps=args.lr_anneal_steps,
        drop=program.dropping(flags),
        **program.loop_options(args, flags),
    )
    texts = {"text_encoder": data.text_encoder} if data.text_encoder else {}
    program.begin_run(args, folder, "diffusion", flags, data, **texts)
    loop.run_loop()


if __name__ == "__main__":
    program.run(main)
