"""Scores against closed forms and golden numbers; the feature door; the evaluator program on tiny files."""

import hashlib
import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial.distance import cdist
from scipy.special import softmax
from tests_golden import GOLDEN, golden_features

from evaluations import errors, evaluator, features, kernel, metrics, neighbours, sources, tables
from guided_diffusion import checkpoint, script_util

ROOT = Path(__file__).resolve().parents[1]


def normal(seed, *shape):
    return np.random.RandomState(seed).standard_normal(shape)


def covariance(seed, d):
    root = normal(seed, d, 2 * d)
    return root @ root.T / (2 * d)


# ---------------------------------------------------------------------------------------------- Frechet distance


@pytest.mark.parametrize("case, tolerance", [("a", 1e-6), ("b", 2e-5), ("c", 1e-6)])
def test_frechet_distance_is_the_golden_one(case, tolerance):
    reference, sample = golden_features(case)
    golden = float(GOLDEN[f"{case}/fid"])
    assert metrics.frechet_distance_from_features(sample, reference) == pytest.approx(golden, rel=tolerance)
    moments = *metrics.moments(reference), *metrics.moments(sample)
    assert metrics.frechet_distance(*moments) == pytest.approx(golden, rel=tolerance)


@pytest.mark.parametrize("case", ["a", "c"])
def test_frechet_distance_is_golden_to_ten_digits_but_for_the_float32_means_of_the_reference(case):
    reference, sample = golden_features(case)
    shift = reference.mean(axis=0) - sample.mean(axis=0)
    zero = np.zeros(len(shift))
    spread = metrics.frechet_distance(zero, np.cov(reference, rowvar=False), zero, np.cov(sample, rowvar=False))
    assert spread + float(shift @ shift) == pytest.approx(float(GOLDEN[f"{case}/fid"]), rel=1e-10)


def test_frechet_distance_closed_forms():
    d = 6
    zero, shift, sigma = np.zeros(d), normal(0, d), covariance(1, d)
    assert metrics.frechet_distance(zero, sigma, shift, sigma) == pytest.approx(shift @ shift, rel=1e-13)
    rotation = np.linalg.qr(normal(2, d, d))[0]
    a, b = np.arange(1.0, d + 1) ** 2, np.arange(d, 0.0, -1) ** 2  # the eigenvalues of commuting covariances
    commuting = [rotation @ np.diag(values) @ rotation.T for values in (a, b)]
    expected = np.square(np.sqrt(a) - np.sqrt(b)).sum() + shift @ shift
    assert metrics.frechet_distance(zero, commuting[0], shift, commuting[1]) == pytest.approx(expected, rel=1e-13)
    assert metrics.frechet_distance(np.zeros(1), [[4.0]], np.array([3.0]), [[1.0]]) == 10  # (2 - 1)^2 + 3^2
    assert metrics.frechet_distance(shift, sigma, shift, sigma) == pytest.approx(0, abs=1e-12)
    point = np.zeros((d, d))  # a distribution without spread: no eigenvalue is left at all
    to_a_point = shift @ shift + np.trace(sigma)
    assert metrics.frechet_distance(zero, point, shift, sigma) == pytest.approx(to_a_point, rel=1e-13)


def test_frechet_distance_is_symmetric_and_invariant_under_rotation_and_quadratic_in_scale():
    d = 8
    mu1, mu2, s1, s2 = normal(0, d), normal(1, d), covariance(2, d), covariance(3, d)
    distance = metrics.frechet_distance(mu1, s1, mu2, s2)
    assert metrics.frechet_distance(mu2, s2, mu1, s1) == pytest.approx(distance, rel=1e-13)
    q = np.linalg.qr(normal(4, d, d))[0]
    assert metrics.frechet_distance(q @ mu1, q @ s1 @ q.T, q @ mu2, q @ s2 @ q.T) == pytest.approx(distance, rel=1e-13)
    assert metrics.frechet_distance(3 * mu1, 9 * s1, 3 * mu2, 9 * s2) == pytest.approx(9 * distance, rel=1e-13)


@pytest.mark.parametrize("n1, n2", [(30, 40), (30, 500), (500, 30), (100, 101), (500, 400)])
def test_frechet_distance_from_features_is_the_nuclear_norm_identity(n1, n2):
    """d = 100: both sets, one set, or none below full rank; the identity holds in all cases."""
    x1, x2 = normal(0, n1, 100) @ covariance(5, 100), 1.5 * normal(1, n2, 100) + 0.1
    c1, c2 = (x - x.mean(axis=0) for x in (x1, x2))
    traces = np.square(c1).sum() / (n1 - 1) + np.square(c2).sum() / (n2 - 1)
    root = np.linalg.norm(c1 @ c2.T, ord="nuc") / math.sqrt((n1 - 1) * (n2 - 1))
    expected = np.square(x1.mean(axis=0) - x2.mean(axis=0)).sum() + traces - 2 * root
    assert metrics.frechet_distance_from_features(x1, x2) == pytest.approx(expected, rel=1e-12)
    m1, m2 = metrics.moments(x1), metrics.moments(x2)
    both_orders = metrics.frechet_distance(*m1, *m2), metrics.frechet_distance(*m2, *m1)
    # Without the cut of noise eigenvalues the first would be 1e-6 off, and the second would be NaN.
    assert both_orders == pytest.approx([expected] * 2, rel=2e-8)
    assert both_orders[0] == pytest.approx(both_orders[1], rel=1e-10)


