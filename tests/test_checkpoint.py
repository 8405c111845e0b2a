"""Checkpoint files: names, writes that fail, files that are no checkpoints, and config.json."""

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import types
import zipfile

import numpy as np
import pytest
import torch

from guided_diffusion import checkpoint


def files_in(folder):
    return sorted(os.listdir(folder))


# ------------------------------------------------------------------------------------------------------------- names


def test_names():
    assert checkpoint.model_name(10000) == "model010000.pt"
    assert checkpoint.model_name(1234567) == "model1234567.pt"
    assert checkpoint.ema_name(0.9999, 10000) == "ema_0.9999_010000.pt"
    assert checkpoint.ema_name(0.0, 5) == "ema_0.0_000005.pt"  # the original's would be that of the model
    assert checkpoint.opt_name(0) == "opt000000.pt"


@pytest.mark.parametrize(
    "name, step",
    [
        ("model010000.pt", 10000),
        ("/runs/model_1/model000020.pt", 20),
        ("gs://bucket/model1234567.pt", 1234567),
        ("model000000.pt", 0),
        ("ema_0.9999_010000.pt", 0),
        ("models/64x64_diffusion.pt", 0),
        ("model_best.pt", 0),
    ],
)
def test_step_of_a_file_name(name, step):
    assert checkpoint.parse_resume_step_from_filename(name) == step


def test_latest(tmp_path):
    assert checkpoint.latest(tmp_path / "nowhere") is None
    assert checkpoint.latest(tmp_path) is None
    for name in ("model000900.pt", "model1000000.pt", "model999999.pt", "opt2000000.pt", "ema_0.9_2000000.pt",
                 "model3000000.pt.123.tmp", "model_best.pt"):
        (tmp_path / name).touch()
    assert checkpoint.latest(tmp_path) == str(tmp_path / "model1000000.pt")


# ------------------------------------------------------------------------------------------------- writing and reading


def test_what_is_saved_is_loaded(tmp_path):
    state = {"a": torch.arange(3.0), "b": torch.nn.Parameter(torch.ones(2)), "step": 7, "rates": [0.9, 0.99]}
    checkpoint.save(state, tmp_path / "model000007.pt")
    assert files_in(tmp_path) == ["model000007.pt"]
    loaded = checkpoint.load(tmp_path / "model000007.pt")
    assert torch.equal(loaded["a"], state["a"]) and torch.equal(loaded["b"], state["b"])
    assert (loaded["step"], loaded["rates"]) == (7, [0.9, 0.99])
    on_meta = checkpoint.load(str(tmp_path / "model000007.pt"), map_location="meta")
    assert on_meta["a"].device.type == "meta"


def test_files_can_be_read_by_the_group(tmp_path):
    """As any new file: a temporary file made for one user alone would hide the checkpoint from others."""
    checkpoint.save({}, tmp_path / "a.pt")
    (tmp_path / "b").touch()
    assert (tmp_path / "a.pt").stat().st_mode == (tmp_path / "b").stat().st_mode


@pytest.mark.parametrize(
    "failure, raised", [(OSError(28, "No space left on device"), OSError), (RuntimeError("unexpected pos 64"), OSError),
                        (KeyboardInterrupt(), KeyboardInterrupt)]
)
def test_a_write_that_fails_leaves_the_earlier_file_and_nothing_else(tmp_path, monkeypatch, failure, raised):
    path = tmp_path / "model000001.pt"
    checkpoint.save({"a": torch.zeros(2)}, path)

    def fail_half_way(obj, file):
        file.write(b"half")
        raise failure

    monkeypatch.setattr(torch, "save", fail_half_way)
    with pytest.raises(raised) as error:
        checkpoint.save({"a": torch.ones(2)}, path)
    monkeypatch.undo()
    if raised is OSError:
        reason = "No space left on device" if isinstance(failure, OSError) else "unexpected pos 64"
        assert str(error.value) == f"cannot write {path}: {reason}"
    assert files_in(tmp_path) == ["model000001.pt"]
    assert torch.equal(checkpoint.load(path)["a"], torch.zeros(2))


def test_a_disk_that_fills_up(tmp_path):
    """The same with the system refusing the bytes, by a limit on the size of files."""
    checkpoint.save({"a": torch.zeros(2)}, tmp_path / "m.pt")
    code = (
        "import resource, sys, torch; from guided_diffusion import checkpoint\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: checkpoint.save({'a': torch.zeros(10**6)}, sys.argv[1])\n"
        "except OSError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m.pt")], capture_output=True, text=True)
    assert run.stdout.startswith(f"cannot write {tmp_path / 'm.pt'}: "), run.stderr
    assert files_in(tmp_path) == ["m.pt"]
    assert len(checkpoint.load(tmp_path / "m.pt")["a"]) == 2


