"""Checkpoints in other forms: safetensors against its own library, folders of diffusers against its own networks."""

import json
import shutil

import numpy as np
import pytest
import torch

from guided_diffusion import (
    checkpoint,
    config,
    convert,
    diffusers_format,
    identify,
    presets,
    recognition,
    script_util,
    tensor_files,
)

safetensors = pytest.importorskip("safetensors.torch")
diffusers = pytest.importorskip("diffusers")

SMALL = config.defaults(*identify.GROUPS["diffusion"]) | {
    "image_size": 8, "image_channels": 1, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2",
    "attention_resolutions": "4", "num_head_channels": 16, "learn_sigma": True, "noise_schedule": "cosine",
}  # fmt: skip


def saved(folder, **changes):
    """(path of a small diffusion model of ours with random weights and its config.json, its network)."""
    flags = SMALL | changes
    network = script_util.create_model_and_diffusion(**flags)[0].eval()
    generator = torch.Generator().manual_seed(1)
    state = {name: 0.2 * torch.randn(value.shape, generator=generator) for name, value in network.state_dict().items()}
    network.load_state_dict(state)
    path = folder / "model000003.pt"
    checkpoint.save(state, path)
    checkpoint.write_config(folder, "diffusion", flags, class_names=["a", "b"] if flags["class_cond"] else None)
    return path, network


def equal(a, b):
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------------------------------- safetensors

TENSORS = {
    "b": torch.arange(6.0).reshape(2, 3),
    "a": torch.tensor(2.5, dtype=torch.float64),
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "none": torch.zeros(0, 3),
    "flags": torch.tensor([True, False, True]),
    "strided": torch.arange(6).reshape(2, 3).T,
}


def same(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def test_its_own_library_reads_what_we_write(tmp_path):
    path = tmp_path / "a.safetensors"
    checkpoint.save_safetensors(TENSORS, path, {"kind": "x"})
    assert same(safetensors.load_file(path), TENSORS)
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "guided_diffusion": '{"kind": "x"}'}
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    places = json.loads(content[8 : 8 + length])
    for name, tensor in TENSORS.items():  # no number lies across the places that its type wants
        assert (8 + length + places[name]["data_offsets"][0]) % tensor.element_size() == 0


def test_we_read_what_its_own_library_writes(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.save_file({k: v.contiguous() for k, v in TENSORS.items()}, path, {"note": "é"})
    assert same(checkpoint.load(path), TENSORS)
    on_meta = checkpoint.load(path, "meta")
    assert {k: (v.shape, v.dtype) for k, v in on_meta.items()} == {k: (v.shape, v.dtype) for k, v in TENSORS.items()}
    with open(path, "rb") as file:
        assert tensor_files.read_texts(file, path) == {"note": "é"}
    assert checkpoint.read_config(path) is None


def header(content, data=b""):
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return len(text).to_bytes(8, "little") + text + data


ONE = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "its header cannot be read"),
        (b"\xff" * 8 + b"{}", "its header cannot be read"),
        (header(b"[1]"), "its header cannot be read"),
        (header(ONE)[:-3], "its header cannot be read"),
        (header({"a": {"dtype": "F3", "shape": [], "data_offsets": [0, 4]}}), "its header cannot be read"),
        (header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}), "its header cannot be read"),
        (header({"a": {"dtype": "F32", "shape": [2]}}), "its header cannot be read"),
        (header(ONE | {"__metadata__": {"a": 1}}, bytes(8)), "its metadata are no texts"),
        (header(ONE, bytes(7)), "not whole: it ends within a"),
        (header({"a": ONE["a"] | {"shape": [3]}}, bytes(8)), r"a of shape \[3\] has the bytes 0 to 8"),
        (header({"a": ONE["a"] | {"data_offsets": [8, 16]}}, bytes(16)), r"a of shape \[2\] has the bytes 8 to 16"),
        (header(ONE | {"b": ONE["a"]}, bytes(16)), r"b of shape \[2\] has the bytes 0 to 8"),
    ],
)
def test_files_that_are_no_safetensors(tmp_path, content, message):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        checkpoint.load(path)


