import importlib.util
import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from guided_diffusion import image_datasets
from guided_diffusion.image_datasets import (
    ImageDataset,
    _list_image_files_recursively,
    center_crop_arr,
    load_data,
    random_crop_arr,
)

ROOT = Path(__file__).parents[1]
GOLDEN = np.load(ROOT / "tests" / "golden" / "crops.npz")


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)
    return str(path)


def lopsided(number, size=4):
    """A grey picture that tells its number (10 + number) and whether it was flipped (the left column is 0)."""
    pixels = np.full((size, size), 10 + number)
    pixels[:, 0] = 0
    return pixels


def numbers(batch):
    return (torch.round((batch[:, 0, 0, 1] + 1) * 127.5).long() - 10).tolist()


@pytest.fixture
def folder(tmp_path):
    """12 grey pictures a_00, b_01, c_02, a_03, ... whose content is their number."""
    for number in range(12):
        save(tmp_path / "data" / f"{'abc'[number % 3]}_{number:02d}.png", lopsided(number))
    return tmp_path / "data"


def grey(data_dir, batch_size=4, **options):
    options = {"image_size": 4, "image_channels": 1, "num_workers": 0, **options}
    return load_data(data_dir=str(data_dir), batch_size=batch_size, **options)


def take(stream, count):
    return list(itertools.islice(stream, count))


# ---------------------------------------------------------------------------------------------------------- one image


@pytest.mark.parametrize("size", [16, 32, 64, 100])
def test_center_crop_equals_the_golden_one(size):
    crop = center_crop_arr(Image.fromarray(GOLDEN["image"]), size)
    assert crop.dtype == np.uint8
    np.testing.assert_array_equal(crop, GOLDEN[f"center_{size}"])


def test_s08_51_colour_conversion_comes_before_resizing(tmp_path):
    # Columns of palette entries 0 (red) and 2 (blue): resized as indices they would mix to entry 1 (green).
    picture = Image.fromarray(np.tile(np.array([0, 2], dtype=np.uint8), (4, 2)), mode="P")
    picture.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    picture.save(tmp_path / "striped.png")
    x0, cond = ImageDataset(2, [str(tmp_path / "striped.png")], random_flip=False)[0]
    assert x0.dtype == np.float32 and x0.shape == (3, 2, 2) and cond == {}
    np.testing.assert_array_equal(np.unique(x0[1]), [-1.0])
    np.testing.assert_allclose(x0[[0, 2]], 0, atol=1 / 127)


def test_pixels_become_floats_in_minus_one_to_one(tmp_path):
    pixels = np.array([[[0, 51, 255], [255, 0, 0]], [[1, 2, 3], [127, 128, 254]]])
    x0, _ = ImageDataset(2, [save(tmp_path / "x.png", pixels)], random_flip=False)[0]
    np.testing.assert_array_equal(x0, np.transpose(pixels.astype(np.float32) / 127.5 - 1, (2, 0, 1)))
    assert x0[0, 0, 0] == -1 and x0[2, 0, 0] == 1


def test_s08_51_half_of_the_images_are_flipped_by_default(tmp_path):
    dataset = ImageDataset(4, [save(tmp_path / "x.png", lopsided(5))])
    flipped = [bool(dataset[epoch, 0][0][0, 0, 3] == -1) for epoch in range(1000)]
    assert 450 < sum(flipped) < 550  # 3 standard deviations are 47
    fresh = {bool(dataset[0][0][0, 0, 3] == -1) for _ in range(64)}
    assert fresh == {True, False}  # without an epoch every look is a new draw
    still = ImageDataset(4, dataset.local_images, random_flip=False)
    assert all(still[epoch, 0][0][0, 0, 0] == -1 for epoch in range(64))


def test_s08_52_random_crop_draws_the_short_side_uniformly(monkeypatch):
    lengths = []
    resize = image_datasets._resize_to_cover
    monkeypatch.setattr(
        image_datasets, "_resize_to_cover", lambda image, *sides: lengths.append(sides[0]) or resize(image, *sides)
    )
    picture, rng = Image.new("RGB", (90, 70)), np.random.default_rng(0)
    crops = [random_crop_arr(picture, 64, rng=rng) for _ in range(1000)]
    assert {crop.shape for crop in crops} == {(64, 64, 3)}
    counts = np.bincount(lengths, minlength=81)
    assert counts[:64].sum() == 0 and len(counts) == 81
    assert counts[64:].min() > 30 and counts[64:].max() < 95  # 1000 / 17 = 59, standard deviation 7.4


