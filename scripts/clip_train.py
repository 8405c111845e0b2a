"""Train CLIP, which brings pictures and captions into one space, on an npz of captioned images."""

from guided_diffusion import config
from guided_diffusion.config import RunOptions
from guided_diffusion.network_options import ClipOptions
from guided_diffusion.training_options import ClipTrainOptions

OPTIONS = ClipTrainOptions, ClipOptions, RunOptions
config.answer_help(__name__, __doc__, *OPTIONS)  # before what takes seconds to import

from guided_diffusion import program
from guided_diffusion.text_to_image import models, training
from guided_diffusion.text_to_image.tasks import ClipTask, with_captions
from guided_diffusion.train_util import Trainer


def main():
    args = config.parse(__doc__, *OPTIONS)
    training.check_preset(args)
    training.check_fp32(args)
    device, folder = program.start(args)
    training.check_whole(args)
    flags = program.network_flags(args, folder, "clip", ClipOptions)
    clip = models.create_clip(flags).to(device)
    data = program.open_training_data(args, flags, False, captions=True)
    held_out = program.open_validation_data(args, flags, False, None, captions=True)
    loop = Trainer(
        ClipTask(clip, args.crop_padding),
        with_captions(data, flags["context_length"]),
        val_data=held_out and with_captions(held_out, flags["context_length"]),
        watchers=training.zero_shot_watchers(args, flags),
        **program.averaging(args),
        **program.loop_options(args, flags),
    )
    program.begin_run(args, folder, "clip", flags, data)
    loop.run_loop()


if __name__ == "__main__":
    program.run(main)
