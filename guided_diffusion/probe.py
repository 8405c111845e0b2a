"""Will a classifier guide? How often it is right, and how sure the direction of its gradient is, by noise level."""

import math
from typing import NamedTuple

import torch as th

from .guidance import classifier_gradient


class Level(NamedTuple):
    """A row t of the process, its noise sigma = sqrt(1/abar - 1), of how many images noised ones were looked at, the
    share of these that the classifier names rightly, and the signal-to-noise ratio of its gradients."""

    t: int
    sigma: float
    images: int
    accuracy: float
    snr: float


def gradient_snr(gradients):
    """
    Signal-to-noise ratio of gradients [K,N,...], of K noises of each of N images: |E g|^2 / E |g - E g|^2, expectations
    over the noise, numerator and denominator summed over the images.

    Both are estimated without bias, |mean|^2 less what the spread adds to it, so that gradients without a common
    direction have 0 on average, and values slightly below 0 occur. inf where there is no spread. Raises ValueError for
    fewer than two noises.
    """
    draws = len(gradients)
    if draws < 2:
        raise ValueError(f"a signal is told from noise by two noises of an image or more, not {draws}")
    flat = gradients.double().flatten(2)                                      # [K,N,D]
    noise = flat.var(0).sum(1)                                                # [N]
    signal = flat.mean(0).square().sum(1) - noise / draws
    noise = float(noise.sum())
    return float(signal.sum()) / noise if noise else math.inf


def levels(diffusion, classifier, images, labels, rows, draws=4, seed=0):
    """
    Yields a Level for each row of the process.

    :param classifier: `(x, t) -> logits [N,K]`. :param images: [N,C,H,W] in [-1,1], best such as it was not trained on.
    :param labels: [N]. :param draws: noises of each image, the same at every row.
    """
    gradient = classifier_gradient(classifier)
    noises = th.randn(draws, *images.shape, generator=th.Generator().manual_seed(seed)).to(images.device)
    for row in rows:
        t = th.full((len(images),), row, device=images.device)
        right, found = 0, []
        for noise in noises:
            x = diffusion.q_sample(images, t, noise)
            found.append(gradient(x, diffusion.clock(t), y=labels))
            with th.no_grad():
                right += int((classifier(x, diffusion.clock(t)).argmax(1) == labels).sum())
        sigma = math.sqrt(1 / diffusion.alphas_cumprod[row] - 1)
        yield Level(row, sigma, len(images), right / (draws * len(images)), gradient_snr(th.stack(found)))


def verdict(found, lowest, num_classes):
    """
    (whether it will guide, in words why): at how many of the Levels the classifier is right surely more often than
    twice by chance, and at how many of these its gradient holds more signal than noise.

    :param lowest: the lower end of the interval of the accuracy at each Level.

    What is drawn is decided while sigma falls through the middle of its range, so that less than a third of the levels
    are too few, and a classifier that knows clean images alone has hardly one.
    """
    knows = [each for each, low in zip(found, lowest) if low > 2 / num_classes]
    sure = [each for each in knows if each.snr > 1]
    will = len(knows) >= len(found) / 3
    span = f", up to noise {max(each.sigma for each in knows):.3g} (sigma)" if knows else ""
    return will, (
        f"{'yes' if will else 'no'}: at {len(knows)} of {len(found)} noise levels it is right surely more often than "
        f"twice by chance ({2 / num_classes:.2g}){span}; at {len(sure)} of these its gradient holds more signal than "
        "noise"
    )
