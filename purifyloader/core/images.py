"""Convert images between the types that people use and the one form of the engine: float32 CHW in [0, 1].

`to_engine` takes PIL images, numpy arrays (HWC or HW), tensors (CHW or HW) and tv_tensors, uint8 or floating point in
[0, 1]; the `ImageKind` beside the pixels turns the result back into exactly the kind that came in. `quantize` is the
only way to uint8.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors

from purifyloader.errors import InputError

__all__ = ["ImageKind", "as_stored", "check_channels", "from_bytes", "from_engine", "is_image", "luma", "own_channels"]
__all__ += ["pil_mode", "quantize", "to_bytes", "to_engine", "to_unit", "tolerance", "type_of"]

_TOLERANCE = 1e-4  # a fortieth of a level of 8 bits: rounding errors of blurs and resizings are a hundredth of it

# Channels by number: grey, grey + alpha, colour, colour + alpha.
_CHANNELS = (1, 2, 3, 4)
_PIL_MODES = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}


def quantize(x: Tensor) -> Tensor:
    """Convert float in [0, 1] to uint8 by rounding, values outside saturating: the one quantiser.

    uint8 -> float32 / 255 -> uint8 is exact for all 256 values.
    """
    if not x.is_floating_point():
        raise InputError(f"quantize takes floating-point images in [0, 1]. Got {x.dtype}.")
    if not torch.compiler.is_compiling() and not bool(torch.isfinite(x).all()):
        raise InputError("quantize takes finite values. Got NaN or infinity in the image.")
    return (x.float() * 255).round().clamp(0, 255).to(torch.uint8)


def tolerance(dtype: torch.dtype) -> float:
    """Return how far outside [0, 1] an image may be: 1e-4, and two units in the last place of a shorter type."""
    return max(_TOLERANCE, 2 * torch.finfo(dtype).eps)


def to_unit(x: Tensor, what: str = "image") -> Tensor:
    """Convert uint8, or floating point in [0, 1], to float32 in [0, 1]; anything else is an error.

    Values outside by up to `tolerance` are clamped: blurs and resizings overshoot in the last bits of a float.
    """
    if x.dtype == torch.uint8:
        return x.float() / 255
    if not x.is_floating_point():
        raise InputError(f"An {what} is uint8, or floating point in [0, 1]. Got {x.dtype}.")
    x, slack = x.float(), tolerance(x.dtype)
    if x.numel() and not torch.compiler.is_compiling():  # looking at values would break a graph in two
        low, high = (float(bound) for bound in x.detach().aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise InputError(f"An {what} needs finite values. Got NaN or infinity.")
        if low < -slack or high > 1 + slack:
            slightly = low > -0.25 and high < 1.25
            raise InputError(
                f"An {what} in floating point lies in [0, 1]. Got values from {low:.4g} to {high:.4g}, up to "
                f"{max(-low, high - 1):.2g} outside. "
                + ("Bicubic resizing, sharpening and noise do that: put x.clamp(0, 1) behind it. " if slightly else "")
                + "Purify before normalising, and divide 0-255 floats by 255."
            )
        if low < 0 or high > 1:
            return x.clamp(0, 1)
    return x


@dataclass(frozen=True)
class ImageKind:
    """The type of an image, which `from_engine` needs to give the same back."""

    container: str  # "pil", "numpy", "tensor" or "tv_tensor"
    channels: int  # 1 grey, 2 grey + alpha, 3 colour, 4 colour + alpha
    planar: bool  # 2-dimensional, without a channel axis
    dtype: torch.dtype  # of the array or tensor
    alpha: Tensor | None = None  # (1, H, W) in the image's own type, handed through untouched


def is_image(value: Any) -> bool:
    """Tell whether `to_engine` may take this value: PIL, or an array or tensor of 2 or 3 dimensions."""
    return isinstance(value, Image.Image) or (isinstance(value, np.ndarray | Tensor) and value.ndim in (2, 3))


def _as_chw(image: Any) -> tuple[Tensor, str, bool]:
    """Return the image's own values as a CHW tensor, its container, and True if it had no channel axis."""
    if isinstance(image, Image.Image):
        if image.mode not in _PIL_MODES:
            deep = image.mode in ("I", "F") or image.mode.startswith("I;")
            raise InputError(
                f"A PIL image's mode must be one of {', '.join(_PIL_MODES)}. Got {image.mode!r}. "
                + (
                    "Scale its levels to 8 bits in the dataset; image.convert would only cut them off."
                    if deep
                    else 'Convert it in the dataset: image.convert("RGB").'
                )
            )
        array = np.array(image)
        return torch.from_numpy(np.atleast_3d(array)).permute(2, 0, 1), "pil", array.ndim == 2
    if isinstance(image, np.ndarray):
        if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in _CHANNELS):
            raise InputError(
                "A numpy image has shape (H, W) or (H, W, C) with 1 to 4 channels. "
                f"Got {image.shape}." + _layout_hint(image.shape, 0)
            )
        if image.dtype not in (np.uint8, np.float16, np.float32, np.float64):
            raise InputError(f"A numpy image is uint8, or floating point in [0, 1]. Got {image.dtype}.")
        array = np.ascontiguousarray(np.atleast_3d(image))
        if not array.flags.writeable:
            array = array.copy()  # torch warns about sharing memory that it must not write
        return torch.from_numpy(array).permute(2, 0, 1), "numpy", image.ndim == 2
    if isinstance(image, Tensor):
        if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[0] not in _CHANNELS):
            raise InputError(
                "A tensor image has shape (H, W) or (C, H, W) with 1 to 4 channels. "
                f"Got {tuple(image.shape)}." + _layout_hint(image.shape, 2)
            )
        container = "tv_tensor" if isinstance(image, tv_tensors.Image) else "tensor"
        plain = image.as_subclass(Tensor)
        return (plain[None] if image.ndim == 2 else plain), container, image.ndim == 2
    raise InputError(
        f"An image is a PIL image, a numpy array (H, W, C) or a tensor (C, H, W). Got {type(image).__name__}."
    )


