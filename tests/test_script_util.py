"""Builders: the original's names, signatures and defaults; published networks; what is refused; opening by path."""

import argparse
import inspect
import json
import shutil
from pathlib import Path

import pytest
import torch

from guided_diffusion import checkpoint, config, script_util
from guided_diffusion.gaussian_diffusion import LossType, ModelMeanType, ModelVarType
from guided_diffusion.network_options import ModelOptions
from guided_diffusion.unet import AttentionBlock

ZOO = json.loads((Path(__file__).parent / "golden" / "model_zoo.json").read_text())

# ------------------------------------------------------------------------------------------------ names and signatures

MODEL_AND_DIFFUSION = (
    "image_size, class_cond, learn_sigma, num_channels, num_res_blocks, channel_mult, num_heads, num_head_channels,"
    " num_heads_upsample, attention_resolutions, dropout, diffusion_steps, noise_schedule, timestep_respacing, use_kl,"
    " predict_xstart, rescale_timesteps, rescale_learned_sigmas, use_checkpoint, use_scale_shift_norm,"
    " resblock_updown, use_fp16, use_new_attention_order"
)
CLASSIFIER = (
    "image_size, classifier_use_fp16, classifier_width, classifier_depth, classifier_attention_resolutions,"
    " classifier_use_scale_shift_norm, classifier_resblock_updown, classifier_pool"
)
PROCESS = (
    "learn_sigma, diffusion_steps, noise_schedule, timestep_respacing, use_kl, predict_xstart, rescale_timesteps,"
    " rescale_learned_sigmas"
)
MORE_PROCESS = " predict='', loss_weight='unit', sigma_data=0.5, sigma_small=False, learned_variance='range'"
SIGNATURES = {
    "diffusion_defaults": "()",
    "classifier_defaults": "()",
    "model_and_diffusion_defaults": "()",
    "classifier_and_diffusion_defaults": "()",
    "sr_model_and_diffusion_defaults": "()",
    "add_dict_to_argparser": "(parser, default_dict)",
    "args_to_dict": "(args, keys)",
    "create_model": "(image_size, num_channels, num_res_blocks, channel_mult='', learn_sigma=False, class_cond=False,"
    " use_checkpoint=False, attention_resolutions='16', num_heads=1, num_head_channels=-1, num_heads_upsample=-1,"
    " use_scale_shift_norm=False, dropout=0, resblock_updown=False, use_fp16=False, use_new_attention_order=False,"
    " image_channels=3, num_classes=1000, class_dropout=0.0, network='adm', vector_channels=0,"
    " conv_resample=True, checkpoint_levels=0, residual_rescale=False)",
    "create_classifier": f"({CLASSIFIER}, classifier_channel_mult='', classifier_num_head_channels=64,"
    " classifier_dropout=0.0, image_channels=3, num_classes=1000, classifier_residual_rescale=False)",
    "create_gaussian_diffusion": "(*, steps=1000, learn_sigma=False, sigma_small=False, noise_schedule='linear',"
    " use_kl=False, predict_xstart=False, rescale_timesteps=False, rescale_learned_sigmas=False,"
    " timestep_respacing='', predict='', loss_weight='unit', sigma_data=0.5, learned_variance='range')",
    "create_model_and_diffusion": f"({MODEL_AND_DIFFUSION}, image_channels=3, num_classes=1000, class_dropout=0.0,"
    f" network='adm', vector_channels=0, conv_resample=True, checkpoint_levels=0, residual_rescale=False,"
    f"{MORE_PROCESS})",
    "create_classifier_and_diffusion": f"({CLASSIFIER}, {PROCESS}, image_channels=3, num_classes=1000,"
    f" classifier_channel_mult='', classifier_num_head_channels=64, classifier_dropout=0.0,"
    f" classifier_residual_rescale=False,{MORE_PROCESS})",
    "sr_create_model_and_diffusion": "("
    + MODEL_AND_DIFFUSION.replace("image_size", "large_size, small_size")
    .replace(" channel_mult,", "")
    .replace(", use_new_attention_order", "")
    + ", image_channels=3, num_classes=1000, channel_mult='', use_new_attention_order=False, class_dropout=0.0,"
    + " conv_resample=True, checkpoint_levels=0, residual_rescale=False,"
    + f"{MORE_PROCESS})",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_the_originals_with_more_at_the_end(name):
    assert str(inspect.signature(getattr(script_util, name))) == SIGNATURES[name]


def test_every_name_of_the_original_is_public():
    original = {*SIGNATURES, "NUM_CLASSES", "str2bool", "sr_create_model"}
    assert original | {"open_diffusion", "open_super_res", "open_classifier"} == set(script_util.__all__)
    assert script_util.NUM_CLASSES == 1000
    assert script_util.str2bool("no") is False


def test_defaults_are_those_of_the_flags():
    defaults = script_util.model_and_diffusion_defaults()
    assert (defaults["num_channels"], defaults["noise_schedule"], defaults["class_cond"]) == (128, "linear", False)
    assert defaults == config.defaults(ModelOptions) | script_util.diffusion_defaults()
    assert script_util.classifier_and_diffusion_defaults() == (
        script_util.classifier_defaults() | script_util.diffusion_defaults()
    )
    super_res = script_util.sr_model_and_diffusion_defaults()
    assert (super_res["large_size"], super_res["small_size"], "image_size" in super_res) == (256, 64, False)
    defaults["num_channels"] = 1  # a copy
    assert script_util.model_and_diffusion_defaults()["num_channels"] == 128


def test_programs_written_for_the_original_can_make_their_parser():
    parser = argparse.ArgumentParser()
    script_util.add_dict_to_argparser(parser, {"size": 3, "rate": 0.5, "cond": False, "name": "", "path": None})
    assert vars(parser.parse_args([])) == {"size": 3, "rate": 0.5, "cond": False, "name": "", "path": None}
    args = parser.parse_args(["--size", "1e3", "--rate", "2", "--cond", "True", "--name", "a", "--path=b"])
    assert vars(args) == {"size": 1000, "rate": 2.0, "cond": True, "name": "a", "path": "b"}
    assert script_util.args_to_dict(args, ["size", "name"]) == {"size": 1000, "name": "a"}


def tiny(**flags):
    return script_util.model_and_diffusion_defaults() | {"image_size": 8, "num_channels": 32, "num_heads": 1} | flags


def tiny_classifier(**flags):
    small = {"image_size": 8, "classifier_width": 32, "classifier_depth": 1, "classifier_num_head_channels": 16}
    return script_util.classifier_and_diffusion_defaults() | small | {"num_classes": 10} | flags


def test_builders_bind_like_the_originals():
    flags, names = tiny(), MODEL_AND_DIFFUSION.split(", ")
    values = [flags[name] for name in names]
    with torch.device("meta"):
        for args, kwargs in ((values, {}), ([], flags), (values[:4], {name: flags[name] for name in names[4:]})):
            model, diffusion = script_util.create_model_and_diffusion(*args, **kwargs)
            assert (model.image_size, model.model_channels, diffusion.num_timesteps) == (8, 32, 1000)
    with pytest.raises(TypeError, match=r"_and_diffusion: unknown option num_chanels; did you mean num_channels"):
        script_util.create_model_and_diffusion(**flags, num_chanels=3)
    del flags["dropout"], flags["use_kl"]
    with pytest.raises(TypeError, match=r"create_model_and_diffusion: missing options dropout, use_kl$"):
        script_util.create_model_and_diffusion(**flags)
    with pytest.raises(TypeError, match="missing options learn_sigma, num_channels"):
        script_util.create_model_and_diffusion(8, False)
    with pytest.raises(TypeError, match="multiple values for argument 'image_size'"):
        script_util.create_model_and_diffusion(*values, image_size=8)
    with pytest.raises(TypeError, match="too many positional arguments"):
        script_util.create_model_and_diffusion(*values, 3, 10, 0.0, "adm", 0, True, 0, False, "", "unit", 0.5,
                                               False, "range", 5)  # fmt: skip


# --------------------------------------------------------------------------------------------------- networks, process


@pytest.mark.parametrize("name", ZOO)
def test_published_networks(name):
    entry = ZOO[name]
    build, defaults = {
        "model": (script_util.create_model_and_diffusion, script_util.model_and_diffusion_defaults()),
        "sr": (script_util.sr_create_model_and_diffusion, script_util.sr_model_and_diffusion_defaults()),
        "cls": (script_util.create_classifier_and_diffusion, script_util.classifier_and_diffusion_defaults()),
    }[entry["kind"]]
    with torch.device("meta"):
        network, _ = build(**defaults | entry["flags"])
    manifest = [(key, list(value.shape)) for key, value in network.state_dict().items()]
    assert manifest == list(entry["state_dict"].items())
    assert sum(value.numel() for value in network.parameters()) == entry["parameters"]


def attentive_entries(network):
    return [
        number
        for number, entry in enumerate(network.input_blocks)
        if any(isinstance(layer, AttentionBlock) for layer in entry)
    ]


@pytest.mark.parametrize(
    "size, text, entries",
    [
        (32, "16", [4, 5]),
        (32, "32,8", [1, 2, 7, 8]),
        (32, "16,7,100", [4, 5]),  # 32 // 7 = 4 is a level's factor, 32 // 100 = 0 is none
        (32, "64", []),
        (32, "", []),
        (28, "13", [4, 5]),  # 28 // 13 = 2
        (28, "9", []),  # 28 // 9 = 3, of no level
    ],
)
def test_s08_10_attention_resolutions_are_pixels_and_those_of_no_level_are_ignored(size, text, entries):
    if text == "16,7,100":
        entries = entries + [7, 8]
    flags = {"num_channels": 32, "num_res_blocks": 2, "attention_resolutions": text}
    with torch.device("meta"):
        assert attentive_entries(script_util.create_model(size, channel_mult="1,1,1", **flags)) == entries
        flags = tiny_classifier(image_size=size, classifier_depth=2, classifier_channel_mult="1,1,1")
        flags["classifier_attention_resolutions"] = text
        classifier, _ = script_util.create_classifier_and_diffusion(**flags)
        assert attentive_entries(classifier) == entries
        flags = script_util.sr_model_and_diffusion_defaults() | {
            "large_size": size, "small_size": 4, "num_channels": 32, "channel_mult": "1,1,1",
            "attention_resolutions": text,
        }
        super_res, _ = script_util.sr_create_model_and_diffusion(**flags)
        assert attentive_entries(super_res) == entries


def test_all_flags_of_a_network_arrive():
    with torch.device("meta"):
        model, diffusion = script_util.create_model_and_diffusion(**tiny(
            image_size=16, num_channels=64, num_res_blocks=1, channel_mult="0.5,1", num_heads=2, num_heads_upsample=4,
            num_head_channels=-1, dropout=0.25, class_cond=True, num_classes=7, image_channels=4, learn_sigma=True,
            use_checkpoint=True, use_scale_shift_norm=False, resblock_updown=True, use_new_attention_order=True,
            use_fp16=True,
        ))
    assert (model.in_channels, model.out_channels, model.num_classes, model.dropout) == (4, 8, 7, 0.25)
    assert (model.num_heads, model.num_heads_upsample, model.num_head_channels) == (2, 4, -1)
    assert (model.channel_mult, model.num_res_blocks, model.attention_resolutions) == ((0.5, 1), 1, (1, 2))
    assert model.use_checkpoint and model.resblock_updown and model.use_new_attention_order and model.use_fp16
    assert not model.use_scale_shift_norm
    assert diffusion.model_var_type == ModelVarType.LEARNED_RANGE


def test_all_flags_of_a_classifier_arrive():
    with torch.device("meta"):
        classifier, _ = script_util.create_classifier_and_diffusion(**tiny_classifier(
            image_size=16, classifier_width=64, classifier_depth=3, classifier_attention_resolutions="16",
            classifier_use_scale_shift_norm=False, classifier_resblock_updown=False, classifier_pool="spatial",
            classifier_channel_mult="0.5,1", classifier_num_head_channels=32, classifier_dropout=0.25,
            image_channels=1, num_classes=7, classifier_use_fp16=True,
        ))
    assert (classifier.in_channels, classifier.out_channels, classifier.dropout) == (1, 7, 0.25)
    assert (classifier.channel_mult, classifier.num_res_blocks, classifier.attention_resolutions) == ((0.5, 1), 3, (1,))
    assert (classifier.num_head_channels, classifier.pool, classifier.use_fp16) == (32, "spatial", True)
    assert not classifier.use_scale_shift_norm and not classifier.resblock_updown
    assert not classifier.use_new_attention_order


@pytest.mark.parametrize("size", [4, 8, 16, 28, 32, 48])
def test_small_images_work_with_the_default_flags(size):
    model, _ = script_util.create_model_and_diffusion(**tiny(image_size=size, num_res_blocks=1))
    assert model(torch.zeros(1, 3, size, size), torch.zeros(1)).shape == (1, 3, size, size)
    classifier, _ = script_util.create_classifier_and_diffusion(**tiny_classifier(image_size=size))
    assert classifier(torch.zeros(2, 3, size, size), torch.zeros(2)).shape == (2, 10)


def test_super_resolution_network_runs():
    flags = script_util.sr_model_and_diffusion_defaults() | {
        "large_size": 16, "small_size": 8, "num_channels": 32, "num_heads": 1, "image_channels": 1,
    }
    model, _ = script_util.sr_create_model_and_diffusion(**flags)
    assert model(torch.zeros(2, 1, 16, 16), torch.zeros(2), low_res=torch.zeros(2, 1, 8, 8)).shape == (2, 1, 16, 16)


@pytest.mark.parametrize(
    "flags, mean, variance, loss",
    [
        ({}, "EPSILON", "FIXED_LARGE", "MSE"),
        ({"learn_sigma": True}, "EPSILON", "LEARNED_RANGE", "MSE"),
        ({"learn_sigma": True, "sigma_small": True}, "EPSILON", "LEARNED_RANGE", "MSE"),
        ({"sigma_small": True}, "EPSILON", "FIXED_SMALL", "MSE"),
        ({"predict_xstart": True}, "START_X", "FIXED_LARGE", "MSE"),
        ({"predict": "eps"}, "EPSILON", "FIXED_LARGE", "MSE"),
        ({"predict": "x0"}, "START_X", "FIXED_LARGE", "MSE"),
        ({"predict": "x0", "predict_xstart": True}, "START_X", "FIXED_LARGE", "MSE"),
        ({"predict": "v", "learn_sigma": True}, "VELOCITY", "LEARNED_RANGE", "MSE"),
        ({"predict": "previous_x", "sigma_small": True}, "PREVIOUS_X", "FIXED_SMALL", "MSE"),
        ({"predict": "edm", "noise_schedule": "karras"}, "EDM", "FIXED_LARGE", "MSE"),
        ({"rescale_learned_sigmas": True}, "EPSILON", "FIXED_LARGE", "RESCALED_MSE"),
        ({"use_kl": True}, "EPSILON", "FIXED_LARGE", "RESCALED_KL"),
        ({"use_kl": True, "rescale_learned_sigmas": True}, "EPSILON", "FIXED_LARGE", "RESCALED_KL"),
    ],
)
def test_flags_choose_mean_variance_and_loss(flags, mean, variance, loss):
    diffusion = script_util.create_gaussian_diffusion(**flags)
    assert diffusion.model_mean_type == ModelMeanType[mean]
    assert diffusion.model_var_type == ModelVarType[variance]
    assert diffusion.loss_type == LossType[loss]
    assert (diffusion.num_timesteps, diffusion.rescale_timesteps) == (1000, False)


def test_schedule_steps_and_respacing_arrive():
    diffusion = script_util.create_gaussian_diffusion(steps=50, noise_schedule="cosine", timestep_respacing="5")
    assert diffusion.timestep_map == [0, 12, 24, 37, 49]
    other = script_util.create_gaussian_diffusion(steps=50, noise_schedule="cosine")
    assert diffusion.alphas_cumprod == pytest.approx(other.alphas_cumprod[diffusion.timestep_map], rel=1e-12)
    assert script_util.create_gaussian_diffusion(steps=4000, rescale_timesteps=True).rescale_timesteps
    _, diffusion = script_util.create_model_and_diffusion(**tiny(diffusion_steps=200, timestep_respacing="ddim10"))
    assert diffusion.timestep_map == list(range(0, 200, 20))


@pytest.mark.parametrize("flags", [{"steps": 1, "noise_schedule": "cosine"}, {"timestep_respacing": "1"},
                                   {"timestep_respacing": "ddim1"}])
def test_processes_of_one_step(flags):
    diffusion = script_util.create_gaussian_diffusion(**flags)
    assert diffusion.timestep_map == [0]
    sample = diffusion.p_sample_loop(lambda x, t: torch.zeros_like(x), (2, 3), device="cpu")
    assert torch.isfinite(sample).all()


@pytest.mark.parametrize(
    "flags, error, message",
    [
        ({"image_size": 96}, ValueError, "unsupported image size: 96 .*--channel_mult"),
        ({"image_size": 10, "channel_mult": "1,1,1"}, ValueError, "image_size 10.* not divisible by 4.* 3 levels.*use"),
        ({"image_size": 0}, ValueError, "unsupported image size: 0"),
        ({"num_channels": 48}, ValueError, "num_channels.* widths .*48.* multiple of 32: use 32 or 64"),
        ({"channel_mult": "0.5,1"}, ValueError, r"widths \[16, 32\].* multiple of 32"),
        ({"channel_mult": "1;2"}, ValueError, "cannot read channel_mult '1;2'"),
        ({"attention_resolutions": "8;4"}, ValueError, "cannot read attention_resolutions '8;4'"),
        ({"num_heads": 3}, ValueError, "channels 32 is not divisible by num_heads 3"),
        ({"num_head_channels": 24}, ValueError, "channels 32 is not divisible by num_head_channels 24"),
        ({"network": "flim"}, ValueError, "unknown network: flim .*did you mean film"),
        ({"network": "film", "class_cond": True}, ValueError, "film takes no labels .*: give it vectors"),
        ({"network": "film", "channel_mult": ""}, ValueError, "images of 8x8 cannot be halved 4 times.*channel_mult"),
        ({"network": "film", "class_dropout": 0.1}, ValueError, "no vectors without --vector_channels"),
        ({"noise_schedule": "quadratic"}, NotImplementedError, "unknown beta schedule: quadratic .*linear, cosine"),
        ({"noise_schedule": "cosin"}, NotImplementedError, "schedule: cosin .*did you mean cosine"),
        ({"noise_schedule": "linear+zero_snr"}, ValueError, "pure noise.*row 999.*--predict v"),
        ({"predict": "eps0"}, ValueError, "unknown prediction: eps0 .*did you mean eps"),
        ({"predict": "v", "predict_xstart": True}, ValueError, "--predict_xstart True .* --predict is v"),
        ({"loss_weight": "min_snrr"}, ValueError, "unknown loss weight: min_snrr .*did you mean min_snr"),
        ({"loss_weight": "snr", "use_kl": True}, ValueError, "loss_weight snr .*use_kl False"),
        ({"sigma_data": 0.0}, ValueError, "sigma_data.* must be positive, not 0.0"),
        ({"diffusion_steps": 20}, ValueError, "linear schedule of 20 steps.*21 steps or more"),
        ({"diffusion_steps": 0}, ValueError, "at least one step, not --diffusion_steps 0"),
        ({"timestep_respacing": "many"}, ValueError, "cannot read the respacing 'many'"),
        ({"timestep_respacing": "ddim300"}, ValueError, "takes exactly 300 of 1000 steps; near it are .*ddim334"),
        ({"timestep_respacing": "1001"}, ValueError, "cannot divide section of 1000 steps into 1001"),
    ],
)
def test_networks_and_processes_that_cannot_be(flags, error, message):
    with pytest.raises(error, match=message):
        script_util.create_model_and_diffusion(**tiny(**flags))


@pytest.mark.parametrize(
    "flags, error, message",
    [
        ({"classifier_pool": "maximum"}, NotImplementedError, "maximum pooling: choose adaptive, attention, spatial"),
        ({"classifier_width": 48}, ValueError, "classifier_width.* multiple of 32: use 32 or 64"),
        ({"image_size": 96}, ValueError, "unsupported image size: 96 .*--classifier_channel_mult"),
        ({"image_size": 10, "classifier_channel_mult": "1,1,1"}, ValueError, "image_size 10.* not divisible by 4"),
        ({"classifier_num_head_channels": 24}, ValueError, "not divisible by num_head_channels 24"),
    ],
)
def test_classifiers_that_cannot_be(flags, error, message):
    with pytest.raises(error, match=message):
        script_util.create_classifier_and_diffusion(**tiny_classifier(**flags))


# ------------------------------------------------------------------------------------------------- opening by a path


def filled(network):
    """A network whose every tensor is random, since a fresh one gives zeros whatever its options."""
    generator = torch.Generator().manual_seed(0)
    state = {
        key: 0.2 * torch.randn(value.shape, generator=generator) for key, value in network.state_dict().items()
    }
    network.load_state_dict(state)
    return network.eval(), state


@pytest.fixture
def run(tmp_path):
    """A folder with a small conditional model, its averages and config.json; and the network itself."""
    flags = tiny(class_cond=True, num_classes=10, num_heads=2, image_channels=1, learn_sigma=True,
                 noise_schedule="cosine", diffusion_steps=50, dropout=0.1)
    network, state = filled(script_util.create_model_and_diffusion(**flags)[0])
    checkpoint.save(state, tmp_path / "model000010.pt")
    checkpoint.save({key: 0.5 * value for key, value in state.items()}, tmp_path / "ema_0.99_000010.pt")
    checkpoint.write_config(tmp_path, "diffusion", flags, class_names=list("0123456789"))
    return tmp_path, flags, network


@pytest.fixture
def classifier_run(tmp_path):
    flags = tiny_classifier(image_channels=1, noise_schedule="cosine")
    network, state = filled(script_util.create_classifier_and_diffusion(**flags)[0])
    folder = tmp_path / "classifier"
    checkpoint.check_writable(folder)
    checkpoint.save(state, folder / "model000003.pt")
    checkpoint.write_config(folder, "classifier", flags)
    return folder, flags, network


def test_a_path_is_enough(run):
    folder, flags, network = run
    model, diffusion, found = script_util.open_diffusion(folder / "model000010.pt")
    assert found == flags
    assert not model.training
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([0, 40]), torch.tensor([1, 9])
    assert torch.equal(model(x, t, y), network(x, t, y))
    assert model(x, t, y).abs().max() > 0
    assert (diffusion.num_timesteps, diffusion.model_var_type) == (50, ModelVarType.LEARNED_RANGE)
    averaged, _, _ = script_util.open_diffusion(folder / "ema_0.99_000010.pt")
    assert torch.equal(averaged.label_emb.weight, 0.5 * model.label_emb.weight)


def test_a_path_is_enough_for_a_classifier(classifier_run):
    folder, flags, network = classifier_run
    classifier, found = script_util.open_classifier(folder / "model000003.pt")
    assert found == flags
    assert not classifier.training
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0, 40])
    assert torch.equal(classifier(x, t), network(x, t))


