"""The commands of the READMEs of guided-diffusion and improved-diffusion, word for word but for their sizes."""

import ast
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch as th
from test_config import MODULES
from test_programs import done, rows, samples

from guided_diffusion import checkpoint, config, script_util

PACKAGE = Path(config.__file__).parent
SIZES = [  # (in the README, here), in this order
    (r"--(image|large)_size \d+", r"--\1_size 8"),
    (r"--small_size \d+", "--small_size 4"),
    (r"--num_channels \d+", "--num_channels 32"),
    (r"--num_head_channels \d+", "--num_head_channels 32"),
    (r"--num_res_blocks \d", "--num_res_blocks 1"),
    (r"--attention_resolutions [\d,]+", "--attention_resolutions 4"),
    (r"--classifier_attention_resolutions [\d,]+", "--classifier_attention_resolutions 4"),
    (r"--classifier_width \d+", "--classifier_width 32"),
    (r"--classifier_depth \d+", "--classifier_depth 1"),
    (r"--batch_size \d+", "--batch_size 2"),
    (r"--num_samples \d+", "--num_samples 2"),
    (r"--timestep_respacing (ddim)?\d+", r"--timestep_respacing \g<1>2"),
    (r"--iterations \d+", "--iterations 2"),
]
# Head channels of the classifier are 64 in the original, without a flag.
OWN = "--classifier_width 32 --classifier_num_head_channels 32 --classifier_depth 1"

SAMPLE = "--batch_size 4 --num_samples 100 --timestep_respacing 250"
MODEL_64 = (
    "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --dropout 0.1 --image_size 64"
    " --learn_sigma True --noise_schedule cosine --num_channels 192 --num_head_channels 64 --num_res_blocks 3"
    " --resblock_updown True --use_new_attention_order True --use_fp16 True --use_scale_shift_norm True"
)
MODEL_128 = (
    "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --image_size 128 --learn_sigma True"
    " --noise_schedule linear --num_channels 256 --num_heads 4 --num_res_blocks 2 --resblock_updown True"
    " --use_fp16 True --use_scale_shift_norm True"
)
MODEL_256 = MODEL_128.replace("--image_size 128", "--image_size 256").replace("--num_heads 4", "--num_head_channels 64")
MODEL_512 = MODEL_256.replace("--image_size 256", "--image_size 512").replace("--use_fp16 True", "--use_fp16 False")
UPSAMPLER = (
    "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --large_size 256 --small_size 64"
    " --learn_sigma True --noise_schedule linear --num_channels 192 --num_heads 4 --num_res_blocks 2"
    " --resblock_updown True --use_fp16 True --use_scale_shift_norm True"
)
UPSAMPLER_512 = UPSAMPLER.replace("32,16,8", "32,16").replace("256", "512").replace("size 64", "size 128")
UPSAMPLER_512 = UPSAMPLER_512.replace("--num_heads 4", "--num_head_channels 64")
LSUN = (
    "--attention_resolutions 32,16,8 --class_cond False --diffusion_steps 1000 --dropout 0.1 --image_size 256"
    " --learn_sigma True --noise_schedule linear --num_channels 256 --num_head_channels 64 --num_res_blocks 2"
    " --resblock_updown True --use_fp16 True --use_scale_shift_norm True"
)
DDIM = (
    "--attention_resolutions 32,16,8 --class_cond True --image_size 128 --learn_sigma True --num_channels 256"
    " --num_heads 4 --num_res_blocks 2 --resblock_updown True --use_fp16 True --use_scale_shift_norm True"
)
CLASSIFIER = (
    "--image_size 128 --classifier_attention_resolutions 32,16,8 --classifier_depth 2 --classifier_width 128"
    " --classifier_pool attention --classifier_resblock_updown True --classifier_use_scale_shift_norm True"
)


def guided(flags, size, scale, model="", more=""):
    model = model or f"{size}x{size}_diffusion"
    paths = f"--classifier_path models/{size}x{size}_classifier.pt --model_path models/{model}.pt"
    return f"classifier_sample.py {flags} --classifier_scale {scale} {paths} {more} {SAMPLE}"


