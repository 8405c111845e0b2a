"""Errors of scores against independent replicates, closed forms and direct sums."""

import math

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from evaluations import errors, halves, influence, intervals, kernel, metrics
from evaluations.features import Features


class World:
    """Rectified, correlated features [N,d], as those of networks are, of any number of independent images."""

    def __init__(self, d, seed=0):
        rng = np.random.RandomState(seed)
        self.d, self.offset = d, 0.3 * rng.standard_normal(d)
        self.mix = rng.standard_normal((d, d)) / np.sqrt(d * np.arange(1, d + 1))

    def draw(self, n, rng, shift=0.0, scale=1.0):
        return self.features(rng.standard_normal((n, self.d)), shift, scale)

    def features(self, z, shift=0.0, scale=1.0):
        return np.maximum(scale * z @ self.mix + self.offset + shift, 0)

    def moments(self, shift=0.0, scale=1.0, count=10**6):
        """Of so many images that their error is a tenth or less of any tested here."""
        rng, sums, squares = np.random.RandomState(99), 0, 0
        for _ in range(10):
            x = self.draw(count // 10, rng, shift, scale)
            sums, squares = sums + x.sum(0), squares + x.T @ x
        mean = sums / count
        return mean, squares / count - np.outer(mean, mean)


def weighted_distance(x, weights, y):
    """Frechet distance of y from x with weights on its rows, covariances with divisor N."""
    weights = weights / weights.sum()
    mean = weights @ x
    sigma = (x - mean).T @ ((x - mean) * weights[:, None])
    return metrics.frechet_distance(mean, sigma, y.mean(axis=0), np.cov(y, rowvar=False, ddof=0))


def test_the_parts_of_the_frechet_distance_are_its_derivatives_by_the_weight_of_each_image():
    rng = np.random.RandomState(0)
    x, y = World(5).draw(60, rng, 0.4, 1.3), World(5).draw(50, rng)
    found = influence.frechet(y, x)
    assert found.value == pytest.approx(metrics.frechet_distance_from_features(y, x), rel=1e-12)
    assert abs(found.sample.sum()) < 1e-15 and abs(found.reference.sum()) < 1e-15
    for parts, mine, other in ((found.sample, x, y), (found.reference, y, x)):
        # Covariances with divisor N have the same derivatives in N/(N-1) times the spread; bring both to that divisor.
        mine, other = (np.mean(f, 0) + (f - np.mean(f, 0)) * np.sqrt(len(f) / (len(f) - 1)) for f in (mine, other))
        for i in (0, 7, 33):
            up, down = (np.ones(len(mine)) for _ in range(2))
            up[i], down[i] = 1 + 1e-4, 1 - 1e-4
            slope = (weighted_distance(mine, up, other) - weighted_distance(mine, down, other)) / 2e-4
            assert slope == pytest.approx(parts[i], rel=0.1, abs=2e-4)  # the divisors differ by 1/N
    spread = influence.frechet(np.zeros((4, 5)), x, fixed=metrics.moments(y))
    np.testing.assert_allclose(spread.sample, found.sample, atol=1e-14)
    assert spread.reference is None and 0 < spread.bias < found.bias


def test_the_bias_of_the_frechet_distance_in_one_dimension_by_hand():
    """E (m1 - m2)^2 adds v1/n; of (s1 - s2)^2 the second derivative by the variance v1 is s2 / (2 s1^3)."""
    rng = np.random.RandomState(1)
    x = rng.exponential(size=(400, 1))
    found = influence.frechet(None, x, fixed=([0.0], [[4.0]]))
    v, squares = x.var(ddof=1), np.square(x - x.mean())
    expected = np.mean(squares + 2.0 / (4 * v**1.5) * (squares - v) ** 2) / 400
    assert found.bias == pytest.approx(expected, rel=1e-10)
    strata = np.repeat([0, 1], 200)  # of which each loses what its own mean adds
    left = 0.0
    for half in (x[:200] - x.mean(), x[200:] - x.mean()):
        terms = np.square(half) + 2.0 / (4 * v**1.5) * (np.square(half) - v) ** 2
        of_mean = half.mean() ** 2 + 2.0 / (4 * v**1.5) * (np.mean(np.square(half)) - v) ** 2
        left += 200 / 199 * (terms.sum() - 200 * of_mean) / 400**2
    assert influence.frechet(None, x, ([0.0], [[4.0]]), (None, strata)).bias == pytest.approx(left, rel=1e-10)


REPLICATES = 200


def replicated(draw, count=REPLICATES):
    """Arrays [count] of value, bias, error, low, high of an Estimate, drawn so often."""
    rows = []
    for seed in range(count):
        each = draw(np.random.RandomState(1000 + seed))
        rows.append([each.value, each.bias, intervals.standard_error(each), *intervals.interval(each)])
    return np.array(rows).T


@pytest.mark.parametrize("d, n, m, shift, scale", [(16, 400, 400, 0.2, 1.1), (32, 500, 1000, 0.1, 1.0),
                                                   (32, 100, 1000, 0.1, 1.1), (24, 300, None, 0.15, 0.9)])  # fmt: skip
def test_the_interval_of_the_frechet_distance_covers_the_truth_of_models_that_differ(d, n, m, shift, scale):
    world = World(d)
    exact = world.moments()
    truth = metrics.frechet_distance(*world.moments(shift, scale), *exact)

    def draw(rng):
        sample = world.draw(n, rng, shift, scale)
        return influence.frechet(None, sample, exact) if m is None else influence.frechet(world.draw(m, rng), sample)

    value, bias, error, low, high = replicated(draw)
    assert 0.90 <= np.mean((low <= truth) & (truth <= high)) <= 0.98
    spread = (value - bias).std(ddof=1)
    assert error.mean() == pytest.approx(spread, rel=0.25)
    # What is taken off is nearly all of the bias, which is several standard errors of the mean over the replicates.
    assert abs(np.mean(value - bias) - truth) < 0.25 * np.mean(value - truth)
    assert np.mean(value - truth) > 5 * spread / math.sqrt(REPLICATES)


@pytest.mark.slow
def test_the_interval_covers_the_truth_in_256_dimensions_from_1000_images():
    world = World(256)
    exact = world.moments(count=5 * 10**5)
    truth = metrics.frechet_distance(*world.moments(0.05, 1.05, 5 * 10**5), *exact)
    value, bias, error, low, high = replicated(
        lambda rng: influence.frechet(world.draw(1500, rng), world.draw(1000, rng, 0.05, 1.05))
    )
    assert 0.90 <= np.mean((low <= truth) & (truth <= high)) <= 0.98
    assert error.mean() == pytest.approx((value - bias).std(ddof=1), rel=0.25)


def test_near_zero_the_error_is_honest_and_the_interval_begins_at_zero():
    draw = World(16).draw
    value, bias, error, low, high = replicated(lambda rng: influence.frechet(draw(400, rng), draw(400, rng)))
    spread = (value - bias).std(ddof=1)
    assert abs(np.mean(value - bias)) < 0.1 * np.mean(value)  # all of it is bias
    assert 1.0 < error.mean() / spread < 1.6  # the second order counts twice in the first: sqrt(2) at most
    assert np.mean(low == 0) > 0.95 and (low >= 0).all() and (high > 0).all()


def test_the_naive_bootstrap_doubles_the_bias_and_misses_the_truth():
    world = World(32)
    truth = metrics.frechet_distance(*world.moments(0.1, 1.0), *world.moments())
    covered = ours = 0
    for seed in range(20):
        rng = np.random.RandomState(seed)
        x, y = world.draw(300, rng, 0.1), world.draw(300, rng)
        again = [metrics.frechet_distance_from_features(y[rng.randint(300, size=300)], x[rng.randint(300, size=300)])
                 for _ in range(40)]  # fmt: skip
        low, high = np.percentile(again, [2.5, 97.5])
        covered += low <= truth <= high
        plain = metrics.frechet_distance_from_features(y, x)
        assert np.mean(again) - plain > 0.6 * influence.frechet(y, x).bias  # bias on top of bias
        low, high = intervals.interval(influence.frechet(y, x))
        ours += low <= truth <= high
    assert covered == 0 and ours >= 17


def test_the_halves_extrapolate_to_the_same_limit_and_repeat_with_their_seed():
    world = World(16)
    rng = np.random.RandomState(5)
    x, y = world.draw(400, rng, 0.2, 1.1), world.draw(500, rng)
    found, estimate = halves.fid_infinity(y, x, seed=3), influence.frechet(y, x)
    assert found == halves.fid_infinity(y, x, seed=3) and found["seed"] == 3
    assert found["value"] != halves.fid_infinity(y, x, seed=4)["value"]
    assert found["value"] == pytest.approx(estimate.value - estimate.bias, abs=0.2 * estimate.bias)
    fixed = halves.fid_infinity(None, x, fixed=metrics.moments(y))["value"]
    assert estimate.value - estimate.bias < fixed < estimate.value  # the bias of the reference stays
    # By hand, a constant set against a Gaussian: no spread is left, so halves tell of the mean alone.
    points = np.repeat([[0.0], [2.0]], 50, axis=0)
    assert halves.fid_infinity(None, points, fixed=([1.0], [[0.0]]), splits=50)["value"] == pytest.approx(1, abs=0.03)


def test_paired_differences_are_three_times_tighter_when_the_samples_share_seeds_and_cover_the_truth():
    world = World(16)
    exact = world.moments()
    truth = metrics.frechet_distance(*world.moments(0.2, 1.1), *exact)
    truth -= metrics.frechet_distance(*world.moments(0.22, 1.12), *exact)
    covered, tighter, shares = [], [], []
    for seed in range(REPLICATES):
        rng = np.random.RandomState(seed)
        z, y = rng.standard_normal((400, 16)), world.draw(400, rng)
        first, second = (influence.frechet(y, world.features(z, *how)) for how in ((0.2, 1.1), (0.22, 1.12)))
        found = intervals.difference(first, second)
        assert found.paired
        covered.append(found.interval[0] <= truth <= found.interval[1])
        tighter.append(math.hypot(*map(intervals.standard_error, (first, second))) / found.standard_error)
        if seed < 30:
            both = [Features(world.features(z, 0.2, scale), softened(z)) for scale in (1.1, 1.12)]
            both = [errors.estimates(Features(y, np.ones((400, 1))), each) for each in both]
            shares.append([math.hypot(*(intervals.standard_error(each[name]) for each in both))
                           / intervals.difference(both[0][name], both[1][name]).standard_error
                           for name in ("kid", "precision")])  # fmt: skip
    assert 0.90 <= np.mean(covered) <= 0.98
    assert np.mean(tighter) > 3
    kid, precision = np.mean(shares, axis=0)
    assert kid > 3 and precision > 1.5
    other = influence.frechet(y, world.draw(300, rng))  # of another size: not paired but for the reference
    found = intervals.difference(first, other)
    assert not found.paired and found.value == pytest.approx(first.value - first.bias - other.value + other.bias)
    expected = [np.square(first.sample).sum(), np.square(other.sample).sum(),
                np.square(first.reference - other.reference).sum()]  # fmt: skip
    assert found.standard_error == pytest.approx(math.sqrt(sum(expected)), rel=1e-12)


def softened(z):
    """Class probabilities [N,3] of features."""
    p = np.exp(2 * z[:, :3])
    return p / p.sum(axis=1, keepdims=True)


# --------------------------------------------------------------------------------------- fixed counts of classes


CENTRES = 1.5 * np.random.RandomState(8).standard_normal((4, 8))


def of_classes(rng, labels, shift=0.0):
    """Features [N,8] of four classes with centres far apart."""
    return CENTRES[labels] + 0.5 * rng.standard_normal((len(labels), 8)) + shift


def test_counts_more_even_than_chance_are_fixed_ones():
    assert influence.strata(np.array([7, 3, 3, 7])).tolist() == [1, 0, 0, 1]
    assert influence.strata(np.arange(503) % 10) is not None
    digits = np.repeat(range(10), [178, 182, 177, 183, 181, 182, 181, 179, 174, 180])
    assert influence.strata(digits) is not None
    by_chance = [influence.strata(np.random.RandomState(seed).randint(10, size=500)) is None for seed in range(100)]
    assert np.mean(by_chance) > 0.95
    assert influence.strata(np.arange(10)) is None and influence.strata(None) is None
    assert influence.strata(np.zeros(9, int)) is None
    parts = influence.within(np.array([1.0, 3.0, 10.0, 14.0]), np.array([0, 0, 1, 1]))
    assert parts == pytest.approx(math.sqrt(2) * np.array([-1, 1, -2, 2]))


def test_with_fixed_counts_of_classes_errors_and_bias_are_those_within():
    """Four far classes: chance in their counts would be most of the error, and most of the bias."""
    labels, of_reference = np.arange(200) % 4, np.arange(320) % 4
    rng = np.random.RandomState(77)
    big = [of_classes(rng, np.arange(200000) % 4, shift) for shift in (0.3, 0.0)]
    truth = metrics.frechet_distance_from_features(*big)
    kid = kernel.kid(*(each[:4000] for each in big[::-1]), strata=[np.arange(4000) % 4] * 2)
    rows, loose = [], []
    for seed in range(REPLICATES):
        rng = np.random.RandomState(seed)
        x, y = of_classes(rng, labels, 0.3), of_classes(rng, of_reference)
        strata = influence.strata(of_reference), influence.strata(labels)
        found = [influence.frechet(y, x, strata=strata), kernel.kid(y, x, strata=strata)]
        found += halves.precision_recall(y, x, seed=seed, strata=strata) if seed < 60 else []
        rows.append([(e.value, e.bias, intervals.standard_error(e), *intervals.interval(e)) for e in found])
        loose.append(influence.frechet(y, x))
    value, bias, error, low, high = np.array([row[0] for row in rows]).T
    assert 0.90 <= np.mean((low <= truth) & (truth <= high)) <= 0.98
    assert error.mean() == pytest.approx((value - bias).std(ddof=1), rel=0.2)
    assert abs(np.mean(value - bias) - truth) < 0.15 * np.mean(value - truth)
    assert np.mean([each.bias for each in loose]) > 4 * bias.mean()
    value, bias, error, *_ = np.array([row[1] for row in rows]).T
    assert abs(np.mean(value - bias) - (kid.value - kid.bias)) < 3 * value.std() / math.sqrt(REPLICATES)
    assert bias.mean() < -2 * value.std() / math.sqrt(REPLICATES)
    assert error.mean() == pytest.approx(value.std(ddof=1), rel=0.2)
    for score in (2, 3):
        value, _, error, *_ = np.array([row[score] for row in rows[:60]]).T
        assert error.mean() == pytest.approx(value.std(ddof=1), rel=0.3)


def test_halves_take_half_of_each_class():
    strata = np.array([0] * 6 + [1] * 4 + [2] * 5)
    side = halves.in_halves(15, np.random.default_rng(0), strata)
    assert [side[strata == c].sum() for c in (0, 1)] == [3, 2] and side[strata == 2].sum() in (2, 3)
    sides = np.stack([halves.in_halves(9, np.random.default_rng(seed)) for seed in range(300)])
    assert (sides.sum(axis=1) == 5).all() and np.allclose(sides.mean(axis=0), 5 / 9, atol=0.1)


# -------------------------------------------------------------------------------------------- kernel distance


def test_kernel_distance_is_the_direct_double_sum_and_unbiased():
    rng = np.random.RandomState(0)
    x, y = rng.standard_normal((7, 3)), rng.standard_normal((5, 3)) + 1
    k = lambda a, b: (a @ b / 3 + 1) ** 3  # noqa: E731
    expected = (np.mean([k(x[i], x[j]) for i in range(7) for j in range(7) if i != j])
                + np.mean([k(y[i], y[j]) for i in range(5) for j in range(5) if i != j])
                - 2 * np.mean([k(a, b) for a in x for b in y]))  # fmt: skip
    assert kernel.kid(y, x).value == pytest.approx(expected, rel=1e-13)
    two = np.array([[0.0], [1.0]]), np.array([[1.0], [2.0]])  # k = 1; 27; 1, 1, 8, 27 by hand
    assert kernel.kid(*two).value == pytest.approx(1 + 27 - 2 * (1 + 1 + 8 + 27) / 4, rel=1e-14)
    world, values = World(8), []
    for seed in range(REPLICATES):
        rng = np.random.RandomState(seed)
        values.append(kernel.kid(world.draw(30, rng), world.draw(20, rng)).value)
    assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(REPLICATES) and np.min(values) < 0 < np.max(values)


def test_blocks_change_no_kernel_distance(monkeypatch):
    rng = np.random.RandomState(0)
    x, y = rng.standard_normal((70, 3)).astype(np.float32), rng.standard_normal((51, 3)).astype(np.float32)
    whole, spread = kernel.kid(y, x), influence.frechet(y, x)
    monkeypatch.setattr(kernel, "ROWS", 44)
    monkeypatch.setattr(influence, "ROWS", 11)
    blocks = kernel.kid(y, x)
    assert blocks.value == pytest.approx(whole.value, rel=1e-12)
    np.testing.assert_allclose(blocks.sample, whole.sample, atol=1e-15)
    again = influence.frechet(y, x)
    np.testing.assert_allclose(again.sample, spread.sample, atol=1e-15)
    assert again.bias == pytest.approx(spread.bias, rel=1e-12)


def test_kernel_distance_of_subsets_is_that_of_torch_fidelity():
    rng = np.random.RandomState(0)
    x, y = rng.standard_normal((40, 4)), rng.standard_normal((30, 4)) + 0.3
    rng, values = np.random.RandomState(2020), []
    for _ in range(6):
        a, b = x[rng.choice(40, 20, replace=False)], y[rng.choice(30, 20, replace=False)]
        kaa, kbb, kab = ((p @ q.T / 4 + 1) ** 3 for p, q in ((a, a), (b, b), (a, b)))
        values.append(sum(k.sum() - np.trace(k) for k in (kaa, kbb)) / (20 * 19) - 2 * kab.mean())
    assert kernel.kid_of_subsets(y, x, 6, 20) == pytest.approx((np.mean(values), np.std(values)), rel=1e-10)
    with pytest.raises(ValueError, match="subsets of 1000 of 30 and 40 images"):
        kernel.kid_of_subsets(y, x)


def test_error_of_the_kernel_distance():
    world = World(16)
    value, _, error, low, high = replicated(lambda rng: kernel.kid(world.draw(300, rng), world.draw(200, rng, 0.2)))
    truth = value.mean()  # it is unbiased, and its mean's error is a fourteenth of the one tested
    assert error.mean() == pytest.approx(value.std(ddof=1), rel=0.2)
    assert 0.90 <= np.mean((low <= truth) & (truth <= high)) <= 0.98


# ------------------------------------------------------------------------ inception score, shares, precision, recall


def test_error_of_the_inception_score():
    value, _, error, low, high = replicated(
        lambda rng: influence.inception_score(softened(rng.standard_normal((330, 6))), split_size=150)
    )
    assert error.mean() == pytest.approx(value.std(ddof=1), rel=0.2)
    assert 0.90 <= np.mean((low <= value.mean()) & (value.mean() <= high)) <= 0.98
    p = softened(np.random.RandomState(0).standard_normal((50, 3)))
    found = influence.inception_score(p, 20)
    assert found.value == metrics.inception_score(p, 20) and found.sample.shape == (50,)
    whole, more = influence.inception_score(p, 99), np.concatenate([np.tile(p, (99, 1)), p[3:4]])
    gained = metrics.inception_score(more, 9999) - whole.value  # by a 99th more of image 3
    assert gained * 99 == pytest.approx(whole.sample[3], rel=0.02)
    one_hot = influence.inception_score(np.eye(4), 4)  # zeros give no NaN; each divergence is log 4
    assert one_hot.value == pytest.approx(4) and not one_hot.sample.any()


@pytest.mark.parametrize("d, n, m, shift, scale", [(8, 200, 200, 0.3, 1.0), (16, 300, 500, 0.2, 1.1)])
def test_errors_of_precision_and_recall_count_the_manifold_too(d, n, m, shift, scale):
    world, rows = World(d), []
    for seed in range(150):
        rng = np.random.RandomState(seed)
        y, x = world.draw(m, rng), world.draw(n, rng, shift, scale)
        found = halves.precision_recall(y, x, seed=seed)
        if seed == 0:
            assert tuple(each.value for each in found) == pytest.approx(metrics.precision_recall(y, x), rel=1e-12)
        rows.append([(each.value, intervals.standard_error(each), *intervals.interval(each)) for each in found])
    for score, trials in zip(np.array(rows).transpose(1, 2, 0), (n, m)):
        value, error, low, high = score
        assert error.mean() == pytest.approx(value.std(ddof=1), rel=0.25)
        assert 0.90 <= np.mean((low <= value.mean()) & (value.mean() <= high)) <= 0.99
        p = value.mean()
        assert value.std(ddof=1) > 1.2 * math.sqrt(p * (1 - p) / trials)  # trials alone would understate it


def test_radii_of_halves_are_those_of_the_halves():
    rng = np.random.RandomState(0)
    centres, points = rng.standard_normal((30, 2)), rng.standard_normal((40, 2))
    inside, parts = halves._cover(centres, points, 3, seed=7, splits=2)
    rng = np.random.default_rng(7)
    side = np.stack([~halves.in_halves(30, rng) for _ in range(2)])
    shares = []
    for half in (1, 0):
        mine = centres[side[0] == 1 - half]
        radii = np.sort(cdist(mine, mine), axis=1)[:, 3]
        shares.append((cdist(points, mine) <= radii).any(axis=1).mean())
    assert inside.mean() == (cdist(points, centres) <= np.sort(cdist(centres, centres), axis=1)[:, 3]).any(1).mean()
    ratio = parts[0] / parts[1]
    raw = []
    for split in range(2):
        by_half = []
        for half in (True, False):
            mine = centres[(side[split] == 0) == half]
            by_half.append((cdist(points, mine) <= np.sort(cdist(mine, mine), axis=1)[:, 3]).any(axis=1).mean())
        raw.append(by_half[0] - by_half[1])
    assert ratio == pytest.approx(raw[0] / raw[1], rel=1e-12)
    assert np.isnan(halves._cover(centres[:7], points, 3, 0, 4)[1]).all()


def test_variance_within_classes_has_the_error_of_its_replicates():
    labels, rows = np.arange(150) % 3, []
    for seed in range(REPLICATES):
        x = np.random.RandomState(seed).exponential(size=(150, 2)) * (1 + labels[:, None])
        found = influence.within_class_variance(x, labels)
        rows.append((found.value, intervals.standard_error(found)))
    value, error = np.array(rows).T
    assert found.value == metrics.within_class_variance(x, labels)
    assert error.mean() == pytest.approx(value.std(ddof=1), rel=0.15)


def test_shares_have_the_interval_of_wilson():
    found = influence.share([True] * 81 + [False] * 182)
    assert intervals.standard_error(found) == pytest.approx(math.sqrt(81 * 182 / 263) / 263, rel=1e-12)
    assert intervals.interval(found) == pytest.approx((0.2553, 0.3662), abs=5e-5)  # Newcombe 1998, table I
    low, high = intervals.interval(influence.share([True] * 20))
    assert high == 1 and low == pytest.approx(0.8389, abs=5e-5)  # and its 20 of 20
    low, high = intervals.interval(influence.share([False] * 20))
    assert low == 0 and high == pytest.approx(1 - 0.8389, abs=5e-5)


# --------------------------------------------------------------------------------------------- digits, files


@pytest.mark.parametrize("value, error, text", [
    (3.942557, 0.0286, "3.943 ± 0.029"), (3.942557, 0.0486, "3.94 ± 0.05"), (3.942557, 0.0961, "3.94 ± 0.10"),
    (0.8265, 0.00123, "0.8265 ± 0.0012"), (215.837, 1.98, "215.8 ± 2.0"), (1234.5, 130.0, "1230 ± 130"),
    (12345.0, 480.0, "12300 ± 500"), (-0.00003, 0.0012, "0.0000 ± 0.0012"), (1.0, 0.0, "1 ± 0"),
    (0.123456, math.nan, "0.123"), (0.5, None, "0.5"), (None, None, "-"), (math.nan, 1.0, "-"),
    (2.5, 0.355, "2.5 ± 0.4"), (2.5, 0.354, "2.50 ± 0.35"), (2.5, 0.0949, "2.50 ± 0.09"),
    (2.5, 0.00996, "2.500 ± 0.010"), (4.123e12, 7e11, "4.1e+12 ± 7e+11"), (1.5e-12, 1.2e-13, "1.50e-12 ± 1.2e-13"),
])
def test_digits_are_those_that_the_error_supports(value, error, text):
    assert intervals.shown(value, error) == text


def test_errors_of_two_sets_and_their_file(tmp_path):
    rng = np.random.RandomState(0)
    world = World(6)
    y, x = (Features(world.draw(n, rng, s), softened(rng.standard_normal((n, 3))), world.draw(n, rng)[:, :4])
            for n, s in ((80, 0), (60, 0.2)))  # fmt: skip
    labels = np.arange(60) % 3
    found = errors.errors_of(y, x, labels=labels, split_size=25, seed=5)
    names = {"inception_score", "fid", "sfid", "kid", "precision", "recall", "label_agreement"}
    assert set(found["standard_errors"]) == set(found["intervals"]) == names
    assert all(error > 0 for error in found["standard_errors"].values())
    assert errors.to_json(found) and found["fid_infinity"]["seed"] == 5
    source = found["error_sources"]["fid"]
    both = math.hypot(source["sample"], source["reference"])
    assert both == pytest.approx(found["standard_errors"]["fid"], rel=1e-12)
    stored = errors.errors_of(y, x, fixed={"fid": metrics.moments(y.pool), "sfid": metrics.moments(y.spatial)})
    assert stored["error_sources"]["fid"] == {"sample": pytest.approx(source["sample"]), "reference": 0.0}
    assert "label_agreement" not in stored["standard_errors"] and stored["error_sources"]["recall"]["reference"] > 0
    estimates = errors.estimates(y, x, labels=labels)
    errors.save(tmp_path / "parts.npz", estimates)
    for name, each in errors.load(tmp_path / "parts.npz").items():
        np.testing.assert_array_equal(each.sample, estimates[name].sample)
        assert intervals.interval(each) == intervals.interval(estimates[name])
    np.savez(tmp_path / "other.npz", **{"fid.about": np.zeros(4)})
    with pytest.raises(ValueError, match=r"other\.npz does not hold the errors of scores"):
        errors.load(tmp_path / "other.npz")
    few = errors.errors_of(*(Features(f.pool[:5], f.probabilities[:5]) for f in (y, x)))
    assert few["standard_errors"]["precision"] is None and few["intervals"]["precision"] == [None, None]
