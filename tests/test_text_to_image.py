"""
The cascade from text to image: exact answers about its tokenizer, CLIP, prior, decoder and pipeline.

The tutorial that the cascade comes from has faults, numbered below, that this one must not have. Tests named
`test_m3_NN` hold most of them; the others are held by tests of what the cascade shares with the house:

FAULTS
13 test_networks.py::test_s08_04_scale_is_the_first_half_and_acts_between_norm_and_silu
"""

import math
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch as th
import torch.nn.functional as F
from scipy.special import gamma, hyp1f1

from guided_diffusion import config, ema, generate, guidance, logger, toy
from guided_diffusion.network_options import (
    ClipOptions,
    ClipSizes,
    DecoderOptions,
    DecoderProcessOptions,
    PriorOptions,
    PriorProcessOptions,
)
from guided_diffusion.script_util import process_of
from guided_diffusion.tasks import DiffusionTask
from guided_diffusion.text_to_image import clip as clips
from guided_diffusion.text_to_image import decoder as decoders
from guided_diffusion.text_to_image import models, pipeline, prior, tasks, tokenizer, training
from guided_diffusion.text_to_image.transformer import TextEncoder, Transformer
from guided_diffusion.train_util import Trainer

SHIRT = "An image of a t-shirt/top"
CLIP = {
    "image_size": 8, "image_channels": 1, "clip_size": 16, "patch_size": 4, "image_width": 32, "image_layers": 1,
    "image_heads": 2, "text_width": 32, "text_layers": 1, "text_heads": 2, "context_length": 12,
}  # fmt: skip
DECODER = {
    "image_size": 8, "image_channels": 1, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,1",
    "attention_resolutions": "4", "text_width": 32, "text_layers": 1, "text_heads": 2, "context_length": 12,
    "learn_sigma": False, "clip_size": 16,
}  # fmt: skip
PROMPTS = ["a three", "the digit 7, by hand"]  # the second is cut


@pytest.fixture(autouse=True)
def seeded():
    th.manual_seed(0)


def tiny_clip(**flags):
    return models.create_clip(config.defaults(ClipOptions) | CLIP | flags).eval().requires_grad_(False)


def lively(net):
    """The network with every weight drawn, so that no layer is zero and each input is felt."""
    with th.no_grad():
        for p in net.parameters():
            p.normal_(std=1.5 * p[0].numel() ** -0.5 if p.ndim > 1 else 0.3)
    return net.eval()


def tiny_prior(size=16, token_size=32, length=12, **options):
    return lively(prior.Prior(size, token_size, length, **{"width": 32, "layers": 1, "heads": 2, **options}))


def tiny_decoder(**flags):
    groups = DecoderOptions, DecoderProcessOptions, ClipSizes
    return lively(models.create_decoder(config.defaults(*groups) | DECODER | flags))


def prior_process(steps=20, **flags):
    return process_of(config.defaults(PriorProcessOptions) | {"diffusion_steps": steps} | flags)


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def told(count=3, length=5, size=16, token_size=32):
    """Conditions of the prior; the captions have 5, 3 and 1 tokens."""
    mask = th.arange(length) < th.tensor([5, 3, 1])[:count, None]
    return {"vector": th.randn(count, size), "tokens": th.randn(count, length, token_size), "token_mask": mask}


class Known:
    """What stands for a CLIP: the embeddings and features of texts, and the embeddings of images, are given."""

    device = th.device("cpu")

    def __init__(self, texts, vectors, images=None, features=4):
        self.of = {text: F.normalize(vector, dim=-1) for text, vector in zip(texts, vectors)}
        self.images, self.features, self.length, self.calls = images, features, 2, 0

    def text_embed(self, texts):
        return th.stack([self.of[text] for text in texts])

    def text_encode(self, texts):
        self.calls += 1
        ones = th.ones(len(texts), self.length)
        return self.text_embed(texts), ones[..., None].expand(-1, -1, self.features), ones.bool()

    def image_embed(self, x):
        return self.images[x[:, 0, 0, 0].long()]


# ---------------------------------------------------------------------------------------------------------- tokenizer


def test_tokens_of_the_tutorials_caption():
    ids, mask = tokenizer.tokenize(SHIRT)
    assert ids.shape == (1, 64) and ids.dtype == th.int64 and mask.sum() == 27
    assert ids[0, :4].tolist() == [2, 65, 110, 32] and ids[0, 26] == 3 and not ids[0, 27:].any()
    assert th.equal(mask, ids != 0) and tokenizer.decode(ids) == [SHIRT]


@pytest.mark.parametrize("text", ["Привет, мир", "三", "مرحبا", "🐈‍⬛ and 👟", "a\ttab\nand a line", "é"])
def test_m3_22_every_script_comes_back(text):
    ids, mask = tokenizer.tokenize([text])
    assert tokenizer.decode(ids) == [text] and mask.sum() == len(text.encode()) + 2


def test_m3_22_what_is_too_long_is_cut_at_a_whole_character_and_keeps_its_end():
    for text in ("x" * 80, "я" * 80, "👟" * 80, "a" + "👟" * 80):
        ids, mask = tokenizer.tokenize(text, 11)
        size = len(text[-1].encode())
        room = (9 - (text[0] == "a")) // size * size + (text[0] == "a")
        assert ids[0, room + 1] == 3 and mask.sum() == room + 2
        assert tokenizer.decode(ids) == [tokenizer.cut(text, 11)] and text.startswith(tokenizer.cut(text, 11))
    with pytest.raises(ValueError, match="a text of 2 tokens has no room"):
        tokenizer.tokenize("a", 2)


def test_m3_22_specials_are_no_characters_and_lone_surrogates_no_error():
    ids, mask = tokenizer.tokenize("a\x00b\x02c\x03d")
    assert ids[0, :6].tolist() == [2, 97, 98, 99, 100, 3] and mask.sum() == 6
    assert tokenizer.decode(tokenizer.tokenize("a\ud83dz")[0]) == ["a?z"]
    assert th.equal(tokenizer.tokenize("\x01\x04")[0][0, :4], th.tensor([2, 1, 4, 3]))


