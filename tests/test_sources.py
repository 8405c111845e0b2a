"""Every place that images can come from, written by libraries that are not ours, read back to the same pixels."""

import gzip
import io
import json
import multiprocessing
import os
import pickle
import shutil
import struct
import tarfile
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_image_datasets import grey, lopsided, numbers, save, take

from guided_diffusion import archives, byte_formats
from guided_diffusion.image_datasets import load_data
from guided_diffusion.sources import open_source

NAMES = ["b_0.png", "a/b_1.png", "a/a_2.png", "B_3.png", "a_4.png"]  # the picture's content is the number
IN_ORDER = [3, 2, 1, 4, 0]  # by names, folder by folder: B_3, a/a_2, a/b_1, a_4, b_0


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(NAMES):
        save(tmp_path / "data" / name, lopsided(number))
    return tmp_path / "data"


def zipped(folder, path, inside="", **how):
    with zipfile.ZipFile(path, "w", **how) as file:
        for each in sorted(folder.rglob("*"), reverse=True):
            file.write(each, f"{inside}{each.relative_to(folder)}")
    return path


def tarred(folder, path, inside="", mode="w", **how):
    with tarfile.open(path, mode, **how) as file:
        file.add(folder, inside or ".")
    return path


def read(data_dir, **options):
    """(numbers of the pictures in order, the stream)."""
    stream = grey(data_dir, 1, deterministic=True, random_flip=False, once=True, **options)
    batches = take(stream, stream.num_images)
    return [numbers(x0)[0] for x0, _ in batches], [c["y"].item() for _, c in batches if c], stream


# ----------------------------------------------------------------------------------------------------------- archives


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", ["folder", "zip", "deflated", "wrapped.zip", "tar", "gnu", "pax", "wrapped.tar"])
def test_archives_give_what_the_folder_gives(folder, tmp_path, kind, num_workers):
    path = {
        "folder": lambda: folder,
        "zip": lambda: zipped(folder, tmp_path / "x.zip"),
        "deflated": lambda: zipped(folder, tmp_path / "x.zip", compression=zipfile.ZIP_DEFLATED),
        "wrapped.zip": lambda: zipped(folder, tmp_path / "x.zip", "all/"),
        "tar": lambda: tarred(folder, tmp_path / "x.tar", format=tarfile.USTAR_FORMAT),
        "gnu": lambda: tarred(folder, tmp_path / "x.tar", format=tarfile.GNU_FORMAT),
        "pax": lambda: tarred(folder, tmp_path / "x.tar", format=tarfile.PAX_FORMAT),
        "wrapped.tar": lambda: tarred(folder, tmp_path / "x.tar", "all"),
    }[kind]()
    found, labels, stream = read(path, class_cond=True, num_workers=num_workers)
    assert found == IN_ORDER and labels == [0, 1, 2, 1, 2] and stream.class_names == ["B", "a", "b"]
    if not kind.startswith("wrapped"):
        assert stream.fingerprint == read(folder, class_cond=True)[2].fingerprint


def test_one_archive_is_read_by_several_epochs_workers_and_ranks(folder, tmp_path):
    for path in (zipped(folder, tmp_path / "x.zip"), tarred(folder, tmp_path / "x.tar")):
        whole = [numbers(x) for x, _ in take(grey(path, 2, seed=3), 6)]
        assert whole == [numbers(x) for x, _ in take(grey(path, 2, seed=3, num_workers=2), 6)]
        ranks = [take(grey(path, 1, seed=3, rank=rank, num_ranks=2), 6) for rank in range(2)]
        assert whole == [[numbers(a)[0], numbers(b)[0]] for (a, _), (b, _) in zip(*ranks)]


