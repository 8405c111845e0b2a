"""CLIPs of Hugging Face behind our calls, with tiny networks of random weights and a tokenizer made here."""

import builtins
import json
import shutil

import numpy as np
import pytest
import torch as th
import torch.nn.functional as F
from PIL import Image
from test_programs import done, refused
from test_text_to_image_programs import DECODER, PRIOR, TRAIN, write_data

from guided_diffusion.text_to_image import hugging_face, models, pipeline, tasks

transformers = pytest.importorskip("transformers")

TEXTS = ["a dark picture", "A  light picture", "something"]
IMAGE_MEAN, IMAGE_STD = [0.2, 0.3, 0.4], [0.5, 0.6, 0.7]


def make():
    """(a CLIPModel, its tokenizer): every text is letters, one token each, of which 10 fit."""
    th.manual_seed(0)
    letters = [f"{letter}{end}" for letter in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    vocab = {token: k for k, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = transformers.CLIPTokenizer(vocab=vocab, merges=[])
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
             "projection_dim": 16}  # fmt: skip
    text = sizes | {"vocab_size": len(vocab), "max_position_embeddings": 12, "eos_token_id": vocab["<|endoftext|>"],
                    "bos_token_id": vocab["<|startoftext|>"], "pad_token_id": vocab["<|endoftext|>"]}  # fmt: skip
    vision = sizes | {"image_size": 16, "patch_size": 8}
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    return model.eval(), tokenizer


def save(folder, model=None, tokenizer=None):
    """A model and its tokenizer as a whole."""
    if model is None:
        model, tokenizer = make()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    told = {"image_mean": IMAGE_MEAN, "image_std": IMAGE_STD}
    (folder / "preprocessor_config.json").write_text(json.dumps(told))


@pytest.fixture(scope="module")
def parts():
    return make()


@pytest.fixture(scope="module")
def folder(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    save(folder, *parts)
    return folder


@pytest.fixture(scope="module")
def clip(folder):
    return models.open_clip(folder)


def features(model, name, **inputs):
    """What their own method gives, which in newer versions stands in a record."""
    with th.no_grad():
        out = getattr(model, name)(**inputs)
    return F.normalize(getattr(out, "pooler_output", out), dim=-1)


def test_texts_are_embedded_as_they_do_it(parts, clip):
    model, tokenizer = parts
    told = tokenizer(TEXTS, padding=True, truncation=True, max_length=12, return_tensors="pt")
    emb, tokens, mask = clip.text_encode(TEXTS)
    assert th.allclose(emb, features(model, "get_text_features", **told), atol=1e-6)
    assert emb.shape == (3, 16) and tokens.shape == (3, 12, 32) and mask.dtype == th.bool
    assert mask.sum(1).tolist() == [12, 12, 11]
    assert th.allclose(clip.text_embed(TEXTS[2]), emb[2:], atol=1e-6)
    assert (clip.size, clip.token_size, clip.length) == (16, 32, 12)


def test_images_are_embedded_as_they_do_it(parts, clip):
    model, _ = parts
    x = th.rand(3, 3, 16, 16) * 2 - 1
    mean, std = (th.tensor(each)[:, None, None] for each in (IMAGE_MEAN, IMAGE_STD))
    theirs = features(model, "get_image_features", pixel_values=((x + 1) / 2 - mean) / std)
    assert th.allclose(clip.image_embed(x), theirs, atol=1e-6)
    grey = x[:, :1]
    assert th.allclose(clip.image_embed(grey), clip.image_embed(grey.expand(-1, 3, -1, -1)), atol=1e-6)
    with pytest.raises(ValueError, match=r"takes images \[N,3,H,W\], or \[N,1,H,W\] in grey, got \[2, 4, 8, 8\]"):
        clip.image_embed(th.zeros(2, 4, 8, 8))


def test_images_of_other_sizes_are_resized_as_pictures_are(clip, monkeypatch):
    """Bicubic and antialiased, as Pillow does it, which is what their processors do."""
    rng = np.random.default_rng(0)
    seen = []
    clip.vision_model.register_forward_pre_hook(lambda _, args, kw: seen.append(kw["pixel_values"]), with_kwargs=True)
    for side in (8, 40):
        picture = rng.integers(90, 170, (side, side, 3), np.uint8)
        x = th.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1
        clip.image_embed(x)
        theirs = np.asarray(Image.fromarray(picture).resize((16, 16), Image.Resampling.BICUBIC)) / 255
        ours = (seen.pop() * clip.std + clip.mean)[0].permute(1, 2, 0)
        assert np.abs(ours.numpy() - theirs).max() < 1.5 / 255  # of rounding, of rows and of columns


def test_it_is_frozen_and_has_a_fingerprint(clip, folder, parts, tmp_path):
    assert not clip.training and not any(p.requires_grad for p in clip.parameters()) and clip.mean.dtype == th.float32
    assert models.fingerprint(clip) == models.fingerprint(models.open_clip(folder))
    other, tokenizer = transformers.CLIPModel(parts[0].config), parts[1]
    other.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert models.fingerprint(models.open_clip(tmp_path)) != models.fingerprint(clip)


def test_long_texts_are_cut_and_blank_ones_are_null(clip):
    assert clip.cut("dark") == "dark" and clip.cut("abcdefghijklmn").replace(" ", "") == "abcdefghij"
    cond = tasks.Captions(clip, ["", "dark"])(th.tensor([0, 1]))
    assert not cond["vector"][0].any() and not cond["token_mask"][0].any() and cond["vector"][1].any()


def test_parts_that_were_saved_apart(parts, clip, tmp_path):
    model, tokenizer = parts
    text = transformers.CLIPTextModelWithProjection(model.config.text_config)
    vision = transformers.CLIPVisionModelWithProjection(model.config.vision_config)
    for ours, name in ((text, "text_encoder"), (vision, "image_encoder")):
        ours.load_state_dict({key: model.state_dict()[key] for key in ours.state_dict()})
        ours.save_pretrained(tmp_path / name)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "feature_extractor").mkdir()
    told = {"image_mean": IMAGE_MEAN, "image_std": IMAGE_STD}
    (tmp_path / "feature_extractor" / "preprocessor_config.json").write_text(json.dumps(told))
    apart, x = models.open_clip(tmp_path), th.rand(2, 3, 16, 16)
    assert th.equal(apart.text_embed(TEXTS), clip.text_embed(TEXTS))
    assert th.equal(apart.image_embed(x), clip.image_embed(x))
    shutil.rmtree(tmp_path / "feature_extractor")
    assert models.open_clip(tmp_path).mean.flatten().tolist() == pytest.approx(hugging_face.MEAN)


def test_folders_that_hold_none(folder, parts, tmp_path):
    def changed(name, change):
        shutil.copytree(folder, tmp_path / name)
        change(tmp_path / name)
        return str(tmp_path / name)

    def other_size(path):
        config = transformers.CLIPVisionConfig(**parts[0].config.vision_config.to_dict() | {"projection_dim": 8})
        transformers.CLIPVisionModelWithProjection(config).save_pretrained(path / "image_encoder")
        for name in ("text_encoder", "tokenizer"):
            shutil.copytree(folder, path / name)
        (path / "config.json").unlink()

    def bare(path):
        from safetensors.torch import load_file, save_file

        weights = load_file(path / "model.safetensors")
        weights.pop("visual_projection.weight")
        save_file(weights, path / "model.safetensors", {"format": "pt"})

    cases = [
        (changed("none", lambda path: (path / "model.safetensors").unlink()), "that can be read: .*model.safetensors"),
        (changed("cut", lambda path: (path / "model.safetensors").write_bytes(b"12345678901")), "can be read"),
        (changed("bare", bare), "lacks 1 of the weights of a CLIPModel, as visual_projection.weight"),
        (changed("sizes", other_size), "text encoder makes embeddings of 16 numbers and the image encoder of 8"),
    ]
    for path, message in cases:
        with pytest.raises(ValueError, match=f"^{path} holds no CLIP of Hugging Face .*{message}"):
            models.open_clip(path)
    assert not hugging_face.is_folder(str(tmp_path)) and not hugging_face.is_folder(str(folder / "config.json"))


def test_without_the_package(folder, monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "transformers":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"pip install 'guided-diffusion\[transformers\]'"):
        models.open_clip(folder)


def test_the_cascade_on_such_an_encoder(folder, tmp_path, monkeypatch):
    """Of another size than the pictures, and of colour where they are grey."""
    monkeypatch.chdir(tmp_path)
    write_data("data.npz")
    more = f"--data_dir data.npz {TRAIN} --iterations 1 --clip_path {folder}"
    done("prior_train", f"{more} {PRIOR} --log_dir prior")
    done("decoder_train", f"{more} {DECODER} --log_dir decoder")
    told = json.loads((tmp_path / "prior" / "config.json").read_text())
    assert (told["flags"]["clip_size"], told["flags"]["token_size"], told["flags"]["context_length"]) == (16, 32, 12)
    assert told["clip"]["fingerprint"] == models.fingerprint(models.open_clip(folder))
    draw = "--model_path decoder/model000001.pt --prompts dark 'far too long a text' --num_samples 3 --batch_size 3"
    said = done("text_to_image_sample", f"{draw} --prior_path prior/model000001.pt --prior_steps 3"
                " --timestep_respacing 3 --log_dir out").out  # fmt: skip
    assert "1 of 2 texts are too long and are cut" in said
    with np.load("out/samples_3x8x8x1.npz") as found:
        assert found["texts"].tolist() == ["dark", "far too long a text", "dark"]
    done("text_to_image_sample", "--model_path decoder/model000001.pt --images data.npz --num_samples 2 --batch_size 2"
         " --timestep_respacing 3 --log_dir varied")  # fmt: skip
    refused("decoder_train", f"{more} {DECODER} --image_channels 4 --log_dir no", "--image_channels 4: this CLIP takes")
    embeddings = pipeline.TextEmbeddings(models.open_clip(folder), ["dark"])
    assert th.allclose(embeddings([0, 1]).norm(dim=1), th.ones(2), atol=1e-6)
