"""Nearest neighbours among features, and the scores made of them, in blocks of bounded memory, on one process or many.

Distances are squared Euclidean, |u|^2 - 2uv + |v|^2 by matrix product, which cancels. So each block yields a lower
bound of the true distances, less by the largest rounding error that the arithmetic can make, and what the bound leaves
open is settled by sum (u - v)^2 in float64. Products in float32 thus give what float64 gives, in half the time.
"""

from typing import NamedTuple

import numpy as np
import torch

from evaluations.door import Ranks
from evaluations.options import DISTANCES as DISTANCES
from evaluations.options import check_distances

ROWS, COLUMNS = 1024, 8192  # of a block
SPARE = 6  # neighbours kept beyond those asked for, since the bounds may be in another order than the distances
PAIRS = 1024  # settled at once
ALONE = Ranks()


class Rule(NamedTuple):
    """How distances are computed: the type of the products, and the relative error that is allowed for.

    float16 is the original's: everything rounded to half precision, nothing settled, a point among its own neighbours
    (Kynkaanniemi et al. 2019, code of that year); blocks that overflow are done again in float32.
    """

    name: str
    dtype: torch.dtype
    slack: float
    device: str = "cpu"

    @property
    def settles(self):
        return self.name != "float16"


def rule_of(name, width, device="cpu"):
    """The Rule of a name in DISTANCES for features of that width. A dot product of D terms errs by D u |u||v|."""
    check_distances(name)
    dtype = torch.float64 if name == "float64" else torch.float32
    slack = 0.0 if name == "float16" else (width / 2 + 8) * torch.finfo(dtype).eps
    return Rule(name, dtype, slack, str(device))


class Points:
    """Features [N,D] in the form that products take: rows as they came, and a shift that keeps the norms small."""

    def __init__(self, rows, rule, shift=None):
        self.rows, self.rule = rows, rule
        self.shift = shift if rule.settles else None
        self.norms = torch.empty(len(rows), dtype=rule.dtype, device=rule.device)
        for start in range(0, len(rows), ROWS):
            x = self._matrix(start, start + ROWS)
            self.norms[start : start + ROWS] = x.double().square().sum(1)

    def __len__(self):
        return len(self.rows)

    def part(self, rows):
        """The Points of a slice of the rows."""
        part = object.__new__(Points)
        part.rows, part.rule, part.shift, part.norms = self.rows[rows], self.rule, self.shift, self.norms[rows]
        return part

    def block(self, start, stop):
        """(matrix [n,D], squared norms [n]) of rows start..stop, on the device."""
        return self._matrix(start, stop), self.norms[start:stop]

    def _matrix(self, start, stop):
        x = self.rows[start:stop]
        if self.shift is not None:
            x = x - self.shift
        if not self.rule.settles:
            with np.errstate(over="ignore"):
                half = x.astype(np.float16)
            x = half if np.isfinite(half).all() else x
        kind = np.float64 if self.rule.dtype == torch.float64 else np.float32
        return torch.from_numpy(np.require(x, kind, ["C", "W"])).to(self.rule.device)


def shift_of(total, squares, count):
    """The mean, if the features lie so far from the origin that subtracting it pays for the copy; else None."""
    mean = total / max(count, 1)
    return mean if mean @ mean > 0.8 * squares / max(count, 1) else None


def bounds(u, v, rule):
    """Lower bounds [a,b] of the squared distances between two blocks (matrix, norms); the float16 rule's own values."""
    (x, nx), (y, ny) = u, v
    product = x @ y.T                                                                 # [a,b]
    if rule.settles:
        return product.mul_(-2).add_((nx * (1 - rule.slack))[:, None]).add_(ny * (1 - rule.slack))
    half = (nx.half()[:, None] - 2 * product.half() + ny.half()).clamp(min=0)
    return half.float() if half.isfinite().all() else (nx[:, None] - 2 * product + ny).clamp(min=0)


def exact(queries, base, rows, columns):
    """Squared distances [P] of the pairs (queries[rows[p]], base[columns[p]]) by direct differences in float64."""
    found = np.empty(len(rows))
    for start in range(0, len(rows), PAIRS):
        part = slice(start, start + PAIRS)
        difference = queries[rows[part]].astype(np.float64) - base[columns[part]]
        found[part] = np.einsum("pd,pd->p", difference, difference)
    return found


class Smallest:
    """The `keep` smallest bounds of each of N rows so far, and their columns (-1: none yet)."""

    def __init__(self, count, keep, rule):
        self.values = torch.full((count, keep), torch.inf, dtype=rule.dtype, device=rule.device)
        self.columns = torch.full((count, keep), -1, dtype=torch.int64, device=rule.device)

    def update(self, start, bounds, first):
        """Take in a block [a,b] of rows from `start` and columns from `first`."""
        rows, keep = slice(start, start + len(bounds)), self.values.shape[1]
        values, columns = bounds.topk(min(keep, bounds.shape[1]), dim=1, largest=False, sorted=False)
        values, columns = torch.cat([self.values[rows], values], 1), torch.cat([self.columns[rows], columns + first], 1)
        self.values[rows], order = values.topk(keep, dim=1, largest=False)
        self.columns[rows] = columns.gather(1, order)


