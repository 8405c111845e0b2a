"""Nearest neighbours and the scores made of them: exact whatever the precision, the blocks and the processes."""

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from tests_golden import GOLDEN, golden_features

from evaluations import neighbours
from evaluations.door import Ranks

ROOT = Path(__file__).resolve().parents[1]


def by_hand(reference, sample, k, wide):
    """The four scores from whole matrices of distances."""
    within = [np.sort(cdist(x, x, "sqeuclidean"), axis=1) for x in (reference, sample)]
    across = cdist(sample, reference, "sqeuclidean")
    balls = across <= within[0][:, wide]
    return {
        "precision": (across <= within[0][:, k]).any(1).mean(),
        "recall": (across <= within[1][:, k, None]).any(0).mean(),
        "density": balls.sum() / (wide * len(sample)),
        "coverage": balls.any(0).mean(),
    }


def features(seed, count, width, shift=0.0, scale=1.0):
    mixing = np.random.RandomState(99).standard_normal((width, width)) / width**0.5
    x = np.random.RandomState(seed).standard_normal((count, width)) @ mixing
    return (np.maximum(x, 0) * scale + shift).astype(np.float32)


@pytest.mark.parametrize("case", "abc")
@pytest.mark.parametrize("distances", ["float32", "float64"])
def test_golden_precision_recall_and_radii_are_equal_in_either_precision(case, distances):
    reference, sample = golden_features(case)
    scores = neighbours.neighbourhood_scores(reference, sample, distances=distances)
    assert (scores["precision"], scores["recall"]) == (GOLDEN[f"{case}/precision"], GOLDEN[f"{case}/recall"])
    points = neighbours.Points(reference, neighbours.rule_of(distances, reference.shape[1]))
    np.testing.assert_allclose(neighbours.radii(points, (3,))[:, 0], GOLDEN[f"{case}/radii_ref"], rtol=1e-12)


@pytest.mark.parametrize("case", "abc")
def test_the_float16_switch_is_near_what_the_original_computed(case):
    reference, sample = golden_features(case)
    scores = neighbours.neighbourhood_scores(reference, sample, distances="float16")
    assert scores["precision"] == pytest.approx(GOLDEN[f"{case}/precision_float16"], abs=0.005)
    assert scores["recall"] == pytest.approx(GOLDEN[f"{case}/recall_float16"], abs=0.005)
    points = neighbours.Points(reference, neighbours.rule_of("float16", reference.shape[1]))
    np.testing.assert_allclose(neighbours.radii(points, (3,))[:, 0], GOLDEN[f"{case}/radii_ref_float16"], rtol=0.0125)


def test_float16_that_overflows_is_done_again_in_float32():
    reference, sample = 100 * features(0, 60, 40) + 100, 100 * features(1, 50, 40) + 100  # norms of 4e5 and more
    exact = neighbours.neighbourhood_scores(reference, sample)
    assert neighbours.neighbourhood_scores(reference, sample, distances="float16") == pytest.approx(exact, abs=0.05)


@pytest.mark.parametrize("shift", [0.0, 1e3, 3e5])
def test_features_far_from_the_origin_lose_nothing(shift):
    """|u|^2 - 2uv + |v|^2 in float32 would keep no digit of the distances at 1e3, in float64 few at 3e5."""
    reference, sample = features(0, 300, 12, shift), features(1, 260, 12, shift)
    expected = by_hand(reference.astype(float), sample.astype(float), 3, 5)
    assert 0.1 < expected["precision"] < 1
    for distances in ("float32", "float64"):
        assert neighbours.neighbourhood_scores(reference, sample, distances=distances) == pytest.approx(expected, abs=0)


def test_near_ties_are_settled_and_not_guessed():
    """Radii differ by less than float32 can tell: on a lattice with a tremor of 1e-9, unsettled sums err."""
    lattice = np.stack(np.meshgrid(*[np.arange(5.0)] * 4), -1).reshape(-1, 4) + 7
    reference = lattice + 1e-9 * np.random.RandomState(0).standard_normal(lattice.shape)
    sample = lattice[::2] + 0.5 + 1e-9 * np.random.RandomState(1).standard_normal(lattice[::2].shape)
    expected = by_hand(reference, sample, 3, 5)
    assert 0 < expected["precision"] < 1 or 0 < expected["recall"] < 1
    assert neighbours.neighbourhood_scores(reference, sample) == pytest.approx(expected, abs=0)
    points = neighbours.Points(reference, neighbours.rule_of("float32", 4))
    exact = np.sort(cdist(reference, reference, "sqeuclidean"), axis=1)[:, [1, 4]]
    np.testing.assert_allclose(neighbours.radii(points, (1, 4)), exact, rtol=1e-14)


def test_more_near_ties_than_are_kept_are_looked_at_in_float64_and_then_one_by_one(monkeypatch):
    """Clusters of 30 points within 1e-3 or 1e-6, whose bounds are all alike in float32, or in float64 too."""
    x = np.repeat(10 * np.random.RandomState(0).standard_normal((6, 8)), 30, axis=0)
    x += np.repeat([1e-3, 1e-6, 1e-3], 60)[:, None] * np.random.RandomState(1).standard_normal(x.shape)
    looked_at = []
    by_differences = neighbours._by_differences
    monkeypatch.setattr(neighbours, "_by_differences", lambda *a: looked_at.append(a[-1]) or by_differences(*a))
    exact = np.sort(cdist(x, x, "sqeuclidean"), axis=1)[:, 3]
    points = neighbours.Points(x, neighbours.rule_of("float32", 8))
    np.testing.assert_allclose(neighbours.radii(points, (3,))[:, 0], exact, rtol=1e-12)
    assert set(looked_at) <= set(range(60, 120)) and len(looked_at) > 30