def test_a_child_process_opens_the_archive_for_itself(folder, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((2, 4, 4, 1), np.uint8))
    for path in (zipped(folder, tmp_path / "x.zip"), tarred(folder, tmp_path / "x.tar"), tmp_path / "x.npy"):
        images = open_source(str(path)).images
        held = images.handle
        shared = lambda images=images, held=held: os._exit(images.handle is held)  # noqa: E731
        child = multiprocessing.get_context("fork").Process(target=shared)
        child.start()
        child.join()
        assert child.exitcode == 0 and images.handle is held
        assert pickle.loads(pickle.dumps(images)).handle is not held


def test_fingerprints_tell_labels_and_names_apart(folder, tmp_path):
    (folder / "b_0.png").rename(folder / "a" / "b_0.png")
    (folder / "a_4.png").rename(folder / "a" / "a_4.png")
    (folder / "B_3.png").rename(folder / "a" / "B_3.png")
    labelled = [read(folder, class_cond=True, label_from=rule)[2].fingerprint for rule in ("prefix", "prefix")]
    with pytest.warns(UserWarning, match="are of one class"):
        labelled.append(read(folder, class_cond=True, label_from="folder")[2].fingerprint)
    plain = read(folder)[2].fingerprint
    (folder / "a" / "b_0.png").rename(folder / "a" / "c_0.png")
    assert labelled[0] == labelled[1] and len({*labelled, plain, read(folder)[2].fingerprint}) == 4


def test_a_wrapped_archive_has_its_classes_below_the_wrapping(tmp_path):
    for number, name in enumerate(["cat/1.png", "dog/2.png", "dog/deep/3.png"]):
        save(tmp_path / "data" / name, lopsided(number))
    for path in (zipped(tmp_path / "data", tmp_path / "x.zip", "pets/"), tarred(tmp_path / "data", tmp_path / "x.tar")):
        found, labels, stream = read(path, class_cond=True)
        assert (found, labels, stream.class_names) == ([0, 1, 2], [0, 1, 1], ["cat", "dog"])
    shutil.rmtree(tmp_path / "data" / "dog")
    with pytest.warns(UserWarning, match="all 1 images are of one class, 0 .'cat'. .labels by sub-folder"):
        read(zipped(tmp_path / "data", tmp_path / "one.zip"), class_cond=True)


def test_pictures_come_folder_by_folder(tmp_path):
    for number, name in enumerate(["sub.png", "sub/z.png", "sub-1.png"]):
        save(tmp_path / "data" / name, lopsided(number))
    data = tmp_path / "data"
    for path in (data, zipped(data, tmp_path / "x.zip"), tarred(data, tmp_path / "x.tar")):
        assert read(path)[0] == [1, 2, 0]


def test_imagenets_tar_of_tars_is_read_as_it_is(tmp_path):
    with tarfile.open(tmp_path / "train.tar", "w") as outer:
        for first, wnid in enumerate(["n02", "n01"]):
            content = io.BytesIO()
            with tarfile.open(fileobj=content, mode="w") as inner:
                for number in (2 * first, 2 * first + 1):
                    picture = io.BytesIO()
                    Image.fromarray(lopsided(number).astype(np.uint8)).save(picture, "png")
                    member = tarfile.TarInfo(f"{wnid}_{number}.png")
                    member.size = len(picture.getvalue())
                    inner.addfile(member, io.BytesIO(picture.getvalue()))
            member = tarfile.TarInfo(f"{wnid}.tar")
            member.size = len(content.getvalue())
            outer.addfile(member, io.BytesIO(content.getvalue()))
    found, labels, stream = read(tmp_path / "train.tar", class_cond=True, num_workers=1)
    assert (found, labels, stream.class_names) == ([2, 3, 0, 1], [0, 0, 1, 1], ["n01", "n02"])


def test_a_picture_inside_an_archive_is_named_when_it_cannot_be_read(folder, tmp_path):
    (folder / "a" / "b_1.png").write_bytes(b"no picture")
    for path in (zipped(folder, tmp_path / "x.zip"), tarred(folder, tmp_path / "x.tar")):
        with pytest.raises(ValueError, match=rf"cannot read image a/b_1.png in {path}: not a picture"):
            read(path)
        with pytest.warns(UserWarning, match="skipped, 1 so far"):
            assert len(take(grey(path, 1, skip_bad_images=True), 5)) == 5