def nearest(queries, base, k=1, distances="float32", device="cpu", itself=None):
    """Squared distances [N,k], ascending, from queries [N,D] to their nearest rows of base [M,D], and whose they are
    [N,k]; inf and -1 where base has fewer rows.

    :param itself: the row of base that the first query is: queries are rows of base, and none its own neighbour.
    """
    rule, base = rule_of(distances, base.shape[1], device), np.asarray(base)
    queries = np.asarray(queries)
    shift = shift_of(*_sums(base), len(base))
    own = None if itself is None else itself + np.arange(len(queries))
    return _nearest(Points(queries, rule, shift), Points(base, rule, shift), k, own)


def _nearest(queries, base, k, own=None):
    """nearest of Points; own: the row of base [N] that each query is, or None."""
    found = Smallest(len(queries), k + SPARE, queries.rule)
    for first in range(0, len(base), COLUMNS):
        columns = base.block(first, first + COLUMNS)
        for start in range(0, len(queries), ROWS):
            block = bounds(queries.block(start, start + ROWS), columns, queries.rule)
            if own is not None:
                _drop_own(block, own[start : start + ROWS] - first, queries.rule)
            found.update(start, block, first)
    return _settled(queries, base, found, k, own)


def _drop_own(block, columns, rule):
    """Put each row's own column [a], where the block has it, beyond all others; the float16 rule keeps it."""
    rows = np.nonzero((columns >= 0) & (columns < block.shape[1]))[0]
    if rule.settles and len(rows):
        block[torch.from_numpy(rows), torch.from_numpy(columns[rows])] = torch.inf


