"""The project's programs in forks of a process that has torch already: a study of many programs in seconds."""

import contextlib
import os
import runpy
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

# What the programs import, so that each fork has it already.
import matplotlib.figure  # noqa: F401
import tqdm.auto

from evaluations import outcome, sampled  # noqa: F401
from guided_diffusion import ablation, rehearsal, signals, study, train_util, watch  # noqa: F401

ROOT = Path(__file__).parent.parent


def fork(work):
    """The id of a process of its own group that does work() and ends, with the exit code that it asks for."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        work()
        code = 0
    except SystemExit as leaving:
        code = leaving.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def program(script, words, output):
    """Be that program, with its output in a file."""
    tqdm.auto.tqdm.set_lock(threading.RLock())  # that of the parent may be held for ever by a thread that is not here
    file = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for number in (1, 2):
        os.dup2(file, number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    sys.argv = [script, *map(str, words)]
    runpy.run_path(str(ROOT / script), run_name="__main__")


def run(self, script, *words, output=None):
    """In the place of `study.Study.run`; not for several at once, since a fork has one thread and the locks of all."""
    path, parent = output or os.devnull, os.getpid()

    def work():
        os.environ[signals.END_WITH] = str(parent)
        program(script, words, path)

    _, status = os.waitpid(fork(work), 0)
    if status:
        code = os.waitstatus_to_exitcode(status)
        raise ValueError(f"{script} ended with exit code {code}; {study.last_line(path)}")


def start(script, words, folder):
    """The id of a process that is this program, run in a folder, and forks all programs that it runs in turn."""

    def work():
        os.setsid()
        os.chdir(folder)
        study.Study.run = run
        program(script, words, Path(folder) / "said.txt")

    return fork(work)


def ended(pid):
    """The exit code of such a process, once it has ended; negative for a signal. After two minutes it is killed."""
    for _ in range(12000):
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return kill(pid)


def kill(pid):
    """End it without a word, and wait until it has."""
    os.kill(pid, signal.SIGKILL)
    return ended(pid)
