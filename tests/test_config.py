"""Options, flags and their texts: the original's flags and defaults in full, what may be typed, and what may not."""

import argparse
import ast
import inspect
import math
import subprocess
import sys

import pytest

from guided_diffusion import checks, config, network_options, sampling_options, sizes, training_options
from guided_diffusion.config import RunOptions
from guided_diffusion.network_options import ClassifierOptions, DiffusionOptions, ModelOptions, SuperResOptions
from guided_diffusion.sampling_options import ClassifierSampleOptions, NLLOptions, SampleOptions, SuperResSampleOptions
from guided_diffusion.training_options import ClassifierTrainOptions, SuperResTrainOptions, TrainOptions, WatchOptions

MODULES = config, network_options, training_options, sampling_options  # where options are written

# The original's flags, as its parsers printed them.
MODEL = {
    "image_size": 64, "num_channels": 128, "num_res_blocks": 2, "num_heads": 4, "num_heads_upsample": -1,
    "num_head_channels": -1, "attention_resolutions": "16,8", "channel_mult": "", "dropout": 0.0, "class_cond": False,
    "use_checkpoint": False, "use_scale_shift_norm": True, "resblock_updown": False, "use_fp16": False,
    "use_new_attention_order": False,
}
DIFFUSION = {
    "learn_sigma": False, "diffusion_steps": 1000, "noise_schedule": "linear", "timestep_respacing": "",
    "use_kl": False, "predict_xstart": False, "rescale_timesteps": False, "rescale_learned_sigmas": False,
}
CLASSIFIER = {
    "image_size": 64, "classifier_use_fp16": False, "classifier_width": 128, "classifier_depth": 2,
    "classifier_attention_resolutions": "32,16,8", "classifier_use_scale_shift_norm": True,
    "classifier_resblock_updown": True, "classifier_pool": "attention",
}
TRAIN = {
    "data_dir": "", "schedule_sampler": "uniform", "lr": 1e-4, "weight_decay": 0.0, "lr_anneal_steps": 0,
    "batch_size": 1, "microbatch": -1, "ema_rate": "0.9999", "log_interval": 10, "save_interval": 10000,
    "resume_checkpoint": "", "use_fp16": False, "fp16_scale_growth": 1e-3,
}
SAMPLE = {"clip_denoised": True, "num_samples": 10000, "batch_size": 16, "use_ddim": False, "model_path": ""}
CLASSIFIER_TRAIN = {
    "data_dir": "", "val_data_dir": "", "noised": True, "iterations": 150000, "lr": 3e-4, "weight_decay": 0.0,
    "anneal_lr": False, "batch_size": 4, "microbatch": -1, "schedule_sampler": "uniform", "resume_checkpoint": "",
    "log_interval": 10, "eval_interval": 5, "save_interval": 10000,
}
SUPER_RES = {"large_size": 256, "small_size": 64} | {
    name: default
    for name, default in MODEL.items()
    if name not in ("image_size", "channel_mult", "use_new_attention_order")
}

# What its users missed.
PROCESS = {"predict": "", "loss_weight": "unit", "sigma_data": 0.5, "sigma_small": False, "learned_variance": "range"}
RUN = {"seed": 0, "device": "", "precision": "", "log_dir": "", "log_formats": "", "preset": ""}
DATA = {"image_channels": 3, "num_classes": 1000}
MORE_TRAINING = {
    "grad_clip": 0.0, "max_bad_steps": 100, "num_workers": 1, "random_flip": True, "skip_bad_images": False,
    "label_from": "auto", "background": "white", "resume": "auto", "force": False, "lr_schedule": "linear",
    "lr_warmup": 0, "lr_min": 0.0, "keep_last": 0,
    "keep_every": 0, "keep_best": False, "background_save": True, "max_minutes": 0.0, "beta2": 0.999,
    "checkpoint_dir": "", "sharding": "none", "compile": False, "channels_last": False,
}
MORE_AVERAGES = {
    "iterations": 0, "random_crop": False, "ema_warmup": True, "ema_halflife": "", "ema_power": "", "val_data_dir": "",
    "eval_interval": 100,
}
DROPOUT = {"class_dropout": 0.0, "conv_resample": True, "checkpoint_levels": 0, "residual_rescale": False}
MORE_MODEL = DROPOUT | {"network": "adm", "vector_channels": 0}
MORE_SAMPLING = {
    "classes": "", "save_as": "npz", "grid": True, "frames": 0, "eta": 0.0, "sampler": "", "steps": 0, "spacing": "",
    "guidance_scale": 1.0, "guidance_batched": True, "guidance_rescale": 0.0,
    "guide_path": "", "guidance_interval": "", "prompts": (), "prompt_vectors": "",
    "guidance_projected": 1.0, "dynamic_threshold": 0.0, "sampler_options": "", "brownian": False,
    "reuse_every": 1, "reuse_depth": 1, "compile": False, "channels_last": False,
}
MORE_STEERING = {
    "classifier_scale_end": "", "classifier_marginal": 1.0, "classifier_normalize": 0.0, "classifier_interval": "",
    "classifier_every": 1, "guidance_at": "x_t",
}
MORE_CLASSIFIER = {"classifier_channel_mult": "", "classifier_num_head_channels": 64, "classifier_dropout": 0.0,
                   "classifier_residual_rescale": False}  # fmt: skip
