"""Targets as JSON: what is read back has the type and the value that was stored, or nothing is stored."""

from __future__ import annotations

import json
import math
import random
from collections import OrderedDict, defaultdict, namedtuple
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from purifyloader.cache.values import Unstorable, decode, encode
from purifyloader.files.atomic import canonical_json

Point = namedtuple("Point", ["x", "y"])
Level = IntEnum("Level", ["LOW", "HIGH"])


class Marked(dict):
    pass


def assert_same(got: Any, want: Any) -> None:
    """The same type and value, all the way down; NaN is NaN, and -0.0 is not 0.0."""
    assert type(got) is type(want)
    if isinstance(want, torch.Tensor):
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        assert got.reshape(-1).view(torch.uint8).equal(want.contiguous().reshape(-1).view(torch.uint8))
    elif isinstance(want, np.ndarray | np.generic):
        assert got.dtype == want.dtype.newbyteorder("=")
        assert got.shape == want.shape
        assert got.tobytes() == want.astype(got.dtype).tobytes()
    elif isinstance(want, Image.Image):
        assert (got.mode, got.size, got.tobytes()) == (want.mode, want.size, want.tobytes())
    elif isinstance(want, dict):
        assert len(got) == len(want)
        for (k, v), (a, b) in zip(got.items(), want.items(), strict=True):  # in their order
            assert_same(k, a)
            assert_same(v, b)
    elif isinstance(want, list | tuple):
        assert len(got) == len(want)
        for v, b in zip(got, want, strict=True):
            assert_same(v, b)
    elif isinstance(want, float):
        assert math.isnan(got) if math.isnan(want) else (got, math.copysign(1, got)) == (want, math.copysign(1, want))
    else:
        assert got == want


def through_json(value: Any) -> Any:
    """As a shard's header takes it: the text is canonical, and says the same when written again."""
    text = canonical_json(encode(value))
    assert canonical_json(json.loads(text)) == text
    return decode(json.loads(text))


def scene() -> Image.Image:
    return Image.fromarray(np.arange(60, dtype=np.uint8).reshape(4, 5, 3))


VALUES: dict[str, Any] = {
    "none": None,
    "booleans": [True, False],
    "integers": [0, -1, 2**31, -(2**63), 2**64, 2**200],
    "floats": [0.0, -0.0, 1.0, 0.1, 5e-324, 1.7976931348623157e308, -1 / 3],
    "floats JSON lacks": [math.nan, math.inf, -math.inf],
    "strings": ["", "a", "é", '\u0000\n"\\', "😀", "\ud800", "$tuple"],
    "bytes": [b"", b"\x00\xff", bytes(range(256))],
    "tuples": ((), (1,), ((2, 3), [4, (5,)])),
    "lists": [[], [[]], [[1], [2, [3]]]],
    "dict": {"a": 1, "b": [2.5, None]},
    "empty dict": {},
    "dict in another order": {"b": 1, "a": 2},
    "dict in a dict": {"a": {"z": 1, "y": {"x": (1, {"w": b"2"})}}},
    "dict like one of ours": {"$tuple": [1, 2]},
    "dict of many dollars": {"$a": 1, "$b": 2, "c": 3},
    "dict of a dollar among others": {"a": 1, "$float": "nan"},
    "dict of integers": {3: "c", 1: "a"},
    "dict of one integer": {0: 0},
    "dict of numbers like each other": {"1": "text", 1: "number", 2.5: "float", None: "none", b"1": "bytes"},
    "dict of tuples": {(1, "a"): {(2,): 3}, True: 4},
    "dict of numpy keys": {np.int64(3): 1, np.float32(0.5): 2},
    "dict of a dict of NaN": {"boxes": {"score": math.nan}},
    "images": [scene(), scene().convert("L"), scene().convert("LA"), scene().convert("RGBA"), scene().convert("1")],
    "other images": [scene().convert("I"), scene().convert("F"), Image.new("I;16", (3, 2), 40_000)],
    "an image of one pixel": Image.new("L", (1, 1), 7),
}
DTYPES = [
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64),
    *(torch.float16, torch.float32, torch.float64, torch.bfloat16, torch.float8_e4m3fn),
    *(torch.complex64, torch.complex128, torch.bool),
]


