"""Inside torch.vmap and other transforms of functions: one error, or the right result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, func

from purifyloader.errors import InputError
from purifyloader.purifiers import Chain, Coin, Compensation, DenoiseOnce, Grayscale, Jpeg, Langevin, Resize, Tiles
from purifyloader.transforms import Compensate, Purify, RandomCompensate, RandomPurify, functional
from tests.conftest import slim_denoiser, tiny_energy

X, KEYS = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 2, 3])
PURIFIERS = [Jpeg(50), Grayscale(), Coin(2), Compensation(), Chain(Jpeg(50)), Resize(4, crop=4), Tiles(Jpeg(50), 4)]
PURIFIERS += [DenoiseOnce(slim_denoiser(), 0.1), Langevin(tiny_energy(), 2)]


@pytest.mark.parametrize("purifier", PURIFIERS, ids=lambda purifier: purifier.kind)
def test_a_purifier_in_vmap_says_so(purifier: Any) -> None:
    for call in (purifier, purifier.purify_with_grad):
        with pytest.raises(InputError, match=r"torch\.vmap"):
            torch.vmap(lambda x, key, call=call: call(x[None], key[None]))(X, KEYS)


BATCHED: dict[str, Callable[[Tensor], Any]] = {
    "Compensate": Compensate(),
    "Purify": Purify(Jpeg(50)),
    "RandomPurify": RandomPurify(Jpeg(50)),
    "RandomCompensate": RandomCompensate(),
    "compensate": lambda x: functional.compensate(x[None], KEYS[:1]),
    "jpeg": lambda x: functional.jpeg(x[None], 50),
    "bit_depth": lambda x: functional.bit_depth(x[None], 2),
}


@pytest.mark.parametrize("name", BATCHED)
def test_a_transform_in_vmap_says_so(name: str) -> None:
    with pytest.raises(InputError, match=r"torch\.vmap"):
        torch.vmap(BATCHED[name])(X)


def test_gradients_by_functions_are_those_of_autograd() -> None:
    purifier = DenoiseOnce(slim_denoiser(), 0.1)
    x = X.clone().requires_grad_(True)
    (expected,) = torch.autograd.grad(purifier.purify_with_grad(x, KEYS).sum(), x)
    torch.testing.assert_close(func.grad(lambda x: purifier.purify_with_grad(x, KEYS).sum())(X), expected)
    walk = Langevin(tiny_energy(), 2)
    with pytest.raises(InputError, match=r"torch\.func"):
        func.functionalize(lambda x: walk(x, KEYS))(X)


def test_an_error_outside_of_them_is_as_it_was() -> None:
    class Broken(Jpeg):
        def run(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        Broken()(X, KEYS)
