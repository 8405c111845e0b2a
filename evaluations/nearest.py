"""Nearest neighbours among features, exact, in blocks of bounded memory."""

import numpy as np

from evaluations import metrics


def nearest(queries, base, k=1, itself=None):
    """Squared distances [N,k], ascending, from queries [N,D] to their nearest rows of base [M,D], and whose they are
    [N,k]; inf and -1 where base has fewer rows.

    :param itself: the row of base that the first query is: queries are rows of base, and none its own neighbour.
    """
    queries, base = np.asarray(queries), np.asarray(base)
    there = min(k, len(base) - (itself is not None))
    distances, owners = np.full((len(queries), k), np.inf), np.full((len(queries), k), -1)
    for rows, block in metrics._squared_distances(queries, base):                     # [B,M]
        if itself is not None:
            own = np.arange(len(block))
            block[own, itself + rows.start + own] = np.inf
        some = np.argpartition(block, there - 1, axis=1)[:, :there]                   # [B,there]
        values = np.take_along_axis(block, some, axis=1)
        order = np.argsort(values, axis=1, kind="stable")
        distances[rows, :there] = np.take_along_axis(values, order, axis=1)
        owners[rows, :there] = np.take_along_axis(some, order, axis=1)
    return distances, owners
