"""The four programs of the cascade from text to image, end to end at tiny size, and what they say to bad input."""

import json
import re
import shutil
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch as th
from PIL import Image
from test_programs import BIN, done, names, refused, rows, same, stranger

from guided_diffusion import checkpoint, config, presets, sample_store
from guided_diffusion.network_options import (
    ClipOptions,
    ClipSizes,
    DecoderOptions,
    DecoderProcessOptions,
    PriorOptions,
    PriorProcessOptions,
)
from guided_diffusion.sample_store import SampleStore
from guided_diffusion.sampling_options import TextToImageOptions
from guided_diffusion.text_to_image import models, prompting
from guided_diffusion.text_to_image.clip import classify
from guided_diffusion.text_to_image.decoder import Decoder
from guided_diffusion.text_to_image.prior import Prior
from guided_diffusion.training_options import ClipTrainOptions, DecoderTrainOptions, PictureOptions, PriorTrainOptions

TRAIN = "--batch_size 8 --lr 1e-2 --log_interval 1 --random_flip False --num_workers 0"
SIZE = "--image_size 8 --image_channels 1"
CLIP = (
    f"{SIZE} --clip_size 16 --image_width 32 --image_layers 1 --image_heads 2 --text_width 32 --text_layers 1"
    " --text_heads 2 --context_length 24"
)
PRIOR = "--prior_width 32 --prior_layers 1 --prior_heads 2 --diffusion_steps 20"
DECODER = (
    f"{SIZE} --num_channels 32 --num_res_blocks 1 --channel_mult 1,1 --attention_resolutions 4 --text_width 32"
    " --text_layers 1 --text_heads 2 --context_length 24 --diffusion_steps 10"
)
KINDS = {"clip": CLIP, "prior": PRIOR, "decoder": DECODER}
PROMPTS = '--prompts "a dark picture" "a light picture"'
WITH_PRIOR = "--prior_path prior/ema_0.9_000004.pt --prior_steps 5"
SAMPLE = "--num_samples 4 --batch_size 4 --timestep_respacing 3"


def write_data(path, count=24, **more):
    """Dark and light pictures with two texts each, one of them too long for the networks here."""
    rng = np.random.default_rng(0)
    y = np.arange(count) % 2
    images = np.clip(rng.normal(60 + 140 * y[:, None, None, None], 15, (count, 8, 8, 1)), 0, 255).astype(np.uint8)
    texts = np.array([["a dark picture", "dark, as dark as it can be"], ["a light picture", "something light"]])[y]
    np.savez(path, **{"arr_0": images, "arr_1": y, "texts": texts} | more)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The three networks, trained for 4 updates each, with validation."""
    home = tmp_path_factory.mktemp("cascade")
    write_data(home / "data.npz")
    write_data(home / "val.npz", 10)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        for kind in KINDS:
            train(kind, kind, "--iterations 4 --save_interval 2 --ema_rate 0.5,0.9")
    return home


def words(kind, folder, more="", data="data.npz"):
    clip = "" if kind == "clip" or "--clip_path" in more else "--clip_path clip/model000004.pt"
    return f"--data_dir {data} --val_data_dir val.npz --eval_interval 2 {KINDS[kind]} {TRAIN} {clip}" \
           f" --log_dir {folder} {more}"  # fmt: skip


def train(kind, folder, more=""):
    return done(f"{kind}_train", words(kind, folder, more))


def draw(home, folder, more=PROMPTS, prior=WITH_PRIOR, run=SAMPLE):
    """What is in the npz that is drawn, in the folder of the trained networks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        done("text_to_image_sample", f"--model_path decoder/ema_0.9_000004.pt {prior} {run} {more} --log_dir {folder}")
    (path,) = folder.glob("samples_*x8x8x1.npz")
    with np.load(path) as archive:
        return dict(archive)


@pytest.fixture
def here(home, monkeypatch):
    monkeypatch.chdir(home)
    return home


# ----------------------------------------------------------------------------------------------------------- training


