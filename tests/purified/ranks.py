"""A process of a job, which imports little."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

from purifyloader import PurifiedLoader
from purifyloader.errors import InputError
from tests.counting import Counting, numbered


def of_a_rank() -> tuple[list[int], str]:
    """Read a loader that accelerate prepared before it was wrapped, and try one that was wrapped before."""
    accelerator = Accelerator(cpu=True)
    plain = DataLoader(TensorDataset(numbered(12), torch.arange(12)), 2)
    mine = [int(number) for _, numbers in PurifiedLoader(accelerator.prepare(plain), Counting()) for number in numbers]
    try:
        return mine, str(len(list(accelerator.prepare(PurifiedLoader(plain, Counting())))))
    except InputError as error:
        return mine, str(error)
