"""Mean and covariance of a stream of features in float64, merged exactly over blocks, processes and runs."""

import numpy as np

BUFFER = 1000  # rows a step: each touches the whole covariance matrix, which costs more than its arithmetic


class Moments:
    """Count, mean [D] and scatter [D,D] (sum of outer products about the mean) of all rows that were added.

    Two halves merge without loss (Chan, Golub and LeVeque 1979): with n = n1 + n2 and d = mean2 - mean1 the mean is
    mean1 + d n2/n, the scatter S1 + S2 + d d^T n1 n2 / n. So order and partition of the rows do not matter.
    """

    def __init__(self, width):
        self.count, self.mean, self.scatter = 0, np.zeros(width), np.zeros((width, width))
        self._waiting = []

    @classmethod
    def of(cls, count, mean, covariance):
        """From stored statistics of `count` rows, covariance with divisor count - 1, so that more can be added."""
        known = cls(len(mean))
        known.count = int(count)
        known.mean = np.array(mean, np.float64)
        known.scatter = np.array(covariance, np.float64) * (known.count - 1)
        return known

    def add(self, rows):
        """Take in rows [n,D] of any float type, n >= 0."""
        self._waiting.append(np.asarray(rows))
        if sum(map(len, self._waiting)) >= BUFFER:
            self._flush()
        return self

    def merge(self, other):
        """Take in the rows of other Moments."""
        other._flush()
        self._flush()
        self._merge(other.count, other.mean, other.scatter)
        return self

    def statistics(self):
        """Mean [D] and covariance [D,D] (divisor N-1), N >= 2 (ValueError otherwise)."""
        self._flush()
        if self.count < 2:
            raise ValueError(f"features of {self.count} images, but at least 2 are needed: one image has no spread")
        return self.mean.copy(), self.scatter / (self.count - 1)

    def _flush(self):
        waiting, self._waiting = self._waiting, []
        if sum(map(len, waiting)):
            rows = np.concatenate(waiting).astype(np.float64)
            mean = rows.mean(axis=0)
            rows -= mean
            self._merge(len(rows), mean, rows.T @ rows)

    def _merge(self, count, mean, scatter):
        if not count:
            return
        total, shift = self.count + count, mean - self.mean
        self.mean = self.mean + shift * (count / total)
        self.scatter += scatter
        self.scatter += np.outer(shift, shift * (self.count * count / total))
        self.count = total

    def __getstate__(self):  # on the way to another process
        self._flush()
        return self.__dict__
