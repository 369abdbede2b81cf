"""Formats that hold a whole training set of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from purifyloader.core.decoding import opened_image
from purifyloader.errors import InputError
from purifyloader.poisons.poisoned import Poisoned
from purifyloader.poisons.reading import own
from purifyloader.poisons.reading.content import Folder, as_number_array, describe, integers, read_array
from purifyloader.poisons.reading.request import Format, Request, as_levels, full, indexed, label_of

__all__ = ["FORMATS"]


def _is_npz(content: Any, request: Request) -> bool:
    return isinstance(content, dict) and {"data", "targets"} <= set(content)


def _read_npz(content: Any, request: Request) -> Poisoned:
    if not _is_npz(content, request):
        raise request.must_hold("the arrays data and targets", describe(content))
    images = as_number_array(content["data"])
    if images is None or images.dtype != np.uint8 or not _is_of_images(images):
        raise request.must_hold(
            "its images in data, uint8 (N, H, W, C)",
            describe(content["data"]),
            "transpose (N, C, H, W), and multiply images in [0, 1] by 255",
        )
    labels = integers(content["targets"], f"The targets of {request.path}")
    _one_each(request, len(images), len(labels))
    if "poison" in content:
        return own.from_arrays(request, content, images, labels)
    return full(request, images, labels, "images")


def _is_of_images(array: NDArray[Any]) -> bool:
    return array.ndim == 4 and array.shape[3] in (1, 3) and array.size > 0


def _one_each(request: Request, images: int, labels: int) -> None:
    if images != labels:
        raise request.must_hold("one label an image", f"{images:,} images and {labels:,} labels")


def _is_ntga(content: Any, request: Request) -> bool:
    if isinstance(content, Folder):
        return any(name.startswith("x_train") and name.endswith(".npy") for name in content.names)
    return isinstance(content, np.ndarray) and content.dtype.kind == "f" and _is_of_images(content)


def _read_ntga(content: Any, request: Request) -> Poisoned:
    x = _ntga_images(content, request) if isinstance(content, Folder) else request.path
    images = content if isinstance(content, np.ndarray) else read_array(x)
    if not _is_ntga(images, request):
        raise InputError(f"{x} must hold NTGA images, floating point (N, H, W, C). Got {describe(images)}.")
    beside = sorted(path for path in x.parent.glob("y_train*.npy"))
    if len(beside) != 1:
        raise InputError(
            f"{x} needs its labels beside it, one file y_train*.npy. Got {', '.join(p.name for p in beside) or 'none'}."
        )
    labels = _from_one_hot(read_array(beside[0]), beside[0])
    _one_each(request, len(images), len(labels))
    return full(request, as_levels(images, str(x)), labels, "NTGA")


def _ntga_images(folder: Folder, request: Request) -> Path:
    names = [name for name in folder.names if name.startswith("x_train") and name.endswith(".npy")]
    poisons = [name for name in names if "ntga" in name] or names  # the clean ones are published beside them
    if len(poisons) != 1:
        what = "one file x_train*.npy of NTGA images"
        raise request.must_hold(what, ", ".join(poisons) or "none", "give the path of one")
    return folder.path / poisons[0]


def _from_one_hot(labels: NDArray[Any], path: Path) -> NDArray[np.int64]:
    if labels.ndim == 2 and labels.shape[1] > 1 and bool(np.isin(labels, (0, 1)).all() and (labels.sum(1) == 1).all()):
        return labels.argmax(axis=1).astype(np.int64)
    if labels.dtype.kind in "iu" and labels.size == len(labels):
        return labels.reshape(-1).astype(np.int64)
    raise InputError(f"{path} must hold one-hot labels (N, classes), or integers. Got {describe(labels)}.")


def _is_raw_bytes(content: Any, request: Request) -> bool:
    if not isinstance(content, list) or not content:
        return False
    first = content[0]
    return isinstance(first, tuple | list) and len(first) == 2 and isinstance(first[0], bytes | bytearray)


def _read_raw_bytes(content: Any, request: Request) -> Poisoned:
    expected = f"{request.path} must hold a list of (bytes of an RGB image, label)"
    if not _is_raw_bytes(content, request):
        raise InputError(f"{expected}. Got {describe(content)}.")
    size = len(content[0][0])
    side = round((size / 3) ** 0.5)
    shape = (side, side, 3) if request.clean is None else request.clean[0].shape[1:]
    if int(np.prod(shape)) != size:
        raise InputError(
            f"{expected}, {' x '.join(map(str, shape))} of them. Got {size}: images that are not square need clean= "
            "for their size."
        )
    labels = np.empty(len(content), np.int64)
    for index, item in enumerate(content):
        if not isinstance(item, tuple | list) or len(item) != 2 or not isinstance(item[0], bytes | bytearray):
            raise InputError(f"{expected}. Got {describe(item)} as item {index}.")
        if len(item[0]) != size:
            raise InputError(
                f"{expected}, of one size. Got {len(item[0])} bytes in item {index} and {size} in the first."
            )
        labels[index] = label_of(item[1], f"Item {index} of {request.path}")
    images = np.frombuffer(b"".join(item[0] for item in content), np.uint8).reshape(-1, *shape)
    return full(request, images, labels, "images")


def _is_png(content: Any, request: Request) -> bool:
    if not isinstance(content, Folder) or "poisons.pickle" in content.names:
        return False
    folders = [content.path / name for name in content.names if (content.path / name).is_dir()]
    return any(name.lower().endswith(".png") for name in content.names) or any(map(_pngs, folders))


def _pngs(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() == ".png")


def _read_png(content: Any, request: Request) -> Poisoned:
    if not isinstance(content, Folder):
        raise InputError(f"{request.path} must be a folder of images, <index>.png. Got {describe(content)}.")
    folder = content.path
    if own.is_folder(content.names):
        return _written(folder, request)
    top = [folder / name for name in content.names if name.lower().endswith(".png")]
    inside = [folder / name for name in content.names if (folder / name).is_dir()]
    if not top and [path.name for path in inside] == ["data"]:  # as AR and TAP lay them
        folder = folder / "data"
        top, inside = _pngs(folder), []
    if top:
        return _png_by_index(top, request)
    return _png_by_class(inside, request)


def _written(folder: Path, request: Request) -> Poisoned:
    labels, poisoned = own.labels_of(folder)
    files = {name: folder / name for name in labels}
    places = _indices(list(files.values()))
    if places is None or sorted(places.tolist()) != list(range(len(files))) or not files:
        raise InputError(f"{folder / 'labels.csv'} must name <index>.png from 0 on. Got {describe(list(labels)[:3])}.")
    order = np.argsort(places)
    place_of = dict(zip(files, places.tolist(), strict=True))
    images = _decoded(list(files.values()))[order]
    return own.from_folder(
        request,
        folder,
        images,
        [list(labels.values())[place] for place in order],
        np.array(sorted(place_of[name] for name in poisoned), np.int64),
    )


def _png_by_index(files: list[Path], request: Request) -> Poisoned:
    _, labels = request.need_clean(
        "is a folder of <index>.png, whose labels are those of the clean images (or sub-folders, one a class)"
    )
    indices = _indices(files)
    if indices is None:
        odd = next((p.name for p in files if not p.stem.isdecimal()), "two of one number")
        raise request.must_hold("<index>.png, the place of each image in the clean training set", odd)
    if int(indices.max()) >= len(labels):
        what = f"<index>.png for the {len(labels):,} images of clean="
        raise request.must_hold(what, f"{indices.max()}.png", "give the set that the poison was made from")
    return _placed(request, files, labels[indices], indices)


def _placed(
    request: Request, files: list[Path], labels: list[int] | NDArray[np.int64], indices: NDArray[np.int64]
) -> Poisoned:
    found = indexed(request, _decoded(files), labels, indices, "images")
    return full(request, found.images, found.labels, "images")


def _png_by_class(folders: list[Path], request: Request) -> Poisoned:
    names = [path.name for path in folders]
    numbered = all(name.isdecimal() for name in names)
    files: list[Path] = []
    labels: list[int] = []
    for place, folder in enumerate(folders):
        inside = _pngs(folder)
        files += inside
        labels += [int(folder.name) if numbered else place] * len(inside)
    if not files:
        raise request.must_hold("<index>.png, or a folder of them for each class", ", ".join(names[:5]))
    indices = _indices(files)
    if request.clean is not None:
        if indices is None:
            what = "<index>.png in its class folders to be compared with clean="
            raise request.must_hold(what, files[0].name, "leave clean= away")
        return _placed(request, files, labels, indices)
    images, given = _decoded(files), np.asarray(labels, np.int64)
    if indices is not None:
        order = np.argsort(indices)
        images, given = images[order], given[order]
    return full(request, images, given, "images")


def _indices(files: list[Path]) -> NDArray[np.int64] | None:
    """Return the numbers that files are named by, None unless all are and no two alike."""
    if not all(path.stem.isdecimal() for path in files):
        return None
    indices = np.array([int(path.stem) for path in files], np.int64)
    return indices if len(np.unique(indices)) == len(indices) else None


def _decoded(files: list[Path]) -> NDArray[np.uint8]:
    out: NDArray[np.uint8] | None = None
    for place, path in enumerate(files):
        try:
            with opened_image(path) as image:
                if image.mode not in ("L", "RGB"):
                    raise InputError(
                        f"{path} must be an RGB or grey image. Got Pillow's mode {image.mode!r}: convert it."
                    )
                pixels = np.atleast_3d(np.asarray(image))
        except InputError:
            raise
        except Exception as error:  # what Pillow's decoders raise on damaged files is not a closed list
            raise InputError(f"{path} is no readable image ({error}). Remove or replace it.") from None
        if out is None:
            out = np.empty((len(files), *pixels.shape), np.uint8)
        if pixels.shape != out.shape[1:]:
            raise InputError(f"{path} must have the size of the first image, {out.shape[1:]}. Got {pixels.shape}.")
        out[place] = pixels
    assert out is not None
    return out


FORMATS = {
    "ntga": Format("x_train*.npy, float (N, H, W, C), beside one-hot y_train*.npy", _is_ntga, _read_ntga),
    # of AVATAR and BridgePure
    "npz": Format("an .npz with data, uint8 (N, H, W, C), and targets", _is_npz, _read_npz, may_aim=True),
    # of ECLIPSE and COIN
    "raw-bytes": Format(
        "a pickle of a list of (bytes of an RGB image, label)", _is_raw_bytes, _read_raw_bytes, may_aim=True
    ),
    # of ISS, APBench, AR and TAP
    "png": Format("a folder of <index>.png, or of class folders of them", _is_png, _read_png, may_aim=True),
}
