"""Conditions: their embeddings, tokens as further keys of the attention, nulls, and what is refused."""

import pytest
import torch
from torch import nn

from guided_diffusion import guidance, unet
from guided_diffusion.conditions import Label, Tokens, Vector
from guided_diffusion.toy_models import DiT

TINY = {
    "image_size": 8, "in_channels": 2, "model_channels": 32, "out_channels": 4, "num_res_blocks": 1,
    "attention_resolutions": (1,), "channel_mult": (1, 2), "num_heads": 2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def filled(model):
    """The model with every weight drawn, so that no layer is zero."""
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.1 if p.ndim > 1 else 0.3)
    return model.eval()


def tiny(cls=unet.UNetModel, **options):
    return filled(cls(**{**TINY, **options}))


def inputs(batch=3, length=5, size=6):
    """x, t, tokens and a mask in which the samples have 5, 2 and 0 tokens that count."""
    x, t = torch.randn(batch, 2, 8, 8), torch.tensor([3, 700, 20])
    counts = torch.tensor([5, 2, 0])
    return x, t, torch.randn(batch, length, size), torch.arange(length) < counts[:, None]


# ---- embeddings


def test_label():
    embed = Label(3, 4)
    assert embed.weight.shape == (4, 4) and embed.null_cond == 3
    assert torch.equal(embed(torch.tensor([0, 3])), embed.weight[[0, 3]])
    assert torch.equal(embed.null(torch.tensor([1, 2])), torch.tensor([3, 3]))
    assert torch.equal(embed.all_null(torch.zeros(2, 5)), torch.tensor([3, 3]))
    bare = Label(3, 4, null=False)
    assert bare.weight.shape == (3, 4)
    for wrong, message in [([0, 3], r"must lie in 0\.\.2, but span 0 \.\. 3"), ([-1], r"0\.\.2"), ([[1]], r"\[1, 1\]"),
                           ([0.5], "integers of shape .* torch.float32")]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            bare(torch.tensor(wrong))
    with pytest.raises(ValueError, match="no null: build it with null=True"):
        bare.null(torch.tensor([1]))


def test_vector():
    for null in ("learned", "zero"):
        embed = filled(Vector(3, 5, null, nn.GELU)).double()
        rows = torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 0.0]]).double()
        by_hand = nn.functional.gelu(rows @ embed[0].weight.T + embed[0].bias) @ embed[2].weight.T + embed[2].bias
        by_hand[1] = embed.null_emb if null == "learned" else by_hand[1]
        torch.testing.assert_close(embed(rows), by_hand, rtol=1e-14, atol=1e-14)
    assert len(Vector(3, 5, "zero").state_dict()) == 4 and isinstance(Vector(3, 5)[1], nn.SiLU)


def test_a_learned_null_learns_only_from_the_samples_without_a_vector():
    embed = filled(Vector(3, 5))
    embed(torch.randn(4, 3)).sum().backward()
    assert not embed.null_emb.grad.any() and embed[0].weight.grad.any()
    embed.zero_grad()
    embed(torch.zeros(2, 3)).sum().backward()
    assert torch.equal(embed.null_emb.grad, torch.full((5,), 2.0)) and not embed[2].weight.grad.any()


def test_tokens():
    _, _, tokens, mask = inputs()
    tokens = tokens.double()
    embed = filled(Tokens(6, 4)).double()
    emb, valid = embed(tokens, mask)
    by_hand = nn.functional.layer_norm(tokens, (6,), embed.norm.weight, embed.norm.bias) @ embed.proj.weight.T
    by_hand = by_hand + embed.proj.bias
    torch.testing.assert_close(emb[mask], by_hand[mask], rtol=1e-13, atol=1e-13)
    assert torch.equal(emb[2, 0], embed.null_emb)  # the sample without tokens has one, the learned one
    assert torch.equal(valid[:2], mask[:2]) and valid[2].tolist() == [True] + [False] * 4
    emb, valid = embed(tokens[:, :0])
    assert torch.equal(emb, embed.null_emb.expand(3, 1, 4)) and valid.all()
    plain = filled(Tokens(6, 4, null="zero")).double()
    assert torch.equal(plain(tokens, mask)[1], mask) and plain(tokens[:, :0])[0].shape == (3, 0, 4)
    assert plain(tokens)[1].all()