def test_folders_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write to the folder .*sub \(Not a directory\): choose another"):
        checkpoint.check_writable(tmp_path / "file" / "sub")
    with pytest.raises(OSError, match=r"cannot write .*m\.pt: No such file or directory"):
        checkpoint.save({}, tmp_path / "missing" / "m.pt")
    checkpoint.check_writable(tmp_path / "new" / "sub")
    assert files_in(tmp_path / "new" / "sub") == []


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("form", ["zip", "old", "pickle2", "pickle4"])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, form):
    path, target = tmp_path / "model000001.pt", tmp_path / "executed"
    payload = {"weight": torch.zeros(2), "x": Malicious(target)}
    if form.startswith("pickle"):
        path.write_bytes(pickle.dumps({"x": payload["x"]}, protocol=int(form[-1])))
    else:
        torch.save(payload, path, _use_new_zipfile_serialization=form == "zip")
    # Protocol 4 is not torch's, so that such a file is not even taken for a checkpoint.
    refusal = r"refused .*model000001\.pt: it asks for \w+\.mkdir, .* run code; nothing in it was executed$"
    with pytest.raises(ValueError, match="is not a checkpoint" if form == "pickle4" else refusal):
        checkpoint.load(path)
    assert not target.exists()
    if form.startswith("pickle"):
        pickle.loads(path.read_bytes())
        assert target.exists()  # so the file was dangerous


def test_whole_modules_are_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "m.pt")
    with pytest.raises(ValueError, match=r"refused .*m\.pt: it asks for torch\.nn\.modules\.linear\.Linear"):
        checkpoint.load(tmp_path / "m.pt")


def broken_files():
    whole = io.BytesIO()
    torch.save({"a": torch.randn(1000)}, whole)
    old = io.BytesIO()
    torch.save({"a": torch.randn(1000)}, old, _use_new_zipfile_serialization=False)
    other_zip, images = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(other_zip, "w") as file:
        file.writestr("notes.txt", "hello")
    np.savez(images, arr_0=np.zeros(3))
    return {
        "empty": b"",
        "text": b"hello world\n" * 20,
        "page": b"<!DOCTYPE html><html>",
        "truncated": whole.getvalue()[:2000],
        "truncated_old": old.getvalue()[:2000],
        "other_zip": other_zip.getvalue(),
        "images": images.getvalue(),
        "noise": np.random.RandomState(0).bytes(500),
    }


@pytest.mark.parametrize("name, content", broken_files().items())
def test_what_is_not_a_checkpoint(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} is not a checkpoint, or an incomplete one \(.+\)$") as error:
        checkpoint.load(path)
    assert "\n" not in str(error.value)


def test_missing_files(tmp_path):
    (tmp_path / "model000010.pt").touch()
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*model00010\.pt; did you mean model000010\.pt\?"):
        checkpoint.load(tmp_path / "model00010.pt")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*q\.pt$"):
        checkpoint.load(tmp_path / "elsewhere" / "q.pt")
    with pytest.raises(ValueError, match=r"is a folder: give the checkpoint in it, .*model000010\.pt"):
        checkpoint.load(tmp_path)
    with pytest.raises(ValueError, match="no checkpoint given: --model_path"):
        checkpoint.load("")


def test_a_disk_that_cannot_be_read_is_no_broken_file(tmp_path, monkeypatch):
    def fail(file, **kwargs):
        raise OSError(5, "Input/output error")

    checkpoint.save({}, tmp_path / "m.pt")
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(OSError, match="Input/output error"):
        checkpoint.load(tmp_path / "m.pt")


