"""Tell what a training run was, from its run.json, and run its first command again into a new folder."""

import os
import subprocess
import sys
from dataclasses import dataclass

from guided_diffusion import config
from guided_diffusion.config import RunOptions, changed, option


@dataclass
class ReplayOptions:
    """replay"""

    log_dir: str = changed(RunOptions, "log_dir", "", "folder of the new run; empty: that of the old one with _replay")
    run: bool = option(True, "run the first command again, instead of only telling what it was")


POSITIONAL = {"folder": "folder of the run"}
OPTIONS = (ReplayOptions,)
config.answer_help(__name__, __doc__, *OPTIONS, positional=POSITIONAL)  # before what takes seconds to import

from guided_diffusion import checkpoint, program, runs


def main():
    args = config.parse(__doc__, *OPTIONS, positional=POSITIONAL)
    program.alone()
    folder, content = runs.open_run(args.folder)
    start = content["starts"][0]
    print(runs.told(content))
    tell_differences(content["identity"], start, must_have_data=args.run)
    log_dir = os.path.abspath(os.path.expanduser(args.log_dir) or f"{folder}_replay")
    command = runs.replay_command(start, log_dir)
    print(f"replay: cd {runs.shown([start['folder']])} && {runs.shown(command)}", flush=True)
    if args.run:
        sys.exit(replayed(command, start, log_dir))


def tell_differences(identity, start, must_have_data):
    """Print what is not as it was at the first start, the data too."""
    lines = runs.differences(start, runs.surroundings())
    try:
        fingerprint, count = runs.fingerprint_now(start)
        if (fingerprint, count) != (identity["data"], identity["num_images"]):
            before = f"{identity['num_images']} images ({identity['data']})"
            lines.append(f"data: {before} -> {count} images ({fingerprint})")
    except (ValueError, OSError) as error:
        if must_have_data:
            raise
        lines.append(f"data: {error}")
    print("\n".join(f"not as then: {line}" for line in lines) or "software, source, machine and data are as they were")


def replayed(command, start, log_dir):
    """Run the command where and with as many threads as then; its exit code."""
    if checkpoint.latest(log_dir):
        raise ValueError(f"{log_dir} holds the checkpoints of a run: choose another --log_dir for the replay")
    if not os.path.isdir(start["folder"]):
        raise FileNotFoundError(f"the folder that the run was started in, {start['folder']}, is not there any more")
    environment = {**os.environ, "OMP_NUM_THREADS": str(start["machine"]["threads"])}  # sums are ordered by threads
    return subprocess.run(command, cwd=start["folder"], env=environment).returncode


if __name__ == "__main__":
    program.run(main)
