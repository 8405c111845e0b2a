"""Train a classifier of noised images, for guidance; or of clean ones, for scoring (--noised False)."""

from guided_diffusion import config
from guided_diffusion.config import RunOptions
from guided_diffusion.network_options import ClassifierOptions, DiffusionOptions
from guided_diffusion.training_options import ClassifierTrainOptions

OPTIONS = ClassifierTrainOptions, ClassifierOptions, DiffusionOptions, RunOptions
config.answer_help(__name__, __doc__, *OPTIONS)  # before what takes seconds to import

from guided_diffusion import program
from guided_diffusion.resample import create_named_schedule_sampler
from guided_diffusion.script_util import create_classifier_and_diffusion
from guided_diffusion.train_util import ClassifierTask, Trainer


def main():
    args = config.parse(__doc__, *OPTIONS)
    device, folder = program.start(args)
    flags = program.network_flags(args, folder, "classifier", ClassifierOptions, DiffusionOptions)
    classifier, diffusion = create_classifier_and_diffusion(**flags)
    data = program.open_training_data(args, flags, class_cond=True)
    sampler = create_named_schedule_sampler(args.schedule_sampler, diffusion)
    loop = Trainer(
        ClassifierTask(classifier.to(device), diffusion, sampler, noised=args.noised),
        data,
        val_data=program.open_validation_data(args, flags, True, data.class_names),
        lr_anneal_steps=args.iterations if args.anneal_lr else 0,
        precision=program.precision_of(args, flags, "classifier_use_fp16"),
        initial_lg_loss_scale=16.0,
        **program.loop_options(args, flags),
    )
    program.begin_run(args, folder, "classifier", flags, data)
    loop.run_loop()


if __name__ == "__main__":
    program.run(main)