def test_a_blank_text_is_padding_alone():
    for blank in ("", "  \n\t", "\x00", "\u3000", " \x02\x03"):
        ids, mask = tokenizer.tokenize([blank, "a"])
        assert not ids[0].any() and not mask[0].any() and mask[1].sum() == 3
        told = tasks.Captions(tiny_clip(), [blank, "a"]).table
        assert told["token_mask"].any(1).tolist() == [False, True] and not told["vector"][0].any()
    assert tokenizer.decode(ids) == ["", "a"]


def test_cuts_are_warned_of_and_control_characters_are_none(tmp_path, capsys):
    with logger.scoped_configure(dir=str(tmp_path), format_strs=["stdout"]):
        tasks.warn_of_cuts(["a\x00b"], partial(tokenizer.cut, length=4))
        assert " are cut" not in capsys.readouterr().out
        tasks.warn_of_cuts(["ab", "abc", "abcd"], partial(tokenizer.cut, length=4))
    said = capsys.readouterr()
    assert "2 of 3 texts are too long and are cut; the first to 'ab'" in said.out + said.err


# --------------------------------------------------------------------------------------------------------------- CLIP


def test_parameter_counts_are_those_of_the_tutorial():
    flags = config.defaults(ClipOptions) | {"image_size": 32, "image_channels": 1}
    with th.device("meta"):
        clip = models.create_clip(flags)
        own = TextEncoder(256, 4, 8, 64)
    assert parameters(clip) == 9_685_249
    assert parameters(clip.image) + parameters(clip.image_proj) == 4_812_544
    assert parameters(clip.text) + parameters(clip.text_proj) == 4_872_704
    assert clip.log_scale.numel() == 1 and parameters(own) == 3_232_256


def test_m3_11_a_perfect_clip_loses_nothing_where_captions_repeat():
    captions = th.tensor([0, 1, 0, 2, 0, 1])
    space = th.eye(4)[captions]
    same = captions[:, None] == captions
    loss, right = clips.contrast(space, space, 100.0, same)
    assert loss.abs().max() < 1e-6 and right.all()
    a, b = F.normalize(th.randn(2, 6, 5), dim=-1)
    target, logits = same / same.sum(1, keepdim=True), 9 * a @ b.T
    parts = [F.kl_div(each.log_softmax(1), target, reduction="none").sum(1) for each in (logits, logits.T)]
    assert th.allclose(clips.contrast(a, b, 9.0, same)[0], sum(parts) / 2, atol=1e-5)
    _, right = clips.contrast(space, space.roll(1, 0), 100.0, same)
    assert right.tolist() == [0, 0, 0, 0, 0, 0]  # each image is nearest to the caption before it


def test_contrast_of_distinct_captions_is_the_usual_cross_entropy():
    a, b = F.normalize(th.randn(2, 7, 5), dim=-1)
    loss, right = clips.contrast(a, b, 9.0, th.eye(7, dtype=th.bool))
    logits, target = 9 * a @ b.T, th.arange(7)
    usual = sum(F.cross_entropy(each, target, reduction="none") for each in (logits, logits.T)) / 2
    assert th.allclose(loss, usual, atol=1e-6) and th.equal(right, (logits.argmax(1) == target).float())
    part, _ = clips.contrast(a, b, 9.0, th.eye(7, dtype=th.bool), slice(2, 5))
    assert th.allclose(part, loss[2:5], atol=1e-6)


def test_m3_11_the_temperature_is_clamped_and_comes_down_again():
    clip = tiny_clip().train().requires_grad_(True)
    assert clip.log_scale.exp().item() == pytest.approx(1 / 0.07)
    clip.log_scale.data.fill_(9.0)
    x, ids = th.rand(4, 1, 8, 8), tokenizer.tokenize(["a", "b", "c", "d"], 12)[0]
    image_emb, text_emb, scale = clip(x, ids)
    assert scale.item() == pytest.approx(100)
    loss, _ = clips.contrast(image_emb, text_emb, scale, th.eye(4, dtype=th.bool))
    loss.sum().backward()
    assert clip.log_scale.grad.item() > 1  # the embeddings of fresh weights are wrong: surer is worse
    clip.eval().log_scale.data.fill_(1.0)
    assert clip(x, ids)[2].item() == pytest.approx(math.e)


def test_m3_14_clip_does_not_read_padding():
    clip = tiny_clip()
    ids, mask = tokenizer.tokenize(["ab", "abcdefghij"], 12)
    other = th.where(mask, ids, 77)
    a, b = clip.text(ids, mask), clip.text(other, mask)
    assert th.equal(a[mask], b[mask]) and not th.equal(a[~mask], b[~mask])
    emb, features, its_mask = clip.text_encode(["ab", "abcdefghij"])
    assert th.equal(features, a) and th.equal(its_mask, mask)
    at_end = th.stack([a[0, 3], a[1, 11]])  # of the end token
    assert th.allclose(emb, F.normalize(clip.text_proj(at_end), dim=-1), atol=1e-6)
    both, one = clip.text_embed(["ab", "abcdefghij"]), clip.text_embed(["ab"])
    assert th.allclose(both[:1], one, atol=1e-6) and th.equal(clip.text_embed("ab"), one)
    assert not th.allclose(both[0], both[1], atol=1e-2)


def test_m3_04_clip_normalizes_its_images_itself_and_m3_10_its_embeddings_are_unit():
    clip, x = tiny_clip(image_mean=0.2, image_std=0.4), th.rand(3, 1, 8, 8) * 2 - 1
    seen = []
    clip.image.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    emb = clip.image_embed(x)
    assert th.allclose(seen[0], ((x + 1) / 2 - 0.2) / 0.4, atol=1e-6)
    for each in (emb, clip.text_embed(PROMPTS), clip.text_embed([""])):
        assert th.allclose(each.norm(dim=1), th.ones(len(each)), atol=1e-6)


