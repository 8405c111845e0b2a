"""Fewer steps from a process with many (Improved DDPM, section 4; DDIM's even strides)."""

from .gaussian_diffusion import GaussianDiffusion
from .process import Process


def space_timesteps(num_timesteps, section_counts):
    """
    Choose which rows of a process to keep.

    :param num_timesteps: rows of the process.
    :param section_counts: "ddimN": N rows at an integer stride from 0; or a list of numbers, also as text "10,15,20":
        the process is cut into that many nearly equal sections, and each keeps so many rows, spread evenly with both
        of its ends.
    :return: a set of rows.
    :raises ValueError: if no stride gives N, if a section is too short, or if the text is neither form.
    """
    if isinstance(section_counts, str):
        if section_counts.startswith("ddim"):
            return _strided(num_timesteps, section_counts)
        section_counts = [_count(part, section_counts) for part in section_counts.split(",")]
    size, extra = divmod(num_timesteps, len(section_counts))
    kept, start = set(), 0
    for number, count in enumerate(section_counts):
        length = size + (number < extra)
        kept |= _spread(start, length, count)
        start += length
    if not kept:
        raise ValueError(f"respacing {section_counts} keeps no step")
    return kept


def _count(part, text):
    if not part.strip().isdigit():
        raise ValueError(f"cannot read the respacing {text!r}: give a count (250), counts (10,15,20) or ddimN (ddim25)")
    return int(part)


def _strided(num_timesteps, text):
    wanted = _count(text[len("ddim") :], text)
    by_count = {}
    for stride in range(1, num_timesteps + 1):
        by_count.setdefault(len(range(0, num_timesteps, stride)), stride)
    if wanted in by_count:
        return set(range(0, num_timesteps, by_count[wanted]))
    near = sorted(sorted(by_count, key=lambda count: abs(count - wanted))[:4])
    raise ValueError(
        f"no integer stride takes exactly {wanted} of {num_timesteps} steps; "
        f"near it are {', '.join(f'ddim{count}' for count in near)}"
    )


def _spread(start, length, count):
    if length < count:
        raise ValueError(f"cannot divide section of {length} steps into {count}")
    stride = 1 if count <= 1 else (length - 1) / (count - 1)
    # The original adds the stride up in floating point and rounds half to even: both decide which rows are kept.
    rows, position = set(), 0.0
    for _ in range(count):
        rows.add(start + round(position))
        position += stride
    return rows


class SpacedDiffusion(GaussianDiffusion):
    """
    A GaussianDiffusion that keeps only some rows of a longer one; networks and classifiers are told the original
    step numbers (`timestep_map`).

    :param use_timesteps: the rows of the original process to keep.
    :param kwargs: those of the original GaussianDiffusion.
    """

    def __init__(self, use_timesteps, *, betas, rescale_timesteps=False, **kwargs):
        base = Process(betas)
        self.use_timesteps = set(use_timesteps)
        self.timestep_map = sorted(self.use_timesteps)
        self.original_num_steps = base.num_timesteps
        clock = base.timesteps * (1000.0 / base.num_timesteps) if rescale_timesteps else base.timesteps
        super().__init__(
            betas=base._spaced_betas(self.use_timesteps),
            rescale_timesteps=rescale_timesteps,
            timesteps=clock[self.timestep_map],
            **kwargs,
        )