@pytest.mark.parametrize("name", VALUES)
def test_round_trip(name: str) -> None:
    assert_same(through_json(VALUES[name]), VALUES[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 4), (2, 3, 4)], ids=str)
def test_tensors(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randint(0, 100, shape, generator=generator).to(dtype)
    assert_same(through_json(tensor), tensor)


@pytest.mark.parametrize("code", "?bBhHiIlLqQefdFD")
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 4), (2, 3, 4)], ids=str)
def test_arrays(code: str, order: str, shape: tuple[int, ...]) -> None:
    """Big-endian arrays too, which come back as the machine's own, of the same values."""
    array = np.random.default_rng(0).integers(0, 100, shape).astype(np.dtype(code).newbyteorder(order))
    array = np.asarray(array, np.dtype(code).newbyteorder(order))
    assert_same(through_json(array), array)


@pytest.mark.parametrize("code", "?bBhHiIlLefdFD")
def test_numpy_scalars(code: str) -> None:
    value = np.dtype(code).type(1)
    assert_same(through_json(value), value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_numbers_of_tensors_that_are_no_numbers(dtype: torch.dtype) -> None:
    tensor = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-40], dtype=dtype)
    assert_same(through_json(tensor), tensor)
    array = tensor.double().numpy()
    assert_same(through_json(array), array)
    assert_same(through_json(array[0]), array[0])


def test_memory_order_does_not_matter() -> None:
    array = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    for view in (array, np.asfortranarray(array), array[::-1, ::2], array.T):
        assert_same(through_json(view), view)
        assert_same(
            through_json(torch.from_numpy(view.copy()).permute(2, 0, 1)), torch.from_numpy(view.copy()).permute(2, 0, 1)
        )
    assert encode(array) == encode(np.asfortranarray(array))
    part = torch.arange(100)[10:20:3]
    assert_same(through_json(part), part)
    assert len(canonical_json(encode(part))) < 200  # not the whole storage


def test_lazily_conjugated_tensors() -> None:
    """Torch keeps a conjugate and a negative as a flag beside the values."""
    z = torch.tensor([1 + 2j, 3 - 4j])
    assert_same(through_json(z.conj()), z.conj().resolve_conj())
    assert_same(through_json(z.conj().imag), z.conj().imag.resolve_neg())


def test_any_nesting() -> None:
    """Random values, nested in every container."""
    rng = random.Random(0)
    leaves = [v for value in VALUES.values() for v in (value if isinstance(value, list) else [value])]
    leaves += [torch.arange(3), np.float32(0.5), np.zeros((0, 2)), torch.tensor(3.0, dtype=torch.bfloat16)]

    def value(depth: int) -> Any:
        if depth == 0 or rng.random() < 0.2:
            return rng.choice(leaves)
        parts = [value(depth - 1) for _ in range(rng.randrange(4))]
        keys: list[Any] = rng.sample(["b", "a", "$x", "é", 1, 2.5, None, (1, 2), b"k"], len(parts))
        return rng.choice([lambda: parts, lambda: tuple(parts), lambda: dict(zip(keys, parts, strict=True))])()

    for _ in range(300):
        one = value(4)
        assert_same(through_json(one), one)


def test_what_is_read_may_be_written_to_and_shares_nothing() -> None:
    text = encode({"t": torch.arange(3), "a": np.arange(3), "l": [1]})
    first, second = decode(text), decode(text)
    first["t"][0], first["a"][0], first["l"][0] = 9, 9, 9
    assert_same(second, {"t": torch.arange(3), "a": np.arange(3), "l": [1]})
    source = torch.arange(3)
    kept = encode(source)
    source[0] = 9
    assert decode(kept)[0] == 0


def test_dict_order_is_the_order() -> None:
    for keys in ("abc", "cba", "bca"):
        assert list(through_json(dict.fromkeys(keys, 0))) == list(keys)
    assert list(through_json({10: 0, 9: 0, "a": 0})) == [10, 9, "a"]


