"""Draw images from a diffusion model."""

from guided_diffusion import checks, config
from guided_diffusion.config import RunOptions
from guided_diffusion.network_options import DiffusionOptions, ModelOptions
from guided_diffusion.sampling_options import EvaluateOptions, SampleOptions

OPTIONS = SampleOptions, ModelOptions, DiffusionOptions, EvaluateOptions, RunOptions
config.answer_help(__name__, __doc__, *OPTIONS)  # before what takes seconds to import

from evaluations.sampled import scored
from guided_diffusion import program
from guided_diffusion.script_util import open_diffusion


def main():
    args = config.parse(__doc__, *OPTIONS)
    device, folder = program.start(args, ModelOptions, DiffusionOptions)
    model, diffusion, flags = open_diffusion(args.model_path, config.explicit_flags(args), device)
    model = program.hastened(args, model)
    program.log_network(args.model_path, flags)
    checks.check_classes(flags, args.classes)
    num_classes, names = 0, None
    if flags["class_cond"]:
        num_classes, names = flags["num_classes"], program.class_names(args.model_path)
    with scored(args, folder, device) as through:
        program.write_samples(args, folder, diffusion, model, flags, num_classes, names, through=through)


if __name__ == "__main__":
    program.run(main)