def test_moments_are_those_of_numpy_in_float64():
    x = (1000 + normal(0, 50, 3)).astype(np.float32)
    mu, sigma = metrics.moments(x)
    assert mu.dtype == sigma.dtype == np.float64
    np.testing.assert_allclose(mu, x.astype(np.float64).mean(axis=0), rtol=1e-15)
    np.testing.assert_allclose(sigma, np.cov(x.astype(np.float64).T), rtol=1e-12)
    assert metrics.moments(np.array([[1.0], [3.0]]))[1] == [[2.0]]  # N-1, and a matrix for one dimension too


# ------------------------------------------------------------------------------------------------ inception score


@pytest.mark.parametrize("n", [1300, 11000])
def test_inception_score_is_the_golden_one(n):
    logits = (2 * normal(n, n, 50)).astype(np.float32)
    assert metrics.inception_score(softmax(logits, axis=1)) == pytest.approx(float(GOLDEN[f"is_{n}"]), rel=1e-6)


def test_inception_score_closed_forms():
    assert metrics.inception_score(np.full((20, 8), 1 / 8)) == pytest.approx(1, rel=1e-14)
    one_hot = np.eye(8, dtype=np.float32)
    assert metrics.inception_score(np.tile(one_hot, (5, 1))) == pytest.approx(8, rel=1e-14)  # zeros give no NaN
    assert metrics.inception_score(one_hot[[0] * 30 + [1] * 10]) == pytest.approx(4 / 3**0.75, rel=1e-14)


def test_inception_score_splits_in_file_order_and_counts_a_short_split_equally():
    one_hot = np.eye(4)
    sorted_by_class = one_hot[np.repeat(range(4), 4)]
    assert metrics.inception_score(sorted_by_class, split_size=4) == pytest.approx(1, rel=1e-14)
    assert metrics.inception_score(sorted_by_class, split_size=16) == pytest.approx(4, rel=1e-14)
    eight_and_two = np.concatenate([one_hot[[0, 1, 2, 3] * 2], one_hot[[0, 0]]])
    assert metrics.inception_score(eight_and_two, split_size=8) == pytest.approx((4 + 1) / 2, rel=1e-14)


# ------------------------------------------------------------------------------------- precision, recall, diversity


@pytest.mark.parametrize("case", "abc")
def test_radii_precision_and_recall_are_the_golden_ones(case):
    reference, sample = golden_features(case)
    np.testing.assert_allclose(metrics.knn_radii(reference), GOLDEN[f"{case}/radii_ref"], rtol=1e-12)
    assert metrics.precision_recall(reference, sample) == (GOLDEN[f"{case}/precision"], GOLDEN[f"{case}/recall"])


def test_s08_59_squared_distances_to_the_third_other_point_rims_included_and_each_reference_its_own_radius():
    line = np.array([[0.0], [1.0], [3.0], [7.0], [15.0]])
    np.testing.assert_array_equal(metrics.knn_radii(line), [49, 36, 16, 49, 196])  # k = 3, the point itself left out
    np.testing.assert_array_equal(metrics.knn_radii(line, k=1), [1, 1, 4, 16, 64])
    # Balls of the reference: [-7,7], [-5,7], [-1,7], [0,14], [1,29]. On a rim is inside; 29.5 and -7.5 are outside.
    sample = np.array([[-7.0], [29.0], [29.5], [-7.5]])
    # Of the sample, k = 3: radii 36.5, 36.5, 37, 37: its balls hold the whole line.
    assert metrics.precision_recall(line, sample) == (0.5, 1.0)
    # A small and a large ball: the point at 3 is nearer to the small one's centre, and in the large one alone.
    assert metrics.precision_recall(np.array([[0.0], [1.0], [10.0]]), np.array([[3.0], [90.0]]), k=1) == (0.5, 1.0)


def test_precision_and_recall_are_one_for_equal_sets_and_zero_for_far_ones():
    x = normal(0, 60, 20).astype(np.float32)
    assert metrics.precision_recall(x, x) == (1, 1)
    assert metrics.precision_recall(x, x[::-1]) == (1, 1)
    assert metrics.precision_recall(x, x + 100) == (0, 0)


def test_duplicates_are_at_distance_zero_exactly():
    x = np.repeat(normal(0, 10, 300) + 7, 4, axis=0)  # every ball has radius 0: only exact zeros keep its own points in
    assert not metrics.knn_radii(x).any()
    assert metrics.knn_radii(x, k=4).all()
    assert metrics.precision_recall(x, x) == (1, 1)
    assert metrics.precision_recall(x, x[:20]) == (1, 0.5)


def test_blocks_change_nothing_and_agree_with_direct_differences(monkeypatch):
    reference, sample = 5 + normal(0, 70, 9), 5 + 0.8 * normal(1, 45, 9)
    monkeypatch.setattr(neighbours, "ROWS", 11)
    monkeypatch.setattr(neighbours, "COLUMNS", 26)
    distances = cdist(reference, reference, "sqeuclidean")
    np.testing.assert_allclose(metrics.knn_radii(reference, k=5), np.sort(distances)[:, 5], rtol=1e-12)
    across = cdist(sample, reference, "sqeuclidean")
    precision = (across <= np.sort(distances)[:, 3]).any(axis=1).mean()
    recall = (across <= np.sort(cdist(sample, sample, "sqeuclidean"))[:, 3, None]).any(axis=0).mean()
    assert 0 < precision < 1 and 0 < recall < 1
    assert metrics.precision_recall(reference, sample) == (precision, recall)


