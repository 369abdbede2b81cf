"""Devices by name, checked before anything is moved to them, and arithmetic that is the same in any script or batch."""

from __future__ import annotations

import functools
import logging
import math
import os
import platform
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import get_worker_info

from purifyloader.core.checks import launcher_number
from purifyloader.errors import InputError, PurifyError

__all__ = ["Compiled", "as_device", "check_worker", "device_of", "device_of_process", "exact_arithmetic", "in_batches"]
__all__ += ["computes_bfloat16", "kind_of_device", "memory_of", "warn_of_bfloat16"]

log = logging.getLogger("purifyloader")


def as_device(device: str | torch.device) -> torch.device:
    """Return a device of this machine, with its index; `InputError` if it or this build of torch does not have it."""
    try:
        actual = torch.empty(0, device=torch.device(device)).device  # "cuda" with its index
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"Expected a device of this machine, such as 'cpu' or 'cuda'. Got {device!r}: {reason}"
        ) from None
    return actual


def device_of_process(name: str | None, rank: int) -> torch.device:
    """Return the device of one of several processes: for "cuda" and None each has a GPU of its own, while there are.

    None is a GPU where there is one, else the CPU; `rank` counts where no launcher has set LOCAL_RANK.
    """
    gpus = torch.cuda.device_count()
    if name is None:
        name = "cuda" if gpus else "cpu"
    if name == "cuda" and gpus:  # one for each process
        name = f"cuda:{launcher_number('LOCAL_RANK', rank) % gpus}"
    return as_device(name)


def device_of(module: nn.Module) -> torch.device | None:
    """Return where a module's weights are; None where it has none and works anywhere."""
    parameter = next(module.parameters(), None)
    return None if parameter is None else parameter.device


def check_worker(device: torch.device) -> None:
    """Raise `PurifyError` for a GPU in a forked DataLoader worker, where torch's own error names no way out."""
    if device.type == "cuda" and get_worker_info() is not None and torch.cuda._is_in_bad_fork():
        raise PurifyError(
            "Purifying on a GPU does not work in a forked DataLoader worker. Got a purifier on "
            f"{str(device)!r}. Either give PurifiedDataset a cache= folder, so that workers only read, or "
            'start workers with DataLoader(..., multiprocessing_context="spawn").'
        )


