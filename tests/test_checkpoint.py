"""Checkpoint files: names, writes that fail, files that are no checkpoints, config.json, and flags read off tensors."""

import io
import json
import os
import pickle
import random
import re
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from guided_diffusion import checkpoint, config, script_util

ZOO = json.loads((Path(__file__).parent / "golden" / "model_zoo.json").read_text())
KINDS = {"model": "diffusion", "sr": "super_res", "cls": "classifier"}
DEFAULTS = {
    "diffusion": script_util.model_and_diffusion_defaults(),
    "super_res": script_util.sr_model_and_diffusion_defaults(),
    "classifier": script_util.classifier_and_diffusion_defaults(),
}
BUILDERS = {
    "diffusion": script_util.create_model_and_diffusion,
    "super_res": script_util.sr_create_model_and_diffusion,
    "classifier": script_util.create_classifier_and_diffusion,
}


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


# --------------------------------------------------------------------------------------------- flags read off tensors


def weights_of(kind, flags):
    with torch.device("meta"):
        return BUILDERS[kind](**flags)[0].state_dict()


def shapes(weights):
    return [(name, tuple(tensor.shape)) for name, tensor in weights.items()]


def assert_inferred_is(inferred, kind, flags):
    """Everything that the tensors determine is there, and is what built them."""
    prefix = "classifier_" if kind == "classifier" else ""
    size = flags["large_size"] if kind == "super_res" else flags["image_size"]
    mult = config.levels(flags[f"{prefix}channel_mult"], size, kind == "super_res")
    wanted = {float(size // int(side)) for side in flags[f"{prefix}attention_resolutions"].split(",") if side}
    factors = tuple(2**level for level in range(len(mult)) if 2**level in wanted)
    expected = {
        "kind": kind,
        "image_channels": flags["image_channels"],
        "attention_downsampling": factors,
        f"{prefix}channel_mult": ",".join(map(str, mult)),
        f"{prefix}attention_resolutions": ",".join(str(size // factor) for factor in factors),
        f"{prefix}use_scale_shift_norm": flags[f"{prefix}use_scale_shift_norm"],
    }
    if len(mult) > 1:
        expected[f"{prefix}resblock_updown"] = flags[f"{prefix}resblock_updown"]
    if kind == "classifier":
        names = ["num_classes", "classifier_width", "classifier_depth", "classifier_pool"]
        names += ["image_size"] if flags["classifier_pool"] == "attention" else []
    else:
        names = ["num_channels", "num_res_blocks", "learn_sigma", "class_cond"]
        names += ["num_classes"] if flags["class_cond"] else []
        names += ["network", "vector_channels"] if kind == "diffusion" else []
    assert inferred == expected | {name: flags[name] for name in names}


@pytest.mark.parametrize("name", ZOO)
def test_published_networks_tell_their_flags(name):
    kind = KINDS[ZOO[name]["kind"]]
    flags = DEFAULTS[kind] | ZOO[name]["flags"]
    weights = {key: torch.empty(shape, device="meta") for key, shape in ZOO[name]["state_dict"].items()}
    size = flags["large_size"] if kind == "super_res" else flags["image_size"]
    inferred = checkpoint.infer_flags(weights, image_size=size)
    assert_inferred_is(inferred, kind, flags)
    assert checkpoint.misfits(flags, inferred) == {}
    without_size = checkpoint.infer_flags(weights)
    assert without_size == {key: inferred[key] for key in inferred if key in without_size}
    assert set(inferred) - set(without_size) <= {"attention_resolutions"}


def random_flags(seed):
    """A small network of any kind and its flags; two levels or more, widths that grow, so that all is determined."""
    draw = random.Random(seed)
    kind = draw.choice(list(BUILDERS))
    levels, width = draw.choice([2, 3]), draw.choice([32, 64, 96])
    prefix = "classifier_" if kind == "classifier" else ""
    size = 8 * 2 ** (levels - 1) * draw.choice([1, 3])
    mult = [draw.choice([1, 2, 3] + [0.5] * (width == 64)) for _ in range(levels)]
    if kind == "classifier" and len(set(mult)) == 1:
        mult[-1] += 1
    flags = {
        "image_channels": draw.choice([1, 3, 4]),
        "num_classes": draw.choice([2, 10]),
        "large_size" if kind == "super_res" else "image_size": size,
        f"{prefix}channel_mult": ",".join(map(str, mult)),
        f"{prefix}attention_resolutions": ",".join(
            str(size // 2**level) for level in range(levels) if draw.random() < 0.5
        ),
        f"{prefix}use_scale_shift_norm": draw.random() < 0.5,
        f"{prefix}resblock_updown": draw.random() < 0.5,
    }
    if kind == "classifier":
        flags |= {
            "classifier_width": width,
            "classifier_depth": draw.choice([1, 2, 3]),
            "classifier_pool": draw.choice(["adaptive", "attention", "spatial", "spatial_v2"]),
            "classifier_num_head_channels": 16,
        }
    else:
        flags |= {"num_channels": width, "num_res_blocks": draw.choice([1, 2, 3]), "num_heads": draw.choice([1, 2])}
        flags |= {name: draw.random() < 0.5 for name in ("learn_sigma", "class_cond")}
    return kind, DEFAULTS[kind] | flags


@pytest.mark.parametrize("seed", range(16))
def test_small_networks_tell_their_flags_and_are_rebuilt_from_them(seed):
    kind, flags = random_flags(seed)
    weights = weights_of(kind, flags)
    size = flags.get("large_size", flags.get("image_size"))
    inferred = checkpoint.infer_flags(weights, image_size=size, image_channels=flags["image_channels"])
    assert_inferred_is(inferred, kind, flags)
    told = {name: value for name, value in inferred.items() if name in flags}
    heads = {"num_heads": 1} if kind != "classifier" else {"classifier_num_head_channels": 16}
    sizes = {"large_size" if kind == "super_res" else "image_size": size}
    again = weights_of(kind, DEFAULTS[kind] | sizes | heads | told)
    assert shapes(again) == shapes(weights)


def test_levels_that_nothing_marks_are_left_open():
    """Equal widths, no attention, resampling in residual blocks: 3 levels of 1 block look like 2 of 2."""
    flags = DEFAULTS["classifier"] | {
        "image_size": 8, "classifier_width": 32, "classifier_attention_resolutions": "", "classifier_depth": 1,
        "classifier_channel_mult": "1,1,1", "classifier_num_head_channels": 16,
    }
    inferred = checkpoint.infer_flags(weights_of("classifier", flags))
    assert "classifier_depth" not in inferred and "image_size" not in inferred
    assert inferred["classifier_width"] == 32
    assert checkpoint.misfits(flags, inferred) == {}
    # The attention pool knows its side, 2: with the image's, that leaves one way.
    assert_inferred_is(checkpoint.infer_flags(weights_of("classifier", flags), image_size=8), "classifier", flags)
    other = flags | {"image_size": 4, "classifier_depth": 2, "classifier_channel_mult": "1,1"}
    assert_inferred_is(checkpoint.infer_flags(weights_of("classifier", other), image_size=4), "classifier", other)


def test_levels_that_only_widths_mark():
    flags = DEFAULTS["classifier"] | {
        "image_size": 8, "classifier_width": 32, "classifier_attention_resolutions": "",
        "classifier_channel_mult": "1,2,3", "classifier_num_head_channels": 16, "classifier_pool": "adaptive",
    }
    assert_inferred_is(checkpoint.infer_flags(weights_of("classifier", flags), image_size=8), "classifier", flags)


def test_a_single_level_does_not_tell_how_it_would_resample():
    flags = DEFAULTS["diffusion"] | {"image_size": 4, "num_channels": 32, "attention_resolutions": "4"}
    inferred = checkpoint.infer_flags(weights_of("diffusion", flags), image_size=4)
    assert_inferred_is(inferred, "diffusion", flags)
    assert "resblock_updown" not in inferred


def test_two_kinds_of_network_of_equal_shapes():
    plain = DEFAULTS["diffusion"] | {"image_size": 8, "num_channels": 32, "image_channels": 6}
    enlarging = DEFAULTS["super_res"] | {
        "large_size": 8, "channel_mult": "1,2", "num_channels": 32, "image_channels": 3, "learn_sigma": True,
    }
    weights = weights_of("diffusion", plain)
    assert shapes(weights) == shapes(weights_of("super_res", enlarging))
    assert checkpoint.infer_flags(weights, image_channels=6)["kind"] == "diffusion"
    assert checkpoint.infer_flags(weights, image_channels=3)["kind"] == "super_res"
    assert checkpoint.infer_flags(weights)["kind"] == "super_res"


def test_factors_that_are_no_simple_fractions():
    flags = DEFAULTS["diffusion"] | {"image_size": 8, "num_channels": 96, "channel_mult": "0.33334,1"}
    inferred = checkpoint.infer_flags(weights_of("diffusion", flags))
    first, second = config.parse_channel_mult(inferred["channel_mult"])
    assert (int(first * 96), second) == (32, 1)
    assert checkpoint.misfits(flags, inferred) == {}
    assert all(
        int(float(checkpoint._factor(width, base)) * base) == width
        for base in range(1, 400)
        for width in range(32, 1025, 32)
    )


def test_misfits_compares_what_texts_mean():
    flags = DEFAULTS["diffusion"] | {"image_size": 32, "num_channels": 32}
    weights = weights_of("diffusion", flags)
    inferred = checkpoint.infer_flags(weights, image_size=32)
    for same in ({"channel_mult": "1,2.0,2,2"}, {"attention_resolutions": "8,16,100,7"}):
        assert checkpoint.misfits(flags | same, inferred) == {}
    for other, truth in [
        ({"channel_mult": "1,2,2"}, {"channel_mult": "1,2,2,2"}),
        ({"attention_resolutions": "16"}, {"attention_resolutions": "16,8"}),
        ({"num_channels": 64}, {"num_channels": 32}),
        ({"num_heads": 2, "dropout": 0.5, "use_new_attention_order": True, "noise_schedule": "cosine"}, {}),
    ]:
        assert checkpoint.misfits(flags | other, inferred) == truth
    # A size without default factors: what the network is told must be written out.
    inferred = checkpoint.infer_flags(weights, image_size=96)
    truth = {"channel_mult": "1,2,2,2", "attention_resolutions": "48,24"}
    assert checkpoint.misfits(flags | {"image_size": 96}, inferred) == truth
    assert checkpoint.misfits(flags | {"image_size": 96} | truth, inferred) == {}


@pytest.mark.parametrize(
    "content, message",
    [
        ({"state": {}, "param_groups": []}, "x.pt holds the state of an optimizer: give the modelNNNNNN.pt"),
        ({"epoch": 1, "model": {}}, "no weights of a diffusion model or classifier, but a dict of epoch, model"),
        ([1, 2], "x.pt holds no weights of a diffusion model or classifier, but a list"),
        ({"time_embed.0.weight": 3}, "x.pt holds no weights"),
        ({"time_embed.0.weight": torch.zeros(4, 1)}, "x.pt holds no whole network (missing or misshapen: 'input_bl"),
        ({"time_embed.0.weight": torch.zeros(4), "input_blocks.0.0.weight": torch.zeros(4, 3, 3, 3),
          "out.3.weight": torch.zeros(2, 4)}, "x.pt holds no whole network (missing or misshapen: tuple index"),
    ],
)
def test_what_holds_no_network(content, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        checkpoint.infer_flags(content, path="x.pt")


# --------------------------------------------------------------------------------------------------------- load_weights


def small(**flags):
    flags = DEFAULTS["diffusion"] | {"image_size": 8, "num_channels": 32, "num_heads": 1} | flags
    return script_util.create_model_and_diffusion(**flags)[0], flags


def test_weights_that_fit_are_loaded():
    (source, flags), (target, _) = small(), small()
    checkpoint.load_weights(target, source.state_dict(), path="x.pt", flags=flags)
    assert all(torch.equal(a, b) for a, b in zip(target.state_dict().values(), source.state_dict().values()))


def test_weights_that_do_not_fit_tell_what_would():
    (source, _), (target, flags) = small(num_channels=64, class_cond=True, num_classes=10), small()
    with pytest.raises(ValueError) as error:
        checkpoint.load_weights(target, source.state_dict(), path="models/x.pt", flags=flags)
    count = len(target.state_dict())
    differing = sum(v.shape != source.state_dict()[k].shape for k, v in target.state_dict().items())
    assert 0 < differing < count
    assert str(error.value) == (
        "checkpoint models/x.pt does not fit: 1 keys too many (first: label_emb.weight), "
        f"{differing} shapes differ (time_embed.0.weight: file [256, 64], network [128, 32]); it is a diffusion"
        " network; flags that would fit at --image_size 8: --class_cond True --num_classes 10 --num_channels 64,"
        " with the heads and the process that it was trained with"
    )


def test_weights_of_unknown_flags_tell_all_that_is_known():
    (source, _), (target, _) = small(num_channels=64), small()
    with pytest.raises(ValueError, match=r"; flags that would fit: --image_channels 3 .*--num_channels 64"):
        checkpoint.load_weights(target, source.state_dict(), path="x.pt", flags={})


def test_weights_that_lack_keys():
    target, flags = small()
    weights = {key: value for key, value in target.state_dict().items() if not key.startswith("middle_block.1")}
    with pytest.raises(ValueError, match=r"6 keys missing \(first: middle_block\.1\.norm\.weight\); it is a diffusion"):
        checkpoint.load_weights(target, weights, path="x.pt", flags=flags)
    with pytest.raises(ValueError, match=r"2 keys missing \(first: out\.2\.weight\)$"):
        weights = {key: value for key, value in target.state_dict().items() if not key.startswith("out.2")}
        checkpoint.load_weights(target, weights, path="x.pt", flags=flags)


def test_weights_of_another_kind():
    target, flags = small()
    weights = weights_of("classifier", DEFAULTS["classifier"] | {"image_size": 8, "classifier_width": 32,
                                                                  "classifier_num_head_channels": 16})
    with pytest.raises(ValueError, match=r"keys missing .*; it is a classifier network"):
        checkpoint.load_weights(target, weights, path="x.pt", flags=flags)


FILM = {
    "network": "film", "image_size": 8, "num_channels": 6, "channel_mult": "1,0.5,2", "image_channels": 1,
    "learn_sigma": True, "vector_channels": 5,
}  # fmt: skip


@pytest.mark.parametrize("vector_channels", [0, 5])
def test_a_film_network_tells_its_flags(vector_channels):
    flags = DEFAULTS["diffusion"] | FILM | {"vector_channels": vector_channels}
    inferred = checkpoint.infer_flags(weights_of("diffusion", flags))
    told = {name: FILM[name] for name in FILM if name != "image_size"} | {"vector_channels": vector_channels}
    assert inferred == told | {"kind": "diffusion", "class_cond": False, "attention_downsampling": ()}
    assert checkpoint.misfits(flags, inferred) == {}
    assert checkpoint.misfits(flags | {"num_channels": 7, "learn_sigma": False}, inferred) == {
        "num_channels": 6, "learn_sigma": True,
    }  # fmt: skip
    default = DEFAULTS["diffusion"] | FILM | {"channel_mult": "", "image_size": 16}
    inferred = checkpoint.infer_flags(weights_of("diffusion", default))
    assert inferred["channel_mult"] == "1,2,4,8" and checkpoint.misfits(default, inferred) == {}


def test_networks_of_the_two_kinds_are_told_apart():
    film, adm = DEFAULTS["diffusion"] | FILM, DEFAULTS["diffusion"] | {"num_channels": 32, "image_size": 8}
    wrong = checkpoint.misfits(adm, checkpoint.infer_flags(weights_of("diffusion", film)))
    assert wrong["network"] == "film" and wrong["num_channels"] == 6
    adm |= {"vector_channels": 7, "image_channels": 1}
    inferred = checkpoint.infer_flags(weights_of("diffusion", adm))
    assert (inferred["network"], inferred["vector_channels"]) == ("adm", 7) and checkpoint.misfits(adm, inferred) == {}
    assert checkpoint.misfits(adm | {"vector_channels": 0}, inferred) == {"vector_channels": 7}
    with pytest.raises(ValueError, match=r"fit: \d+ keys missing .*flags that would fit at --image_size 8: --network"):
        network = script_util.create_model_and_diffusion(**adm)[0]
        checkpoint.load_weights(network, weights_of("diffusion", film), path="a.pt", flags=adm)
