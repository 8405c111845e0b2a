"""Train the decoder, which draws pictures of CLIP embeddings and captions, on an npz of captioned images."""

from guided_diffusion import config
from guided_diffusion.config import RunOptions
from guided_diffusion.network_options import DecoderOptions, DecoderProcessOptions
from guided_diffusion.training_options import DecoderTrainOptions, PictureOptions

OPTIONS = DecoderTrainOptions, PictureOptions, DecoderOptions, DecoderProcessOptions, RunOptions
config.answer_help(__name__, __doc__, *OPTIONS)  # before what takes seconds to import

from guided_diffusion import program
from guided_diffusion.resample import create_named_schedule_sampler
from guided_diffusion.script_util import process_of
from guided_diffusion.text_to_image import decoder, models, training
from guided_diffusion.text_to_image.tasks import with_embeddings
from guided_diffusion.train_util import DiffusionTask, Trainer


def main():
    args = config.parse(__doc__, *OPTIONS)
    training.check_preset(args)
    drop = decoder.dropping(args.embedding_dropout, args.caption_dropout)
    device, folder = program.start(args)
    flags = program.network_flags(args, folder, "decoder", DecoderOptions, DecoderProcessOptions)
    clip, told = training.clip_of(args, device)
    clip.check(flags)
    flags |= models.clip_sizes(clip)
    diffusion = process_of(flags)
    data = program.open_training_data(args, flags, False, captions=True)
    held_out = program.open_validation_data(args, flags, False, None, captions=True)
    sampler = create_named_schedule_sampler(args.schedule_sampler, diffusion)
    loop = Trainer(
        DiffusionTask(models.create_decoder(flags).to(device), diffusion, sampler),
        with_embeddings(data, clip, flags["context_length"]),
        val_data=held_out and with_embeddings(held_out, clip, flags["context_length"]),
        precision=program.precision_of(args, flags, "use_fp16"),
        fp16_scale_growth=args.fp16_scale_growth,
        drop=drop,
        watchers=training.picture_watchers(args, flags, diffusion, clip),
        **program.averaging(args),
        **program.loop_options(args, flags),
    )
    dropped = {"embedding": args.embedding_dropout, "caption": args.caption_dropout}
    program.begin_run(args, folder, "decoder", flags, data, clip=told, dropped=dropped)
    loop.run_loop()


if __name__ == "__main__":
    program.run(main)
