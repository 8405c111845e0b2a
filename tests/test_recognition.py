"""Flags read off tensors: published networks, small random ones, what is left open; and weights that do not fit."""

import json
import random
import re
from pathlib import Path

import pytest
import torch

from guided_diffusion import recognition, script_util, sizes

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



def weights_of(kind, flags):
    with torch.device("meta"):
        return BUILDERS[kind](**flags)[0].state_dict()


def shapes(weights):
    return [(name, tuple(tensor.shape)) for name, tensor in weights.items()]


def assert_inferred_is(inferred, kind, flags):
    """Everything that the tensors determine is there, and is what built them."""
    prefix = "classifier_" if kind == "classifier" else ""
    size = flags["large_size"] if kind == "super_res" else flags["image_size"]
    mult = sizes.levels(flags[f"{prefix}channel_mult"], size, kind == "super_res")
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
        names += ["conv_resample"] if len(mult) > 1 and not flags["resblock_updown"] else []
    assert inferred == expected | {name: flags[name] for name in names}


@pytest.mark.parametrize("name", ZOO)
def test_published_networks_tell_their_flags(name):
    kind = KINDS[ZOO[name]["kind"]]
    flags = DEFAULTS[kind] | ZOO[name]["flags"]
    weights = {key: torch.empty(shape, device="meta") for key, shape in ZOO[name]["state_dict"].items()}
    size = flags["large_size"] if kind == "super_res" else flags["image_size"]
    inferred = recognition.infer_flags(weights, image_size=size)
    assert_inferred_is(inferred, kind, flags)
    assert recognition.misfits(flags, inferred) == {}
    without_size = recognition.infer_flags(weights)
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
    inferred = recognition.infer_flags(weights, image_size=size, image_channels=flags["image_channels"])
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
    inferred = recognition.infer_flags(weights_of("classifier", flags))
    assert "classifier_depth" not in inferred and "image_size" not in inferred
    assert inferred["classifier_width"] == 32
    assert recognition.misfits(flags, inferred) == {}
    # The attention pool knows its side, 2: with the image's, that leaves one way.
    assert_inferred_is(recognition.infer_flags(weights_of("classifier", flags), image_size=8), "classifier", flags)
    other = flags | {"image_size": 4, "classifier_depth": 2, "classifier_channel_mult": "1,1"}
    assert_inferred_is(recognition.infer_flags(weights_of("classifier", other), image_size=4), "classifier", other)


def test_levels_that_only_widths_mark():
    flags = DEFAULTS["classifier"] | {
        "image_size": 8, "classifier_width": 32, "classifier_attention_resolutions": "",
        "classifier_channel_mult": "1,2,3", "classifier_num_head_channels": 16, "classifier_pool": "adaptive",
    }
    assert_inferred_is(recognition.infer_flags(weights_of("classifier", flags), image_size=8), "classifier", flags)


def test_a_single_level_does_not_tell_how_it_would_resample():
    flags = DEFAULTS["diffusion"] | {"image_size": 4, "num_channels": 32, "attention_resolutions": "4"}
    inferred = recognition.infer_flags(weights_of("diffusion", flags), image_size=4)
    assert_inferred_is(inferred, "diffusion", flags)
    assert "resblock_updown" not in inferred


def test_two_kinds_of_network_of_equal_shapes():
    plain = DEFAULTS["diffusion"] | {"image_size": 8, "num_channels": 32, "image_channels": 6}
    enlarging = DEFAULTS["super_res"] | {
        "large_size": 8, "channel_mult": "1,2", "num_channels": 32, "image_channels": 3, "learn_sigma": True,
    }
    weights = weights_of("diffusion", plain)
    assert shapes(weights) == shapes(weights_of("super_res", enlarging))
    assert recognition.infer_flags(weights, image_channels=6)["kind"] == "diffusion"
    assert recognition.infer_flags(weights, image_channels=3)["kind"] == "super_res"
    assert recognition.infer_flags(weights)["kind"] == "super_res"


def test_factors_that_are_no_simple_fractions():
    flags = DEFAULTS["diffusion"] | {"image_size": 8, "num_channels": 96, "channel_mult": "0.33334,1"}
    inferred = recognition.infer_flags(weights_of("diffusion", flags))
    first, second = sizes.parse_channel_mult(inferred["channel_mult"])
    assert (int(first * 96), second) == (32, 1)
    assert recognition.misfits(flags, inferred) == {}
    assert all(
        int(float(recognition.factor(width, base)) * base) == width
        for base in range(1, 400)
        for width in range(32, 1025, 32)
    )


