"""Statistics that merge, features that are kept, reference files that grow, the inspector, published files by name."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.special import softmax

from evaluations import cache, evaluator, inspect_file, make_reference, metrics, reference_files, sources
from evaluations.features import Features
from evaluations.moments import Moments
from guided_diffusion import checkpoint

ROOT = Path(__file__).resolve().parents[1]
IMAGES = np.random.RandomState(0).randint(0, 256, (900, 4, 4, 3)).astype(np.uint8)


class Pixels:
    """An extractor that counts its images: 12 pixels as features, 5 as spatial ones."""

    dim = 12

    def __init__(self, name="inception"):
        self.name, self.seen = name, 0

    def __call__(self, images):
        self.seen += len(images)
        flat = images.reshape(len(images), -1).astype(np.float32)
        return Features(flat[:, :12], softmax(flat[:, :8] / 64, axis=1), flat[:, 12:17])


# -------------------------------------------------------------------------------------------------------------- moments


@pytest.mark.parametrize("offset", [0, 1000])
def test_moments_of_any_blocks_order_and_merging_are_those_of_two_passes(offset):
    x = offset + np.random.RandomState(1).standard_normal((5003, 7)) @ np.diag(range(1, 8))
    mean, covariance = x.mean(0), np.cov(x.T)
    rng = np.random.RandomState(2)
    for sizes in ([5003], [1] * 9 + [4994], [10, 7, 2993, 1993], rng.multinomial(5003, np.ones(60) / 60)):
        parts = np.split(x[rng.permutation(5003)], np.cumsum(sizes)[:-1])
        one = Moments(7)
        for part in parts:
            one.add(part)
        merged = Moments(7)
        for part in parts:
            merged.merge(Moments(7).add(part).merge(Moments(7)))
        for each in (one, merged):
            got = each.statistics()
            np.testing.assert_allclose(got[0], mean, rtol=1e-13, atol=1e-13)
            np.testing.assert_allclose(got[1], covariance, rtol=1e-12, atol=1e-12)
    again = Moments.of(5003, mean, covariance).add(x[:100])
    np.testing.assert_allclose(again.statistics()[1], np.cov(np.concatenate([x, x[:100]]).T), rtol=1e-12, atol=1e-12)


def test_moments_refuse_one_image():
    with pytest.raises(ValueError, match="features of 1 images, but at least 2 are needed"):
        Moments(3).add(np.zeros((1, 3))).statistics()


# ---------------------------------------------------------------------------------------------------------------- cache


def test_features_are_kept_by_content_and_grow(tmp_path):
    first, later, other = Pixels(), Pixels(), Pixels("another network")
    short = evaluator.evaluate(IMAGES[:300], IMAGES[:600], first, cache=tmp_path / "cache")
    assert first.seen == 300 + 344 - 0  # of 300 and 600: the block 0..256 is in both
    longer = evaluator.evaluate(IMAGES[:300], IMAGES, later, cache=tmp_path / "cache")
    assert later.seen == 900 - 512  # the last block of 600 was not whole
    plain = evaluator.evaluate(IMAGES[:300], IMAGES, Pixels())
    assert longer == plain and short["fid"] != longer["fid"]
    evaluator.evaluate(IMAGES[:300], IMAGES, other, cache=tmp_path / "cache")
    assert other.seen == 300 + 900 - 256
    shifted = Pixels()
    evaluator.evaluate(IMAGES[:300], IMAGES[1:], shifted, cache=tmp_path / "cache")
    assert shifted.seen == 899


def test_a_damaged_file_and_a_full_disk_cost_time_and_not_the_scores(tmp_path, monkeypatch, capsys):
    plain = evaluator.evaluate(IMAGES[:300], IMAGES, Pixels(), cache=tmp_path / "cache")
    files = sorted((tmp_path / "cache").rglob("*.npz"))
    files[0].write_bytes(files[0].read_bytes()[:-100])
    again = Pixels()
    assert evaluator.evaluate(IMAGES[:300], IMAGES, again, cache=tmp_path / "cache") == plain
    assert 0 < again.seen <= 256 and "are damaged" in capsys.readouterr().err
    assert sorted((tmp_path / "cache").rglob("*")) == sorted({*files, *(f.parent for f in files)})

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache.door, "writing", full)
    assert evaluator.evaluate(IMAGES[:300], IMAGES, Pixels(), cache=tmp_path / "new") == plain
    assert capsys.readouterr().err.count("No space left on device") == 1
    assert not list((tmp_path / "new").rglob("*.npz"))


# ------------------------------------------------------------------------------------------------------ reference files


def build(images, out, extractor=None, **options):
    extractor = extractor or Pixels()
    source = sources.open_source(images)
    make_reference.build(source, extractor, out, **options)
    return np.load(out), extractor


def test_a_reference_has_the_keys_of_the_original_and_a_provenance(tmp_path):
    npz, extractor = build(IMAGES, tmp_path / "ref.npz", keep=40, seed=3)
    assert set(npz.files) == {"arr_0", "mu", "sigma", "mu_s", "sigma_s", "provenance"}
    seen = extractor(IMAGES)
    for mu, sigma, features in (("mu", "sigma", seen.pool), ("mu_s", "sigma_s", seen.spatial)):
        expected = metrics.moments(features)
        np.testing.assert_allclose(npz[mu], expected[0], rtol=1e-13)
        np.testing.assert_allclose(npz[sigma], expected[1], rtol=1e-11, atol=1e-9)
    chosen = np.sort(np.random.RandomState(3).choice(900, 40, replace=False))
    np.testing.assert_array_equal(npz["arr_0"], IMAGES[chosen])
    told = json.loads(str(npz["provenance"]))
    assert (told["count"], told["keep"], told["seed"], told["extractor"]) == (900, 40, 3, {"name": "inception"})
    scores = evaluator.evaluate(tmp_path / "ref.npz", IMAGES[:200], Pixels())
    assert scores["reference"]["stored_moments"] == ["mu", "mu_s"]
    assert scores["fid"] == pytest.approx(evaluator.evaluate(IMAGES, IMAGES[:200], Pixels())["fid"], rel=1e-9)


def test_labels_come_along_with_the_images_that_are_kept(tmp_path):
    np.savez(tmp_path / "in.npz", IMAGES, np.arange(900))
    npz, _ = build(tmp_path / "in.npz", tmp_path / "ref.npz", keep=5)
    np.testing.assert_array_equal(npz["arr_0"], IMAGES[npz["arr_1"]])


def test_a_finished_file_grows_at_the_price_of_the_new_images(tmp_path):
    build(IMAGES, tmp_path / "ref.npz", count=300, keep=10)
    grown, extractor = build(IMAGES, tmp_path / "ref.npz", keep=10)
    whole, _ = build(IMAGES, tmp_path / "whole.npz", keep=10)
    assert extractor.seen == 600
    for name in ("mu", "sigma", "mu_s", "sigma_s"):
        assert np.abs(grown[name] - whole[name]).max() / np.abs(whole[name]).max() < 1e-12
    np.testing.assert_array_equal(grown["arr_0"], whole["arr_0"])
    assert build(IMAGES, tmp_path / "ref.npz", keep=10)[1].seen == 0


class Stops(Pixels):
    """An extractor that is killed on the way."""

    def __call__(self, images):
        if self.seen >= 500:
            raise KeyboardInterrupt
        return super().__call__(images)


def test_work_that_was_broken_off_goes_on_where_it_was_saved(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        build(IMAGES, tmp_path / "ref.npz", Stops(), keep=10, save_every=200)
    assert [path.name for path in tmp_path.iterdir()] == ["ref.npz.partial.npz"]
    npz, extractor = build(IMAGES, tmp_path / "ref.npz", keep=10, save_every=200)
    assert extractor.seen == 500  # 400 had been saved
    np.testing.assert_allclose(npz["sigma"], metrics.moments(Pixels()(IMAGES).pool)[1], rtol=1e-11, atol=1e-9)
    assert [path.name for path in tmp_path.iterdir()] == ["ref.npz"]


def test_a_full_disk_leaves_the_file_that_was_there(tmp_path, monkeypatch, capsys):
    build(IMAGES, tmp_path / "ref.npz", count=300, keep=10)
    before = (tmp_path / "ref.npz").read_bytes()
    real = checkpoint.os.fsync

    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*ref\.npz: No space left on device"):
        build(IMAGES, tmp_path / "ref.npz", keep=10, save_every=200)
    assert capsys.readouterr().err.count("the work goes on") == 2  # at 500 and 700 of 900
    assert (tmp_path / "ref.npz").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["ref.npz"]
    monkeypatch.setattr(checkpoint.os, "fsync", real)
    assert build(IMAGES, tmp_path / "ref.npz", keep=10)[1].seen == 600


@pytest.mark.parametrize("change, message", [
    ({"images": IMAGES[::-1].copy()}, "of other images than the first 300"),
    ({"extractor": Pixels("other")}, "has the features of {'name': 'inception'}"),
    ({"count": 200}, "statistics of 300 images, more than 200"),
    ({"count": 1}, "count must be from 2 to that, not 1"),
    ({"count": 901}, "has 900 images: count must be from 2 to that, not 901"),
    ({"save_every": 1}, "they must be at least 0 and 2"),
])
def test_a_file_of_something_else_is_never_touched(tmp_path, change, message):
    build(IMAGES, tmp_path / "ref.npz", count=300, keep=10)
    before = (tmp_path / "ref.npz").read_bytes()
    with pytest.raises(ValueError, match=message):
        build(**{"images": IMAGES, "out": tmp_path / "ref.npz", **change})
    assert (tmp_path / "ref.npz").read_bytes() == before
    np.savez(tmp_path / "foreign.npz", IMAGES)
    with pytest.raises(ValueError, match=r"foreign\.npz is there and was not made by this program"):
        build(IMAGES, tmp_path / "foreign.npz")


def program(name, *arguments, cwd=ROOT):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "evaluations" / name), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_the_programs_from_images_to_a_reference_to_what_it_holds(tmp_path):
    (tmp_path / "mine.py").write_text("def mean(images):\n    return images.mean((1, 2))\nmean.channels = 3\n")
    np.savez(tmp_path / "in.npz", IMAGES)
    done = program("make_reference.py", "in.npz", "ref.npz", "--keep", 20, "--extractor", "mine:mean", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "ref.npz: statistics of 900 images of in.npz, 20 of them kept\n"
    npz = np.load(tmp_path / "ref.npz")
    np.testing.assert_allclose(npz["mu"], IMAGES.mean((0, 1, 2)), rtol=1e-6)
    assert "mu_s" not in npz.files
    done = program("inspect_file.py", tmp_path / "ref.npz")
    for line in ("a reference file of this project", "20 images, 4x4, RGB", "count 900", "no sFID against it"):
        assert line in done.stdout
    done = program("make_reference.py", "in.npz", "nowhere/ref.npz", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: nowhere/ref.npz: give a file OUT.npz in a folder")


# ------------------------------------------------------------------------------------------------------------ inspector


def test_the_inspector_says_what_each_kind_is_fit_for(tmp_path):
    mu, sigma = np.zeros(2048), np.eye(2048)
    np.savez(tmp_path / "fid.npz", mu=mu, sigma=sigma)
    np.savez(tmp_path / "samples.npz", IMAGES[:40], np.arange(40) % 4)
    np.savez(tmp_path / "openai.npz", IMAGES, mu=mu, sigma=sigma, mu_s=np.zeros(2023), sigma_s=np.eye(2023))
    said = {name: "\n".join(inspect_file.described(tmp_path / f"{name}.npz")) for name in ("fid", "samples", "openai")}
    assert "statistics alone, as of pytorch-fid, EDM or clean-fid" in said["fid"]
    assert "mu: 2048 dimensions, trace of the covariance 2048" in said["fid"] and "no images" in said["fid"]
    assert "labels 0..3, 4 different" in said["samples"] and "with 40 they are larger" in said["samples"]
    assert "images with statistics, as OpenAI's references" in said["openai"] and "not those" not in said["openai"]
    assert "fit as reference for: FID (stored statistics), sFID, precision" in said["openai"]


def test_the_inspector_ends_bad_input_with_one_line(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", np.array([{}]))
    (tmp_path / "b.npz").write_bytes(b"x")
    for name in ("a.npz", "b.npz", "c.npz"):
        assert inspect_file.main([str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {tmp_path / name}") and error.count("\n") == 1


# ------------------------------------------------------------------------------------------------- published by name


def test_published_files_come_by_name_once_and_are_looked_at(tmp_path, monkeypatch):
    server = tmp_path / "server"
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(reference_files, "BASE", server.as_uri() + "/")
    target = server / "imagenet/64/VIRTUAL_imagenet64_labeled.npz"
    target.parent.mkdir(parents=True)
    np.savez(target, IMAGES)
    kept = tmp_path / "torch/hub/ref_batches/VIRTUAL_imagenet64_labeled.npz"
    with pytest.raises(ValueError, match="has no mu and no mu_s: it is not the published imagenet64"):
        reference_files.find("imagenet64")
    assert not kept.exists()
    seen = Pixels()(IMAGES)
    (mu, sigma), (mu_s, sigma_s) = metrics.moments(seen.pool), metrics.moments(seen.spatial)
    np.savez(target, IMAGES, mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    assert reference_files.find("imagenet64") == kept
    target.unlink()
    scores = evaluator.evaluate("imagenet64", IMAGES[:100], Pixels())
    assert scores["reference"]["stored_moments"] == ["mu", "mu_s"]
    with pytest.raises(OSError, match=r"cannot fetch .*save it as .*admnet_imagenet64\.npz"):
        evaluator.evaluate("imagenet64", "admnet_imagenet64", Pixels())


def test_the_names_are_those_of_the_published_files():
    published = reference_files.PUBLISHED
    assert published["imagenet512"] == "imagenet/512/VIRTUAL_imagenet512.npz"
    assert published["lsun_cat"] == "lsun/cat/VIRTUAL_lsun_cat256.npz"
    name = "admnet_guided_upsampled_imagenet256"
    assert published[name] == f"imagenet/256/{name}.npz"
    assert published["admnet_dropout_lsun_bedroom"] == "lsun/bedroom/admnet_dropout_lsun_bedroom.npz"