WATCH = {
    "sample_interval": 0, "eval_every": 0, "eval_samples": 500, "eval_extractor": "inception", "sample_steps": 50,
}
MORE_SUPER_RES = {"channel_mult": "", "use_new_attention_order": False}
ENLARGING = {name: value for name, value in MORE_SAMPLING.items() if name not in ("prompts", "prompt_vectors")}

PROGRAMS = {
    "image_train": (
        (TrainOptions, WatchOptions, ModelOptions, DiffusionOptions, RunOptions),
        TRAIN | MODEL | DIFFUSION,
        35,
        RUN | DATA | PROCESS | MORE_MODEL | MORE_TRAINING | MORE_AVERAGES | WATCH,
    ),
    "image_sample": (
        (SampleOptions, ModelOptions, DiffusionOptions, RunOptions),
        SAMPLE | MODEL | DIFFUSION,
        28,
        RUN | DATA | PROCESS | MORE_MODEL | MORE_SAMPLING,
    ),
    "classifier_train": (
        (ClassifierTrainOptions, ClassifierOptions, DiffusionOptions, RunOptions),
        CLASSIFIER_TRAIN | CLASSIFIER | DIFFUSION,
        30,
        RUN | DATA | PROCESS | MORE_TRAINING | MORE_CLASSIFIER | {"random_crop": True},
    ),
    "classifier_sample": (
        (ClassifierSampleOptions, ModelOptions, ClassifierOptions, DiffusionOptions, RunOptions),
        SAMPLE | {"classifier_path": "", "classifier_scale": 1.0} | MODEL | DIFFUSION | CLASSIFIER,
        37,
        RUN | DATA | PROCESS | MORE_MODEL | MORE_SAMPLING | MORE_STEERING | MORE_CLASSIFIER,
    ),
    "super_res_train": (
        (SuperResTrainOptions, SuperResOptions, DiffusionOptions, RunOptions),
        TRAIN | SUPER_RES | DIFFUSION,
        34,
        RUN | DATA | PROCESS | DROPOUT | MORE_TRAINING | MORE_AVERAGES | MORE_SUPER_RES | {"low_res_noise": 0.0},
    ),
    "super_res_sample": (
        (SuperResSampleOptions, SuperResOptions, DiffusionOptions, RunOptions),
        SAMPLE | {"base_samples": ""} | SUPER_RES | DIFFUSION,
        28,
        RUN | DATA | PROCESS | DROPOUT | ENLARGING | MORE_SUPER_RES
        | {"repeat_base": False, "label_from": "auto", "background": "white", "low_res_noise": 0.0},
    ),
    "image_nll": (
        (NLLOptions, ModelOptions, DiffusionOptions, RunOptions),
        {"data_dir": "", "clip_denoised": True, "num_samples": 1000, "batch_size": 1, "model_path": ""}
        | MODEL | DIFFUSION,
        28,
        RUN | DATA | PROCESS | MORE_MODEL | {"label_from": "auto", "background": "white", "num_workers": 1},
    ),
}
EVERY_GROUP = {group for groups, *_ in PROGRAMS.values() for group in groups}
IMAGE_SAMPLE = PROGRAMS["image_sample"][0]


