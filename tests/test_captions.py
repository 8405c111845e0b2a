"""Pictures with captions: encoders, the npz, the loader, training, prompts; and what was stated of the first system."""

import functools
import importlib.util
import json

import numpy as np
import pytest
import torch as th
from test_image_datasets import grey, lopsided, numbers, save, take
from test_programs import ROOT, done, refused, rows

from guided_diffusion import checkpoint, checks, config, guidance, program, text
from guided_diffusion.film_unet import Unet
from guided_diffusion.gaussian_diffusion import get_named_beta_schedule
from guided_diffusion.sampling_options import SampleOptions
from guided_diffusion.script_util import create_gaussian_diffusion, open_diffusion
from guided_diffusion.train_util import DiffusionTask, Trainer

NET = "--image_size 8 --image_channels 1 --network film --num_channels 8 --channel_mult 1,2 --vector_channels 16"
PROCESS = "--diffusion_steps 100 --noise_schedule sigmoid"
TRAIN = "--batch_size 8 --lr 1e-2 --log_interval 1 --random_flip False --num_workers 0 --class_dropout 0.3"
SAMPLE = "--num_samples 5 --batch_size 2 --timestep_respacing 4"


@pytest.fixture(autouse=True)
def seeded():
    th.manual_seed(0)


# ------------------------------------------------------------------------------------------------------------ encoders


def test_a_word_is_a_place_with_a_sign():
    vectors = text.encode("hashing:64", ["three", "Three!", "3", "a three"])
    assert vectors.dtype == np.float32 and vectors.shape == (4, 64)
    np.testing.assert_allclose((vectors**2).sum(1), 64, rtol=1e-6)
    assert np.count_nonzero(vectors[0]) == np.count_nonzero(vectors[2]) == 1 and (vectors[0] == vectors[1]).all()
    a = text.encode("hashing:64", ["a"])[0]
    pair = vectors[3] * np.sqrt(3) - a - vectors[0]  # two words and their pair, each of length 8 before scaling
    assert np.count_nonzero(np.abs(pair) > 1e-5) == 1 and np.abs(pair).max() == pytest.approx(8)


@pytest.mark.parametrize("name, texts, message", [
    ("clip:512", ["a"], "unknown text encoder: clip .*hashing"),
    ("hashing", ["a"], "give its width, as hashing:128"),
    ("hashing:0", ["a"], "give its width"),
    ("precomputed", ["a"], "computed elsewhere.*--prompt_vectors"),
    ("hashing:8", [], "no texts"),
    ("hashing:8", ["three", "!?"], r"text '!\?' holds no word"),
])  # fmt: skip
def test_texts_that_cannot_be_encoded(name, texts, message):
    with pytest.raises(ValueError, match=message):
        text.encode(name, texts)


# ---------------------------------------------------------------------------------------------------------- the loader


def captioned(path, vectors, **more):
    """12 pictures that tell their number, with vectors."""
    images = np.stack([lopsided(number) for number in range(12)])[..., None].astype(np.uint8)
    np.savez(path, arr_0=images, arr_1=np.arange(12) % 3, vectors=vectors, text_encoder="hashing:2", **more)
    return path


def test_vectors_stay_with_their_images(tmp_path):
    path = captioned(tmp_path / "a.npz", np.arange(24.0).reshape(12, 2))
    stream = grey(path, vector_channels=2, class_cond=True)
    assert stream.text_encoder == "hashing:2"
    for x0, cond in take(stream, 6):
        assert cond["vector"].dtype == th.float32
        assert cond["vector"].tolist() == [[2 * n, 2 * n + 1] for n in numbers(x0)]
        assert cond["y"].tolist() == [n % 3 for n in numbers(x0)]
    assert next(grey(path))[1] == {} and grey(path).text_encoder is None  # unless asked for, they are not read


def test_one_of_several_texts_is_drawn_for_an_image_in_an_epoch(tmp_path):
    vectors = np.stack([np.full((12, 2), text) + 10 * np.arange(12)[:, None] for text in range(4)], 1)     # [12,4,2]
    path = captioned(tmp_path / "a.npz", vectors.astype(np.float16))
    drawn = take(grey(path, vector_channels=2), 300)
    chosen = th.cat([cond["vector"][:, 0] - 10 * th.tensor(numbers(x0)) for x0, cond in drawn])
    shares = th.bincount(chosen.long(), minlength=4) / len(chosen)
    assert (shares - 0.25).abs().max() < 4 * (0.25 * 0.75 / len(chosen)) ** 0.5
    again = take(grey(path, vector_channels=2, num_workers=1), 5)
    later = take(grey(path, vector_channels=2, first_batch=2), 3)
    for (x0, cond), (other_x0, other), in [*zip(drawn, again), *zip(drawn[2:], later)]:
        assert th.equal(x0, other_x0) and th.equal(cond["vector"], other["vector"])
    one, two = (take(grey(path, vector_channels=2, seed=seed, deterministic=True), 6) for seed in (0, 1))
    assert any(not th.equal(a["vector"], b["vector"]) for (_, a), (_, b) in zip(one, two))
    for (x0, _), (plain, _) in zip(drawn, take(grey(path), 5)):
        assert th.equal(x0, plain)  # flips are the same with vectors and without