def test_training_leaves_what_other_programs_leave(home):
    for kind in KINDS:
        files = [f"{part}{step}.{'json' if part == 'commit' else 'pt'}" for step in ("000002", "000004")
                 for part in ("commit", "ema_0.5_", "ema_0.9_", "model", "opt", "state")]  # fmt: skip
        assert names(home / kind) == sorted(["config.json", "log.txt", "progress.csv", "run.json", *files])
        table = rows(home / kind)
        assert [row["step"] for row in table] == ["1", "2", "3", "4"]
        assert all(float(row["loss"]) > 0 for row in table) and table[1]["val_loss"] and table[3]["val_loss"]
    assert all(0 <= float(row["acc@1"]) <= 1 for row in rows(home / "clip"))
    shares = [row["zero_shot"] for row in rows(home / "clip") if row["zero_shot"]]
    assert len(shares) == 2 and all(float(share) * 10 == pytest.approx(round(float(share) * 10)) for share in shares)
    with np.load(home / "val.npz") as held_out:
        x = th.from_numpy(held_out["arr_0"]).permute(0, 3, 1, 2) / 127.5 - 1
        texts = [held_out["texts"][k].tolist() for k in (0, 1)]
        found = classify(models.open_clip(home / "clip" / "ema_0.5_000004.pt"), x, texts)
        told = found == th.from_numpy(held_out["arr_1"])
    assert float(shares[1]) == pytest.approx(told.float().mean().item())
    assert re.search("1 of 4 texts are too long and are cut; the first to 'dark, as dark as it ca'",
                     (home / "prior" / "log.txt").read_text())  # fmt: skip


def test_config_json_tells_all_of_each_network(home):
    told = {kind: json.loads((home / kind / "config.json").read_text()) for kind in KINDS}
    assert {kind: content["kind"] for kind, content in told.items()} == {kind: kind for kind in KINDS}
    clip = told["clip"]["flags"]
    assert clip == config.defaults(ClipOptions) | {
        "image_size": 8, "image_channels": 1, "clip_size": 16, "image_width": 32, "image_layers": 1, "image_heads": 2,
        "text_width": 32, "text_layers": 1, "text_heads": 2, "context_length": 24,
    }  # fmt: skip
    known = {"path": "clip/model000004.pt",
             "fingerprint": models.fingerprint(models.open_clip(home / "clip" / "model000004.pt"))}  # fmt: skip
    assert told["prior"]["clip"] == told["decoder"]["clip"] == known
    prior = told["prior"]["flags"]
    assert (prior["clip_size"], prior["token_size"], prior["context_length"], prior["predict"]) == (16, 32, 24, "x0")
    assert (prior["sigma_small"], prior["noise_schedule"], prior["diffusion_steps"]) == (True, "cosine", 20)
    assert told["decoder"]["flags"].keys() == config.defaults(DecoderOptions, DecoderProcessOptions, ClipSizes).keys()
    assert told["prior"]["dropped"] == {"caption": 0.1}
    assert told["decoder"]["dropped"] == {"embedding": 0.1, "caption": 0.5}


def test_m3_15_checkpoints_hold_no_other_networks_weights(home):
    networks = {"clip": models.open_clip, "prior": lambda p: models.open_prior(p)[0],
                "decoder": lambda p: models.open_decoder(p)[0]}  # fmt: skip
    for kind, open_one in networks.items():
        path = home / kind / "model000004.pt"
        state, network = checkpoint.load(path), open_one(path)
        assert state.keys() == network.state_dict().keys() and not network.training
    assert not any(p.requires_grad for p in models.open_clip(home / "clip" / "model000004.pt").parameters())


def test_m3_21_held_out_pictures_are_those_of_their_own_file_and_24_weights_are_averaged(home):
    run = json.loads((home / "prior" / "run.json").read_text())
    assert "val.npz" in json.dumps(run)
    weights = [checkpoint.load(home / "prior" / f"{name}000004.pt") for name in ("model", "ema_0.9_")]
    assert not same(*weights)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_uninterrupted_one(kind, here, tmp_path):
    train(kind, tmp_path, "--iterations 2 --save_interval 2 --ema_rate 0.5,0.9")
    more = "" if kind == "clip" else "--clip_path ''"  # the run knows its CLIP
    train(kind, tmp_path, f"--iterations 4 --save_interval 2 --ema_rate 0.5,0.9 {more}")
    for name in ("model", "ema_0.5_", "ema_0.9_", "opt"):
        assert same(checkpoint.load(tmp_path / f"{name}000004.pt"), checkpoint.load(here / kind / f"{name}000004.pt"))


@pytest.mark.parametrize("kind, network", [("prior", Prior), ("decoder", Decoder)])
def test_m3_08_training_drops_conditions_and_validation_does_not(kind, network, here, tmp_path, monkeypatch):
    seen, real = {True: [], False: []}, network.forward

    def recorded(self, x, t, **cond):
        seen[self.training].append((cond["vector"] == 0).all(1))
        return real(self, x, t, **cond)

    monkeypatch.setattr(network, "forward", recorded)
    rate = "--caption_dropout 0.9" if kind == "prior" else "--embedding_dropout 0.9"
    train(kind, tmp_path, f"--iterations 2 {rate}")
    assert 0.5 < th.cat(seen[True]).float().mean() < 1
    assert sum(not each.any() for each in seen[False]) == 1  # the others measure the training batch for the log


