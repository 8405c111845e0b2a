"""Processes that load images heed the one that made them, and nobody else."""

import multiprocessing
import signal
import subprocess
import time

import pytest

from guided_diffusion import signals


def shielded(ready):
    signals.heed_parent_alone()
    ready.set()
    time.sleep(60)


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="who sent a signal is not known here")
@pytest.mark.parametrize("way", ["fork", "forkserver"])
def test_a_loading_process_ends_by_its_maker_alone(way):
    context = multiprocessing.get_context(way)
    ready = context.Event()
    process = context.Process(target=shielded, args=(ready,), daemon=True)
    process.start()
    try:
        assert ready.wait(30)
        for number in signals.ASKING:
            subprocess.run(["bash", "-c", f"kill -{int(number)} {process.pid}"], check=True)  # as another process
        time.sleep(0.3)
        assert process.is_alive()
        process.terminate()
        process.join(10)
        assert process.exitcode == 0
    finally:
        process.kill()