def test_hundreds_of_copies_are_at_distance_zero():
    x = np.repeat(features(0, 4, 300) + 7, 60, axis=0)
    assert neighbours.neighbourhood_scores(x, x) == {"precision": 1, "recall": 1, "density": 12, "coverage": 1}
    half = neighbours.neighbourhood_scores(x, x[:120])
    assert half == {"precision": 1, "recall": 0.5, "density": 12, "coverage": 0.5}


def test_density_and_coverage_are_what_they_are_expected_to_be_of_equal_distributions():
    """Naeem et al. 2020: E[density] = 1, E[coverage] = 1 - (N-1)...(N-k) / ((M+N-1)...(M+N-k))."""
    n, m, k = 500, 400, 5
    scores = [neighbours.neighbourhood_scores(features(i, n, 6), features(100 + i, m, 6), k, k) for i in range(12)]
    expected = 1 - np.prod([(n - i) / (m + n - i) for i in range(1, k + 1)])
    coverage, density = ([each[name] for each in scores] for name in ("coverage", "density"))
    for values, mean in ((coverage, expected), (density, 1)):
        assert np.mean(values) == pytest.approx(mean, abs=4 * np.std(values) / 12**0.5)
        assert np.std(values) < 0.06


def test_nearest_gives_distances_and_whose_they_are():
    base, queries = features(0, 333, 20), features(1, 40, 20)
    all_pairs = cdist(queries.astype(float), base.astype(float), "sqeuclidean")
    found, whose = neighbours.nearest(queries, base, 3)
    np.testing.assert_array_equal(whose, np.argsort(all_pairs, axis=1)[:, :3])
    np.testing.assert_allclose(found, np.sort(all_pairs, axis=1)[:, :3], rtol=1e-12)
    found, whose = neighbours.nearest(base[100:110], base, 2, itself=100)  # rows of base are not their own neighbours
    own = cdist(base[100:110].astype(float), base.astype(float), "sqeuclidean")
    own[np.arange(10), np.arange(100, 110)] = np.inf
    np.testing.assert_array_equal(whose, np.argsort(own, axis=1)[:, :2])
    found, whose = neighbours.nearest(queries, base[:2], 3)
    assert np.isinf(found[:, 2]).all() and np.isfinite(found[:, :2]).all()


def test_refusals():
    x = features(0, 8, 4)
    with pytest.raises(ValueError, match="reference features of 5 images, but at least 6 are needed: each needs 5"):
        neighbours.neighbourhood_scores(x[:5], x)
    with pytest.raises(ValueError, match="sample features of 3 images, but at least 4"):
        neighbours.neighbourhood_scores(x, x[:3])
    with pytest.raises(ValueError, match="distances are 'half'; choose one of float32, float64, float16"):
        neighbours.neighbourhood_scores(x, x, distances="half")
    assert set(neighbours.neighbourhood_scores(x[:4], x, density_k=None)) == {"precision", "recall"}


# --------------------------------------------------------------------------------------------------- many processes


class Together:
    """Ranks of so many threads, which meet at a barrier: what door.Ranks is, without processes."""

    def __init__(self, size):
        self.size, self.slots, self.barrier = size, [None] * size, threading.Barrier(size)

    def run(self, work):
        """[work(ranks of thread 0), ...]."""
        results = [None] * self.size

        def body(rank):
            results[rank] = work(self.ranks(rank))

        threads = [threading.Thread(target=body, args=(rank,)) for rank in range(self.size)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        return results

    def ranks(self, rank):
        together = self

        class Here(Ranks):
            def share(self, obj):
                together.slots[rank] = obj
                together.barrier.wait()
                all_of_them = list(together.slots)
                together.barrier.wait()
                return all_of_them

        return Here(rank, self.size)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("distances", ["float32", "float16"])
def test_the_reference_is_split_over_ranks_and_nothing_changes(monkeypatch, size, distances):
    monkeypatch.setattr(neighbours, "ROWS", 32)
    monkeypatch.setattr(neighbours, "COLUMNS", 50)
    reference, sample = features(0, 230, 10), features(1, 170, 10, scale=0.9)
    alone = neighbours.neighbourhood_scores(reference, sample, distances=distances)

    def work(ranks):
        # Rank 1 has few samples, and the last no reference at all.
        cut = [0, 2, 5, 170, 170][: ranks.size] + [170]
        parts = [0, 100, 230, 230, 230] if ranks.size == 4 else [0, 230, 230]
        mine = reference[parts[ranks.rank] : parts[ranks.rank + 1]], sample[cut[ranks.rank] : cut[ranks.rank + 1]]
        return neighbours.neighbourhood_scores(*mine, distances=distances, ranks=ranks)

    assert Together(size).run(work) == [alone] * size


def test_memory_is_bounded_by_blocks():
    """12,000 against 12,000 rows would be 576 MB of float32 distances; the process may have 300 MB beyond its start."""
    code = (
        "import resource, numpy as np; from evaluations import neighbours;"
        "r = np.random.RandomState(0).standard_normal((12000, 8)).astype(np.float32);"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "neighbours.neighbourhood_scores(r, r + 0.1);"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 300