def test_random_crop_reaches_every_place():
    pixels = np.arange(5 * 7, dtype=np.uint8).reshape(5, 7)
    rng = np.random.default_rng(0)
    corners = set()
    for _ in range(200):
        crop = random_crop_arr(Image.fromarray(pixels), 4, min_crop_frac=0.8, max_crop_frac=0.8, rng=rng)
        top, left = divmod(int(crop[0, 0]), 7)
        np.testing.assert_array_equal(crop, pixels[top : top + 4, left : left + 4])
        corners.add((top, left))
    assert corners == {(top, left) for top in range(2) for left in range(4)}


@pytest.mark.parametrize(("channels", "expected"), [(1, [76]), (3, [255, 0, 0]), (4, [255, 0, 0, 255])])
def test_image_channels(tmp_path, channels, expected):
    save(tmp_path / "red.png", np.full((4, 4, 3), (255, 0, 0)))
    x0, _ = next(load_data(data_dir=str(tmp_path), batch_size=1, image_size=4, image_channels=channels, num_workers=0))
    assert x0.shape == (1, channels, 4, 4)
    assert torch.round((x0[0, :, 0, 0] + 1) * 127.5).tolist() == expected


def test_s08_55_formats_and_order_of_the_list(tmp_path):
    first, second = Image.new("L", (4, 4), 30), Image.new("L", (4, 4), 200)
    first.save(tmp_path / "movie.gif", save_all=True, append_images=[second])
    for name in ("e.jpg", "d.JPEG", "sub/z.Png", "sub.png", "f.webp", "g.bmp", "h.tif", "i.TIFF", ".hidden.png"):
        save(tmp_path / name, np.full((4, 4), 30))
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "png").write_text("no extension")
    found = [path[len(str(tmp_path)) + 1 :] for path in _list_image_files_recursively(str(tmp_path))]
    assert found == [
        ".hidden.png", "d.JPEG", "e.jpg", "f.webp", "g.bmp", "h.tif", "i.TIFF", "movie.gif", "sub/z.Png", "sub.png",
    ]
    x0, _ = next(grey(tmp_path, 10, deterministic=True))
    assert x0.shape == (10, 1, 4, 4)
    assert (torch.round((x0 + 1) * 127.5) - 30).abs().max() <= 1


# --------------------------------------------------------------------------------------------------------- the stream