def sample_args(*argv):
    return config.parse("draw images", *IMAGE_SAMPLE, argv=argv)


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_flag_of_the_original_with_its_default(program):
    groups, original, count, more = PROGRAMS[program]
    assert len(original) == count
    args = vars(config.parse("a program", *groups, argv=[]))
    assert args.pop("explicit") == set()
    assert args == original | more
    assert {name: type(value) for name, value in args.items()} == {
        name: type(value) for name, value in (original | more).items()
    }


def test_each_option_is_written_once_and_explained():
    written = [
        node.target.id
        for module in MODULES
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.AnnAssign) and node.value.func.id == "option"
    ]
    assert len(written) == len(set(written)) > 70
    for group in EVERY_GROUP:
        for name, field in config.options(group).items():
            assert len(field.metadata["help"]) > 10, name
            assert field.type is type(field.default), name


def test_help_shows_each_flag_with_its_help_and_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # no line breaks
    with pytest.raises(SystemExit) as stop:
        sample_args("--help")
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, field in config.options(*IMAGE_SAMPLE).items():
        assert f"--{name} " in text
        assert f"{field.metadata['help']} (default: {field.default})".replace("(default: )", "(default: '')") in text


def test_options_and_their_checks_need_only_the_standard_library():
    code = (
        "import sys; before = set(sys.modules); import guided_diffusion.checks, guided_diffusion.network_options;"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert set(loaded) - set(sys.stdlib_module_names) == {"guided_diffusion"}


# -------------------------------------------------------------------------------------------------------- what is typed


def test_values_have_the_type_of_the_default():
    args = sample_args(
        "--num_samples", "1e5", "--batch_size=100_000", "--dropout", "1e-1", "--class_cond", "true",
        "--use_scale_shift_norm", "f", "--use_ddim", "--attention_resolutions", "32,16", "--num_heads_upsample", "-1",
        "--classes", "", "--prompts", "a three", "the digit 7",
    )
    assert (args.num_samples, type(args.num_samples)) == (100000, int)
    assert (args.batch_size, args.dropout, args.num_heads_upsample) == (100000, 0.1, -1)
    assert (args.class_cond, args.use_scale_shift_norm, args.use_ddim) == (True, False, True)
    assert (args.attention_resolutions, args.classes) == ("32,16", "")
    assert args.prompts == ("a three", "the digit 7")
    assert args.explicit == {
        "num_samples", "batch_size", "dropout", "class_cond", "use_scale_shift_norm", "use_ddim",
        "attention_resolutions", "num_heads_upsample", "classes", "prompts",
    }
    assert config.explicit_flags(args)["num_samples"] == 100000
    assert len(config.explicit_flags(args)) == 10


def test_a_default_that_is_typed_is_explicit():
    assert sample_args("--num_channels", "128").explicit == {"num_channels"}


def test_s08_65_a_bare_boolean_is_true_and_fractions_are_factors():
    """On purpose unlike the original, which refuses both."""
    assert sample_args("--class_cond", "--num_samples", "3").class_cond is True
    assert sizes.parse_channel_mult(sample_args("--channel_mult", "0.5,1").channel_mult) == (0.5, 1)


@pytest.mark.parametrize("text, value", [("yes", True), ("TRUE", True), ("t", True), ("Y", True), ("1", True),
                                         ("no", False), ("False", False), ("F", False), ("n", False), ("0", False)])
def test_booleans(text, value):
    assert config.str2bool(text) is value
    assert config.str2bool(value) is value


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--class_cond", "maybe"], "argument --class_cond: boolean value expected, got 'maybe'"),
        (["--num_samples", "1.5"], "argument --num_samples: whole number expected, got '1.5'"),
        (["--num_samples", "inf"], "argument --num_samples: whole number expected, got 'inf'"),
        (["--num_samples", "many"], "argument --num_samples: whole number expected, got 'many'"),
        (["--num_samples", "1e-3"], "argument --num_samples: whole number expected, got '1e-3'"),
        (["--dropout", "nan"], "argument --dropout: number expected, got 'nan'"),
        (["--dropout", "a"], "argument --dropout: number expected, got 'a'"),
        (["--dropout"], "argument --dropout: expected one argument"),
        (["--num_chanels", "3"], "unknown flag --num_chanels; did you mean --num_channels"),
        (["--num_chanels=3"], "unknown flag --num_chanels; did you mean --num_channels"),
        (["--qqqq", "3"], r"unknown flag --qqqq \(see --help\)"),
        (["--class_cond", "True", "False"], "unknown flag False"),
        (["--use_", "True"], "ambiguous option: --use_ could match --use_"),
    ],
)
def test_what_cannot_be_read_is_one_line(argv, message):
    with pytest.raises(ValueError, match=message):
        sample_args(*argv)


