"""From images to the noise that a deterministic sampler turns into them, and back."""

from guided_diffusion import checks, config, sizes
from guided_diffusion.config import RunOptions
from guided_diffusion.network_options import DiffusionOptions, ModelOptions
from guided_diffusion.sampling_options import InvertOptions

OPTIONS = InvertOptions, ModelOptions, DiffusionOptions, RunOptions
config.answer_help(__name__, __doc__, *OPTIONS)  # before what takes seconds to import

import numpy as np
import torch as th

from guided_diffusion import generate, inverse, logger, pictures, program, sampling
from guided_diffusion.arrays import read_npz
from guided_diffusion.script_util import open_diffusion
from guided_diffusion.spacing import pick


def main():
    args = config.parse(__doc__, *OPTIONS)
    check(args)
    device, folder = program.start(args, ModelOptions, DiffusionOptions)
    program.alone()
    model, diffusion, flags = open_diffusion(args.model_path, config.explicit_flags(args), device)
    program.log_network(args.model_path, flags)
    checks.check_classes(flags, args.classes)
    diffusion = diffusion.spaced(program.rows_up_to(diffusion, args.max_sigma))
    rule, process = generate.planned(diffusion, sampler=args.sampler, steps=args.steps, spacing=args.spacing)
    predict = process.predictor(model, clip_denoised=False)  # what is clipped cannot be undone

    def walked(walk, x, y):
        told = program.conditions_of(args, flags, y, len(x))

        def batch(part):
            cond = {name: value[part.start : part.stop] for name, value in told.items()}
            return walk(process, predict, rule=rule, cond=cond, x=x[part.start : part.stop])

        return generate.through(batch, len(x), args.batch_size, process.num_timesteps)

    if args.latents:
        latents, y = read_latents(args, flags, device)
        return save(args, folder, walked(sampling.sample, latents, y), y)
    images, y = program.open_images(args, flags, flags["class_cond"])
    latents = walked(up, images, y)
    logger.log(f"latents: {generate.save_arrays(folder, 'latents', latents, y)}")
    back = walked(sampling.sample, latents, y)
    save(args, folder, back, y)
    report(folder, args, images, latents, back)
    if args.interpolate:
        shares = np.linspace(0, 1, args.interpolate + 2)
        between = [walked(sampling.sample, inverse.slerp(latents, latents.roll(-1, 0), share), y) for share in shares]
        pictures.strip([pictures.to_uint8(x).cpu() for x in between]).save(f"{folder}/interpolation.png")
        logger.log(f"each image to the next: {folder}/interpolation.png")


def check(args):
    """Raise ValueError for options that cannot be, before anything is opened."""
    if pick(sampling.SAMPLERS, args.sampler, "sampler").stochastic:
        kept = ", ".join(name for name, sampler in sampling.SAMPLERS.items() if not sampler.stochastic)
        raise ValueError(f"--sampler {args.sampler} adds noise, which cannot be walked back: choose one of {kept}")
    if bool(args.latents) == bool(args.data_dir):
        raise ValueError("give either images by --data_dir, or --latents of an earlier run")
    if args.interpolate < 0 or (args.latents and args.interpolate):
        raise ValueError(f"--interpolate {args.interpolate}: give 0 or more pictures, and images by --data_dir")


def up(process, predict, rule, cond, x):
    return sampling.invert(process, predict, x, rule, cond=cond)


def read_latents(args, flags, device):
    """(latents [N,C,H,W], labels [N] or None) of an earlier run. Raises ValueError unless the model can take them."""
    shape = (flags["image_channels"], *sizes.size_of(flags))
    arrays = read_npz(args.latents, ("arr_0", "arr_1"))
    latents = arrays.get("arr_0", np.zeros(0, bool))
    fits = latents.dtype.kind == "f" and latents.shape == (len(latents), *shape) and latents.size
    if not fits or not (abs(latents) <= np.finfo(np.float32).max).all():
        held = f"{latents.dtype} {list(latents.shape)}" if "arr_0" in arrays else "no arr_0"
        raise ValueError(
            f"{args.latents} holds {held}: the model takes finite numbers [N, {', '.join(map(str, shape))}]"
        )
    y = labels_of(args, flags, arrays.get("arr_1"), len(latents)) if flags["class_cond"] else None
    return th.from_numpy(latents.astype(np.float32)).to(device), None if y is None else th.tensor(y, device=device)


def labels_of(args, flags, y, count):
    """The labels that --classes gives `count` latents, or else those of their file, y: a list."""
    classes = flags["num_classes"]
    if args.classes:
        return checks.parse_classes(args.classes, classes, count, program.class_names(args.model_path))
    if y is None:
        raise ValueError(f"{args.latents} has no labels, and the model needs them: give --classes")
    if y.shape != (count,) or y.dtype.kind not in "iu" or y.min() < 0 or y.max() >= classes:
        raise ValueError(
            f"{args.latents}: arr_1, {y.dtype} {list(y.shape)}, gives no label 0..{classes - 1} to each of {count}"
            " latents: give --classes"
        )
    return y.tolist()


def save(args, folder, x, y):
    images, labels = pictures.to_uint8(x).cpu().numpy(), None if y is None else y.cpu().numpy()
    logger.log(f"images: {generate.save_samples(folder, images, labels, prompts=args.prompts)}")


def report(folder, args, images, latents, back):
    """The error, how normal the latents are, and a picture of all four."""
    error = (back - images).abs()
    logger.logkv("steps", args.steps)
    for name, value in {"max_error": error.max().item(), "rms_error": error.square().mean().sqrt().item()}.items():
        logger.logkvs({name: value, f"{name}_of_255": 127.5 * value})
    logger.logkvs({f"latent_{name}": value for name, value in inverse.normality(latents).items()})
    logger.dumpkvs()
    columns = {"image": images, "noise": latents / 3, "back": back, "difference x 10": 10 * (back - images)}
    tiles = [pictures.to_uint8(x).cpu() for x in columns.values()]
    path = f"{folder}/inversion.png"
    pictures.strip(tiles, column_labels=list(columns), title=f"{args.sampler}, {args.steps} steps").save(path)
    logger.log(f"picture: {path}")


if __name__ == "__main__":
    program.run(main)
