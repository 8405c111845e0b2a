"""Where images come from: every kind of source gives the same images, to any number of processes; what is refused."""

import io
import struct
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from evaluations import inspect_file, sources
from guided_diffusion.image_datasets import center_crop_arr

IMAGES = np.random.RandomState(0).randint(0, 256, (600, 4, 5, 3)).astype(np.uint8)
LABELS = np.arange(600) % 7


def drained(source, size=1, **window):
    """All that the ranks get: (images in the order of their indices, labels)."""
    blocks = [block for rank in range(size) for block in source.blocks(rank, size, **window)]
    order = np.argsort(np.concatenate([block.indices for block in blocks]))
    labels = None if blocks[0].labels is None else np.concatenate([block.labels for block in blocks])[order]
    indices = np.concatenate([block.indices for block in blocks])[order]
    first = window.get("start", 0)
    assert indices.tolist() == list(range(first, first + len(indices)))  # each once
    return np.concatenate([block.images for block in blocks])[order], labels


@pytest.fixture
def written(tmp_path):
    """The same images as npz (plain, compressed, of floats), folder and zip: {kind: path}."""
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    np.savez(tmp_path / "plain.npz", IMAGES, LABELS)
    np.savez_compressed(tmp_path / "compressed.npz", IMAGES, LABELS)
    np.savez(tmp_path / "floats.npz", IMAGES.astype(np.float32), LABELS)
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        archive.writestr("readme.txt", "not a picture")
        for i, image in enumerate(IMAGES):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "png")
            (folder / ("deep" if i < 9 else "later") / f"{i:03d}.png").parent.mkdir(exist_ok=True)
            (folder / ("deep" if i < 9 else "later") / f"{i:03d}.png").write_bytes(buffer.getvalue())
            archive.writestr(f"{i:03d}.png", buffer.getvalue())
    kinds = {name: tmp_path / f"{name}.npz" for name in ("plain", "compressed", "floats")}
    return kinds | {"folder": folder, "zip": tmp_path / "pictures.zip"}


def as_png(image):
    buffer = io.BytesIO()
    Image.fromarray(image.squeeze()).save(buffer, "png")
    return buffer.getvalue()


def of_the_loader(folder, kind, images):
    """The path of uint8 images [N,H,W,C] in a format that only the training loader reads."""
    if kind == "tar":
        with tarfile.open(folder / "x.tar", "w") as archive:
            for i, data in enumerate(map(as_png, images)):
                entry = tarfile.TarInfo(f"{i:03d}.png")
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
        return folder / "x.tar"
    if kind == "npy":
        np.save(folder / "x.npy", images)
        return folder / "x.npy"
    if kind == "idx":
        head = struct.pack(">4B3I", 0, 0, 8, 3, *images.shape[:3])
        (folder / "train-images-idx3-ubyte").write_bytes(head + images[..., 0].tobytes())
        return folder / "train-images-idx3-ubyte"
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(folder / "lmdb"), map_size=1 << 24) as base, base.begin(write=True) as writing:
        for i, data in enumerate(map(as_png, images)):
            writing.put(f"{i:05d}".encode(), data)
    return folder / "lmdb"


@pytest.mark.parametrize("kind", ["tar", "npy", "idx", "lmdb"])
def test_what_training_reads_can_be_scored(tmp_path, kind):
    images = IMAGES[:300, ..., :1]
    path = of_the_loader(tmp_path, kind, images)
    source = sources.open_source(path, channels=1)
    source.check()
    assert source.count == 300 and source.labels is None
    for size in (1, 2, 4):
        np.testing.assert_array_equal(drained(source, size)[0], images)
    np.testing.assert_array_equal(source.take([3, 299])[0], images[[3, 299]])
    cut = sources.open_source(path, 1, "3x4").take([5])[0][0]
    np.testing.assert_array_equal(cut[..., 0], center_crop_arr(Image.fromarray(images[5, ..., 0]), (3, 4)))
    assert next(inspect_file.described(path)) == f"{path}: images as training reads them"
    before = source.fingerprint(20)
    assert before == source.fingerprint(20) != source.fingerprint(21)
    (tmp_path / "other").mkdir()
    other = images.copy()
    other[7] ^= 1
    assert sources.open_source(of_the_loader(tmp_path / "other", kind, other), 1).fingerprint(20) != before


