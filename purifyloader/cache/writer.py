"""Write a cache shard by shard. The shards that verify are the state of an interrupted run."""

from __future__ import annotations

import io
import logging
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from purifyloader.cache import format as fmt
from purifyloader.cache import values
from purifyloader.cache.format import Layout, Shard, ShardHeader, ShardValues
from purifyloader.core.checks import as_path
from purifyloader.errors import CacheError, InputError
from purifyloader.files.atomic import Beside, beside, canonical_json, write_new, writing
from purifyloader.files.locks import KEPT, Lock, is_held, lock_path

log = logging.getLogger(__name__)

_TARGET_BYTES = 16_000_000  # a header may have 100 MB, and a reader holds those of all shards
_HASHING_THREADS = 4  # hashing lets go of the interpreter, and one core hashes slower than a disk reads
_PNG_LEVEL = 1  # measured on photographs: three times as fast as 6, and 5 % larger
_HIDDEN = re.compile(r"\.(shard-\d{5,}\.safetensors|(?:index|plan|claim)\.json)\.(?:.*\.tmp|lock)")
_IN_CREATION = 1.0  # seconds for which a claim may be half-written, on a file system without locks and hard links


@dataclass(frozen=True)
class _Good:
    """A shard's file, verified in every byte."""

    header: ShardHeader
    sha256: str
    stat: tuple[int, int, int]  # inode, size and time: unless these change, it need not be read again