def test_a_type_that_the_format_lacks(tmp_path):
    with pytest.raises(ValueError, match=r"a is of torch.complex64"):
        checkpoint.save({"a": torch.zeros(1, dtype=torch.complex64)}, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_safetensors_file_is_a_checkpoint_with_its_config_inside(tmp_path):
    path, network = saved(tmp_path, class_cond=True, num_classes=2)
    target = tmp_path / "there" / "m.safetensors"
    model = convert.convert(path, target)
    assert model.flags == SMALL | {"class_cond": True, "num_classes": 2}
    assert [p.name for p in target.parent.iterdir()] == ["m.safetensors"]
    opened, _, flags = script_util.open_diffusion(target)
    assert flags == model.flags and equal(opened.state_dict(), network.state_dict())
    assert checkpoint.read_config(target)["class_names"] == ["a", "b"]
    back = tmp_path / "back" / "model000003.pt"
    convert.convert(target, back)
    assert equal(checkpoint.load(back), network.state_dict())
    assert checkpoint.read_config(back) == checkpoint.read_config(path)
    with pytest.raises(ValueError, match=r"--image_channels 3 contradicts the weights of .*m.safetensors"):
        script_util.open_diffusion(target, {"image_channels": 3})


# --------------------------------------------------------------------------------------------------------- diffusers

CASES = {
    "heads": {},
    "new order": {"use_new_attention_order": True},
    "one head": {"num_head_channels": -1, "num_heads": 1, "attention_resolutions": "8,4"},
    "four heads": {"num_head_channels": -1, "num_heads": 4},
    "updown": {"resblock_updown": True, "channel_mult": "1,2,2", "attention_resolutions": "8,2", "num_res_blocks": 2},
    "added": {"use_scale_shift_norm": False, "learn_sigma": False, "resblock_updown": True, "image_channels": 3},
    "classes": {"class_cond": True, "num_classes": 10, "class_dropout": 0.1, "channel_mult": "1,3"},
    "no attention": {"attention_resolutions": "", "channel_mult": "1,1,2", "resblock_updown": True},
    "one level": {"channel_mult": "1", "attention_resolutions": "8"},
}
# What the two forms write in other words.
EQUIVALENT = {"use_new_attention_order", "num_heads", "num_head_channels"}


def outputs(ours, theirs, classes=0):
    torch.manual_seed(2)
    x, t = torch.randn(2, ours.in_channels, 8, 8), torch.tensor([3, 700])
    y = torch.tensor([0, classes - 1]) if classes else None
    with torch.no_grad():
        return ours(x, t, y), theirs(x, t, class_labels=y).sample


def assert_same_network(ours, theirs, classes=0):
    mine, other = outputs(ours, theirs, classes)
    assert mine.shape == other.shape and mine.abs().max() > 0.1
    assert (mine - other).abs().max() < 1e-5 * max(1, other.abs().max())


@pytest.mark.parametrize("case", CASES)
def test_diffusers_computes_what_our_network_does_and_back(case, tmp_path):
    flags = SMALL | CASES[case]
    path, network = saved(tmp_path, **CASES[case])
    folder = tmp_path / "folder"
    convert.convert(path, folder)
    theirs = diffusers.UNet2DModel.from_pretrained(folder / "unet").eval()
    with pytest.raises(ValueError, match=r"is a folder of diffusers: make a checkpoint of it by scripts/convert.py"):
        script_util.open_diffusion(folder)
    classes = 11 if flags["class_cond"] else 0
    assert_same_network(network, theirs, classes)
    back = tmp_path / "back" / "m.safetensors"
    found = convert.convert(folder, back).flags
    assert {n: v for n, v in found.items() if n not in EQUIVALENT} == {
        n: v for n, v in flags.items() if n not in EQUIVALENT
    }
    opened, _, _ = script_util.open_diffusion(back)
    assert_same_network(opened, theirs, classes)
    if not flags["use_new_attention_order"]:
        assert equal(opened.state_dict(), network.state_dict())


def their_own(folder, **fields):
    """A network that diffusers made, with random weights, saved by diffusers."""
    small = {"sample_size": 8, "block_out_channels": (32, 64), "attention_head_dim": 8,
             "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
             "layers_per_block": 1}  # fmt: skip
    torch.manual_seed(3)
    network = diffusers.UNet2DModel(**small | fields).eval()
    network.save_pretrained(folder / "unet")
    return network


@pytest.mark.parametrize(
    "fields, flags",
    [
        ({}, {"num_head_channels": 8, "channel_mult": "1,2", "attention_resolutions": "4", "resblock_updown": False}),
        ({"flip_sin_to_cos": False, "out_channels": 6}, {"learn_sigma": True, "use_scale_shift_norm": False}),
        ({"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 32, "num_class_embeds": 5, "in_channels": 1,
          "out_channels": 1, "downsample_type": "resnet", "upsample_type": "resnet",
          "down_block_types": ("AttnDownBlock2D", "ResnetDownsampleBlock2D"),
          "up_block_types": ("ResnetUpsampleBlock2D", "AttnUpBlock2D")},
         {"class_cond": True, "num_classes": 5, "resblock_updown": True, "attention_resolutions": "8"}),
        ({"attention_head_dim": None, "norm_num_groups": 32}, {"num_heads": 1, "num_head_channels": -1}),
    ],
)  # fmt: skip
def test_our_network_computes_what_one_of_diffusers_does(fields, flags, tmp_path):
    theirs = their_own(tmp_path / "theirs", **fields)
    schedule = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="fixed_small")
    schedule.save_pretrained(tmp_path / "theirs" / "scheduler")
    path = tmp_path / "ours" / "model000000.pt"
    convert.convert(tmp_path / "theirs", path)
    ours, diffusion, found = script_util.open_diffusion(path)
    assert {name: found[name] for name in flags} == flags
    assert (found["noise_schedule"], found["sigma_small"]) == ("cosine", not found["learn_sigma"])
    assert np.allclose(diffusion.betas, schedule.betas.double(), rtol=1e-4)
    assert_same_network(ours, theirs, fields.get("num_class_embeds", 0))


