"""Counter-based noise: known answers, an independent generator, distribution, independence."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
import torch
from scipy import stats

from purifyloader.core import noise
from purifyloader.errors import InputError

# -- an independent generator: Salmon et al. 2011, in Python integers and the C library's mathematics ----


def philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    c, k = list(counter), list(key)
    for turn in range(10):
        if turn:
            k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [p1 // 2**32 ^ c[1] ^ k[0], p1 % 2**32, p0 // 2**32 ^ c[3] ^ k[1], p0 % 2**32]
    return tuple(c)


def halves(value: int) -> tuple[int, int]:
    value %= 2**64
    return value % 2**32, value // 2**32


def word(text: str) -> int:
    return int.from_bytes(text.encode(), "big")


def python_fold(key: int, data: int) -> int:
    low, high, _, _ = philox((*halves(data), 0, word("fold")), halves(key))
    return low + 2**32 * high


def python_key(seed: int, epoch: int, index: int) -> int:
    return python_fold(python_fold(seed, epoch), index)


def python_normals(key: int, count: int, step: int) -> list[float]:
    values: list[float] = []
    for block in range(-(-count // 4)):
        u = [(w + 0.5) / 2**32 for w in philox((block, step, 0, word("norm")), halves(key))]
        for radius, angle in ((u[0], u[1]), (u[2], u[3])):
            r = math.sqrt(-2 * math.log(radius))
            values += [r * math.cos(2 * math.pi * angle), r * math.sin(2 * math.pi * angle)]
    return values[:count]


def signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


# -- the generator ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_the_known_answers_of_random123(counter, key, answer):
    assert tuple(int(w) for w in noise.philox4x32(counter, key)) == answer
    assert philox(counter, key) == answer  # so that the generator above may judge


@pytest.mark.parametrize("count", [0, 1, 16, 17, 300])  # few are computed in another way
def test_philox_against_python_integers(count):
    generator = random.Random(1)
    rows = [
        [generator.choice([0, 2**31, 2**32 - 1, generator.getrandbits(32)]) for _ in range(6)] for _ in range(count)
    ]
    columns = torch.tensor(rows, dtype=torch.int64).reshape(count, 6).T
    got = torch.stack(noise.philox4x32(columns[:4], columns[4:]), dim=1).tolist()
    assert got == [list(philox(tuple(r[:4]), tuple(r[4:]))) for r in rows]


def test_philox_broadcasts_and_counts_its_words():
    out = noise.philox4x32((torch.arange(3)[:, None], torch.arange(2), 5, 6), (7, 8))
    assert out[0].shape == (3, 2)
    assert tuple(int(w[2, 1]) for w in out) == philox((2, 1, 5, 6), (7, 8))
    with pytest.raises(InputError, match="Got 3 and 2"):
        noise.philox4x32((0, 0, 0), (0, 0))


# -- keys ------------------------------------------------------------------------------------------------

SEEDS = [0, 1, -1, 2**31, 2**32 + 1, 2**63 - 1, -(2**63), 2**63, 2**64 - 1]


@pytest.mark.parametrize("seed", SEEDS)
def test_keys_against_python_integers(seed):
    index = [0, 1, 49_999, 2**31, 2**40, -1, 2**63 - 1]
    for epoch in (0, 3, -2, 2**33):
        expected = [signed(python_key(seed, epoch, i)) for i in index]
        assert noise.image_keys(seed, epoch, index).tolist() == expected
        assert noise.image_keys(seed, epoch, torch.tensor(index)).tolist() == expected
    assert int(noise.key_from_seed(seed)) == signed(seed % 2**64)


def test_one_index_is_a_batch_of_one():
    assert torch.equal(noise.image_keys(3, 1, 7), noise.image_keys(3, 1, [7]))
    assert noise.image_keys(3, 1, []).shape == (0,)
    assert torch.equal(noise.image_keys(3, 1, np.int64(7)), noise.image_keys(3, 1, [7]))


def test_fold_in_takes_an_integer_or_a_tensor_and_minds_the_order():
    keys = noise.image_keys(0, 0, range(50))
    data = [0, 1, -1, 2**32, 2**63 - 1, -(2**63), 2**64 - 1]
    for value in data:
        child = noise.fold_in(keys, value)
        assert torch.equal(child, noise.fold_in(keys, torch.tensor(signed(value % 2**64))))
        assert child.tolist() == [signed(python_fold(k, value)) for k in keys.tolist()]
    assert not (noise.fold_in(noise.fold_in(keys, 1), 2) == noise.fold_in(noise.fold_in(keys, 2), 1)).any()


def test_children_differ_from_parents_and_siblings():
    generation = [noise.image_keys(0, 0, range(200))]
    for _ in range(3):
        generation.append(torch.cat([noise.fold_in(generation[-1], i) for i in range(5)]))
    everyone = torch.cat(generation)
    assert everyone.unique().numel() == everyone.numel() == 200 * (1 + 5 + 25 + 125)


def test_no_two_of_a_hundred_thousand_draws_share_their_noise():
    seeds, epochs, stages, steps = (0, 1, -1, 2**32), (0, 1, 2), (None, 0, 1), (0, 1, 2)
    draws = []
    for seed, epoch, stage in itertools.product(seeds, epochs, stages):
        keys = noise.image_keys(seed, epoch, range(950))
        keys = keys if stage is None else noise.fold_in(keys, stage)
        # 64 bits: by chance two of 1e5 agree once in 4e9 such tests
        draws += [noise.uniform(keys, (2,), step).numpy() for step in steps]
    table = np.concatenate(draws)
    assert len(table) == 102_600
    assert len(np.unique(table, axis=0)) == len(table)


# -- the normals -----------------------------------------------------------------------------------------

GOLDEN = {  # (seed, epoch, index, stage, step): the first five, checked against `python_normals`
    (0, 0, 0, None, 0): (-1.56735587, 1.14717484, 0.3492423, -0.329643607, -0.0582303219),
    (0, 0, 1, None, 0): (0.111751333, -0.104494922, -1.52891219, -0.470978588, 0.242982849),
    (42, 0, 0, None, 100): (0.630405188, 0.428133458, -1.19011128, 0.939850509, -0.0262528565),
    (42, 3, 49999, 2, 7): (0.826373637, -0.931101084, 0.52373457, -1.15372658, -0.921656013),
    (-1, 0, 1099511627776, 0, 4294967295): (
        0.564253986,
        -0.627382994,
        0.278206468,
        0.720019698,
        -0.892784595,
    ),
}


@pytest.mark.parametrize("case", GOLDEN, ids=str)
def test_golden_values(case):
    seed, epoch, index, stage, step = case
    keys = noise.image_keys(seed, epoch, index)
    key = python_key(seed, epoch, index)
    if stage is not None:
        keys, key = noise.fold_in(keys, stage), python_fold(key, stage)
    got = noise.normal(keys, (5,), step)[0]
    assert got.tolist() == torch.tensor(GOLDEN[case], dtype=torch.float32).tolist()
    np.testing.assert_allclose(got.numpy(), python_normals(key, 5, step), rtol=1e-7)


def test_normals_against_python():
    keys = noise.image_keys(11, 2, range(20))
    got = noise.normal(keys, (3, 5, 5), step=9)
    expected = [python_normals(python_key(11, 2, i), 75, 9) for i in range(20)]
    np.testing.assert_allclose(got.reshape(20, -1).numpy(), np.float32(expected), rtol=1.2e-7)


def test_uniforms_against_python():
    got = noise.uniform(noise.image_keys(11, 2, 5), (7,), step=3)
    key = halves(python_key(11, 2, 5))
    words = [w for block in (0, 1) for w in philox((block, 3, 0, word("unif")), key)][:7]
    assert got.dtype == torch.float64
    assert got[0].tolist() == [(w + 0.5) / 2**32 for w in words]


@pytest.mark.parametrize("draw", [noise.normal, noise.uniform])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (3, 5, 7), (3, 32, 32), (0,), (3, 0, 4)], ids=str)
@pytest.mark.parametrize("count", [0, 1, 5])
def test_shapes(draw, shape, count):
    out = draw(noise.image_keys(0, 0, range(count)), shape)
    assert out.shape == (count, *shape)
    assert out.is_contiguous()
    if draw is noise.normal:
        assert out.dtype == torch.float32


def test_a_longer_draw_begins_with_the_shorter():
    keys = noise.image_keys(0, 0, range(4))
    assert torch.equal(noise.normal(keys, (101,))[:, :7], noise.normal(keys, (7,)))


@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 5, 7)], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_an_images_noise_does_not_depend_on_its_batch(shape, threads):
    keys = noise.image_keys(5, 1, range(33))
    whole = noise.normal(keys, shape, step=2)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        order = torch.randperm(33, generator=torch.Generator().manual_seed(0))
        assert torch.equal(noise.normal(keys[order], shape, step=2), whole[order])
        for i in (0, 17, 32):
            assert torch.equal(noise.normal(keys[i : i + 1], shape, step=2), whole[i : i + 1])
        strided = torch.stack([keys, torch.zeros_like(keys)], dim=1)[:, 0]
        assert not strided.is_contiguous()
        assert torch.equal(noise.normal(strided, shape, step=2), whole)
        assert torch.equal(noise.normal(keys[::3], shape, step=2), whole[::3])
    finally:
        torch.set_num_threads(before)


def test_drawing_leaves_torchs_own_generator_alone():
    before = torch.random.get_rng_state()
    noise.normal(noise.image_keys(0, 0, range(3)), (10,))
    assert torch.equal(torch.random.get_rng_state(), before)


# -- distribution: fixed seeds, so a threshold once passed is passed for ever ------------------------------


@pytest.fixture(scope="module")
def sample() -> np.ndarray:
    """(index, step, pixel): 64 * 4 * 3072 = 786,432 normals."""
    keys = noise.image_keys(2024, 0, range(64))
    return torch.stack([noise.normal(keys, (3072,), step) for step in range(4)], dim=1).numpy().astype(np.float64)


def test_the_normals_are_normal(sample):
    z = sample.ravel()
    n = z.size
    assert stats.kstest(z[::4], "norm").pvalue > 1e-3
    # each moment within four of its own standard errors
    assert abs(z.mean()) < 4 / math.sqrt(n)
    assert abs(z.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((z**3).mean()) < 4 * math.sqrt(15 / n)
    assert abs((z**4).mean() - 3) < 4 * math.sqrt(96 / n)
    for bound in (2.0, 3.0, 4.0):
        for side in (z > bound, z < -bound):
            expected = n * stats.norm.sf(bound)
            assert abs(side.sum() - expected) < 4 * math.sqrt(expected)
    assert np.abs(z).max() < 6.77


def test_each_place_within_a_block_of_four_is_normal(sample):
    for place in range(4):
        assert stats.kstest(sample[:, 0, place::4].ravel(), "norm").pvalue > 1e-3


def test_the_uniforms_are_uniform():
    u = noise.uniform(noise.image_keys(7, 0, range(64)), (1024,)).numpy().ravel()
    assert u.min() > 0
    assert u.max() < 1
    assert stats.kstest(u, "uniform").pvalue > 1e-3


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """In standard errors of the sample correlation of independent draws, 1/sqrt(n)."""
    return abs(float(np.corrcoef(a.ravel(), b.ravel())[0, 1])) * math.sqrt(a.size)


@pytest.mark.parametrize("power", [1, 2])
def test_neighbours_are_independent(sample, power):
    z = sample**power
    keys = noise.image_keys(2024, 0, range(64))
    other = {
        "seed": noise.image_keys(2025, 0, range(64)),
        "epoch": noise.image_keys(2024, 1, range(64)),
        "stage": noise.fold_in(keys, 0),
        "swapped": noise.image_keys(0, 2024, range(64)),
    }
    scores = {name: correlation(z[:, 0], noise.normal(k, (3072,)).numpy() ** power) for name, k in other.items()}
    stage0, stage1 = (noise.normal(noise.fold_in(keys, i), (3072,)).numpy() ** power for i in (0, 1))
    scores["stages"] = correlation(stage0, stage1)
    scores["index"] = correlation(z[:-1, 0], z[1:, 0])
    scores["step"] = correlation(z[:, :-1], z[:, 1:])
    for lag in (1, 2, 3, 4, 32, 1024):
        scores[f"pixel {lag}"] = correlation(z[..., :-lag], z[..., lag:])
    for a, b in itertools.combinations(range(4), 2):
        scores[f"within a block {a}{b}"] = correlation(z[..., a::4], z[..., b::4])
    assert {name: score for name, score in scores.items() if score > 4} == {}


def test_uniform_and_normal_of_one_key_are_independent(sample):
    u = noise.uniform(noise.image_keys(2024, 0, range(64)), (3072,)).numpy()
    assert correlation(u, sample[:, 0]) < 4
    assert correlation(u, sample[:, 0] ** 2) < 4


# -- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [[1, 2], torch.zeros(2), torch.zeros(2, dtype=torch.int32), None, np.zeros(2)])
@pytest.mark.parametrize("call", [lambda k: noise.normal(k, (2,)), lambda k: noise.fold_in(k, 0)])
def test_keys_are_int64_tensors(call, keys):
    with pytest.raises(InputError, match="int64"):
        call(keys)


@pytest.mark.parametrize("step", [-1, 2**32, 1.5, 0.0, "a", None])
@pytest.mark.parametrize("draw", [noise.normal, noise.uniform])
def test_a_step_is_a_word(draw, step):
    with pytest.raises(InputError, match="step"):
        draw(noise.image_keys(0, 0, 0), (2,), step)


@pytest.mark.parametrize("value", [2**64, -(2**63) - 1, 0.5, 1.0, "a", None], ids=repr)
def test_seed_epoch_and_data_are_integers_of_64_bits(value):
    for call in (
        lambda: noise.image_keys(value, 0, 0),
        lambda: noise.image_keys(0, value, 0),
        lambda: noise.key_from_seed(value),
        lambda: noise.fold_in(noise.key_from_seed(0), value),
    ):
        with pytest.raises(InputError, match="Got"):
            call()


@pytest.mark.parametrize("data", [torch.tensor([0.5]), torch.tensor([True])], ids=str)
def test_data_in_a_tensor_is_whole_numbers(data):
    with pytest.raises(InputError, match="Got"):
        noise.fold_in(noise.key_from_seed(0), data)


@pytest.mark.parametrize("index", [0.5, [0.5], [1.0, 2.0], torch.tensor([0.5]), "a", None, [2**64], 2**63], ids=str)
def test_an_index_is_an_integer(index):
    with pytest.raises(InputError, match="index"):
        noise.image_keys(0, 0, index)


def test_a_shape_is_not_negative():
    with pytest.raises(InputError, match="shape"):
        noise.normal(noise.image_keys(0, 0, 0), (-1, 2))
