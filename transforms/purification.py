"""Purification, and the baselines to try first, as torchvision v2 transforms."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors

from purifyloader import recipes
from purifyloader.errors import InputError
from purifyloader.files.atomic import canonical_json
from purifyloader.purified.tensors import HoldsPurifier, purify_tensor
from purifyloader.purifiers import Purifier
from purifyloader.purifiers.base import without_functions
from purifyloader.recipes.registry import describe
from purifyloader.transforms.base import ImageTransform

log = logging.getLogger(__name__)

SQUEEZES = {
    name.replace("-", "_"): make for name, make in recipes.RECIPES.own.items() if not describe(name, make).models
}
"""The baselines that `Squeeze` and `RandomSqueeze` know by name: the recipes without a model."""


class Purify(HoldsPurifier, ImageTransform):
    """A purifier as a step of a transform: the first, on the image as it is stored.

    Each image of a batch (each frame of a video) has its own noise, fresh at each call from torch's random generator,
    so that the same image comes out a little different in every epoch. It is computed where the transform runs, in a
    loader's workers for `transform=` of a dataset. There a network costs as much for one image as for its
    `compute_batch`, usually 32, and a warning says so: use `PurifiedLoader`, which does a whole batch at once and on a
    GPU, or a cache (`PurifiedDataset(..., cache=)`).

    Takes and gives what `Compensate` does, but no masks and boxes with a purifier that changes the size of images
    (`InputError`). The purifier (see `purifyloader.recipes`) needs its plan, is no submodule, and always in float32;
    `to(device)` moves it. Weights on a GPU in a forked worker are a `PurifyError`.

    >>> import torch
    >>> from purifyloader import recipes
    >>> from purifyloader.transforms import Purify
    >>> Purify(recipes.jpeg(quality=10))(torch.rand(3, 32, 32)).shape
    torch.Size([3, 32, 32])
    """

    def __init__(self, purifier: Purifier) -> None:
        super().__init__()
        self._warned = False
        self._hold(purifier)

    def check_inputs(self, flat_inputs: list[Any]) -> None:
        super().check_inputs(flat_inputs)
        spatial = [v for v in flat_inputs if isinstance(v, tv_tensors.TVTensor) and not isinstance(v, _IMAGES)]
        if spatial and self.purifier.output_shape((3, 97, 101)) != (3, 97, 101):
            raise InputError(
                "A purifier that changes the size of images takes samples without masks, boxes and keypoints. Got "
                f"{type(spatial[0]).__name__}: resize the sample by a transform before this one."
            )

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._apply_to(inpt, self._purified, self.purifier.image_channels)

    def _purified(self, x_BCHW: Tensor) -> Tensor:
        if len(x_BCHW) == 1 and self.purifier.calls and not self._warned:
            self._warned = True
            log.warning(
                "Purify got a single image, for which a network costs as much as for a whole batch: purify in a "
                "PurifiedLoader or a cache (PurifiedDataset(..., cache=...)) instead."
            )
        keys_B = torch.randint(-(2**63), 2**63 - 1, (len(x_BCHW),), device="cpu")
        return purify_tensor(self.purifier, x_BCHW, keys_B)

    def extra_repr(self) -> str:
        return canonical_json(without_functions(self.purifier.config()))


_IMAGES = (tv_tensors.Image, tv_tensors.Video)


class Squeeze(Purify):
    """Apply a cheap baseline in one word: `Squeeze("jpeg", quality=10)`, `Squeeze("grayscale")`, `Squeeze("bit_depth",
    bits=2)`. One that moves pixels at random draws anew at each call, as its published script does.

    `method` is one of `SQUEEZES`, functions of `purifyloader.recipes`; `InputError` for others, or options not its own.

    >>> import torch
    >>> from purifyloader.transforms import Squeeze
    >>> Squeeze("jpeg", quality=10)(torch.rand(3, 32, 32)).shape
    torch.Size([3, 32, 32])
    """

    def __init__(self, method: str = "jpeg", **options: Any) -> None:
        super().__init__(squeezing(method, options))
        self.method, self.options = method, options

    def extra_repr(self) -> str:
        return ", ".join([repr(self.method), *(f"{name}={value!r}" for name, value in self.options.items())])


def squeezing(method: str, options: dict[str, Any]) -> Purifier:
    """Make the purifier that a baseline's name and options mean."""
    if method not in SQUEEZES:
        raise InputError(f"A baseline must be one of {', '.join(SQUEEZES)}. Got {method!r}.")
    try:
        return SQUEEZES[method](**options)
    except TypeError as error:
        raise InputError(f"The options of {method!r} do not fit it: {error}.") from None
