"""The programs of datasets/ that bring others' files into the loader's formats, on small files made by other hands."""

import hashlib
import io
import pickle
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image
from test_image_datasets import take
from test_pack import ROOT, program
from test_sources import cifar

from guided_diffusion.image_datasets import load_data

DATASETS = ROOT / "datasets"
cifar10, imagenet64, lsun = (program(DATASETS / f"{name}.py") for name in ("cifar10", "imagenet64", "lsun_bedroom"))


def run(name, *words):
    done = subprocess.run([sys.executable, str(DATASETS / name), *map(str, words)], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


# -------------------------------------------------------------------------------------------------------------- CIFAR

SPLITS = {"data_batch_1": 3, "data_batch_2": 2, "test_batch": 4}
CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()


def made(split):
    return cifar(SPLITS[split], len(split) + SPLITS[split])


def binary_batches():
    files = {"batches.meta.txt": "\n".join(CLASSES).encode(), "readme.html": b"hello"}
    for name in SPLITS:
        _, labels, rows = made(name)
        files[f"{name}.bin"] = b"".join(bytes([y]) + row.tobytes() for y, row in zip(labels, rows))
    return files


def python_batches():
    files = {"batches.meta": pickle.dumps({b"label_names": [name.encode() for name in CLASSES]}, 2)}
    for name in SPLITS:
        _, labels, rows = made(name)
        files[name] = pickle.dumps({b"data": rows, b"labels": labels.tolist()}, 2)
    return files


def tar_gz(path, files, folder):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def check_cifar(out):
    for split, batches in {"train": ["data_batch_1", "data_batch_2"], "test": ["test_batch"]}.items():
        with np.load(out / f"{split}.npz") as npz:
            assert np.array_equal(npz["arr_0"], np.concatenate([made(name)[0] for name in batches]))
            assert npz["arr_1"].tolist() == np.concatenate([made(name)[1] for name in batches]).tolist()
            assert npz["arr_1"].dtype == np.int64 and npz["class_names"].tolist() == CLASSES


@pytest.mark.parametrize("files", [binary_batches, python_batches])
def test_cifar_10_from_an_archive_a_folder_or_a_mirror(tmp_path, files):
    archive = tar_gz(tmp_path / "mirror.tar.gz", files(), "../cifar-10-batches")  # its folder means nothing
    assert cifar10.write_cifar(tmp_path / "a", archive) == {"train": 5, "test": 4}
    (tmp_path / "folder").mkdir()
    for name, content in files().items():
        (tmp_path / "folder" / name).write_bytes(content)
    cifar10.write_cifar(tmp_path / "b", tmp_path / "folder")
    told = archive.name, f"md5:{hashlib.md5(archive.read_bytes()).hexdigest()}"
    cifar10.write_cifar(tmp_path / "c", f"file://{tmp_path}/", archive=told, progress=False)
    for out in "abc":
        check_cifar(tmp_path / out)
    wrong = archive.name, "md5:" + "0" * 32
    with pytest.raises(ValueError, match=r"has md5 .* is deleted"):
        cifar10.write_cifar(tmp_path / "d", f"file://{tmp_path}", archive=wrong, progress=False)
    assert not list((tmp_path / "d").iterdir())


def test_cifar_10_as_improved_diffusion_writes_it(tmp_path):
    cifar10.write_cifar(tmp_path / "out", tar_gz(tmp_path / "x.tar.gz", binary_batches(), "x"), png=True)
    images, labels, _ = made("data_batch_1")
    short = "plane car bird cat deer dog frog horse ship truck".split()
    for number in range(3):
        path = tmp_path / "out" / "cifar_train" / f"{short[labels[number]]}_{number:05d}.png"
        assert np.array_equal(np.asarray(Image.open(path)), images[number])
    assert len(list((tmp_path / "out").rglob("*.png"))) == 9


def test_the_published_archives_are_named():
    assert [name for name, _ in cifar10.ARCHIVES.values()] == ["cifar-10-binary.tar.gz", "cifar-100-binary.tar.gz"]
    assert len({checksum for _, checksum in cifar10.ARCHIVES.values() if len(checksum) == 36}) == 2


def test_cifar_errors_write_nothing(tmp_path):
    archive = tar_gz(tmp_path / "x.tar.gz", binary_batches(), "x")
    (tmp_path / "cut.tar.gz").write_bytes(archive.read_bytes()[:-900])
    (tmp_path / "text.tar.gz").write_text("hello")
    untested = {name: content for name, content in binary_batches().items() if "test" not in name}
    tar_gz(tmp_path / "untested.tar.gz", untested, "x")
    whole = binary_batches()
    tar_gz(tmp_path / "short.tar.gz", whole | {"test_batch.bin": whole["test_batch.bin"][:-1]}, "x")
    for name, message in {
        "cut.tar.gz": "cannot read .*cut.tar.gz as a whole tar",
        "text.tar.gz": "cannot read .*text.tar.gz as a whole tar",
        "untested.tar.gz": "no batches of CIFAR in .*untested.tar.gz",
        "short.tar.gz": "test_batch.bin is no whole batch",
        "nowhere": "neither an address, nor a folder, nor a file",
    }.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            cifar10.write_cifar(tmp_path / "out", tmp_path / name)
    with pytest.raises(ValueError, match="of CIFAR-10 alone"):
        cifar10.write_cifar(tmp_path / "out", archive, classes=100, png=True)
    assert not (tmp_path / "out").exists()
    assert run("cifar10.py", tmp_path / "out", "--source", archive) == (
        0, f"wrote 5 images (train) and 4 images (test) to {tmp_path}/out\n", "")  # fmt: skip
    assert run("cifar10.py", tmp_path / "out", "--source", "nowhere")[::2] == (
        2, "error: source nowhere is neither an address, nor a folder, nor a file\n")  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- ImageNet


@pytest.fixture
def imagenet(tmp_path):
    """Batches 1, 2 and 10 to train on and one to validate, 4x4: (folder, {split: (images, numbers of classes)})."""
    rng, splits = np.random.default_rng(0), {}
    folder = tmp_path / "imagenet"
    folder.mkdir()
    counts = {"train_data_batch_1": 3, "train_data_batch_2": 2, "train_data_batch_10": 4, "val_data": 2}
    for name, count in counts.items():
        images, labels = rng.integers(0, 256, (count, 4, 4, 3), np.uint8), rng.integers(1, 4, count)
        mean = {} if name == "val_data" else {"mean": np.zeros(48)}
        np.savez(folder / f"{name}.npz", data=images.transpose(0, 3, 1, 2).reshape(count, -1), labels=labels, **mean)
        parts = [*splits.get(name[:3], ()), (images, labels)]
        splits[name[:3]] = parts
    splits = {split: tuple(map(np.concatenate, zip(*parts))) for split, parts in splits.items()}
    return folder, splits


MAP = "n03 1 kit_fox\nn01 2 English_setter\nn02 3 Siberian_husky\n"


def test_imagenet_batches_become_an_array(imagenet, tmp_path):
    folder, splits = imagenet
    assert imagenet64.write_imagenet(folder, tmp_path / "out", progress=False) == {"train": 9, "val": 2}
    for split in ("train", "val"):
        images, labels = splits[split[:3]]
        assert np.array_equal(np.load(tmp_path / "out" / f"{split}.npy"), images)
        assert np.load(tmp_path / "out" / f"{split}_labels.npy").tolist() == (labels - 1).tolist()
    how = {"data_dir": str(tmp_path / "out" / "train.npy"), "batch_size": 9, "image_size": 4, "num_workers": 0}
    _, cond = next(load_data(**how, class_cond=True, deterministic=True, random_flip=False))
    assert cond["y"].tolist() == (splits["tra"][1] - 1).tolist()


def test_imagenet_is_numbered_as_the_published_models_are(imagenet, tmp_path):
    folder, splits = imagenet
    (tmp_path / "map.txt").write_text(MAP)
    imagenet64.write_imagenet(folder, tmp_path / "out", str(tmp_path / "map.txt"), progress=False)
    expected = [{1: 2, 2: 0, 3: 1}[number] for number in splits["tra"][1].tolist()]
    assert np.load(tmp_path / "out" / "train_labels.npy").tolist() == expected
    how = {"data_dir": str(tmp_path / "out" / "train.npy"), "batch_size": 1, "image_size": 4, "num_workers": 0}
    assert load_data(**how, class_cond=True).class_names == ["n01", "n02", "n03"]


def test_imagenet_from_the_zips(imagenet, tmp_path):
    folder, splits = imagenet
    for number, pattern in enumerate(["train*_1.npz", "train*_[!1]*.npz", "train*_10.npz", "val*"]):
        with zipfile.ZipFile(folder / f"part{number}.zip", "w") as archive:
            for path in sorted(folder.glob(pattern)):
                archive.write(path, f"inside/{path.name}")
                path.unlink()
    assert imagenet64.write_imagenet(folder, tmp_path / "out", progress=False) == {"train": 9, "val": 2}
    assert np.array_equal(np.load(tmp_path / "out" / "train.npy"), splits["tra"][0])


def test_imagenet_errors(imagenet, tmp_path):
    folder, _ = imagenet
    (tmp_path / "map.txt").write_text(MAP.replace("2 E", "1 E"))
    with pytest.raises(ValueError, match="has a number or an identifier twice"):
        imagenet64.write_imagenet(folder, tmp_path / "out", str(tmp_path / "map.txt"))
    (tmp_path / "map.txt").write_text(MAP.splitlines()[0])
    with pytest.raises(ValueError, match=r"class 3 is not in --map|class 2 is not in --map"):
        imagenet64.write_imagenet(folder, tmp_path / "out", str(tmp_path / "map.txt"), progress=False)
    good = dict(np.load(folder / "train_data_batch_2.npz"))
    for wrong, message in [
        ({"data": good["data"][:, :-1]}, r"data is uint8 \[2, 47\], not uint8 \[N,3\*S\*S\]"),
        ({"labels": good["labels"] - 3}, "not numbers from 1, one an image"),
        ({"data": np.zeros((2, 12), np.uint8)}, r"items are uint8 \[2, 2, 3\], those before uint8 \[4, 4, 3\]"),
    ]:
        np.savez(folder / "train_data_batch_2.npz", **good | wrong)
        with pytest.raises(ValueError, match=message):
            imagenet64.write_imagenet(folder, tmp_path / "out", progress=False)
    (folder / "train_data_batch_2.npz").write_bytes(b"PK")
    code, _, said = run("imagenet64.py", folder, tmp_path / "out")
    assert code == 2 and said.splitlines()[-1].startswith("error: cannot read")
    assert not list((tmp_path / "out").iterdir())
    with pytest.raises(FileNotFoundError, match=r"no train_data_batch_1.npz and no val_data.npz in"):
        imagenet64.write_imagenet(tmp_path, tmp_path / "out")


# --------------------------------------------------------------------------------------------------------------- LSUN


@pytest.fixture
def bedroom(tmp_path):
    lmdb = pytest.importorskip("lmdb")
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, shape, np.uint8) for shape in ((40, 50, 3), (33, 20, 3), (64, 64))]
    with lmdb.open(str(tmp_path / "bedroom_val_lmdb"), map_size=2**24) as base, base.begin(write=True) as writing:
        for key, pixels in zip((b"b", b"a", b"c"), pictures):
            content = io.BytesIO()
            Image.fromarray(pixels).save(content, "webp", lossless=True)
            writing.put(key, content.getvalue())
        writing.put(b"d", b"no picture")
    return tmp_path / "bedroom_val_lmdb", [pictures[1], pictures[0], np.stack([pictures[2]] * 3, -1)]