def test_choices():
    args = config.parse("", ClassifierOptions, argv=["--classifier_pool", "spatial"])
    assert args.classifier_pool == "spatial"
    with pytest.raises(ValueError, match=r"classifier_pool: invalid choice: 'maximum' .*attention.*spatial_v2"):
        config.parse("", ClassifierOptions, argv=["--classifier_pool", "maximum"])
    with pytest.raises(ValueError, match=r"schedule_sampler: invalid choice: 'even' .*uniform.*loss-second-moment"):
        config.parse("", TrainOptions, argv=["--schedule_sampler", "even"])


def test_abbreviations_as_in_argparse():
    assert sample_args("--num_sam", "7").num_samples == 7


def test_groups_that_share_a_name_must_agree():
    with pytest.raises(ValueError, match=r"option lr has two defaults: 0\.0001 and 0\.0003"):
        config.parse("", TrainOptions, ClassifierTrainOptions, argv=[])
    assert config.parse("", ModelOptions, ClassifierOptions, argv=["--image_size", "8"]).image_size == 8


def test_flags_of_selects_the_options_of_the_groups():
    args = sample_args("--learn_sigma", "--image_size", "8")
    assert config.flags_of(args, DiffusionOptions) == DIFFUSION | PROCESS | {"learn_sigma": True}
    assert config.flags_of(args, ModelOptions) == MODEL | MORE_MODEL | DATA | {"image_size": 8}


def test_the_listing_is_aligned_and_marks_what_was_typed():
    args = sample_args("--num_samples", "5")
    lines = config.describe(args).splitlines()
    assert len(lines) == len(config.options(*IMAGE_SAMPLE))
    assert "* num_samples              5" in lines
    assert "  noise_schedule           'linear'" in lines
    assert [line for line in lines if line.startswith("*")] == ["* num_samples              5"]


# ------------------------------------------------------------------------------------------------------- run_program