def test_half_written_archives(folder, tmp_path):
    whole = zipped(folder, tmp_path / "x.zip").read_bytes()
    for cut in (10, len(whole) // 2, len(whole) - 5):
        (tmp_path / "cut.zip").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"cannot read .*cut.zip as a whole zip"):
            grey(tmp_path / "cut.zip", 1)
    tarred(folder, tmp_path / "x.tar")
    whole = (tmp_path / "x.tar").read_bytes()
    with tarfile.open(tmp_path / "x.tar") as file:
        ends = [member.offset_data + -(-member.size // 512) * 512 for member in file.getmembers()]
    for cut in (100, ends[-1] - 600, ends[-1], ends[2], ends[-1] + 511):  # inside a member, at its end, of all members
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"cannot read .*cut.tar as a whole tar"):
            grey(tmp_path / "cut.tar", 1)
    (tmp_path / "cut.tar").write_bytes(whole[: ends[-1] + 512])
    assert grey(tmp_path / "cut.tar", 1).num_images == 5


@pytest.mark.parametrize("name", ["../out_1.png", "/abs_1.png", "a/../../x_1.png", "C:\\x_1.png"])
def test_paths_that_lead_out_of_an_archive(tmp_path, name):
    picture = Path(save(tmp_path / "x.png", lopsided(0))).read_bytes()
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        file.writestr(name, picture)
    with tarfile.open(tmp_path / "x.tar", "w") as file:
        member = tarfile.TarInfo(name)
        member.size = len(picture)
        file.addfile(member, io.BytesIO(picture))
    for kind in ("zip", "tar"):
        with pytest.raises(ValueError, match=r"cannot read .*: .*x_1.png|out_1.png|abs_1.png would lie outside of it"):
            grey(tmp_path / f"x.{kind}", 1)


def test_archives_that_are_refused(folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "twice.zip", "w") as file, pytest.warns(UserWarning, match="Duplicate name"):
        for _ in range(2):
            file.write(folder / "b_0.png", "b_0.png")
    with tarfile.open(tmp_path / "twice.tar", "w") as file:
        for _ in range(2):
            file.add(folder / "b_0.png", "b_0.png")
    os.link(folder / "b_0.png", folder / "c_9.png")
    tarred(folder, tmp_path / "link.tar")
    (folder / "c_9.png").unlink()
    (folder / "c_9.png").symlink_to("b_0.png")
    tarred(folder, tmp_path / "symlink.tar")
    (folder / "c_9.png").unlink()
    tarred(folder, tmp_path / "x.tar.gz", mode="w:gz")
    with zipfile.ZipFile(tmp_path / "none.zip", "w") as file:
        file.writestr("notes.txt", "")
        file.writestr("__MACOSX/._cat_1.png", "")
    secret = bytearray(zipped(folder, tmp_path / "secret.zip").read_bytes())
    secret[secret.find(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "secret.zip").write_bytes(secret)
    for name, message in {
        "twice.zip": "holds b_0.png twice", "twice.tar": "holds b_0.png twice",
        "link.tar": "png is a sparse file or a link", "symlink.tar": "c_9.png is a sparse file or a link",
        "x.tar.gz": "compressed as a whole.*unpack it to a .tar", "none.zip": "no images in .*none.zip",
        "secret.zip": "it is encrypted",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=message):
            grey(tmp_path / name, 1)


def test_a_zip_bomb(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MOST_BYTES", 50)
    with pytest.raises(ValueError, match=r"unpacks to \d+ bytes, more than 50"):
        read(zipped(folder, tmp_path / "x.zip"))


def test_unicode_names(tmp_path):
    names = ["größe_ß.png", "猫_1.png", "a b/é_2.png", "🐈_3.png"]
    for number, name in enumerate(names):
        save(tmp_path / "data" / name, lopsided(number))
    expected = sorted({name.rsplit("/")[-1].split("_")[0] for name in names})
    data = tmp_path / "data"
    for path in (data, zipped(data, tmp_path / "x.zip"), tarred(data, tmp_path / "x.tar")):
        found, labels, stream = read(path, class_cond=True)
        assert stream.class_names == expected == ["größe", "é", "猫", "🐈"]
        assert dict(zip(found, labels)) == {0: 0, 1: 2, 2: 1, 3: 3}
    # A Mac writes é as two characters; a model that was trained elsewhere knows it as one.
    (tmp_path / "mac").mkdir()
    save(tmp_path / "mac" / f"{unicodedata.normalize('NFD', 'é')}_1.png", lopsided(0))
    assert read(tmp_path / "mac", class_cond=True, class_names=["e", "é"])[1] == [1]


# ------------------------------------------------------------------------------------------------------------- labels


def with_files(folder, tmp_path, **files):
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content, encoding="utf-8")
    return [folder, zipped(folder, tmp_path / "x.zip"), zipped(folder, tmp_path / "y.zip", "all/"),
            tarred(folder, tmp_path / "x.tar", "all")]  # fmt: skip


@pytest.mark.parametrize("header", ["", "file,label\n", "\ufefffilename,class\n"])
def test_labels_csv(folder, tmp_path, header):
    rows = 'b_0.png,dog\na/b_1.png,"cat, big"\n./a/a_2.png,dog\n\nB_3.png, ant\na_4.png,dog\n'
    for path in with_files(folder, tmp_path, labels__csv=header + rows):
        found, labels, stream = read(path, class_cond=True)
        assert stream.class_names == ["ant", "cat, big", "dog"] and stream.label_rule == "labels.csv"
        assert dict(zip(found, labels)) == {0: 2, 1: 1, 2: 2, 3: 0, 4: 2}
        assert read(path, class_cond=True, label_from="prefix")[2].class_names == ["B", "a", "b"]
        assert read(path, class_cond=True, class_names=["dog", "cat, big", "ant"])[1] == [2, 0, 1, 0, 0]


def test_whole_numbers_in_labels_csv_are_the_labels(folder, tmp_path):
    rows = "b_0.png,10\na/b_1.png,2\na/a_2.png,0\nB_3.png,1\na_4.png,2\n"
    for path in with_files(folder, tmp_path, labels__csv=rows):
        with pytest.warns(UserWarning, match="no image has label 3, 4, 5, 6, 7, 8, 9, of labels up to 10"):
            found, labels, stream = read(path, class_cond=True)
        assert dict(zip(found, labels)) == {0: 10, 1: 2, 2: 0, 3: 1, 4: 2} and stream.class_names[-1] == "10"


def test_whole_numbers_are_names_where_the_run_knows_them_as_names(folder, tmp_path):
    rows = "b_0.png,10\na/b_1.png,2\na/a_2.png,1\nB_3.png,1\na_4.png,2\n"
    for path in with_files(folder, tmp_path, labels__csv=rows):
        found, labels, _ = read(path, class_cond=True, class_names=["1", "10", "2"])  # as of folders, sorted as text
        assert dict(zip(found, labels)) == {0: 1, 1: 2, 2: 0, 3: 0, 4: 2}
    rows = "b_0.png,01\na/b_1.png,02\na/a_2.png,03\nB_3.png,01\na_4.png,02\n"
    for path in with_files(folder, tmp_path, labels__csv=rows):
        assert read(path, class_cond=True)[2].class_names == ["01", "02", "03"]


def test_dataset_json_of_stylegan(folder, tmp_path):
    labels = {"labels": [["b_0.png", 2], ["a\\b_1.png", 0], ["a/a_2.png", 1], ["B_3.png", 0], ["a_4.png", 2]]}
    for path in with_files(folder, tmp_path, dataset__json=json.dumps(labels)):
        found, labels_found, stream = read(path, class_cond=True)
        assert dict(zip(found, labels_found)) == {0: 2, 1: 0, 2: 1, 3: 0, 4: 2}
        assert stream.class_names == ["0", "1", "2"] and stream.label_rule == "dataset.json"
    named = labels | {"class_names": ["x", "y", "z"]}
    for path in with_files(folder, tmp_path, dataset__json=json.dumps(named)):
        assert read(path, class_cond=True)[2].class_names == ["x", "y", "z"]
        assert read(path, class_cond=True, class_names=["z", "y", "x"])[1] == [2, 1, 2, 0, 0]
    for path in with_files(folder, tmp_path, dataset__json='{"labels": null}'):
        assert read(path, class_cond=True, label_from="prefix")[2].label_rule == "file-name prefix"


ALL = "b_0.png,1\na/b_1.png,0\na/a_2.png,1\nB_3.png,0\n"


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({"labels__csv": ALL}, {}, r"labels.csv has no label for a_4.png \(1 of 5 pictures\)"),
        ({"labels__csv": ALL + "a_4.png,2\na_4.png,3\n"}, {}, "line 6: a_4.png has two labels, '2' and '3'"),
        ({"labels__csv": ALL + "a_4.png\n"}, {}, "line 5: 'a_4.png' is not FILE,LABEL"),
        ({"labels__csv": ALL + "a_4.png,\n"}, {}, "line 5: 'a_4.png,' is not FILE,LABEL"),
        ({"dataset__json": '{"labels": [["b_0.png"'}, {}, "dataset.json is no whole json"),
        ({"dataset__json": '{"labels": [["b_0.png", 0.5]]}'}, {}, r"is no \[FILE, NUMBER\]"),
        ({"dataset__json": '{"labels": [["b_0.png", 0], ["b_0.png", 1]]}'}, {}, "b_0.png has two labels, 0 and 1"),
        ({"dataset__json": '{"labels": []}'}, {"label_from": "json"}, "dataset.json has no label for B_3.png"),
        ({"dataset__json": '{"labels": null}'}, {}, "dataset.json says that there are no labels"),
        ({"dataset__json": '{"labels": [], "class_names": 3}'}, {}, "class_names is no list of texts"),
        ({"dataset__json": "{}", "labels__csv": ""}, {}, "holds both labels.csv and dataset.json"),
        ({}, {"label_from": "csv"}, "label_from is csv, but there is no labels.csv in"),
        ({"labels__csv": ALL + "a_4.png,-1\n"}, {"num_classes": 2}, "fit 2 classes"),
    ],
)
def test_labels_that_do_not_fit(folder, tmp_path, files, options, message):
    for path in with_files(folder, tmp_path, **files)[:2]:
        with pytest.raises(ValueError, match=message) as caught:
            grey(path, 1, class_cond=True, **options)
        assert "\n" not in str(caught.value)