def test_an_embedding_of_vectors_serves_another_network():
    model = filled(DiT(4, 2, 2, depth=1, head_dim=8, num_heads=2, cond_embed=Vector(6, 16)))
    x, vector = torch.randn(3, 2, 4, 4), torch.randn(3, 6)
    assert not torch.allclose(model(x, torch.tensor(1.0), vector), model(x, torch.tensor(1.0)))
    assert torch.equal(model(x, torch.tensor(1.0)), model(x, torch.tensor(1.0), torch.zeros(3, 6)))
    w = model.predict_eps_cfg(x, torch.tensor(1.0), vector, 0.5)
    given, free = model(x, torch.tensor(1.0), vector), model(x, torch.tensor(1.0))
    torch.testing.assert_close(w, 1.5 * given - 0.5 * free, rtol=1e-4, atol=1e-5)


# ---- attention to tokens


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("short", [0, 10**6])
def test_attention_to_tokens_is_the_written_out_softmax(order, short, monkeypatch):
    monkeypatch.setattr(unet, "SHORT_LENGTH", short)
    block = filled(unet.AttentionBlock(32, 2, use_new_attention_order=order, encoder_channels=6)).double()
    block.norm.__class__ = nn.GroupNorm  # the other computes in float32 whatever it is given
    x, (_, _, tokens, mask) = torch.randn(3, 32, 3, 2).double(), inputs()
    tokens = tokens.double()
    out = block(x, tokens, mask)
    for n in range(3):
        seen = tokens[n][mask[n]].T                                               # [6,k]
        rows = block.qkv(block.norm(x[n : n + 1].flatten(2)))[0]                  # [96,6]
        more = block.encoder_kv.weight[..., 0] @ seen + block.encoder_kv.bias[:, None]
        heads = []
        for head in range(2):
            if order:
                q, k, v = (rows[part * 32 + head * 16 :][:16] for part in range(3))
                ek, ev = (more[part * 32 + head * 16 :][:16] for part in range(2))
            else:
                q, k, v = (rows[head * 48 + part * 16 :][:16] for part in range(3))
                ek, ev = (more[head * 32 + part * 16 :][:16] for part in range(2))
            k, v = torch.cat([ek, k], 1), torch.cat([ev, v], 1)
            heads.append(v @ (q.T @ k / 4).softmax(1).T)
        by_hand = block.proj_out.weight[..., 0] @ torch.cat(heads) + block.proj_out.bias[:, None]
        torch.testing.assert_close(out[n].flatten(1) - x[n].flatten(1), by_hand, rtol=1e-11, atol=1e-11)


def test_a_network_whose_tokens_are_all_masked_is_the_one_without_tokens():
    x, t, tokens, mask = inputs()
    model = tiny(token_channels=6)
    plain = tiny().requires_grad_(False)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "token" not in k and "encoder" not in k})
    without = plain(x, t)
    torch.testing.assert_close(model(x, t, tokens=tokens, token_mask=mask & False), without, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(x, t, tokens=tokens[:, :0]), without, rtol=1e-5, atol=1e-5)
    some = model(x, t, tokens=tokens, token_mask=mask)
    torch.testing.assert_close(some[2], without[2], rtol=1e-5, atol=1e-5)  # each sample has its own mask
    assert (some[:2] - without[:2]).abs().amax((1, 2, 3)).min() > 1e-3


@pytest.mark.parametrize("short", [0, 10**6])
def test_order_and_padding_of_tokens_do_not_matter(short, monkeypatch):
    monkeypatch.setattr(unet, "SHORT_LENGTH", short)
    x, t, tokens, mask = inputs()
    model = tiny(token_channels=6, use_checkpoint=True)
    out = model(x, t, tokens=tokens, token_mask=mask)
    order = torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(model(x, t, tokens=tokens[:, order], token_mask=mask[:, order]), out)
    padded = torch.cat([tokens, torch.full((3, 4, 6), torch.nan)], 1)    # of what does not count, anything
    longer = torch.cat([mask, mask.new_zeros(3, 4)], 1)
    torch.testing.assert_close(model(x, t, tokens=padded, token_mask=longer), out)
    assert not torch.allclose(model(x, t, tokens=tokens.flip(2), token_mask=mask), out)


def test_gradients_reach_conditions_and_their_embeddings():
    x, t, tokens, mask = inputs()
    vector = torch.randn(3, 7).requires_grad_()
    tokens.requires_grad_()
    model = tiny(token_channels=6, vector_channels=7)
    model(x, t, vector=vector, tokens=tokens, token_mask=mask).square().sum().backward()
    assert torch.equal(tokens.grad.abs().amax(2) > 0, mask) and (vector.grad != 0).all()
    assert all(p.grad is not None for p in model.parameters())
    for name in ("token_emb.proj.weight", "vector_emb.0.weight", "middle_block.1.encoder_kv.weight"):
        assert model.get_parameter(name).grad.any(), name