def test_golden() -> None:
    """The text that stands in the files: a change of it needs another version of the format."""
    value = {"box": (1, 2.5), "id": b"\x01", "m": torch.tensor([[1, 2]], dtype=torch.int16), "n": float("nan")}
    assert canonical_json(encode(value)) == (
        '{"box":{"$tuple":[1,2.5]},"id":{"$bytes":"AQ=="},"m":{"$tensor":["int16",[1,2],"AQACAA=="]},'
        '"n":{"$float":"nan"}}'
    )
    assert canonical_json(encode({2: np.array([1], ">u2"), "$": np.float32(1)})) == (
        '{"$dict":[[2,{"$array":["uint16",[1],"AQA="]}],["$",{"$scalar":["float32","AACAPw=="]}]]}'
    )
    assert canonical_json(encode(Image.new("L", (2, 1), 255))) == '{"$image":["L",[2,1],"//8="]}'
    assert canonical_json(encode({"b": [None, True], "a": -math.inf})) == (
        '{"$dict":[["b",[null,true]],["a",{"$float":"-inf"}]]}'
    )


def quantized() -> torch.Tensor:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.rand(3), 0.1, 0, torch.quint8)


UNSTORABLE: dict[str, Any] = {
    "object": object(),
    "a function": len,
    "a class": int,
    "a set": {1, 2},
    "a frozenset": frozenset({1}),
    "a range": range(3),
    "a bytearray": bytearray(b"1"),
    "complex": 1j,
    "a path": Path("a"),
    "a named tuple": Point(1, 2),
    "an ordered dict": OrderedDict(a=1),
    "a default dict": defaultdict(int),
    "a subclass of dict": Marked(a=1),
    "an enum": Level.LOW,
    "a string of numpy": np.str_("a"),
    "an array of objects": np.array([object()]),
    "an array of strings": np.array(["a"]),
    "an array of times": np.array(["2020-01-01"], "datetime64[D]"),
    "a time": np.datetime64("2020-01-01"),
    "a long double": np.longdouble(1),
    "an array of long doubles": np.zeros(2, np.longdouble),
    "a structured array": np.zeros(2, [("a", "i4")]),
    "a masked array": np.ma.masked_array([1, 2], [True, False]),
    "a record array": np.rec.array([(1,)], dtype=[("a", "i4")]),
    "a tensor with a gradient": torch.ones(2, requires_grad=True),
    "a parameter": torch.nn.Parameter(torch.ones(2)),
    "a sparse tensor": torch.eye(2).to_sparse(),
    "a quantized tensor": quantized(),
    "a tv_tensor": tv_tensors.Mask(torch.zeros(2, 2)),
    "boxes": tv_tensors.BoundingBoxes(torch.zeros(1, 4), format="XYXY", canvas_size=(4, 4)),
    "a palette image": Image.new("P", (2, 2)),
    "a CMYK image": Image.new("CMYK", (2, 2)),
}
HOLDERS: dict[str, Any] = {
    "alone": lambda v: v,
    "in a list": lambda v: [1, [v]],
    "in a tuple": lambda v: (1, (v,)),
    "in a dict": lambda v: {"a": {"b": v}},
    "in a dict of numbers": lambda v: {1: v},
}


@pytest.mark.parametrize("name", UNSTORABLE)
@pytest.mark.parametrize("holder", HOLDERS)
def test_anything_else_is_refused_by_its_name(name: str, holder: str) -> None:
    value = UNSTORABLE[name]
    with pytest.raises(Unstorable) as caught:
        encode(HOLDERS[holder](value))
    assert str(caught.value) == f"{type(value).__module__}.{type(value).__qualname__}"


def test_keys_that_cannot_be_stored() -> None:
    for key in (frozenset({1}), Point(1, 2), Level.LOW, object()):
        with pytest.raises(Unstorable):
            encode({key: 1})


def test_an_unknown_tag_is_said() -> None:
    with pytest.raises(ValueError, match=r"\$new"):
        decode({"$new": 1})