def test_an_epoch_shows_every_image_once_in_a_new_order(folder):
    stream = grey(folder, 4)
    assert stream.num_images == 12 and stream.batches_per_epoch == 3 and stream.bad_images == 0
    epochs = [numbers(torch.cat([x0 for x0, _ in take(stream, 3)])) for _ in range(3)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_deterministic_keeps_the_order_of_the_files(folder):
    names = [Path(path).name for path in _list_image_files_recursively(str(folder))]
    in_order = [int(name[2:4]) for name in names]
    stream = grey(folder, 5, deterministic=True)
    assert [numbers(x0) for x0, _ in take(stream, 4)] == [in_order[:5], in_order[5:10]] * 2  # the tail is dropped


def test_the_stream_depends_on_the_seed_alone(folder):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    here = torch.cat([x0 for x0, _ in take(grey(folder, 4, seed=3), 6)])
    assert torch.equal(torch.get_rng_state(), state)
    elsewhere = torch.cat([x0 for x0, _ in take(grey(folder, 4, seed=3, num_workers=2), 6)])
    assert torch.equal(here, elsewhere)
    assert not torch.equal(here, torch.cat([x0 for x0, _ in take(grey(folder, 4, seed=4), 6)]))


def test_a_later_first_batch_continues_the_stream(folder):
    whole = [x0 for x0, _ in take(grey(folder, 5), 9)]
    later = [x0 for x0, _ in take(grey(folder, 5, first_batch=5), 4)]
    assert all(torch.equal(a, b) for a, b in zip(whole[5:], later))


def test_s08_54_ranks_together_see_what_one_rank_sees(folder):
    alone = take(grey(folder, 4, random_crop=True), 7)
    pair = [take(grey(folder, 2, random_crop=True, rank=rank, num_ranks=2), 7) for rank in range(2)]
    for step in range(7):
        together = torch.stack([pair[0][step][0], pair[1][step][0]], dim=1).flatten(0, 1)  # rank = position mod 2
        assert torch.equal(together, alone[step][0])


def test_s08_54_shards_are_strided(folder):
    paths = _list_image_files_recursively(str(folder))
    shards = [ImageDataset(4, paths, list(range(12)), shard=rank, num_shards=5) for rank in range(5)]
    assert [len(shard) for shard in shards] == [3, 3, 2, 2, 2]
    assert [int(cond["y"]) for _, cond in (shards[1][i] for i in range(3))] == [1, 6, 11]
    # Ranks of unequal shards still have equally many batches an epoch.
    streams = [grey(folder, 2, deterministic=True, rank=rank, num_ranks=5) for rank in range(5)]
    assert [stream.batches_per_epoch for stream in streams] == [1] * 5


# ------------------------------------------------------------------------------------------------------------- labels


def test_s08_53_labels_are_sorted_prefixes_over_the_whole_folder(tmp_path):
    for number, name in enumerate(["y/10_c.png", "x/9_b.png", "9_a.png", "x/2_z_1.png"]):
        save(tmp_path / name, lopsided(number))
    streams = [grey(tmp_path, 2, class_cond=True, deterministic=True, rank=rank, num_ranks=2) for rank in range(2)]
    assert streams[0].class_names == ["10", "2", "9"] and streams[0].label_rule == "file-name prefix"
    label_of = {}
    for stream in streams:
        x0, cond = next(stream)
        assert cond["y"].dtype == torch.int64
        label_of |= dict(zip(numbers(x0), cond["y"].tolist()))
    assert label_of == {0: 0, 1: 2, 2: 2, 3: 1}


def test_labels_stay_with_their_images_in_any_order(folder):
    stream = grey(folder, 4, class_cond=True, num_classes=3, seed=5)
    for x0, cond in take(stream, 6):
        assert cond["y"].tolist() == [number % 3 for number in numbers(x0)]


def test_auto_takes_sub_folders_where_prefixes_say_nothing(tmp_path):
    for name in ("dog/1.png", "cat/deep/2.png", "cat/3.png"):
        save(tmp_path / "plain" / name, lopsided(0))
        save(tmp_path / "same_prefix" / name.replace("/", "/img_"), lopsided(0))
    for kind in ("plain", "same_prefix"):
        stream = grey(tmp_path / kind, 3, class_cond=True, deterministic=True)
        assert (stream.class_names, stream.label_rule) == (["cat", "dog"], "sub-folder")
        assert next(stream)[1]["y"].tolist() == [0, 0, 1]


def test_auto_warns_when_prefixes_and_folders_disagree(tmp_path):
    for name in ("dog/IMG_1.png", "dog/DSC_2.png", "cat/DSC_3.png"):
        save(tmp_path / name, lopsided(0))
    with pytest.warns(UserWarning, match="2 file-name prefixes .DSC, IMG., not from the 2 sub-folders .cat, dog."):
        assert grey(tmp_path, 3, class_cond=True).class_names == ["DSC", "IMG"]
    assert grey(tmp_path, 3, class_cond=True, label_from="folder").class_names == ["cat", "dog"]


def test_given_class_names_fix_the_numbers(folder):
    for path in folder.glob("b_*.png"):
        path.unlink()
    stream = grey(folder, 8, class_cond=True, class_names=["c", "b", "a"], deterministic=True)
    assert stream.class_names == ["c", "b", "a"]
    assert next(stream)[1]["y"].tolist() == [2] * 4 + [0] * 4


def test_without_class_cond_there_are_no_labels(folder):
    stream = grey(folder, 4)
    assert stream.class_names is None and stream.label_rule == "no labels" and next(stream)[1] == {}


def test_npz(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "some.npz", arr_0=images, arr_1=np.array([4, 0, 1, 2, 3], dtype=np.int32))
    options = {"image_size": 8, "num_workers": 0, "deterministic": True, "random_flip": False}
    stream = load_data(data_dir=str(tmp_path / "some.npz"), batch_size=5, class_cond=True, num_classes=5, **options)
    x0, cond = next(stream)
    assert np.array_equal(x0, np.transpose(images, (0, 3, 1, 2)).astype(np.float32) / 127.5 - 1)
    assert cond["y"].tolist() == [4, 0, 1, 2, 3] and cond["y"].dtype == torch.int64
    assert stream.class_names == list("01234") and stream.label_rule == "arr_1"
    options["image_size"] = 4  # cropped by the rule for files
    small, _ = next(load_data(data_dir=str(tmp_path / "some.npz"), batch_size=5, **options))
    expected = center_crop_arr(Image.fromarray(images[2]), 4)
    assert np.array_equal(small[2], np.transpose(expected, (2, 0, 1)).astype(np.float32) / 127.5 - 1)


def test_npz_of_grey_images_with_class_names(tmp_path):
    images = np.stack([lopsided(0), lopsided(1)]).astype(np.uint8)[..., None]
    np.savez(tmp_path / "grey.npz", arr_0=images, arr_1=[1, 0], class_names=["ant", "bee"])
    stream = grey(tmp_path / "grey.npz", 2, class_cond=True, deterministic=True)
    x0, cond = next(stream)
    assert numbers(x0) == [0, 1] and cond["y"].tolist() == [1, 0] and stream.class_names == ["ant", "bee"]


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data_dir": ""}, "unspecified data directory"),
        ({"data_dir": "{}/nowhere"}, "nowhere does not exist"),
        ({"data_dir": "{}/nowhere.npz"}, "nowhere.npz does not exist"),
        ({"data_dir": "{}/empty"}, r"no images in .*empty.*\*.jpg, \*.jpeg, \*.png, \*.gif"),
        ({"data_dir": "{}/data/a_00.png"}, "a_00.png is not a folder, an npz, npy, zip"),
        ({"batch_size": 13}, "holds 12 images.*batch of 13.*batch_size from 1 to 12"),
        ({"num_ranks": 13}, "holds 12 images, 0 for each of 13 rank.*use fewer processes, or add images"),
        ({"batch_size": 5, "num_ranks": 3}, "4 for each of 3 rank.*from 1 to 4"),
        ({"batch_size": 0}, "no batch of 0"),
        ({"image_channels": 2}, "image_channels is 2; choose 1"),
        ({"label_from": "suffix"}, "label_from is 'suffix'; choose one of auto, prefix, folder"),
        ({"class_cond": True, "num_classes": 2}, r"label 2 \('c'\).*2 classes.*num_classes 3"),
        ({"class_cond": True, "class_names": ["a", "b"]}, "class 'c', which is not one of the 2 known classes: a, b"),
        ({"class_cond": True, "label_from": "folder"}, "a_00.png lies in no sub-folder"),
        ({"class_cond": True, "data_dir": "{}/bare"}, "no class labels in .*bare: name the files CLASS_"),
        ({"class_cond": True, "data_dir": "{}/bare", "label_from": "prefix"}, "1.png has no '_' in its name"),
    ],
)
def test_errors_come_before_any_work(folder, options, message):
    (folder.parent / "empty").mkdir()
    save(folder.parent / "bare" / "1.png", lopsided(0))
    options = {"data_dir": str(folder), "batch_size": 4, **options}
    options["data_dir"] = options["data_dir"].format(folder.parent)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        grey(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((4, 4, 4, 3), np.uint8)}, "has no array arr_0"),
        ({"arr_0": np.zeros((4, 4, 4, 3), np.float32)}, r"arr_0 is float32 \[4, 4, 4, 3\]; it must be uint8"),
        ({"arr_0": np.zeros((4, 4, 4), np.uint8)}, r"arr_0 is uint8 \[4, 4, 4\]"),
        ({"arr_0": np.zeros((4, 4, 4, 2), np.uint8)}, "C 1, 3 or 4"),
        ({"arr_0": np.zeros((0, 4, 4, 1), np.uint8), "arr_1": np.zeros(0, int)}, "holds 0 images"),
        ({"arr_0": np.zeros((4, 4, 4, 3), np.uint8)}, "no labels: class_cond needs arr_1"),
        ({"arr_0": np.zeros((4, 4, 4, 3), np.uint8), "arr_1": np.zeros(3, int)}, r"arr_1 is int64 \[3\].*4 integers"),
        ({"arr_0": np.zeros((4, 4, 4, 3), np.uint8), "arr_1": np.zeros(4)}, "arr_1 is float64"),
        ({"arr_0": np.zeros((4, 4, 4, 3), np.uint8), "arr_1": np.array([0, -1, 1, 2])}, "label -1 .* negative"),
        ({"arr_0": np.zeros((4, 4, 4, 3), np.uint8), "arr_1": np.array([0, 9, 1, 2])}, "label 9 .* fit 3 classes"),
        ({"arr_0": np.array([[None]], dtype=object)}, "cannot read .*bad.npz as an npz of plain arrays"),
    ],
)
def test_npz_errors(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        grey(tmp_path / "bad.npz", 2, class_cond=True, num_classes=3)


def test_a_file_that_is_no_npz(tmp_path):
    whole = tmp_path / "whole.npz"
    np.savez(whole, arr_0=np.zeros((40, 8, 8, 3), np.uint8))
    (tmp_path / "cut.npz").write_bytes(whole.read_bytes()[:1000])
    (tmp_path / "text.npz").write_text("hello")
    with open(tmp_path / "array.npz", "wb") as file:
        np.save(file, np.zeros(3))
    for name in ("cut", "text", "array"):
        with pytest.raises(ValueError, match=f"cannot read .*{name}.npz"):
            grey(tmp_path / f"{name}.npz", 2)


def break_files(folder):
    """a_00 is text, b_01 is cut short, c_02 has floats for pixels."""
    (folder / "a_00.png").write_text("not a picture")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / "b_01.png")
    (folder / "b_01.png").write_bytes((folder / "b_01.png").read_bytes()[:3000])
    Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32)).save(folder / "c_02.png", format="TIFF")
    return {"a_00.png", "b_01.png", "c_02.png"}


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(("name", "reason"), [("a_00", "not a picture"), ("b_01", "trunc"), ("c_02", "pixels are F")])
def test_an_unreadable_image_is_named_in_one_line(folder, num_workers, name, reason):
    break_files(folder)
    for path in folder.glob("*.png"):
        if path.stem != name:
            save(path, lopsided(0))
    with pytest.raises(ValueError, match=f"cannot read image .*{name}.png: .*{reason}.*--skip_bad_images") as caught:
        take(grey(folder, 12, num_workers=num_workers), 1)
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_skip_bad_images_goes_on_and_counts(folder, num_workers):
    bad = break_files(folder)
    stream = grey(folder, 4, class_cond=True, skip_bad_images=True, num_workers=num_workers)
    with pytest.warns(UserWarning, match="cannot read image") as caught:
        batches = take(stream, 6)  # two epochs
    assert stream.bad_images == 3 and len(caught) == 3
    assert {name for name in bad for warning in caught if name in str(warning.message)} == bad
    for x0, cond in batches:
        assert x0.shape == (4, 1, 4, 4)
        assert cond["y"].tolist() == [number % 3 for number in numbers(x0)]
    seen = {number for x0, _ in batches for number in numbers(x0)}
    assert seen == set(range(3, 12))


