"""Make the CIFAR-10 sample of this folder again, byte for byte: `python examples/data/make.py cifar10.npz`.

The .npz holds CIFAR-10 as four uint8 arrays in the usual row order: x_train (50000, 32, 32, 3),
y_train (50000,), x_test (10000, 32, 32, 3), y_test (10000,).
"""

from __future__ import annotations

import argparse
import gzip
import io
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from purifyloader.core import noise
from purifyloader.files.atomic import file_sha256, replacing

SEED = 2026
CLEAN = 2000  # the first rows of the training order belong to the denoiser; the sample takes the next
SPLITS = {  # images and shards; three shards keep each file under 4 MB
    "train": (4000, 3),
    "test": (1000, 1),
}
ROWS = {"train": 50_000, "test": 10_000}


def order(split: str) -> NDArray[np.int64]:
    """All row numbers of a split in the order in which this project takes them."""
    key = noise.image_keys(SEED, list(ROWS).index(split), 0)
    return noise.uniform(key, (ROWS[split],))[0].argsort().numpy()


def sample_rows(split: str) -> NDArray[np.int64]:
    """The rows of the sample, sorted. The training ones leave out the denoiser's clean rows."""
    first = CLEAN if split == "train" else 0
    return np.sort(order(split)[first : first + SPLITS[split][0]])


def png(image_HWC: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, "PNG", optimize=True, compress_level=9)
    return buffer.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # mtime, uid and gid are 0 and the owner's name is empty
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_shard(path: Path, images_NHWC: NDArray[np.uint8], labels: NDArray[np.uint8], rows: NDArray[np.int64]) -> None:
    # gzip takes off the padding of tar, 1.8 kB an image
    with (
        replacing(path) as temporary,
        open(temporary, "wb") as file,
        gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=file, mtime=0) as stream,
        tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for row in rows:
            add(tar, f"{row:05d}.png", png(images_NHWC[row]))
            add(tar, f"{row:05d}.cls", str(int(labels[row])).encode())


def read(path: Path) -> dict[str, NDArray[np.uint8]]:
    """The four arrays, checked; SystemExit says what is wrong with them."""
    expected = {f"x_{split}": (rows, 32, 32, 3) for split, rows in ROWS.items()}
    expected |= {f"y_{split}": (rows,) for split, rows in ROWS.items()}
    if not zipfile.is_zipfile(path):  # np.load would take it for a pickle
        raise SystemExit(f"{path} must be an .npz file with {sorted(expected)}. Got no such file, or another kind.")
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in expected if name in file}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise SystemExit(f"{path} must be an .npz file with the arrays {sorted(expected)}. Got: {error}") from None
    for name, shape in expected.items():
        array = arrays.get(name)
        if array is None or array.shape != shape or array.dtype != np.uint8:
            got = "nothing" if array is None else f"{array.dtype} {array.shape}"
            raise SystemExit(f"{path}: {name} must be uint8 {shape}. Got {got}.")
    return arrays


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the CIFAR-10 sample again from the whole of CIFAR-10.")
    parser.add_argument("npz", type=Path, help="x_train, y_train, x_test, y_test: uint8, NHWC")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder (default: this one)")
    args = parser.parse_args()
    arrays = read(args.npz)
    for split, (_, shards) in SPLITS.items():
        for number, rows in enumerate(np.array_split(sample_rows(split), shards)):
            path = args.out / f"{split}-{number:06d}.tar.gz"
            write_shard(path, arrays[f"x_{split}"], arrays[f"y_{split}"], rows)
            sys.stdout.write(f"{file_sha256(path)}  {path.name}  {path.stat().st_size}\n")


if __name__ == "__main__":
    main()
