"""Checkpoints known by their path alone: published ones, the parent's, those of nobody; and what must be asked."""

import json
import random
import re
from pathlib import Path

import pytest
import torch

from guided_diffusion import checkpoint, config, identify, logger, presets, recognition, script_util
from guided_diffusion.network_options import DiffusionOptions

ZOO = json.loads((Path(__file__).parent / "golden" / "model_zoo.json").read_text())
PUBLISHED = [name for name in ZOO if f"{name}.pt" in {preset.file for preset in presets.PRESETS.values()}]
KINDS = {"model": "diffusion", "sr": "super_res", "cls": "classifier"}
OPEN = {
    "diffusion": script_util.open_diffusion,
    "super_res": script_util.open_super_res,
    "classifier": script_util.open_classifier,
}
BUILD = {
    "diffusion": script_util.create_model_and_diffusion,
    "super_res": script_util.sr_create_model_and_diffusion,
    "classifier": script_util.create_classifier_and_diffusion,
}
DEFAULTS = {kind: config.defaults(*groups) for kind, groups in identify.GROUPS.items()}


@pytest.fixture(autouse=True)
def printed(monkeypatch):
    """What is found is printed, as where no program has set up a log."""
    monkeypatch.setattr(logger.Logger, "CURRENT", None)


def file_of(shapes, path):
    """A file of tensors with these names and shapes, each a single number in memory and on disk."""
    checkpoint.save({name: torch.ones(1).expand(shape) for name, shape in shapes.items()}, path)
    return path


def shapes_of(kind, flags):
    with torch.device("meta"):
        return {name: value.shape for name, value in BUILD[kind](**flags)[0].state_dict().items()}


# --------------------------------------------------------------------------------------------------- published models


def test_the_fifteen_published_models_are_presets():
    assert len(PUBLISHED) == len(presets.PRESETS) == 15
    for preset in presets.PRESETS.values():
        entry = ZOO[preset.file[: -len(".pt")]]
        assert KINDS[entry["kind"]] == preset.kind and entry["parameters"] == preset.parameters
        defaults = DEFAULTS[preset.kind]
        assert defaults | preset.flags == defaults | entry["flags"] | {
            name: preset.flags[name] for name in ("use_fp16", "noise_schedule") if name in preset.flags
        }