def test_rows_of_files_that_are_not_there_are_said(folder, tmp_path):
    rows = ALL + "a_4.png,2\ngone.png,1\nlost.png,1\n"
    for path in with_files(folder, tmp_path, labels__csv=rows):
        with pytest.warns(UserWarning, match="names 2 files that are not there, as gone.png"):
            assert len(read(path, class_cond=True)[1]) == 5


def test_a_labels_file_in_another_encoding(folder):
    (folder / "labels.csv").write_bytes(b"b_0.png,\xe9\n")
    with pytest.raises(ValueError, match=r"labels.csv is no text in UTF-8"):
        grey(folder, 1, class_cond=True)


def test_a_run_keeps_its_numbers_on_arrays_with_names(tmp_path):
    images = np.stack([lopsided(0), lopsided(1)]).astype(np.uint8)[..., None]
    np.savez(tmp_path / "val.npz", arr_0=images, arr_1=[0, 1], class_names=["cow", "dog"])
    assert read(tmp_path / "val.npz", class_cond=True, class_names=["ant", "dog", "cow"])[1] == [2, 1]
    with pytest.raises(ValueError, match="class 'dog', which is not one of the 2 known classes: ant, cow"):
        grey(tmp_path / "val.npz", 1, class_cond=True, class_names=["ant", "cow"])


