"""Open datasets that a command line can name; `TarDataset` reads WebDataset tars at random."""

from __future__ import annotations

import functools
import glob
import importlib
import io
import itertools
import logging
import operator
import os
import re
import sys
import tarfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from torch.utils.data import Dataset, Subset
from torchvision import datasets

from purifyloader.core.checks import as_path, stored_integer
from purifyloader.core.decoding import opened_image
from purifyloader.datasets.folders import all_below, check_links, files_below, is_hidden
from purifyloader.errors import InputError
from purifyloader.files.json import MOST_BYTES, parse_json
from purifyloader.files.opening import check_file, opened, opened_number
from purifyloader.files.tars import TAR_ERRORS, opened_tar, split_name

__all__ = ["ImageFiles", "TarDataset", "open_dataset", "read_image", "warn_of_others"]

log = logging.getLogger(__name__)

TORCHVISION = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")  # as torchvision's ImageFolder
_TAR_IMAGES = ("png", "jpg", "jpeg", "webp", "bmp", "ppm", "tif", "tiff")
_TAR = re.compile(r"\.(tar|tar\.\w+|tgz)$")
_MAGIC = set("*?[")
_NO_RANGE = {"I": "integers of 32 bits", "F": "floating point"}
_LONGEST_IMAGE, _LONGEST = 2**30, {"cls": 10_000, "json": MOST_BYTES, "txt": MOST_BYTES}  # bytes of a member
_OPEN_TARS = 64  # of the 1024 files that a process may usually have open

META = re.compile(r"__[^/]*__($|/)")  # names that WebDataset leaves out

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def _read_image(file: Path | BinaryIO, what: str, modes: Sequence[str] = ("RGB",)) -> Image.Image:
    """Decode an image, converted to RGB where it is of none of `modes`; `what` names it in an error."""
    try:
        with opened_image(file) as image:
            mode = image.mode
            # a PGM says what is white, and Pillow brings that to 65535
            wide = mode.startswith("I;16") or (mode == "I" and image.format == "PPM")
            if wide or mode not in _NO_RANGE:
                grey_or_colour = _as_bytes(image) if wide else image
                # to its own mode this is a copy, which no open file stays with
                return grey_or_colour.convert(grey_or_colour.mode if grey_or_colour.mode in modes else "RGB")
    except Exception as error:  # what Pillow's decoders raise on damaged files is not a closed list
        raise InputError(f"{what} is no readable image ({error}). Remove or replace it.") from None
    raise InputError(
        f"{what} must be an image of 8 or 16 bits, of which it is known what is white. Got {_NO_RANGE[mode]} (Pillow's "
        f"mode {mode!r}): save it with 8 bits."
    )


def _as_bytes(image: Image.Image) -> Image.Image:
    """Bring a grey image of 16 bits to 8, rounded: Pillow's own conversion takes all above 255 for white."""
    wide = np.asarray(image).astype(np.uint32)
    wide += 128
    wide //= 257  # in place: an image may be large
    return Image.fromarray(wide.astype(np.uint8))