def test_pictures_on_the_way(here, tmp_path):
    train("decoder", tmp_path, "--iterations 1 --sample_interval 1 --sample_steps 2")
    (picture,) = tmp_path.glob("samples*.png")
    assert Image.open(picture).size[0] >= 8


def test_two_processes_contrast_all_their_pairs(here, tmp_path):
    launcher = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2"]
    launcher[0] = "torchrun"
    more = "--iterations 4 --crop_padding 1 --batch_size"
    train("clip", tmp_path / "one", f"{more} 8")
    line = words("clip", tmp_path / "two", f"{more} 4").replace("data.npz", f"{here}/data.npz")
    stranger("scripts/clip_train.py", line.replace("val.npz", f"{here}/val.npz"), tmp_path, launcher)
    one, two = (rows(tmp_path / name) for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-4) and a["acc@1"] == b["acc@1"]
        assert float(a["grad_norm"]) == pytest.approx(float(b["grad_norm"]), rel=1e-3)


@pytest.mark.parametrize("kind, more, pattern", [
    ("clip", "--microbatch 4", "--microbatch 4: CLIP contrasts each pair with all others"),
    ("clip", "--batch_size 1", "--batch_size 1: CLIP learns from the contrasts of a batch, and one pair has none"),
    ("clip", "--sharding fsdp", "--sharding fsdp: CLIP is trained in one piece"),
    ("clip", "--precision bf16", "--precision bf16: this network, a small transformer, trains in fp32"),
    ("clip", "--data_dir plain.npz", "plain.npz has no array texts .* datasets/captions.py makes it"),
    ("clip", "--data_dir numbers.npz", r"texts is int64 \[24\]; it must be one text or as many for each of 24 images"),
    ("clip", "--data_dir pictures", "pictures is no npz, and captions come with the images of one"),
    ("clip", "--patch_size 5", "--patch_size 5 does not divide --image_size 8"),
    ("clip", "--crop_padding -1", "--crop_padding is a number of pixels"),
    ("prior", "--clip_path ''", "no CLIP given: --clip_path is empty"),
    ("prior", "--clip_path nowhere.pt", "nowhere.pt"),
    ("prior", "--clip_path decoder/model000004.pt", "decoder/model000004.pt .*decoder.*clip"),
    ("prior", "--clip_path bare/model000004.pt", "nothing tells what .*bare/model000004.pt is: put the config.json"),
    ("prior", "--precision fp16", "--precision fp16: this network"),
    ("prior", "--caption_dropout 1", "--caption_dropout is a probability from 0 to below 1, not 1.0"),
    ("prior", "--learn_sigma True", "--learn_sigma True: the prior predicts embeddings and no variance"),
    ("prior", "--prior_heads 3", "32 .*3"),
    ("decoder", "--embedding_dropout -0.1", "--embedding_dropout is a probability"),
    ("decoder", "--image_size 16", "--image_size 16: the CLIP was trained with image_size 8: give that"),
    ("decoder", "--image_channels 3", "--image_channels 3: the CLIP was trained with image_channels 1"),
    ("decoder", "--text_layers -1", "--text_layers -1 must be 0 or more"),
    ("decoder", "--context_length 2", "a text of 2 tokens has no room"),
    ("clip", "--preset imagenet64", "--preset imagenet64 is no recipe for this program: choose fashion-mnist"),
    ("decoder", "--preset imagenet64", "is no recipe"),
    ("decoder", "--lr_min 1", "lr_min is a rate from 0 to lr"),
])  # fmt: skip
def test_training_that_cannot_be(here, tmp_path, kind, more, pattern):
    with np.load("data.npz") as archive:
        arrays = dict(archive)
    np.savez("numbers.npz", **arrays | {"texts": np.arange(24)})
    arrays.pop("texts")
    np.savez("plain.npz", **arrays)
    (here / "bare").mkdir(exist_ok=True)
    (here / "pictures").mkdir(exist_ok=True)
    Image.fromarray(arrays["arr_0"][0, :, :, 0]).save("pictures/a.png")
    shutil.copy("clip/model000004.pt", "bare")
    refused(f"{kind}_train", words(kind, tmp_path, f"--iterations 1 {more}"), pattern)
    assert not list(tmp_path.glob("*.pt")) and not (tmp_path / "config.json").exists()


