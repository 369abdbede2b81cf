"""Weights out of files that others wrote: safetensors, and pickles without running what they hold.

A pickle is a program. torch's reader for weights (`weights_only=True`) runs none of it, and stops at anything but
tensors, numbers, strings and containers. The error names these, from the text of the pickle, which is only looked at.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path, PurePath
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from purifyloader.errors import CheckpointError, InputError
from purifyloader.files.json import read_json
from purifyloader.files.opening import UnusableFile, check_file, opened
from purifyloader.files.pickles import Implausible, check_archive, check_torch, is_archive, read_member
from purifyloader.pretrained.convert.choice import state_dict  # the name stood here before
from purifyloader.pretrained.registry import listed

__all__ = ["INDEX", "read_file", "shards_of", "state_dict"]

INDEX = ".index.json"
"""The end of the name of a file that says in which others weights are."""

_AGAIN = "Download it again."
_READ = 2**24  # bytes of a pickle, and
_LOOKED_AT = 1_000_000  # instructions of a pickle that is refused, for the names in them
_WHOLE = "a whole file of torch.save"

# Names that torch's reader takes: they are no reason for a refusal and not named as one.
_PLAIN = re.compile(
    r"collections\.OrderedDict|torch\._utils\._rebuild_\w+|torch\._tensor\._rebuild_\w+|torch\.\w*Storage|torch\.Size|"
    r"torch\.device|torch\.dtype|torch\.(?:[a-z]*\d+|float|double|half|long|int|short|bool)|"
    r"torch\.storage\.\w+|torch\.nn\.parameter\.Parameter|torch\.serialization\._get_layout"
)
_GLOBAL = re.compile(r"(?:GLOBAL|[Gg]lobal) (\w+\.[\w.]+)")


def read_file(path: Path) -> Any:
    """Read a file of weights to the CPU: for safetensors a dict of tensors, for a file of torch.save whatever it is.

    `CheckpointError` if it is empty, damaged, cut short or no file of weights, or needs more than tensors and plain
    values: then these are named, and nothing of it was run.
    """
    if not path.is_file():
        raise InputError(f"Expected a file of weights. Got {path}, {_what(path)}. Check the path.")
    if path.name.endswith(INDEX):
        return _read_shards(path)
    try:
        with opened(path) as file:
            head = file.read(64)
    except OSError as error:
        raise _error(path, "a file that can be read", str(error), "Check its rights.") from None
    if not head:
        raise _error(path, "a file of weights", "an empty file")
    if path.suffix.lower() == ".safetensors" or (head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 27):
        try:
            return load_file(path)
        except (SafetensorError, ValueError, KeyError) as error:
            got = f"{path.stat().st_size:,} bytes that are not ({error}): damaged, cut short or of another format"
            raise _error(path, "a whole safetensors file", got) from None
    if head.startswith(b"version https://git-lfs"):
        got, advice = "the note that git keeps in place of a large file", "Fetch the file itself with `git lfs pull`."
        raise _error(path, "a file of weights", got, advice)
    if head.lstrip()[:1] == b"<":
        raise _error(path, "a file of weights", "a web page")
    if head.startswith(b"PK\x03\x04"):  # as torch tells them apart
        if not zipfile.is_zipfile(path):
            raise _error(path, _WHOLE, f"{path.stat().st_size:,} bytes of an archive whose end is missing: cut short")
        _check_archive(path)
    try:
        check_torch(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of protocols that it may not know: it says so in an error, too
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickles that are no pickles raise anything
        raise _refusal(path, error) from None


def _what(path: Path) -> str:
    try:
        check_file(path)
    except UnusableFile as error:
        return f"and {error}"
    except OSError:
        pass
    return "which is no file"


def shards_of(index: Path) -> list[str]:
    """List the files that an index of shards (`*.safetensors.index.json`, `*.bin.index.json`) names, all beside it."""
    return sorted({*_weight_map(index).values()})


def _weight_map(index: Path) -> dict[str, str]:
    try:
        table = read_json(index)["weight_map"]
        if not table or not all(isinstance(file, str) and file == PurePath(file).name for file in table.values()):
            raise ValueError("its weight_map must name files beside it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _error(index, "an index of shards", f"one that cannot be read ({error})") from None
    return dict(table)


def _read_shards(index: Path) -> dict[str, Any]:
    """Read weights that are stored in several files, each where the index says that it is."""
    table = _weight_map(index)
    weights: dict[str, Any] = {}
    for file in shards_of(index):
        read = read_file(index.parent / file)
        wanted = {name for name, of in table.items() if of == file}
        if not isinstance(read, dict) or {*read} != wanted:
            other = listed(sorted({*map(str, read)} ^ wanted)) if isinstance(read, dict) else type(read).__name__
            raise _error(index, "the index of its shards", f"other weights in {file} than it says ({other})")
        weights |= read
    return weights


def _error(path: Path, wanted: str, got: str, advice: str = _AGAIN) -> CheckpointError:
    return CheckpointError(f"{path} must be {wanted}. Got {got}. {advice}")


def _check_archive(path: Path) -> None:
    """Check an archive of torch.save, every byte of it: torch itself does not look at the checksums."""
    try:
        check_archive(path)
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if any(name.endswith("/constants.pkl") for name in names):
                got = "a TorchScript archive, which holds the code of a network"
                advice = "Load it where you trust it, and save its state_dict() with torch.save."
                raise _error(path, "a file of weights", got, advice)
            if not any(name.endswith("/data.pkl") for name in names):
                advice = "Unpack it and give the file of weights."
                raise _error(path, "a file of torch.save", f"another archive, with {listed(names)}", advice)
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError) as error:
        raise _error(path, _WHOLE, f"an archive that cannot be read ({error})") from None
    if damaged is not None:
        raise _error(path, _WHOLE, f"{damaged} in it with another checksum than was stored: damaged")


def _refusal(path: Path, error: Exception) -> CheckpointError:
    names = list(_wanted(path)) or _GLOBAL.findall(str(error))
    wanted = [name for name in dict.fromkeys(names) if not _PLAIN.fullmatch(name)]
    if any(name.startswith("torch_utils.persistence.") for name in wanted):
        return CheckpointError(
            f"{path} must hold weights only. Got a pickle of EDM or StyleGAN ({listed(wanted)}), which holds the "
            "source code of its network and cannot be read without running it. It is refused, and nothing in it was "
            "run. Where you trust it, save the network's state_dict() with torch.save."
        )
    if wanted:
        return CheckpointError(
            f"{path} must hold tensors and plain values only. Got a pickle that wants {listed(wanted, 8)}. It is "
            "refused, and nothing in it was run. Where you trust it, load it yourself and save the state dict alone "
            "with torch.save."
        )
    text = " ".join(str(error).split()) or type(error).__name__
    short = isinstance(error, EOFError) or "EOF" in text or "Ran out of input" in text
    if isinstance(error, Implausible) and not short:
        return _error(path, _WHOLE, f"{path.stat().st_size:,} bytes that ask for too much: {text}")
    what = "that end too early: cut short" if short else "that torch cannot read as weights: damaged, or another format"
    return _error(path, _WHOLE, f"{path.stat().st_size:,} bytes {what}")


def _wanted(path: Path) -> Iterator[str]:
    """Yield every global that the pickles in a file name, in order, as far as they can be read. Runs nothing."""
    try:
        if is_archive(path):
            check_archive(path)
            with zipfile.ZipFile(path) as archive:
                for member in archive.infolist():
                    if member.filename.endswith(".pkl"):
                        yield from _globals(io.BytesIO(read_member(archive, member, _READ)))
            return
        with opened(path) as file:
            start = io.BytesIO(file.read(_READ))
        for _ in range(5):  # the old format is a magic number, a version, the system, the object, the keys
            yield from _globals(start)
    except (ValueError, OSError, zipfile.BadZipFile, pickle.UnpicklingError, IndexError, KeyError):
        return


def _operations(file: BinaryIO) -> Iterator[Any]:
    operations = pickletools.genops(file)
    while True:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of escapes, in texts that have none
            operation = next(operations, None)
        if operation is None:
            return
        yield operation


def _globals(file: BinaryIO) -> Iterator[str]:
    memo: dict[int, Any] = {}
    strings: list[Any] = []  # what was pushed last, strings as they are and anything else as None
    for opcode, argument, _ in islice(_operations(file), _LOOKED_AT):
        name = opcode.name
        if name in ("GLOBAL", "INST"):
            yield str(argument).replace(" ", ".", 1)
        elif name == "STACK_GLOBAL":
            module, attribute = [None, None, *strings][-2:]
            yield f"{module or '?'}.{attribute or '?'}"
        elif name == "MEMOIZE":
            memo[len(memo)] = strings[-1] if strings else None
            continue
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[int(str(argument))] = strings[-1] if strings else None
            continue
        if name in ("GET", "BINGET", "LONG_BINGET"):
            strings.append(memo.get(int(str(argument))))
        else:
            strings.append(argument if isinstance(argument, str) else None)
        del strings[:-4]
