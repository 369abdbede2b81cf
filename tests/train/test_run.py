"""What all trainings share: generators, moments of the optimiser, and leftovers of killed saves."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from purifyloader.train import run as training
from purifyloader.train.denoiser.task import build_denoiser
from purifyloader.train.weights import Weights
from tests.train.tiny import SIGMA, TINY


@pytest.mark.parametrize("seed", [0, 5, -5, 2**62, -(2**63), 2**63 - 1])
def test_seeds_draw_what_torch_draws_with_them(seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        want = torch.rand(3)
    with training.seeded(seed, torch.device("cpu")):
        assert torch.equal(torch.rand(3), want)


@pytest.mark.gpu
def test_a_gpus_generator_is_seeded_and_left_where_it_was():
    device = torch.device("cuda", 0)
    torch.cuda.manual_seed(3)
    want = torch.rand(3, device=device)
    before = torch.cuda.get_rng_state(device)
    with training.seeded(3, device):
        assert torch.equal(torch.rand(3, device=device), want)
    assert torch.equal(torch.cuda.get_rng_state(device), before)


def test_moments_come_back_in_the_memory_format_of_their_parameters():
    """Fused kernels, which a GPU gets, take parameters and moments to lie alike and do not look."""
    wide = dataclasses.replace(SIGMA, network=dataclasses.replace(TINY, learned_variance=False))
    made = [
        Weights(build_denoiser(wide).train().to(memory_format=torch.channels_last), torch.optim.AdamW, 0.9)
        for _ in range(2)
    ]
    first, again = made
    for parameter in first.parameters.values():
        parameter.grad = torch.full_like(parameter, 0.1)
    first.update(1e-3)
    groups = {name: {k: v.contiguous() for k, v in group.items()} for name, group in first.groups().items()}
    again.restore(1, groups)
    strided = 0
    for name, parameter in again.parameters.items():
        state = again.optimizer.state[parameter]
        for moment in ("exp_avg", "exp_avg_sq"):
            assert state[moment].stride() == parameter.stride(), name
            assert torch.equal(state[moment], first.optimizer.state[first.parameters[name]][moment])
        strided += not parameter.is_contiguous()
    assert strided > 0