def test_pictures_of_two_sizes_in_a_tar_are_said(tmp_path):
    path = of_the_loader(tmp_path, "tar", [IMAGES[0], IMAGES[1, :3]])
    with pytest.raises(ValueError, match=r"x.tar holds pictures of \(3, 5\) and \(4, 5\) pixels: give --image_size N"):
        list(sources.open_source(path).blocks())
    assert next(sources.open_source(path, 3, 3).blocks()).images.shape == (2, 3, 3, 3)


@pytest.mark.parametrize("kind", ["plain", "compressed", "floats", "folder", "zip", "array"])
def test_every_source_gives_every_image_once_whatever_the_number_of_ranks(written, kind):
    source = sources.open_source(written.get(kind, IMAGES))
    source.check()
    assert source.count == 600
    for size in (1, 2, 4):  # 3 blocks: with 4 ranks one has nothing
        images, labels = drained(source, size)
        np.testing.assert_array_equal(images, IMAGES)
        assert images.dtype == np.uint8
        if kind in ("plain", "compressed", "floats"):
            np.testing.assert_array_equal(labels, LABELS)
    np.testing.assert_array_equal(sources.read_image_set(written["plain"]).images, IMAGES)
    np.testing.assert_array_equal(drained(source, 2, start=300, stop=590)[0], IMAGES[300:590])
    np.testing.assert_array_equal(source.take(np.array([3, 255, 256, 599]))[0], IMAGES[[3, 255, 256, 599]])


def test_an_npz_is_streamed_and_not_loaded(tmp_path, monkeypatch):
    np.savez(tmp_path / "a.npz", IMAGES)
    asked = []
    read = zipfile.ZipExtFile.read
    monkeypatch.setattr(zipfile.ZipExtFile, "read", lambda self, n=-1: asked.append(n) or read(self, n))
    monkeypatch.setattr(np, "load", None)
    drained(sources.NpzSource(tmp_path / "a.npz"))
    assert max(asked) == sources.BLOCK * 4 * 5 * 3 and min(asked) > 0


def test_fingerprints_are_of_the_first_images_and_tell_others_apart(written):
    for kind in ("plain", "folder", "zip"):
        source = sources.open_source(written[kind])
        assert len({source.fingerprint(n) for n in (2, 300, 600)}) == 3
        assert source.fingerprint(300) == sources.open_source(written[kind]).fingerprint(300)
    plain = sources.open_source(written["plain"])
    assert plain.fingerprint(300) == sources.open_source(IMAGES[:300]).fingerprint(300)
    assert plain.fingerprint(300) != sources.open_source(IMAGES[::-1].copy()).fingerprint(300)


def test_streams_of_batches_by_the_rule_of_each_kind():
    floats = torch.tensor([[-1.0, -0.5, 0.0, 1.0]]).reshape(1, 1, 2, 2).expand(2, 3, 2, 2)
    stream = [IMAGES[:3, :2, :2], torch.tensor(IMAGES[3:5, :2, :2]).permute(0, 3, 1, 2), floats]
    images = drained(sources.open_source(iter(stream)))[0]
    np.testing.assert_array_equal(images[:5], IMAGES[:5, :2, :2])
    np.testing.assert_array_equal(images[5, :, :, 0], [[0, 63], [127, 255]])  # truncated, as the samplers save
    # Each rank has a stream of its own: without indices, images r, r + R...
    source = [sources.open_source([IMAGES[rank::2]]) for rank in (0, 1)]
    blocks = [next(source[rank].blocks(rank, 2)) for rank in (0, 1)]
    assert blocks[1].indices[:3].tolist() == [1, 3, 5]
    block = next(sources.open_source([([4, 2], IMAGES[:2], torch.tensor([1, 0]))]).blocks())
    assert block.indices.tolist() == [4, 2] and block.labels.tolist() == [1, 0]


def test_pictures_of_many_sizes_are_cut_as_the_training_data_are(tmp_path):
    pictures = [np.random.RandomState(i).randint(0, 256, (20 + i, 30, 3)).astype(np.uint8) for i in range(3)]
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
    source = sources.open_source(tmp_path)
    for attempt in (source.check, lambda: drained(source)):
        with pytest.raises(ValueError, match=r"0\.png is 20x30 and .*1\.png 21x30 .*--image_size N"):
            attempt()
    source = sources.open_source(tmp_path, image_size=8)
    source.check()
    np.testing.assert_array_equal(drained(source)[0][2], center_crop_arr(Image.fromarray(pictures[2]), 8))
    grey = drained(sources.open_source(tmp_path, channels=1, image_size=8))[0]
    assert grey.shape == (3, 8, 8, 1)


