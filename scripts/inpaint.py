"""Restore images of which only a measurement is known (some pixels, block means, a blur) with a diffusion model."""

import itertools

from guided_diffusion import checks, config
from guided_diffusion.config import RunOptions
from guided_diffusion.network_options import DiffusionOptions, ModelOptions
from guided_diffusion.sampling_options import InpaintOptions

OPTIONS = InpaintOptions, ModelOptions, DiffusionOptions, RunOptions
config.answer_help(__name__, __doc__, *OPTIONS)  # before what takes seconds to import

import torch as th

from guided_diffusion import dist_util, generate, inverse, logger, pictures, program, sampling
from guided_diffusion.script_util import open_classifier, open_diffusion


def main():
    args = config.parse(__doc__, *OPTIONS)
    checks.check_restoration(args)
    device, folder = program.start(args, ModelOptions, DiffusionOptions)
    program.alone()
    model, diffusion, flags = open_diffusion(args.model_path, config.explicit_flags(args), device)
    program.log_network(args.model_path, flags)
    judge = open_judge(args, flags, device)
    checks.check_classes(flags, None if judge else args.classes)
    images, y = program.open_images(args, flags, bool(judge) or flags["class_cond"])
    told = program.conditions_of(args, flags, y, len(images))
    noise = sampling.SeededNoise(args.seed, range(len(images)), device)
    mask = read_mask(args, noise, images) if args.task == "inpaint" else None
    operator = operator_of(args, mask, images)
    measurement = operator(images)
    measurement = measurement + args.noise_std * noise.normal(*measurement.shape[1:]) * (1 if mask is None else mask)

    restored = restore(args, flags, diffusion, model, told, measurement, mask, images)
    guess = simplest(args, operator, measurement, mask)
    report(args, images, y, measurement, operator, restored, guess, judge)
    generate.save_arrays(folder, "measurement", measurement, mask)
    labels = None if y is None else y.repeat_interleave(args.num_samples).cpu().numpy()
    in_turn = zip(itertools.cycle(args.prompts), images)
    texts = [text for text, _ in in_turn for _ in range(args.num_samples)]
    pixels = pictures.to_uint8(restored).cpu().numpy()
    path = generate.save_samples(folder, pixels, labels, picture=False, prompts=texts)
    draw(args, images, guess if mask is None else measurement, restored, f"{folder}/restored.png")
    logger.log(f"samples: {path}\npicture: {folder}/restored.png")


def open_judge(args, flags, device):
    """The classifier of --classifier_path, or None. Raises ValueError if it is one of other images."""
    if not args.classifier_path:
        return None
    judge, its_flags = open_classifier(args.classifier_path, {}, device)
    for name in ("image_size", "image_channels"):
        if flags[name] != its_flags[name]:
            raise ValueError(f"the model has {name} {flags[name]} and {args.classifier_path} has {its_flags[name]}")
    return judge


def operator_of(args, mask, images):
    sides = images.shape[2:]
    if args.task == "inpaint":
        return inverse.pixels(mask)
    if args.task == "super_res":
        return inverse.block_means(*sides, args.factor)
    return inverse.gaussian_blur(*sides, args.blur_std)


def read_mask(args, noise, images):
    """[N,1,H,W], 1 where pixels are known. Raises ValueError if an image has none."""
    height, width = images.shape[2:]
    mask, share = images.new_ones(len(images), 1, height, width), checks.share_of_mask(args.mask)
    if args.mask == "half":
        mask[..., height // 2 :, :] = 0
    elif args.mask == "box":
        mask[..., height // 4 : height - height // 4, width // 4 : width - width // 4] = 0
    elif share is not None:
        order = noise.normal(height * width).argsort(1).argsort(1)
        mask = (order >= round(share * height * width)).to(images).view_as(mask)
    else:
        mask = mask * pictures.read_mask(args.mask, height, width).to(mask)
    if not mask.flatten(1).any(1).all():
        raise ValueError(
            f"--mask {args.mask} leaves none of the {height * width} pixels known: leave some to restore from, or draw"
            " images by image_sample.py"
        )
    return mask


def restore(args, flags, diffusion, model, told, measurement, mask, images):
    """
    --num_samples restorations of each image, one after the other: [N * num_samples,C,H,W] in [-1,1].

    :param told: conditions of the images, as of `program.conditions_of`.
    """
    rule, process = generate.planned(diffusion, sampler=args.sampler, steps=args.steps, spacing=args.spacing)

    def walk(part):
        which = [i // args.num_samples for i in part]
        noise = sampling.SeededNoise(args.seed, [len(images) + i for i in part], dist_util.dev())
        start, cond = noise.normal(*images.shape[1:]), {name: value[which] for name, value in told.items()}
        its_mask = None if mask is None else mask[which]
        if args.method == "repaint":
            return inverse.repaint(
                process, process.predictor(model), rule, start, measurement[which], its_mask,
                jump=args.repaint_jump, times=args.repaint_times, noise=noise, cond=cond,
            )  # fmt: skip
        predict = inverse.by_measurement(
            process, process.predictor(model, clip_denoised=False), operator_of(args, its_mask, images),
            measurement[which], noise_std=args.noise_std, data_std=flags["sigma_data"], scale=args.dps_scale,
        )  # fmt: skip
        return sampling.sample(process, predict, rule, start, noise=noise, cond=cond)

    steps = process.num_timesteps * (args.repaint_times if args.method == "repaint" else 1)
    return generate.through(walk, len(images) * args.num_samples, args.batch_size, steps).clamp(-1, 1)


def simplest(args, operator, measurement, mask):
    """What needs no model: the mean of the known pixels for the others, blocks of one colour, the blur itself."""
    if args.task == "inpaint":
        known = mask.expand_as(measurement)
        mean = measurement.sum((1, 2, 3), keepdim=True) / known.sum((1, 2, 3), keepdim=True).clamp(min=1)
        return measurement + (1 - known) * mean
    return operator.adjoint(measurement) / operator.gain if args.task == "super_res" else measurement


def report(args, images, y, measurement, operator, restored, guess, judge):
    """Log how far samples, the truth and the simplest answer are from measurement and truth, and their class."""
    tries = restored.view(-1, args.num_samples, *images.shape[1:]).unbind(1)  # num_samples times [N,C,H,W]
    answers = {"": tries, "_of_mean": [sum(tries) / len(tries)], "_of_simplest": [guess], "_of_truth": [images]}
    known = (operator(th.ones_like(images)) != 0).float().mean()
    for name, each in answers.items():
        if name != "_of_truth":
            logger.logkv(f"psnr{name}", th.stack([pictures.psnr(x, images) for x in each]).mean().item())
        error = th.stack([operator(x) - measurement for x in each]).square().mean() / known
        logger.logkv(f"measurement_rms{name}", error.sqrt().item())
        if judge:
            right = [judge(x, th.zeros_like(y)).argmax(1) == y for x in each]
            logger.logkv(f"as_labelled{name}", th.stack(right).float().mean().item())
    logger.dumpkvs()


def draw(args, images, shown, restored, path):
    """A row for each image: the truth, the measurement, the restorations."""
    columns = [images, shown, *restored.view(-1, args.num_samples, *images.shape[1:]).unbind(1)]
    labels = ["truth", "measured", *(f"{k + 1}" for k in range(args.num_samples))]
    pictures.strip([pictures.to_uint8(x).cpu() for x in columns], column_labels=labels).save(path)


if __name__ == "__main__":
    program.run(main)
