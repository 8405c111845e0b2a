"""Train the prior, which draws the CLIP embeddings of pictures of a caption, on an npz of captioned images."""

from functools import partial

from guided_diffusion import config
from guided_diffusion.config import RunOptions
from guided_diffusion.network_options import PriorOptions, PriorProcessOptions
from guided_diffusion.training_options import PriorTrainOptions

OPTIONS = PriorTrainOptions, PriorOptions, PriorProcessOptions, RunOptions
config.answer_help(__name__, __doc__, *OPTIONS)  # before what takes seconds to import

from guided_diffusion import guidance, program
from guided_diffusion.resample import create_named_schedule_sampler
from guided_diffusion.script_util import process_of
from guided_diffusion.text_to_image import decoder, models, prior, training
from guided_diffusion.text_to_image.tasks import embedded
from guided_diffusion.train_util import DiffusionTask, Trainer


def main():
    args = config.parse(__doc__, *OPTIONS)
    training.check_preset(args)
    training.check_fp32(args)
    decoder.check_rate("caption_dropout", args.caption_dropout)
    device, folder = program.start(args)
    flags = program.network_flags(args, folder, "prior", PriorOptions, PriorProcessOptions)
    training.check_fixed_variance(flags)
    clip, told = training.clip_of(args, device)
    flags |= models.clip_sizes(clip) | {"context_length": clip.length}
    diffusion = process_of(flags)
    data = program.open_training_data(args, clip.images, False, captions=True)
    held_out = program.open_validation_data(args, clip.images, False, None, captions=True)
    sampler = create_named_schedule_sampler(args.schedule_sampler, diffusion)
    loop = Trainer(
        DiffusionTask(models.create_prior(flags).to(device), diffusion, sampler),
        embedded(data, clip),
        val_data=held_out and embedded(held_out, clip),
        drop=partial(guidance.dropped, null=prior.NULL, rate=args.caption_dropout) if args.caption_dropout else None,
        **program.averaging(args),
        **program.loop_options(args, flags),
    )
    program.begin_run(args, folder, "prior", flags, data, clip=told, dropped={"caption": args.caption_dropout})
    loop.run_loop()


if __name__ == "__main__":
    program.run(main)