def _nearest_own(points, k, progress):
    """_nearest of a set in itself. Distances are symmetric: each block above the diagonal serves its mirror image."""
    found, own = Smallest(len(points), k + SPARE, points.rule), np.arange(len(points))
    starts = range(0, len(points), COLUMNS // 2)
    for first in starts:
        columns = points.block(first, first + COLUMNS // 2)
        for start in range(0, min(first + COLUMNS // 2, len(points)), COLUMNS // 2):
            block = bounds(points.block(start, start + COLUMNS // 2), columns, points.rule)
            _drop_own(block, own[start : start + COLUMNS // 2] - first, points.rule)
            found.update(start, block, first)
            if start != first:
                found.update(first, block.T, start)
            progress(len(block) * block.shape[1] * (1 if start == first else 2))
    return _settled(points, points, found, k, own)


def _settled(queries, base, found, k, own):
    """Exact distances and columns from the smallest bounds; rows whose bounds leave it open are looked at again, by
    products in float64, and then one by one."""
    values, columns = found.values.double().cpu().numpy(), found.columns.cpu().numpy()
    if not queries.rule.settles:  # a point is the first of its own neighbours, whatever its rounded distance
        first = 0 if own is None else 1
        return values[:, first : first + k], columns[:, first : first + k]
    known = values < np.inf  # neither empty places nor the point itself
    rows = np.nonzero(known)[0]
    true = np.where(known, 0, np.inf)
    true[known] = exact(queries.rows, base.rows, rows, columns[known])
    order = np.argsort(true, axis=1, kind="stable")[:, :k]
    true, columns = np.take_along_axis(true, order, 1), np.take_along_axis(columns, order, 1)
    others = len(base) - (own is not None)
    unsure = np.nonzero((true[:, -1] > 0) & (values.max(1) <= true[:, -1]) & (others > values.shape[1]))[0]
    if len(unsure) and queries.rule.dtype == torch.float32:
        finer = rule_of("float64", base.rows.shape[1], queries.rule.device)
        both = Points(queries.rows[unsure], finer, queries.shift), Points(base.rows, finer, base.shift)
        true[unsure], columns[unsure] = _nearest(*both, k, None if own is None else own[unsure])
    else:
        for row in unsure:
            itself = None if own is None else own[row]
            true[row], columns[row] = _by_differences(queries.rows[row], base.rows, k, itself)
    return true, columns


def _by_differences(query, base, k, own):
    """(distances [k], columns [k]) of one row to all of base, without a matrix product."""
    everyone = exact(query[None], base, np.zeros(len(base), int), np.arange(len(base)))
    if own is not None:
        everyone[own] = np.inf
    order = np.argsort(everyone, kind="stable")[:k]
    return everyone[order], order


# ------------------------------------------------------------------------------------------------- over the processes


def _sums(rows):
    """(sum [D] of rows, sum of their squared norms), in float64."""
    return rows.sum(0, dtype=np.float64), float(np.einsum("nd,nd->", rows, rows, dtype=np.float64))


def _ring(rows, size, share):
    """Every rank's rows in turn, block by block: (rank that owns them, first of its rows, block), on all ranks."""
    counts = share.share(len(rows))
    for owner, count in enumerate(counts):
        for start in range(0, count, size):
            mine = np.ascontiguousarray(rows[start : start + size]) if owner == share.rank else None
            yield owner, start, share.share(mine)[owner]


def radii(points, ks, ranks=ALONE, progress=lambda work: None):
    """Squared distances [N,len(ks)] from each row of this rank's Points to its k-th nearest other row of all ranks'."""
    k = max(ks)
    if ranks.size == 1:
        found = _nearest_own(points, k, progress)[0]
    else:
        found = np.empty((len(points), k))
        for owner, start, block in _ring(points.rows, COLUMNS, ranks):
            own = start + np.arange(len(block)) if owner == ranks.rank else None
            near = _nearest(Points(block, points.rule, points.shift), points, k, own)[0]
            progress(len(block) * len(points))
            parts = ranks.share(near)
            if owner == ranks.rank:
                found[start : start + len(block)] = np.sort(np.concatenate(parts, 1), 1)[:, :k]
    return found[:, [each - 1 for each in ks]]


def neighbourhood_scores(
    reference, sample, k=3, density_k=5, distances="float32", device="cpu", ranks=ALONE, progress=lambda work: None
):
    """{"precision", "recall", "density", "coverage"} of all ranks' sample rows against all ranks' reference rows.

    Around each row of a set lies a ball that reaches to its k-th nearest other row. Precision is the share of sample
    rows in some ball of the reference, recall the share of reference rows in some ball of the sample (Kynkaanniemi et
    al. 2019). With balls to the density_k-th neighbour, density is the number of reference balls that a sample row lies
    in over density_k, on average, and coverage the share of reference balls that hold a sample row (Naeem et al. 2020).
    Rims are inside.

    :param reference, sample: features [N,D] of this rank; a rank may have none.
    :param density_k: None: no density, no coverage.
    :param progress: called with the number of distances since the last call.
    """
    width = reference.shape[1]
    rule = rule_of(distances, width, device)
    sums = [ranks.share((*_sums(rows), len(rows))) for rows in (reference, sample)]
    counts = [sum(n for *_, n in each) for each in sums]
    for what, count, needed in zip(("reference", "sample"), counts, (max(k, density_k or 1), k)):
        if count <= needed:
            raise ValueError(
                f"{what} features of {count} images, but at least {needed + 1} are needed: each needs {needed} others "
                "as neighbours"
            )
    shift = shift_of(*map(sum, zip(*sums[0])))
    reference, sample = (Points(rows, rule, shift) for rows in (reference, sample))
    of_reference = radii(reference, (k, density_k or k), ranks, progress)
    of_sample = radii(sample, (k,), ranks, progress)[:, 0]
    inside, in_balls = 0, 0                                       # sample rows inside, pairs of sample row and ball
    recalled, covered = np.zeros(len(reference), bool), np.zeros(len(reference), bool)
    for owner, start, block in _ring(sample.rows, ROWS, ranks):
        reach = of_sample[start : start + len(block)] if owner == ranks.rank else None
        reach = ranks.share(reach)[owner]
        here, balls = _meet(Points(block, rule, shift), reference, of_reference, reach, recalled, covered)
        progress(len(block) * len(reference))
        inside += int(np.logical_or.reduce(ranks.share(here)).sum())
        in_balls += sum(ranks.share(balls))
    recalled, covered = (sum(ranks.share(int(each.sum()))) for each in (recalled, covered))
    scores = {"precision": inside / counts[1], "recall": recalled / counts[0]}
    if density_k:
        scores |= {"density": in_balls / (density_k * counts[1]), "coverage": covered / counts[0]}
    return scores


def _meet(block, reference, of_reference, reach, recalled, covered):
    """Which rows of a block of samples lie in some reference ball, and in how many of the wider balls in all; marks in
    place the reference rows that a sample ball of squared radius reach[row] holds, and those whose wide ball is met."""
    inside, balls = np.zeros(len(block), bool), 0
    for first in range(0, len(reference), COLUMNS):
        part = slice(first, first + COLUMNS)
        columns = reference.part(part)
        lower = bounds(block.block(0, len(block)), columns.block(0, COLUMNS), block.rule)
        inside |= _within(lower, block, columns, of_reference[part, 0]).any(1).cpu().numpy()
        wide = _within(lower, block, columns, of_reference[part, 1])
        balls += int(wide.sum())
        covered[part] |= wide.any(0).cpu().numpy()
        recalled[part] |= _within(lower, block, columns, reach[:, None]).any(0).cpu().numpy()
    return inside, balls


def _within(lower, block, columns, squared):
    """bool [a,b]: the distances that have these lower bounds are at most the squared radii, [b] or [a,1]."""
    squared = torch.from_numpy(squared).to(lower.device)
    inside = lower <= squared.to(lower.dtype) * (1 + 4 * torch.finfo(lower.dtype).eps)
    if block.rule.settles:
        row, column = inside.nonzero(as_tuple=True)
        error = 2 * block.rule.slack * (block.norms[row].double() + columns.norms[column].double())
        limit = squared.expand(lower.shape)[row, column]
        unsure = lower[row, column].double() + error > limit
        row, column, limit = row[unsure], column[unsure], limit[unsure]
        true = exact(block.rows, columns.rows, row.cpu().numpy(), column.cpu().numpy())
        inside[row, column] = torch.from_numpy(true).to(limit.device) <= limit
    return inside
