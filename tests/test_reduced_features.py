"""Features in 16 bits: what of them is, how far they are from float32, and that none is taken for the other."""

import json

import numpy as np
import pytest
import torch
from test_evaluations import random_images, write_classifier

from evaluations import compare, evaluator, features, inception
from evaluations.cache import Cache
from guided_diffusion import script_util


@pytest.fixture(scope="module")
def classifier_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    write_classifier(folder)
    return str(folder / "model000001.pt")


def relative(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def test_inception_in_bfloat16_has_float32_around_its_convolutions(inception, inception_file):
    half = features.InceptionExtractor(inception_file, dtype="bfloat16", allow_other_weights=True)
    for module in half.network.modules():
        wanted = torch.bfloat16 if isinstance(module, torch.nn.Conv2d) else torch.float32
        assert all(each.dtype == wanted for each in module.parameters(recurse=False))
    images = random_images(0, 3, 32, 32, 3)
    got, want = half(images), inception(images)
    assert half.identity == inception.identity | {"dtype": "bfloat16"}
    for name in ("pool", "spatial"):
        assert getattr(got, name).dtype == np.float32
        assert 1e-3 < relative(getattr(got, name), getattr(want, name)) < 2e-2  # bfloat16 rounds by up to 2^-9 a layer
    np.testing.assert_allclose(got.probabilities.sum(1), 1, rtol=1e-6)


def test_float32_and_float64_are_what_they_were(inception_file):
    """The network that was moved whole to its dtype, layer by layer."""
    x = torch.rand(1, 3, inception.SIZE, inception.SIZE, generator=torch.Generator().manual_seed(0)) * 255
    for dtype in (torch.float32, torch.float64):
        network = inception.load(inception_file)
        moved, kept = inception.load(inception_file).to(dtype), network.convert_to(dtype)
        assert kept is network and {each.dtype for each in kept.parameters()} == {dtype}
        said, same = kept(x.to(dtype)), moved(x.to(dtype))
        assert all(each.dtype == dtype and torch.equal(each, same[name]) for name, each in said.items())


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_a_classifier_in_16_bits(classifier_file, name, monkeypatch):
    monkeypatch.setattr(features.ClassifierExtractor, "at_once", 8)  # float16 is slow on a CPU
    images = random_images(1, 5, 16, 16, 3)
    network, _ = script_util.open_classifier(classifier_file)
    network.convert_to(getattr(torch, name))
    x = torch.tensor(images / 127.5 - 1, dtype=torch.float32).permute(0, 3, 1, 2)
    x = torch.cat([x, x[:1].expand(3, -1, -1, -1)])  # the extractor fills its batches up
    with torch.no_grad():
        want = network.features(x, torch.zeros(8))[:5].numpy()
    full, half = (features.make_extractor(classifier_file, dtype=each) for each in ("float32", name))
    got = half(images).pool
    np.testing.assert_array_equal(got, want)
    assert 1e-4 < relative(got, full(images).pool) < 1e-2
    assert half.identity == full.identity | {"dtype": name} and "dtype" not in full.identity


def test_features_of_one_precision_are_never_taken_for_those_of_another(classifier_file, tmp_path):
    reference, sample = random_images(0, 12, 16, 16, 3), random_images(1, 10, 16, 16, 3)
    results = []
    for name in ("float32", "bfloat16"):
        extractor = features.make_extractor(classifier_file, dtype=name)
        for _ in range(2):  # the second time from the cache
            scores = evaluator.evaluate(reference, sample, extractor, cache=tmp_path / "cache", with_errors=False)
        results.append(json.loads(json.dumps(scores)))
    assert len(list((tmp_path / "cache").rglob("*.npz"))) == 4
    assert 0 < abs(results[0]["fid"] / results[1]["fid"] - 1) < 0.02
    said = "features: computed in bfloat16; compare only with scores of --dtype bfloat16"
    assert [said in each["notes"] for each in results] == [False, True]
    with pytest.raises(ValueError, match=r"unlike protocols: extractor\.dtype unknown and bfloat16"):
        compare.compare(*results)
    assert compare.compare(*results, anyway=True)["unlike"] == ["extractor.dtype unknown and bfloat16"]


def test_the_key_of_the_cache_holds_the_precision(classifier_file, tmp_path):
    keys = {
        name: Cache(tmp_path, features.identity_of(features.make_extractor(classifier_file, dtype=name))).key
        for name in ("float32", "bfloat16", "float16")
    }
    assert len(set(keys.values())) == 3


def test_statistics_of_float32_features_are_no_reference_for_others(inception_file):
    moments = (np.zeros(2048), np.eye(2048))
    source = evaluator.ImageSet("published", random_images(0, 4, 8, 8, 3), moments={"mu": moments})
    notes = []
    half = features.InceptionExtractor(inception_file, dtype="bfloat16", allow_other_weights=True)
    opened = evaluator._opened(source, 3)
    assert evaluator._stored(opened, half, "reference", notes) == {} and "other features" in notes[0]


@pytest.mark.parametrize("spec, dtype, message", [
    ("json:loads", "bfloat16", "dtype bfloat16 is for 'inception' and for classifiers, not for json:loads"),
    ("dinov2-vit-s-14", "float16", "dtype float16 is for 'inception' and for classifiers, not for dinov2-vit-s-14"),
])  # fmt: skip
def test_other_networks_bring_their_own_precision(spec, dtype, message):
    with pytest.raises(ValueError, match=message):
        features.make_extractor(spec, dtype=dtype)


def test_a_classifier_has_no_float64(classifier_file):
    with pytest.raises(ValueError, match="float64 is for 'inception' alone"):
        features.make_extractor(classifier_file, dtype="float64")
