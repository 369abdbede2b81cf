"""Take images of any size: bring them to one size, or purify them in tiles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from purifyloader.core import noise, sizes
from purifyloader.errors import ConfigError
from purifyloader.purifiers.base import Purifier, refuse_plans

__all__ = ["Resize", "Tiles"]


class Resize(Purifier):
    """Bring images of any size to the size that a model was trained for: the one purifier that changes shapes.

    Antialiased bilinear, image by image; an image that has the size already passes unchanged. It draws nothing.

    Args:
        size: of the shorter side, in pixels. The aspect is kept, the longer side rounded down (torchvision).
        crop: also cut out the central crop x crop pixels, so that all images have one shape; at most `size`.

    >>> from purifyloader.purifiers import Resize
    >>> Resize(32, crop=32).output_shape((3, 100, 80))
    (3, 32, 32)
    """

    kind = "resize"
    options = ("size", "crop")

    def __init__(self, size: int, crop: int | None = None) -> None:
        super().__init__()
        sizes.check_resize(size, crop)
        self.size, self.crop = size, crop

    def noise_first(self) -> float | str:
        return "which changes how far images are apart: resize the data set beforehand, and certify what comes of it."

    def output_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        return sizes.resized_shape(shape, self.size, self.crop)

    def run(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
        images = self.run_images(x_BCHW.unbind(), seeds_B)
        if not images:
            channels, height, width = x_BCHW.shape[1:]
            return x_BCHW.new_zeros(0, *self.output_shape((channels, height, width)))
        return torch.stack(images)

    def run_images(self, images: Sequence[Tensor], seeds_B: Tensor) -> list[Tensor]:
        return [sizes.resize(image, self.size, self.crop) for image in images]


def keeps_shape(purifier: Purifier, shape: sizes.Shape) -> bool:
    """Tell whether images of `shape` keep it, whatever size they have.

    Asked by kind too: a resize to the very size of a tile would do nothing, which nobody asks for.
    """
    return purifier.output_shape(shape) == shape and not any(isinstance(part, Resize) for part in purifier.modules())


class Tiles(Purifier):
    """Apply a purifier to square tiles, at the resolution the image has, and blend them together again.

    All tiles of all images that come together are purified together, in full batches. Tile j of an image (row by row
    from the top left) draws from `fold_in(seed, j)`. Where tiles overlap they are averaged, each weighted by a ramp
    that falls linearly towards its edge; a pixel that one tile covers is exactly that tile's.

    The last tile of a row or column ends with the image, and so may overlap its neighbours by more. An image smaller
    than a tile is mirrored at its borders (its border repeated where it is too small for that) and cut back. Decisions
    about a whole image, such as whether `Compensation` makes it grey, belong after the tiles, not in them.

    Args:
        purifier: one that keeps shapes and has no condition over the dataset; put a `Resize` before the tiles.
        size: side of a tile, in pixels: the one that the model was trained for.
        overlap: pixels that neighbours share, at most half a tile; a quarter by default.

    >>> from purifyloader.purifiers import Jpeg, Tiles
    >>> Tiles(Jpeg(50), 32).overlap
    8
    """

    kind = "tiles"
    options = ("purifier", "size", "overlap")

    def __init__(self, purifier: Purifier, size: int, overlap: int | None = None) -> None:
        super().__init__()
        if not isinstance(purifier, Purifier):
            raise ConfigError(f"Tiles takes a purifier. Got {type(purifier).__name__}.")
        if overlap is None and isinstance(size, int):
            overlap = size // 4
        sizes.check_tiles(size, overlap)
        if not keeps_shape(purifier, (purifier.image_channels or 3, size, size)):
            raise ConfigError(
                "Tiles takes a purifier that keeps the shape of a tile. Got one that resizes: "
                "put the Resize before, as in Chain(Resize(...), Tiles(...))."
            )
        refuse_plans("Tiles", purifier)
        assert overlap is not None
        self.purifier, self.size, self.overlap = purifier, size, overlap
        self.image_channels = purifier.image_channels

    @property
    def calls(self) -> int:
        return self.purifier.calls

    def noise_first(self) -> float | str:
        return (
            "which draw noise for each tile, so that a pixel in several of them, or mirrored at the border of a small "
            "image, has several draws: purify whole images, of the size that the model was trained for."
        )

    def in_order(self) -> Iterator[Purifier]:
        yield self
        yield self.purifier

    def run(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
        return torch.stack(self.run_images(x_BCHW.unbind(), seeds_B)) if len(x_BCHW) else x_BCHW

    def run_images(self, images: Sequence[Tensor], seeds_B: Tensor) -> list[Tensor]:
        cuts = [sizes.cut(image, self.size, self.overlap) for image in images]
        place = [(row, j) for row, tiles in enumerate(cuts) for j in range(len(tiles))]
        row_T, j_T = torch.tensor(place, dtype=torch.int64, device=seeds_B.device).reshape(-1, 2).unbind(1)
        tiles = self.purifier.run_images([cuts[row][j] for row, j in place], noise.fold_in(seeds_B[row_T], j_T))
        done = iter(tiles)
        return [
            sizes.join(list(islice(done, len(own))), image.shape, self.size, self.overlap)
            for image, own in zip(images, cuts, strict=True)
        ]
