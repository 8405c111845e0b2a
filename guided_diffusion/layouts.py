"""
Networks of images with the channels of a position side by side in memory (NHWC, "channels last"), as the 16-bit
convolutions of GPUs want them: no number changes but by rounding, and what is saved is laid out as ever.
"""

import torch

from .unet import UNetTrunk

CHANNELS_LAST = torch.channels_last


def to_channels_last(net, say):
    """
    Have a network compute with channels last: its weights are laid out anew in place, its first feature map too, and
    what it returns is laid out as usual. Its first whole evaluation looks whether all blocks keep the layout, and says
    so, or names those that do not. Returns the network. To be called before an optimizer takes the weights.

    :param say: is called with that line.
    :raises ValueError: for another network than one of --network adm for images of two axes.
    """
    if not isinstance(net, UNetTrunk) or net.dims != 2:
        raise ValueError(f"--channels_last is for images in networks of --network adm, not for {type(net).__name__}")
    for p in net.parameters():
        moved = p.data.contiguous(memory_format=CHANNELS_LAST) if p.dim() == 4 else p.data
        if not moved.is_contiguous():  # else the two layouts are one, as those of a 1x1 kernel are
            p.data = moved
    net.input_blocks[0].register_forward_hook(lambda module, args, out: out.contiguous(memory_format=CHANNELS_LAST))
    net.register_forward_hook(lambda module, args, out: out.contiguous())
    _watch(net, say)
    return net


def blocks_of(net):
    """{name: block} of a network whose layout is looked at: the entries of its way down, its middle and its way up."""
    parts = ("input_blocks", "output_blocks")
    blocks = {f"{part}.{i}": block for part in parts for i, block in enumerate(getattr(net, part, ()))}
    return blocks | {"middle_block": net.middle_block}


def _watch(net, say):
    """Look at the outputs of all blocks in the next evaluation, then tell and look no more."""
    blocks, kept = blocks_of(net), {}

    def look(name):
        return lambda module, args, out: kept.update({name: out.is_contiguous(memory_format=CHANNELS_LAST)})

    def tell(module, args, out):
        for hook in hooks:
            hook.remove()
        lost = [name for name in blocks if not kept.get(name, True)]
        but = f", but not {', '.join(lost)}, whose outputs are copied" if lost else ""
        say(f"channels last: {len(kept) - len(lost)} of {len(kept)} blocks keep the layout{but}")

    hooks = [block.register_forward_hook(look(name)) for name, block in blocks.items()]
    hooks.append(net.register_forward_hook(tell))