GUIDED_DIFFUSION = {
    "64": guided(MODEL_64, 64, 1.0, more="--classifier_depth 4"),
    "128": guided(MODEL_128, 128, 0.5),
    "256": guided(MODEL_256, 256, 1.0),
    "256 uncond": guided(MODEL_256.replace("_cond True", "_cond False"), 256, 10.0, "256x256_diffusion_uncond"),
    "512": guided(MODEL_512, 512, 4.0),
    "64 -> 256": f"super_res_sample.py {UPSAMPLER} --model_path models/64_256_upsampler.pt"
                 f" --base_samples 64_samples.npz {SAMPLE}",
    "128 -> 512": f"super_res_sample.py {UPSAMPLER_512} --model_path models/128_512_upsampler.pt"
                  f" --base_samples 64_samples.npz {SAMPLE}",
    "bedroom": f"image_sample.py {LSUN} --model_path models/lsun_bedroom.pt {SAMPLE}",
    "cat": f"image_sample.py {LSUN} --model_path models/lsun_cat.pt {SAMPLE}",
    "horse": f"image_sample.py {LSUN} --model_path models/lsun_horse.pt {SAMPLE}",
    "horse, no dropout": f"image_sample.py {LSUN.replace('dropout 0.1', 'dropout 0.0')} --model_path"
                         f" models/lsun_horse_nodropout.pt {SAMPLE}",
    "25 steps": f"classifier_sample.py {DDIM} --classifier_scale 1.0 --classifier_path models/128x128_classifier.pt"
                " --model_path models/128x128_diffusion.pt --classifier_use_fp16 True --batch_size 4"
                " --num_samples 50000 --timestep_respacing ddim25 --use_ddim True",
}  # fmt: skip
TRAIN_CLASSIFIER = (
    "classifier_train.py --data_dir images --iterations 300000 --anneal_lr True --batch_size 256 --lr 3e-4"
    f" --save_interval 10000 --weight_decay 0.05 {CLASSIFIER}"
)

MODEL = "--image_size 64 --num_channels 128 --num_res_blocks 3"
PROCESS = "--diffusion_steps 4000 --noise_schedule linear"
ENLARGING = "--num_channels 192 --num_res_blocks 2 --learn_sigma True --class_cond True"
IMPROVED_DIFFUSION = [
    f"image_train.py --data_dir images {MODEL} {PROCESS} --lr 1e-4 --batch_size 128",
    f"image_sample.py --model_path MODEL {MODEL} {PROCESS}",
    f"image_sample.py --model_path MODEL {MODEL} {PROCESS} --timestep_respacing 250",
    f"image_sample.py --model_path MODEL {MODEL} {PROCESS} --timestep_respacing ddim250 --use_ddim True",
    f"image_nll.py --model_path MODEL --data_dir images {MODEL} {PROCESS} --timestep_respacing 250",
    f"super_res_train.py --data_dir images {PROCESS} --large_size 256 --small_size 64 {ENLARGING} --lr 3e-4"
    " --batch_size 128 --schedule_sampler loss-second-moment --use_kl True",
    f"super_res_sample.py --model_path MODEL --base_samples 64_samples.npz {PROCESS} --large_size 256 --small_size 64"
    f" {ENLARGING}",
]


def tiny(command):
    for pattern, replacement in SIZES:
        command = re.sub(pattern, replacement, command)
    return command


def flags_in(command, defaults):
    typed = dict(re.findall(r"--(\w+) (\S+)", command))
    return {name: type(value)(config.str2bool(typed[name]) if isinstance(value, bool) else typed[name])
            if name in typed else value for name, value in defaults.items()}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Where the READMEs' commands are typed: images, base samples, and a place for checkpoints."""
    folder, rng = tmp_path_factory.mktemp("readmes"), np.random.default_rng(0)
    np.savez(folder / "64_samples.npz", arr_0=rng.integers(0, 256, (3, 4, 4, 3), np.uint8), arr_1=np.arange(3))
    np.savez(folder / "images.npz", arr_0=rng.integers(0, 256, (6, 8, 8, 3), np.uint8), arr_1=np.arange(6) % 3)
    (folder / "models").mkdir()
    return folder


