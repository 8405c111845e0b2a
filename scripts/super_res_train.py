"""Train a super-resolution model: images of --large_size given themselves at --small_size."""

from guided_diffusion import config, sizes
from guided_diffusion.config import RunOptions
from guided_diffusion.network_options import DiffusionOptions, SuperResOptions
from guided_diffusion.training_options import SuperResTrainOptions

OPTIONS = SuperResTrainOptions, SuperResOptions, DiffusionOptions, RunOptions
config.answer_help(__name__, __doc__, *OPTIONS)  # before what takes seconds to import

from guided_diffusion import program
from guided_diffusion.resample import create_named_schedule_sampler
from guided_diffusion.script_util import sr_create_model_and_diffusion
from guided_diffusion.train_util import SuperResTask, Trainer


def main():
    args = config.parse(__doc__, *OPTIONS)
    device, folder = program.start(args)
    flags = program.network_flags(args, folder, "super_res", SuperResOptions, DiffusionOptions)
    sizes.check_sides(flags)
    model, diffusion = sr_create_model_and_diffusion(**flags)
    sampler = create_named_schedule_sampler(args.schedule_sampler, diffusion)
    how = {"small_size": flags["small_size"], "low_res_noise": args.low_res_noise}
    task = SuperResTask(model.to(device), diffusion, sampler, **how)
    data = program.open_training_data(args, flags, flags["class_cond"])
    loop = Trainer(
        task,
        data,
        val_data=program.open_validation_data(args, flags, flags["class_cond"], data.class_names),
        precision=program.precision_of(args, flags, "use_fp16"),
        fp16_scale_growth=args.fp16_scale_growth,
        drop=program.dropping(flags),
        **program.averaging(args),
        **program.loop_options(args, flags),
    )
    program.begin_run(args, folder, "super_res", flags, data)
    loop.run_loop()


if __name__ == "__main__":
    program.run(main)
