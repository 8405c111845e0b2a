"""The signals that ask a run to save and leave, and how the processes that load its images stay out of them."""

import os
import signal
import threading

ASKING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


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
    threading.Thread(target=_wait_for_parent, args=(os.getppid(),), daemon=True).start()


def _wait_for_parent(parent):
    while signal.sigwaitinfo(ASKING).si_pid != parent:
        pass
    os._exit(0)