def test_weights_of_another_precision_become_float32(run):
    folder, _, network = run
    half = {name: value.half() for name, value in network.state_dict().items()}
    checkpoint.save(half, folder / "model000011.pt")
    state = script_util.open_diffusion(folder / "model000011.pt")[0].state_dict()
    assert all(state[name].dtype == torch.float32 and torch.equal(state[name].half(), half[name]) for name in half)


def test_explicit_flags_win_over_config(run):
    folder, flags, _ = run
    explicit = {"timestep_respacing": "5", "num_heads": 1, "num_samples": 4, "class_cond": True}
    model, diffusion, found = script_util.open_diffusion(folder / "model000010.pt", explicit)
    assert (diffusion.num_timesteps, model.num_heads) == (5, 1)
    assert found == flags | {"timestep_respacing": "5", "num_heads": 1}


def test_without_config_the_flags_are_explicit_or_default(run):
    folder, flags, _ = run
    (folder / "config.json").unlink()
    defaults = script_util.model_and_diffusion_defaults()
    explicit = {name: value for name, value in flags.items() if value != defaults[name]}
    _, _, found = script_util.open_diffusion(folder / "model000010.pt", explicit)
    assert found == flags
    with pytest.raises(ValueError, match=r"--num_channels 64 contradicts the weights of .*, which say num_channels"):
        script_util.open_diffusion(folder / "model000010.pt", explicit | {"num_channels": 64})
    with pytest.raises(ValueError, match=r"model000010\.pt: its tensors leave these flags open"):
        script_util.open_diffusion(folder / "model000010.pt")


