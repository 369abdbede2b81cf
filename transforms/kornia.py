"""Purify and compensate as kornia augmentations.

They are `IntensityAugmentationBase2D`: in `AugmentationSequential`, `ImageSequential`, `VideoSequential` and
`PatchSequential` masks, boxes, keypoints and labels pass untouched, and `aug(x, params=aug._params)` gives the same
output again. As everywhere in kornia images are float (B, C, H, W) in [0, 1], before `Normalize`; an image (C, H, W)
comes back as a batch of one, unless `keepdim=True`; draws are torch's, on the augmentation's device.
"""

from __future__ import annotations

from typing import Any

import torch
from kornia.augmentation import IntensityAugmentationBase2D
from torch import Tensor

from purifyloader.core import corruptions
from purifyloader.core.images import check_channels, not_transformed, to_unit
from purifyloader.errors import InputError
from purifyloader.files.atomic import canonical_json
from purifyloader.purified.tensors import HoldsPurifier, purify_tensor
from purifyloader.purifiers import Purifier
from purifyloader.purifiers.base import without_functions
from purifyloader.transforms.purification import squeezing


class _Augmentation(IntensityAugmentationBase2D):
    """Base: says that it takes no call inside one of torch's transforms of functions."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with not_transformed(f"The transform {type(self).__name__}"):
            return super().forward(*args, **kwargs)


class RandomPurify(HoldsPurifier, _Augmentation):
    """A purifier as a kornia augmentation. With p < 1 only the chosen images go through the network.

    What is purified has no gradient. The purifier (see `purifyloader.recipes`) needs its plan, keeps the size of images
    (`InputError` else), is no submodule, and always in float32; `to(device)` moves it. `params` holds `seeds`, int64,
    one an image. `same_on_batch` gives all images of a batch the same noise and the same decision; with `keepdim` an
    image (C, H, W) comes back as one.

    >>> import torch
    >>> from purifyloader import recipes
    >>> from purifyloader.transforms import RandomPurify
    >>> RandomPurify(recipes.jpeg(quality=10), p=0.5)(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 3, 32, 32])
    """

    def __init__(self, purifier: Purifier, p: float = 1.0, same_on_batch: bool = False, keepdim: bool = False) -> None:
        super().__init__(p=p, same_on_batch=same_on_batch, keepdim=keepdim)
        self._hold(purifier)

    def generate_parameters(self, batch_shape: tuple[int, ...]) -> dict[str, Tensor]:
        check_channels(type(self).__name__, batch_shape, (1, 3))  # here too: kornia applies nothing to no chosen image
        count = batch_shape[0]
        drawn = torch.randint(-(2**63), 2**63 - 1, (min(count, 1) if self.same_on_batch else count,), device="cpu")
        return {"seeds": drawn.expand(count).clone()}

    def apply_transform(
        self, input: Tensor, params: dict[str, Tensor], flags: dict[str, Any], transform: Tensor | None = None
    ) -> Tensor:
        check_channels(type(self).__name__, input.shape, (1, 3))
        shape = (input.shape[1], input.shape[2], input.shape[3])
        if self.purifier.output_shape(shape) != shape:
            raise InputError(
                f"{type(self).__name__} takes no purifier that changes the size of images. Got images {shape} that "
                f"would become {self.purifier.output_shape(shape)}: resize them by an augmentation of kornia's."
            )
        seeds = params["seeds"].to(input.device)
        if self.p == 1:  # kornia does not look at its own decisions then, and so neither do we
            return purify_tensor(self.purifier, input, seeds)
        # kornia sends all images here and would throw away what was made of the others
        chosen = (params["batch_prob"] > 0.5).to(input.device)
        out = input.detach().clone()
        if bool(chosen.any()):
            out[chosen] = purify_tensor(self.purifier, input[chosen], seeds[chosen])
        return out

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._says()}, p={self.p}, same_on_batch={self.same_on_batch})"

    def _says(self) -> str:
        return canonical_json(without_functions(self.purifier.config()))


class RandomCompensate(_Augmentation):
    """ECLIPSE's compensation (Eq. 13): grayscale with probability p, then Gaussian noise, then clamp.

    The noise is added to every image; `p` is the probability of grayscale, an image, and `sigma` the noise's standard
    deviation in image units, as in `Compensate` (`InputError` outside [0, 1]); `same_on_batch` and `keepdim` are as in
    `RandomPurify`. `params` holds `grey`, bool (B,), and `noise`, (B, C, H, W), standard normal.

    >>> import torch
    >>> from purifyloader.transforms import RandomCompensate
    >>> RandomCompensate(p=0.4, sigma=0.05)(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 3, 32, 32])
    """

    def __init__(self, p: float = 0.4, sigma: float = 0.05, same_on_batch: bool = False, keepdim: bool = False) -> None:
        corruptions.check_compensation(p, sigma)
        super().__init__(p=1.0, same_on_batch=same_on_batch, keepdim=keepdim)
        self.flags = {"grayscale_p": p, "sigma": sigma}

    def generate_parameters(self, batch_shape: tuple[int, ...]) -> dict[str, Tensor]:
        count, *shape = batch_shape
        drawn = min(count, 1) if self.same_on_batch else count
        grey = torch.rand(drawn, device=self.device) < self.flags["grayscale_p"]
        noise = torch.randn(drawn, *shape, device=self.device)
        return {"grey": grey.expand(count), "noise": noise.expand(count, *shape)}

    def apply_transform(
        self, input: Tensor, params: dict[str, Tensor], flags: dict[str, Any], transform: Tensor | None = None
    ) -> Tensor:
        grey, noise = (params[name].to(input.device) for name in ("grey", "noise"))
        corrupted = corruptions.grey_and_noise(to_unit(input), grey, noise, flags["sigma"])
        return corrupted.to(input.dtype)


class RandomSqueeze(RandomPurify):
    """A cheap baseline in one word, with probability p an image; see `purifyloader.transforms.Squeeze`.

    >>> import torch
    >>> from purifyloader.transforms import RandomSqueeze
    >>> RandomSqueeze("jpeg", quality=10)(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 3, 32, 32])
    """

    def __init__(
        self, method: str = "jpeg", p: float = 1.0, same_on_batch: bool = False, keepdim: bool = False, **options: Any
    ) -> None:
        super().__init__(squeezing(method, options), p, same_on_batch, keepdim)
        self.method, self.options = method, options

    def _says(self) -> str:
        return ", ".join([repr(self.method), *(f"{name}={value!r}" for name, value in self.options.items())])
