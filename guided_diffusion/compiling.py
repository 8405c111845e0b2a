"""Networks compiled region by region: each kind of block once for all blocks of its shape, not the whole at once."""

import torch

from .unet import AttentionBlock, ResBlock

VARIANTS = 128  # of a kind of block, by shape and mode, before torch would give up and run it uncompiled


def check(device):
    """
    Raise ValueError unless `torch.compile` works for a device: on a CPU it needs a C++ compiler, on a GPU Triton.

    Takes the seconds that its first compilation takes.
    """
    x = torch.ones(8, device=device)
    try:
        good = torch.equal(torch.compile(lambda x: torch.sin(x) + 1)(x), torch.sin(x) + 1)
        reason = "" if good else "what it compiles gives other numbers"
    except Exception as error:  # of many classes, by what is missing
        reason = " ".join(str(error).split())[:300] or type(error).__name__
    if reason:
        raise ValueError(
            f"--compile: torch.compile does not work here on {device} ({reason}); it needs a C++ compiler on a CPU, and"
            " Triton on a GPU: install it, or drop --compile"
        )


def compile_blocks(net):
    """
    Have the residual and attention blocks of a U-Net compiled when they are first called; the network is changed in
    place, its weights and state dict are as before. Blocks of equal shapes share what is compiled. Returns the network.

    Every other batch size is compiled anew, so that no size pays for what serves all. Dropout draws as without.

    :raises ValueError: for a network without such blocks, or where `check` fails.
    """
    blocks = [module for module in net.modules() if isinstance(module, (ResBlock, AttentionBlock))]
    if not blocks:
        raise ValueError(f"--compile is for the blocks of --network adm: {type(net).__name__} has none")
    check(next(net.parameters()).device)
    _allow_variants()
    for block in blocks:
        block.compile(dynamic=False, options={"fallback_random": True})
    return net


def _allow_variants():
    config = torch._dynamo.config
    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # the latter before 2.7
    total = f"accumulated_{name}"
    for each, least in ((name, VARIANTS), (total, 8 * VARIANTS)):
        if hasattr(config, each):
            setattr(config, each, max(getattr(config, each), least))
