"""The signals that ask a run to save and leave, and how the processes that load its images stay out of them."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading

END_WITH = "GD_END_WITH"
ASKING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


def end_with_parent():
    """
    Be killed when the parent dies, however that dies, if it is the process whose id stands in $GD_END_WITH: a program
    that a study runs is not to go on alone. To be called where a program starts; without effect but on Linux.
    """
    parent = os.environ.get(END_WITH)
    if parent and sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != int(parent):  # it has died meanwhile, or this is the child of a child
            ctypes.CDLL(None).prctl(1, 0)


def heed_parent_alone(worker=None):
    """
    Let those signals reach this process from its parent only, and end it then. To be called in a process that loads
    images: terminals, queues and launchers signal all processes of a run alike, and the training one, which answers,
    needs the others for its last batch.
    """
    if not hasattr(signal, "sigwaitinfo"):  # macOS, Windows: who sent a signal is not known there
        for number in ASKING:
            if number != signal.SIGTERM:
                signal.signal(number, signal.SIG_IGN)
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, ASKING)
    maker = multiprocessing.parent_process()  # which a server may stand between
    parents = {os.getppid(), maker.pid if maker else None}
    threading.Thread(target=_wait_for, args=(parents,), daemon=True).start()


def _wait_for(parents):
    while signal.sigwaitinfo(ASKING).si_pid not in parents:
        pass
    os._exit(0)