def check_lsun(folder, pictures, size):
    for number, pixels in enumerate(pictures):
        height, width = pixels.shape[:2]
        scale = size / min(height, width)
        small = Image.fromarray(pixels).resize((round(width * scale), round(height * scale)), Image.BOX)
        top, left = (small.height - size) // 2, (small.width - size) // 2
        expected = np.asarray(small.crop((left, top, left + size, top + size)))
        assert np.array_equal(np.asarray(Image.open(folder / f"bedroom_{number:07d}.png")), expected)
    return True


def test_lsun_as_the_original_program_writes_it(bedroom, tmp_path):
    path, pictures = bedroom
    code, said, _ = run("lsun_bedroom.py", "--image-size", 16, path, tmp_path / "deep" / "out")
    assert (code, said) == (0, "wrote 3 pictures; 0 were there, 1 could not be read\n")
    assert check_lsun(tmp_path / "deep" / "out", pictures, 16)
    (tmp_path / "deep" / "out" / "bedroom_0000001.png").unlink()
    assert lsun.write_lsun(path, tmp_path / "deep" / "out", 16, progress=False) == (1, 2, 1)  # it goes on
    assert check_lsun(tmp_path / "deep" / "out", pictures, 16)


def test_lsun_from_its_zip_and_from_an_address(bedroom, tmp_path):
    path, pictures = bedroom
    with zipfile.ZipFile(tmp_path / "val.zip", "w") as archive:
        archive.write(path / "data.mdb", "bedroom_val_lmdb/data.mdb")
    assert lsun.write_lsun(tmp_path / "val.zip", tmp_path / "out", 8, progress=False) == (3, 0, 1)
    assert check_lsun(tmp_path / "out", pictures, 8)
    md5 = hashlib.md5((tmp_path / "val.zip").read_bytes()).hexdigest()
    address = f"file://{tmp_path}/val.zip"
    lsun.write_lsun(address, tmp_path / "far" / "out", 8, checksum=f"md5:{md5}", progress=False)
    assert check_lsun(tmp_path / "far" / "out", pictures, 8)
    with pytest.raises(ValueError, match="is an address: say by --checksum"):
        lsun.write_lsun(address, tmp_path / "out", 8)
    (tmp_path / "val.zip").write_bytes((tmp_path / "val.zip").read_bytes()[:-30])
    code, _, said = run("lsun_bedroom.py", tmp_path / "val.zip", tmp_path / "out")
    assert code == 2 and "val.zip as a zip of an LMDB" in said


def test_mnists_own_files_load_as_they_are(tmp_path):
    pytest.importorskip("sklearn")
    digits = program(ROOT / "datasets" / "digits.py").load_digits()
    images, labels = digits[0][:20], digits[1][:20].astype(np.uint8)
    header = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in images.shape)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(header + images.tobytes())
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 20]) + labels.tobytes())
    how = {"batch_size": 20, "image_size": 8, "image_channels": 1, "random_flip": False, "num_workers": 0}
    stream = load_data(
        data_dir=str(tmp_path / "t10k-images-idx3-ubyte"), **how, class_cond=True, num_classes=10, deterministic=True
    )
    x, cond = take(stream, 1)[0]
    assert (((x + 1) * 127.5).round()[:, 0].numpy() == images).all() and cond["y"].tolist() == labels.tolist()
