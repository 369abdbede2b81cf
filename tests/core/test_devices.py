"""The same pixels for any number of threads, and the kind of device that a cache writes down."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from purifyloader import pretrained
from purifyloader.core import devices, noise
from purifyloader.core.devices import Compiled, computes_bfloat16, exact_arithmetic, in_batches, kind_of_device
from purifyloader.diffusion.denoiser import Denoiser
from purifyloader.errors import PurifyError
from purifyloader.poisons.attacks.clean import opened
from purifyloader.poisons.attacks.surrogate import Surrogate
from purifyloader.poisons.attacks.tap import PRESETS
from purifyloader.purifiers import DenoiseOnce
from purifyloader.victims.presets import TRAININGS
from purifyloader.victims.training import train_victim
from tests.conftest import random_images, slim_denoiser, tiny_denoiser

CPU = torch.device("cpu")
COUNTS = (2, 3, 4, 6, 8, 12, 16)


@pytest.fixture(autouse=True)
def _threads_put_back() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def pixels(denoiser: Denoiser, size: int, batch: int, threads: int, dtype: str = "float32", calls: int = 1) -> Tensor:
    torch.set_num_threads(threads)
    x = torch.rand(batch * calls, 3, size, size, generator=torch.Generator().manual_seed(size))
    purifier = DenoiseOnce(denoiser, 0.1, dtype=dtype, compute_batch=batch)
    return purifier(x, noise.image_keys(0, 0, range(len(x))))


# -- threads -----------------------------------------------------------------------------------------

# Where 4, 8 or 16 threads in a call give other float32 values than one, on a CPU with AVX2.
DIFFERENT = [(10, 16, 8), (20, 16, 8), (24, 32, 16), (28, 16, 16), (32, 17, 4)]


@pytest.mark.parametrize("model", ["cifar10-sparse", "cifar10-fast"])
@pytest.mark.parametrize(("size", "batch", "threads"), DIFFERENT)
def test_threads_decide_no_value_where_they_choose_the_kernels(model, size, batch, threads):
    denoiser = pretrained.load(model)
    assert torch.equal(pixels(denoiser, size, batch, threads), pixels(denoiser, size, batch, 1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("first", range(1, 65, 8))
def test_threads_decide_no_value_of_any_size_up_to_64(first, dtype):
    for size in range(first, first + 8, 1 if dtype == "float32" or first < 25 else 3):
        batch, threads = (16, 17, 19, 32)[size % 4], COUNTS[size % len(COUNTS)]
        few = pixels(slim_denoiser(), size, batch, 1, dtype)
        assert torch.equal(pixels(slim_denoiser(), size, batch, threads, dtype), few), f"{size} px, {threads} threads"


# bfloat16 takes ten times as long where a CPU does not have it
SIZES = [*((size, "float32") for size in (*range(1, 65), 96, 131, 160, 224))]
SIZES += [(size, "bfloat16") for size in (*range(1, 33), 40, 48, 64, 96)]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["cifar10-sparse", "cifar10-fast"])
@pytest.mark.parametrize(("size", "dtype"), SIZES)
def test_threads_decide_no_value_of_a_shipped_model(model, size, dtype):
    denoiser, few = pretrained.load(model), {}
    for batch in (16, 17, 19, 32) if size <= 40 else (16,):
        for threads in (1, *COUNTS) if size <= 32 and dtype == "float32" else (1, 2, 16):
            got = pixels(denoiser, size, batch, threads, dtype, calls=2 if size <= 24 else 1)
            assert torch.equal(got, few.setdefault(batch, got)), f"compute_batch {batch}, {threads} threads"


def test_calls_run_side_by_side_each_with_one_thread():
    torch.set_num_threads(4)
    meeting = threading.Barrier(3, timeout=30)
    seen: list[tuple[str, int, bool]] = []

    def call(x: Tensor) -> Tensor:
        meeting.wait()  # three calls at once, or none
        seen.append((threading.current_thread().name, torch.get_num_threads(), torch.is_grad_enabled()))
        return 2 * x

    x = torch.rand(3 * 16 - 1, 3, 2, 2)
    with torch.no_grad():
        assert torch.equal(in_batches(call, 16, x), 2 * x)
    assert len({name for name, _, _ in seen}) == 3
    assert [rest for _, *rest in seen] == 3 * [[1, False]]
    assert torch.get_num_threads() == 4


@pytest.fixture
def compiling(monkeypatch) -> list[Any]:
    """What torch is asked to compile, which it gives back as it is."""
    asked: list[Any] = []

    def as_it_is(function, **options):
        asked.append(options["options"])
        return function

    monkeypatch.setattr(torch, "compile", as_it_is)
    return asked


def test_a_function_is_compiled_once_for_each_shape_whatever_the_threads(compiling):
    double = Compiled(lambda x, y: x + y)
    shapes = [(2, 3), (3, 3), (2, 3), (4, 1)] * 8
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda shape: double(torch.ones(shape), torch.ones(shape)), shapes))
    assert all(torch.equal(got, torch.full(shape, 2.0)) for got, shape in zip(results, shapes, strict=True))
    assert compiling == [{}] * 3


def test_a_copy_compiles_for_itself(compiling):
    network = torch.nn.Linear(2, 2)
    whole = Compiled(network, constant=True)
    whole(torch.ones(1, 2))
    for again in (copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))):
        assert not again.compiled
        assert torch.equal(again(torch.ones(1, 2)), network(torch.ones(1, 2)))
    assert compiling == [{"freezing": True}] * 3


def test_what_torch_cannot_compile_is_one_error():
    with pytest.raises(PurifyError, match=r"must be able to compile the network\. Got .*\. Leave compile out"):
        Compiled(lambda x: x * len(str(x)))(torch.ones(1))


def test_large_images_are_purified_one_call_after_the_other(monkeypatch):
    monkeypatch.setattr(devices, "_PIXELS_AT_ONCE", 2 * 16 * 8 * 8)
    torch.set_num_threads(8)
    for side, most in ((8, 2), (9, 1), (40, 1)):
        running, highest, lock = 0, 0, threading.Lock()

        def call(x: Tensor, lock: threading.Lock = lock) -> Tensor:
            nonlocal running, highest
            with lock:
                running += 1
                highest = max(highest, running)
            threading.Event().wait(0.01)
            with lock:
                running -= 1
            return x

        in_batches(call, 16, torch.rand(80, 1, side, side))
        assert highest <= most


def test_an_error_in_one_call_ends_them_all_and_puts_the_threads_back():
    torch.set_num_threads(2)
    begun = []

    def call(x: Tensor) -> Tensor:
        begun.append(float(x.flatten()[0]))
        threading.Event().wait(0.01)  # a busy machine may take that long to hear of the first error
        raise ValueError(f"call {len(begun)}")

    with pytest.raises(ValueError, match="call"):
        in_batches(call, 16, torch.arange(1600.0)[:, None, None, None])
    assert len(begun) < 50  # of 100
    assert torch.get_num_threads() == 2


def test_gradients_flow_through_calls_side_by_side():
    purifier = DenoiseOnce(slim_denoiser(), 0.1, compute_batch=16)
    keys = noise.image_keys(0, 0, range(40))
    gradients = []
    for threads in (1, 4):
        torch.set_num_threads(threads)
        x = torch.full((40, 3, 6, 6), 0.5, requires_grad=True)
        purifier.purify_with_grad(x, keys).square().sum().backward()
        gradients.append(x.grad)
    assert gradients[0].abs().max() > 0
    assert torch.allclose(*gradients)


# -- the kind of device ------------------------------------------------------------------------------


def kind_with(**environment: str) -> str:
    code = "import torch; from purifyloader.core.devices import kind_of_device; "
    code += "print(kind_of_device(torch.device('cpu')))"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_the_kind_of_a_cpu_names_its_instructions():
    assert kind_of_device(CPU).startswith(f"cpu {torch.backends.cpu.get_cpu_capability()}")


def test_limits_of_oneDNN_are_of_the_kind(monkeypatch):
    before = kind_of_device(CPU)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    assert kind_of_device(CPU) == f"{before} up to SSE41"


@pytest.mark.slow
def test_limits_of_the_environment_are_of_the_kind():
    limited = kind_with(ATEN_CPU_CAPABILITY="default", ONEDNN_MAX_CPU_ISA="SSE41")
    assert limited.startswith("cpu DEFAULT")
    assert limited.endswith("up to SSE41")


@pytest.mark.parametrize("changes", [{"has": "AVX512_BF16"}, {"has": "AMX"}, {"no": "oneDNN"}])
def test_what_rounds_otherwise_has_another_kind(monkeypatch, changes):
    before = kind_of_device(CPU)
    if "no" in changes:
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    else:
        monkeypatch.setitem(devices._CPU_BFLOAT16, changes["has"], lambda: True)
    assert kind_of_device(CPU) != before


def test_the_kind_of_a_gpu_is_its_compute_capability(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert kind_of_device(torch.device("cuda", 1)) == "cuda sm_90"


# -- bfloat16 ----------------------------------------------------------------------------------------


@pytest.fixture
def emulating(monkeypatch):
    """A CPU of PCs that has no instructions for bfloat16, and that nobody has been warned of."""
    for name in devices._CPU_BFLOAT16:
        monkeypatch.setitem(devices._CPU_BFLOAT16, name, lambda: False)
    monkeypatch.setattr(devices.platform, "machine", lambda: "x86_64")
    devices.warn_of_bfloat16.cache_clear()
    yield
    devices.warn_of_bfloat16.cache_clear()


def test_which_devices_compute_bfloat16(emulating, monkeypatch):
    assert not computes_bfloat16(CPU)
    assert computes_bfloat16(torch.device("cuda"))
    monkeypatch.setattr(devices.platform, "machine", lambda: "aarch64")  # of which torch says nothing
    assert computes_bfloat16(CPU)
    monkeypatch.setattr(devices.platform, "machine", lambda: "AMD64")
    monkeypatch.setitem(devices._CPU_BFLOAT16, "AMX", lambda: True)
    assert computes_bfloat16(CPU)


def a_purifier_in_bfloat16() -> None:
    pixels(slim_denoiser(), 2, 16, 1, "bfloat16")


def a_victim_in_bfloat16() -> None:
    images, labels = torch.zeros(4, 8, 8, 3, dtype=torch.uint8).numpy(), [0, 1, 0, 1]
    train_victim(images, labels, replace(TRAININGS["short"], epochs=1), width=4, classes=2)


def an_attack_in_bfloat16() -> None:
    images, labels = random_images(4, 8).permute(0, 2, 3, 1).numpy(), np.arange(4) % 2
    with opened((images, labels), "tap", 0, "cpu", progress=False) as clean:
        Surrogate(clean, PRESETS["cpu"], 0)


@pytest.mark.parametrize("work", [a_purifier_in_bfloat16, a_victim_in_bfloat16, an_attack_in_bfloat16])
def test_emulated_bfloat16_is_warned_of_once(work, emulating, caplog):
    work()
    work()
    (said,) = [record.getMessage() for record in caplog.records if "bfloat16" in record.getMessage()]
    assert "many times slower than float32. Leave out what asks for it" in said


def test_float32_is_not_warned_of(emulating, caplog):
    pixels(slim_denoiser(), 2, 16, 1)
    assert not caplog.records


# -- settings ----------------------------------------------------------------------------------------


def test_settings_of_the_script_come_back():
    torch._C._set_mkldnn_enabled(False)
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        with suppress(ValueError), exact_arithmetic(CPU):
            inside = torch.backends.mkldnn.enabled, torch.backends.cuda.flash_sdp_enabled()
            raise ValueError
        assert inside == (True, True)
        assert not torch.backends.mkldnn.enabled
        assert not torch.backends.cuda.flash_sdp_enabled()
    finally:
        torch._C._set_mkldnn_enabled(True)
        torch.backends.cuda.enable_flash_sdp(True)


def test_several_threads_at_once_have_the_same_pixels_and_leave_the_settings():
    purifier = DenoiseOnce(tiny_denoiser(), 0.1, compute_batch=16)
    x, keys = torch.rand(40, 3, 12, 12), noise.image_keys(0, 0, range(40))
    expected = purifier(x, keys)
    torch._C._set_mkldnn_enabled(False)
    torch.backends.mkldnn.conv.fp32_precision = "bf16"
    try:
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(lambda _: purifier(x, keys), range(24)))
        left = torch.backends.mkldnn.enabled, torch.backends.mkldnn.conv.fp32_precision
    finally:
        torch._C._set_mkldnn_enabled(True)
        torch.backends.mkldnn.conv.fp32_precision = "none"
    assert all(torch.equal(result, expected) for result in results)
    assert left == (False, "bf16")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_process_forked_meanwhile_has_the_settings_of_the_script():
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        with exact_arithmetic(CPU):
            child = os.fork()
            if child == 0:
                os._exit(torch.backends.cuda.flash_sdp_enabled())
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert not torch.backends.cuda.flash_sdp_enabled()
    finally:
        torch.backends.cuda.enable_flash_sdp(True)