@pytest.mark.parametrize("flags, message", [
    ({"patch_size": 3}, "--patch_size 3 does not divide --image_size 8: take one that does, as 4"),
    ({"image_std": 0.0}, "--image_std is a standard deviation, above 0, not 0.0"),
    ({"image_size": "8x16"}, "square images, not --image_size 8x16"),
    ({"text_layers": 0}, "a transformer needs a layer, not 0"),
    ({"image_heads": 0}, "a transformer needs a head, not 0"),
    ({"context_length": 2}, "a text of 2 tokens"),
])  # fmt: skip
def test_clips_that_cannot_be(flags, message):
    with pytest.raises(ValueError, match=message):
        tiny_clip(**flags).text_embed("a")


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"built for images \[N,1,8,8\], got \[2, 3, 8, 8\]"):
        tiny_clip().image_embed(th.zeros(2, 3, 8, 8))


def test_zero_shot_takes_the_nearest_text_and_averages_several():
    a, b = th.eye(3)[0], th.eye(3)[1]
    oracle = Known(["a", "b", "also b"], [a, b, F.normalize(th.tensor([1.0, 9.0, 0.0]), dim=0)], th.stack([a, b]))
    x = th.tensor([0.0, 1.0, 1.0, 0.0, 1.0]).reshape(5, 1, 1, 1)
    assert clips.classify(oracle, x, ["a", "b"]).tolist() == [0, 1, 1, 0, 1]
    assert clips.classify(oracle, x, [["a"], ["also b", "b"]], batch_size=2).tolist() == [0, 1, 1, 0, 1]
    assert clips.classify(oracle, x, ["b", "a"]).tolist() == [1, 0, 0, 1, 0]
    # Of the texts of a class all count: the first alone would be as far from b as those of class 0.
    oracle = Known(["a", "far", "b"], [a, th.eye(3)[2], b], th.stack([a, b]))
    assert clips.classify(oracle, x, [["a"], ["far", "b"]]).tolist() == [0, 1, 1, 0, 1]


def test_captions_of_classes():
    assert training.captions_of_classes([0, 1, 0], ["a", "b", "c"]) == [["a", "c"], ["b"]]
    assert training.captions_of_classes([0, 1], ["a", "a"]) is None  # of two classes
    assert training.captions_of_classes([0, 2], ["a", "b"]) is None  # class 1 has none


def test_pictures_are_shifted_whole():
    x = th.arange(2 * 9.0).reshape(2, 1, 3, 3)
    corner = th.tensor([[1, 1], [0, 2]])
    out = tasks.shifted(x, corner, 1)
    assert th.equal(out[0], x[0])  # the middle
    assert th.equal(out[1, 0], th.tensor([[-1.0, -1, -1], [10, 11, -1], [13, 14, -1]]))  # a row down, a column left
    task = tasks.ClipTask(tiny_clip(), 2)
    corners = task.condition(th.zeros(4000, 1, 1, 1), {}, np.random.default_rng(0), None)["corner"]
    assert sorted(corners.unique().tolist()) == [0, 1, 2, 3, 4]
    assert (corners.float().mean(0) - 2).abs().max() < 4 * math.sqrt(2 / 4000)
    x, seen, ids = th.rand(3, 1, 8, 8), [], th.ones(3, task.net.length, dtype=th.int64)
    cond = {"caption": ids, "corner": th.zeros(3, 2, dtype=th.int64)}
    task.net.image.patches.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for training_now in (True, False):  # held-out pictures stay where they are
        task.loss(task.net.train(training_now), x, cond, None, None)
    assert not th.equal(seen[0], seen[1]) and th.equal(seen[1], (x - task.net.mean) / task.net.std)
    with pytest.raises(ValueError, match="--crop_padding is a number of pixels, 0 or more, not -1"):
        tasks.ClipTask(tiny_clip(), -1)


# -------------------------------------------------------------------------------------------------------------- prior


def test_a_causal_transformer_does_not_look_ahead():
    net, x = lively(Transformer(32, 2, 2, causal=True)), th.randn(2, 6, 32)
    later = x.clone()
    later[:, 4:] = 9
    out, changed = net(x), net(later)
    assert th.equal(out[:, :4], changed[:, :4]) and not th.equal(out[:, 4], changed[:, 4])
    both_ways = lively(Transformer(32, 2, 2))
    assert not th.allclose(both_ways(x)[:, :4], both_ways(later)[:, :4])


def test_the_prior_is_causal():
    """What it makes of the caption does not know the embedding that is being drawn."""
    net, cond, seen = tiny_prior(), told(), []
    net.transformer.register_forward_hook(lambda _, __, out: seen.append(out))
    for x in (th.zeros(3, 16), th.ones(3, 16)):
        net(x, th.tensor([0, 5, 9]), **cond)
    assert th.equal(seen[0][:, :-2], seen[1][:, :-2]) and not th.allclose(seen[0][:, -2:], seen[1][:, -2:])


def test_m3_09_the_prediction_depends_on_all_that_counts_and_on_no_padding():
    net, cond = tiny_prior(), told()
    x, t = th.randn(3, 16), th.tensor([0, 5, 9])
    out = net(x, t, **cond)
    assert out.shape == (3, 16)
    rubbish = cond | {"tokens": cond["tokens"].masked_fill(~cond["token_mask"][..., None], math.nan)}
    assert th.equal(net(x, t, **rubbish), out)
    inputs = {"x": x, "vector": cond["vector"], "tokens": cond["tokens"]}
    for name, value in inputs.items():
        value.requires_grad_(True)
        (grad,) = th.autograd.grad(net(inputs["x"], t, **cond).sum(), value)
        value.requires_grad_(False)
        felt = grad.abs().sum(-1) > 0
        assert th.equal(felt, cond["token_mask"] if name == "tokens" else th.ones(3, dtype=th.bool)), name
    assert th.autograd.grad(net(x, t, **cond).sum(), net.query)[0].abs().sum() > 0  # what the prediction stands at
    swapped = cond["tokens"][:1, [1, 0, 2, 3, 4]]
    assert not th.allclose(net(x[:1], t[:1], **{n: v[:1] for n, v in cond.items()} | {"tokens": swapped}), out[:1])


def test_the_length_that_captions_are_padded_to_changes_nothing():
    net, cond = tiny_prior(), told()
    x, t = th.randn(3, 16), th.tensor([0, 5, 9])
    longer = cond | {"tokens": F.pad(cond["tokens"], (0, 0, 0, 4)), "token_mask": F.pad(cond["token_mask"], (0, 4))}
    assert th.allclose(net(x, t, **cond), net(x, t, **longer), atol=1e-5)