@pytest.mark.parametrize("vectors, message", [
    (np.zeros((11, 2)), r"is float64 \[11, 2\]; for 12 images and vector_channels 2 it must be floats \[12,2\]"),
    (np.zeros((12, 3)), r"\[12, 3\]; .* or \[12,M,2\]"),
    (np.zeros((12, 0, 2)), r"\[12, 0, 2\]"),
    (np.zeros((12, 2), int), "vectors is int64"),
    (np.where(np.arange(24).reshape(12, 2) == 7, np.nan, 0.0), "vectors of image 3 hold values that are not finite"),
])  # fmt: skip
def test_vectors_that_do_not_fit(tmp_path, vectors, message):
    with pytest.raises(ValueError, match=message):
        grey(captioned(tmp_path / "a.npz", vectors), vector_channels=2)


def test_sources_without_vectors(tmp_path):
    save(tmp_path / "data" / "a_0.png", lopsided(0))
    with pytest.raises(ValueError, match=r"is no npz, and vectors .*datasets/captions\.py makes it"):
        grey(tmp_path / "data", vector_channels=2, batch_size=1)
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((4, 4, 4, 1), np.uint8))
    with pytest.raises(ValueError, match="has no array vectors"):
        grey(tmp_path / "a.npz", vector_channels=2)


# ------------------------------------------------------------------------------------------------- datasets/captions.py


@functools.cache
def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(source, out, **options):
    options = {"image_size": 4, "image_channels": 1, **options}
    load(ROOT / "datasets" / "captions.py").write_captions(str(source), str(out), **options)
    with np.load(out, allow_pickle=False) as archive:
        return dict(archive)


@pytest.fixture
def digits(tmp_path):
    for name in ("7_0", "3_1", "3_2"):
        save(tmp_path / "digits" / f"{name}.png", lopsided(int(name[-1])))
    return tmp_path / "digits"


def test_captions_of_a_labelled_folder(digits, tmp_path):
    found = write(digits, tmp_path / "a.npz", templates=["a {word}", "digit {class}"], hold_out=["the {word}"],
                  encoder="hashing:16")  # fmt: skip
    three, seven = ["a three", "digit 3"], ["a seven", "digit 7"]
    assert found["texts"].tolist() == [three, three, seven] and found["arr_1"].tolist() == [0, 0, 1]
    assert found["arr_0"].shape == (3, 4, 4, 1) and (found["arr_0"][:, 0, 1, 0] - 10).tolist() == [1, 2, 0]
    assert found["class_names"].tolist() == ["3", "7"] and str(found["text_encoder"]) == "hashing:16"
    assert (found["vectors"] == text.encode("hashing:16", [*three, *three, *seven]).reshape(3, 2, 16)).all()
    assert (found["held_out"].tolist(), found["held_out_labels"].tolist()) == (["the three", "the seven"], [0, 1])
    usual = write(digits, tmp_path / "b.npz")
    assert "a handwritten three" in usual["texts"][0] and usual["vectors"].shape == (3, 8, 512)
    assert not set(usual["held_out"]) & set(usual["texts"].ravel()) and len(usual["held_out"]) == 6
    again = write(tmp_path / "a.npz", tmp_path / "c.npz", templates=["{class}"])  # an npz of labelled images
    assert again["texts"].tolist() == [["3"], ["3"], ["7"]] and (again["arr_0"] == found["arr_0"]).all()
    next(grey(tmp_path / "a.npz", vector_channels=16, class_cond=True, batch_size=3))


def test_other_classes_get_other_phrases(tmp_path):
    save(tmp_path / "pets" / "cat_0.png", lopsided(0))
    assert "a picture of a cat" in write(tmp_path / "pets", tmp_path / "a.npz")["texts"]


def test_one_text_a_class_and_images_that_are_held_out(digits, tmp_path):
    held = tmp_path / "val.npz"
    said = {"class_texts": ["a three", "seven!"], "val_out": held, "val_count": 1}
    kept = write(digits, tmp_path / "a.npz", encoder="none", **said)
    assert "vectors" not in kept and "text_encoder" not in kept
    with np.load(held) as apart:
        pictures = np.concatenate([kept["arr_0"], apart["arr_0"]])
        assert len(apart["arr_0"]) == len(apart["arr_1"]) == len(apart["texts"]) == 1
        labels = np.concatenate([kept["arr_1"], apart["arr_1"]])
        texts = np.concatenate([kept["texts"], apart["texts"]])[:, 0]
        assert apart["class_names"].tolist() == ["3", "7"] and len(apart["held_out"]) == 0
    assert texts.tolist() == [["a three", "seven!"][y] for y in labels] and sorted(labels) == [0, 0, 1]
    assert len(np.unique(pictures, axis=0)) == 3
    again = write(digits, tmp_path / "b.npz", **said)
    assert (again["arr_0"] == kept["arr_0"]).all()