class CacheWriter:
    """Fill a folder with the purified images of a dataset.

    Holds one shard at a time. Processes may share the folder, whichever shards each of them writes; whoever
    finds all of them there finishes. The first one claims the folder, before the first shard; one that writes another
    cache is refused, and never overwrites anything.

    Args:
        folder: made where it is missing; nothing but a cache may stand in it.
        config: all that decides the pixels, as JSON (else `ConfigError`).
        layout: how the dataset is cut up.
        made: kind of device and versions, noted in the shards that this writer writes.
        allow_mixed_devices: go on with shards of another kind of device.
        former: gives `config` as caches of version 2 have it, or raises `ConfigError`; by default `config`. Such a
            cache is verified, and not added to.
        version: of the cache; by default that of the one in the folder.

    Raises `CacheError` for a folder that cannot be written to, or holds other files, or a cache of another
    configuration or layout.

    >>> import numpy as np
    >>> from purifyloader.cache import CacheWriter, Layout
    >>> writer = CacheWriter("cache", {"purifier": "mine"}, Layout(length=2))
    >>> for shard in writer.pending():
    ...     writer.write(shard, np.zeros((shard.count, 32, 32, 3), np.uint8))
    ...
    >>> writer.finish()
    >>> len(writer.pending())
    0
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        config: Mapping[str, Any],
        layout: Layout,
        made: Mapping[str, Any] | None = None,
        allow_mixed_devices: bool = False,
        *,
        former: Callable[[], Mapping[str, Any]] | None = None,
        version: int | None = None,
    ) -> None:
        self.folder = as_path(folder).absolute()
        self.version = version or fmt.version_of(self.folder) or fmt.VERSION
        self.config = fmt.plain("The configuration of a cache", config)
        if self.version == fmt.FORMER and former is not None:
            self.config = fmt.by_former_rule(self.folder, former)
        self.layout = layout
        self.made = fmt.plain("What a cache was made with", made or {})
        self.shards = layout.shards
        self._good: dict[int, _Good] = {}
        self._mixed = self._device_checked = allow_mixed_devices
        self._warned = False
        self._check_folder()
        if version is None and self.version == fmt.FORMER and self.index() is None:
            raise fmt.no_more_of(self.folder, "is unfinished")
        with writing(self.folder, CacheError, KEPT):
            self.folder.mkdir(parents=True, exist_ok=True)  # now, not after the first shard was computed

    def pending(self, seen: Callable[[int], object] = lambda count: None) -> list[Shard]:
        """List the shards still to be written: missing ones, and those that do not verify.

        Reads every file; `seen` is told how many were read so far.
        """
        lacking = []
        with ThreadPoolExecutor(_HASHING_THREADS) as pool:
            for shard, good in zip(self.shards, pool.map(self._verify, self.shards), strict=True):
                if good is None:
                    lacking.append(shard)
                seen(shard.number + 1)
        return lacking

    def is_done(self, shard: Shard) -> bool:
        """Say whether the shard's file is right in every byte. Reads it, once as long as it does not change."""
        return self._verify(shard) is not None

    def check_may_make(self, shard: Shard) -> None:
        """Raise `CacheError` where a shard is lacking from a cache of the version before."""
        if self.version == fmt.FORMER:
            raise fmt.no_more_of(self.folder, f"lacks {shard.file}, or has it damaged")

    def header(self, shard: Shard) -> ShardHeader | None:
        """Read the header of a shard's file; None where it is missing or damaged. The images need not be right."""
        path, good = self.folder / shard.file, self._good.get(shard.number)
        try:
            header = good.header if good is not None and good.stat == _stat(path) else fmt.read_shard_header(path)
        except fmt.OtherVersionError:
            raise
        except (CacheError, OSError):
            return None
        self._check_same(shard.file, header)
        return replace(header, targets=None) if header.shard == shard else None

    def present(self, names: Sequence[str] | None = None) -> int:
        """Count the images in the shards whose files are there, verified or not: for progress."""
        there = set(os.listdir(self.folder) if names is None else names)
        return sum(shard.count for shard in self.shards if shard.file in there)

    def is_finished(self, plan: Mapping[str, Any] | None = None) -> bool:
        """Say whether this cache has an index, which is written once all shards verify, with `plan` if one is given."""
        index = self.index()
        if index is None or index.layout != self.layout or plan not in (None, index.plan):
            return False
        headers = []
        for shard, entry in zip(self.shards, index.shards, strict=True):
            good = self._good.get(shard.number)
            try:
                header = good.header if good is not None else fmt.read_shard_header(self.folder / shard.file)
            except CacheError:
                return False
            if header.sha256 != entry.header or (good is not None and good.sha256 != entry.sha256):
                return False
            headers.append(header)
        return index.identity == self._identity(headers) and index.image_shape == headers[0].image_shape

    def has_litter(self) -> bool:
        """Say whether there are files of killed runs, which a finished cache does not need, or a claim is damaged."""
        return (
            self._plan_path.exists()
            or self._has_damaged_claim()
            or any(_HIDDEN.fullmatch(path.name) for path in self.folder.glob(".*"))
        )

    def claim(self) -> None:
        """Claim the folder for this cache before anything is written, as every process does that fills it.

        Of processes that write different caches one succeeds, with or without locks, and what it writes stays. Raises
        `CacheError` where the folder is another cache's, or one of another kind of device, which rounds differently.
        One of the version before has no claim, and gets none: nothing is added to it.
        """
        if self.version == fmt.FORMER:
            return
        there = self._claim_there()
        if there is None:
            with writing(self.folder / fmt.CLAIM_FILE, CacheError, KEPT), self._claim_lock() as lock:
                there = self._claim_there() or self._claimed(lock)
        self._check_same(fmt.CLAIM_FILE, there)
        self.check_same_device()

    def _claim_lock(self) -> Lock:
        return Lock(self.folder, fmt.CLAIM_FILE, traceless=True)

    def _claim_there(self) -> fmt.Claim | None:
        try:
            return fmt.read_claim(self.folder)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except fmt.OtherVersionError:
            raise
        except CacheError as error:
            log.warning("%s will be made again: %s", fmt.CLAIM_FILE, error)
            return None

    def _claimed(self, lock: Lock) -> fmt.Claim:
        """Write the claim, and return the one that is there then; the caller holds its lock."""
        path = self.folder / fmt.CLAIM_FILE
        self._check_folder()
        self.check_same_device()
        first = self._first_made()
        made = self.made if first is None else first[1]
        if os.path.lexists(path):  # a damaged one, or a link that leads nowhere
            if lock.real:
                path.unlink(missing_ok=True)
            else:
                time.sleep(_IN_CREATION)
        write_new(path, fmt.claim_text(fmt.Claim(self.config, self.layout, made)))
        if (there := self._claim_there()) is None:
            raise CacheError(
                f"{path} says which cache a folder is for. Got one that is damaged, and no locks with which to make it "
                "again. Delete it while no process fills this folder."
            )
        return there

    def give_up(self) -> None:
        """Remove the claim after an error, where nothing was written yet and no other process is at work."""
        with suppress(CacheError, OSError), self._claim_lock() as lock:
            names = {path.name for path in self.folder.iterdir()}
            own = lock_path(self.folder, fmt.CLAIM_FILE).name
            at_work = any(is_held(self.folder / n) for n in names if n.endswith(".lock") and n != own)
            if not lock.real or at_work:
                return
            claim = self._claim_there()
            mine = claim is not None and (claim.config, claim.layout) == (self.config, self.layout)
            if mine and {n for n in names if not n.startswith(".")} == {fmt.CLAIM_FILE}:
                # a process that has claimed it too and is about to begin claims it again before it writes
                (self.folder / fmt.CLAIM_FILE).unlink()

    def _has_damaged_claim(self) -> bool:
        return os.path.lexists(self.folder / fmt.CLAIM_FILE) and self._claim_there() is None

    def _first_made(self) -> tuple[str, dict[str, Any]] | None:
        """Return the first file that says with what it was made, and that. Folders of before have shards, no claim."""
        if (claim := self._claim_there()) is not None:
            return fmt.CLAIM_FILE, claim.made
        for name in sorted(os.listdir(self.folder)):
            if fmt.SHARD_FILE.fullmatch(name):
                with suppress(CacheError):  # damaged, and made again
                    return name, fmt.read_shard_header(self.folder / name).made
        return None

    def check_same_device(self) -> None:
        """Raise `CacheError` where another kind of device, which rounds differently, made what is there."""
        if self._device_checked or (first := self._first_made()) is None:
            return
        name, made = first
        there, here = made.get("device"), self.made.get("device")
        if there != here:
            raise CacheError(
                f"A cache is made on one kind of device, because another rounds differently. Got {here!r} for "
                f"{self.folder}, whose {name} was made on {there!r}. Go on there, with "
                f"device={str(there).split()[0]!r}, give another folder, or allow it with allow_mixed_devices=True."
            )
        if made != self.made:
            log.warning("%s was made with other versions (there → here):\n%s", name, fmt.differences(made, self.made))
        self._device_checked = True

    @property
    def _plan_path(self) -> Path:
        return self.folder / fmt.PLAN_FILE

    def read_plan(self) -> dict[str, Any] | None:
        """Read what `write_plan` wrote for this cache; None where it is missing, damaged, or of another device."""
        try:
            plan = fmt.read_plan(self.folder)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except CacheError as error:
            log.warning("%s will be made again: %s", fmt.PLAN_FILE, error)
            return None
        same = (plan.config, plan.length) == (self.config, self.layout.length)
        return plan.found if same and (self._mixed or plan.device == self.made.get("device")) else None

    def write_plan(self, found: Mapping[str, Any]) -> None:
        """Keep findings (`Findings.to_dict`) for other processes and later runs, until the index has them."""
        device = str(self.made.get("device"))
        self.claim()
        self._check_plan_there()
        with writing(self._plan_path, CacheError, KEPT):
            kept = fmt.plain("A plan", found)
            fmt.write_plan(self.folder, fmt.Plan(self.config, self.layout.length, device, kept, self.version))

    def _check_plan_there(self) -> None:
        """Refuse to replace or remove the plan of another cache."""
        try:
            plan = fmt.read_plan(self.folder)
        except fmt.OtherVersionError:
            raise
        except (FileNotFoundError, NotADirectoryError, CacheError):  # missing or damaged
            return
        self._check_same(fmt.PLAN_FILE, plan)

    def lock(self, shard: Shard) -> Lock:
        """Lock a shard while making it, so that processes that share a folder share the work."""
        return Lock(self.folder, shard.file)

    def write(
        self,
        shard: Shard,
        images: NDArray[np.uint8] | Sequence[NDArray[np.uint8]],
        *,
        image_types: str | Sequence[str] = "numpy/uint8/3",
        sample: Mapping[str, Any] | None = None,
        targets: Sequence[Any] | None = None,
        source: NDArray[np.uint64] | None = None,
    ) -> None:
        """Write one of `shards`. It replaces what is there of it, if that is not of another cache or another source.

        Args:
            images: uint8 (H, W, C) each: all of draw 0, then all of draw 1, ...; draws x count of them.
                Of one size unless the layout's encoding is "png".
            image_types, sample, source: see `ShardValues`.
            targets: the other fields of each sample. Where one of them cannot be written as JSON none is
                stored, and the cache is read together with its source.

        Raises `InputError` for images of another type, number or shape; `CacheError` where the folder has become
        another cache's, or the shard is there and was made from another source.
        """
        if shard not in self.shards:
            raise InputError(f"write takes one of the shards that pending() gives. Got {shard}.")
        self.check_may_make(shard)
        rows = self.layout.draws * shard.count
        _check_images(shard, images, rows)
        for name, values_ in (("image_types", image_types), ("targets", targets), ("source", source)):
            if values_ is not None and not isinstance(values_, str) and len(values_) != shard.count:
                raise InputError(f"{shard.file} takes {shard.count} {name}. Got {len(values_)}.")
        content: NDArray[np.uint8] | list[bytes]
        if self.layout.encoding == "png":
            content = [encode_image(image) for image in images]
        else:
            sizes = {image.shape for image in images}
            if len(sizes) > 1:
                raise InputError(
                    f"Raw images are of one size. Got {' and '.join(map(str, sorted(sizes)))} in {shard.file}: resize "
                    'them in the recipe, or use encoding="png".'
                )
            content = images if isinstance(images, np.ndarray) else np.stack(images)
            shapes = {good.header.image_shape for good in list(self._good.values())}  # another thread may verify now
            if shapes and content.shape[1:] not in shapes:
                raise InputError(
                    f"All images of a cache with raw encoding have one size, here {shapes.pop()}. Got "
                    f'{content.shape[1:]} in {shard.file}. Resize them in the recipe, or use encoding="png".'
                )
        types = image_types if isinstance(image_types, str) or len(set(image_types)) > 1 else image_types[0]
        values_beside = ShardValues(
            image_types=types if isinstance(types, str) else tuple(types),
            sample=None if sample is None else dict(sample),
            targets=self._stored(targets),
            source=source,
            made=self.made,
        )
        path = self.folder / shard.file
        self.claim()
        with writing(path, CacheError, KEPT):
            with beside(path) as file:
                fmt.save_shard(file.temporary, shard, self.layout, self.config, content, values_beside)
                good = _read_good(file.temporary)
                file.end()
                self.put(file, shard, source, good.sha256)
            self._good[shard.number] = _Good(good.header, good.sha256, _stat(path))

    def put(self, file: Beside, shard: Shard, source: NDArray[np.uint64] | None, sha256: str) -> None:
        """Put a shard into its place, where nothing else than the same of another process may have come meanwhile."""
        while True:
            is_there = self._check_free(shard, source)
            self._unfinish(shard, sha256)
            if is_there:
                return file.replace()
            if os.path.lexists(file.path):  # damaged, or a link that leads nowhere
                file.path.unlink(missing_ok=True)
            if file.create():
                return None

    def _check_free(self, shard: Shard, source: NDArray[np.uint64] | None) -> bool:
        """Look, before a shard is put into its place, whether there is one; False for a damaged one.

        Raises `CacheError` where it is of another cache, or was made from another source than these hashes say.
        """
        self.claim()
        try:
            header = fmt.read_shard_header(self.folder / shard.file)
        except fmt.OtherVersionError:
            raise
        except CacheError:  # missing, or damaged
            return False
        self._check_same(shard.file, header)
        both = source is not None and header.source is not None and header.shard == shard
        if both and not np.array_equal(header.source, source):  # type: ignore[arg-type]
            raise CacheError(
                f"All of {self.folder} must be made from one source. Got {shard.file}, which another process has made "
                "meanwhile from other images or targets, or from the same in another order. Give all processes the "
                "same dataset: sort what it lists, and seed what it shuffles. Then precompute into another folder."
            )
        return True

    def finish(self, plan: Mapping[str, Any] | None = None, notes: Mapping[str, Any] | None = None) -> None:
        """Verify every shard and write the index, after which the cache can be read.

        Shards that this writer wrote or verified are not read again unless their files changed. Any number of processes
        may do this at once. `plan` and `notes` are JSON objects kept in the index, for what was decided over the whole
        dataset, and for people; None keeps those of a cache already finished. Raises `CacheError` for shards that are
        missing, damaged, or made from another source than the plan.
        """
        kept = None if plan is None else fmt.plain("A plan", plan)
        total = len(self.shards)
        if lacking := [shard.file for shard in self.pending()]:
            raise CacheError(
                f"A cache is finished when all its {total} shards are there. Got {total - len(lacking)} in "
                f"{self.folder}; missing or damaged: {_some(lacking)}. Write the shards that pending() gives."
            )
        whole = [self._good[shard.number] for shard in self.shards]
        devices = sorted({str(good.header.made.get("device")) for good in whole})
        if len(devices) > 1 and not self._mixed:
            raise CacheError(
                f"A cache is made on one kind of device, for another rounds differently. Got {' and '.join(devices)} "
                f"in {self.folder}. Delete the shards of one of them and go on, or allow it with "
                "allow_mixed_devices=True."
            )
        shapes = {good.header.image_shape for good in whole}
        if len(shapes) > 1:
            raise CacheError(
                f"All images of a cache have one shape. Got {' and '.join(map(str, sorted(shapes, key=str)))} in "
                f"{self.folder}. Delete the folder and precompute again from images of one size."
            )
        identity = self._identity([good.header for good in whole])
        self._check_planned(kept, identity)
        index = fmt.Index(
            identity=identity,
            layout=self.layout,
            image_shape=shapes.pop(),
            shards=tuple(
                fmt.ShardEntry(shard.file, shard.count, good.sha256, good.header.sha256)
                for shard, good in zip(self.shards, whole, strict=True)
            ),
            made=fmt.counted_makings(good.header for good in whole),
            notes=None if notes is None else fmt.plain("Notes", notes),
            plan=kept,
            version=self.version,
        )
        old = self.index()
        if old is not None:
            index = replace(
                index, plan=old.plan if plan is None else kept, notes=old.notes if notes is None else index.notes
            )
            if index == old:  # nothing to say anew, and the folder may be read-only by now
                return
            self._check_same(fmt.INDEX_FILE, old)
        self.claim()
        with writing(self.folder / fmt.INDEX_FILE, CacheError, KEPT):
            fmt.write_index(self.folder, index)

    def tidy(self, index_lock: Lock) -> None:
        """Remove the plan, which the index has by now, and hidden files of killed runs, but not another process's work.

        `index_lock` is held by the caller. Without real locks an index being written may be another's, and stays.
        """
        if self._has_damaged_claim():
            self.claim()
        if self._plan_path.exists() and self.index() is not None:
            self._check_plan_there()
            self._plan_path.unlink(missing_ok=True)
        left: dict[str, list[Path]] = {}
        for path in self.folder.glob(".*"):
            if match := _HIDDEN.fullmatch(path.name):
                left.setdefault(match[1], []).append(path)
        for path in left.pop(fmt.INDEX_FILE, []):
            if index_lock.real:
                path.unlink(missing_ok=True)
        for name, paths in left.items():
            lock = Lock(self.folder, name)
            if lock.acquire(wait=False) and lock.real:
                for path in (*paths, lock_path(self.folder, name)):
                    path.unlink(missing_ok=True)
            lock.release()

    def tidy_shard(self, shard: Shard, lock: Lock) -> None:
        """Remove what a killed run has left of one shard, while holding its lock."""
        if not lock.real:  # another process may be writing it all the same
            return
        for path in self.folder.glob(f".{shard.file}.*.tmp"):
            path.unlink(missing_ok=True)

    def _stored(self, targets: Sequence[Any] | None) -> list[Any] | None:
        """Encode targets; None where they cannot be, or would not fit into a header."""
        try:
            encoded = None if targets is None else [values.encode(target) for target in targets]
            if (size := len(canonical_json(encoded))) <= _TARGET_BYTES:
                return encoded
            reason = f"take {size / 1e6:.0f} MB a shard as JSON, more than {_TARGET_BYTES / 1e6:.0f}"
        except values.Unstorable as error:
            reason = f"hold a {error}"
        if not self._warned:
            self._warned = True
            log.warning("Targets are not stored, because they %s: the cache is read with its source", reason)
        return None

    def _check_planned(self, plan: Mapping[str, Any] | None, identity: Mapping[str, Any]) -> None:
        """Refuse a plan that says that it was made from another source."""
        where = (plan or {}).get(fmt.WHERE)
        planned = where.get("source") if isinstance(where, Mapping) else None
        if planned is not None and identity["source"] is not None and planned != identity["source"]:
            raise CacheError(
                f"All of {self.folder} must be made from one source. Got a plan or a sanitation of other images or "
                "targets than those that were purified: the dataset changed meanwhile, or another one was sanitized. "
                "Delete the folder, sanitize this dataset, and precompute again."
            )

    def _identity(self, headers: Sequence[ShardHeader]) -> dict[str, Any]:
        source = None
        if all(header.source is not None for header in headers):
            source = fmt.source_sha256(np.concatenate([h.source for h in headers if h.source is not None]))
        return {
            "format": fmt.FORMAT,
            "version": self.version,
            "config": self.config,
            "length": self.layout.length,
            "source": source,
            "devices": sorted({str(header.made.get("device")) for header in headers}),
        }

    def _unfinish(self, shard: Shard, sha256: str) -> None:
        """Remove the index when a shard is made otherwise: no reader may take the cache for whole."""
        index = self.index()
        if index is not None:
            self._check_same(fmt.INDEX_FILE, index)
        if index is None or [e.sha256 for e in index.shards[shard.number : shard.number + 1]] != [sha256]:
            (self.folder / fmt.INDEX_FILE).unlink(missing_ok=True)

    def index(self) -> fmt.Index | None:
        try:
            return fmt.read_index(self.folder)
        except (FileNotFoundError, NotADirectoryError, CacheError):
            return None

    def _check_folder(self) -> None:
        """Refuse a folder that is not ours to write into. Reads headers only."""
        if not self.folder.exists():
            return
        if not self.folder.is_dir():
            raise CacheError(f"A cache is a folder. Got the file {self.folder}. Give another path.")
        expected = {fmt.INDEX_FILE, fmt.PLAN_FILE, fmt.CLAIM_FILE, *(shard.file for shard in self.shards)}
        # Hidden files are left alone: temporary files of a killed run, and what file systems put there.
        with os.scandir(self.folder) as entries:
            is_folder = {entry.name: entry.is_dir() for entry in entries if not entry.name.startswith(".")}
        names = sorted(is_folder)
        there: fmt.Index | fmt.Claim | fmt.Plan | ShardHeader
        for name in names:
            try:
                if name == fmt.INDEX_FILE:
                    there = fmt.read_index(self.folder)
                elif name == fmt.CLAIM_FILE:
                    there = fmt.read_claim(self.folder)
                elif name == fmt.PLAN_FILE:
                    there = fmt.read_plan(self.folder)
                elif fmt.SHARD_FILE.fullmatch(name):
                    there = fmt.read_shard_header(self.folder / name)
                else:
                    continue
            except FileNotFoundError:  # another process has just taken it away
                continue
            except fmt.OtherVersionError:
                raise
            except CacheError as error:  # damaged, and made again
                if name == fmt.INDEX_FILE:
                    if not any(map(fmt.SHARD_FILE.fullmatch, names)):  # the index of something else is not ours
                        raise
                    log.warning("%s will be made again: %s", name, error)
                continue
            self._check_same(name, there)
        if strangers := [name for name in names if name not in expected or is_folder[name]]:
            raise CacheError(
                f"The folder of a cache holds nothing else. Got {self.folder} with {_some(strangers)}. "
                "Give an empty folder, or remove these files."
            )

    def _check_same(self, file: str, there: fmt.Index | fmt.Claim | fmt.Plan | ShardHeader) -> None:
        layout = replace(self.layout, length=there.length) if isinstance(there, fmt.Plan) else there.layout
        changed = fmt.differences(
            {"version": there.version, "config": there.config, **layout.to_dict()},
            {"version": self.version, "config": self.config, **self.layout.to_dict()},
        )
        if changed:
            raise CacheError(
                f"A folder holds one cache. Got {self.folder}, whose {file} was made with another "
                f"configuration (there → now):\n{changed}\nGive another folder, or delete this one."
            )

    def _verify(self, shard: Shard) -> _Good | None:
        """Read the shard's file; None unless it is there and right in every byte. `CacheError` for another cache's."""
        path = self.folder / shard.file
        good = self._good.pop(shard.number, None)
        if not path.exists():
            return None
        try:
            if good is None or good.stat != _stat(path):
                good = _read_good(path)
        except fmt.OtherVersionError:
            raise
        except (CacheError, OSError) as error:
            log.warning("%s will be made again: %s", shard.file, error)
            return None
        self._check_same(shard.file, good.header)
        if good.header.shard != shard:
            log.warning("%s will be made again: it holds the images of %s", shard.file, good.header.shard.file)
            return None
        self._good[shard.number] = good
        return good