# ------------------------------------------------------------------------------------------------------------- arrays


@pytest.fixture
def pictures():
    """uint8 [5,4,4,1] that `numbers` tells apart."""
    return np.stack([lopsided(number) for number in range(5)]).astype(np.uint8)[..., None]


@pytest.mark.parametrize("labels", ["train_labels.npy", "labels.npy", None])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_mapped_npy(tmp_path, pictures, labels, num_workers):
    np.save(tmp_path / "train.npy", pictures)
    if labels:
        np.save(tmp_path / labels, np.array([3, 1, 0, 2, 2], np.int32))
        np.save(tmp_path / "train_class_names.npy", ["w", "x", "y", "z"])
    found, y, stream = read(tmp_path / "train.npy", class_cond=bool(labels), num_workers=num_workers)
    assert found == [0, 1, 2, 3, 4]
    if labels:
        assert y == [3, 1, 0, 2, 2] and stream.class_names == list("wxyz") and stream.label_rule == labels
    else:
        with pytest.raises(ValueError, match=r"train.npy has no labels: class_cond needs train_labels.npy"):
            grey(tmp_path / "train.npy", 1, class_cond=True)


def test_a_mapped_npy_stays_on_the_disk(tmp_path):
    shape = (200_000, 64, 64, 3)  # 2.4 GB, if it were more than a hole in a file
    np.lib.format.open_memmap(tmp_path / "large.npy", "w+", np.uint8, shape).flush()
    source = open_source(str(tmp_path / "large.npy"))
    assert len(source.images) == 200_000 and len(pickle.dumps(source.images)) < 1000
    assert source.images[199_999].shape == (64, 64, 3) and source.fingerprint()
    (tmp_path / "half.npy").write_bytes((tmp_path / "large.npy").open("rb").read(10_000))
    with pytest.raises(ValueError, match=r"cannot read .*half.npy as an npy file"):
        open_source(str(tmp_path / "half.npy"))