@pytest.mark.parametrize("renamed", [False, True], ids=["as published", "renamed"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_is_known_by_its_path_alone(name, renamed, tmp_path, capsys):
    kind = KINDS[ZOO[name]["kind"]]
    path = file_of(ZOO[name]["state_dict"], tmp_path / ("x.pt" if renamed else f"{name}.pt"))
    model, *_, flags = OPEN[kind](path, device="meta")
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert shapes == ZOO[name]["state_dict"] and list(shapes) == list(ZOO[name]["state_dict"])
    expected = DEFAULTS[kind] | ZOO[name]["flags"]
    if name == "64x64_classifier":  # which hears of noise by the schedule of its model
        expected |= {"noise_schedule": "cosine"}
    free = {"use_fp16"} | ({"dropout"} if renamed else set())  # dropout alone tells LSUN from ImageNet, 256x256
    assert {key: flags[key] for key in flags if key not in free} == {
        key: expected[key] for key in expected if key not in free
    }
    said = capsys.readouterr().out
    assert f"{name}.pt" in said and f"{path}: read off its tensors: image_channels 3" in said
    assert ("by its name and its tensors" in said) != ("taken for a published model, as it has the tensors of" in said)


def test_a_file_named_like_a_published_one_with_other_tensors(tmp_path, capsys):
    path = file_of(ZOO["128x128_diffusion"]["state_dict"], tmp_path / "64x64_diffusion.pt")
    *_, flags = script_util.open_diffusion(path, device="meta")
    assert (flags["image_size"], flags["num_heads"], flags["noise_schedule"]) == (128, 4, "linear")
    assert "has the name of a published model, and other tensors" in capsys.readouterr().out
    path = file_of(ZOO["128x128_diffusion"]["state_dict"], tmp_path / "128x128_classifier.pt")
    with pytest.raises(ValueError, match="holds a diffusion network, but a classifier one is needed"):
        script_util.open_classifier(path)


def test_config_json_spares_every_guess(tmp_path, capsys):
    path = file_of(ZOO["64x64_diffusion"]["state_dict"], tmp_path / "64x64_diffusion.pt")
    told = DEFAULTS["diffusion"] | ZOO["64x64_diffusion"]["flags"] | {"num_head_channels": 32, "dropout": 0.3}
    checkpoint.write_config(tmp_path, "diffusion", told)
    assert script_util.open_diffusion(path, device="meta")[2] == told and capsys.readouterr().out == ""


def test_typed_flags_win_over_a_published_name(tmp_path):
    path = file_of(ZOO["256x256_diffusion_uncond"]["state_dict"], tmp_path / "256x256_diffusion_uncond.pt")
    *_, flags = script_util.open_diffusion(path, {"image_size": 512, "noise_schedule": "cosine"}, device="meta")
    assert (flags["image_size"], flags["noise_schedule"], flags["num_head_channels"]) == (512, "cosine", 64)
    assert flags["attention_resolutions"] == "64,32,16"  # the same places in the network


def test_half_precision_of_a_published_model(tmp_path):
    path = file_of(ZOO["64x64_diffusion"]["state_dict"], tmp_path / "64x64_diffusion.pt")
    model, _, flags = script_util.open_diffusion(path, device="meta")
    assert (flags["use_fp16"], model.dtype) == (True, torch.float16)  # as its README samples
    state = checkpoint.load(path)
    assert identify.identify(path, "diffusion", state)["use_fp16"] is True
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32), ("fp16", torch.float16)):  # typed wins
        model, _, flags = script_util.open_diffusion(path, {"precision": precision}, device="meta")
        assert (model.dtype, flags["use_fp16"]) == (dtype, False)
    with pytest.raises(ValueError, match="--precision bf16 and --use_fp16 True are two precisions"):
        script_util.open_diffusion(path, {"precision": "bf16", "use_fp16": True}, device="meta")


# ------------------------------------------------------------------------------------------ --preset and typed flags


def test_a_preset_tells_what_its_readme_types(tmp_path):
    path = file_of(ZOO["128x128_diffusion"]["state_dict"], tmp_path / "mine.pt")
    *_, flags = script_util.open_diffusion(path, {"preset": "imagenet128", "num_heads": 8}, device="meta")
    assert (flags["num_heads"], flags["num_channels"], flags["image_size"]) == (8, 256, 128)


def test_a_preset_that_the_tensors_contradict(tmp_path):
    path = file_of(ZOO["128x128_diffusion"]["state_dict"], tmp_path / "128x128_diffusion.pt")
    with pytest.raises(ValueError, match=r"--preset imagenet64 with num_\w+ \S+ contradicts the weights of .*128x128"):
        script_util.open_diffusion(path, {"preset": "imagenet64"}, device="meta")
    with pytest.raises(ValueError, match="--num_channels 32 contradicts the weights"):  # typed, and wrong
        script_util.open_diffusion(path, {"preset": "imagenet128", "num_channels": 32}, device="meta")
    with pytest.raises(ValueError, match="--preset imagenet128 with class_cond True contradicts the weights"):
        shapes = {k: v for k, v in ZOO["128x128_diffusion"]["state_dict"].items() if k != "label_emb.weight"}
        script_util.open_diffusion(file_of(shapes, path), {"preset": "imagenet128"}, device="meta")


def test_the_classifier_of_a_preset(tmp_path):
    path = file_of(ZOO["64x64_classifier"]["state_dict"], tmp_path / "mine.pt")
    _, flags = script_util.open_classifier(path, {"preset": "imagenet64"}, device="meta")
    assert (flags["classifier_depth"], flags["noise_schedule"], flags["image_size"]) == (4, "cosine", 64)


def test_a_preset_without_a_classifier_leaves_that_to_its_file(tmp_path):
    path = file_of(ZOO["256x256_classifier"]["state_dict"], tmp_path / "x.pt")
    _, flags = script_util.open_classifier(path, {"preset": "lsun-cat"}, device="meta")
    assert (flags["image_size"], flags["classifier_num_head_channels"]) == (256, 64)


