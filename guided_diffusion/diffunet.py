"""
DiffUNet, the U-Net of diffusion-based restoration (Choi et al. 2021, arXiv 2108.02938; Zhu et al. 2023, 2305.08995), as
a configuration of ADM's: as flags, for the programs, and as a class that also takes a noise level and then denoises.
"""

import torch as th

from . import sizes
from .process import Process, get_named_beta_schedule
from .unet import UNetModel

CHANNEL_MULT = "1,1,2,2,4,4"
DOWNSAMPLING = 32  # of these six levels

# What the two published sizes differ in; attention is given by downsampling factors, whatever the size of the image.
FLAGS = {
    "diffunet": {"num_channels": 128, "num_res_blocks": 1, "attention": (16,)},
    "diffunet_large": {"num_channels": 256, "num_res_blocks": 2, "attention": (32, 16, 8)},
}


def network_flags(name, image_size):
    """
    The options of a DiffUNet for images of this side, {name: value}, as ModelOptions has them.

    :param name: a row of FLAGS.
    :raises ValueError: for a side that six levels do not divide.
    """
    if image_size < DOWNSAMPLING or image_size % DOWNSAMPLING:
        raise ValueError(f"image_size {image_size}: DiffUNet halves five times and needs a multiple of {DOWNSAMPLING}")
    flags = dict(FLAGS[name])
    sides = [str(image_size // factor) for factor in flags.pop("attention")]
    return {
        **flags,
        "attention_resolutions": ",".join(sides),
        "channel_mult": CHANNEL_MULT,
        "num_head_channels": 64,
        "use_scale_shift_norm": True,
        "resblock_updown": True,
        "dropout": 0.1,
    }


class DiffUNet(UNetModel):
    """
    A UNetModel of that configuration, with its state-dict keys, for images [N,in_channels,H,W] of any size.

    :param large_model: the second row of FLAGS instead of the first.
    :param learn_sigma: twice the output channels; the second half is about the variance (the original does so, without
        saying, if and only if out_channels is 3).
    """

    def __init__(self, in_channels=3, out_channels=3, large_model=False, learn_sigma=False):
        flags = network_flags("diffunet_large" if large_model else "diffunet", DOWNSAMPLING)
        super().__init__(
            image_size=DOWNSAMPLING,
            in_channels=in_channels,
            out_channels=out_channels * (2 if learn_sigma else 1),
            model_channels=flags.pop("num_channels"),
            channel_mult=sizes.parse_channel_mult(flags.pop("channel_mult")),
            attention_resolutions=sizes.attention_downsampling(flags.pop("attention_resolutions"), DOWNSAMPLING),
            **flags,
        )
        self.image_channels = out_channels
        process = Process(get_named_beta_schedule("linear", 1000))
        for name in self.derived():  # no part of the state dict: they follow from the schedule
            table = th.tensor(getattr(process, name), dtype=th.float32)
            self.register_buffer(name, table, persistent=False)

    @staticmethod
    def derived():
        return "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"

    def load_state_dict(self, state_dict, *args, **kwargs):
        """As any module's, but without the two tables that the original writes among its weights."""
        theirs = "sqrt_alphas_cumprod", "sqrt_1m_alphas_cumprod"
        weights = {name: value for name, value in state_dict.items() if name not in theirs}
        return super().load_state_dict(weights, *args, **kwargs)

    def forward(self, x, t, y=None, type_t="timestep"):
        """
        With type_t "timestep": the noise in x, which is step t, [N] of 0..999, of the linear process from an image in
        [-1,1]; after its channels those of the variance, if learned. With "noise_level": the image in [0,1] that
        noise t times N(0,I), t a number or [N], made x of: [N,out_channels,H,W]. ValueError for another type_t.

        Sides that 32 does not divide are continued at the left and the top by reflection. (The original continues them
        with the opposite border, and cuts images of 520 pixels or more into patches.)
        """
        if type_t not in ("timestep", "noise_level"):
            raise ValueError(f"type_t is {type_t!r}; choose timestep or noise_level")
        rows, columns = (_reflected(side) for side in x.shape[2:])
        whole = x[:, :, rows][..., columns]                                       # [N,C,H',W'], multiples of 32
        out = super().forward(whole, t, y) if type_t == "timestep" else self._denoised(whole, t, y)
        return out[..., len(rows) - x.shape[2] :, len(columns) - x.shape[3] :]

    def _denoised(self, x, sigma, y):
        """x in [0,1] + sigma N(0,I): [N,C,H,W] -> [N,out_channels,H,W] in [0,1]. In [-1,1] the noise is 2 sigma."""
        sigma = th.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1, 1, 1, 1).expand(len(x), 1, 1, 1)
        root = (1 + 4 * sigma**2).rsqrt()                                         # sqrt(abar) of that noise
        z, noise = root * (2 * x - 1), root * 2 * sigma
        gaps = (self.sqrt_one_minus_alphas_cumprod - noise.reshape(-1, 1)).abs()  # [N,1000]
        t = gaps.argmin(dim=1)
        eps = super().forward(z, t, y)[:, : self.image_channels]
        x0 = (z - noise * eps) / self.sqrt_alphas_cumprod[t].reshape(-1, 1, 1, 1)
        return (x0.clamp(-1, 1) + 1) / 2


def _reflected(side):
    """Indices 0..side-1 and, before them, as many mirrored ones as make their number a multiple of 32."""
    period = max(2 * (side - 1), 1)
    index = th.arange(-(-side % DOWNSAMPLING), side).remainder(period)
    return th.minimum(index, period - index) if side > 1 else th.zeros_like(index)