def test_the_vector_joins_the_embedding_of_time_and_label():
    x, t, _, _ = inputs()
    vector, y = torch.randn(3, 7), torch.tensor([0, 2, 1])
    model = tiny(vector_channels=7, num_classes=3)
    emb = model._embed(t, y) + model.vector_emb(vector)
    assert torch.equal(model._embed(t, y, vector), emb)
    assert not torch.allclose(model(x, t, y, vector), model(x, t, y, 0 * vector))


def test_super_resolution_and_half_precision_take_conditions():
    x, t, tokens, mask = inputs()
    model = tiny(unet.SuperResModel, token_channels=6, vector_channels=7)
    more = {"low_res": x[..., ::2, ::2], "tokens": tokens, "token_mask": mask, "vector": torch.randn(3, 7)}
    assert model(x, t, **more).shape == (3, 4, 8, 8)
    half = filled(unet.UNetModel(**TINY, token_channels=6)).eval()
    full = half(x, t, tokens=tokens, token_mask=mask).detach()
    half.convert_to_fp16()
    assert half.middle_block[1].encoder_kv.weight.dtype == torch.float16
    out = half(x, t, tokens=tokens, token_mask=mask)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, full, rtol=0, atol=0.03 * float(full.abs().max()))


def test_without_conditions_nothing_is_added():
    names = list(unet.UNetModel(**TINY).state_dict())
    assert not any("token" in name or "vector" in name or "encoder" in name for name in names)
    with_all = list(unet.UNetModel(**TINY, token_channels=6, vector_channels=7).state_dict())
    assert [name for name in with_all if name in names] == names


# ---- nulls and bad input


def test_dropped_conditions_are_the_nulls_of_the_network():
    """Classifier-free guidance over all kinds of conditions at once."""
    x, t, tokens, mask = inputs()
    vector, y = torch.randn(3, 7), torch.tensor([0, 2, 1])
    model = tiny(vector_channels=7, token_channels=6, num_classes=4)
    cond = {"y": y, "vector": vector, "tokens": tokens, "token_mask": mask}
    empty = guidance.nulled(cond, {"y": 3, "vector": 0.0, "tokens": 0.0, "token_mask": False})
    emb = model._embed(t) + model.label_emb.weight[3] + model.vector_emb.null_emb
    torch.testing.assert_close(model._embed(t, empty["y"], empty["vector"]), emb)
    assert empty["token_mask"].dtype == torch.bool and not empty["token_mask"].any()
    free = model(x, t, torch.full((3,), 3), 0 * vector, 0 * tokens, mask & False)
    assert torch.equal(model(x, t, **empty), free) and not torch.allclose(model(x, t, **cond), free)


@pytest.mark.parametrize(("cond", "message"), [
    ({}, r"vector is missing, but this network has vector_channels=7: pass it, zeros for none"),
    ({"vector": torch.zeros(3, 7)}, "tokens is missing, but this network has token_channels=6"),
    ({"vector": torch.zeros(3, 8)}, r"vector must be floats of shape \[3,7\], got float32 \[3, 8\]"),
    ({"vector": torch.zeros(2, 7)}, r"vector must be floats of shape \[3,7\], got float32 \[2, 7\]"),
    ({"vector": torch.zeros(3, 7, dtype=int)}, r"vector must be floats .* got int64"),
    ({"vector": [0.0] * 7}, r"vector must be floats .* got list"),
    ({"tokens": torch.zeros(3, 6)}, r"tokens must be floats of shape \[3,any,6\], got float32 \[3, 6\]"),
    ({"tokens": torch.zeros(3, 2, 6), "token_mask": torch.ones(3, 3, dtype=bool)}, r"token_mask must be .*\[3, 2\]"),
    ({"tokens": torch.zeros(3, 2, 6), "token_mask": torch.ones(3, 2)}, "token_mask must be booleans .*float32"),
    ({"y": torch.zeros(3, dtype=int)}, "must specify y if and only if"),
])  # fmt: skip
def test_conditions_that_do_not_fit(cond, message):
    good = {"vector": torch.zeros(3, 7), "tokens": torch.zeros(3, 2, 6)}
    cond = cond if list(cond) in ([], ["vector"]) and "missing" in message else {**good, **cond}
    model = unet.UNetModel(**TINY, vector_channels=7, token_channels=6)
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(3, 2, 8, 8), torch.zeros(3), **cond)


def test_conditions_of_a_network_without():
    model = unet.UNetModel(**TINY)
    with pytest.raises(ValueError, match="vector is given, but this network has vector_channels=None: leave it out"):
        model(torch.zeros(3, 2, 8, 8), torch.zeros(3), vector=torch.zeros(3, 7))
    with pytest.raises(ValueError, match="unknown null 'none': choose one of learned, zero"):
        Vector(3, 5, null="none")