def test_fingerprints_of_arrays_tell_data_apart(tmp_path, pictures):
    seen = set()
    for number, images in enumerate([pictures, pictures[:4], pictures[::-1]]):
        np.save(tmp_path / f"{number}.npy", images)
        seen.add(grey(tmp_path / f"{number}.npy", 1).fingerprint)
    assert len(seen) == 3 and grey(tmp_path / "0.npy", 2, seed=9).fingerprint in seen


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 4, 4), np.uint8), r"it is uint8 \[4, 4, 4\]; it must be uint8 \[N,H,W,C\]"),
        (np.zeros((4, 4, 4, 3), np.float32), "it is float32"),
        (np.zeros((4, 0, 4, 3), np.uint8), "images without pixels"),
        (np.array([None]), "cannot read .*x.npy as an npy file of a plain array"),
    ],
)
def test_npy_errors(tmp_path, array, message):
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        grey(tmp_path / "x.npy", 1)


@pytest.mark.parametrize("packing", ["", ".gz"])
def test_idx(tmp_path, pictures, packing):
    pack = gzip.compress if packing else bytes
    content = struct.pack(">HBBIII", 0, 8, 3, 5, 4, 4) + pictures.tobytes()
    (tmp_path / f"train-images-idx3-ubyte{packing}").write_bytes(pack(content))
    assert read(tmp_path / f"train-images-idx3-ubyte{packing}")[0] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="has no labels: class_cond needs train-labels-idx1-ubyte"):
        grey(tmp_path / f"train-images-idx3-ubyte{packing}", 1, class_cond=True)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(struct.pack(">HBBI", 0, 8, 1, 5) + bytes([4, 3, 2, 1, 0]))
    assert read(tmp_path / f"train-images-idx3-ubyte{packing}", class_cond=True)[1] == [4, 3, 2, 1, 0]
    (tmp_path / "train-images-idx3-ubyte").write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"not whole: 79 values for the shape \[5, 4, 4\]"):
        grey(tmp_path / "train-images-idx3-ubyte", 1)