def test_a_classifier_without_config_tells_of_the_process_what_is_typed(classifier_run):
    folder, flags, _ = classifier_run
    (folder / "config.json").unlink()
    names = ("image_size", "image_channels", "num_classes", "noise_schedule")
    explicit = {name: value for name, value in flags.items() if name.startswith("classifier_") or name in names}
    _, found = script_util.open_classifier(folder / "model000003.pt", explicit)
    assert found == explicit
    with pytest.raises(ValueError, match=r"open, .* tells: --classifier_num_head_channels \(1, 2, 4, 8, 16, 32\)"):
        script_util.open_classifier(folder / "model000003.pt")
    _, found = script_util.open_classifier(folder / "model000003.pt", {"classifier_num_head_channels": 16})
    assert found == {name: value for name, value in explicit.items() if name != "noise_schedule"}


@pytest.mark.parametrize(
    "explicit, message",
    [
        ({"num_channels": 64}, "--num_channels 64 contradicts the weights of .*000010.pt, which say num_channels 32"),
        ({"class_cond": False}, "--class_cond False contradicts the weights .* say class_cond True"),
        ({"num_classes": 1000}, "--num_classes 1000 contradicts the weights .* say num_classes 10"),
        ({"image_channels": 3}, "--image_channels 3 contradicts the weights .* say image_channels 1"),
        ({"learn_sigma": False}, "--learn_sigma False contradicts the weights .* say learn_sigma True"),
        ({"channel_mult": "1,1"}, "--channel_mult 1,1 contradicts the weights .* say channel_mult 1,2"),
        ({"attention_resolutions": "4"}, "--attention_resolutions 4 contradicts the weights .* say attention_resol"),
        ({"network": "film"}, "--network film contradicts the weights .* say network adm"),
        ({"vector_channels": 5}, "--vector_channels 5 contradicts the weights .* say vector_channels 0"),
    ],
)
def test_explicit_flags_that_contradict_the_weights(run, explicit, message):
    with pytest.raises(ValueError, match=message):
        script_util.open_diffusion(run[0] / "model000010.pt", explicit)


