"""How fast a device is: how often something can be done, and the rate of convolutions in a precision."""

import time

import torch as th
import torch.nn.functional as F


def paced(action, device, seconds=3.0, most=1000, what=""):
    """How often a second `action()` can be done, the first time left out; tried for so long, or `most` times."""
    from tqdm.auto import tqdm

    wait = th.cuda.synchronize if device.type == "cuda" else (lambda: None)
    with tqdm(desc=f"measuring {what}", unit="", disable=not what) as bar:
        action()
        wait()
        start, n = time.monotonic(), 0
        while n == 0 or (n < most and time.monotonic() - start < seconds):
            action()
            wait()
            n += 1
            bar.update()
        return n / max(time.monotonic() - start, 1e-9)


def convolution_rate(dtype, device, seconds=0.3):
    """FLOP/s of training a 3x3 convolution, which is most of a U-Net, in images of a size for the device."""
    n, channels, side = (32, 256, 64) if device.type == "cuda" else (4, 64, 16)
    generator = th.Generator(device).manual_seed(0)  # the run's own numbers stay as they are
    x = th.randn(n, channels, side, side, device=device, generator=generator).to(dtype).requires_grad_()
    weight = th.randn(channels, channels, 3, 3, device=device, generator=generator).to(dtype).requires_grad_()

    def once():
        x.grad = weight.grad = None
        F.conv2d(x, weight, padding=1).float().sum().backward()

    return paced(once, device, seconds) * 3 * 2 * 9 * channels**2 * n * side**2
