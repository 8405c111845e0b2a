"""What a training loop collects between two rows of its log: on the device, without waiting for it."""

import numpy as np
import torch as th

from . import dist_util


class Tally:
    """
    Terms of the loss by timestep, and plain values, summed up when a row is written; part of a run's saved state, so
    that a resumed run writes the very rows of one that went on.

    :param num_timesteps: rows of the process, for the quarters of t.
    """

    def __init__(self, num_timesteps):
        self.num_timesteps = num_timesteps
        self._terms = {}  # {name: [[2,n] values and t]}
        self._values = {}  # {name: [[m] values]}

    def __bool__(self):
        return bool(self._terms)

    def add_terms(self, terms, t, prefix=""):
        """Collect {name: [n]} at rows t [n]."""
        for name, values in terms.items():
            self._terms.setdefault(prefix + name, []).append(th.stack([values.detach().float(), t.float()]))

    def add(self, **values):
        """Collect {name: tensor of no axes}; values that are not finite are passed over in the mean."""
        for name, value in values.items():
            self._values.setdefault(name, []).append(value.detach().float().reshape(1))

    def state(self):
        """What was collected since the last row, as {kind: {name: tensor}} on the host."""
        kinds = {"terms": (self._terms, 1), "values": (self._values, 0)}
        return {kind: {name: th.cat(parts, axis).cpu() for name, parts in held.items()}
                for kind, (held, axis) in kinds.items()}  # fmt: skip

    def load_state(self, state, device):
        """Take up what `state` gave."""
        self._terms = {name: [part.to(device)] for name, part in state["terms"].items()}
        self._values = {name: [part.to(device)] for name, part in state["values"].items()}

    def means(self):
        """
        Means of every value and term, of the terms also by quarter of t (_q0 the least noise), over all processes; what
        was collected is forgotten. Collective.
        """
        held = self.state()
        self._terms, self._values = {}, {}
        sums = {}
        for name, (values, t) in ((name, part.double().numpy()) for name, part in held["terms"].items()):
            values, t = values[np.isfinite(values)], t[np.isfinite(values)]  # skipped steps are counted, not averaged
            quarter = (4 * t / self.num_timesteps).astype(int)
            for key, chosen in [(name, values), *((f"{name}_q{q}", values[quarter == q]) for q in range(4))]:
                sums[key] = (chosen.sum(), len(chosen))
        for name, part in held["values"].items():
            values = part.double().numpy()
            sums[name] = (values[np.isfinite(values)].sum(), int(np.isfinite(values).sum()))
        total = {}
        for part in dist_util.gather_objects(sums):
            for key, (value, count) in part.items():
                before = total.get(key, (0.0, 0))
                total[key] = (before[0] + value, before[1] + count)
        return {key: value / count for key, (value, count) in total.items() if count}


def merged(states):
    """One state from those of several processes."""
    whole = {"terms": {}, "values": {}}
    for state in states:
        for kind, held in whole.items():
            for name, part in state[kind].items():
                held[name] = th.cat([held[name], part], part.ndim - 1) if name in held else part
    return whole