def test_lossy_formats_are_known_by_name(tmp_path):
    Image.fromarray(IMAGES[0]).save(tmp_path / "a.png")
    assert sources.open_source(tmp_path).lossy is False
    Image.fromarray(IMAGES[0]).save(tmp_path / "b.JPG")
    assert sources.open_source(tmp_path).lossy is True
    assert sources.open_source(IMAGES).lossy is None


def test_damage_is_found_by_the_check_before_the_work(tmp_path, written):
    data = bytearray(written["plain"].read_bytes())
    data[20000] ^= 255
    (tmp_path / "damaged.npz").write_bytes(data)
    with pytest.raises(ValueError, match=r"damaged\.npz: Bad CRC-32"):
        sources.open_source(tmp_path / "damaged.npz").check()
    truncated = IMAGES.astype(np.float32)
    truncated[599, 0, 0, 0] = 0.5
    np.savez(tmp_path / "late.npz", truncated)
    with pytest.raises(ValueError, match=r"late\.npz, arr_0: fractional values"):
        sources.open_source(tmp_path / "late.npz").check()
    (written["folder"] / "later" / "400.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"400\.png"):
        sources.open_source(written["folder"]).check()
    buffer = io.BytesIO()
    np.save(buffer, IMAGES[:9])
    with zipfile.ZipFile(tmp_path / "short.npz", "w") as archive:
        archive.writestr("arr_0.npy", buffer.getvalue()[:-1])
    with pytest.raises(ValueError, match=r"short\.npz: it ends too early"):
        sources.open_source(tmp_path / "short.npz").check()


@pytest.mark.parametrize("give, message", [
    (lambda d: d / "none.npz", "no such file"),
    (lambda d: d, "no pictures in"),
    (lambda d: (d / "stats.pkl").write_bytes(b"x") and d / "stats.pkl", "is a pickle, which can run code"),
    (lambda d: (d / "text.npz").write_bytes(b"x") and d / "text.npz", "is not an npz file"),
    (lambda d: np.savez(d / "f.npz", np.asfortranarray(IMAGES)) or d / "f.npz", "Fortran order"),
    (lambda d: np.savez(d / "o.npz", np.array([{}])) or d / "o.npz", "Object arrays cannot be loaded"),
    (lambda d: np.savez(d / "k.npz", feats=np.ones((9, 3))) or d / "k.npz", "features for KID"),
    (lambda d: [np.zeros((2, 3, 4))], "images must be"),
    (lambda d: [torch.zeros(2, 4, 4, 3)], r"expected \[N,C,H,W\]"),
    (lambda d: [torch.full((2, 3, 4, 4), 200.0)], r"not in \[-1,1\]"),
    (lambda d: [torch.full((2, 3, 4, 4), torch.nan)], r"not in \[-1,1\]"),
])
def test_what_is_no_source_is_refused_in_one_line(tmp_path, give, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        source = sources.open_source(give(tmp_path))
        source.check()
        list(source.blocks())
    assert "\n" not in str(error.value)
    with pytest.raises(TypeError, match="int is no source of images"):
        sources.open_source(3)


def test_labels_that_are_none_are_left_alone_until_they_are_needed(tmp_path):
    np.savez(tmp_path / "a.npz", IMAGES, np.eye(600))
    source = sources.open_source(tmp_path / "a.npz")
    assert source.labels is None and "expected 600 whole numbers" in source.label_problem


@pytest.mark.parametrize("channels, size", [(1, 16), (3, 16), (3, "12x20")])
def test_an_npz_of_another_size_is_cut_as_pictures_in_a_folder_are(tmp_path, channels, size):
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 40, channels), np.uint8)
    np.savez(tmp_path / "images.npz", arr_0=images, arr_1=np.arange(5))
    (tmp_path / "folder").mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image[..., 0] if channels == 1 else image).save(tmp_path / "folder" / f"{number}.png")
    cut, other = (sources.open_source(tmp_path / name, channels, size) for name in ("images.npz", "folder"))
    found, wanted = (list(source.blocks(start=1)) for source in (cut, other))
    assert np.array_equal(found[0].images, wanted[0].images) and found[0].images.shape[0] == 4
    assert found[0].labels.tolist() == [1, 2, 3, 4] and cut.count == 5
    whole = sources.open_source(tmp_path / "images.npz", channels)
    assert cut.fingerprint(5) not in (None, whole.fingerprint(5))
    assert type(sources.open_source(tmp_path / "images.npz", channels, "28x40")) is type(whole)