class ImageFiles(Dataset[Image.Image]):
    """Every image file below a folder, in linked folders too, in the order of their paths, as RGB.

    A warning counts the files that are not read, but for hidden ones.

    >>> from pathlib import Path
    >>> from PIL import Image
    >>> from purifyloader.datasets.named import ImageFiles
    >>> Path("photos").mkdir()
    >>> Image.new("RGB", (32, 32)).save("photos/a.png")
    >>> len(ImageFiles(Path("photos")))
    1
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            found = sorted(files_below(folder))
        except OSError as error:
            raise InputError(f"{folder} must be a folder that can be read, with all below it. Got: {error}.") from None
        self.files = [path for path in found if path.suffix.lower() in SUFFIXES]
        others = [path for path in found if path.suffix.lower() not in SUFFIXES]
        warn_of_others(folder, others, f"{len(SUFFIXES)} kinds of images are, {', '.join(SUFFIXES)}")
        if not self.files:
            raise InputError(f"There are no image files ({', '.join(SUFFIXES)}) below {folder}. Check the path.")

    def names(self) -> list[str]:
        """List the paths below `folder`, without suffixes."""
        return [file.relative_to(self.folder).with_suffix("").as_posix() for file in self.files]

    def subfolders(self) -> list[str]:
        """List the names of the folders right below `folder` that images are in."""
        parts = [file.relative_to(self.folder).parts for file in self.files]
        return sorted({first for first, *rest in parts if rest})

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Image.Image:
        return _read_image(self.files[index], str(self.files[index]))


def warn_of_others(folder: Path, others: Sequence[Path], what_is: str) -> None:
    """Count the files below a folder that are not read, if there are any; `what_is` says which are."""
    if others:
        kinds = Counter(path.suffix.lower() or "no suffix" for path in others)
        counted = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common(5))
        log.warning(
            f"{len(others):,} files below {folder} are not read ({counted}; the first is "
            f"{others[0].relative_to(folder)}): {what_is}."
        )


class TarDataset(Dataset[dict[str, Any]]):
    """Random access to the samples of uncompressed WebDataset tars, without unpacking them.

    WebDataset's grouping: consecutive members with the same path up to the first dot of the base name
    are a sample, the rest of the name, in lower case, is the field's. Order: the tars as given, the
    samples as they lie in them. One pass over the headers finds them; an item is then read by its
    position in the file. Pickles, and works in forked and spawned workers.

    A sample is a dict: "__key__"; "image", a PIL image of mode L, LA, RGB or RGBA (others become RGB);
    and every other field under its name. By the last part of that name "cls" is an int, "json" what it
    says, "txt" a str; anything else is bytes.

    A warning counts the members that are in no sample: links, and names without an extension or that begin with a dot.

    Raises `InputError` for a tar that is missing, compressed, cut short, damaged or without a sample; one key twice in
    a tar; not exactly one image (png, jpg, jpeg, webp, bmp, ppm, tif, tiff) in a sample; and, when an item is read, an
    image or field that cannot be decoded.

    >>> import tarfile
    >>> from PIL import Image
    >>> from purifyloader.datasets.named import TarDataset
    >>> Image.new("RGB", (32, 32)).save("0.png")
    >>> with tarfile.open("a.tar", "w") as tar:
    ...     tar.add("0.png")
    ...
    >>> TarDataset(["a.tar"])[0]["image"].size
    (32, 32)
    """

    def __init__(self, tars: Sequence[str | Path]) -> None:
        if isinstance(tars, str | Path) or not tars:
            raise InputError(f"tars must be a list of one or more files. Got {tars!r}.")
        self.tars = [as_path(tar) for tar in tars]
        self._stamps: list[tuple[int, int]] = []
        # Flat arrays: a million Python objects would be copied into every worker as it counts references.
        tar_ends, starts, key_ends = array("q"), array("q", [0]), array("q", [0])
        offsets, sizes, names = array("q"), array("q"), array("i")
        keys = bytearray()
        numbers: dict[str, int] = {}
        skipped: list[str] = []
        for path in self.tars:
            self._stamps.append(_stamp(path))
            seen: set[str] = set()
            for key, fields in _samples(path, skipped):
                _check_sample(path, key, fields, key in seen)
                seen.add(key)
                for name, (offset, size) in fields.items():
                    offsets.append(offset)
                    sizes.append(size)
                    names.append(numbers.setdefault(name, len(numbers)))
                starts.append(len(offsets))
                keys += key.encode("utf-8", "surrogateescape")
                key_ends.append(len(keys))
            if not seen:
                raise InputError(
                    f"{path} holds no samples: members such as 0001.png and 0001.cls. Write the tar anew, or leave it "
                    "out."
                )
            tar_ends.append(len(starts) - 1)
        if skipped:
            log.warning(
                f"{len(skipped):,} members of {self.tars[0]}{' and the other tars' * (len(self.tars) > 1)} are in no "
                f"sample, the first {skipped[0]}: those are files such as 0001.png and 0001.cls, and no links."
            )
        self._keys, self._names = bytes(keys), list(numbers)
        self._tar_ends, self._starts, self._key_ends = np.array(tar_ends), np.array(starts), np.array(key_ends)
        self._offsets, self._sizes, self._numbers = np.array(offsets), np.array(sizes), np.array(names)
        self._open = _opener()

    def __len__(self) -> int:
        return len(self._starts) - 1

    def tar_of(self, index: int) -> Path:
        """Return the file that holds sample `index`, from 0."""
        return self.tars[int(np.searchsorted(self._tar_ends, index, side="right"))]

    def __getitem__(self, index: int) -> dict[str, Any]:
        position = operator.index(index)
        if not -len(self) <= position < len(self):
            raise IndexError(f"Index must be in [-{len(self)}, {len(self)}). Got {position}.")
        position %= len(self)
        tar = int(np.searchsorted(self._tar_ends, position, side="right"))
        key = self._keys[self._key_ends[position] : self._key_ends[position + 1]].decode("utf-8", "surrogateescape")
        image, fields = None, {}
        for member in range(self._starts[position], self._starts[position + 1]):
            name, size = self._names[self._numbers[member]], int(self._sizes[member])
            what = f"{self.tars[tar]}: {key}.{name}"
            most = _LONGEST_IMAGE if _is_image(name) else _LONGEST.get(name.rpartition(".")[2])
            if most is not None and size > most:
                raise InputError(f"{what} must be of at most {most:,} bytes. Got {size:,}. Write the tar anew.")
            data = self._read(tar, int(self._offsets[member]), size)
            if _is_image(name):
                image = _read_image(io.BytesIO(data), what, ("L", "LA", "RGB", "RGBA"))
            else:
                fields[name] = _decode(name, data, what)
        return {"__key__": key, "image": image, **fields}

    def _read(self, tar: int, offset: int, size: int) -> bytes:
        path = self.tars[tar]
        try:
            file = self._open(str(path), self._stamps[tar])  # held: another thread's may be one too many
            data = os.pread(file.fd, size, offset)
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error}. Bring it back, or open the set anew.") from None
        if len(data) != size:
            raise InputError(f"{path} must be a whole tar file. Got {len(data)} of {size} bytes: fetch it again.")
        return data

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["_open"]  # files are open in one process only
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open = _opener()


class _OpenFile:
    """A file for `os.pread`, closed with its last reference: a thread may still read what the LRU drops."""

    fd = -1

    def __init__(self, path: str, stamp: tuple[int, int]) -> None:
        self.fd = opened_number(path)
        if _stamp_of(os.fstat(self.fd)) != stamp:
            raise InputError(f"{path} must stay as it is while it is in use. Got a changed file: open the set anew.")

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


def _opener() -> Callable[[str, tuple[int, int]], _OpenFile]:
    return functools.lru_cache(maxsize=_OPEN_TARS)(_OpenFile)


def _stamp_of(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _stamp(path: Path) -> tuple[int, int]:
    try:
        return _stamp_of(path.stat())
    except OSError as error:
        raise InputError(f"{path} cannot be read as a tar file: {error.strerror}. Check the path.") from None


def _members(path: Path, skipped: list[str]) -> Iterator[tuple[str, int, int]]:
    """Yield name, offset and size of every regular file in a tar, which is whole, or an error; note what is none."""
    try:
        with opened(path) as file:
            start = file.read(8)
            for magic, kind in _COMPRESSED.items():
                if start.startswith(magic):
                    raise InputError(
                        f"{path} is compressed with {kind}, and no item could be read without all before it. "
                        "Decompress it."
                    )
            file.seek(0)
            with opened_tar(file) as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # it keeps a kilobyte for each
                    if member.isreg():
                        yield member.name, member.offset_data, member.size
                    elif not member.isdir():
                        skipped.append(f"{member.name} (a link)" if member.islnk() or member.issym() else member.name)
                _check_end(file, tar.offset)
    except InputError:
        raise
    except TAR_ERRORS as error:
        raise InputError(f"{path} must be a whole tar file. Got: {error}. Fetch or write it again.") from None


def _check_end(file: BinaryIO, offset: int) -> None:
    """Refuse what tarfile takes for whole: a tar cut between two members, or with a damaged header."""
    file.seek(offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"no end mark at byte {offset}, after the last member that can be read")
    while chunk := file.read(1 << 20):
        if any(chunk):
            raise tarfile.ReadError(f"data after the end mark at byte {offset}, as of several tars in one file")


def _samples(path: Path, skipped: list[str]) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """Yield key, and offset and size of each field, of one sample after another; note what is in none."""
    key = ""
    fields: dict[str, tuple[int, int]] = {}
    for name, offset, size in _members(path, skipped):
        split = split_name(name)
        if split is None or META.match(name):
            skipped.append(name)
            continue
        prefix, field = split[0], split[1].lower()
        if prefix != key:
            if fields:
                yield key, fields
            key, fields = prefix, {}
        if field in fields:
            raise InputError(f"{path} has {prefix}.{field} twice. Write it anew with each field once in a sample.")
        fields[field] = offset, size
    if fields:
        yield key, fields


def _is_image(field: str) -> bool:
    return field.rpartition(".")[2] in _TAR_IMAGES


def _check_sample(path: Path, key: str, fields: Iterable[str], twice: bool) -> None:
    if twice:
        raise InputError(
            f"{path} has the key {key!r} in two places. Write the tar sorted by name, with a sample's members together."
        )
    names = list(fields)
    if sum(map(_is_image, names)) != 1 or {"image", "__key__"} & set(names):
        shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        raise InputError(
            f"A sample has one image ({', '.join(_TAR_IMAGES)}), and no other field named image. Got {path}, {key!r} "
            f"with the fields {shown}. (The key ends at the first dot of the file name.)"
        )


def _decode(field: str, data: bytes, what: str) -> Any:
    kind = field.rpartition(".")[2]
    try:
        if kind == "cls":
            return stored_integer(what, data, low=-(2**63))
        if kind == "json":
            return parse_json(data, any_value=True)
        return data.decode("utf-8") if kind == "txt" else data
    except InputError as error:
        raise InputError(f"{error} Write the tar anew.") from None
    except ValueError as error:
        expected = {"json": "JSON", "txt": "text in UTF-8"}[kind]
        raise InputError(f"{what} must be {expected}. Got: {error}. Write the tar anew.") from None


def open_dataset(spec: str, root: str | Path = "data", train: bool = True) -> Dataset[Any]:
    """Open the map-style dataset that a user names on a command line, or raise `InputError`.

    Args:
        spec: one of
            "cifar10", "cifar100": found in `root`;
            "imagefolder": (image, class) from `root`, one folder a class;
            "webdataset": `TarDataset` of `root`, a tar, a folder of tars, or a pattern as below;
            a folder: the images below it, without targets;
            a tar, or a pattern such as "train-*.tar" or "train-{0000..0009}.tar": `TarDataset`;
            "package.module:function", without arguments, that returns a map-style dataset. What it
            raises is raised. For this one alone, the working directory is put at the end of `sys.path`: a module
            of the user's own is found there, and hides none that is installed.
        root: where a dataset given by name is.
        train: the training or the test split of cifar10 and cifar100.

    >>> from pathlib import Path
    >>> from PIL import Image
    >>> from purifyloader.datasets.named import open_dataset
    >>> Path("photos").mkdir()
    >>> Image.new("RGB", (32, 32)).save("photos/a.png")
    >>> len(open_dataset("photos"))
    1
    """
    if spec in TORCHVISION:
        _check_batches(TORCHVISION[spec], as_path(root))
        try:
            return TORCHVISION[spec](str(root), train=train, download=False)
        except RuntimeError as error:
            raise InputError(
                f"There is no {spec} in {root}: {error}. Download it once with "
                f"torchvision.datasets.{TORCHVISION[spec].__name__}({str(root)!r}, download=True)."
            ) from None
    if spec == "imagefolder":
        try:
            return _in_classes(as_path(root))
        except OSError as error:
            raise InputError(f"{root} must hold one folder of images for each class. Got: {error}.") from None
    if spec == "webdataset":
        return TarDataset(_find_tars(str(root)))
    if as_path(spec).is_dir():
        return ImageFiles(as_path(spec))
    if _TAR.search(spec):
        return TarDataset(_find_tars(spec))
    module, _, function = spec.partition(":")
    if not module or not function:
        what = f"The file {spec} is no dataset" if as_path(spec).is_file() else f"There is no dataset {spec!r}"
        raise InputError(
            f"{what}. Give {', '.join(TORCHVISION)}, imagefolder, webdataset, a folder of "
            "images, .tar files (a path, or a pattern such as train-{0000..0009}.tar), or package.module:function."
        )
    dataset = find_named(module, function)()
    if isinstance(dataset, str | bytes) or not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise InputError(f"{spec!r} must return a map-style dataset. Got {type(dataset).__name__}.")
    return dataset


def _check_batches(kind: Any, root: Path) -> None:
    """Refuse what stands in the place of a file of torchvision's, which would open it."""
    names = [name for name, _ in (*kind.train_list, *kind.test_list)] + [kind.meta["filename"]]
    for path in (root / kind.base_folder / name for name in names):
        try:
            if path.exists():
                check_file(path)
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error}. Download the set again.") from None