@contextlib.contextmanager
def not_transformed(taker: str) -> Iterator[None]:
    """Raise `InputError` for what fails because it stands inside `torch.vmap`, or another of torch's transforms."""
    try:
        yield
    except RuntimeError as error:
        if torch._C._functorch.peek_interpreter_stack() is None:
            raise
        raise InputError(
            f"{taker} takes a batch itself, and looks at its values, which torch.vmap and some other transforms of "
            f"torch.func do not allow. Got a call inside one ({str(error).strip():.120}): call it outside, with the "
            "whole batch; gradients are those of torch.autograd."
        ) from error


def check_channels(
    taker: str, shape: Sequence[int], known: Sequence[int] = _CHANNELS, leading: str = "B", what: str = "image"
) -> None:
    """Refuse images without pixels, or with another number of channels, such as a batch with the channels last.

    `leading` are the axes before (C, H, W): "B", "" for one image, or "..." for any.
    """
    if len(shape) < 3 if leading == "..." else len(shape) != 3 + len(leading):
        fits = False
    elif 0 in shape[-3:]:
        raise InputError(f"An {what} needs at least one pixel and one channel. Got {tuple(shape)}.")
    else:
        fits = shape[-3] in known
    if fits:
        return
    last = len(shape) == 4 and shape[3] in _CHANNELS
    advice = ": permute(0, 3, 1, 2) brings the channels to the front." if last else "."
    numbers = " or ".join(str(number) for number in known) if len(known) < 4 else f"{known[0]} to {known[-1]}"
    axes = ", ".join([*filter(None, [leading]), "C", "H", "W"])
    raise InputError(f"{taker} takes images ({axes}) of {numbers} channels. Got {tuple(shape)}{advice}")


def _layout_hint(shape: Sequence[int], axis: int) -> str:
    if len(shape) != 3 or shape[axis] not in _CHANNELS:
        return ""
    return (
        " Numpy images are channels-last: transpose it to (H, W, C)."
        if axis == 0
        else " Tensor images are channels-first: permute it to (C, H, W)."
    )


def _split(image: Any) -> tuple[Tensor, ImageKind]:
    """Split an image into colour planes, (C, H, W) in the image's own type, and its kind."""
    values, container, planar = _as_chw(image)
    if values.shape[-1] == 0 or values.shape[-2] == 0:
        raise InputError(f"An image has at least one pixel. Got shape {tuple(values.shape)}.")
    count = values.shape[0]
    alpha = values[-1:].clone() if count in (2, 4) else None
    kind = ImageKind(container, count, planar, values.dtype, alpha)
    return (values if alpha is None else values[:-1]), kind


def as_stored(image: Any, channels: int | None = None) -> tuple[Tensor, ImageKind]:
    """Check as `to_engine`, and return uint8, or float32 in [0, 1], (channels, H, W), and the image's kind."""
    values, kind = _split(image)
    x = values if values.dtype == torch.uint8 else to_unit(values)
    if channels is not None and x.shape[0] != channels:
        if x.shape[0] != 1:
            raise InputError(
                f"This purifier takes images of {channels} channel. Got {x.shape[0]} colour channels: "
                "use a model for colour images."
            )
        x = x.expand(channels, -1, -1)
    return x.contiguous(), kind