def test_a_run_goes_on_with_its_own_clip(here, tmp_path):
    """Another is refused by its fingerprint, unless forced; one of another size always."""
    train("clip", tmp_path / "other", "--iterations 1 --seed 1")
    train("clip", tmp_path / "wide", "--iterations 1 --clip_size 8")
    train("prior", tmp_path / "run", "--iterations 1")
    again = words("prior", tmp_path / "run", f"--iterations 2 --clip_path {tmp_path}/other/model000001.pt")
    refused("prior_train", again, "was trained with another CLIP than .*other/model000001.pt, with clip/model000004.pt")
    wide = again.replace("other/", "wide/")
    refused("prior_train", f"{wide} --force True", "takes embeddings of 16 numbers, and the CLIP .* makes 8")
    draws = f"--model_path decoder/model000004.pt {SAMPLE} {PROMPTS} --clip_path"
    refused("text_to_image_sample", f"{draws} {tmp_path}/other/model000001.pt --log_dir {tmp_path}/a", "another CLIP")
    done("text_to_image_sample", f"{draws} {tmp_path}/other/model000001.pt --log_dir {tmp_path}/b --force True")
    refused("text_to_image_sample", f"{draws} {tmp_path}/wide/model000001.pt --log_dir {tmp_path}/c --force True",
            "decoder/model000004.pt takes embeddings of 16 numbers, and the CLIP .*wide.* makes 8")  # fmt: skip
    done("prior_train", f"{again} --force True")