def _in_classes(root: Path) -> datasets.ImageFolder:
    """Open a folder of class folders, and count the files that are in none, or no images."""
    # torchvision follows all links; of what it reads nothing is kept here, as that may be a million paths
    left = [path for path in all_below(root) if path.parent == root or path.suffix.lower() not in SUFFIXES]
    folders = datasets.ImageFolder(str(root), loader=read_image)
    others = sorted(path for path in left if not is_hidden(path, root))
    warn_of_others(root, others, "the images in its class folders are")
    return folders


def find_named(module: str, name: str) -> Any:
    """Import a name of a module of the user's, found in the working directory too; `InputError` if there is none."""
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, TypeError) as error:
        raise InputError(
            f"Python finds no {name!r} of a module {module!r}, here or installed: {error}. Check the name and the "
            "folder."
        ) from None


def describe(spec: str, split: str | None = None) -> str:
    """Name a dataset without a path, for results travel; with its split where that was chosen by `split`."""
    if as_path(spec).is_dir():
        return "an image folder"
    if split is not None and spec in TORCHVISION:
        return f"{spec} ({split} split)"
    return "WebDataset tars" if _TAR.search(spec) else spec


def read_image(path: str | Path) -> Image.Image:
    """Read an image file as RGB; `InputError` for one that is missing, damaged, or no image.

    >>> from PIL import Image
    >>> from purifyloader.datasets.named import read_image
    >>> Image.new("L", (32, 32)).save("a.png")
    >>> read_image("a.png").size
    (32, 32)
    """
    return _read_image(as_path(path), str(path))


