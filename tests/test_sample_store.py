"""Samples on the disk while they are drawn: broken off, gone on with, and what they become."""

import json
import random
import shutil
import time
import zipfile
from itertools import islice

import numpy as np
import pytest
import torch as th
from PIL import Image
from test_programs import MPIEXEC, done, names, refused, samples, stranger
from test_world import kill, start

from guided_diffusion import checks, config, sample_store
from guided_diffusion.image_datasets import load_data
from guided_diffusion.sample_store import SampleStore
from guided_diffusion.sampling_options import EvaluateOptions, SampleOptions

NET = (
    "--image_size 8 --image_channels 1 --num_channels 32 --num_res_blocks 1 --channel_mult 1,1 --attention_resolutions"
    " 4 --noise_schedule cosine --class_cond True --num_classes 3"
)
PLAN = {"options": {"seed": 0}, "flags": {}, "files": {}}
rng = np.random.default_rng(0)
IMAGES, LABELS = rng.integers(0, 256, (10, 4, 4, 3), np.uint8), np.arange(10) % 3


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    images = rng.integers(0, 256, (12, 8, 8, 1), np.uint8)
    np.savez(folder / "data.npz", arr_0=images, arr_1=np.arange(12) % 3, class_names=["ant", "bee_a", "cat"])
    done("image_train", f"--data_dir {folder}/data.npz {NET} --batch_size 4 --lr 1e-2 --iterations 3 --num_workers 0"
         f" --random_flip False --log_dir {folder}/model")  # fmt: skip
    return folder


def filled(folder, kinds=("npz",)):
    store = SampleStore(str(folder), IMAGES.shape, PLAN, kinds, labelled=True)
    for first in (4, 0, 8):
        part = slice(first, min(first + 4, 10))
        store.put(range(10)[part], IMAGES[part], LABELS[part])
    return store


# ------------------------------------------------------------------------------------------------------------ the store


def test_the_npz_is_byte_for_byte_what_numpy_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(sample_store, "BLOCK_BYTES", 100)  # several blocks
    (tmp_path / "a").mkdir()
    store = filled(tmp_path / "a")
    texts = np.array(["a", "ß"])[LABELS % 2]
    store.finish(texts=texts)
    np.savez(tmp_path / "expected.npz", arr_0=IMAGES, arr_1=LABELS, texts=texts)
    assert (tmp_path / "a/samples_10x4x4x3.npz").read_bytes() == (tmp_path / "expected.npz").read_bytes()
    assert names(tmp_path / "a") == ["samples_10x4x4x3.json", "samples_10x4x4x3.npz"]


def test_a_sample_counts_when_all_of_its_batch_is_there(tmp_path):
    store = SampleStore(str(tmp_path), IMAGES.shape, PLAN, labelled=True)
    assert store.had == 0 and not store.has(range(4))
    store.put(range(2, 5), IMAGES[2:5], LABELS[2:5])
    assert store.has(range(2, 5)) and store.has([3]) and not store.has(range(4)) and not store.has([5])
    store.close()
    again = SampleStore(str(tmp_path), IMAGES.shape, PLAN, labelled=True)
    assert again.had == 3 and np.array_equal(again.images[2:5], IMAGES[2:5]) and (again.images[5:] == 0).all()


def test_samples_of_another_plan_are_neither_mixed_in_nor_lost(tmp_path):
    SampleStore(str(tmp_path), IMAGES.shape, PLAN).put(range(2), IMAGES[:2])
    other = {"options": {"seed": 1}, "flags": {"image_size": 4}, "files": {"model_path": ["00"]}}
    with pytest.raises(ValueError, match=r"seed \(0 there, 1 here\); image_size \(None there, 4 here\); the content of"
                                         " model_path: finish it by its own command, delete that folder"):  # fmt: skip
        SampleStore(str(tmp_path), IMAGES.shape, other)
    assert SampleStore(str(tmp_path), IMAGES.shape, PLAN).had == 2


def test_a_disk_without_room_is_said_before_the_work(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=600))
    with pytest.raises(OSError, match=r"10 samples need .* GiB in .*make room, choose another --log_dir, or"):
        SampleStore(str(tmp_path), IMAGES.shape, PLAN)
    assert names(tmp_path) == []


def test_pictures_are_what_the_loader_reads(tmp_path):
    class_names = ["ant", "bee_a", "cat/x"]
    filled(tmp_path, ("png", "zip")).finish(class_names)
    assert names(tmp_path) == ["samples_10x4x4x3", "samples_10x4x4x3.json", "samples_10x4x4x3.zip"]
    data = load_data(data_dir=tmp_path / "samples_10x4x4x3", batch_size=1, image_size=4, class_cond=True, once=True,
                     deterministic=True, random_flip=False, num_workers=0)  # fmt: skip
    assert data.class_names == ["ant", "bee-a", "cat-x"]
    x, y = zip(*((x, cond["y"]) for x, cond in data))
    order = np.argsort(LABELS, kind="stable")
    assert np.array_equal(th.cat(y).numpy(), LABELS[order])
    assert np.array_equal(((th.cat(x) + 1) * 127.5).round().permute(0, 2, 3, 1).numpy(), IMAGES[order])
    with zipfile.ZipFile(tmp_path / "samples_10x4x4x3.zip") as archive:
        assert archive.namelist()[:3] == ["ant_000000.png", "bee-a_000001.png", "cat-x_000002.png"]
        with archive.open("cat-x_000005.png") as file:
            assert np.array_equal(np.array(Image.open(file)), IMAGES[5])