def test_the_captions_of_the_tutorial_on_fashion(tmp_path):
    """A class of every number, whose picture tells it."""
    images = np.arange(10, dtype=np.uint8).repeat(16).reshape(10, 4, 4, 1)
    np.savez(tmp_path / "a.npz", arr_0=images, arr_1=np.arange(10))
    found = write(tmp_path / "a.npz", tmp_path / "b.npz", class_texts=["fashion-mnist"], encoder="none")
    expected = "a t-shirt/top,trousers,a pullover,a dress,a coat,a sandal,a shirt,a sneaker,a bag,an ankle boot"
    assert found["texts"][:, 0].tolist() == [f"An image of {each}" for each in expected.split(",")]
    assert found["arr_0"][:, 0, 0, 0].tolist() == list(range(10))


def test_s0_21_images_with_texts_of_their_own_and_vectors_computed_elsewhere(tmp_path):
    images = np.zeros((3, 6, 8, 3))
    images[1], images[2, :, :, 0] = 1.0, 51 / 255
    np.savez(tmp_path / "s.npz", images=images, texts=[["x", "xx"], ["y", "yy"], ["z", "zz"]])
    np.save(tmp_path / "v.npy", np.arange(24.0).reshape(3, 2, 4))
    found = write(tmp_path / "s.npz", tmp_path / "a.npz", image_channels=3, vectors=tmp_path / "v.npy")
    assert found["arr_0"].shape == (3, 4, 4, 3) and found["arr_0"][:, 0, 0].tolist() == [[0] * 3, [255] * 3, [51, 0, 0]]
    assert found["texts"].tolist()[2] == ["z", "zz"] and found["vectors"].ravel().tolist() == list(range(24))
    assert str(found["text_encoder"]) == "precomputed" and "arr_1" not in found
    np.savez(tmp_path / "one.npz", images=(images * 255).astype(np.uint8), texts=["x", "y", "z"])
    one = write(tmp_path / "one.npz", tmp_path / "b.npz", image_channels=3, encoder="hashing:8")
    assert one["vectors"].shape == (3, 1, 8) and (one["arr_0"] == found["arr_0"]).all()