def to_engine(image: Any, channels: int | None = None) -> tuple[Tensor, ImageKind]:
    """Convert an image to float32 (channels, H, W) in [0, 1], and its kind.

    It takes PIL (L, LA, RGB, RGBA), numpy (H, W[, C]) and tensor ([C,] H, W); uint8 or float in [0, 1]. `channels` are
    the purifier's, None for the image's own: grey images are repeated for 3, and an alpha plane is set aside.
    """
    x, kind = as_stored(image, channels)
    return (x.float() / 255 if x.dtype == torch.uint8 else x), kind


def luma(x: Tensor) -> Tensor:
    """Compute the brightness, (..., 1, H, W), of colour images (..., 3, H, W): ITU-R 601-2 luma, as PIL's convert("L").

    The weights sum to 1, where torchvision's are 0.01 % short and would darken a grey image.
    """
    red, green, blue = x.unbind(-3)
    return (0.299 * red + 0.587 * green + 0.114 * blue).unsqueeze(-3)


def own_channels(x_CHW: Tensor, kind: ImageKind) -> Tensor:
    """Make an image grey again that was grey."""
    return x_CHW if kind.channels > 2 or x_CHW.shape[0] != 3 else luma(x_CHW)


def from_engine(x_CHW: Tensor, kind: ImageKind) -> Any:
    """Convert pixels of the engine to an image of `kind`; uint8 kinds go through `quantize`, floats are clamped."""
    x = own_channels(x_CHW.cpu(), kind)
    return _give_back(quantize(x) if kind.dtype == torch.uint8 else x.clamp(0, 1).to(kind.dtype), kind)


def to_bytes(x_CHW: Tensor, kind: ImageKind) -> NDArray[np.uint8]:
    """Convert pixels of the engine to those of a cache: uint8 (H, W, C) of the image's own channels, alpha too."""
    values = quantize(own_channels(x_CHW, kind).cpu())
    if kind.alpha is not None:
        values = _joined(values, kind.alpha if kind.alpha.dtype == torch.uint8 else quantize(kind.alpha))
    return values.permute(1, 2, 0).contiguous().numpy()


def from_bytes(image_HWC: NDArray[np.uint8], type_: str) -> Any:
    """Copy the image that `to_bytes` wrote, in the type of `type_of`."""
    if type_.startswith("pil/"):
        height, width, channels = image_HWC.shape
        return Image.frombytes(pil_mode(channels), (width, height), image_HWC.tobytes())
    container, dtype, dimensions = type_.split("/")
    kind = ImageKind(container, image_HWC.shape[2], dimensions == "2", getattr(torch, dtype))
    values = torch.from_numpy(image_HWC.copy()).permute(2, 0, 1)
    return _give_back(values if kind.dtype == torch.uint8 else (values.float() / 255).to(kind.dtype), kind)


def pil_mode(channels: int) -> str:
    return ("L", "LA", "RGB", "RGBA")[channels - 1]


def type_of(kind: ImageKind) -> str:
    """Name the type of an image: container, dtype and dimensions, such as "pil/uint8/3"."""
    return f"{kind.container}/{str(kind.dtype).removeprefix('torch.')}/{2 if kind.planar else 3}"


def _joined(colours_CHW: Tensor, alpha: Tensor) -> Tensor:
    if colours_CHW.shape[1:] != alpha.shape[1:]:
        raise InputError(
            f"An image with an alpha plane keeps its size. Got {tuple(alpha.shape[1:])}, purified to "
            f"{tuple(colours_CHW.shape[1:])}: drop the alpha plane in the dataset, or purify without resizing."
        )
    return torch.cat([colours_CHW, alpha])


def _give_back(values_CHW: Tensor, kind: ImageKind) -> Any:
    if kind.alpha is not None:
        values_CHW = _joined(values_CHW, kind.alpha)
    if kind.container in ("tensor", "tv_tensor"):
        values = (values_CHW[0] if kind.planar else values_CHW).contiguous()
        return tv_tensors.Image(values) if kind.container == "tv_tensor" else values
    array = np.ascontiguousarray(values_CHW.permute(1, 2, 0).numpy())
    array = array[:, :, 0] if kind.planar else array
    return Image.fromarray(array) if kind.container == "pil" else array