def test_who_looks_sees_each_sample_once_though_batches_are_of_another_size(tmp_path):
    SampleStore(str(tmp_path), IMAGES.shape, PLAN, labelled=True).put(range(5), IMAGES[:5], LABELS[:5])
    store, seen = SampleStore(str(tmp_path), IMAGES.shape, PLAN, labelled=True), []
    batches = [part for part in (range(3), range(3, 6), range(6, 9), range(9, 10)) if not store.has(part)]
    assert batches[0] == range(3, 6)  # of which two are drawn already
    x = th.from_numpy(IMAGES).permute(0, 3, 1, 2) / 127.5 - 1 + 1e-3
    stream = ((part, x[part.start : part.stop], th.from_numpy(LABELS)[part.start : part.stop]) for part in batches)

    def through(stream):
        for indices, images, labels in stream:
            whole = images if images.dtype == th.uint8 else ((images + 1) * 127.5).byte().permute(0, 2, 3, 1)
            assert np.array_equal(whole.numpy(), IMAGES[list(indices)])
            assert labels.tolist() == LABELS[list(indices)].tolist()
            seen.extend(indices)
            yield indices, images, labels

    sample_store.drain(stream, store, through, batch_size=3)
    assert seen == list(range(10)) and np.array_equal(store.images, IMAGES)