@pytest.mark.parametrize(
    "changes, variance",
    [
        ({"noise_schedule": "linear", "diffusion_steps": 50}, "learned_range"),
        ({"noise_schedule": "cosine"}, "learned_range"),
        ({"noise_schedule": "sigmoid+shift2", "learn_sigma": False, "predict": "v"}, "fixed_large"),
        ({"learn_sigma": False, "sigma_small": True, "predict_xstart": True}, "fixed_small"),
    ],
)
def test_the_process_of_diffusers_is_ours(changes, variance, tmp_path):
    path, _ = saved(tmp_path, **changes)
    flags = convert.convert(path, tmp_path / "folder").flags
    scheduler = diffusers.DDPMScheduler.from_pretrained(tmp_path / "folder" / "scheduler")
    diffusion = script_util.open_diffusion(path)[1]
    assert scheduler.config.variance_type == variance and scheduler.config.num_train_timesteps == len(diffusion.betas)
    assert np.allclose(scheduler.betas.double(), diffusion.betas, rtol=1e-4)
    torch.manual_seed(4)
    x, output, t = torch.randn(1, 1, 8, 8), torch.randn(1, 1 + flags["learn_sigma"], 8, 8), len(diffusion.betas) // 2
    ours = diffusion.p_mean_variance(lambda x, t: output, x, torch.tensor([t]))
    theirs = scheduler.step(output, t, x, generator=torch.Generator().manual_seed(5))
    noise = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    expected = ours["mean"] + (0.5 * ours["log_variance"]).exp() * noise
    assert (theirs.pred_original_sample - ours["pred_xstart"]).abs().max() < 1e-3
    assert (theirs.prev_sample - expected).abs().max() < 1e-3
    again = convert.read(tmp_path / "folder", {}).flags
    assert again == flags | ({"predict": "x0", "predict_xstart": False} if flags["predict_xstart"] else {})