def rewrite(folder, **changes):
    content = json.loads((folder / "config.json").read_text())
    content["flags"] |= changes
    (folder / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_channels": 64}, r"config\.json beside .* with num_channels 64 contradicts the weights .* say num_ch"),
        ({"num_chanels": 64}, r"config\.json beside .* has an unknown option num_chanels; did you mean num_channels"),
        ({"num_channels": "32"}, r"config\.json beside .*: num_channels must be int, not '32'"),
        ({"class_cond": 1}, r"config\.json beside .*: class_cond must be bool, not 1"),
        ({"dropout": "a"}, r"config\.json beside .*: dropout must be float, not 'a'"),
    ],
)
def test_config_that_contradicts_the_weights_or_the_options(run, changes, message):
    rewrite(run[0], **changes)
    with pytest.raises(ValueError, match=message):
        script_util.open_diffusion(run[0] / "model000010.pt")


def test_a_whole_number_does_for_a_fraction_in_config(run):
    rewrite(run[0], dropout=0)
    assert script_util.open_diffusion(run[0] / "model000010.pt")[2]["dropout"] == 0


def test_checkpoints_of_another_kind(run, classifier_run):
    (folder, _, _), (other, _, _) = run, classifier_run
    with pytest.raises(ValueError, match=r"config\.json beside .* describes a classifier network, but a diffusion one"):
        script_util.open_diffusion(other / "model000003.pt")
    with pytest.raises(ValueError, match=r"config\.json beside .* describes a diffusion network, but a classifier one"):
        script_util.open_classifier(folder / "model000010.pt")
    shutil.copy(other / "model000003.pt", folder / "model000003.pt")
    with pytest.raises(ValueError, match=r"model000003\.pt holds a classifier network, but a diffusion one is needed"):
        script_util.open_diffusion(folder / "model000003.pt")
    checkpoint.save({"state": {}, "param_groups": []}, folder / "opt000010.pt")
    with pytest.raises(ValueError, match=r"opt000010\.pt holds the state of an optimizer"):
        script_util.open_diffusion(folder / "opt000010.pt")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*model000011\.pt; did you mean model000010\.pt"):
        script_util.open_diffusion(folder / "model000011.pt")