def test_a_preset_beside_config_json_leaves_to_it_what_it_does_not_say(tmp_path):
    own = DEFAULTS["diffusion"] | presets.PRESETS["imagenet128"].flags | {"num_classes": 10, "predict": "v"}
    path = file_of(shapes_of("diffusion", own), tmp_path / "model000001.pt")
    checkpoint.write_config(tmp_path, "diffusion", own | {"num_heads": 8})
    *_, flags = script_util.open_diffusion(path, {"preset": "imagenet128"}, device="meta")
    assert flags == own  # eight heads, which the tensors do not tell, give way to the four of the preset


# ------------------------------------------------------------------------------------------------------ anybody's own


def drawn(seed):
    """(kind, flags) of a random small architecture."""
    draw = random.Random(1000 + seed)
    kind = draw.choice(list(BUILD))
    p = "classifier_" if kind == "classifier" else ""
    levels = draw.choice([1, 2, 3, 4])
    size = draw.choice([2, 4, 5, 8]) * 2 ** (levels - 1)
    flags = {
        identify.SIZES[kind]: size,
        "image_channels": draw.choice([1, 3]),
        "num_classes": draw.choice([2, 10, 1000]),
        f"{p}channel_mult": ",".join(draw.choice(["1", "2", "3", "0.5"]) for _ in range(levels)),
        f"{p}attention_resolutions": ",".join(str(size // 2**k) for k in range(levels) if draw.random() < 0.4),
        f"{p}use_scale_shift_norm": draw.random() < 0.5,
        f"{p}resblock_updown": draw.random() < 0.5,
    }
    if kind == "classifier":
        flags |= {"classifier_width": 64, "classifier_depth": draw.choice([1, 2, 3]),
                  "classifier_num_head_channels": draw.choice([8, 32]),
                  "classifier_pool": draw.choice(["adaptive", "attention", "spatial", "spatial_v2"])}  # fmt: skip
        return kind, flags
    flags |= draw.choice([{"num_heads": 1}, {"num_heads": 4}, {"num_head_channels": 16}])
    flags |= {"num_channels": 64, "num_res_blocks": draw.choice([1, 2, 3]), "conv_resample": draw.random() < 0.7,
              "noise_schedule": draw.choice(["linear", "cosine"]), "diffusion_steps": draw.choice([100, 1000])}
    flags |= {name: draw.random() < 0.5 for name in ("learn_sigma", "class_cond")}
    if flags.get("num_heads") != 1:
        flags["use_new_attention_order"] = draw.random() < 0.5
    return kind, flags | ({"small_size": 1} if kind == "super_res" else {})


def asked(error):
    """The flags that an error asks for: [[those of which one does], ...]."""
    listed = re.search(r"tells: (.*?)\. Type them", str(error))[1]
    without = re.sub(r" \([^()]*\)", "", listed)
    return [[name.strip("-") for name in names.split(" or ")] for names in without.split("; ")]


@pytest.mark.parametrize("seed", range(20))
def test_random_architectures_are_inferred_or_asked_for(seed, tmp_path):
    """What an error asks for, and no more, is enough to rebuild the network; each flag of it is needed."""
    kind, drawn_flags = drawn(seed)
    flags = DEFAULTS[kind] | drawn_flags
    path = file_of(shapes_of(kind, flags), tmp_path / "x.pt")
    told = {}
    for _ in range(3):  # an answer can raise another question: with several heads, their order
        try:
            *_, found = OPEN[kind](path, told, device="meta")
            break
        except ValueError as error:
            names = [next(n for n in names if n in drawn_flags or n == names[-1]) for names in asked(error)]
            assert not set(names) & told.keys()
            told |= {name: flags[name] for name in names}
    inferred = recognition.infer_flags(checkpoint.load(path))
    assert not told.keys() & inferred.keys()  # nothing is asked that the tensors tell
    assert shapes_of(kind, DEFAULTS[kind] | found) == shapes_of(kind, flags)
    unread = {"dropout", "num_classes", "small_size"}  # without classes their number is nobody's
    prefix = "classifier_" * (kind == "classifier")
    mult, attention = f"{prefix}channel_mult", f"{prefix}attention_resolutions"
    assert recognition.misfits(found, recognition.infer_flags(checkpoint.load(path), flags[identify.SIZES[kind]])) == {}
    levels = len(flags[mult].split(","))
    unread |= {mult, attention} | ({"resblock_updown", "classifier_resblock_updown", "conv_resample"} if levels == 1
                                   else {"conv_resample"} if flags.get("resblock_updown") else set())  # fmt: skip
    if kind == "classifier":
        unread |= set(config.defaults(DiffusionOptions))
    assert {n: v for n, v in found.items() if n not in unread} == {n: v for n, v in flags.items() if n not in unread}


def own(tmp_path, **flags):
    flags = DEFAULTS["diffusion"] | {"num_channels": 32, "image_size": 16, "channel_mult": "1,2"} | flags
    return file_of(shapes_of("diffusion", flags), tmp_path / "x.pt")


def test_the_question_names_the_values_that_would_do(tmp_path):
    path = own(tmp_path, image_size=32, channel_mult="", num_channels=64)
    with pytest.raises(ValueError) as error:
        script_util.open_diffusion(path)
    heads = "1, 2, 4, 8, 16, 32, 64, 128"
    assert str(error.value) == (
        f"{path}: its tensors leave these flags open, and neither config.json nor a published model tells:"
        f" --image_size (a multiple of 8, by its widths 32); --num_heads or --num_head_channels (both of {heads});"
        " --use_new_attention_order (False for all published models but 64x64_diffusion.pt); --noise_schedule (linear,"
        " cosine...); --diffusion_steps (1000, 4000...). Type them, and --predict, --num_heads_upsample,"
        " --class_dropout, --rescale_timesteps, --residual_rescale, --learned_variance if not as usual."
    )


@pytest.mark.parametrize(
    "heads, order_is_open",
    [({"num_heads": 1}, False), ({"num_heads": 1, "num_heads_upsample": 2}, True), ({"num_heads": 2}, True),
     ({"num_head_channels": 64}, False), ({"num_head_channels": 32}, True)],
)  # fmt: skip
def test_the_order_of_attention_is_asked_for_only_if_it_matters(tmp_path, heads, order_is_open):
    path = own(tmp_path, attention_resolutions="8")  # all attention is 64 wide
    told = {"image_size": 16, "noise_schedule": "linear", "diffusion_steps": 1000} | heads
    if order_is_open:
        with pytest.raises(ValueError) as error:
            script_util.open_diffusion(path, told, device="meta")
        assert asked(error.value) == [["use_new_attention_order"]]
    else:
        script_util.open_diffusion(path, told, device="meta")


def test_the_originals_way_of_typing_the_architecture_keeps_its_defaults(tmp_path, capsys):
    path = own(tmp_path, image_size=64, channel_mult="", num_res_blocks=3, learn_sigma=True)
    typed = {"image_size": 64, "num_channels": 32, "num_res_blocks": 3, "diffusion_steps": 4000}
    *_, flags = script_util.open_diffusion(path, typed, device="meta")
    assert flags == DEFAULTS["diffusion"] | typed | {"learn_sigma": True}
    said = capsys.readouterr().out
    assert "read off its tensors: " in said and "learn_sigma True" in said
    assert said.splitlines()[-1].endswith(
        "so they have their defaults: num_heads 4, num_head_channels -1, use_new_attention_order False, noise_schedule"
        " linear"
    )


def test_the_originals_way_is_not_taken_for_a_published_model_by_tensors(tmp_path):
    """A model of the architecture of ImageNet 256, trained elsewhere with the default four heads."""
    shapes = ZOO["256x256_diffusion_uncond"]["state_dict"]
    typed = {"image_size": 256, "num_channels": 256, "resblock_updown": True, "learn_sigma": True,
             "attention_resolutions": "32,16,8"}  # fmt: skip
    *_, flags = script_util.open_diffusion(file_of(shapes, tmp_path / "x.pt"), typed, device="meta")
    assert (flags["num_heads"], flags["num_head_channels"]) == (4, -1)
    *_, flags = script_util.open_diffusion(file_of(shapes, tmp_path / "lsun_cat.pt"), typed, device="meta")
    assert (flags["num_head_channels"], flags["dropout"]) == (64, 0.1)


def test_a_film_network_is_asked_for_less(tmp_path):
    flags = DEFAULTS["diffusion"] | {"network": "film", "num_channels": 8, "channel_mult": "1,2", "image_size": 12,
                                     "vector_channels": 3, "learn_sigma": True}  # fmt: skip
    path = file_of(shapes_of("diffusion", flags), tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"--image_size \(a multiple of 4\)") as error:
        script_util.open_diffusion(path)
    assert asked(error.value) == [["image_size"], ["noise_schedule"], ["diffusion_steps"]]
    told = {"image_size": 12, "noise_schedule": "linear", "diffusion_steps": 1000}
    assert script_util.open_diffusion(path, told)[2] == flags


def test_a_classifier_whose_levels_nothing_marks_is_asked_for_its_depth(tmp_path):
    flags = DEFAULTS["classifier"] | {
        "image_size": 8, "classifier_width": 32, "classifier_attention_resolutions": "", "classifier_depth": 1,
        "classifier_channel_mult": "1,1,1", "classifier_num_head_channels": 16, "classifier_pool": "adaptive",
    }  # fmt: skip
    path = file_of(shapes_of("classifier", flags), tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"--classifier_depth \(1, 2, 5\); --image_size \(the side of its images\)"):
        script_util.open_classifier(path)
    told = {"classifier_depth": 1, "image_size": 8, "classifier_num_head_channels": 16}
    _, found = script_util.open_classifier(path, told, device="meta")
    assert found == {name: value for name, value in flags.items() if name in found}
    _, found = script_util.open_classifier(path, told | {"classifier_depth": 2}, device="meta")
    assert found["classifier_channel_mult"] == "1,1"


@pytest.mark.parametrize("name", presets.PARENT)
def test_the_parents_models_are_known_by_name_and_only_hinted_at_by_tensors(name, tmp_path):
    preset = presets.PARENT[name]
    flags = DEFAULTS[preset.kind] | preset.flags
    shapes = shapes_of(preset.kind, flags)
    *_, found = OPEN[preset.kind](file_of(shapes, tmp_path / f"{name}.pt"), device="meta")
    assert found == flags
    with pytest.raises(ValueError, match=f"Its tensors could be those of .*{name}"):
        OPEN[preset.kind](file_of(shapes, tmp_path / "x.pt"), device="meta")


def test_the_parents_conditional_network_has_its_known_size():
    preset = presets.PARENT["imagenet64_cond_270M_250K"]
    shapes = shapes_of("diffusion", DEFAULTS["diffusion"] | preset.flags)
    assert (len(shapes), sum(shape.numel() for shape in shapes.values())) == (451, 273_049_350)
    linear = ZOO["cifar10_linear"]["state_dict"]
    cifar = shapes_of("diffusion", DEFAULTS["diffusion"] | presets.PARENT["cifar10_uncond_50M_500K"].flags)
    assert {name: list(shape) for name, shape in cifar.items()} == linear


def test_what_is_no_network_is_said_before_flags_are_asked(tmp_path):
    checkpoint.save({"model": {}, "epoch": 3}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt holds no weights .* but a dict of model, epoch"):
        script_util.open_diffusion(tmp_path / "x.pt")
    stray = shapes_of("diffusion", DEFAULTS["diffusion"]) | {7: (1,)}  # a key that is no name changes nothing
    with pytest.raises(ValueError, match="flags open"):
        script_util.open_diffusion(file_of(stray, tmp_path / "y.pt"))
    few = {"time_embed.0.weight": torch.ones(4, 1), "x.weight": torch.ones(1)}
    checkpoint.save(few, tmp_path / "64x64_diffusion.pt")
    with pytest.raises(ValueError, match="holds no whole network"):
        script_util.open_diffusion(tmp_path / "64x64_diffusion.pt")