@pytest.mark.parametrize("options, message", [
    ({"templates": ["a number"]}, r"'a number' says the same of every class: put \{class\} or \{word\}"),
    ({"templates": ["{class}"], "hold_out": ["{class}"]}, "both a template and held out"),
    ({"encoder": "bert:8"}, "unknown text encoder: bert"),
    ({"class_texts": ["a", "b", "c"]}, "--class_texts are 3, and the images have 2 classes: 3, 7"),
    ({"class_texts": ["fashion-mnist"]}, "--class_texts are 10, and the images have 2"),
    ({"class_texts": ["a", "b"], "templates": ["{class}"]}, "drop --templates and --hold_out"),
    ({"val_out": "val.npz", "val_count": 3}, "--val_count 3 of 3 images: hold out at least 1 and fewer than all"),
    ({"val_count": 3}, "--val_out and --val_count, .* go together"),
])  # fmt: skip
def test_captions_that_cannot_be(digits, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        write(digits, tmp_path / "a.npz", **options)
    assert not (tmp_path / "a.npz").exists()


def test_vectors_and_texts_that_cannot_be(digits, tmp_path):
    np.save(tmp_path / "few.npy", np.zeros((2, 4)))
    with pytest.raises(ValueError, match=r"holds vectors \[2, 4\]; the 3 x 8 texts need \[N,D\] or \[N,M,D\]"):
        write(digits, tmp_path / "a.npz", vectors=tmp_path / "few.npy")
    images = np.zeros((2, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "b.npz", images=images, texts=["x"])
    with pytest.raises(ValueError, match="texts must hold 2 texts"):
        write(tmp_path / "b.npz", tmp_path / "a.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "b.npz").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"cannot read .*cut\.npz as an npz of plain arrays"):
        write(tmp_path / "cut.npz", tmp_path / "a.npz")
    np.savez(tmp_path / "c.npz", images=images + 2.5, texts=["x", "y"])
    with pytest.raises(ValueError, match=r"images is float64 .* floats from 0 to 1"):
        write(tmp_path / "c.npz", tmp_path / "a.npz")


@pytest.mark.parametrize("content, message", [
    (np.zeros(4), r"is float64 \[4\]; vectors are floats \[P,D\]"),
    (np.zeros((2, 4), int), "is int64"),
    (np.full((2, 4), np.inf), "not finite"),
    (b"no array", "cannot read"),
    (None, "is an npz"),
])  # fmt: skip
def test_files_that_hold_no_vectors(tmp_path, content, message):
    path = tmp_path / "v.npy"
    if content is None:
        with open(path, "wb") as file:
            np.savez(file, a=np.zeros((2, 4)))
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content)
    with pytest.raises(ValueError, match=message):
        text.read_vectors(path)


# --------------------------------------------------------------------------------------------- training and prompts


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Captioned pictures; `film`, trained on them for 4 updates; `adm`, labels and vectors; `sure`, never without."""
    home = tmp_path_factory.mktemp("captions")
    rng = np.random.default_rng(0)
    for name, level in (("0", 20), ("1", 120), ("2", 220)):
        for k in range(8):
            save(home / "data" / f"{name}_{k}.png", np.clip(level + rng.normal(0, 15, (8, 8)), 0, 255))
    write(home / "data", home / "a.npz", image_size=8, encoder="hashing:16")
    train(home, "film", "--iterations 4 --save_interval 2")
    train(home, "sure", "--iterations 1 --class_dropout 0")
    train(home, "adm", "--iterations 3 --network adm --num_channels 32 --num_res_blocks 1 --class_cond True"
          " --num_classes 3 --attention_resolutions 4 --channel_mult 1,1")  # fmt: skip
    return home


def train(home, name, words):
    done("image_train", f"--data_dir {home}/a.npz {NET} {PROCESS} {TRAIN} --log_dir {home}/{name} {words}")


def draw(home, folder, words, run="film/model000004.pt"):
    done("image_sample", f"--model_path {home}/{run} {SAMPLE} --log_dir {folder} {words}")
    with np.load(folder / "samples_5x8x8x1.npz") as archive:
        return dict(archive)


PROMPTS = "'a handwritten two' 'the digit 0'"


def test_training_on_captions(home):
    content = json.loads((home / "film" / "config.json").read_text())
    assert content["text_encoder"] == "hashing:16" and "text_encoder" not in content["flags"]
    assert (content["flags"]["network"], content["flags"]["vector_channels"]) == ("film", 16)
    assert len(rows(home / "film")) == 4
    model, diffusion, flags = open_diffusion(home / "film" / "model000004.pt")
    assert isinstance(model, Unet) and model.uncond_prob == 0.3 and diffusion.num_timesteps == 100
    assert checks.nulls(flags) == {"vector": 0.0}


def test_a_resumed_run_is_the_uninterrupted_one(home, tmp_path):
    done("image_train", f"--data_dir {home}/a.npz {NET} {PROCESS} {TRAIN} --log_dir {tmp_path} --iterations 4"
         f" --save_interval 2 --resume_checkpoint {home}/film/model000002.pt")  # fmt: skip
    for name in ("model000004.pt", "ema_0.9999_000004.pt"):
        ours, whole = (checkpoint.load(folder / name) for folder in (tmp_path, home / "film"))
        assert all(th.equal(ours[key], whole[key]) for key in whole)


def test_prompts_are_drawn_in_turn(home, tmp_path):
    prompts = ["a handwritten two", "the digit 0", "one"]
    found = draw(home, tmp_path / "a", f"--prompts {PROMPTS} one")
    assert found["texts"].tolist() == [*prompts, *prompts[:2]]
    assert (tmp_path / "a" / "samples_5x8x8x1.png").stat().st_size > 300
    np.save(tmp_path / "v.npy", text.encode("hashing:16", prompts).astype(np.float64))
    same = draw(home, tmp_path / "b", f"--prompt_vectors {tmp_path}/v.npy --batch_size 5")
    assert np.abs(same["arr_0"].astype(int) - found["arr_0"]).max() <= 1 and "texts" not in same
    named = draw(home, tmp_path / "c", f"--prompt_vectors {tmp_path}/v.npy --prompts x y z --grid False")
    assert named["texts"].tolist() == ["x", "y", "z", "x", "y"] and (named["arr_0"] == found["arr_0"]).all()
    swapped = draw(home, tmp_path / "d", f"--prompts one {PROMPTS}")
    assert np.abs(swapped["arr_0"].astype(int) - found["arr_0"]).max() > 1  # the vectors matter


def test_the_vectors_of_prompts_reach_the_network_and_every_step_is_guided(home, tmp_path, monkeypatch):
    """M0.1: one null call a step; without prompts, only null calls."""
    seen = []
    forward = Unet.forward

    def spy(self, x, t, vector):
        seen.append(vector)
        return forward(self, x, t, vector=vector)

    monkeypatch.setattr(Unet, "forward", spy)
    draw(home, tmp_path / "a", f"--prompts {PROMPTS} --guidance_scale 3 --batch_size 5")
    vectors = th.from_numpy(text.encode("hashing:16", ["a handwritten two", "the digit 0"]))
    assert len(seen) == 4
    for given, free in (both.chunk(2) for both in seen):
        assert th.equal(given, vectors[[0, 1, 0, 1, 0]]) and not free.any()
    seen.clear()
    draw(home, tmp_path / "b", "--batch_size 5")
    assert len(seen) == 4 and not any(vector.any() for vector in seen)


def test_guidance_by_prompts(home, tmp_path):
    plain = draw(home, tmp_path / "a", f"--prompts {PROMPTS}")["arr_0"].astype(int)
    assert (draw(home, tmp_path / "b", f"--prompts {PROMPTS} --guidance_scale 1")["arr_0"] == plain).all()
    strong = draw(home, tmp_path / "c", f"--prompts {PROMPTS} --guidance_scale 3")["arr_0"].astype(int)
    assert np.abs(strong - plain).mean() > 0.5
    turns = draw(home, tmp_path / "d", f"--prompts {PROMPTS} --guidance_scale 3 --guidance_batched False")["arr_0"]
    assert np.abs(turns - strong).max() <= 1
    worse = draw(home, tmp_path / "e", f"--prompts {PROMPTS} --guidance_scale 3 --sampler ddim --steps 3"
                 f" --guide_path {home}/film/model000002.pt")  # fmt: skip
    assert worse["arr_0"].shape == (5, 8, 8, 1)


def test_labels_and_texts_together_in_the_other_network(home, tmp_path):
    state = checkpoint.load(home / "adm" / "model000003.pt")
    assert state["label_emb.weight"].shape[0] == 4 and "vector_emb.null_emb" in state
    _, _, flags = open_diffusion(home / "adm" / "model000003.pt")
    assert checks.nulls(flags) == {"y": 3, "vector": 0.0}
    found = draw(home, tmp_path, f"--prompts {PROMPTS} --classes 2,0 --guidance_scale 2", "adm/model000003.pt")
    assert found["arr_1"].tolist() == [2, 0, 2, 0, 2] and len(found["texts"]) == 5


@pytest.mark.parametrize("words, pattern", [
    (f"--vector_channels 16 {TRAIN} --data_dir {{home}}/data", "is no npz, and vectors"),
    (f"--vector_channels 8 {TRAIN} --data_dir {{home}}/a.npz", r"vectors is float32 \[24, 8, 16\].* vector_channels 8"),
    (f"{TRAIN} --data_dir {{home}}/a.npz --vector_channels 0", "no vectors without --vector_channels"),
    (f"{TRAIN} --data_dir {{home}}/a.npz --channel_mult 1,2,2,2", "images of 8x8 cannot be halved 4 times"),
    (f"{TRAIN} --data_dir {{home}}/a.npz --class_cond True", "film takes no labels"),
    (f"{TRAIN} --data_dir {{home}}/a.npz --beta2 1", "beta2 is a decay"),
    (f"{TRAIN} --data_dir {{home}}/a.npz --vector_channels -64", "--vector_channels is the width .*, not -64"),
    (f"{TRAIN} --data_dir {{home}}/a.npz --vector_channels -64 --network adm", "--vector_channels is the width"),
    (f"{TRAIN} --data_dir {{home}}/other.npz --resume_checkpoint {{home}}/film/model000004.pt",
     "trained on vectors made by hashing:16, and those of .* are made by precomputed"),
])  # fmt: skip
def test_training_that_cannot_be(home, tmp_path, words, pattern):
    with np.load(home / "a.npz") as archive:
        np.savez(home / "other.npz", **{**archive, "text_encoder": "precomputed"})
    words = f"{NET} {PROCESS} {words.format(home=home)} --iterations 1 --log_dir {tmp_path}"
    refused("image_train", words, pattern)


def test_images_that_are_restored_or_inverted_have_prompts_in_turn(home, tmp_path, monkeypatch):
    seen = []
    forward = Unet.forward
    monkeypatch.setattr(Unet, "forward", lambda *args, vector: (seen.append(vector), forward(*args, vector=vector))[1])
    words = f"--model_path {home}/film/model000004.pt --num_images 3 --steps 4 --batch_size 6"
    v = th.from_numpy(text.encode("hashing:16", ["a handwritten two", "the digit 0"]))
    told = f"{words} --data_dir {home}/a.npz --prompts {PROMPTS} --log_dir {tmp_path}"
    for method in ("dps", "repaint"):
        done("inpaint", f"{told}/{method} --num_samples 2 --method {method} --batch_size 4")
        assert {len(each) for each in seen} == {2, 4}
        assert all(th.equal(each, v[[0, 0, 1, 1]] if len(each) == 4 else v[[0, 0]]) for each in seen)
        with np.load(tmp_path / method / "samples_6x8x8x1.npz") as archive:
            two, zero = "a handwritten two", "the digit 0"
            assert archive["texts"].tolist() == [two, two, zero, zero, two, two]
        seen.clear()
    done("invert", f"{told}/there --interpolate 1")
    assert all(th.equal(each, v[[0, 1, 0]]) for each in seen) and len(seen) >= 5 * 3
    seen.clear()
    np.save(tmp_path / "v.npy", v.numpy())
    done("invert", f"{words} --latents {tmp_path}/there/latents_3x1x8x8.npz --prompt_vectors {tmp_path}/v.npy --log_dir"
         f" {tmp_path}/back")  # fmt: skip
    assert all(th.equal(each, v[[0, 1, 0]]) for each in seen)
    for name in ("inpaint", "invert"):
        kept = f"--data_dir {home}/a.npz --num_images 2 --steps 3 --log_dir {tmp_path}/no --model_path {home}"
        refused(name, f"{kept}/sure/model000001.pt", "without --class_dropout, cannot do without: give --prompts")
        refused(name, f"{kept}/film/model000004.pt --prompts '?'", "holds no word")
        seen.clear()
        done(name, f"{kept}/film/model000004.pt")
        assert seen and not any(each.any() for each in seen)


@pytest.mark.parametrize("run, words, pattern", [
    ("film/model000004.pt", "--prompts '?'", r"text '\?' holds no word"),
    ("film/model000004.pt", "--prompts a b --prompt_vectors {home}/three.npy", "3 vectors, and there are 2 --prompts"),
    ("film/model000004.pt", "--prompt_vectors {home}/wide.npy", r"holds vectors \[2, 17\]; the model takes \[P,16\]"),
    ("film/model000004.pt", "--prompt_vectors {home}/none.npy", "No such file"),
    ("film/model000004.pt", "--prompt_vectors {home}/cut.npz", "cannot read .*cut.npz as an npy file"),
    ("film/model000004.pt", "--classes 1", "the model is unconditional"),
    ("sure/model000001.pt", "", "trained without --class_dropout, cannot do without: give --prompts"),
    ("sure/model000001.pt", "--prompts a --guidance_scale 2", "cannot predict without a condition"),
    ("told/model000001.pt", "--prompts a", "tells how its texts were encoded: give --prompt_vectors"),
    ("plain/model000001.pt", "--prompts a", "need a model of captions"),
])  # fmt: skip
def test_prompts_that_cannot_be(home, tmp_path, run, words, pattern):
    np.save(home / "three.npy", np.ones((3, 16)))
    np.save(home / "wide.npy", np.ones((2, 17)))
    (home / "cut.npz").write_bytes((home / "a.npz").read_bytes()[:1000])
    if not (home / "plain").exists():
        train(home, "plain", "--iterations 1 --vector_channels 0 --class_dropout 0")
        train(home, "told", "--iterations 1")
        content = json.loads((home / "told" / "config.json").read_text())
        del content["text_encoder"]
        (home / "told" / "config.json").write_text(json.dumps(content))
    words = f"--model_path {home}/{run} {SAMPLE} {words.format(home=home)} --log_dir {tmp_path}"
    refused("image_sample", words, pattern)


# ------------------------------------------------------------------- what was stated of the system that this grew from


def denoisers(steps=100):
    """Two processes that read one network: as the noise, and as the clean image that this noise means."""
    eps, x0 = (
        create_gaussian_diffusion(steps=steps, noise_schedule="sigmoid", predict=predict, loss_weight=weight)
        for predict, weight in (("eps", "unit"), ("x0", "snr"))
    )
    net = Unet(8, 6, (1, 2), channels=1).eval()

    def noise(x, t, **cond):
        return net(x.float(), t, **cond).double()

    def clean(x, t, **cond):
        a = th.from_numpy(eps.alphas_cumprod)[t.long()].view(-1, 1, 1, 1)
        return (x - (1 - a).sqrt() * noise(x, t, **cond)) / a.sqrt()

    return eps, noise, x0, clean


def test_s0_07_the_two_objectives_are_one_loss():
    """SNR |x0 - x0'|^2 = |eps - eps'|^2, at every t."""
    eps, noise, x0, clean = denoisers()
    x, t, z = th.randn(100, 1, 4, 4).double(), th.arange(100), th.randn(100, 1, 4, 4).double()
    cond = {"vector": th.randn(100, 6)}
    a = eps.training_losses(noise, x, t, cond, z)["loss"]
    b = x0.training_losses(clean, x, t, cond, z)["loss"]
    th.testing.assert_close(a, b, rtol=1e-6, atol=0)
    by_hand = (noise(eps.q_sample(x, t, z), t, **cond) - z).square().mean((1, 2, 3))  # S0.6
    th.testing.assert_close(a, by_hand, rtol=1e-6, atol=0)


def test_s0_08_and_09_a_step_is_formula_3_unless_it_clips():
    _, noise, _, clean = denoisers()
    x, cond = 1.5 * th.randn(3, 1, 4, 4).double(), {"vector": th.randn(3, 6)}
    betas = get_named_beta_schedule("sigmoid", 100)
    abar = np.cumprod(1 - betas)
    for predict, net in (("eps", noise), ("x0", clean)):
        process = create_gaussian_diffusion(steps=100, noise_schedule="sigmoid", predict=predict, sigma_small=True)
        for row in (99, 40, 1, 0):
            t = th.full((3,), row)
            before = abar[row - 1] if row else 1.0
            std = (betas[row] * (1 - before) / (1 - abar[row])) ** 0.5
            z = th.randn(x.shape, generator=th.Generator().manual_seed(row), dtype=x.dtype)
            e = noise(x, t, **cond)
            mean = (x - betas[row] / (1 - abar[row]) ** 0.5 * e) / (1 - betas[row]) ** 0.5
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(th, "randn_like", lambda _, z=z: z)
                out = process.p_sample(net, x, t, clip_denoised=False, model_kwargs=cond)["sample"]
                clipped = process.p_sample(net, x, t, model_kwargs=cond)["sample"]
            th.testing.assert_close(out, mean + std * z if row else mean, rtol=1e-5, atol=1e-5)
            x0 = ((x - (1 - abar[row]) ** 0.5 * e) / abar[row] ** 0.5).clamp(-1, 1)
            c1 = betas[row] * before**0.5 / (1 - abar[row])
            c2 = (1 - betas[row]) ** 0.5 * (1 - before) / (1 - abar[row])
            th.testing.assert_close(clipped, c1 * x0 + c2 * x + (std * z if row else 0), rtol=1e-5, atol=1e-5)


def test_s0_10_a_walk_from_noise_to_pictures():
    process, noise, _, _ = denoisers(steps=10)
    start = th.randn(2, 1, 4, 4).double()
    steps = [start, *(step["sample"] for step in process.p_sample_loop_progressive(noise, start.shape, start))]
    walk = (th.stack(steps, 1) + 1) / 2  # x_T included, as shares of white
    assert walk.shape == (2, 11, 1, 4, 4) and th.equal(walk[:, 0], (start + 1) / 2)
    assert walk[:, -1].min() >= 0 and walk[:, -1].max() <= 1


def test_s0_18_conditions_are_dropped_independently_at_the_rate_asked_for():
    """By the training step, in whichever mode the network is, and the label together with the vector."""
    seen = []

    class Task(DiffusionTask):
        def loss(self, net, x0, cond, t, noise):
            seen.append(cond)
            return {"loss": net(x0, t, vector=cond["vector"]).flatten(1).square().mean(1)}

    batch = th.zeros(500, 1, 4, 4), {"vector": th.randn(500, 6), "y": th.arange(500)}
    flags = {"class_cond": True, "num_classes": 500, "vector_channels": 6, "class_dropout": 0.2}
    drop = functools.partial(guidance.dropped, null=checks.nulls(flags), rate=flags["class_dropout"])
    net = Unet(2, 6, (1,), channels=1).eval()
    loop = Trainer(Task(net, create_gaussian_diffusion()), iter([batch] * 8), batch_size=500, drop=drop)
    for _ in range(8):
        loop.run_step(*batch)
    dropped = th.stack([(cond["vector"] == 0).all(1) for cond in seen])                # [8,500]
    assert th.equal(dropped, th.stack([cond["y"] == 500 for cond in seen]))
    assert dropped.float().mean().item() == pytest.approx(0.2, abs=4 * (0.2 * 0.8 / 4000) ** 0.5)
    assert dropped.float().mean(0).max() < 1  # other images each time
    assert all(th.equal(c["vector"][~d], batch[1]["vector"][~d]) for c, d in zip(seen, dropped))
    assert batch[1]["y"].tolist() == list(range(500))  # the caller's conditions stay


def test_s0_22_and_23_what_it_was_trained_with_can_be_asked_for(home, tmp_path):
    """Its trainer, then everything that its text recommends, in one run each."""
    first = f"--data_dir {home}/a.npz {NET} --batch_size 24 --num_workers 0 --grad_clip 1 --class_dropout 0.2"
    done("image_train", f"{first} --log_dir {tmp_path}/a --diffusion_steps 100 --noise_schedule linear --lr 1e-3"
         " --beta2 0.99 --weight_decay 0 --dropout 0.1 --iterations 1")  # fmt: skip
    done("image_train", f"{first} --log_dir {tmp_path}/b --noise_schedule cosine --predict v --loss_weight min_snr"
         " --learn_sigma True --ema_rate 0.99,0.999 --use_fp16 True --iterations 2")  # fmt: skip
    found = draw(tmp_path, tmp_path / "out", "--prompts one --guidance_scale 2", "b/ema_0.99_000002.pt")
    assert found["arr_0"].shape == (5, 8, 8, 1)


def test_pictures_of_prompts_name_their_rows(home, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr("guided_diffusion.pictures.save_grid", lambda *args, **how: shown.append(how["row_labels"]))
    draw(home, tmp_path, f"--prompts {PROMPTS}")
    assert shown == [["a handwritten two", "the digit 0"]]


def test_vectors_of_no_prompt_are_the_null(home):
    args = config.parse("x", SampleOptions, argv=[])
    flags = {"vector_channels": 3, "class_cond": False, "class_dropout": 0.1}
    assert th.equal(program.vectors_of(args, flags), th.zeros(1, 3))
    assert program.vectors_of(args, flags | {"vector_channels": 0, "class_dropout": 0.0}) is None


def archive_images(home):
    with np.load(home / "a.npz") as archive:
        return archive["arr_0"].astype(int)


def test_the_benchmark_of_prompts(home, tmp_path, monkeypatch):
    done("classifier_train", f"--data_dir {home}/data --noised False --image_size 8 --image_channels 1 --num_classes 3"
         f" --classifier_width 32 --classifier_depth 1 --classifier_attention_resolutions 4 --batch_size 12 --lr 1e-3"
         f" --classifier_num_head_channels 32 --iterations 20 --num_workers 0 --log_dir {tmp_path}/judge")  # fmt: skip
    bench = load(ROOT / "benchmarks" / "captions.py")
    monkeypatch.setattr(bench, "OUT", tmp_path / "out.json")
    monkeypatch.setattr(bench, "PICTURE", tmp_path / "out.png")
    words = f"--model_path {home}/film/model000004.pt --judge {tmp_path}/judge/model000020.pt --captions {home}/a.npz"
    monkeypatch.setattr("sys.argv", ["captions", *words.split(), "--steps", "2", "--num_samples", "18"])
    bench.main()
    table = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [(row["texts"], row["scale"]) for row in table[::3]] == [("trained", 1), ("held out", 1)] and len(table) == 6
    assert (tmp_path / "out.png").stat().st_size > 1000
    strips = []
    monkeypatch.setattr(bench.study, "save_strip", lambda path, frames, **how: strips.append((path, frames, how)))
    words = f"{' '.join(words.split()[:2])} --captions {home}/a.npz --strips {tmp_path}/strips --steps 12"
    monkeypatch.setattr("sys.argv", ["captions", *words.split()])
    bench.main()
    (noising, noised, _), (sampling, frames, how) = strips
    assert (noising.name, sampling.name) == ("noising.png", "sampling.png") and len(noised) == len(frames) == 10
    assert np.abs(noised[0].int().numpy() - archive_images(home)[::5]).mean() < 8  # t = 0; of 24 images every fifth
    assert frames.shape == (10, 10, 8, 8, 1) and how["column_labels"][::9] == ["1", "12"]
    assert how["row_labels"][2:4] == ["the handwritten number 2, scale 1", "the handwritten number 2, scale 4"]
    texts = [name.split(",")[0] for name in how["row_labels"][::2]]
    for row, scale in enumerate((1, 4)):  # the end of the walk is what the program draws
        done("image_sample", f"--model_path {home}/film/model000004.pt --num_samples 5 --batch_size 5 --guidance_scale"
             f" {scale} --timestep_respacing 12 --log_dir {tmp_path}/{scale} --prompts"
             + "".join(f" '{each}'" for each in texts))  # fmt: skip
        with np.load(tmp_path / str(scale) / "samples_5x8x8x1.npz") as archive:
            assert np.abs(archive["arr_0"].astype(int) - frames[-1, row::2]).max() <= 1
    with np.load(home / "a.npz") as archive:
        trained, apart = bench.phrasings(dict(archive)).values()
    assert len(trained[0]) == 24 and ("the digit 2", 2) in zip(*trained) and ("please draw two", 2) in zip(*apart)
    judge = bench.ClassifierExtractor(f"{tmp_path}/judge/model000020.pt")
    with np.load(home / "a.npz") as archive:
        scores = bench.score(judge, archive["arr_0"], archive["arr_1"], judge(archive["arr_0"]).pool)
    assert scores["agreement"] > 0.9 and scores["precision"] == scores["recall"] == 1


def test_a_classifier_guides_a_model_of_captions(home, tmp_path):
    """Its gradient is told the class and not the text, the network the text and not the class."""
    done("classifier_train", f"--data_dir {home}/data {PROCESS} --image_size 8 --image_channels 1 --num_classes 3"
         f" --classifier_width 32 --classifier_depth 1 --classifier_attention_resolutions 4 --batch_size 12 --lr 1e-3"
         f" --classifier_num_head_channels 32 --iterations 2 --num_workers 0 --log_dir {tmp_path}/guide")  # fmt: skip
    words = f"--model_path {home}/film/model000004.pt --classifier_path {tmp_path}/guide/model000002.pt {SAMPLE}"
    words += f" --prompts {PROMPTS} --guidance_scale 2 --classes 1,0"
    drawn = []
    for scale in (0, 5):
        done("classifier_sample", f"{words} --classifier_scale {scale} --log_dir {tmp_path}/{scale}")
        with np.load(tmp_path / str(scale) / "samples_5x8x8x1.npz") as archive:
            assert archive["arr_1"].tolist() == [1, 0, 1, 0, 1] and len(archive["texts"]) == 5
            drawn.append(archive["arr_0"])
    assert np.abs(drawn[0].astype(int) - drawn[1]).mean() > 0.5