def encode_image(image_HWC: NDArray[np.uint8]) -> bytes:
    """Write PNG with one filter and level: the same bytes for the same pixels and version of Pillow."""
    file = io.BytesIO()
    plane = image_HWC[:, :, 0] if image_HWC.shape[2] == 1 else image_HWC
    Image.fromarray(np.ascontiguousarray(plane)).save(file, "PNG", compress_level=_PNG_LEVEL)
    return file.getvalue()


def _check_images(shard: Shard, images: Any, rows: int) -> None:
    if len(images) != rows:
        raise InputError(f"{shard.file} takes {rows} images. Got {len(images)}.")
    for image in [images] if isinstance(images, np.ndarray) else images:
        good = isinstance(image, np.ndarray) and image.dtype == np.uint8 and 0 not in image.shape
        if not good or image.ndim != (4 if image is images else 3) or image.shape[-1] not in (1, 2, 3, 4):
            got = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
            raise InputError(
                f"A cache takes uint8 arrays (H, W, C) of 1 to 4 channels. Got {got} for {shard.file}. "
                "Quantise floats with purifyloader.core.images before writing them."
            )


def _read_good(path: Path) -> _Good:
    """Read a shard's file as a whole and check it; `CacheError` where it is damaged."""
    before = _stat(path)
    header = fmt.read_shard_header(path)
    tensor, whole = fmt.shard_hashes(path, header.offset)
    if tensor != header.tensor_sha256:
        raise CacheError(f"The images of {path} must have the SHA-256 in its header. Got another: they are damaged.")
    # targets may be masks: of all shards together they would grow with the dataset
    return _Good(replace(header, targets=None), whole, before)


def _stat(path: Path) -> tuple[int, int, int]:
    stat = os.stat(path)
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _some(files: Sequence[str], limit: int = 4) -> str:
    more = f" and {len(files) - limit} more" if len(files) > limit else ""
    return ", ".join(files[:limit]) + more