def test_paths_elsewhere_go_through_blobfile(monkeypatch):
    store = {}

    class BlobFile(io.BytesIO):
        def __init__(self, path, mode):
            super().__init__(store[path] if mode == "rb" else b"")
            self.target = path if mode == "wb" else None

        def close(self):
            if self.target and not self.closed:
                store[self.target] = self.getvalue()
            super().close()

    blobs = types.SimpleNamespace(
        BlobFile=BlobFile,
        exists=store.__contains__,
        isdir=lambda folder: True,
        listdir=lambda folder: [path.rsplit("/", 1)[1] for path in store],
    )
    monkeypatch.setitem(sys.modules, "blobfile", blobs)
    checkpoint.check_writable("gs://bucket/run")
    checkpoint.save({"a": torch.ones(2)}, "gs://bucket/run/model000005.pt")
    checkpoint.write_config("gs://bucket/run", "diffusion", {"image_size": 8})
    assert sorted(store) == ["gs://bucket/run/config.json", "gs://bucket/run/model000005.pt"]
    assert checkpoint.latest("gs://bucket/run") == "gs://bucket/run/model000005.pt"
    assert torch.equal(checkpoint.load("gs://bucket/run/model000005.pt")["a"], torch.ones(2))
    assert checkpoint.read_config("gs://bucket/run/model000005.pt")["flags"] == {"image_size": 8}
    checkpoint.save_safetensors({"a": torch.ones(2)}, "gs://bucket/run/m.safetensors", {"format": 1, "kind": "x"})
    assert torch.equal(checkpoint.load("gs://bucket/run/m.safetensors")["a"], torch.ones(2))
    with pytest.raises(ValueError, match=r"gs://bucket/run/m.safetensors lacks kind or flags"):
        checkpoint.read_config("gs://bucket/run/m.safetensors")
    with pytest.raises(FileNotFoundError, match=r"gs://bucket/run/model00005\.pt; did you mean model000005\.pt"):
        checkpoint.load("gs://bucket/run/model00005.pt")

    def fail(obj, file):
        raise OSError("no")

    monkeypatch.setattr(torch, "save", fail)
    before = dict(store)
    with pytest.raises(OSError, match="no"):
        checkpoint.save({}, "gs://bucket/run/model000005.pt")
    assert store == before


def test_local_paths_do_without_blobfile(tmp_path):
    code = (
        "import sys; sys.modules['blobfile'] = None; from guided_diffusion import checkpoint\n"
        "checkpoint.save({'a': 1}, sys.argv[1]); print(checkpoint.load(sys.argv[1]))"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m.pt")], capture_output=True, text=True)
    assert run.stdout == "{'a': 1}\n", run.stderr


# --------------------------------------------------------------------------------------------------------- config.json


def test_config_beside_a_checkpoint(tmp_path):
    assert checkpoint.read_config(tmp_path / "model000001.pt") is None
    flags = {"image_size": 8, "class_cond": True, "dropout": 0.1, "channel_mult": "0.5,1"}
    checkpoint.write_config(tmp_path, "diffusion", flags, class_names=["cat", "dog"], data_dir="pets")
    assert files_in(tmp_path) == ["config.json"]
    content = {"format": 1, "kind": "diffusion", "flags": flags, "class_names": ["cat", "dog"], "data_dir": "pets"}
    assert checkpoint.read_config(tmp_path / "ema_0.9999_000001.pt") == content
    text = (tmp_path / "config.json").read_text()
    assert text == json.dumps(content, indent=2, sort_keys=True) + "\n"
    assert '\n    "channel_mult": "0.5,1",\n    "class_cond": true,\n' in text


def test_config_of_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint.write_config("", "classifier", {})
    assert checkpoint.read_config("model000001.pt")["kind"] == "classifier"


def test_a_folder_keeps_one_kind(tmp_path):
    checkpoint.write_config(tmp_path, "diffusion", {})
    checkpoint.write_config(tmp_path, "diffusion", {"image_size": 8})
    with pytest.raises(ValueError, match="holds checkpoints of kind diffusion: choose another --log_dir"):
        checkpoint.write_config(tmp_path, "classifier", {})
    assert checkpoint.read_config(tmp_path / "m.pt")["flags"] == {"image_size": 8}


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", r"config\.json is not valid json .*line 1.*delete it and give the flags"),
        (b"\xff\xfe\x00", r"config\.json is not valid json"),
        ("[1]", r"config\.json lacks kind or flags"),
        ('{"format": 1, "kind": "diffusion"}', r"config\.json lacks kind or flags"),
        ('{"format": 1, "flags": {}}', r"config\.json lacks kind or flags"),
        ('{"format": 2, "kind": "diffusion", "flags": {}}', r"config\.json has format 2, but only format 1"),
    ],
)
def test_config_that_cannot_be_read(tmp_path, text, message):
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        checkpoint.read_config(tmp_path / "model000001.pt")


def test_a_tar_is_refused_without_the_advice_to_run_it(tmp_path):
    with tarfile.open(tmp_path / "x.pt", "w") as archive:
        archive.add(__file__, "a.py")
    with pytest.raises(ValueError, match=r"x.pt is not a checkpoint, or an incomplete one \(a tar") as error:
        checkpoint.load(tmp_path / "x.pt")
    assert "arbitrary" not in str(error.value)