def test_m3_19_times_may_lie_between_and_make_no_tensor_elsewhere():
    net, cond, x = tiny_prior(), told(), th.randn(3, 16)
    at = {t: net(x, th.full((3,), t), **cond) for t in (3, 3.0, 3.5, 4)}
    assert th.equal(at[3], at[3.0])
    gap = (at[4] - at[3]).norm()
    assert 0.1 * gap < (at[3.5] - at[3]).norm() < gap and (at[4] - at[3.5]).norm() < gap
    meta = net.to("meta")
    assert meta(x.to("meta"), th.zeros(3, device="meta"), **{n: v.to("meta") for n, v in cond.items()}).shape == (3, 16)


def test_the_null_caption_is_what_dropping_gives():
    clip, net = tiny_clip(), tiny_prior()
    cond = tasks.Captions(clip, ["a three", "", " "])(th.tensor([0, 1, 2]))
    one = {name: value[:1] for name, value in cond.items()}
    null = guidance.dropped(one, np.random.default_rng(0), prior.NULL, 1.0)
    for k in (1, 2):
        assert all(th.equal(cond[name][k], null[name][0]) for name in null)
    x, t = th.randn(1, 16).expand(3, -1), th.full((3,), 4)
    out = net(x, t, **cond)
    assert th.allclose(out[1], net(x[:1], t[:1], **null)[0], atol=1e-6) and not th.allclose(out[0], out[1], atol=1e-2)


def test_many_captions_are_encoded_as_few(monkeypatch):
    clip, numbers = tiny_clip(), th.tensor([2, 0, 1])
    few = tasks.Captions(clip, ["a three", "", "x"])(numbers)
    monkeypatch.setattr(tasks, "MANY_TEXTS", 2)
    many = tasks.Captions(clip, ["a three", "", "x"])
    assert many.table is None and all(th.allclose(many(numbers)[name], few[name], atol=1e-6) for name in few)


def test_the_first_of_equally_near_candidates_is_kept():
    text = th.tensor([[1.0, 0.0]] * 3)
    candidates = th.tensor([[[0.6, 0.8], [0.6, -0.8]], [[0.0, 1.0], [0.6, 0.8]], [[1.0, 0.0], [0.6, 0.8]]])
    assert th.equal(prior.nearest(candidates, text), candidates[th.arange(3), th.tensor([0, 1, 0])])


def test_the_prior_predicts_the_clean_embedding():
    net, cond, process = tiny_prior(), told(), prior_process()
    x0, noise, t = th.randn(3, 16), th.randn(3, 16), th.tensor([0, 7, 19])
    loss = DiffusionTask(net, process).loss(net, x0, cond, t, noise)["loss"]
    again = net(process.q_sample(x0, t, noise), t, **cond)
    assert th.allclose(loss, ((again - x0) ** 2).mean(1), atol=1e-6)


@pytest.mark.parametrize("change, message", [
    ({"vector": None}, "the prior needs the condition vector"),
    ({"token_mask": None}, "the prior needs the condition token_mask"),
    ({"vector": th.zeros(3, 4)}, r"condition vector must be floats of shape \[3,16\]"),
    ({"tokens": th.zeros(3, 20, 32), "token_mask": th.ones(3, 20).bool()}, "captions of 20 tokens are too long"),
])  # fmt: skip
def test_conditions_that_the_prior_cannot_take(change, message):
    with pytest.raises(ValueError, match=message):
        tiny_prior()(th.zeros(3, 16), th.zeros(3), **told() | change)
    with pytest.raises(ValueError, match=r"built for embeddings \[N,16\], got \[3, 8\]"):
        tiny_prior()(th.zeros(3, 8), th.zeros(3), **told())


def test_m3_10_embeddings_as_data_have_unit_variance_and_come_back():
    z = th.randn(5, 16)
    data = prior.as_data(z)
    assert th.allclose((data**2).mean(1), th.ones(5), atol=1e-5)
    assert th.allclose(prior.as_embedding(data), F.normalize(z, dim=1), atol=1e-6)
    stream = tasks.embedded(OneBatch(), tiny_clip())
    x, cond = next(stream)
    assert th.allclose((x**2).mean(1), th.ones(4), atol=1e-5)
    assert th.allclose((cond["vector"] ** 2).mean(1), th.tensor([1.0, 1, 0, 1]), atol=1e-5)  # the third is blank


class OneBatch:
    """A stream as the loader's: four pictures and the numbers of their texts."""

    texts = ("a three", "", "seven")

    def __iter__(self):
        return self

    def __next__(self):
        x = th.randn(4, 1, 8, 8, generator=th.Generator().manual_seed(3))
        return x.clamp(-1, 1), {"text": th.tensor([0, 2, 1, 0])}


def exact(mean, std, process):
    """A network that predicts E[x_0 | x_t] of Gaussian embeddings, whatever it is told."""
    mixture = toy.Mixture(mean[None], std)
    return lambda x, t, **cond: mixture.denoise(process, x, t)[0]


def reached(mean, std, process):
    """Mean and standard deviation, in exact arithmetic, of where the ancestral walk on such embeddings ends."""
    m, v = np.zeros(len(mean)), np.ones(len(mean))
    for row in reversed(range(process.num_timesteps)):
        abar = process.alphas_cumprod[row]
        gain = math.sqrt(abar) * std**2 / (abar * std**2 + 1 - abar)
        a, b = process.posterior_mean_coef1[row], process.posterior_mean_coef2[row]
        m = a * (mean + gain * (m - math.sqrt(abar) * mean)) + b * m
        v = (a * gain + b) ** 2 * v + (process.posterior_variance[row] if row else 0)
    return m, math.sqrt(v[0])


def moments_of_directions(length, size, terms=200):
    """
    E[u_1] and E[u_1^2] of u = x / |x| where x is N(m, I) of so many dimensions, m of this length along the first.

    |x|^2 is a Poisson mixture of chi-squared variables, given which u_1^2 is beta distributed.
    """
    half = length**2 / 2
    first = length / math.sqrt(2) * gamma((size + 1) / 2) / gamma(size / 2 + 1) * hyp1f1(0.5, size / 2 + 1, -half)
    n = np.arange(terms)
    weights = np.exp(n * math.log(half) - half - np.cumsum(np.log(np.maximum(n, 1))))
    return first, (weights * (1 + 2 * n) / (size + 2 * n)).sum()