def test_skip_bad_images_ends_when_none_is_left(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_text("not a picture")
    with pytest.raises(ValueError, match="none of the 3 images can be read"):
        next(grey(tmp_path, 2, skip_bad_images=True))


# ------------------------------------------------------------------------------------------------------------- digits


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("sklearn")
    spec = importlib.util.spec_from_file_location("digits_program", ROOT / "datasets" / "digits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*.png")}


def test_digits_are_the_real_ones_and_the_split_is_stratified(digits, tmp_path):
    from sklearn.datasets import load_digits

    data = load_digits()
    counts = digits.write_digits(tmp_path)
    files = {path.stem: path for path in tmp_path.rglob("*.png")}
    assert len(files) == 1797 and counts == {"train": 1438, "val": 359}
    for index in range(0, 1797, 50):
        picture = Image.open(files[f"{data.target[index]}_{index:04d}"])
        assert picture.mode == "L"
        assert np.array_equal(np.array(picture), np.floor(data.images[index] * 255 / 16 + 0.5))
    for digit in range(10):
        held_out = len(list((tmp_path / "val").glob(f"{digit}_*.png")))
        assert held_out == round(0.2 * int((data.target == digit).sum()))
    stream = load_data(data_dir=str(tmp_path / "val"), batch_size=359, image_size=8, image_channels=1, class_cond=True,
                       num_classes=10, num_workers=0)
    assert stream.class_names == list("0123456789")
    x0, cond = next(stream)
    assert x0.min() == -1 and x0.max() == 1 and cond["y"].bincount().min() >= 34


def test_digits_twice_are_the_same_bytes_and_splits_do_not_mix(digits, tmp_path):
    digits.write_digits(tmp_path / "a", image_size=16, seed=1)
    first = contents(tmp_path / "a")
    digits.write_digits(tmp_path / "a", image_size=16, seed=1)
    assert contents(tmp_path / "a") == first
    assert Image.open(next((tmp_path / "a" / "train").iterdir())).size == (16, 16)
    with pytest.raises(ValueError, match="images that are not of this split"):
        digits.write_digits(tmp_path / "a", seed=2)
    assert contents(tmp_path / "a") == first


def test_digits_errors(digits, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write to .*file"):
        digits.write_digits(tmp_path / "file")
    with pytest.raises(ValueError, match="image_size is 9; choose one of 8, 16, 32"):
        digits.write_digits(tmp_path, image_size=9)
    with pytest.raises(ValueError, match="val_fraction is 1"):
        digits.write_digits(tmp_path, val_fraction=1)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        digits.write_digits(tmp_path)