def test_within_class_variance_and_label_agreement_by_hand():
    x = np.array([[0.0, 0.0], [2.0, 4.0], [100.0, 5.0], [103.0, 5.0], [106.0, 5.0]], dtype=np.float32)
    labels = np.array([7, 7, 2, 2, 2])
    assert metrics.within_class_variance(x, labels) == pytest.approx((2 + 8 + 9) / 2, rel=1e-14)
    assert metrics.within_class_variance(np.repeat(x, 2, axis=0), np.repeat(range(5), 2)) == 0
    probabilities = np.array([[0.6, 0.3, 0.1], [0.2, 0.3, 0.5], [0.1, 0.8, 0.1], [0.4, 0.5, 0.1]])
    assert metrics.label_agreement(probabilities, np.array([0, 2, 0, 1])) == 0.75


NAN_ROW = np.where(np.arange(10)[:, None] == 4, np.nan, normal(0, 10, 3))


@pytest.mark.parametrize("call, message", [
    (lambda: metrics.moments(np.zeros((1, 3))), "of 1 images, but at least 2"),
    (lambda: metrics.moments(np.zeros(3)), r"shape \[3\]"),
    (lambda: metrics.frechet_distance_from_features(NAN_ROW, NAN_ROW), r"infinite values in 1 rows \(first: 4\)"),
    (lambda: metrics.frechet_distance_from_features(np.zeros((9, 3)), np.zeros((9, 4))), "of 3 and of 4 dimensions"),
    (lambda: metrics.frechet_distance(np.zeros(2), np.eye(2), np.zeros(3), np.eye(3)), "of 2 and 3 dimensions"),
    (lambda: metrics.frechet_distance(np.zeros(2), np.eye(3), np.zeros(2), np.eye(2)), r"\[2\] and sigma \[3, 3\]"),
    (lambda: metrics.frechet_distance(np.zeros(2), -np.eye(2), np.zeros(2), np.eye(2)), "not a covariance"),
    (lambda: metrics.frechet_distance(np.zeros(2), np.eye(2), np.zeros(2), -np.eye(2)), "not a covariance"),
    (lambda: metrics.frechet_distance([0, np.inf], np.eye(2), np.zeros(2), np.eye(2)), "mu holds NaN"),
    (lambda: metrics.knn_radii(np.zeros((3, 2))), "of 3 images, but at least 4 are needed: each needs 3 others"),
    (lambda: metrics.knn_radii(np.zeros((3, 2)), k=0), "k is 0"),
    (lambda: metrics.precision_recall(np.zeros((9, 3)), np.zeros((9, 4))), "of 3 and of 4 dimensions"),
    (lambda: metrics.precision_recall(np.zeros((9, 3)), NAN_ROW), "NaN or infinite"),
    (lambda: metrics.inception_score(normal(0, 5, 4)), "take the softmax"),
    (lambda: metrics.inception_score(np.ones((5, 4))), "take the softmax"),
    (lambda: metrics.inception_score(np.ones((5, 1)), split_size=0), "split_size is 0"),
    (lambda: metrics.within_class_variance(np.zeros((3, 2)), np.array([5, 6, 5])), "class 6 has one image"),
    (lambda: metrics.within_class_variance(np.zeros((3, 2)), np.array([5, 5])), "expected 3 whole numbers"),
    (lambda: metrics.label_agreement(np.ones((2, 3)), np.array([0, 3])), r"0..3 do not fit 3 classes \(0..2\)"),
    (lambda: metrics.label_agreement(np.ones((2, 3)), np.array([0.0, 1.0])), "expected 2 whole numbers"),
])
def test_metrics_refuse_what_has_no_score(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# -------------------------------------------------------------------------------------- classifiers of this project


class TinyClassifier(torch.nn.Module):
    """Features are the mean pixel of each channel; logits are 4 times those."""

    def features(self, x, timesteps):
        assert timesteps.dtype == torch.int64 and timesteps.tolist() == [0] * len(x)
        return x.mean(dim=(2, 3))

    def forward(self, x, timesteps):
        return 4 * self.features(x, timesteps)


def random_images(seed, *shape):
    return np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)


@pytest.fixture
def classifier_file(tmp_path, monkeypatch):
    flags = {"image_size": 8, "image_channels": 3}
    monkeypatch.setattr(script_util, "open_classifier", lambda path, device: (TinyClassifier().to(device), flags))
    file = tmp_path / "classifier.pt"
    file.touch()
    return file


def test_classifier_features_are_at_t_0_of_images_in_minus_one_to_one(classifier_file):
    extractor = features.make_extractor(str(classifier_file))
    assert (extractor.name, extractor.dim) == (str(classifier_file), 3)
    images = random_images(0, 5, 8, 8, 3)
    got = features.extract(extractor, images, batch_size=2)
    pool = (images / 127.5 - 1).mean(axis=(1, 2))
    np.testing.assert_allclose(got.pool, pool, atol=1e-6)
    np.testing.assert_allclose(got.probabilities, softmax(4 * pool, axis=1), atol=1e-6)
    assert got.spatial is None