def test_m3_05_an_exact_gaussian_prior_has_the_closed_forms_mean_and_covariance():
    """The whole reverse process is walked: one prediction from noise would give the mean alone."""
    size, std, count = 3, 0.6, 20000
    mean = th.tensor([1.2, 0.0, 0.0])
    process = prior_process(10)
    m, s = reached(mean.double().numpy(), std, process)
    assert 0.5 < s / std < 1 and m[0] == pytest.approx(1.2, abs=0.05)  # ten steps, small variance
    clip = Known(["a"], th.eye(size)[:1])
    draw = pipeline.TextEmbeddings(clip, ["a"], exact(mean, std, process), process, candidates=1)
    u = draw(range(count)).double()
    first, second = moments_of_directions(m[0] / s, size)
    expected = np.diag([second - first**2, (1 - second) / 2, (1 - second) / 2])
    error = 4 / math.sqrt(count)  # of unit vectors, whose coordinates have a standard deviation below 1
    np.testing.assert_allclose(u.mean(0), [first, 0, 0], atol=error * math.sqrt(expected.max()))
    np.testing.assert_allclose(np.cov(u.T), expected, atol=error * expected.max() * math.sqrt(2))


def test_m3_03_embeddings_are_not_clipped():
    """Of data this narrow every embedding has nearly the direction of the mean; clamped to [-1, 1] none would."""
    mean, process = th.tensor([3.0, -2.0, 0.0]), prior_process(50)
    draw = pipeline.TextEmbeddings(Known(["a"], th.eye(3)[:1]), ["a"], exact(mean, 1e-3, process), process)
    assert th.allclose(draw(range(4)), F.normalize(mean, dim=0).expand(4, -1), atol=2e-3)


def test_m3_05_candidates_are_independent_and_the_nearest_is_kept():
    process, mean = prior_process(10), th.tensor([1.2, 0.0, 0.0])
    clip, text = Known(["a"], th.eye(3)[1:2]), th.eye(3)[1]
    draw = partial(pipeline.TextEmbeddings, clip, ["a"], exact(mean, 0.6, process), process)
    both, single = draw(candidates=2)(range(50)), draw(candidates=1)(range(100))
    pairs = single.unflatten(0, (50, 2))
    assert (F.cosine_similarity(pairs[:, 0], pairs[:, 1]) < 0.95).float().mean() > 0.3
    assert th.allclose(both, prior.nearest(pairs, text.expand(50, -1)), atol=1e-6)
    assert (both @ text).mean() > (single @ text).mean() + 0.1


def test_a_prior_trained_on_two_classes_has_their_means_and_covariances(tmp_path):
    means = th.tensor([[2.0, 1, 0, 0], [0, 0, -1.5, 2]])
    spread = th.tensor([[0.3, 0.8, 0.3, 0.3], [0.6, 0.2, 0.5, 0.2]])

    def data(count, rng):
        y = th.from_numpy(rng.integers(2, size=count))
        noise = th.from_numpy(rng.standard_normal((count, 4)).astype(np.float32))
        return prior.as_data(means[y] + spread[y] * noise), y

    clip = Known(["one", "two"], means)
    encode, rng, process = tasks.Captions(clip, ["one", "two"]), np.random.default_rng(0), prior_process(1000)

    def batches():
        while True:
            x, y = data(64, rng)
            yield x, encode(y)

    net = prior.Prior(4, clip.features, clip.length, width=32, layers=2, heads=2)
    with logger.scoped_configure(dir=str(tmp_path), format_strs=[]):
        trainer = Trainer(
            DiffusionTask(net, process), batches(), batch_size=64, lr=4e-3, averages=ema.parse("0.99"),
            lr_anneal_steps=1500, lr_schedule="cosine", log_interval=2000, save_interval=2000, background_save=False,
        )  # fmt: skip
        trainer.run_loop()
    with trainer.averaged() as net:
        walked = prior_process(1000, timestep_respacing="50")
        drawn = pipeline.TextEmbeddings(clip, ["one", "two"], net, walked, candidates=1)(range(1000))
    true, y = data(20000, rng)
    for k in (0, 1):
        ours, theirs = prior.as_data(drawn[k::2]).double(), true[y == k].double()
        assert (ours.mean(0) - theirs.mean(0)).abs().max() < 0.1
        assert (ours.T.cov() - theirs.T.cov()).norm() < 0.25 * theirs.T.cov().norm()


# ------------------------------------------------------------------------------------------------------------ decoder


def decoder_inputs(net, count=3):
    ids = tokenizer.tokenize(["a three", "x", "0123456789ab"][:count], 12)[0]
    return th.randn(count, 1, 8, 8), th.tensor([0, 5, 9])[:count], {"vector": th.randn(count, 16), "caption": ids}


def test_m3_12_the_tokens_of_an_embedding_span_as_many_directions():
    net = tiny_decoder()
    tokens = net.to_tokens(th.randn(5, 16)).unflatten(1, (4, 32))
    assert [th.linalg.matrix_rank(each).item() for each in tokens] == [4] * 5
    for k in range(4):  # and none of them is a fixed one: each moves in as many directions as the embedding
        assert th.linalg.matrix_rank(net.to_tokens.weight.unflatten(0, (4, 32))[k]) == 16


def test_m3_14_the_decoder_does_not_read_padding():
    net = tiny_decoder()
    x, t, cond = decoder_inputs(net)
    out = net(x, t, **cond)
    encoded = {"vector": cond["vector"]} | net.encode(cond["caption"])
    assert th.equal(net(x, t, **encoded), out)
    rubbish = encoded["tokens"].masked_fill(~encoded["token_mask"][..., None], math.nan)
    assert th.equal(net(x, t, **encoded | {"tokens": rubbish}), out)
    features = net.text(th.where(cond["caption"] == 0, 99, cond["caption"]), encoded["token_mask"])
    assert th.equal(net(x, t, **encoded | {"tokens": features}), out)
    changed = net.encode(th.where(cond["caption"] == 3, 98, cond["caption"]))
    assert not th.allclose(net(x, t, **encoded | changed), out, atol=1e-3)
    alone = net(x[:1], t[:1], **{name: value[:1] for name, value in cond.items()})
    assert th.allclose(alone, out[:1], atol=1e-5)