# -------------------------------------------------------------------------------------------------------------- CIFAR


def cifar(count, seed, classes=10):
    """(uint8 [N,32,32,3], labels) and the bytes [N,3072] that CIFAR's batches hold: a plane for each colour."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
    rows = np.stack([np.concatenate([image[..., c].ravel() for c in range(3)]) for image in images])
    return images, rng.integers(0, classes, count), rows


def colour(data_dir, **options):
    stream = load_data(data_dir=str(data_dir), batch_size=1, image_size=32, deterministic=True, random_flip=False,
                       num_workers=0, once=True, class_cond=True, **options)  # fmt: skip
    batches = take(stream, stream.num_images)
    images = [((x[0].permute(1, 2, 0).numpy() + 1) * 127.5).round().astype(np.uint8) for x, _ in batches]
    return np.stack(images), [cond["y"].item() for _, cond in batches], stream.class_names


@pytest.mark.filterwarnings("ignore:no image has label")
def test_cifar_10_binary(tmp_path):
    batches = [cifar(3, seed) for seed in range(11)]
    for number, (_, labels, rows) in enumerate(batches, 1):
        records = b"".join(bytes([label]) + row.tobytes() for label, row in zip(labels, rows))
        (tmp_path / f"data_batch_{number}.bin").write_bytes(records)
    (tmp_path / "test_batch.bin").write_bytes(records)
    (tmp_path / "batches.meta.txt").write_text("\n".join("abcdefghij") + "\n\n")
    images, labels, names = colour(tmp_path)  # a folder: the batches to train on, 10 after 9
    assert np.array_equal(images, np.concatenate([i for i, _, _ in batches])) and names == list("abcdefghij")
    assert labels == np.concatenate([each for _, each, _ in batches]).tolist()
    assert np.array_equal(colour(tmp_path / "test_batch.bin")[0], batches[-1][0])
    (tmp_path / "test_batch.bin").write_bytes(records[:-1])
    with pytest.raises(ValueError, match=r"test_batch.bin is no whole batch of CIFAR: 9218 bytes"):
        colour(tmp_path / "test_batch.bin")


@pytest.mark.filterwarnings("ignore:no image has label")
def test_cifar_100_binary_has_fine_labels(tmp_path):
    images, labels, rows = cifar(4, 0, 100)
    (tmp_path / "train.bin").write_bytes(b"".join(bytes([7, y]) + row.tobytes() for y, row in zip(labels, rows)))
    (tmp_path / "fine_label_names.txt").write_text("\n".join(f"c{i}" for i in range(100)))
    for path in (tmp_path, tmp_path / "train.bin"):
        found, y, names = colour(path)
        assert np.array_equal(found, images) and y == labels.tolist() and names[99] == "c99"


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("layout", ["cifar-10", "cifar-100"])
@pytest.mark.filterwarnings("ignore:no image has label")
def test_cifar_pickled(tmp_path, layout, protocol):
    """By numpy and pickle as they are today; the published files are protocol 2 of Python 2, with bytes for texts."""
    small = layout == "cifar-10"
    images, labels, rows = cifar(4, 1, 10 if small else 100)
    content = {b"data": rows, b"labels" if small else b"fine_labels": labels.tolist(), b"batch_label": b"x",
               b"filenames": [b"a.png"] * 4}  # fmt: skip
    names = [b"name %d" % i for i in range(100)]
    meta = {b"label_names": names[:10], b"num_vis": 3072} if small else {b"fine_label_names": names}
    (tmp_path / ("data_batch_1" if small else "train")).write_bytes(pickle.dumps(content, protocol))
    (tmp_path / ("batches.meta" if small else "meta")).write_bytes(pickle.dumps(meta, protocol))
    found, y, given = colour(tmp_path)
    assert np.array_equal(found, images) and y == labels.tolist() and given[3] == "name 3"


class Runs:
    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({b"data": Runs()}, r"asks for (posix|nt).system, which is not read"),
        ({b"data": np.zeros((2, 3072), np.float32), b"labels": [0, 1]}, "an array that is not of bytes"),
        ({b"data": np.array([[Runs()]]), b"labels": [0]}, "posix.system"),
        ({b"data": np.zeros((2, 3071), np.uint8), b"labels": [0, 1]}, r"no array data of bytes \[N,3072\]"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]}, "has no list of 2 labels"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": [-1]}, "has no list of 1 labels"),
        ([1, 2], "no array data"),
    ],
)
def test_pickles_are_not_run(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    Path("data_batch_1").write_bytes(pickle.dumps(content, 2))
    with pytest.raises(ValueError, match=message):
        grey("data_batch_1", 1)
    assert not Path("ran").exists()


def test_a_pickle_cut_short(tmp_path):
    whole = pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 1]}, 2)
    for cut in (0, 20, len(whole) - 3):
        (tmp_path / "data_batch_1").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"cannot read .*data_batch_1 as a pickle of plain values"):
            byte_formats.read_cifar(tmp_path / "data_batch_1")


# --------------------------------------------------------------------------------------------------------------- LMDB


@pytest.fixture
def lsun(tmp_path):
    """An LMDB as LSUN's: webp pictures under keys that are hashes."""
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(tmp_path / "bedroom_lmdb"), map_size=2**24) as base, base.begin(write=True) as writing:
        for number, key in enumerate([b"ffee", b"00ab", b"a1\xff"]):
            picture = io.BytesIO()
            Image.fromarray(lopsided(number).astype(np.uint8)).save(picture, "webp", lossless=True)
            writing.put(key, picture.getvalue())
    return tmp_path / "bedroom_lmdb"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_lmdb(lsun, num_workers):
    assert read(lsun, num_workers=num_workers)[0] == [1, 2, 0] == read(lsun / "data.mdb")[0]
    with pytest.raises(ValueError, match=r"no class labels in .*bedroom_lmdb"):
        grey(lsun, 1, class_cond=True)