def test_an_unconditional_model_is_a_pipeline(tmp_path):
    path, _ = saved(tmp_path, diffusion_steps=50)
    convert.convert(path, tmp_path / "folder")
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "folder")
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 8, 8, 1) and np.isfinite(images).all()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"network": "film"}, "--network film has nothing like it there"),
        ({"vector_channels": 4}, "--vector_channels 4"),
        ({"conv_resample": False}, "--conv_resample False"),
        ({"residual_rescale": True}, "--residual_rescale True"),
        ({"learn_sigma": True, "learned_variance": "free"}, "--learned_variance free"),
        ({"channel_mult": "2,2"}, "--channel_mult 2,2"),
        ({"num_head_channels": -1, "attention_resolutions": "8"}, "4 heads at the widths 32, 64, and there heads have"),
        ({"num_head_channels": -1, "num_heads_upsample": 2}, "--num_heads_upsample 2"),
        ({"predict": "edm"}, r"takes a network that predicts edm \(--predict\)"),
        ({"rescale_timesteps": True, "diffusion_steps": 50}, "--rescale_timesteps True with 50 steps"),
    ],
)
def test_networks_that_diffusers_does_not_have(changes, message, tmp_path):
    path, _ = saved(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        convert.convert(path, tmp_path / "folder")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model000003.pt"]


@pytest.mark.parametrize("name", ["imagenet64", "imagenet256", "imagenet256-uncond"])
def test_the_tensors_of_a_published_model_have_the_names_of_diffusers(name):
    flags = config.defaults(*identify.GROUPS["diffusion"]) | presets.PRESETS[name].flags
    with torch.device("meta"):
        state = script_util.create_model_and_diffusion(**flags)[0].state_dict()
        attention = recognition.infer_flags(state)["attention_downsampling"]
        theirs = diffusers.UNet2DModel.from_config(diffusers_format.unet_config(flags, attention)).state_dict()
    ours = diffusers_format.exported(state, flags, attention)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.parametrize("name, message", [("imagenet128", "4 heads at the widths 512, 768, 1024"),
                                           ("imagenet512", "--channel_mult")])  # fmt: skip
def test_published_models_that_diffusers_does_not_have(name, message):
    flags = config.defaults(*identify.GROUPS["diffusion"]) | presets.PRESETS[name].flags
    with pytest.raises(ValueError, match=message):
        diffusers_format.unet_config(flags, {4, 8, 16})


@pytest.mark.parametrize(
    "field, value",
    [("freq_shift", 1), ("norm_eps", 1e-6), ("downsample_padding", 0), ("norm_num_groups", 16), ("sample_size", None),
     ("act_fn", "gelu"), ("time_embedding_type", "fourier"), ("add_attention", False), ("time_embedding_dim", 64),
     ("attn_norm_num_groups", 8), ("out_channels", 4), ("mid_block_scale_factor", 2), ("layers_per_block", "2"),
     ("down_block_types", ["SkipDownBlock2D", "AttnDownBlock2D"]), ("down_block_types", ["DownBlock2D", "DownBlock2D"]),
     ("block_out_channels", None), ("block_out_channels", [32]), ("_class_name", "UNet2DConditionModel")],
)  # fmt: skip
def test_networks_of_diffusers_that_are_not_ours(field, value, tmp_path):
    unet = json.loads(json.dumps(diffusers_format.unet_config(SMALL, {2})))
    with pytest.raises(ValueError, match=r"is nothing that a network|no whole configuration|describes no UNet2DModel"):
        diffusers_format.flags_of(unet | {field: value}, None, tmp_path)


@pytest.mark.parametrize(
    "field, value",
    [("beta_schedule", "scaled_linear"), ("beta_end", 0.012), ("prediction_type", "flow"), ("variance_type", "learned"),
     ("num_train_timesteps", "many")],
)  # fmt: skip
def test_processes_of_diffusers_that_are_not_ours(field, value):
    unet = json.loads(json.dumps(diffusers_format.unet_config(SMALL, {2})))
    scheduler = diffusers_format.scheduler_config(SMALL | {"noise_schedule": "linear"})
    with pytest.raises(ValueError, match=r"is nothing that a network|no whole configuration"):
        diffusers_format.flags_of(unet, scheduler | {field: value}, "x")


def test_a_folder_without_a_scheduler_is_asked_for_the_process(tmp_path):
    their_own(tmp_path / "theirs")
    with pytest.raises(ValueError, match=r"does not tell --noise_schedule and --diffusion_steps: type them"):
        convert.convert(tmp_path / "theirs", tmp_path / "m.pt")
    model = convert.convert(tmp_path / "theirs" / "unet", tmp_path / "x" / "m.pt",
                            {"noise_schedule": "linear", "diffusion_steps": 100})  # fmt: skip
    assert model.flags["diffusion_steps"] == 100


def test_folders_that_are_none_of_diffusers(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no .*empty/config.json: give a folder of diffusers"):
        convert.convert(tmp_path / "empty", tmp_path / "m.pt")
    their_own(tmp_path / "theirs")
    DDPM = {"noise_schedule": "linear", "diffusion_steps": 100}
    weights = tmp_path / "theirs" / "unet" / diffusers_format.WEIGHTS
    held = safetensors.load_file(weights)
    safetensors.save_file({k: v for k, v in held.items() if "to_q" not in k}, weights)
    with pytest.raises(ValueError, match=r"are not those of its config.json \('.*to_q.weight'\)"):
        convert.convert(tmp_path / "theirs", tmp_path / "m.pt", DDPM)
    safetensors.save_file({k: v for k, v in held.items() if "norm1" not in k}, weights)
    with pytest.raises(ValueError, match=r"does not fit: \d+ keys missing"):
        convert.convert(tmp_path / "theirs", tmp_path / "m.pt", DDPM)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"no diffusion_pytorch_model.safetensors and no diffusion_pytorch_mod"):
        convert.convert(tmp_path / "theirs", tmp_path / "m.pt", DDPM)
    assert not (tmp_path / "m.pt").exists()


def test_targets_are_not_overwritten_and_configs_of_others_not_touched(tmp_path):
    path, _ = saved(tmp_path)
    with pytest.raises(FileExistsError, match="exists: give another name"):
        convert.convert(path, path)
    with pytest.raises(ValueError, match=r"give NAME.pt, NAME.safetensors, or the name of a new folder"):
        convert.convert(path, tmp_path / "m.onnx")
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(path, other / "model000009.pt")
    checkpoint.write_config(other, "diffusion", SMALL | {"dropout": 0.5})
    with pytest.raises(ValueError, match=r"other has a config.json of other checkpoints: choose another folder"):
        convert.convert(path, other / "m.pt")
    assert sorted(p.name for p in other.iterdir()) == ["config.json", "model000009.pt"]


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")

    path, _ = saved(tmp_path)
    monkeypatch.setattr(checkpoint, "save_safetensors", fail)
    with pytest.raises(OSError, match="No space left"):
        convert.convert(path, tmp_path / "folder")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model000003.pt"]


def test_classifiers_and_super_resolution_become_safetensors_only(tmp_path):
    flags = config.defaults(*identify.GROUPS["classifier"]) | {
        "image_size": 8, "classifier_width": 32, "classifier_depth": 1, "classifier_channel_mult": "1,2",
        "classifier_num_head_channels": 16,
    }  # fmt: skip
    checkpoint.save(script_util.create_classifier_and_diffusion(**flags)[0].state_dict(), tmp_path / "c.pt")
    checkpoint.write_config(tmp_path, "classifier", flags)
    convert.convert(tmp_path / "c.pt", tmp_path / "c.safetensors")
    assert script_util.open_classifier(tmp_path / "c.safetensors")[1] == flags
    with pytest.raises(ValueError, match="diffusers has no classifier network like ours"):
        convert.convert(tmp_path / "c.pt", tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