def test_no_embedding_is_no_token():
    net = tiny_decoder()
    x, t, cond = decoder_inputs(net)
    null = guidance.nulled(cond, {"vector": 0.0})
    before, with_embedding = net(x, t, **null), net(x, t, **cond)
    net.to_tokens.bias.data += th.randn(128)
    assert th.equal(net(x, t, **null), before) and not th.allclose(net(x, t, **cond), with_embedding, atol=1e-3)


@pytest.mark.parametrize("flags, ignored", [
    ({"text_layers": 0}, "caption"), ({"image_tokens": 0}, None), ({"text_layers": 0, "image_tokens": 0}, "caption"),
])  # fmt: skip
def test_either_kind_of_token_may_be_missing(flags, ignored):
    net = tiny_decoder(**flags)
    x, t, cond = decoder_inputs(net)
    out = net(x, t, **cond)
    other = net(x, t, **cond | {"caption": th.zeros_like(cond["caption"])})
    assert th.equal(out, other) == (ignored == "caption")
    assert not th.allclose(net(x, t, **cond | {"vector": -cond["vector"]}), out, atol=1e-3)
    net.train()(x, t, **cond).sum().backward()
    assert all(p.grad is not None for p in net.parameters())  # else several processes could not train it


def test_m3_08_embeddings_and_captions_are_dropped_independently_at_their_rates():
    ids, n = tokenizer.tokenize(["a three"], 12)[0], 10000
    cond = {"vector": th.ones(n, 16), "caption": ids.expand(n, -1)}
    out = decoders.dropping(0.1, 0.5)(cond, np.random.default_rng(5))
    rng = np.random.default_rng(5)
    no_vector, no_caption = (th.from_numpy(rng.random(n) < rate) for rate in (0.1, 0.5))
    assert th.equal((out["vector"] == 0).all(1), no_vector) and th.equal((out["vector"] == 0).any(1), no_vector)
    assert th.equal((out["caption"] == 0).all(1), no_caption)
    assert th.equal(out["caption"][~no_caption], cond["caption"][~no_caption]) and (cond["vector"] == 1).all()
    for event, p in [(no_vector, 0.1), (no_caption, 0.5), (no_vector & no_caption, 0.05)]:
        assert abs(event.float().mean() - p) < 4 * math.sqrt(p * (1 - p) / n)
    with pytest.raises(ValueError, match=r"--caption_dropout is a probability from 0 to below 1, not 1\.0"):
        decoders.dropping(0.1, 1.0)


def test_m3_07_the_decoder_learns_from_the_embedding_of_the_picture_itself():
    clip = tiny_clip()
    for x, cond in [next(tasks.with_embeddings(OneBatch(), clip, 12))]:
        assert th.equal(cond["vector"], prior.as_data(clip.image_embed(x))) and set(cond) == {"vector", "caption"}
        assert th.equal(cond["caption"], tokenizer.tokenize(["a three", "seven", "", "a three"], 12)[0])


def test_m3_15_the_clip_is_frozen_and_no_part_of_what_is_trained():
    clip = tiny_clip()
    _, cond = next(tasks.with_embeddings(OneBatch(), clip, 12))
    x, more = next(tasks.embedded(OneBatch(), clip))
    assert not any(value.requires_grad for value in (cond["vector"], x, *more.values()))
    net = tiny_decoder()
    net.train()
    assert not clip.training and not any(name.startswith("clip") for name in net.state_dict())


def test_m3_16_a_network_keeps_nothing_of_a_call():
    for net, call in ((tiny_decoder(), decoder_inputs(None)), (tiny_prior(), (th.randn(3, 16), th.zeros(3), told()))):
        x, t, cond = call
        before = {id(module): set(vars(module)) for module in net.modules()}
        first = net(x, t, **cond)
        with pytest.raises(ValueError):
            net(x, t, **cond | {"vector": cond["vector"][:, :3]})
        assert {id(module): set(vars(module)) for module in net.modules()} == before
        assert th.equal(net(x, t, **cond), first)


def test_m3_17_options_are_fields_of_each_program_alone():
    for group in (ClipOptions, DecoderOptions, PriorOptions):
        flags = config.defaults(group)
        assert set(flags) >= {name for name in vars(group) if not name.startswith("_")}
    assert config.defaults(ClipOptions)["text_layers"] == 6 and config.defaults(DecoderOptions)["text_layers"] == 4


@pytest.mark.parametrize("mult", ["1,1,1", "1,2,1"])
def test_m3_18_factors_may_repeat(mult):
    net = tiny_decoder(channel_mult=mult, attention_resolutions="4")
    x, t, cond = decoder_inputs(net)
    assert net(x, t, **cond).shape == x.shape
    levels = [block for block in net.input_blocks if any("Attention" in type(part).__name__ for part in block)]
    assert len(levels) == 1  # at 4 pixels, the second of three levels, whatever the others' factors are


def test_m3_23_memory_formats_agree_and_inputs_are_left_alone():
    net = tiny_decoder()
    x, t, cond = decoder_inputs(net)
    kept = {name: value.clone() for name, value in cond.items()} | {"x": x.clone()}
    out = net(x, t, **cond)
    last = net.to(memory_format=th.channels_last)(x.to(memory_format=th.channels_last), t, **cond)
    assert th.allclose(out, last, atol=1e-5)
    assert all(th.equal(value, kept[name]) for name, value in (cond | {"x": x}).items())


# ----------------------------------------------------------------------------------------------------------- pipeline


def counted(net):
    """How often a network was called, in batches of which size."""
    calls = []
    net.register_forward_hook(lambda _, args, __: calls.append(len(args[0])))
    return calls