def test_one_lmdb_is_read_by_two_streams_and_their_workers(lsun):
    first, second = grey(lsun, 1, deterministic=True), grey(lsun, 1, deterministic=True)
    assert [numbers(next(stream)[0]) for stream in (first, second, first)] == [[1], [1], [2]]
    child = multiprocessing.get_context("fork").Process(target=lambda: os._exit(len(archives._bases)))
    child.start()
    child.join()
    assert child.exitcode == 0  # it inherits none
    assert read(lsun, num_workers=1)[0] == [1, 2, 0]
    assert numbers(next(second)[0]) == [2]


def test_lmdb_errors(lsun, tmp_path, monkeypatch):
    lmdb = pytest.importorskip("lmdb")
    whole = (lsun / "data.mdb").read_bytes()
    for cut in (100, 9000):
        (lsun / "data.mdb").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"cannot read .* as an LMDB|data.mdb is not whole: 9000 of"):
            grey(lsun, 1)
    (lsun / "data.mdb").write_bytes(b"hello" * 2000)
    with pytest.raises(ValueError, match=r"cannot read .*bedroom_lmdb as an LMDB"):
        grey(lsun, 1)
    lmdb.open(str(tmp_path / "empty"), map_size=2**20).close()
    with pytest.raises(ValueError, match="the LMDB is empty"):
        grey(tmp_path / "empty", 1)
    monkeypatch.setitem(__import__("sys").modules, "lmdb", None)
    with pytest.raises(ImportError, match="pip install lmdb"):
        grey(tmp_path / "empty", 1)
