"""A pack gives the pixels, labels and names of what was packed, and is a zip or npy that others read as well."""

import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_image_datasets import grey, save, take

from guided_diffusion.arrays import GrowingNpy
from guided_diffusion.image_datasets import center_crop_arr, load_data

ROOT = Path(__file__).parents[1]


def program(path):
    spec = importlib.util.spec_from_file_location(f"{path.stem}_program", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pack = program(ROOT / "datasets" / "pack.py").pack


@pytest.fixture
def folder(tmp_path):
    """Photographs of noise, 6 of three classes, of several sizes; one on its side by EXIF, one transparent."""
    rng = np.random.default_rng(0)
    for number in range(6):
        pixels = rng.integers(0, 256, (20 + number, 30, 3), np.uint8)
        save(tmp_path / "data" / f"{'cab'[number % 3]}_{number}.{'jpg' if number % 2 else 'png'}", pixels)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "data" / "a_7.jpg", exif=exif)
    Image.new("RGBA", (20, 20), (0, 0, 0, 128)).save(tmp_path / "data" / "b_8.png")
    return tmp_path / "data"


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("out", ["pack.zip", "pack.npy"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_pack_is_what_was_packed(folder, tmp_path, out, num_workers, channels):
    counts = pack(str(folder), str(tmp_path / out), 8, channels, num_workers=num_workers, progress=False)
    assert counts == {"images": 8, "left out": 0, "classes": 3}
    how = {"batch_size": 4, "image_size": 8, "image_channels": channels, "class_cond": True, "num_workers": 0}
    streams = [load_data(data_dir=str(path), **how) for path in (folder, tmp_path / out)]
    assert streams[1].class_names == ["a", "b", "c"]
    for (x, cond), (packed, packed_cond) in zip(*(take(stream, 4) for stream in streams)):  # two epochs, flips too
        assert torch.equal(x, packed) and torch.equal(cond["y"], packed_cond["y"])


def test_zips_are_stylegans_and_npys_are_numpys(folder, tmp_path):
    for out in ("pack.zip", "pack.npy"):
        pack(str(folder), str(tmp_path / out), 8, progress=False)
    names = [path.name for path in sorted(folder.iterdir())]
    expected = [center_crop_arr(Image.open(folder / name), 8) for name in names if name[2] in "012345"]
    with zipfile.ZipFile(tmp_path / "pack.zip") as archive:
        told = json.loads(archive.read("dataset.json"))
        assert told["labels"] == [[f"00000/img{i:08d}.png", "abc".index(name[0])] for i, name in enumerate(names)]
        images = [np.array(Image.open(archive.open(name))) for name, _ in told["labels"]]
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
    array = np.load(tmp_path / "pack.npy")
    assert array.dtype == np.uint8 and np.array_equal(array, images)
    kept = [index for index, name in enumerate(names) if name[2] in "012345"]
    assert np.array_equal(array[kept], expected)
    assert np.load(tmp_path / "pack_labels.npy").tolist() == ["abc".index(name[0]) for name in names]
    assert np.load(tmp_path / "pack_class_names.npy").tolist() == ["a", "b", "c"]
    assert Image.open(tmp_path / "pack.png").size[0] > 64  # what was packed, to look at
    again = (tmp_path / "pack.zip").read_bytes()
    pack(str(folder), str(tmp_path / "pack.zip"), 8, progress=False)
    assert (tmp_path / "pack.zip").read_bytes() == again


def test_a_pack_of_a_pack_and_one_without_labels(folder, tmp_path):
    pack(str(folder), str(tmp_path / "a.zip"), 8, progress=False)
    pack(str(tmp_path / "a.zip"), str(tmp_path / "b.npy"), 8, progress=False)
    pack(str(tmp_path / "b.npy"), str(tmp_path / "c.zip"), 8, progress=False)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "c.zip").read_bytes()
    pack(str(folder), str(tmp_path / "d.zip"), 8, class_cond=False, progress=False)
    with pytest.raises(ValueError, match=r"dataset.json says that there are no labels"):
        grey(tmp_path / "d.zip", 1, class_cond=True)
    pack(str(folder), str(tmp_path / "b.npy"), 8, class_cond=False, progress=False)
    with pytest.raises(ValueError, match=r"b.npy has no labels"):
        grey(tmp_path / "b.npy", 1, class_cond=True)


def test_bad_images_are_left_out_if_asked_for(folder, tmp_path):
    (folder / "b_2.png").write_text("no picture")
    for out in ("pack.zip", "pack.npy"):
        with pytest.raises(ValueError, match=r"cannot read image .*b_2.png: not a picture.*--skip_bad_images"):
            pack(str(folder), str(tmp_path / out), 8, progress=False)
        assert list(tmp_path.iterdir()) == [folder]  # nothing half written
    for out in ("pack.zip", "pack.npy"):
        counts = pack(str(folder), str(tmp_path / out), 8, skip_bad_images=True, progress=False)
        assert counts["images"] == 7 and counts["left out"] == 1
        stream = grey(tmp_path / out, 7, class_cond=True, deterministic=True, image_size=8)
        assert next(stream)[1]["y"].tolist() == [0, 0, 0, 1, 1, 2, 2]
    for path in folder.iterdir():
        path.write_text("no picture")
    with pytest.raises(ValueError, match="none of the images can be read"):
        pack(str(folder), str(tmp_path / "none.npy"), 8, skip_bad_images=True, progress=False)


def test_the_program(folder, tmp_path):
    command = [sys.executable, str(ROOT / "datasets" / "pack.py"), str(folder)]
    done = subprocess.run([*command, str(tmp_path / "x.npy"), "--image_size", "4"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"wrote {tmp_path}/x.npy: images 8, left out 0, classes 3\n")
    done = subprocess.run([*command, str(tmp_path / "x.tar")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path}/x.tar ends in neither of .zip, .npy: choose what to write\n"


def test_a_growing_npy_is_read_by_numpy(tmp_path):
    for count in (0, 9, 1000):
        with open(tmp_path / "x.npy", "wb") as file:
            array = GrowingNpy(file, (2, 3))
            for number in range(count):
                array.add(np.full((1, 2, 3), number % 256, np.uint8))
            array.finish()
        found = np.load(tmp_path / "x.npy")
        assert found.shape == (count, 2, 3) and found[:, 1, 2].tolist() == [n % 256 for n in range(count)]
    with pytest.raises(ValueError, match=r"items are uint8 \[3, 2\], those before uint8 \[2, 3\]"), open(
        tmp_path / "x.npy", "wb"
    ) as file:
        GrowingNpy(file, (2, 3)).add(np.zeros((1, 3, 2), np.uint8))


def test_the_benchmark_of_the_loader_runs(monkeypatch):
    pytest.importorskip("sklearn")
    benchmark = program(ROOT / "benchmarks" / "loader.py")
    monkeypatch.setattr(benchmark, "BATCHES", dict.fromkeys(benchmark.BATCHES, 2))
    result = benchmark.run(images=4, rounds=2, batch=2)
    assert [row["source"] for row in result["median"]] == list(benchmark.BATCHES)
    assert result["median"][0]["times_jpeg"] == 1 and result["median"][2]["images_per_s"] > 0