@pytest.mark.parametrize(
    "error, code, line",
    [
        (ValueError("two\n  lines"), 2, "error: two lines\n"),
        (FileNotFoundError("no data"), 2, "error: no data\n"),
        (NotImplementedError("unknown beta schedule: x"), 2, "error: unknown beta schedule: x\n"),
        (ImportError("no torch_fidelity"), 2, "error: no torch_fidelity\n"),
        (FloatingPointError("the loss is nan"), 2, "error: the loss is nan\n"),
        (ValueError(), 2, "error: ValueError\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_bad_input_ends_a_program_with_one_line(error, code, line, capsys, monkeypatch):
    def main():
        raise error

    monkeypatch.delenv("GD_DEBUG", raising=False)
    with pytest.raises(SystemExit) as stop:
        config.run_program(main)
    assert stop.value.code == code
    assert capsys.readouterr().err == line


def test_debugging_lets_the_traceback_through(monkeypatch):
    monkeypatch.setenv("GD_DEBUG", "1")
    with pytest.raises(ValueError, match="unknown flag --imagesize"):
        config.run_program(lambda: sample_args("--imagesize", "8"))


def test_faults_of_the_code_keep_their_traceback_and_success_is_silent(capsys):
    with pytest.raises(KeyError):
        config.run_program(lambda: {}["missing"])
    assert config.run_program(lambda: None) is None
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------------------------------------------ lists in texts


def test_channel_mult():
    assert sizes.parse_channel_mult("") is None
    assert sizes.parse_channel_mult("0.5,1, 2") == (0.5, 1, 2)
    assert [type(factor) for factor in sizes.parse_channel_mult("0.5,1,2")] == [float, int, int]
    assert sizes.parse_channel_mult((1, 2)) == (1, 2)


@pytest.mark.parametrize("text", ["1,,2", "1;2", "a", "0,1", "-1", "nan", "1,"])
def test_channel_mult_that_cannot_be_read(text):
    with pytest.raises(ValueError, match=rf"cannot read channel_mult '{text}': give positive numbers with commas"):
        sizes.parse_channel_mult(text)


@pytest.mark.parametrize(
    "image_size, mult",
    [
        (512, (0.5, 1, 1, 2, 2, 4, 4)),
        (256, (1, 1, 2, 2, 4, 4)),
        (128, (1, 1, 2, 3, 4)),
        (64, (1, 2, 3, 4)),
        (32, (1, 2, 2, 2)),
        (48, (1, 2, 2, 2)),
        (28, (1, 2, 2)),
        (16, (1, 2, 2)),
        (8, (1, 2)),
        (7, (1,)),
        (6, (1,)),
        (4, (1,)),
    ],
)
def test_default_channel_mult(image_size, mult):
    assert sizes.default_channel_mult(image_size) == mult
    assert image_size % 2 ** (len(mult) - 1) == 0


@pytest.mark.parametrize("image_size", [96, 192, 1024, 65, 72, 36, 9, 0, -8])
def test_sizes_without_default_channel_mult(image_size):
    with pytest.raises(ValueError, match=f"unsupported image size: {image_size} .*--channel_mult.*1,2,2"):
        sizes.default_channel_mult(image_size)


def test_upsamplers_have_their_own_factors_at_512():
    assert sizes.default_channel_mult(512, super_res=True) == (1, 1, 2, 2, 4, 4)
    assert sizes.default_channel_mult(256, super_res=True) == (1, 1, 2, 2, 4, 4)
    assert sizes.default_channel_mult(64, super_res=True) == (1, 2, 3, 4)


def test_levels_are_those_given_or_those_of_the_table():
    assert sizes.levels("0.5,2", 64) == (0.5, 2)
    assert sizes.levels("", 64) == (1, 2, 3, 4)
    assert sizes.levels("", 512, super_res=True) == (1, 1, 2, 2, 4, 4)


def test_attention_in_pixels_becomes_factors():
    assert sizes.attention_downsampling("32,16,8", 64) == (2, 4, 8)
    assert sizes.attention_downsampling("13,100", 28) == (2, 0)
    assert sizes.attention_downsampling("", 64) == ()
    for text in ("16;8", "0", "1.5", "-8"):
        with pytest.raises(ValueError, match=f"cannot read attention_resolutions '{text}'"):
            sizes.attention_downsampling(text, 64)


def test_classes():
    assert checks.parse_classes("", 10, 5) is None
    assert checks.parse_classes("all", 3, 7) == [0, 1, 2, 0, 1, 2, 0]
    assert checks.parse_classes("3, 7", 10, 5) == [3, 7, 3, 7, 3]
    assert checks.parse_classes("9", 10, 2) == [9, 9]
    assert checks.parse_classes("dog,0,cat", 2, 4, ["cat", "dog"]) == [1, 0, 0, 1]
    assert checks.parse_classes("0", 2, 1, ["1", "0"]) == [0]  # a number is a label, whatever the names


@pytest.mark.parametrize(
    "text, message",
    [
        ("3,10", "class 10 in --classes is out of range: labels run from 0 to 9"),
        ("-1", "unknown class '-1' in --classes"),
        ("3,", "unknown class '' in --classes"),
        ("catt", "unknown class 'catt' in --classes; did you mean cat"),
    ],
)
def test_classes_that_are_not_there(text, message):
    with pytest.raises(ValueError, match=message):
        checks.parse_classes(text, 10, 4, ["cat", "dog"])


def test_an_unconditional_model_takes_no_classes():
    checks.check_classes({"class_cond": True}, "3,7")
    checks.check_classes({"class_cond": False}, "")
    with pytest.raises(ValueError, match="--classes 3,7: the model is unconditional"):
        checks.check_classes({"class_cond": False}, "3,7")


# ------------------------------------------------------------------------------------------------------ flags by hand


def test_add_flag_takes_any_percent_sign_and_no_help(capsys):
    parser = argparse.ArgumentParser()
    config.add_flag(parser, "share", 0.5, "100% of it")
    config.add_flag(parser, "name", None)
    parser.print_help()
    text = capsys.readouterr().out
    assert "100% of it (default: 0.5)" in text
    assert "--name STR     (default: None)" in text
    assert math.isclose(parser.parse_args(["--share", "0.25"]).share, 0.25)