def test_what_was_drawn_before_is_that_for_all_processes(tmp_path, monkeypatch):
    store = filled(tmp_path)
    store.close()
    shares = []
    for rank in range(2):
        store = SampleStore(str(tmp_path), IMAGES.shape, PLAN, labelled=True)
        store._earlier[8:] = False
        monkeypatch.setattr(sample_store.dist_util, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(sample_store.dist_util, "world_size", lambda: 2)
        shares.append([indices for indices, *_ in store.drawn(4)])
        monkeypatch.undo()
    assert shares == [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]  # whatever else has been drawn by the time it is asked


def test_who_looks_at_samples_is_no_part_of_their_plan():
    words = ["--model_path", "m.pt", "--seed", "3"]
    groups = SampleOptions, EvaluateOptions, config.RunOptions
    plain = sample_store.plan_of(config.parse("", *groups, argv=words), {})
    words += ["--evaluate", "ref.npz", "--extractor", "c.pt", "--weights", "w", "--log_formats", "log"]
    assert sample_store.plan_of(config.parse("", *groups, argv=words), {}) == plain
    assert sample_store.plan_of(config.parse("", *groups, argv=[*words, "--seed", "4"]), {}) != plain


# ----------------------------------------------------------------------------------------------------------- a program


def words(home, folder, count=40, more=""):
    return (f"--model_path {home}/model/model000003.pt --num_samples {count} --batch_size 4 --timestep_respacing 40"
            f" --log_dir {folder} {more}")  # fmt: skip


@pytest.fixture(scope="module")
def whole(home):
    done("image_sample", words(home, home / "whole"))
    return (home / "whole" / "samples_40x8x8x1.npz").read_bytes()


def drawn(folder):
    path = folder / "samples_40x8x8x1.partial" / "done"
    return sum(path.read_bytes()) if path.exists() else 0


def killed_and_gone_on(home, folder, number, seed):
    """Kill after a random number of samples each time; the last command goes to the end."""
    draws = random.Random(seed)
    for k in range(number):
        process = start("image_sample", words(home, folder), home)
        aim = draws.uniform(k, k + 1) / (number + 1) * 40
        while process.poll() is None and drawn(folder) <= aim:
            time.sleep(0.002)
        assert process.poll() is None, process.communicate()
        kill(process)
    before = drawn(folder)
    said = done("image_sample", words(home, folder)).out
    assert f"going on: {before} of 40 samples are drawn already" in said and 0 < before < 40
    return before


def test_a_run_that_was_killed_ends_with_the_same_bytes(home, whole, tmp_path):
    killed_and_gone_on(home, tmp_path / "out", 2, seed=0)
    assert (tmp_path / "out/samples_40x8x8x1.npz").read_bytes() == whole
    assert not (tmp_path / "out/samples_40x8x8x1.partial").exists()


@pytest.mark.slow
def test_ten_kills(home, whole, tmp_path):
    killed_and_gone_on(home, tmp_path / "out", 10, seed=1)
    assert (tmp_path / "out/samples_40x8x8x1.npz").read_bytes() == whole


@pytest.mark.skipif(not MPIEXEC, reason="no mpiexec")
def test_what_two_processes_began_one_ends(home, whole, tmp_path):
    folder = tmp_path / "out"
    process = start("image_sample", words(home, folder), home, [MPIEXEC, "-n", "2"])
    while process.poll() is None and drawn(folder) < 12:
        time.sleep(0.002)
    kill(process)
    done("image_sample", words(home, folder))
    assert (folder / "samples_40x8x8x1.npz").read_bytes() == whole
    stranger("scripts/image_sample.py", words(home, tmp_path / "both"), home, [MPIEXEC, "-n", "2"])
    assert (tmp_path / "both/samples_40x8x8x1.npz").read_bytes() == whole


def test_what_is_finished_is_not_drawn_again_and_what_differs_is(home, tmp_path):
    path = tmp_path / "samples_8x8x8x1.npz"
    done("image_sample", words(home, tmp_path, 8))
    first, stamp = path.read_bytes(), path.stat().st_mtime_ns
    assert "is finished already: delete" in done("image_sample", words(home, tmp_path, 8)).out
    assert path.stat().st_mtime_ns == stamp
    done("image_sample", words(home, tmp_path, 8, "--seed 1"))
    assert path.read_bytes() != first
    done("image_sample", words(home, tmp_path, 8))
    assert path.read_bytes() == first


def test_an_unfinished_run_of_other_options_is_refused(home, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(SampleStore, "finish", lambda self, *a, **k: 1 / 0)
        refused("image_sample", words(home, tmp_path, 8), "division by zero")
    refused("image_sample", words(home, tmp_path, 8, "--use_ddim True"), r"use_ddim \(False there, True here\)")
    assert "going on: 8 of 8" in done("image_sample", words(home, tmp_path, 8)).out


def test_a_run_gone_on_with_is_scored_as_one_that_was_not(home, tmp_path, monkeypatch):
    """Though its batches are of another size, and nobody scored it when it began."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pixels.py").write_text("def features(images): return images.mean((1, 2)) / 255")
    look = f"--evaluate {home}/data.npz --extractor pixels:features"
    done("image_sample", words(home, tmp_path / "whole", 10, look))
    with monkeypatch.context() as patch:
        kept = sample_store._kept
        patch.setattr(sample_store, "_kept", lambda stream, store: islice(kept(stream, store), 2))
        patch.setattr(SampleStore, "finish", lambda self, *a, **k: 1 / 0)
        refused("image_sample", words(home, tmp_path / "part", 10), "division by zero")
    said = done("image_sample", words(home, tmp_path / "part", 10, f"{look} --batch_size 3")).out
    assert "going on: 8 of 10 samples are drawn already" in said
    whole, part = (json.loads((tmp_path / name / "scores.json").read_text()) for name in ("whole", "part"))
    assert part["sample"]["images"] == 10 and part["fid"] == pytest.approx(whole["fid"], rel=0.01)
    finished = done("image_sample", words(home, tmp_path / "part", 10, look)).out
    assert "is finished already" in finished
    assert json.loads((tmp_path / "part" / "scores.json").read_text())["fid"] == part["fid"]


def test_so_many_of_each_class(home, tmp_path):
    done("image_sample", words(home, tmp_path, 7, "--classes 2:4,ant:1,1:2"))
    assert samples(tmp_path)[2].tolist() == [2, 2, 2, 2, 0, 1, 1]


@pytest.mark.parametrize("text, message", [
    ("2:4,1:1", "--classes 2:4,1:1 are 5 images: give --num_samples 5, not 7"),
    ("2:4,1", "cannot read '1' in --classes 2:4,1: give each class a number, as 3:100,7:50"),
    ("3:7", "class 3 in --classes is out of range"),
    ("2:x", "cannot read '2:x'"),
])  # fmt: skip
def test_numbers_of_classes_that_cannot_be(text, message):
    with pytest.raises(ValueError, match=message):
        checks.parse_classes(text, 3, 7)


def test_the_way_of_the_first_samples(home, tmp_path):
    done("image_sample", words(home, tmp_path, 5, "--frames 6"))
    with Image.open(tmp_path / "samples_5x8x8x1_frames.gif") as film:
        assert film.n_frames == 6
    with Image.open(tmp_path / "samples_5x8x8x1_frames.png") as strip:
        assert strip.size[0] > 6 * 48 and strip.size[1] > 5 * 48
    refused("image_sample", words(home, tmp_path / "b", 5, "--frames 1"), "2 or more, or 0, not 1")


def test_kinds_of_files(home, tmp_path):
    done("image_sample", words(home, tmp_path, 5, "--save_as zip,png --grid False"))
    assert names(tmp_path) == ["log.txt", "samples_5x8x8x1", "samples_5x8x8x1.json", "samples_5x8x8x1.zip"]
    refused("image_sample", words(home, tmp_path / "b", 5, "--save_as npy"), "'npy' is none of npz, png, zip")