def write_classifier(folder, **flags):
    """A small classifier of 16x16 images in 5 classes, no layer of it at zero, written as model000001.pt."""
    flags = script_util.classifier_defaults() | {
        "image_size": 16, "num_classes": 5, "classifier_width": 32, "classifier_depth": 1,
        "classifier_channel_mult": "1,2", "classifier_attention_resolutions": "8",
        "classifier_num_head_channels": 32,
    } | flags
    torch.manual_seed(0)
    classifier = script_util.create_classifier(**flags).eval()
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    checkpoint.save(classifier.state_dict(), str(folder / "model000001.pt"))
    checkpoint.write_config(str(folder), "classifier", flags)
    return classifier


def test_a_classifier_checkpoint_of_this_project_is_opened_by_its_path(tmp_path):
    classifier = write_classifier(tmp_path, image_channels=1)
    images = random_images(0, 3, 16, 16, 1)
    got = features.make_extractor(str(tmp_path / "model000001.pt"))(images)
    x, t = torch.tensor(images / 127.5 - 1, dtype=torch.float32).permute(0, 3, 1, 2), torch.zeros(3)
    with torch.no_grad():
        pool, logits = classifier.features(x, t), classifier(x, t)
    np.testing.assert_allclose(got.pool, pool, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got.probabilities, logits.softmax(dim=1), rtol=1e-5)
    assert got.pool.shape == (3, 64) and got.probabilities.shape == (3, 5) and logits.std() > 0.05


@pytest.mark.parametrize("shape, message", [
    ((2, 8, 8, 1), r"1 channels, but the classifier .*classifier\.pt was trained on 3"),
    ((2, 8, 9, 3), r"\[8, 9\] pixels, but .*classifier\.pt reads \[8, 8\]"),
])
def test_classifier_refuses_other_channels_and_sizes(classifier_file, shape, message):
    extractor = features.ClassifierExtractor(classifier_file)
    with pytest.raises(ValueError, match=message):
        extractor(random_images(0, *shape))


def test_make_extractor_says_what_there_is(classifier_file):
    with pytest.raises(FileNotFoundError, match="extractor nothing is neither 'inception' nor the file"):
        features.make_extractor("nothing")
    with pytest.raises(ValueError, match="weights belong to the extractor 'inception'"):
        features.make_extractor(classifier_file, weights="inception.pth")
    with pytest.raises(ValueError, match="resize, allow_other_weights belong to the extractor 'inception'"):
        features.make_extractor(classifier_file, resize="bicubic")
    with pytest.raises(ValueError, match="4 images in batches of 0"):
        features.extract(None, np.zeros((4, 8, 8, 3), np.uint8), batch_size=0)


# ------------------------------------------------------------------------------------------------- other extractors


