"""How a training run notices that it should end, or that something is wrong with it."""

import contextlib
import signal
import threading
import time

import torch as th

from . import signals
from .sharding import local

# What one process tells the others before a step; the largest counts.
SIGNALLED, TIME_IS_UP, FAILED = 1, 2, 3
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, there is more to do


class Stopped(Exception):
    """The run was asked to end before its last update, and has saved."""

    def __init__(self, reason, message):
        super().__init__(message)
        self.reason = reason


class StopSigns:
    """
    Whether this process was asked to save and leave: by SIGINT, SIGTERM or SIGUSR1, or by the clock.

    :param max_minutes: from now; 0: no limit.
    """

    def __init__(self, max_minutes=0.0):
        if max_minutes < 0:
            raise ValueError(f"max_minutes must be 0 (no limit) or more, not {max_minutes}")
        self.deadline = time.monotonic() + 60 * max_minutes if max_minutes else None
        self.signalled = False

    def asked(self):
        """0, SIGNALLED or TIME_IS_UP."""
        if self.signalled:
            return SIGNALLED
        return TIME_IS_UP if self.deadline and time.monotonic() > self.deadline else 0

    @contextlib.contextmanager
    def listening(self):
        """Catch the signals, a second SIGINT doing what it always does; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in signals.ASKING}
        self._before = before
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number, frame):
        self.signalled = True
        if number == signal.SIGINT:  # queues and launchers repeat the others, impatient people this one
            signal.signal(number, self._before[number])


@contextlib.contextmanager
def naming_lost_loaders():
    """
    Turn torch's error about a loading process that has died into an OSError. It comes by a signal, anywhere in a step,
    so that the step is broken off and nothing can be saved.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise OSError(
            f"a process that loads images has died ({str(error).splitlines()[0].strip()}): if memory ran out, lower"
            " --num_workers; the same command goes on from the last checkpoint"
        ) from error


@contextlib.contextmanager
def evaluating(net):
    """The network in evaluation mode, and back in the mode that it had."""
    training = net.training
    net.eval()
    try:
        yield net
    finally:
        net.train(training)


def first_not_finite(task, x0, cond, t, noise):
    """
    In words, what is the first in the walk of a batch that is not finite: the data, a weight, the output of a layer,
    or, backwards, the gradient of a weight. Leaves gradients behind. All processes walk to the end, whatever each
    has found, as a sharded network needs.
    """
    net, found = task.net, [] if x0.isfinite().all() else ["the data"]
    found += [f"the weight {name}" for name, p in net.named_parameters() if not local(p).isfinite().all()]
    net.zero_grad()

    def look(name):
        def hook(module, inputs, output):
            if not found and isinstance(output, th.Tensor) and not output.isfinite().all():
                found.append(f"the output of {name or type(module).__name__} ({type(module).__name__})")

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in net.named_modules()]
    try:
        with th.enable_grad():
            loss = task.loss(net, x0, cond, t, noise)["loss"].sum()
    finally:
        for hook in hooks:
            hook.remove()
    if not loss.isfinite():
        found.append("the loss")
    loss.backward()
    grads = [(name, p.grad) for name, p in net.named_parameters() if p.grad is not None]
    found += [f"the gradient of {name}" for name, grad in reversed(grads) if not local(grad).isfinite().all()]
    return (found or ["nothing in single steps: the loss scale or the sum over the batch"])[0]
