"""Show how far a cache is filled: one bar for all processes, or lines in the log where there is no terminal."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from tqdm.auto import tqdm

from purifyloader.cache.writer import CacheWriter
from purifyloader.files.locks import is_held, lock_path, read_note

log = logging.getLogger(__name__)

_LOG_SECONDS = 30.0  # between lines of the log


class Progress:
    """One bar over all processes, from what they leave in the folder: finished shards, and notes in locks."""

    def __init__(self, writer: CacheWriter, shown: bool, compared: Callable[[], int] = lambda: 0) -> None:
        self._writer, self._shown = writer, shown
        self._compared = compared  # how many images of shards made elsewhere this process has compared with its source
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        if self._shown:
            # before the work begins: the thread may come to it after all is done
            self._begun, self._start = time.monotonic(), self._done()
            self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._shown:
            self._thread.join()

    def _done(self) -> int:
        writer = self._writer
        names = set(os.listdir(writer.folder))
        done = writer.present(list(names))
        for shard in writer.shards:
            path = lock_path(writer.folder, shard.file)
            if path.name in names and shard.file not in names and is_held(path):
                done += min(read_note(path), shard.count)
        return done

    def _watch(self) -> None:
        length = self._writer.layout.length
        start = done = self._start
        begun = logged = self._begun
        told = 0
        notebook = "ipykernel" in sys.modules
        with tqdm(
            total=length, initial=start, unit="img", desc="purifying", disable=not (sys.stderr.isatty() or notebook)
        ) as bar:
            while True:
                stopping = self._stop.wait(0.5)
                with suppress(OSError):  # the bar is not what a run should fail of
                    done = self._done()
                bar.n = max(start, done)
                if compared := self._compared():
                    bar.set_postfix_str(f"{compared:,} compared with the source", refresh=False)
                bar.refresh()
                now = time.monotonic()
                if bar.disable and (stopping or now - logged >= _LOG_SECONDS):
                    if compared > told and now - logged >= _LOG_SECONDS:
                        log.info("%s images of other processes and runs compared with the source", f"{compared:,}")
                        logged, told = now, compared
                    if done > start:
                        rate = (done - start) / (now - begun)
                        left = f", {(length - done) / rate / 60:.1f} minutes left" if done < length else ""
                        log.info("%s of %s images, %.1f images/s%s", f"{done:,}", f"{length:,}", rate, left)
                        logged = now
                if stopping:
                    return
