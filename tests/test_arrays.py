"""Numpy's files from strangers: what is read, and the one line for what cannot be."""

import io
import pickle
import zipfile

import numpy as np
import pytest

from guided_diffusion import arrays


def packed(**given):
    file = io.BytesIO()
    np.savez_compressed(file, **given)
    return file.getvalue()


def test_only_what_is_named_is_read(tmp_path):
    path = tmp_path / "a.npz"
    path.write_bytes(packed(a=np.arange(3), b=np.array(["x"]), c=np.array([{}])))  # c could not be read
    found = arrays.read_npz(path, ("b", "a", "d"))
    assert found.keys() == {"a", "b"} and found["a"].tolist() == [0, 1, 2] and found["b"].tolist() == ["x"]
    np.save(tmp_path / "a.npy", np.eye(2))
    assert arrays.read_npy(tmp_path / "a.npy").tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize("read", [lambda path: arrays.read_npz(path, ("a",)), arrays.read_npy])
def test_damaged_files_are_one_line(tmp_path, read):
    """Every place to cut at, and every byte to change, of an npz and an npy."""
    path, single = tmp_path / "a", io.BytesIO()
    np.save(single, np.arange(9.0))
    rng = np.random.default_rng(0)
    refused = 0
    for whole in (packed(a=np.arange(30) % 7), single.getvalue()):
        cut = [whole[:size] for size in range(len(whole))]
        spoilt = [whole[:k] + bytes([rng.integers(256)]) + whole[k + 1 :] for k in range(len(whole))]
        for content in cut + spoilt:
            path.write_bytes(content)
            try:
                read(path)  # a changed number may pass
            except ValueError as error:
                refused += 1
                assert str(error).startswith(f"cannot read {path} as an np") and "pickle" not in str(error)
    assert refused > 300


@pytest.mark.parametrize("content, message", [
    (packed(a=np.array([{}])), "as an npz of plain arrays: it is none, or holds objects instead of numbers or texts"),
    (pickle.dumps([1]), "it is none, or holds objects"),
    (b"words", "it is none, or holds objects"),
])  # fmt: skip
def test_objects_are_refused_and_nobody_is_told_to_trust_them(tmp_path, content, message):
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        arrays.read_npz(path, ("a",))


def test_the_other_kind_of_file_and_no_file(tmp_path):
    (tmp_path / "a.npz").write_bytes(packed(a=np.arange(3)))
    np.save(tmp_path / "a.npy", np.eye(2))
    with pytest.raises(ValueError, match=r"a\.npz as an npy file of a plain array: it is an npz"):
        arrays.read_npy(tmp_path / "a.npz")
    with pytest.raises(ValueError, match=r"a\.npy as an npz of plain arrays: it is a single array"):
        arrays.read_npz(tmp_path / "a.npy", ("a",))
    with pytest.raises(FileNotFoundError):
        arrays.read_npy(tmp_path / "none.npy")
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.writestr("a.npy", "words")
    with pytest.raises(ValueError, match=r"b\.npz as an npz of plain arrays: a is no array"):
        arrays.read_npz(tmp_path / "b.npz", ("a",))
