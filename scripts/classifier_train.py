"""Train a classifier of noised images, for guidance; or of clean ones, for scoring (--noised False)."""

from guided_diffusion import checkpoint, config, dist_util, program
from guided_diffusion.config import ClassifierOptions, ClassifierTrainOptions, DiffusionOptions, RunOptions
from guided_diffusion.resample import create_named_schedule_sampler
from guided_diffusion.script_util import create_classifier_and_diffusion
from guided_diffusion.train_util import ClassifierTask, Trainer


def main():
    args = config.parse(__doc__, ClassifierTrainOptions, ClassifierOptions, DiffusionOptions, RunOptions)
    device, folder = program.start(args)
    flags = program.network_flags(args, args.resume_checkpoint, ClassifierOptions, DiffusionOptions)
    classifier, diffusion = create_classifier_and_diffusion(**flags)
    data = program.open_training_data(args, flags, class_cond=True)
    val_data = None
    if args.val_data_dir:
        val_data = program.open_data(
            args, flags, args.val_data_dir, class_cond=True, random_flip=False, class_names=data.class_names
        )
    sampler = create_named_schedule_sampler(args.schedule_sampler, diffusion)
    loop = Trainer(
        ClassifierTask(classifier.to(device), diffusion, sampler, noised=args.noised),
        data,
        val_data=val_data,
        eval_interval=args.eval_interval,
        lr_anneal_steps=args.iterations if args.anneal_lr else 0,
        use_fp16=flags["classifier_use_fp16"],
        initial_lg_loss_scale=16.0,
        **program.loop_options(args, flags),
    )
    if dist_util.is_main():  # only now is it known that all options fit
        checkpoint.write_config(folder, "classifier", flags, class_names=data.class_names)
    loop.run_loop()


if __name__ == "__main__":
    program.run(main)
