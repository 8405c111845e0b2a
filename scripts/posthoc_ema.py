"""Put averages of any width together from the snapshots that --ema_power left in a run's folder."""

import math
import os
import re

from guided_diffusion import config
from guided_diffusion.training_options import PosthocOptions

POSITIONAL = {"folder": "folder of the run"}
OPTIONS = (PosthocOptions,)
config.answer_help(__name__, __doc__, *OPTIONS, positional=POSITIONAL)  # before what takes seconds to import

from guided_diffusion import checkpoint, ema, program, saves

DOUBTFUL = 0.02  # relative error of a profile
NEGLIGIBLE = 1e-9  # weight of a snapshot that is not read


def main():
    args = config.parse(__doc__, *OPTIONS, positional=POSITIONAL)
    program.alone()
    averages = ema.parse(powers=args.sigma_rel)
    if not averages or args.step < 0 or (args.out and len(averages) > 1):
        raise ValueError("give --sigma_rel, as 0.08 or 0.05,0.1; a --step of 0 or more; --out only for one width")
    held = snapshots_in(args.folder)
    step = args.step or max(step for step, _ in held)
    print(f"{len(held)} snapshots of widths {', '.join(f'{width:g}' for width in sorted({w for _, w in held}))}")
    for average in averages:
        path = args.out or os.path.join(args.folder, f"ema_posthoc{average.sigma_rel:g}_{step:06d}.pt")
        weights = ema.combination(list(held), step, average.sigma_rel)
        error = ema.profile_error(list(held), weights, step, average.sigma_rel)
        put_beside(args.folder, path)
        checkpoint.save(added_up(dict(zip(held.values(), weights))), path)
        print(f"{path}: relative error of the profile {error:.2%}")
        if error > DOUBTFUL:
            print(
                f"warning: the profile of width {average.sigma_rel:g} is off by {error:.1%}: it takes more snapshots (a"
                " smaller --save_interval) or such of widths nearer to it"
            )


def snapshots_in(folder):
    """{(step, width): path} by step. Raises FileNotFoundError if there are none."""
    found = (re.fullmatch(r"ema_power([\d.e-]+)_(\d+)\.pt", name) for name in checkpoint.names_in(folder))
    held = {(int(match[2]), float(match[1])): os.path.join(folder, match[0]) for match in found if match}
    if not held:
        raise FileNotFoundError(f"no ema_powerWIDTH_NNNNNN.pt in {folder}: train with --ema_power 0.05,0.1")
    return dict(sorted(held.items()))


def added_up(weights):
    """The sum of state dicts {path: weight}, of which two are in memory at a time."""
    total, first = {}, ""
    for path, weight in weights.items():
        if abs(weight) < NEGLIGIBLE:
            continue
        saves.check_file(path)
        state = checkpoint.load(path)
        if not isinstance(state, dict) or not all(hasattr(value, "shape") for value in state.values()):
            raise ValueError(f"{path} is no state dict of a network")
        shapes = {name: tuple(value.shape) for name, value in state.items()}
        if not total:
            first, expected = path, shapes
            total = {name: value.mul_(weight) for name, value in state.items()}
            continue
        if shapes != expected:
            raise ValueError(f"{path} holds another network than {first}: give snapshots of one run only")
        for name, value in state.items():
            total[name].add_(value, alpha=weight)
    if not all(math.isfinite(value.sum()) for value in total.values()):
        raise ValueError(f"the snapshots up to {path} hold weights that are not finite")
    return total


def put_beside(folder, path):
    """The run's config.json beside the file to be written, if that stands elsewhere."""
    content, other = checkpoint.read_config(os.path.join(folder, "model")), checkpoint.read_config(path)
    if content is None or content == other:
        return
    there = os.path.join(os.path.dirname(path), checkpoint.CONFIG_NAME)
    if other:
        raise ValueError(f"{there} describes another network than that of {folder}: choose another folder for --out")
    checkpoint.check_writable(os.path.dirname(path) or ".")
    told = {name: value for name, value in content.items() if name not in ("format", "kind", "flags")}
    checkpoint.write_config(os.path.dirname(path), content["kind"], content["flags"], **told)


if __name__ == "__main__":
    program.run(main)
