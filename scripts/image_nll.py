"""Bits per dimension of images under a diffusion model: the variational bound, and its terms by timestep."""

import json
import os

from guided_diffusion import checks, config
from guided_diffusion.config import RunOptions
from guided_diffusion.network_options import DiffusionOptions, ModelOptions
from guided_diffusion.sampling_options import NLLOptions

OPTIONS = NLLOptions, ModelOptions, DiffusionOptions, RunOptions
config.answer_help(__name__, __doc__, *OPTIONS)  # before what takes seconds to import

import numpy as np

from guided_diffusion import checkpoint, dist_util, logger, losses, pictures, program
from guided_diffusion.generate import progress_bar
from guided_diffusion.sampling import SeededNoise
from guided_diffusion.script_util import open_diffusion

TERMS = {"vb": "vb_terms.npz", "mse": "mse_terms.npz", "xstart_mse": "xstart_mse_terms.npz"}


def main():
    args = config.parse(__doc__, *OPTIONS)
    checks.check_counts(args)
    device, folder = program.start(args, ModelOptions, DiffusionOptions)
    model, diffusion, flags = open_diffusion(args.model_path, config.explicit_flags(args), device)
    program.log_network(args.model_path, flags)
    data = program.open_data(
        args, flags, args.data_dir, class_cond=flags["class_cond"], class_names=program.class_names(args.model_path),
        vector_channels=flags["vector_channels"], deterministic=True, random_flip=False, once=True,
    )  # fmt: skip
    count = min(args.num_samples, data.num_images)
    logger.log(f"{count} of the {data.num_images} images are scored")
    found = run_bpd_evaluation(model, diffusion, data, count, args.clip_denoised, seed=args.seed)
    if dist_util.is_main():
        write(folder, found, args)
    dist_util.barrier()


def run_bpd_evaluation(model, diffusion, data, num_samples, clip_denoised, seed=0):
    """
    Score the first images of `data`, each once, whichever process has it; the noise of an image is a function of the
    seed and its place alone.

    :param data: batches of this process, as of `load_data` with `once`.
    :return: on the first process {"total_bpd": [N], "prior_bpd": [N], and for each of TERMS the mean over the images,
        [T], from t = T-1 to 0}, float64; elsewhere None.
    """
    device = dist_util.dev()
    mine = range(dist_util.rank(), num_samples, dist_util.world_size())
    totals, sums, done = [], {name: np.zeros(diffusion.num_timesteps) for name in TERMS}, 0
    predict = diffusion.predictor(model, clip_denoised)
    with progress_bar(len(mine) * diffusion.num_timesteps, dist_util.is_main()) as bar:
        while done < len(mine):
            x0, cond = next(data)
            indices = mine[done : done + len(x0)]
            x0, cond = x0[: len(indices)].to(device), {k: v[: len(indices)].to(device) for k, v in cond.items()}

            def told(x, t, cond=cond):
                bar.update(len(x))
                return predict(x, t, **cond)

            terms = losses.bits_per_dimension(diffusion, told, x0, SeededNoise(seed, indices, device))
            for name in TERMS:
                sums[name] += terms[name].double().sum(0).cpu().numpy()               # [N,T] -> [T]
            bpd = np.stack([terms[name].double().cpu().numpy() for name in ("total_bpd", "prior_bpd")], 1)
            totals += list(zip(indices, bpd))
            done += len(indices)
            bar.set_postfix(images=done * dist_util.world_size(), bpd=f"{np.mean([b[0] for _, b in totals]):.4f}")
    parts = dist_util.gather_objects((totals, sums))
    if not dist_util.is_main():
        return None
    bpd = np.stack([b for _, b in sorted((pair for totals, _ in parts for pair in totals), key=lambda pair: pair[0])])
    if not np.isfinite(bpd).all():
        raise ArithmeticError("the bound is not finite: the network gave NaN or infinite values for some image")
    means = {name: sum(sums[name] for _, sums in parts) / len(bpd) for name in TERMS}
    return {"total_bpd": bpd[:, 0], "prior_bpd": bpd[:, 1], **means}


def write(folder, found, args):
    """The terms as the original writes them, nll.json with the mean and its error, and a picture of the terms."""
    for name, file in TERMS.items():
        save(os.path.join(folder, file), found[name].astype(np.float32))
    total = found["total_bpd"]
    save(os.path.join(folder, "total_bpd.npz"), total)
    error = total.std(ddof=1) / np.sqrt(len(total)) if len(total) > 1 else None
    scores = {"bits_per_dim": total.mean(), "standard_error": error, "prior_bpd": found["prior_bpd"].mean(),
              "images": len(total), "model_path": args.model_path, "data_dir": args.data_dir}  # fmt: skip
    with checkpoint.writing(os.path.join(folder, "nll.json")) as file:
        file.write((json.dumps(scores, indent=2) + "\n").encode())
    vb = found["vb"][::-1]                                                            # from t = 0
    pictures.save_curves(
        os.path.join(folder, "nll.png"), {"vb": (np.arange(len(vb)), np.maximum(vb, 1e-12))}, "timestep t",
        "bits per dimension", f"Terms of the variational bound, {total.mean():.3f} in all", logy=True,
    )  # fmt: skip
    within = "" if error is None else f" ± {error:.4f}"
    logger.log(f"{total.mean():.4f}{within} bits per dimension over {len(total)} images: {folder}")


def save(path, array):
    with checkpoint.writing(path) as file:
        np.savez(file, array)


if __name__ == "__main__":
    program.run(main)