def test_m3_06_the_prior_runs_once_an_image_and_captions_are_encoded_once():
    clip, net, decoder = tiny_clip(), tiny_prior(), tiny_decoder()
    texts, priors, own, decoded = counted(clip.text), counted(net), counted(decoder.text), counted(decoder)
    embeddings = pipeline.TextEmbeddings(clip, PROMPTS, net, prior_process(5), candidates=2)
    given, _ = pipeline.conditions(decoder, embeddings, PROMPTS)
    process = process_of(config.defaults(DecoderProcessOptions) | {"diffusion_steps": 7})
    list(generate.sample_stream(process, decoder, shape=(1, 8, 8), num_samples=5, batch_size=3, given=given))
    assert texts == [2] and own == [2]  # not for each batch, let alone for each step
    assert priors == [6] * 5 + [4] * 5 and decoded == [3] * 7 + [2] * 7


def test_m3_24_both_walks_may_be_shorter():
    walked = prior_process(100, timestep_respacing="5")
    net = tiny_prior()
    times = []
    net.register_forward_pre_hook(lambda _, args: times.append(args[1][0].item()))
    pipeline.TextEmbeddings(tiny_clip(), ["a"], net, walked, candidates=1)([0])
    assert times == [99, 74, 50, 25, 0]  # of the clock that it was trained on


def test_m3_08_guidance_of_the_prior_is_affine_in_its_scale():
    net, process, cond = tiny_prior(), prior_process(), told()
    x, t = th.randn(3, 16), th.full((3,), 9)

    def at(scale):
        return process.predictor(net, clip_denoised=False, guide=pipeline._guide(scale))(x, t, **cond).x0

    caption, null = at(1), net(x, t, **guidance.nulled(cond, prior.NULL))
    assert pipeline._guide(1) is None and th.equal(caption, net(x, t, **cond))
    for scale in (0, 2, 3.5):
        assert th.allclose(at(scale), null + scale * (caption - null), atol=1e-5)
    assert (caption - null).norm() > 0.1


def test_m3_08_guidance_of_the_decoder_is_affine_in_its_scale():
    decoder, clip = tiny_decoder(), tiny_clip()
    embeddings = pipeline.TextEmbeddings(clip, PROMPTS)
    given, null = pipeline.conditions(decoder, embeddings, PROMPTS)
    cond = {name: of([0, 1]) for name, of in given.items()}
    assert null.keys() == cond.keys() == {"vector", "tokens", "token_mask"}
    assert th.equal(cond["vector"], prior.as_data(embeddings([0, 1])))  # as it was trained on them
    process = process_of(config.defaults(DecoderProcessOptions) | {"diffusion_steps": 7})
    x, t = th.randn(2, 1, 8, 8), th.full((2,), 3)

    def at(scale):
        guide = partial(guidance.classifier_free, null=null, scale=scale, batched=True)
        return process.predictor(decoder, clip_denoised=False, guide=guide)(x, t, **cond).eps

    blank = tokenizer.tokenize(["", ""], 12)[0]
    with th.no_grad():
        said, nothing = decoder(x, t, **cond), decoder(x, t, vector=th.zeros(2, 16), caption=blank)
    for scale in (0, 1, 3):
        assert th.allclose(at(scale), nothing + scale * (said - nothing), atol=1e-4)


def test_captions_that_are_not_shown_are_null():
    decoder, clip = tiny_decoder(), tiny_clip()
    hidden, _ = pipeline.conditions(decoder, pipeline.TextEmbeddings(clip, PROMPTS))
    cond = {name: of([0, 1, 2]) for name, of in hidden.items()}
    assert not cond["tokens"].any() and not cond["token_mask"].any() and len(cond["tokens"]) == 3
    assert th.equal(cond["vector"][0], cond["vector"][2])
    silent, null = pipeline.conditions(tiny_decoder(text_layers=0), pipeline.TextEmbeddings(clip, PROMPTS), PROMPTS)
    assert silent.keys() == null.keys() == {"vector"}


def test_samples_do_not_depend_on_their_batch():
    clip, net, process = tiny_clip(), tiny_prior(), prior_process(5)
    draw = pipeline.TextEmbeddings(clip, PROMPTS, net, process, scale=2.0, seed=3)
    together = draw([0, 1, 2])
    assert all(th.allclose(draw([i])[0], together[i], atol=1e-6) for i in range(3))
    first = pipeline.TextEmbeddings(clip, PROMPTS[:1], net, process, scale=2.0, seed=3)([0])
    assert th.allclose(first[0], together[0], atol=1e-6) and not th.allclose(together[0], together[2], atol=1e-4)
    other = pipeline.TextEmbeddings(clip, PROMPTS, net, process, scale=2.0, seed=4)([0, 1, 2])
    assert not th.allclose(other, together, atol=1e-4) and not together.requires_grad


def test_the_noise_of_embeddings_is_not_that_of_pictures(monkeypatch):
    starts = []
    monkeypatch.setattr(
        pipeline, "SeededNoise", lambda seed, numbers, device: starts.append((seed, numbers)) or real(seed, numbers)
    )
    real = generate.sampling.SeededNoise
    pipeline.TextEmbeddings(tiny_clip(), PROMPTS, tiny_prior(), prior_process(2), seed=3)([4, 5])
    assert starts == [(3 + 2**33, [8, 9, 10, 11])]


@pytest.mark.parametrize("prompts, more, message", [
    ([], {}, "no prompts: give --prompts"),
    (["a"], {"candidates": 0}, "--prior_candidates must be 1 or more, not 0"),
    (["a", " "], {}, "an empty prompt has no embedding of its own: give --prior_path"),
    (["a", "\x02 "], {}, "an empty prompt has no embedding of its own: give --prior_path"),
])  # fmt: skip
def test_embeddings_that_cannot_be(prompts, more, message):
    with pytest.raises(ValueError, match=message):
        pipeline.TextEmbeddings(tiny_clip(), prompts, **more)


def test_slerp_goes_along_the_circle_at_even_speed():
    angle, share = 2.0, th.tensor([0.0, 0.25, 0.5, 1.0])
    a = th.tensor([[1.0, 0.0]]).expand(4, -1)
    b = th.tensor([[math.cos(angle), math.sin(angle)]]).expand(4, -1)
    out = pipeline.slerp(a, b, share)
    assert th.allclose(out, th.stack([(share * angle).cos(), (share * angle).sin()], 1), atol=1e-6)
    assert th.equal(out[0], a[0]) and th.allclose(out[3], b[0], atol=1e-7)
    assert th.allclose(pipeline.slerp(a, a, share), a, atol=1e-7)
    assert pipeline.slerp(a, -a, share).isfinite().all()