def memory_of(device: torch.device) -> int:
    """Return the bytes of memory that a GPU has, or that this process may have at most, whoever uses them now."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    except (AttributeError, ValueError, OSError):  # Windows
        sizes = [_MEMORY]
    for limit in _CONTAINER:
        with suppress(OSError, ValueError):  # not in a container, or "max"
            sizes.append(int(Path(limit).read_text()))
    return min(size for size in sizes if size > 0)


_MEMORY = 2**40  # where the system does not say
_CONTAINER = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def kind_of_device(device: torch.device) -> str:
    """Name a device with what changes its arithmetic, such as "cpu AVX2": two of one name round alike.

    Of a CPU these are the instructions that torch and oneDNN choose their kernels by, and limits that the environment
    sets; of a GPU its compute capability.

    >>> import torch
    >>> from purifyloader.core.devices import kind_of_device
    >>> kind_of_device(torch.device("cpu")).split()[0]
    'cpu'
    """
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"cuda sm_{major}{minor}"
    if device.type != "cpu":
        return device.type
    words = ["cpu", torch.backends.cpu.get_cpu_capability()]
    # of processors that have AVX512 some compute bfloat16 in hardware, with other roundings
    words += [word for word, has in _CPU_BFLOAT16.items() if has()]
    if not torch.backends.mkldnn.is_available():
        words.append("without oneDNN")
    limits = (os.environ.get(name) for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"))
    return " ".join([*words, *(f"up to {limit}" for limit in limits if limit)])


_CPU_BFLOAT16: dict[str, Callable[[], bool]] = {
    "AVX512_BF16": torch.cpu._is_avx512_bf16_supported,
    "AMX": torch.cpu._is_amx_tile_supported,
}


def computes_bfloat16(device: torch.device) -> bool:
    """Tell whether a device has instructions for bfloat16, as far as torch says; a CPU without them emulates it."""
    # torch says it of processors of this kind alone
    return device.type != "cpu" or platform.machine() not in _X86 or any(has() for has in _CPU_BFLOAT16.values())


_X86 = ("x86_64", "AMD64")


@functools.cache
def warn_of_bfloat16(device: torch.device) -> None:
    """Warn once of bfloat16 on a CPU that emulates it: shipped networks take 5 to 27 times as long as in float32."""
    if not computes_bfloat16(device):
        log.warning(
            "this CPU has no instructions for bfloat16 and emulates it, many times slower than float32. Leave out what "
            "asks for it: the option fast, or bfloat16 as the dtype"
        )


_Setting = tuple[Callable[[], Any], Callable[[Any], Any], Any]


def _settings() -> list[_Setting]:
    """List what a script may have set: how to read it, how to set it, and what it is while purifying."""
    b: Any = torch.backends

    def attribute(owner: Any, name: str, value: Any) -> _Setting:
        return partial(getattr, owner, name), partial(setattr, owner, name), value

    # each by itself: torch refuses to answer for all of them once a user has set one
    precise = (b.cuda.matmul, b.cudnn.conv, b.cudnn.rnn, b.mkldnn.matmul, b.mkldnn.conv)
    settings = [attribute(backend, "fp32_precision", "ieee") for backend in precise]
    settings += [attribute(b.cudnn, "benchmark", False), attribute(b.cudnn, "deterministic", True)]
    settings += [attribute(backend, "enabled", True) for backend in (b.cudnn, b.mkldnn)]
    for kernel in ("flash", "mem_efficient", "math"):  # among which attention chooses, on the CPU too
        settings.append((getattr(b.cuda, f"{kernel}_sdp_enabled"), getattr(b.cuda, f"enable_{kernel}_sdp"), True))
    return settings


class _Switches:
    """The settings of the whole process: the first of several threads sets them, and the last one puts them back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before: list[Any] = []

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._before = [get() for get, _, _ in _settings()]
            self._inside += 1
            for get, set_, value in _settings():
                if get() != value:
                    set_(value)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._put_back()

    def _put_back(self) -> None:
        for (get, set_, _), old in zip(_settings(), self._before, strict=True):
            if get() != old:
                set_(old)

    def begin_anew(self) -> None:
        """Begin in a forked process, which has none of the other threads."""
        self._lock = threading.Lock()
        if self._inside:
            self._put_back()
        self._inside = 0


_SWITCHES = _Switches()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_SWITCHES.begin_anew)


@contextmanager
def exact_arithmetic(device: torch.device) -> Iterator[None]:
    """Switch off the TF32, reduced-precision matmul, autocast and autotuned kernels that the script around has on.

    Likewise oneDNN, cuDNN and the kernels of attention are on, where the script has switched them off. These are of
    the whole process: several threads may be within at once, and the last one out puts them back. On the CPU the number
    of threads is rounded down to a power of two, as the last thread's share has another size with three; networks are
    called in one thread (`in_batches`).
    """
    threads = torch.get_num_threads()
    even = 1 << (threads.bit_length() - 1)
    with _SWITCHES:
        try:
            if device.type == "cpu" and even != threads:
                torch.set_num_threads(even)
            with torch.autocast(device.type, enabled=False):
                yield
        finally:
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)


# On the CPU torch chooses the kernel of a 1x1 convolution by the number of threads where there are fewer
# images than this (ConvParams::use_mkldnn).
_CPU_BATCH = 16

# Pixels of all the calls that run side by side, unless one call has more: each keeps its activations in memory.
_PIXELS_AT_ONCE = 1 << 22