def test_half_precision_on_a_cpu_only_if_asked(run, classifier_run):
    (folder, flags, _), (other, _, _) = run, classifier_run
    rewrite(folder, use_fp16=True)
    rewrite(other, classifier_use_fp16=True)
    model, _, found = script_util.open_diffusion(folder / "model000010.pt")
    assert (model.dtype, found) == (torch.float32, flags)
    model, _, found = script_util.open_diffusion(folder / "model000010.pt", {"use_fp16": True})
    assert (model.dtype, found["use_fp16"]) == (torch.float16, True)
    assert script_util.open_classifier(other / "model000003.pt")[0].dtype == torch.float32
    model, found = script_util.open_classifier(other / "model000003.pt", {"classifier_use_fp16": True})
    assert (model.dtype, found["classifier_use_fp16"]) == (torch.float16, True)


def test_the_device_is_where_the_network_lives(run):
    rewrite(run[0], use_fp16=True)
    model, _, _ = script_util.open_diffusion(run[0] / "model000010.pt", device="meta")
    assert model.label_emb.weight.device.type == "meta"
    assert model.dtype == torch.float16


def test_a_film_network_from_the_path_alone(tmp_path):
    flags = tiny(network="film", num_channels=6, channel_mult="1,2", vector_channels=5, dropout=0.25, learn_sigma=True)
    torch.manual_seed(0)
    model = script_util.create_model_and_diffusion(**flags)[0]
    assert model.mid[0].dropout.p == 0.25 and model.dims == [6, 6, 12] and model.channels == 3
    checkpoint.save(model.state_dict(), tmp_path / "model000010.pt")
    checkpoint.write_config(tmp_path, "diffusion", flags)
    opened, _, told = script_util.open_diffusion(tmp_path / "model000010.pt")
    assert told == flags and not opened.training
    x, t, vector = torch.randn(2, 3, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5)
    assert torch.equal(opened(x, t, vector=vector), model.eval()(x, t, vector=vector))
    assert opened(x, t).shape == (2, 6, 8, 8)


def test_a_classifier_of_a_process_that_ends_in_pure_noise_needs_no_prediction():
    flags = script_util.classifier_and_diffusion_defaults() | {"image_size": 32, "classifier_width": 64}
    _, diffusion = script_util.create_classifier_and_diffusion(**flags | {"noise_schedule": "cosine+zero_snr"})
    assert diffusion.alphas_cumprod[-1] == 0
    _, usual = script_util.create_classifier_and_diffusion(**flags)
    assert usual.model_mean_type == script_util.ModelMeanType.EPSILON