def test_a_function_of_ones_own_is_an_extractor(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = tmp_path / "own_features.py"
    module.write_text("import torch\ndef tensor(images):\n    return torch.tensor(images).double().mean((1, 2))\n"
                      "def wrong(images):\n    return images\ndef broken(images):\n    return images[:, 0, 0] * 1e999\n"
                      "tensor.channels = 1\n")  # fmt: skip
    extractor = features.make_extractor("own_features:tensor")
    assert (extractor.name, extractor.dim, extractor.channels) == ("own_features:tensor", 1, 1)
    images = random_images(0, 4, 5, 5, 1)
    got = features.extract(extractor, images, 3)
    np.testing.assert_allclose(got.pool, images.mean((1, 2)), rtol=1e-6)
    assert got.pool.dtype == np.float32 and got.probabilities is None and got.spatial is None
    assert features.identity_of(extractor)["code"] == f"sha256:{hashlib.sha256(module.read_bytes()).hexdigest()}"
    for name, message in (
        ("own_features:wrong", r"gave \[1, 32, 32, 3\] for 1 images: expected \[N,D\]"),
        ("own_features:broken", "NaN or infinite"),
        ("own_features:absent", "has no attribute 'absent'"),
        ("no_such_module:f", "No module named 'no_such_module'"),
    ):
        with pytest.raises(ValueError, match=message):
            features.make_extractor(name)


def fake_registry(monkeypatch, kind):
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    registry = types.ModuleType("torch_fidelity.registry")
    registry.FEATURE_EXTRACTORS_REGISTRY = {"inception-v3-compat": None, "dinov2-vit-s-14": kind}
    monkeypatch.setitem(sys.modules, "torch_fidelity.registry", registry)


def test_networks_of_torch_fidelity_stand_behind_the_same_door(monkeypatch):
    class Means(torch.nn.Module):
        def __init__(self, name, layers):
            super().__init__()
            assert (name, layers) == ("dinov2-vit-s-14", ["tokens"])
            self.scale = torch.nn.Parameter(torch.tensor(2.0))

        get_default_feature_layer_for_metric = staticmethod({"fid": "tokens"}.__getitem__)

        def forward(self, x):
            assert x.dtype == torch.uint8 and not self.training
            return (self.scale * x.float().mean((2, 3)),)

    fake_registry(monkeypatch, Means)
    extractor = features.make_extractor("dinov2-vit-s-14")
    assert (extractor.name, extractor.dim) == ("dinov2-vit-s-14", 3)
    images = random_images(0, 20, 5, 5, 3)
    np.testing.assert_allclose(extractor(images).pool, 2 * images.mean((1, 2)), rtol=1e-6)
    assert features.identity_of(extractor)["weights"].startswith("tensors:")
    with pytest.raises(ValueError, match="clip-none is none of torch-fidelity's: dinov2-vit-s-14"):
        features.make_extractor("clip-none")


@pytest.mark.parametrize("error", [OSError("no route"), RuntimeError("no internet connection\nand more")])
def test_without_their_weights_or_torchvision_the_error_says_what_is_missing(monkeypatch, error):
    def kind(name, layers):
        raise error

    kind.get_default_feature_layer_for_metric = {"fid": "tokens"}.__getitem__
    fake_registry(monkeypatch, kind)
    with pytest.raises(FileNotFoundError, match="the weights of dinov2-vit-s-14 cannot be had: no "):
        features.make_extractor("dinov2-vit-s-14")
    monkeypatch.setitem(sys.modules, "torch_fidelity.registry", None)
    with pytest.raises(ImportError, match=r"needs torch-fidelity and a torchvision that fits torch 2\..*: pip install"):
        features.make_extractor("dinov2-vit-s-14")


# ------------------------------------------------------------------------------------------- the evaluator program


class FirstPixels:
    """An extractor of exact answers: three pixels as features, a spatial map if it passes for Inception."""

    dim = 3

    def __init__(self, name="inception"):
        self.name = name

    def __call__(self, images):
        pool = images.reshape(len(images), -1)[:, :3].astype(np.float32)
        return features.Features(pool, softmax(pool / 64, axis=1), pool[:, :2] if self.name == "inception" else None)


REFERENCE, SAMPLE = random_images(0, 30, 4, 4, 3), random_images(1, 40, 4, 4, 3) // 2 + 90


@pytest.fixture
def files(tmp_path):
    """Paths of a reference and a sample file."""
    np.savez(tmp_path / "reference.npz", REFERENCE)
    np.savez(tmp_path / "sample.npz", SAMPLE, np.arange(40) % 3)
    return tmp_path / "reference.npz", tmp_path / "sample.npz"


def test_evaluate_is_the_metrics_of_the_features(files):
    reference, sample = FirstPixels()(REFERENCE), FirstPixels()(SAMPLE)
    precision, recall = metrics.precision_recall(reference.pool, sample.pool)
    scores = evaluator.evaluate(*files, FirstPixels(), batch_size=7)
    wide = neighbours.neighbourhood_scores(reference.pool, sample.pool)
    expected = {
        "inception_score": metrics.inception_score(sample.probabilities),
        "fid": metrics.frechet_distance_from_features(reference.pool, sample.pool),
        "sfid": metrics.frechet_distance_from_features(reference.spatial, sample.spatial),
        "precision": precision,
        "recall": recall,
        "density": wide["density"],
        "coverage": wide["coverage"],
    }
    assert {key: scores[key] for key in expected} == pytest.approx(expected, rel=1e-12)
    assert scores["extractor"] == "inception" and scores["notes"] == ["30 reference images against 40 samples"]
    found = errors.errors_of(reference, sample)
    assert {key: scores[key] for key in found} == found and scores["standard_errors"]["fid"] > 0
    assert scores["kid"] == kernel.kid(reference.pool, sample.pool).value
    assert set(scores) == {*expected, *found, "kid", "extractor", "reference", "sample", "protocol", "notes"}
    plain = evaluator.evaluate(*files, FirstPixels(), with_errors=False)
    assert set(plain) == set(scores) - set(found) - {"kid"}
    assert 0 < recall < 1 and precision != recall
    in_memory = evaluator.evaluate(*map(evaluator.ImageSet, "ab", (REFERENCE, SAMPLE)), FirstPixels())
    assert {key: in_memory[key] for key in expected} == {key: scores[key] for key in expected}
    assert in_memory["protocol"] == scores["protocol"]


def test_a_result_carries_its_protocol(files, tmp_path):
    scores = evaluator.evaluate(*files, FirstPixels())
    each = b"".join(hashlib.sha256(b"(4, 4, 3)" + image.tobytes()).digest() for image in REFERENCE)
    images = hashlib.sha256(each).hexdigest()
    protocol = scores["protocol"]
    assert protocol["reference"] == scores["reference"]["sha256"]
    assert protocol["reference"] == f"sha256:{hashlib.sha256(images.encode()).hexdigest()}"
    assert protocol["images"] == {"reference": 30, "sample": 40} and protocol["extractor"] == {"name": "inception"}
    assert (protocol["k"], protocol["density_k"], protocol["distances"]) == (3, 5, "float32")
    assert (protocol["split_size"], protocol["splits"], protocol["shuffle"]) == (5000, None, None)
    assert protocol["versions"]["torch"] == torch.__version__
    switched = evaluator.evaluate(*files, FirstPixels(), settings=evaluator.Settings(k=2, splits=4, shuffle=1))
    differing = {key for key in protocol if switched["protocol"][key] != protocol[key]}
    assert differing == {"k", "splits", "shuffle"}
    assert switched["inception_score"] != scores["inception_score"] and switched["recall"] < scores["recall"]
    assert switched["fid"] == scores["fid"] and switched["coverage"] == scores["coverage"]
    other = tmp_path / "other.npz"
    np.savez(other, np.concatenate([REFERENCE[1:], REFERENCE[:1]]))
    assert evaluator.evaluate(other, files[1], FirstPixels())["protocol"]["reference"] != protocol["reference"]


def test_stored_moments_count_as_part_of_the_reference_and_those_of_other_features_are_left_alone(files, tmp_path):
    moments = {"mu": np.full(3, 90.0), "sigma": 50 * np.eye(3), "mu_s": np.full(2, 80.0), "sigma_s": 60 * np.eye(2)}
    np.savez(tmp_path / "a.npz", REFERENCE, **moments)
    told = json.dumps({"extractor": {"name": "inception", "resize": "bicubic"}})
    np.savez(tmp_path / "b.npz", REFERENCE, provenance=np.array(told), **moments)
    plain = evaluator.evaluate(*files, FirstPixels())
    stored = evaluator.evaluate(tmp_path / "a.npz", files[1], FirstPixels())
    foreign = evaluator.evaluate(tmp_path / "b.npz", files[1], FirstPixels())
    assert stored["protocol"]["reference"] != plain["protocol"]["reference"] == foreign["protocol"]["reference"]
    assert foreign["fid"] == plain["fid"] != stored["fid"]
    told = f"stored statistics of the reference, {tmp_path / 'b.npz'}, are of other features and were not used"
    assert foreign["notes"][0] == told


def test_the_order_in_which_batches_come_does_not_matter(files):
    how = {"settings": evaluator.Settings(split_size=7)}  # so that the inception score knows the order of the images
    expected = evaluator.evaluate(*files, FirstPixels("judge"), **how)
    order = np.random.RandomState(5).permutation(40)
    batches = [(rows, SAMPLE[rows], rows % 3) for rows in np.split(order, [1, 4, 30])]
    scores = evaluator.evaluate(files[0], batches, FirstPixels("judge"), batch_size=3, **how)
    assert 0.1 < expected["label_agreement"] < 0.9
    numbers = [key for key in evaluator.LINES if key in expected]
    assert {key: scores[key] for key in numbers} == pytest.approx({key: expected[key] for key in numbers}, rel=1e-8)
    assert scores["sample"]["sha256"] == expected["sample"]["sha256"] and scores["protocol"] == expected["protocol"]
    with pytest.raises(ValueError, match="stream: image 3 came twice"):
        evaluator.evaluate(files[0], [([1, 3], SAMPLE[:2], None), ([3, 4], SAMPLE[2:4], None)], FirstPixels())


def test_statistics_alone_as_pytorch_fid_edm_and_clean_fid_keep_them_give_fid(files, tmp_path):
    seen = FirstPixels()(REFERENCE)
    mu, sigma = metrics.moments(seen.pool)
    np.savez(tmp_path / "stats.npz", mu=mu.astype(np.float32), sigma=sigma)
    scores = evaluator.evaluate(tmp_path / "stats.npz", files[1], FirstPixels())
    assert scores["fid"] == pytest.approx(evaluator.evaluate(*files, FirstPixels())["fid"], rel=1e-6)
    assert not {"sfid", "precision", "recall", "density"} & set(scores) and scores["inception_score"] > 1
    assert scores["notes"] == [
        f"{tmp_path / 'stats.npz'} holds no images: no precision, recall, density and coverage",
        "stored statistics without mu_s: sfid left out",
    ]
    with pytest.raises(ValueError, match=r"stats\.npz has no array arr_0"):
        evaluator.evaluate(files[0], tmp_path / "stats.npz", FirstPixels())


def test_what_is_unlike_is_said(files, tmp_path):
    folder = tmp_path / "jpegs"
    folder.mkdir()
    for i, image in enumerate(np.repeat(SAMPLE[:6], 2, axis=0)):
        Image.fromarray(image.repeat(2, 0).repeat(2, 1)).save(folder / f"{i}.jpg")
    notes = evaluator.evaluate(files[0], folder, FirstPixels())["notes"]
    assert notes[0].startswith("warning: the sample is JPEG or another lossy format and the reference is not")
    assert notes[1] == "30 reference images against 12 samples"
    assert notes[2] == "reference and sample are of different sizes, 4x4x3 and 8x8x3 (height x width x channels)"
    assert notes[3] == "6 images of the sample are exact copies of others in it" and len(notes) == 4
    few = evaluator.evaluate(REFERENCE[:5], SAMPLE[:5], FirstPixels())
    assert few["notes"] == ["5 reference images are too few for density and coverage with 5 neighbours"]
    assert "density" not in few and few["precision"] >= 0


def test_s08_61_stored_moments_override_the_images_which_are_still_needed(files, tmp_path):
    plain = evaluator.evaluate(*files, FirstPixels())
    moments = {"mu": np.full(3, 90.0), "sigma": 50 * np.eye(3), "mu_s": np.full(2, 80.0), "sigma_s": 60 * np.eye(2)}
    with_moments = tmp_path / "with_moments.npz"
    np.savez(with_moments, REFERENCE, **moments)
    scores = evaluator.evaluate(with_moments, files[1], FirstPixels())
    seen = FirstPixels()(SAMPLE)
    fid = metrics.frechet_distance(moments["mu"], moments["sigma"], *metrics.moments(seen.pool))
    sfid = metrics.frechet_distance(moments["mu_s"], moments["sigma_s"], *metrics.moments(seen.spatial))
    assert (scores["fid"], scores["sfid"]) == pytest.approx((fid, sfid), rel=1e-12)
    assert scores["fid"] != pytest.approx(plain["fid"], rel=0.01)
    for key in ("inception_score", "precision", "recall"):
        assert scores[key] == plain[key]
    assert scores["reference"]["stored_moments"] == ["mu", "mu_s"]
    # In the sample file they count too; a classifier has other features and leaves them alone.
    assert evaluator.evaluate(with_moments, with_moments, FirstPixels())["fid"] == pytest.approx(0, abs=1e-10)
    other = FirstPixels("classifier.pt")
    assert evaluator.evaluate(with_moments, files[1], other)["fid"] == evaluator.evaluate(*files, other)["fid"]
    np.savez(with_moments, REFERENCE, mu=np.zeros(4), sigma=np.eye(4))
    with pytest.raises(ValueError, match=r"mu of the reference and the sample: Gaussians of 4 and 3 dimensions"):
        evaluator.evaluate(with_moments, files[1], FirstPixels())


def test_the_program_prints_the_five_lines_and_writes_json(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluator, "make_extractor", lambda spec, device, weights, **options: FirstPixels())
    out = tmp_path / "scores.json"
    assert evaluator.main([*map(str, files), "--out", str(out), "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    scores = evaluator.evaluate(*files, FirstPixels())
    assert printed.out.startswith(
        f"Inception Score: {scores['inception_score']}\nFID: {scores['fid']}\nsFID: {scores['sfid']}\n"
        f"Precision: {scores['precision']}\nRecall: {scores['recall']}\n"  # the original's five lines, then more
        f"Density: {scores['density']}\nCoverage: {scores['coverage']}\nKID: {scores['kid']}\n"
    )
    assert printed.out.splitlines()[8:] == tables.error_lines(scores)
    assert errors.load(tmp_path / "scores.parts.npz")["fid"].value == pytest.approx(scores["fid"], rel=1e-10)
    assert "reference features" in printed.err and "sample features" in printed.err  # the progress bars
    assert json.loads(out.read_text()) == scores


def test_the_program_with_a_classifier_names_it_and_prints_the_label_agreement(files, monkeypatch, capsys):
    monkeypatch.setattr(evaluator, "make_extractor", lambda spec, device, weights, **options: FirstPixels(spec))
    assert evaluator.main([*map(str, files), "--extractor", "classifier.pt"]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert "note: features: 3 of classifier.pt; compare only with" in printed.err
    assert "note: no spatial features, so no sFID" in printed.err
    lines, of_errors = lines[:8], lines[8:]
    names = [line.split(":")[0] for line in lines]
    assert names == ["Inception Score", "FID", "Precision", "Recall", "Density", "Coverage", "KID", "Label agreement"]
    assert of_errors[-1].startswith("Label agreement") and len(of_errors) == 9
    agreement = (SAMPLE.reshape(40, -1)[:, :3].argmax(axis=1) == np.arange(40) % 3).mean()
    assert lines[-1] == f"Label agreement: {agreement}"


def changed(pixel):
    images = REFERENCE.astype(np.float64)
    images[3, 2, 1, 0] = pixel
    return images


@pytest.mark.parametrize("arrays, message", [
    ({"images": REFERENCE}, "bad.npz has no array arr_0: save the images"),
    ({"arr_0": np.array([{}] * 9)}, "bad.npz: Object arrays cannot be loaded"),
    ({"arr_0": REFERENCE[..., 0]}, "bad.npz, arr_0: shape [30, 4, 4]"),
    ({"arr_0": REFERENCE.transpose(0, 3, 1, 2)}, "bad.npz, arr_0: shape [30, 3, 4, 4]"),
    ({"arr_0": REFERENCE[:1]}, "bad.npz, arr_0: 1 images are too few: give at least 4"),
    ({"arr_0": REFERENCE[:3]}, "bad.npz, arr_0: 3 images are too few: give at least 4"),
    ({"arr_0": changed(np.nan)}, "bad.npz, arr_0: 1 NaN or infinite values"),
    ({"arr_0": changed(-1)}, "bad.npz, arr_0: values -1.0..255.0: images must be uint8, 0..255"),
    ({"arr_0": changed(256)}, "bad.npz, arr_0: values 0.0..256.0: images must be uint8, 0..255"),
    ({"arr_0": REFERENCE / 255}, "bad.npz, arr_0: fractional values"),
    ({"arr_0": REFERENCE > 9}, "bad.npz, arr_0: values of type bool"),
    ({"arr_0": REFERENCE, "mu": np.zeros(3)}, "bad.npz has mu but not sigma"),
    ({"arr_0": REFERENCE, "mu": np.zeros(3), "sigma": np.eye(2)}, "bad.npz, mu and sigma: mu [3] and sigma [2, 2]"),
    ({"arr_0": REFERENCE, "mu_s": np.zeros(1), "sigma_s": [[np.nan]]}, "bad.npz, mu_s and sigma_s: sigma hold"),
    ({"arr_0": REFERENCE, "arr_1": np.zeros(5, int)}, "bad.npz, arr_1: labels are int64 of shape [5]: expected 30"),
])
def test_the_program_refuses_bad_files_in_one_line(files, tmp_path, monkeypatch, capsys, arrays, message):
    monkeypatch.setattr(evaluator, "make_extractor", lambda *_, **options: FirstPixels("classifier.pt"))
    np.savez(tmp_path / "bad.npz", **arrays)
    assert evaluator.main([str(files[0]), str(tmp_path / "bad.npz")]) == 2
    said = capsys.readouterr().err
    errors = [line for line in said.splitlines() if "error" in line]
    assert len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0]
    assert "features" not in said  # the network has looked at nothing


def test_scores_of_classes_without_labels_are_refused_before_the_network_looks(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluator, "make_extractor", lambda *_, **options: FirstPixels("classifier.pt"))
    np.savez(tmp_path / "bare.npz", REFERENCE)
    np.savez(tmp_path / "labelled.npz", REFERENCE, np.arange(30) % 2)
    np.savez(tmp_path / "stats.npz", mu=np.zeros(3), sigma=np.eye(3))
    for pair, told in ((("bare", "labelled"), "bare.npz has no labels (arr_1)"),
                       (("labelled", "bare"), "bare.npz has no labels (arr_1)"),
                       (("stats", "labelled"), "stats.npz holds no images: the scores of each class")):  # fmt: skip
        assert evaluator.main([*(str(tmp_path / f"{name}.npz") for name in pair), "--per_class"]) == 2
        said = capsys.readouterr().err
        assert told in said and "features" not in said


@pytest.mark.parametrize("content", [None, b"text", b"PK\x03\x04", "npy", "damaged array", "damaged directory"])
def test_the_program_refuses_files_that_are_no_npz(files, tmp_path, capsys, content):
    bad = tmp_path / "bad.npz"
    if content == "npy":
        with open(bad, "wb") as file:
            np.save(file, REFERENCE)
    elif content == "damaged array":  # it does not match its checksum
        data = bytearray(files[0].read_bytes())
        data[500] ^= 255
        bad.write_bytes(data)
    elif content == "damaged directory":
        bad.write_bytes(files[0].read_bytes().replace(b"PK\x01\x02", b"PK\x01\x09"))
    elif content is not None:
        bad.write_bytes(content)
    assert evaluator.main([str(bad), str(files[1])]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {bad}") and error.count("\n") == 1


def test_the_program_takes_floats_that_are_whole_numbers(files, tmp_path):
    np.savez(tmp_path / "floats.npz", SAMPLE.astype(np.float32))
    floats = next(sources.open_source(tmp_path / "floats.npz").blocks())
    assert floats.images.dtype == np.uint8
    np.testing.assert_array_equal(floats.images, SAMPLE)


@pytest.mark.parametrize("option, value, message", [
    ("--out", "nowhere/scores.json", "no such folder"),
    ("--device", "tpu9", "device 'tpu9' is not available here; choose from cpu"),
    ("--k", "0", "k is 0: it must be at least 1"),
    ("--splits", "0", "splits is 0"),
    ("--resize", "bicubic", "no Inception weights at nowhere.pth"),
    ("--extractor", "nothing", "extractor nothing is neither"),
    ("--weights", "nowhere.pth", "no Inception weights at nowhere.pth"),
])
def test_the_program_refuses_bad_options_before_it_computes(files, capsys, monkeypatch, option, value, message):
    if option == "--resize":  # a right one: the next thing that is wrong
        monkeypatch.setenv("GD_INCEPTION_WEIGHTS", "nowhere.pth")
    assert evaluator.main([*map(str, files), option, value]) == 2
    assert message in capsys.readouterr().err


def run_program(*arguments):
    command = [sys.executable, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_program_end_to_end_with_an_inception_network(tmp_path, inception, inception_file):
    reference, sample = tmp_path / "reference.npz", tmp_path / "sample.npz"
    np.savez(reference, random_images(2, 6, 16, 16, 3))
    np.savez(sample, random_images(3, 5, 16, 16, 3), np.arange(5))
    out = tmp_path / "scores.json"
    options = ["--device", "cpu", "--batch_size", 4, "--weights", inception_file, "--allow_other_weights", "--out", out]
    done = run_program("evaluations/evaluator.py", reference, sample, *options)
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(": ") for line in done.stdout.splitlines() if ": " in line)
    assert list(lines)[:5] == ["Inception Score", "FID", "sFID", "Precision", "Recall"]
    scores = json.loads(out.read_text())
    assert [float(value) for value in lines.values()] == [scores[key] for key in list(evaluator.LINES)[: len(lines)]]
    weights = hashlib.sha256(inception_file.read_bytes()).hexdigest()
    told = {"name": "inception", "weights": f"sha256:{weights}", "resize": "tf1", "dtype": "float32"}
    assert scores["protocol"]["extractor"] == told
    pools = [inception(np.load(path)["arr_0"]).pool for path in (reference, sample)]
    assert scores["fid"] == pytest.approx(metrics.frechet_distance_from_features(*pools), rel=1e-5)


def test_the_program_as_a_module_reports_bad_input_with_exit_code_2(tmp_path):
    done = run_program("-m", "evaluations.evaluator", tmp_path / "none.npz", tmp_path / "none.npz")
    assert done.returncode == 2
    told = "no such file; expected an npz file of images, or a folder or zip of pictures"
    assert done.stderr == f"error: {tmp_path / 'none.npz'}: {told}\n"