def test_a_clip_that_was_moved_is_asked_for(here, tmp_path, monkeypatch):
    """Its place is told from where the program was started; another place is as good, since the fingerprint is."""
    train("prior", tmp_path / "run", "--iterations 1")
    shutil.copytree("clip", tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    told = "model000001.pt was trained with the CLIP clip/model000004.pt, which is not there"
    data = f"--data_dir {here}/data.npz {PRIOR} {TRAIN} --iterations 2 --log_dir run"
    refused("prior_train", data, f"run/{told} .seen from .*{tmp_path}.*: tell where it is by --clip_path")
    done("prior_train", f"{data} --clip_path moved/model000004.pt")
    drawing = f"--model_path {here}/decoder/model000004.pt {SAMPLE} --prompts a --log_dir drawn"
    refused("text_to_image_sample", drawing, f"decoder/{told.replace('01', '04')}")
    done("text_to_image_sample", f"{drawing} --clip_path moved/model000004.pt")


# ----------------------------------------------------------------------------------------------------------- sampling


@pytest.fixture(scope="module")
def drawn(home, tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    return folder, draw(home, folder, f"{PROMPTS} --frames 3 --guidance_scale 2 --prior_scale 2")


def test_prompts_are_drawn_in_turn(drawn):
    folder, found = drawn
    assert found["arr_0"].shape == (4, 8, 8, 1) and set(found) == {"arr_0", "texts"}
    assert found["texts"].tolist() == ["a dark picture", "a light picture"] * 2
    strip, grid = (Image.open(folder / f"samples_4x8x8x1{end}.png") for end in ("_frames", ""))
    assert strip.size[0] > strip.size[1] / 2 and grid.size[1] > 16
    assert (folder / "samples_4x8x8x1_frames.gif").stat().st_size > 100


def test_the_batch_and_other_prompts_change_no_picture(home, drawn, tmp_path):
    same_words = "--guidance_scale 2 --prior_scale 2"
    single = draw(home, tmp_path / "a", f"{PROMPTS} {same_words} --batch_size 1")["arr_0"].astype(int)
    assert np.abs(single - drawn[1]["arr_0"]).max() <= 1
    alone = draw(home, tmp_path / "b", f'--prompts "a dark picture" {same_words} --num_samples 1')["arr_0"].astype(int)
    assert np.abs(alone - single[:1]).max() <= 1
    assert np.abs(single[2] - single[0]).max() > 1


def test_features_are_reused_and_the_batch_is_found(home, drawn, tmp_path, monkeypatch):
    """Of rows 2, 1 and 0 the network is whole at all but the second; a batch of 0 is as many as are wanted."""
    runs, decode = [], models.Decoder._encode
    spy = lambda self, *args: (runs.append((len(args[0]), *args[3:])), decode(self, *args))[1]  # noqa: E731
    monkeypatch.setattr(models.Decoder, "_encode", spy)
    more = f"{PROMPTS} --guidance_scale 2 --prior_scale 2"
    reused = draw(home, tmp_path / "a", f"{more} --reuse_every 2")["arr_0"]
    assert runs == [(8,), (8, 1), (8,)] and not np.array_equal(reused, drawn[1]["arr_0"])
    found = draw(home, tmp_path / "b", f"{more} --batch_size 0")["arr_0"]
    assert np.abs(found.astype(int) - drawn[1]["arr_0"]).max() <= 1 and runs[-3:] == [(8,)] * 3


def test_a_run_that_was_broken_off_ends_with_the_same_bytes(home, tmp_path, monkeypatch):
    more = f"{PROMPTS} --batch_size 1"
    draw(home, tmp_path / "whole", more)
    line = f"--model_path decoder/ema_0.9_000004.pt {WITH_PRIOR} {SAMPLE} {more}"
    monkeypatch.chdir(home)
    with monkeypatch.context() as patch:
        kept = sample_store._kept
        patch.setattr(sample_store, "_kept", lambda stream, store: islice(kept(stream, store), 2))
        patch.setattr(SampleStore, "finish", lambda self, *a, **k: 1 / 0)
        refused("text_to_image_sample", f"{line} --log_dir {tmp_path}/part", "division by zero")
    refused("text_to_image_sample", f"{line} --log_dir {tmp_path}/part --prior_candidates 1", "prior_candidates")
    said = done("text_to_image_sample", f"{line} --log_dir {tmp_path}/part").out
    assert "going on: 2 of 4 samples are drawn already" in said
    ours, theirs = ((tmp_path / name / "samples_4x8x8x1.npz").read_bytes() for name in ("part", "whole"))
    assert ours == theirs


def test_without_a_prior_the_texts_embeddings_are_drawn_from(home, drawn, tmp_path):
    found = draw(home, tmp_path / "a", prior="")
    assert found["texts"].tolist() == drawn[1]["texts"].tolist()
    hidden = draw(home, tmp_path / "b", f"{PROMPTS} --use_captions False", prior="")
    assert not np.array_equal(hidden["arr_0"], found["arr_0"])


def test_variations_and_ways_between_pictures(home, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for k, level in enumerate((20, 120, 220)):
        Image.fromarray(np.full((8, 8), level, np.uint8)).save(folder / f"{k}.png")
    varied = draw(home, tmp_path / "a", f"--images {folder}", prior="")
    assert varied["arr_0"].shape == (4, 8, 8, 1) and set(varied) == {"arr_0"}
    ways = draw(home, tmp_path / "b", f"--images {folder} --interpolate 3 --frames 2", "", SAMPLE.split(" ", 2)[2])
    assert ways["arr_0"].shape == (6, 8, 8, 1)  # two ways of three pictures
    between = draw(home, tmp_path / "c", f"{PROMPTS} --interpolate 4")
    assert between["arr_0"].shape == (4, 8, 8, 1) and "texts" not in between


@pytest.mark.parametrize("interpolate, explicit, count", [(0, (), 4), (3, (), 24), (2, ("num_samples",), 3)])
def test_no_more_pictures_are_read_than_are_drawn_from(here, interpolate, explicit, count):
    """Of the 24 there are: one for each of 4 samples; all, on the ways between all; the ends of two ways of 2."""
    args = SimpleNamespace(images="data.npz", num_samples=4, interpolate=interpolate, explicit=set(explicit))
    flags = {"image_size": 8, "image_channels": 1}
    with np.load("data.npz") as archive:
        wanted = th.from_numpy(archive["arr_0"][:count]).permute(0, 3, 1, 2) / 127.5 - 1
    assert th.allclose(prompting.read_images(args, flags), wanted, atol=1e-6)


def test_the_ends_of_a_way_are_its_anchors(home, tmp_path):
    """Without captions and noise of the way, an end is what the anchor's own embedding draws from the same noise."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for k, level in enumerate((20, 220)):
        Image.fromarray(np.full((8, 8), level, np.uint8)).save(folder / f"{k}.png")
    way = draw(home, tmp_path / "a", f"--images {folder} --interpolate 4", "")["arr_0"].astype(int)
    first = draw(home, tmp_path / "b", f"--images {folder} --num_samples 1", "")["arr_0"].astype(int)
    assert np.abs(way[0] - first[0]).max() <= 1


def train_super_res(home, folder, small_size):
    np.savez(home / "large.npz", np.random.default_rng(0).integers(0, 256, (8, 16, 16, 1), np.uint8))
    net = "--large_size 16 --image_channels 1 --num_channels 32 --num_res_blocks 1 --channel_mult 1,1"
    done("super_res_train", f"--data_dir {home}/large.npz {net} --small_size {small_size} --attention_resolutions 8"
         f" --diffusion_steps 10 --noise_schedule cosine --iterations 1 {TRAIN} --log_dir {folder}")  # fmt: skip


def test_larger_pictures(home, tmp_path):
    train_super_res(home, tmp_path / "sr", 8)
    more = f"{PROMPTS} --super_res_path {tmp_path}/sr/model000001.pt"
    draw(home, tmp_path / "a", more)
    with np.load(tmp_path / "a" / "enlarged" / "samples_4x16x16x1.npz") as large:
        assert large["arr_0"].shape == (4, 16, 16, 1) and large["texts"].tolist()[:2] == [
            "a dark picture", "a light picture"]  # fmt: skip
    draw(home, tmp_path / "b", f"{more} --interpolate 2 --guidance_scale 2 --guidance_interval 0,5")
    with np.load(tmp_path / "b" / "enlarged" / "samples_4x16x16x1.npz") as large:
        assert large.files == ["arr_0"]  # a picture between two prompts is of neither
    args = SimpleNamespace(super_res_path=f"{tmp_path}/sr/model000001.pt", timestep_respacing="3", guidance_scale=2.0,
                           explicit={"timestep_respacing", "guidance_scale"})  # fmt: skip
    _, process, _ = prompting.larger_of(args, {"image_size": 8, "image_channels": 1}, "cpu")
    assert process.num_timesteps == 3  # as of the decoder


def test_the_seed_is_also_that_of_the_embeddings(here):
    args = config.parse("", TextToImageOptions, config.RunOptions, argv=WITH_PRIOR.split())
    clip, drawn = models.open_clip("clip/model000004.pt"), []
    for args.seed in (0, 1, 0):
        embeddings = prompting.embeddings_of(args, clip, ["dark"], {"text_layers": 0}, "cpu")
        drawn.append(embeddings([0]))
    assert th.equal(drawn[0], drawn[2]) and not th.equal(drawn[0], drawn[1])


def test_guidance_takes_away_what_was_dropped_in_training(here, sure):
    null = {"vector": 0.0, "tokens": 0.0, "token_mask": False}
    train("decoder", "spoken", "--iterations 1 --caption_dropout 0")
    for folder, scale, left in (("decoder/model000004", 2, null), ("spoken/model000001", 2, {"vector": 0.0}),
                                ("sure/model000001", 1, {})):  # fmt: skip
        args = SimpleNamespace(model_path=f"{folder}.pt", guidance_scale=scale)
        assert prompting.null_of(args, null) == left


def test_networks_in_one_file_draw_the_same(home, drawn, tmp_path, monkeypatch):
    """As safetensors and back, with what config.json tells: the CLIP, and what was dropped in training."""
    monkeypatch.chdir(home)
    for kind, file in (("clip", "model000004"), ("prior", "ema_0.9_000004"), ("decoder", "ema_0.9_000004")):
        done("convert", f"{kind}/{file}.pt {tmp_path}/{kind}.safetensors")
        done("convert", f"{tmp_path}/{kind}.safetensors {tmp_path}/{kind}/{file}.pt")
        assert same(checkpoint.load(tmp_path / kind / f"{file}.pt"), checkpoint.load(f"{kind}/{file}.pt"))
        assert (tmp_path / kind / "config.json").read_text() == (home / kind / "config.json").read_text()
    refused("convert", f"{tmp_path}/prior.safetensors {tmp_path}/folder", "diffusers has no prior network like ours")
    paths = " ".join(f"--{name}_path {tmp_path}/{kind}.safetensors" for name, kind in
                     (("model", "decoder"), ("prior", "prior"), ("clip", "clip")))  # fmt: skip
    scales = "--prior_steps 5 --guidance_scale 2 --prior_scale 2"
    done("text_to_image_sample", f"{paths} {scales} {SAMPLE} {PROMPTS} --log_dir {tmp_path}/drawn")
    with np.load(tmp_path / "drawn" / "samples_4x8x8x1.npz") as archive:
        assert np.array_equal(archive["arr_0"], drawn[1]["arr_0"])


def test_a_decoder_that_reads_less_of_a_prompt_than_clip_says_so(here, tmp_path):
    train("decoder", "brief", "--iterations 1 --context_length 8")
    line = f"--model_path brief/model000001.pt {SAMPLE} --prompts 'a dark picture' --log_dir"
    for more, warned in (("", True), ("--use_captions False", False)):
        folder = tmp_path / str(warned)
        done("text_to_image_sample", f"{line} {folder} {more}")
        assert ("are cut; the first to 'a dark'" in (folder / "log.txt").read_text()) == warned


def test_scores_as_they_come(home, tmp_path, monkeypatch):
    (home / "pixels.py").write_text("def features(images): return images.mean((1, 2)) / 255")
    draw(home, tmp_path, f"{PROMPTS} --evaluate data.npz --extractor pixels:features")
    assert json.loads((tmp_path / "scores.json").read_text())["sample"]["images"] == 4


def test_prompts_from_a_file_and_of_every_kind(home, tmp_path):
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfa dark picture\r\n\r\n" + "три 🐈 三\n".encode())
    found = draw(home, tmp_path / "a", f"--prompts {'x' * 30} --prompts_file {tmp_path}/prompts.txt")
    assert found["texts"].tolist() == ["x" * 30, "a dark picture", "", "три 🐈 三"]
    assert "1 of 4 texts are too long and are cut; the first to 'xxxxxxxxxxxxxxxxxxxxxx'" in (
        tmp_path / "a" / "log.txt").read_text()  # fmt: skip
    broken = draw(home, tmp_path / "c", "--prompts 'two\nlines' --frames 2")
    assert broken["texts"].tolist() == ["two\nlines"] * 4
    empty = draw(home, tmp_path / "b", "--prompts ''")
    assert empty["texts"].tolist() == [""] * 4


@pytest.mark.parametrize("more, pattern", [
    ("", "give prompts .* or pictures to vary"),
    ("--prompts a --images data.npz", "give prompts .* or pictures to vary .*, not both"),
    ("--prompts_file nowhere.txt", "no file of prompts nowhere.txt"),
    ("--prompts_file empty.txt", "empty.txt is empty: give a prompt a line"),
    ("--prompts_file latin.txt", "latin.txt is not UTF-8 text"),
    ("--prompts ''", "an empty prompt has no embedding of its own: give --prior_path, or words"),
    ("--prompts a --prior_scale 2", "--prior_scale has no effect without --prior_path"),
    ("--images data.npz --prior_candidates 3", "--prior_candidates has no effect without --prior_path"),
    ("--prompts a --prior_path sure_prior/model000001.pt --prior_scale 2", "trained without --caption_dropout"),
    ("--prompts a --model_path sure/model000001.pt --guidance_scale 2", "without --embedding_dropout and cannot be"),
    ("--prompts a --guide_path decoder/model000002.pt --guidance_scale 2", "--guide_path .*: a decoder is guided"),
    ("--prompts a --interpolate 3", "give two or more"),
    ("--prompts a b --interpolate 3 --num_samples 4", "--num_samples 4 make no whole ways of --interpolate 3"),
    ("--prompts a b --interpolate 1", "2 or more, not 1"),
    ("--prompts a --prior_candidates 0 --prior_path prior/model000004.pt", "--prior_candidates must be 1 or more"),
    ("--prompts a --prior_steps -1 --prior_path prior/model000004.pt", "--prior_steps must be 0 or more, not -1"),
    ("--prompts a --prior_steps 30 --prior_path prior/model000004.pt", "--prior_steps 30: the prior has 20 steps"),
    ("--prompts a --prior_path decoder/model000004.pt", "decoder.*prior"),
    ("--prompts a --model_path prior/model000004.pt", "prior.*decoder"),
    ("--prompts a --model_path clip/model000004.pt --clip_path clip/model000004.pt", "clip.*decoder"),
    ("--prompts a --clip_path prior/model000004.pt", "prior.*clip"),
    ("--prompts a --model_path bare/model000004.pt", "nothing tells what"),
    ("--prompts a --model_path ''", "model_path"),
    ("--prompts a --model_path odd/model000004.pt", "config.json beside odd/model000004.pt: clip must be a table, not"),
    ("--images nowhere", "nowhere does not exist"),
    ("--images data.npz --prior_path prior/model000004.pt", "drop --prior_path, which is for prompts"),
    ("--prompts a --super_res_path clip/model000004.pt", "clip.*super_res"),
    ("--prompts a --super_res_path wide_sr/model000001.pt", "enlarges images of small_size 4, and the decoder draws 8"),
    ("--prompts a --super_res_path clip/model000004.pt --save_as png", "keep npz in --save_as"),
    ("--prompts a --num_samples 0", "--num_samples must be 1 or more, not 0"),
    ("--prompts a --preset fashion-mnist", "--preset fashion-mnist is a recipe for clip_train.py, prior_train.py"),
    ("--prompts a --preset imagenet64", "--preset imagenet64: the checkpoints tell what they are: drop it"),
])  # fmt: skip
def test_sampling_that_cannot_be(here, sure, tmp_path, more, pattern):
    (here / "empty.txt").write_bytes(b"")
    (here / "latin.txt").write_bytes(b"caf\xe9\n")
    (here / "bare").mkdir(exist_ok=True)
    shutil.copy("decoder/model000004.pt", "bare")
    (here / "odd").mkdir(exist_ok=True)
    shutil.copy("decoder/model000004.pt", "odd")
    (here / "odd" / "config.json").write_text(
        json.dumps(json.loads((here / "decoder" / "config.json").read_text()) | {"clip": "clip/model000004.pt"}))
    words = more if "--model_path" in more else f"--model_path decoder/model000004.pt {more}"
    refused("text_to_image_sample", f"{words} --timestep_respacing 3 --log_dir {tmp_path}", pattern)
    assert not list(tmp_path.glob("**/*.npz"))


@pytest.fixture(scope="module")
def sure(home):
    """A prior and a decoder that were never without a condition, and a stage for pictures that are too small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        train("prior", "sure_prior", "--iterations 1 --caption_dropout 0")
        train("decoder", "sure", "--iterations 1 --embedding_dropout 0")
        train_super_res(home, home / "wide_sr", 4)


# ------------------------------------------------------------------------------------------------------------- recipe

SCHEDULE = {"lr": 5e-4, "lr_min": 1e-5, "lr_schedule": "cosine", "weight_decay": 1e-4, "grad_clip": 1.0}
RECIPE = {
    "clip": SCHEDULE | {
        "image_size": 32, "image_channels": 1, "image_mean": 0.2855552, "image_std": 0.33848408, "random_flip": True,
        "crop_padding": 4, "clip_size": 256, "patch_size": 4, "image_width": 256, "image_layers": 6, "image_heads": 8,
        "text_width": 256, "text_layers": 6, "text_heads": 8, "context_length": 64, "dropout": 0.2, "batch_size": 128,
        "lr_anneal_steps": 78000, "lr_warmup": 1950},
    "prior": SCHEDULE | {
        "diffusion_steps": 1000, "noise_schedule": "cosine", "predict": "x0", "prior_width": 256, "prior_layers": 6,
        "prior_heads": 8, "prior_dropout": 0.2, "random_flip": False, "batch_size": 128, "lr_anneal_steps": 58500,
        "lr_warmup": 1950},
    "decoder": SCHEDULE | {
        "image_size": 32, "image_channels": 1, "diffusion_steps": 1000, "noise_schedule": "cosine",
        "num_channels": 32, "channel_mult": "1,2,4,8", "num_res_blocks": 2, "dropout": 0.1,
        "attention_resolutions": "16,8", "num_heads": 8, "use_scale_shift_norm": True, "conv_resample": True,
        "resblock_updown": False, "text_width": 256, "text_layers": 4, "text_heads": 8, "image_tokens": 4,
        "context_length": 64, "random_flip": False, "batch_size": 32, "lr_anneal_steps": 156200, "lr_warmup": 7810},
}  # fmt: skip
GROUPS = {
    "clip": (ClipTrainOptions, ClipOptions, config.RunOptions),
    "prior": (PriorTrainOptions, PriorOptions, PriorProcessOptions, config.RunOptions),
    "decoder": (DecoderTrainOptions, PictureOptions, DecoderOptions, DecoderProcessOptions,
                config.RunOptions),
}  # fmt: skip


@pytest.mark.parametrize("kind", RECIPE)
def test_the_recipe_types_the_tutorials_numbers(kind):
    args = config.parse("", *GROUPS[kind], argv=["--preset", "fashion-mnist"])
    assert {name: getattr(args, name) for name in RECIPE[kind]} == RECIPE[kind]
    assert set(presets.RECIPES["fashion-mnist"][kind]) <= set(RECIPE[kind])
    typed = config.parse("", *GROUPS[kind], argv=["--preset", "fashion-mnist", "--batch_size", "7"])
    assert typed.batch_size == 7 and typed.lr == 5e-4


@pytest.mark.parametrize("name", ["image_train", "classifier_train", "image_sample"])
def test_the_recipe_is_for_its_own_programs(name, tmp_path):
    more = "--data_dir nowhere" if name.endswith("train") else "--model_path nowhere.pt"
    refused(name, f"--preset fashion-mnist {more} --log_dir {tmp_path}", "--preset fashion-mnist is a recipe for")


def test_the_recipe_builds_the_networks_it_names():
    with th.device("meta"):
        flags = config.defaults(ClipOptions)
        clip = models.create_clip(flags | {k: v for k, v in RECIPE["clip"].items() if k in flags})
        flags = config.defaults(DecoderOptions, DecoderProcessOptions, ClipSizes)
        decoder = models.create_decoder(flags | {k: v for k, v in RECIPE["decoder"].items() if k in flags})
    assert sum(p.numel() for p in clip.parameters()) == 9_685_249
    assert sum(p.numel() for p in decoder.text.parameters()) == 3_232_256
    attention = [any("Attention" in type(part).__name__ for part in block) for block in decoder.input_blocks]
    assert attention == [k in (4, 5, 7, 8) for k in range(12)]  # at 16 and 8 pixels alone, after each residual block