def test_misfits_compares_what_texts_mean():
    flags = DEFAULTS["diffusion"] | {"image_size": 32, "num_channels": 32}
    weights = weights_of("diffusion", flags)
    inferred = recognition.infer_flags(weights, image_size=32)
    for same in ({"channel_mult": "1,2.0,2,2"}, {"attention_resolutions": "8,16,100,7"}):
        assert recognition.misfits(flags | same, inferred) == {}
    for other, truth in [
        ({"channel_mult": "1,2,2"}, {"channel_mult": "1,2,2,2"}),
        ({"attention_resolutions": "16"}, {"attention_resolutions": "16,8"}),
        ({"num_channels": 64}, {"num_channels": 32}),
        ({"num_heads": 2, "dropout": 0.5, "use_new_attention_order": True, "noise_schedule": "cosine"}, {}),
    ]:
        assert recognition.misfits(flags | other, inferred) == truth
    # A size without default factors: what the network is told must be written out.
    inferred = recognition.infer_flags(weights, image_size=96)
    truth = {"channel_mult": "1,2,2,2", "attention_resolutions": "48,24"}
    assert recognition.misfits(flags | {"image_size": 96}, inferred) == truth
    assert recognition.misfits(flags | {"image_size": 96} | truth, inferred) == {}


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
        recognition.infer_flags(content, path="x.pt")


# --------------------------------------------------------------------------------------------------------- load_weights


def small(**flags):
    flags = DEFAULTS["diffusion"] | {"image_size": 8, "num_channels": 32, "num_heads": 1} | flags
    return script_util.create_model_and_diffusion(**flags)[0], flags


def test_weights_that_fit_are_loaded():
    (source, flags), (target, _) = small(), small()
    recognition.load_weights(target, source.state_dict(), path="x.pt", flags=flags)
    assert all(torch.equal(a, b) for a, b in zip(target.state_dict().values(), source.state_dict().values()))


def test_weights_that_do_not_fit_tell_what_would():
    (source, _), (target, flags) = small(num_channels=64, class_cond=True, num_classes=10), small()
    with pytest.raises(ValueError) as error:
        recognition.load_weights(target, source.state_dict(), path="models/x.pt", flags=flags)
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
        recognition.load_weights(target, source.state_dict(), path="x.pt", flags={})


def test_weights_that_lack_keys():
    target, flags = small()
    weights = {key: value for key, value in target.state_dict().items() if not key.startswith("middle_block.1")}
    with pytest.raises(ValueError, match=r"6 keys missing \(first: middle_block\.1\.norm\.weight\); it is a diffusion"):
        recognition.load_weights(target, weights, path="x.pt", flags=flags)
    with pytest.raises(ValueError, match=r"2 keys missing \(first: out\.2\.weight\)$"):
        weights = {key: value for key, value in target.state_dict().items() if not key.startswith("out.2")}
        recognition.load_weights(target, weights, path="x.pt", flags=flags)


def test_weights_of_another_kind():
    target, flags = small()
    weights = weights_of("classifier", DEFAULTS["classifier"] | {"image_size": 8, "classifier_width": 32,
                                                                  "classifier_num_head_channels": 16})
    with pytest.raises(ValueError, match=r"keys missing .*; it is a classifier network"):
        recognition.load_weights(target, weights, path="x.pt", flags=flags)


FILM = {
    "network": "film", "image_size": 8, "num_channels": 6, "channel_mult": "1,0.5,2", "image_channels": 1,
    "learn_sigma": True, "vector_channels": 5,
}  # fmt: skip


@pytest.mark.parametrize("vector_channels", [0, 5])
def test_a_film_network_tells_its_flags(vector_channels):
    flags = DEFAULTS["diffusion"] | FILM | {"vector_channels": vector_channels}
    inferred = recognition.infer_flags(weights_of("diffusion", flags))
    told = {name: FILM[name] for name in FILM if name != "image_size"} | {"vector_channels": vector_channels}
    assert inferred == told | {"kind": "diffusion", "class_cond": False, "attention_downsampling": ()}
    assert recognition.misfits(flags, inferred) == {}
    assert recognition.misfits(flags | {"num_channels": 7, "learn_sigma": False}, inferred) == {
        "num_channels": 6, "learn_sigma": True,
    }  # fmt: skip
    default = DEFAULTS["diffusion"] | FILM | {"channel_mult": "", "image_size": 16}
    inferred = recognition.infer_flags(weights_of("diffusion", default))
    assert inferred["channel_mult"] == "1,2,4,8" and recognition.misfits(default, inferred) == {}


def test_networks_of_the_two_kinds_are_told_apart():
    film, adm = DEFAULTS["diffusion"] | FILM, DEFAULTS["diffusion"] | {"num_channels": 32, "image_size": 8}
    wrong = recognition.misfits(adm, recognition.infer_flags(weights_of("diffusion", film)))
    assert wrong["network"] == "film" and wrong["num_channels"] == 6
    adm |= {"vector_channels": 7, "image_channels": 1}
    inferred = recognition.infer_flags(weights_of("diffusion", adm))
    assert (inferred["network"], inferred["vector_channels"]) == ("adm", 7) and recognition.misfits(adm, inferred) == {}
    assert recognition.misfits(adm | {"vector_channels": 0}, inferred) == {"vector_channels": 7}
    with pytest.raises(ValueError, match=r"fit: \d+ keys missing .*flags that would fit at --image_size 8: --network"):
        network = script_util.create_model_and_diffusion(**adm)[0]
        recognition.load_weights(network, weights_of("diffusion", film), path="a.pt", flags=adm)