def in_batches(function: Callable[..., Tensor], size: int, *tensors: Tensor) -> Tensor:
    """Call `function` with exactly `size` rows of all tensors at a time; the last are filled up with copies.

    So a result is independent of the rest of its batch: kernels pick their arithmetic by the size of the batch (in
    bfloat16 3 % of 8-bit levels differ between batch sizes). On the CPU `size` is at least 16, whatever is asked for.

    There, too, kernels pick their arithmetic by the number of threads (of 20 x 20 images 10 % of float32 values differ
    between 4 and 8), so each call has one thread, and several run side by side. With 2 cores 8 calls take 0.66 to 0.9
    of the time of 8 calls with both cores each, and a call alone 1.8 times as long (`examples/speed.py --threads`).
    """
    on_cpu = tensors[0].device.type == "cpu"
    if on_cpu:
        size = max(size, _CPU_BATCH)

    def call(parts: tuple[Tensor, ...]) -> Tensor:
        count = len(parts[0])
        if count < size:
            # with copies of a row, so that nothing can go wrong in the filling that does not go wrong in a row
            parts = tuple(torch.cat([part, part[-1:].expand(size - count, *part.shape[1:])]) for part in parts)
        return function(*parts)[:count]

    chunks = list(zip(*(tensor.split(size) for tensor in tensors), strict=True))
    pixels = size * math.prod(tensors[0].shape[2:])
    return torch.cat(_side_by_side(call, chunks, _PIXELS_AT_ONCE // pixels) if on_cpu else [call(c) for c in chunks])


class Compiled:
    """A function of tensors that torch compiles anew for each shape and device of its first argument.

    For a kernel for any size would be made or not by the sizes that came before. Several threads may call it. A copy,
    or another process, compiles for itself.

    Args:
        function: of the tensors, such as a module.
        constant: its weights never change and no gradients are asked for, so they are laid out for the CPU once.

    Raises `PurifyError` where torch cannot compile it.
    """

    def __init__(self, function: Callable[..., Tensor], constant: bool = False) -> None:
        self.function, self.constant = function, constant
        self._start()

    def _start(self) -> None:
        self.compiled: dict[tuple[torch.Size, torch.device], Callable[..., Tensor]] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"function": self.function, "constant": self.constant}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def __call__(self, x: Tensor, *others: Tensor) -> Tensor:
        key = (x.shape, x.device)
        if key not in self.compiled:
            with self._lock:  # torch would compile as many times as threads came first
                if key not in self.compiled:
                    self.compiled[key] = self._made(x, *others)
        return self.compiled[key](x, *others)

    def _made(self, *tensors: Tensor) -> Callable[..., Tensor]:
        function, on_cpu = self.function, tensors[0].device.type == "cpu"

        def compiled(*tensors: Tensor) -> Tensor:
            return function(*tensors)

        # torch counts by code object how often it compiles, and gives up after a few times
        compiled.__code__ = compiled.__code__.replace()
        options: dict[str, Any] = {"freezing": True} if self.constant and on_cpu else {}
        made = torch.compile(compiled, dynamic=False, fullgraph=True, options=options)
        try:
            made(*tensors)
        except Exception as error:
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            raise PurifyError(
                f"torch.compile must be able to compile the network. Got {type(error).__name__}: "
                f"{str(error).strip().splitlines()[0]}. Leave compile out; on a CPU it needs a C++ compiler."
            ) from error
        return made


T = TypeVar("T")


def _side_by_side(call: Callable[[T], Tensor], items: Sequence[T], most: int) -> list[Tensor]:
    """Call it for each item with one thread of torch's, at most `most` at a time, and as many as torch has threads."""
    threads = torch.get_num_threads()
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def begin() -> None:
        torch.set_num_threads(1)

    def alike(item: T) -> Tensor:
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):
            return call(item)

    try:
        torch.set_num_threads(1)
        if (workers := min(threads, len(items), most)) <= 1:
            return [call(item) for item in items]
        with ThreadPoolExecutor(workers, "purify", begin) as pool:
            return list(pool.map(alike, items))
    finally:
        torch.set_num_threads(threads)