def image_name(dataset: Dataset[Any], index: int, sample: Any = None) -> str | None:
    """Name an image as a user finds it: its path below the dataset's folder, or the key of its `sample` in a tar."""
    if isinstance(dataset, Subset):
        return image_name(dataset.dataset, dataset.indices[index], sample)
    if isinstance(dataset, ImageFiles):
        return dataset.files[index].relative_to(dataset.folder).as_posix()
    if isinstance(dataset, datasets.DatasetFolder):
        return Path(dataset.samples[index][0]).relative_to(dataset.root).as_posix()
    key = sample.get("__key__") if isinstance(sample, Mapping) else None
    if not isinstance(key, str):
        return None
    if isinstance(dataset, TarDataset) and len(dataset.tars) > 1:  # a key is unique in its tar only
        return f"{dataset.tar_of(index).name}:{key}"
    return key


def check_apart(dataset: Any, folder: Path) -> None:
    """Raise `InputError` for a folder to write into that an image folder would take for a class the next time."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    root = Path(dataset.root).resolve() if isinstance(dataset, datasets.DatasetFolder) else None
    if root is None or not folder.resolve().is_relative_to(root):
        return
    parts = folder.resolve().relative_to(root).parts
    if parts and parts[0] not in dataset.classes:
        raise InputError(
            f"A cache lies outside the folder of its images, where it would be taken for a class the next time. Got "
            f"{folder} below {root}: give another folder."
        )


def _find_tars(spec: str) -> list[Path]:
    path = as_path(spec)
    if path.is_dir():
        files = sorted(path.iterdir())
        # a compressed shard, unless its tar lies beside it, is left to TarDataset to refuse: not to be missed
        tars = _some([p for p in files if _TAR.search(p.name) and p.with_suffix("") not in files], spec)
        others = [p for p in files if p not in tars and not p.name.startswith(".")]
        warn_of_others(path, others, "the tars that lie right in it are")
        return tars
    if path.exists():
        return [path]
    named: list[Path] = []
    for name in _expand(spec):
        if "**" in name:  # which glob follows links in
            check_links(Path(*itertools.takewhile(lambda part: not set(part) & _MAGIC, Path(name).parts)))
        matches = sorted(glob.glob(name, recursive=True)) if _MAGIC & set(name) else [name]
        named += _some([Path(match) for match in matches], name)
    return named


def _some(tars: list[Path], spec: str) -> list[Path]:
    if not tars:
        raise InputError(f"There are no .tar files in {spec}. Check the path or pattern.")
    return tars


def _expand(pattern: str) -> list[str]:
    if "{" not in pattern:
        return [pattern]
    from webdataset.shardlists import expand_urls  # a second to import

    try:
        return list(expand_urls(pattern))
    except ValueError as error:
        raise InputError(f"{pattern!r} is no pattern such as train-{{0000..0009}}.tar: {error}.") from None