def test_between_two_anchors():
    anchors = F.normalize(th.randn(3, 5), dim=1)
    way = pipeline.Between(lambda indices: anchors[[i % 3 for i in indices]], 4)
    assert [way.noise_of(i) for i in range(9)] == [0, 0, 0, 0, 1, 1, 1, 1, 2]
    out = way(range(12))
    assert th.allclose(out[[0, 4, 8]], anchors, atol=1e-6)
    assert th.allclose(out[[3, 7, 11]], anchors[[1, 2, 0]], atol=1e-6)
    steps = (out[:3] * out[1:4]).sum(1)
    assert th.allclose(steps, steps[:1].expand(3), atol=1e-5)  # as far each time
    assert th.allclose(way([5]), out[5:6], atol=1e-6)
    with pytest.raises(ValueError, match="2 or more, not 1"):
        pipeline.Between(None, 1)


def test_the_ends_of_ways_are_drawn_once_a_batch():
    asked = []
    way = pipeline.Between(lambda indices: (asked.extend(indices), F.normalize(th.ones(len(indices), 2), dim=1))[1], 4)
    way(range(2, 9))  # of the ways 0, 1 and 2
    assert asked == [0, 1, 2, 3]


def test_samples_of_one_way_begin_with_the_same_noise():
    starts = {}
    process = process_of(config.defaults(DecoderProcessOptions) | {"diffusion_steps": 3})

    def net(x, t, vector):
        if t[0] == 2:
            starts.update({int(k): each for k, each in zip(vector[:, 0], x)})
        return th.zeros_like(x)

    given = {"vector": lambda indices: th.tensor([[float(i)] for i in indices])}
    how = {"shape": (1, 8, 8), "num_samples": 6, "batch_size": 4, "given": given}
    ends = [x for _, x, _ in generate.sample_stream(process, net, noise_of=lambda i: i // 3, **how)]
    assert th.equal(starts[0], starts[1]) and th.equal(starts[0], starts[2]) and th.equal(starts[3], starts[5])
    assert not th.equal(starts[2], starts[3])
    ends = th.cat(ends)
    assert th.equal(ends[0], ends[2]) and not th.equal(ends[2], ends[3])


def test_pictures_are_embedded_in_turn():
    clip, images = tiny_clip(), th.rand(3, 1, 8, 8)
    embeddings = pipeline.ImageEmbeddings(clip, images)
    assert th.allclose(embeddings([0, 4]), clip.image_embed(images[[0, 1]]), atol=1e-6)


# ------------------------------------------------------------------------------------------------------ what is shared


def test_m3_01_schedules_are_chosen_by_name_for_each_network():
    assert prior_process().alphas_cumprod.dtype == np.float64
    linear = process_of(config.defaults(DecoderProcessOptions) | {"noise_schedule": "linear"})
    assert not np.allclose(linear.betas, process_of(config.defaults(DecoderProcessOptions)).betas)
    with pytest.raises(NotImplementedError, match="unknown"):
        prior_process(noise_schedule="unknown")


def test_m3_02_the_prior_steps_with_the_root_of_the_variance():
    """From noise the walk of a network that always predicts 0 is Gaussian, of a variance that a recursion tells."""
    process = prior_process(20)
    variance = 1.0
    for row in reversed(range(1, 20)):
        variance = process.posterior_mean_coef2[row] ** 2 * variance + process.posterior_variance[row]
    out = []
    generator = th.Generator().manual_seed(0)
    x = th.randn(20000, 1, generator=generator)
    net = lambda x, t: th.zeros_like(x)  # noqa: E731
    noise = lambda x: th.randn(x.shape, generator=generator)  # noqa: E731
    steps = generate.sampling.sample(process, process.predictor(net, False), generate.sampling.ddpm, x, noise=noise)
    for k, (x, _) in enumerate(steps, 1):
        out.append(x.var().item())
        if k == 19:
            assert out[-1] == pytest.approx(variance, rel=4 * math.sqrt(2 / 20000))


def test_m3_20_the_rate_warms_up_and_falls_as_a_cosine_to_its_least(tmp_path):
    rates, net = [], th.nn.Linear(4, 4)
    process = prior_process(5)

    class Net(th.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, t):
            return self.net(x)

    def batches():
        while True:
            yield th.randn(2, 4), {}

    with logger.scoped_configure(dir=str(tmp_path), format_strs=[]):
        trainer = Trainer(
            DiffusionTask(Net(), process), batches(), batch_size=2, lr=5e-4, lr_min=1e-5, lr_schedule="cosine",
            lr_anneal_steps=10, lr_warmup=3, save_interval=100, background_save=False,
            watchers=[(1, lambda trainer: rates.append(trainer.opt.param_groups[0]["lr"]))],
        )  # fmt: skip
        trainer.run_loop()
    cosine = [1e-5 + (5e-4 - 1e-5) * (1 + math.cos(math.pi * k / 10)) / 2 for k in range(10)]
    assert rates == pytest.approx([rate * min(1, (k + 1) / 3) for k, rate in enumerate(cosine)])
    with pytest.raises(ValueError, match=r"lr_min is a rate from 0 to lr 0\.0001, not 0\.001"):
        Trainer(DiffusionTask(Net(), process), batches(), batch_size=2, lr_min=1e-3)


def test_every_fault_of_the_tutorial_has_a_test():
    folder = Path(__file__).parent
    source = {path.name: path.read_text() for path in folder.glob("test_*.py")}
    named = {int(n) for text in source.values() for name in re.findall(r"def test_(\w*m3_\w+)", text)
             for n in re.findall(r"m3_(\d\d)", name)}  # fmt: skip
    elsewhere = re.findall(r"^(\d\d) (test_\w+\.py)::(\w+)$", __doc__, re.MULTILINE)
    assert all(f"def {test}" in source[file] for _, file, test in elsewhere)
    assert sorted(named | {int(n) for n, _, _ in elsewhere}) == list(range(1, 25))