def put_models(command, home):
    """Checkpoints with random weights for the flags of a command, under the published names and without config.json."""
    paths = dict(re.findall(r"--(model_path|classifier_path) (\S+)", command))
    kind = "super_res" if "super_res" in command else "diffusion"
    create, defaults = {"super_res": (script_util.sr_create_model_and_diffusion,
                                      script_util.sr_model_and_diffusion_defaults()),
                        "diffusion": (script_util.create_model_and_diffusion,
                                      script_util.model_and_diffusion_defaults())}[kind]  # fmt: skip
    th.manual_seed(0)
    model, _ = create(**flags_in(command, defaults))
    checkpoint.save(model.state_dict(), home / paths["model_path"])
    if "classifier_path" in paths:
        flags = flags_in(f"{command} {OWN}", script_util.classifier_and_diffusion_defaults())
        classifier, _ = script_util.create_classifier_and_diffusion(**flags)
        checkpoint.save(classifier.state_dict(), home / paths["classifier_path"])


@pytest.mark.parametrize("name", GUIDED_DIFFUSION)
def test_sampling_as_in_the_readme_of_guided_diffusion(name, home, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    command = tiny(GUIDED_DIFFUSION[name])
    command += f" {OWN}" if "classifier_path" in command else ""
    put_models(command, home)
    program, *words = shlex.split(command)
    done(program[:-3], f"{shlex.join(words)} --log_dir {tmp_path}")
    _, images, labels = samples(tmp_path)
    assert images.shape == (2, 8, 8, 3) and images.dtype == np.uint8
    assert (labels is not None) == ("class_cond True" in command or "classifier_path" in command)


def test_training_a_classifier_as_in_the_readme(home, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    program, *words = shlex.split(tiny(TRAIN_CLASSIFIER).replace("images", "images.npz"))
    done(program[:-3], f"{shlex.join(words)} {OWN} --num_workers 0 --log_dir {tmp_path}")
    assert [row["step"] for row in rows(tmp_path)] == ["1", "2"] and (tmp_path / "model000002.pt").exists()


def test_the_readme_of_improved_diffusion(home, tmp_path, monkeypatch):
    """One after the other; what was trained last is MODEL."""
    monkeypatch.chdir(home)
    model = None
    for number, command in enumerate(map(tiny, IMPROVED_DIFFUSION)):
        program, *words = shlex.split(command.replace("images", "images.npz").replace("MODEL", str(model)))
        out = tmp_path / str(number)
        if "_train" in program:
            limits = "--lr_anneal_steps 2 --num_workers 0"
        else:
            limits = "" if "respacing" in command else "--timestep_respacing 2"
            limits += " --num_samples 2" + (" --num_workers 0" if "nll" in program else "")
        done(program[:-3], f"{shlex.join(words)} {limits} --log_dir {out}")
        if "_train" in program:
            model = out / "ema_0.9999_000002.pt"
            (out / "config.json").unlink()
        elif "nll" not in program:
            assert samples(out)[1].shape == (2, 8, 8, 3)
    assert (tmp_path / "4" / "vb_terms.npz").exists()


# ------------------------------------------------------------------------------------------------------ every option


def names_read():
    """Names that code outside the definitions of options mentions: attributes, parameters, and words of texts."""
    found, definitions = set(), {Path(module.__file__) for module in MODULES}
    for path in [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "scripts").glob("*.py"),
                 *(PACKAGE.parent / "evaluations").glob("*.py")]:  # fmt: skip
        tree = ast.parse(path.read_text())
        tree.body = [node for node in tree.body if not (path in definitions and isinstance(node, ast.ClassDef))]
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                found.add(node.attr)
            elif isinstance(node, ast.arg):
                found.add(node.arg)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "--" not in node.value:
                found |= set(node.value.split())
    return found


def test_every_flag_is_read_somewhere():
    groups = {group for module in MODULES for name, group in vars(module).items() if name.endswith("Options")}
    assert len(groups) > 12
    known = names_read()
    for group in groups:
        assert set(config.options(group)) <= known, group
