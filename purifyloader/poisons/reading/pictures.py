"""Formats that hold a whole training set of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from purifyloader.core.checks import stored_integer, stored_integers
from purifyloader.core.decoding import opened_image
from purifyloader.datasets.folders import files_below
from purifyloader.datasets.named import SUFFIXES, warn_of_others
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
        return stored_integers(f"A label in {path}", labels.reshape(-1))
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
    folders = [content.path, *(content.path / name for name in content.names if (content.path / name).is_dir())]
    return any(path.suffix.lower() == ".png" for folder in folders for path in folder.iterdir())


def _read_png(content: Any, request: Request) -> Poisoned:
    if not isinstance(content, Folder):
        raise InputError(f"{request.path} must be a folder of images, <index>.png. Got {describe(content)}.")
    folder, files = content.path, _images_below(content.path, request)
    if own.is_folder(content.names):
        return _written(folder, files, request)
    depths = {len(file.relative_to(folder).parts): str(file.relative_to(folder)) for file in files}
    if depths.keys() == {2} and {file.parent.name for file in files} == {"data"}:  # as AR and TAP lay them
        return _png_by_index(files, request)
    if depths.keys() not in ({1}, {2}):
        what = "<index>.png, or a folder of them for each class, and not both"
        raise request.must_hold(what, " and ".join(depths.values()) or "none")
    return _png_by_index(files, request) if 1 in depths else _png_by_class(folder, files, request)


def _images_below(folder: Path, request: Request) -> list[Path]:
    """List all .png below a folder; refuse other images, which would stay unread, and count other files."""
    try:
        found = sorted(files_below(folder))
    except OSError as error:
        raise InputError(f"{folder} must be a folder that can be read, with all below it. Got: {error}.") from None
    files = [path for path in found if path.suffix.lower() == ".png"]
    if images := [path for path in found if path.suffix.lower() in SUFFIXES and path.suffix.lower() != ".png"]:
        twin = " beside a .png of that name" if images[0].with_suffix(".png") in files else ""
        raise request.must_hold(
            "its images as .png",
            f"{len(images):,} others, the first {images[0].relative_to(folder)}{twin}",
            "remove them, or save them as .png from what they were made of",
        )
    known = {folder / name for name in own.BESIDE}
    others = [path for path in found if path.suffix.lower() != ".png" and path not in known]
    warn_of_others(folder, others, "the images of a poison are, .png")
    return files


def _written(folder: Path, found: list[Path], request: Request) -> Poisoned:
    table = own.table_of(folder)
    files = {name: folder / name for name in table.labels}
    named, there = {*files.values()}, {*found}
    for what, got, paths in (
        ("all images of its labels.csv", "missing", named - there),
        ("no images but those of its labels.csv", "more", there - named),
    ):
        if paths:
            first = ", ".join(str(path.relative_to(folder)) for path in sorted(paths)[:5])
            raise request.must_hold(what, f"{len(paths):,} {got}, the first {first}", "write it anew")
    places = _indices(list(files.values()))
    if places is None or sorted(places.tolist()) != list(range(len(files))) or not files:
        raise InputError(f"{folder / 'labels.csv'} must name <index>.png from 0 on. Got {describe(list(files)[:3])}.")
    images = _decoded(list(files.values()))[np.argsort(places)]
    return own.from_folder(request, folder, images, table, dict(zip(files, places.tolist(), strict=True)))


def _png_by_index(files: list[Path], request: Request) -> Poisoned:
    _, labels = request.need_clean(
        "is a folder of <index>.png, whose labels are those of the clean images (or sub-folders, one a class)"
    )
    indices = _indices(files)
    if indices is None:
        raise request.must_hold("<index>.png, the place of each image in the clean training set", _odd(files))
    if int(indices.max()) >= len(labels):
        what = f"<index>.png for the {len(labels):,} images of clean="
        raise request.must_hold(what, f"{indices.max()}.png", "give the set that the poison was made from")
    return _placed(request, files, labels[indices], indices)


def _placed(
    request: Request, files: list[Path], labels: list[int] | NDArray[np.int64], indices: NDArray[np.int64]
) -> Poisoned:
    if int(indices.max()) < len(request.need_clean()[0]):  # `indexed` says what is wrong with others
        request.check_covers(indices)
    found = indexed(request, _decoded(files), labels, indices, "images")
    return full(request, found.images, found.labels, "images")


def _png_by_class(folder: Path, files: list[Path], request: Request) -> Poisoned:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    numbered = all(name.isdecimal() for name in names)
    full_folders = {path.parent.name for path in files}
    if not numbered and (empty := [name for name in names if name not in full_folders]):
        what = "an image in each class folder, whose places give the labels"
        raise request.must_hold(what, f"none in {', '.join(empty[:5])}", "remove such a folder, or fetch it again")
    labels = [
        stored_integer(f"The name of {path.parent}", path.parent.name) if numbered else names.index(path.parent.name)
        for path in files
    ]
    indices = _indices(files)
    if request.clean is not None:
        if indices is None:
            what = "<index>.png in its class folders to be compared with clean="
            raise request.must_hold(what, _odd(files), "leave clean= away")
        return _placed(request, files, labels, indices)
    if indices is not None and int(indices.max() - indices.min()) >= len(indices):
        gaps = np.setdiff1d(np.arange(int(indices.min()), int(indices.max())), indices)
        raise request.must_hold(
            f"every image from {indices.min()}.png to {indices.max()}.png",
            f"{len(indices):,}: {len(gaps):,} are missing, the first {', '.join(map(str, gaps[:5]))}",
            "fetch it again, or give clean= and count= if these are all that it poisons",
        )
    request.check_count(len(files))
    images, given = _decoded(files), np.asarray(labels, np.int64)
    if indices is not None:
        order = np.argsort(indices)
        images, given = images[order], given[order]
    return full(request, images, given, "images")


def _indices(files: list[Path]) -> NDArray[np.int64] | None:
    """Return the numbers that files are named by, None unless all are and no two alike."""
    if not all(path.stem.isdecimal() for path in files):
        return None
    indices = np.array([stored_integer(f"The name of {path}", path.stem) for path in files], np.int64)
    return indices if len(np.unique(indices)) == len(indices) else None


def _odd(files: list[Path]) -> str:
    """Name a file without a number, or two of one number, such as 12.png and 012.png."""
    named: dict[int, Path] = {}
    for path in files:
        if not path.stem.isdecimal():
            return path.name
        if (other := named.setdefault(int(path.stem), path)) is not path:
            return f"{other.name} and {path.name}, two of one number" + f" in {path.parent.name}" * (
                other.name == path.name
            )
    return "none"


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
