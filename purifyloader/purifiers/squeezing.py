"""Corrupt an image lightly, with no network: the baselines to try first, and ECLIPSE's compensation."""

from __future__ import annotations

from typing import Any, ClassVar, Self

from torch import Tensor

from purifyloader.core import corruptions
from purifyloader.purifiers.base import NOISE_BEFORE, Purifier, Resolver, pixels

__all__ = ["BitDepth", "Coin", "Compensation", "Grayscale", "Jpeg", "Squeeze"]


class Squeeze(Purifier):
    """Base of the baselines that squeeze an image until its fine detail is gone.

    Each is a pure function of `purifyloader.core.corruptions`; `options` names its parameters, which are attributes.

    >>> from purifyloader.purifiers import Jpeg
    >>> Jpeg(10).options
    ('quality',)
    """

    options: ClassVar[tuple[str, ...] | None] = ()


class Jpeg(Squeeze):
    """Compress as JPEG of a `quality` from 1 to 100 (image shortcut squeezing, ISS-J; Liu et al. 2023): try it first.

    >>> import torch
    >>> from purifyloader.purifiers import Jpeg
    >>> Jpeg(10)(torch.rand(2, 3, 8, 8), torch.tensor([1, 2])).shape
    torch.Size([2, 3, 8, 8])
    """

    kind = "jpeg"
    options = ("quality",)

    def __init__(self, quality: int = 10) -> None:
        super().__init__()
        corruptions.check_quality(quality)
        self.quality = quality

    def noise_first(self) -> float | str:
        return f"whose rounding takes images apart that were almost alike: {NOISE_BEFORE}"

    def run(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
        return corruptions.jpeg(x_BCHW, self.quality)


class Grayscale(Squeeze):
    """Put the brightness into all channels (image shortcut squeezing, ISS-G; Liu et al. 2023).

    >>> import torch
    >>> from purifyloader.purifiers import Grayscale
    >>> x = Grayscale()(torch.rand(1, 3, 8, 8), torch.tensor([1]))
    >>> bool((x[:, 0] == x[:, 2]).all())
    True
    """

    kind = "grayscale"

    def noise_first(self) -> float | str:
        return f"which changes how far images are apart: {NOISE_BEFORE}"

    def run(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
        return corruptions.grayscale(x_BCHW)


class BitDepth(Squeeze):
    """Keep the first `bits` of each channel, 1 to 8 (ISS-BDR; Liu et al. 2023, arXiv:2301.13838).

    White becomes darker by it, as published: 192 of 255 with 2 bits.

    >>> import torch
    >>> from purifyloader.purifiers import BitDepth
    >>> round(255 * float(BitDepth(2)(torch.ones(1, 3, 8, 8), torch.tensor([1])).max()))
    192
    """

    kind = "bit-depth"
    options = ("bits",)

    def __init__(self, bits: int = 2) -> None:
        super().__init__()
        corruptions.check_bits(bits)
        self.bits = bits

    def noise_first(self) -> float | str:
        return f"which cuts levels apart that were next to each other: {NOISE_BEFORE}"

    def run(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
        return corruptions.bit_depth(x_BCHW, self.bits)


class Coin(Squeeze):
    """Move every pixel at random, by `alpha` pixels at most along each side (COIN; Wang et al. 2023, arXiv:2311.18403).

    It is one fixed draw an image; the published training script draws anew in every epoch, after the crop and flip.

    >>> import torch
    >>> from purifyloader.purifiers import Coin
    >>> Coin(2)(torch.rand(2, 3, 8, 8), torch.tensor([1, 2])).shape
    torch.Size([2, 3, 8, 8])
    """

    kind = "coin"
    options = ("alpha",)

    def __init__(self, alpha: float = 2.0) -> None:
        super().__init__()
        corruptions.check_alpha(alpha)
        self.alpha = float(alpha)

    def noise_first(self) -> float | str:
        return f"which adds no noise and may read one pixel several times: {NOISE_BEFORE}"

    def run(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
        return corruptions.coin(x_BCHW, seeds_B, self.alpha)


class Compensation(Purifier):
    """Apply one fixed draw of ECLIPSE's corruption, as Algorithm 1 prints it (Eq. 13).

    An image becomes grey with probability p, and gets noise of standard deviation sigma, in image units. The published
    training script draws anew in every epoch, as `purifyloader.transforms.Compensate` does, which defends better.

    >>> from purifyloader.purifiers import Compensation
    >>> Compensation().config()
    {'kind': 'compensation', 'p': 0.4, 'sigma': 0.05, 'sigma_px': 12.75}
    """

    kind = "compensation"

    def __init__(self, p: float = 0.4, sigma: float = 0.05) -> None:
        super().__init__()
        corruptions.check_compensation(p, sigma)
        self.p, self.sigma = p, sigma

    def config(self) -> dict[str, Any]:
        return {"kind": self.kind, "p": self.p, "sigma": self.sigma, "sigma_px": pixels(self.sigma)}

    @classmethod
    def build(cls, values: dict[str, Any], resolve: Resolver) -> Self:
        values.pop("sigma_px", None)
        return cls(**values)

    def noise_first(self) -> float | str:
        if self.p == 0:
            return float(self.sigma)  # x + sigma z, and clamped after that
        return f"which makes images grey (p={self.p:g}) before it adds noise: give it p=0, or {NOISE_BEFORE}"

    def run(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
        return corruptions.compensate(x_BCHW, seeds_B, self.p, self.sigma)
