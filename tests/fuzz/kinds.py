"""The kinds of files that others make: valid ones, how they are changed, and all that opens them."""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import io
import json
import pickle
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save as safetensors_bytes

from purifyloader import PurifiedDataset, poisons, precompute, pretrained, recipes
from purifyloader.bench import report
from purifyloader.cache import CacheReader, inspect
from purifyloader.cache.tars import export_tars, import_tars
from purifyloader.certify.votes import VoteFolder
from purifyloader.commands.training import fields_of
from purifyloader.datasets.named import TarDataset, open_dataset
from purifyloader.datasets.select import read_indices
from purifyloader.datasets.splits import load_sample
from purifyloader.energy import EnergyConfig, EnergyNetwork
from purifyloader.errors import PurifyError
from purifyloader.files.atomic import canonical_json
from purifyloader.pretrained.checkpoint import summary
from purifyloader.pretrained.convert import convert
from purifyloader.pretrained.convert.energy import NAMES
from purifyloader.pretrained.learned import learned_from
from purifyloader.pretrained.plausibility import dead_leaves
from purifyloader.purified.sanitation import Sanitation
from purifyloader.purifiers import EnergyAbove, Jpeg, Where
from purifyloader.recipes.models import from_file
from purifyloader.results import rows
from purifyloader.train import recipe, train_denoiser
from purifyloader.train.denoiser.config import TrainConfig
from purifyloader.train.energy import EnergyTrainConfig, train_energy
from purifyloader.train.state import STATE_FILE
from tests.conftest import plain_denoiser, slim_denoiser, tiny_energy
from tests.fuzz import mutations
from tests.fuzz.guard import BrokenLimit, ran_out_of_memory
from tests.fuzz.mutations import Draw, bytes_changed, json_changed, text_of
from tests.train.tiny import IMAGES, PAIRED, SIGMA

Files = dict[str, bytes]


@contextlib.contextmanager
def accepted() -> Iterator[None]:
    """Let an error of the library's pass, which is one that a file may end in: the rest is still opened."""
    try:
        yield
    except (PurifyError, FileNotFoundError) as error:
        if ran_out_of_memory(error):
            raise BrokenLimit(f"memory: {error.__context__!r:.150} {error}") from error


class Kind(NamedTuple):
    """A kind of files: variants of valid ones, a change to one of them, and what opens them."""

    made: Callable[[], list[Files]]
    changed: Callable[[Files, Draw], Files]
    opened: Callable[[Path], object]


def _folder(make: Callable[[Path], object], keep: str = "") -> Files:
    """Return the files that `make` puts below a folder, or below its subfolder `keep`."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        make(root)
        top = root / keep
        files = {str(path.relative_to(top)): path.read_bytes() for path in sorted(top.rglob("*")) if path.is_file()}
        return {name: data for name, data in files.items() if not Path(name).name.startswith(".")}


def _pictures(count: int, side: int = 6) -> list[Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)
    return [Image.fromarray(image) for image in pixels]


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def _one_file(change: Callable[[bytes, Draw], bytes]) -> Callable[[Files, Draw], Files]:
    """Change one of the files, by `change` or byte by byte."""

    def changed(files: Files, draw: Draw) -> Files:
        name = draw.choice(sorted(files))
        return {**files, name: change(files[name], draw) if draw.number(3) else bytes_changed(files[name], draw)}

    return changed


# caches


def _guarded(values: Any) -> Any:
    if not isinstance(values, dict):
        return values
    rest = {key: value for key, value in values.items() if key != "sha256"}
    try:
        return {**rest, "sha256": hashlib.sha256(text_of(rest).encode()).hexdigest()}
    except (ValueError, RecursionError):
        return values


def _with_fingerprint(values: Any, of: str) -> Any:
    if isinstance(values, dict) and "fingerprint" in values and of in values:
        try:
            return {**values, "fingerprint": hashlib.sha256(text_of(values[of]).encode()).hexdigest()}
        except (ValueError, RecursionError):
            pass
    return values


@functools.cache
def _caches() -> list[Files]:
    pictures = _pictures(5)
    several = [
        (
            {"image": image.resize((4 + i, 6)), "label": i, "box": (1.5, [i, "x"], np.float32(2), torch.ones(2))},
            {"n": i},
        )
        for i, image in enumerate(pictures)
    ]
    dicts = [sample for sample, _ in several]
    plain = [(image, label) for label, image in enumerate(pictures)]
    chosen = Where(EnergyAbove(tiny_energy(), k=0.5), Jpeg(50))
    sanitation = Sanitation(5, suspects=(1, 3), labels={0: 4})
    made = [
        _folder(lambda at: precompute(plain, Jpeg(50), at, shard_size=3, progress=False)),
        _folder(lambda at: precompute(dicts, Jpeg(50), at, shard_size=4, draws=2, image_key="image", progress=False)),
        _folder(lambda at: precompute(plain, chosen, at, sanitation=sanitation, shard_size=3, progress=False)),
        _folder(lambda at: precompute(pictures, Jpeg(50), at, progress=False)),
    ]
    return [*made, {name: data for name, data in made[0].items() if name != "index.json"}]


def _shard_changed(data: bytes, change: Callable[[Any], Any]) -> tuple[bytes, Any]:
    header, body = mutations.safetensors_parts(data)
    values = json.loads(header["__metadata__"]["purifyloader"])
    values = _guarded(_with_fingerprint(change(values), "config"))
    header["__metadata__"]["purifyloader"] = text_of(values)
    return mutations.safetensors_whole(header, body), values


def _is_shard(name: str) -> bool:
    return name.startswith("shard-")


def _cache_changed(files: Files, draw: Draw) -> Files:
    files = dict(files)
    name = draw.choice(sorted(files))
    match draw.number(6):
        case 0:
            files[name] = bytes_changed(files[name], draw)
        case 1 if _is_shard(name):
            files[name] = mutations.safetensors_changed(files[name], draw)
        case 2 | 3 if _is_shard(name):
            files[name], _ = _shard_changed(files[name], lambda values: json_changed(values, draw))
        case 4:  # the same change in all files that say it
            key = draw.choice(["layout", "config", "version", "made", "image_types", "sample", "source", "targets"])
            new: list[Any] = []
            for each in sorted(files):
                if _is_shard(each):
                    files[each], _ = _shard_changed(files[each], lambda values: _replaced(values, key, new, draw))
            for each in ("index.json", "claim.json", "plan.json"):
                if each in files:
                    values = json.loads(files[each])
                    if key == "config" and "identity" in values:
                        values["identity"] = _replaced(values["identity"], key, new, draw)
                    files[each] = text_of(_guarded(_replaced(values, key, new, draw))).encode() + b"\n"
        case _ if not _is_shard(name):
            values = _with_fingerprint(json_changed(json.loads(files[name]), draw), "identity")
            files[name] = text_of(_guarded(values)).encode() + b"\n"
        case _:
            files[name], _ = _shard_changed(files[name], lambda values: json_changed(values, draw, 2))
    return _indexed(files) if draw.number(4) else files


def _replaced(values: Any, key: str, new: list[Any], draw: Draw) -> Any:
    if key in values:
        if not new:
            new.append(json_changed(values[key], draw, 3))
        return {**values, key: new[0]}
    return values


def _indexed(files: Files) -> Files:
    """Make the index name the headers and hashes of the shards as they are."""
    try:
        index = json.loads(files["index.json"])
        for entry in index["shards"]:
            data = files[entry["file"]]
            header, _ = mutations.safetensors_parts(data)
            entry["header"] = json.loads(header["__metadata__"]["purifyloader"])["sha256"]
            entry["sha256"] = hashlib.sha256(data).hexdigest()
        return {**files, "index.json": text_of(_guarded(_with_fingerprint(index, "identity"))).encode() + b"\n"}
    except (KeyError, TypeError, ValueError, RecursionError):
        return files


def _cache_opened(folder: Path) -> None:
    for opened in (_described, _verified, _read, _read_into_memory, _wrapped, _gone_on_with):
        with accepted():
            opened(folder)


def _described(folder: Path) -> None:
    values = inspect.describe(folder)
    inspect.in_words(values, lambda sanitation: Sanitation.from_dict(sanitation).in_words())
    text_of(values)


def _verified(folder: Path) -> None:
    inspect.verify(inspect.read_folder(folder)).in_words(1.0)


def _read(folder: Path) -> None:
    reader = CacheReader(folder)
    for index in range(min(len(reader), 10)):
        with accepted():
            _ = reader[index]
    with accepted():
        reader.batch(range(min(len(reader), 4)))
    with accepted():
        reader.verify()
    reader.image_types(), reader.source_hashes(), reader.sample
    if reader.targets is not None:
        for index in range(min(len(reader.targets), 10)):
            with accepted():
                _ = reader.targets[index]


def _read_into_memory(folder: Path) -> None:
    reader = CacheReader(folder, in_memory=True)
    _ = reader[0]


def _wrapped(folder: Path) -> None:
    samples = [(image, label) for label, image in enumerate(_pictures(5))]
    for make in (PurifiedDataset.from_cache, lambda at: PurifiedDataset(samples, Jpeg(50), cache=at)):
        with accepted():
            dataset = make(folder)
            for used in (_one, _several, _all_targets):
                with accepted():
                    used(dataset)


def _one(dataset: PurifiedDataset) -> None:
    _ = dataset[0]


def _several(dataset: PurifiedDataset) -> None:
    dataset.__getitems__([0, len(dataset) - 1])


def _all_targets(dataset: PurifiedDataset) -> None:
    for name in ("targets", "classes", "class_to_idx"):
        list(getattr(dataset, name, None) or ())


def _gone_on_with(folder: Path) -> None:
    """Precompute into the folder: what is not of this cache is refused, and what is damaged is made again."""
    samples = [(image, label) for label, image in enumerate(_pictures(5))]
    precompute(samples, Jpeg(50), folder, shard_size=3, progress=False)


# exports of caches, tars and images


@functools.cache
def _exports() -> list[Files]:
    plain = [(image, label) for label, image in enumerate(_pictures(4))]
    dicts = [{"image": image, "box": [1.5, {"a": None}]} for image in _pictures(3)]

    def make(samples: list[Any], key: Any) -> Callable[[Path], object]:
        def made(at: Path) -> None:
            reader = precompute(samples, Jpeg(50), at / "cache", shard_size=2, image_key=key, progress=False)
            export_tars(reader, at / "tars", images_per_tar=3)

        return made

    return [_folder(make(plain, None), "tars"), _folder(make(dicts, "image"), "tars")]


def _export_changed(files: Files, draw: Draw) -> Files:
    files = dict(files)
    name = draw.choice(sorted(files))
    manifest = json.loads(files["cache.json"])
    if name != "cache.json":
        change = draw.choice([bytes_changed, mutations.tar_changed, mutations.tar_changed, _member_changed])
        files[name] = change(files[name], draw)
        for tar in manifest["tars"]:
            tar["sha256"] = hashlib.sha256(files[tar["file"]]).hexdigest()
    else:
        manifest = json_changed(manifest, draw)
        if isinstance(manifest, dict) and "index" in manifest:
            manifest["index"] = _guarded(_with_fingerprint(manifest["index"], "identity"))
    files["cache.json"] = text_of(_guarded(manifest)).encode() + b"\n"
    return files


def _member_changed(data: bytes, draw: Draw) -> bytes:
    """Change the content of a member of a tar, or its name."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    number = draw.number(len(members))
    name, content = members[number]
    if name.endswith(".png"):
        content = mutations.png_changed(content, draw)
    elif name.endswith(".json"):
        content = mutations.json_text_changed(content, draw)
    else:
        content = draw.choice([b"", b"-1", b"1" * 5000, b"nan", b"\xff", b"1e9", bytes_changed(content, draw)])
    members[number] = draw.choice([name, name, name, members[0][0], "../x.png", name.upper()]), content
    return tar_of(members)


def tar_of(members: list[tuple[str, bytes]]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def _export_opened(folder: Path) -> None:
    import_tars(folder, folder / "out")


@functools.cache
def _tars() -> list[Files]:
    members = []
    for i, image in enumerate(_pictures(3)):
        members += [(f"{i:04d}.png", _png(image)), (f"{i:04d}.cls", b"%d" % i), (f"{i:04d}.json", b'{"a": [1, 2.5]}')]
    return [{"a.tar": tar_of(members)}]


def _tar_changed(files: Files, draw: Draw) -> Files:
    change = draw.choice([bytes_changed, mutations.tar_changed, _member_changed])
    return {"a.tar": change(files["a.tar"], draw)}


def _tar_opened(folder: Path) -> None:
    dataset = TarDataset([folder / "a.tar"])
    for index in range(min(len(dataset), 10)):
        with accepted():
            _ = dataset[index]


@functools.cache
def _samples() -> list[Files]:
    pictures = enumerate(_pictures(3))
    members = [pair for i, image in pictures for pair in ((f"{i:04d}.png", _png(image)), (f"{i:04d}.cls", b"%d" % i))]
    return [{f"train-000000.tar{end}": _packed(tar_of(members), end) for end in ends} for ends in ((".gz",), ("",))]


def _packed(data: bytes, end: str) -> bytes:
    return gzip.compress(data, mtime=0) if end else data


def _sample_changed(files: Files, draw: Draw) -> Files:
    ((name, data),) = files.items()
    end = ".gz" if name.endswith(".gz") else ""
    if draw.number(5) == 0:
        return {name: bytes_changed(data, draw)}
    change = draw.choice([bytes_changed, mutations.tar_changed, _member_changed])
    return {name: _packed(change(gzip.decompress(data) if end else data, draw), end)}


@functools.cache
def _images() -> list[Files]:
    files: Files = {}
    for image, suffix in zip(_pictures(7), ("png", "jpg", "bmp", "ppm", "tif", "webp", "gif"), strict=True):
        stream = io.BytesIO()
        image.save(stream, {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper()))
        files["gif.png" if suffix == "gif" else f"a.{suffix}"] = stream.getvalue()
    return [{name: data} for name, data in files.items()]


def _image_changed(files: Files, draw: Draw) -> Files:
    ((name, data),) = files.items()
    is_png = name.endswith(".png") and draw.number(3)
    return {name: mutations.png_changed(data, draw) if is_png else bytes_changed(data, draw)}


def _images_opened(folder: Path) -> None:
    _ = open_dataset(str(folder))[0]  # type: ignore[index]


# poisons

_CLEAN = np.random.default_rng(1).integers(60, 190, (8, 8, 8, 3), np.uint8), np.arange(8) % 4
_MOVED = (_CLEAN[0] + np.random.default_rng(2).integers(-8, 9, _CLEAN[0].shape)).astype(np.uint8)
_DELTA = torch.from_numpy((_MOVED.astype(np.float32) - _CLEAN[0]) / 255).permute(0, 3, 1, 2).contiguous()


@functools.cache
def _poisons() -> list[Files]:
    pairs = [(Image.fromarray(image), 3) for image in _MOVED[:3]]

    def saved(value: Any, name: str, zipped: bool = True) -> Files:
        stream = io.BytesIO()
        torch.save(value, stream, _use_new_zipfile_serialization=zipped)
        return {name: stream.getvalue()}

    bound = poisons.Bound("linf", 8 / 255)
    door = {"target_class": 1, "true_labels": _CLEAN[1][::-1].copy()}

    def own(at: Path) -> None:
        trigger = poisons.triggers.Patch(_MOVED[0, :2, :3], (1, 2))
        poisons.write(
            poisons.Poisoned.of(_MOVED, _CLEAN[1], "em", np.arange(8), bound=bound, trigger=trigger, **door), at / "own"
        )

    def own_file(at: Path) -> None:
        trigger = poisons.triggers.Warp(np.ones((2, 2, 2), np.float32), jitter=0.5)
        made = poisons.Poisoned.of(_MOVED, _CLEAN[1], "em", np.arange(8), bound=bound, trigger=trigger, **door)
        poisons.write(made, at / "own.npz")

    def array(at: Path) -> None:
        np.save(at / "delta.npy", _DELTA.numpy())

    def arrays(at: Path) -> None:
        np.savez(at / "set.npz", images=_MOVED, labels=_CLEAN[1])

    def ntga(at: Path) -> None:
        np.save(at / "x_train.npy", _MOVED.astype(np.float32) / 255)
        np.save(at / "y_train.npy", np.eye(4, dtype=np.float32)[_CLEAN[1]])

    benchmark = {
        "poisons.pickle": pickle.dumps(pairs),
        "base_indices.pickle": pickle.dumps([1, 2, 3]),
        "target.pickle": pickle.dumps((Image.fromarray(_MOVED[0]), 1)),
    }
    normalised = [(torch.from_numpy(image.transpose(2, 0, 1)).float() / 255, 3) for image in _MOVED[:3]]
    return [
        *(_folder(make) for make in (own, own_file, array, arrays)),
        benchmark,
        *(saved((pairs, np.array([1, 2, 3]), 3), "0.pth", zipped) for zipped in (True, False)),
        *(saved(_DELTA, "delta.pt", zipped) for zipped in (True, False)),
        saved({"poison": normalised, "idx": [1, 2, 3]}, "poison_0.pth"),
        saved([torch.full((3, 3, 3), 0.1)] * 4, "coefficients.pt"),
        {"int8.pkl": pickle.dumps((_DELTA * 255).round().to(torch.int8).numpy())},
        {"bytes.pkl": pickle.dumps([(image.tobytes(), 3) for image in _MOVED])},
        {"delta.safetensors": safetensors_bytes({"delta": _DELTA})},  # which is no poison, and looks like one
        _folder(ntga),
    ]


def _poison_changed(files: Files, draw: Draw) -> Files:
    name = draw.choice(sorted(files))
    data = files[name]
    change = bytes_changed
    if data.startswith(b"PK") and draw.number(3):
        change = mutations.zip_changed
    elif name.endswith(".safetensors") and draw.number(3):
        change = mutations.safetensors_changed
    elif name.endswith(".json") and draw.number(3):
        change = mutations.json_text_changed
    elif name.endswith(".png"):
        change = mutations.png_changed
    elif name.endswith(".csv") and draw.number(2):
        row = draw.choice([b"0,1", b"x.png,-1,0", b"../x.png,0,1", b"0.png,9" + b"9" * 5000 + b",1", b"\xff,\xff,\xff"])
        return {**files, name: data + row + b"\n"}
    elif name.endswith(".npy") and draw.number(2):
        shape = draw.choice([b"(1000000000000,)", b"(-1,)", b"()", b"(2**99,)", b"(8, 8)", b"'x'"])
        return {**files, name: data[:10] + data[10:128].replace(b"(8, 3, 8, 8)", shape)[:118] + data[128:]}
    return {**files, name: change(data, draw)}


def _poison_opened(folder: Path) -> None:
    paths = sorted(folder.iterdir())
    path = paths[0] if len(paths) == 1 else folder
    with accepted():
        poisons.read(path, clean=_CLEAN)
    with accepted():
        poisons.read(path)


# models


@functools.cache
def _models() -> list[Files]:
    details = {"image_hashes": "0" * 16, "indices": [1, 2], "train": TrainConfig().to_dict()}
    return [
        _folder(lambda at: pretrained.save(slim_denoiser(), at, name="a", details=details)),
        _folder(lambda at: pretrained.save(tiny_energy(), at, name="b")),
        _folder(lambda at: pretrained.save(plain_denoiser(), at, name="c")),
    ]


def _model_changed(files: Files, draw: Draw) -> Files:
    config, weights = json.loads(files["config.json"]), files["model.safetensors"]
    what = draw.number(5)
    if what == 0:
        weights = bytes_changed(weights, draw)
    elif what == 1:
        weights = mutations.safetensors_changed(weights, draw)
    else:
        config = json_changed(config, draw, 3)
        if what > 2 and isinstance(config, dict):  # the description that the weights hold, too
            header, body = mutations.safetensors_parts(weights)
            told = json.loads(header["__metadata__"]["purifyloader"])
            header["__metadata__"]["purifyloader"] = text_of({**told, **{k: config[k] for k in told if k in config}})
            weights = mutations.safetensors_whole(header, body)
    if isinstance(config, dict) and draw.number(5):
        config["model_sha256"] = hashlib.sha256(weights).hexdigest()
    text = text_of(config).encode()
    return {
        **files,
        "config.json": text if draw.number(8) else bytes_changed(text, draw),
        "model.safetensors": weights,
    }


def _model_opened(folder: Path) -> None:
    for kind in ("denoiser", "energy"):
        with accepted():
            pretrained.load(folder, kind)
    with accepted():
        summary(folder)
    with accepted():
        learned_from(folder)
    with accepted():
        read_indices(folder / "config.json")
    with accepted():
        TrainConfig.from_dict(fields_of(folder / "config.json"))


@functools.cache
def _foreign() -> list[Files]:
    network = EnergyNetwork(EnergyConfig(channels=4))
    own = network.state_dict()
    weights = {name: own[ours] for name, ours in NAMES.items()}
    files: list[Files] = []
    for zipped in (True, False):
        stream = io.BytesIO()
        torch.save({"state_dict": weights, "step": 3}, stream, _use_new_zipfile_serialization=zipped)
        files.append({"energy.pth": stream.getvalue()})
    files.append({"config.json": b'{"nf": 4, "patch_size": 1}', "model.safetensors": safetensors_bytes(weights)})
    return files


def _foreign_changed(files: Files, draw: Draw) -> Files:
    name = draw.choice(sorted(files))
    data = files[name]
    change = bytes_changed
    if draw.number(3):
        change = mutations.zip_changed if data.startswith(b"PK") else bytes_changed
        change = mutations.json_text_changed if name.endswith(".json") else change
        change = mutations.safetensors_changed if name.endswith(".safetensors") else change
    return {**files, name: change(data, draw)}


def _foreign_opened(folder: Path) -> None:
    source = folder / "energy.pth" if (folder / "energy.pth").exists() else folder
    convert(source, folder / "out", "puregen-energy")


_GOLDEN = Path(__file__).parents[1] / "golden" / "convert"
_OPENAI: dict[str, Any] = {"schedule": "linear", "timesteps": 100, "rescale_timesteps": False, "norm_groups": 2}
_FOREIGN: dict[str, dict[str, Any]] = {
    "improved.pt": {
        "format": "improved-diffusion",
        "settings": {**_OPENAI, "qkv_order": "heads-first", "heads": 2},
    },
    "guided.pt": {
        "format": "guided-diffusion",
        "settings": {**_OPENAI, "qkv_order": "channels-first", "head_channels": 2},
    },
    "score_sde.pth": {
        "format": "score-sde",
        "preset": "score-sde-ddpmpp-cifar10",
        "settings": {"norm_groups": 2},
    },
    "diffusion_pytorch_model.safetensors": {"format": "diffusers"},
}


@functools.cache
def _foreign_networks() -> list[Files]:
    files = [{name: (_GOLDEN / name).read_bytes()} for name in ("improved.pt", "guided.pt", "score_sde.pth")]
    return [*files, {path.name: path.read_bytes() for path in (_GOLDEN / "diffusers").iterdir()}]


def _foreign_network_changed(files: Files, draw: Draw) -> Files:
    name = draw.choice(sorted(files))
    data = files[name]
    if name.endswith(".json"):
        return {**files, name: (mutations.json_text_changed if draw.number(4) else bytes_changed)(data, draw)}
    if name.endswith(".safetensors"):
        return {**files, name: (mutations.safetensors_changed if draw.number(4) else bytes_changed)(data, draw)}
    match draw.number(4):
        case 0:
            return {**files, name: bytes_changed(data, draw)}
        case 1:
            return {**files, name: mutations.zip_changed(data, draw, "data.pkl")}
    read = torch.load(io.BytesIO(data), weights_only=True)
    _tensors_changed(read["ema"]["shadow_params"] if "ema" in read and draw.number(4) else read, draw)
    stream = io.BytesIO()
    torch.save(read, stream)
    return {**files, name: stream.getvalue()}


def _tensors_changed(values: Any, draw: Draw) -> None:
    """Change one of the tensors in a dict or a list, or put something else in its place."""
    key = draw.choice(list(values) if isinstance(values, dict) else range(len(values)))
    tensor = values[key] if isinstance(values[key], torch.Tensor) else torch.ones(2)
    changes: list[Callable[[], Any]] = [
        *(
            tensor.flatten,
            lambda: tensor[:0],
            lambda: tensor[None],
            lambda: tensor.T if tensor.ndim == 2 else tensor[0],
        ),
        *(tensor.double, tensor.half, tensor.long, tensor.bool, lambda: tensor * float("nan")),
        *(lambda: torch.cat([tensor, tensor]), lambda: tensor.repeat_interleave(2, -1), lambda: torch.tensor(1.0)),
        *(lambda: tensor.flatten()[:1].expand(10**4, 10**4), lambda: tensor.to_sparse(), lambda: [tensor]),
        *(lambda: {"weight": tensor}, lambda: draw.choice(mutations.HOSTILE)),
    ]
    what = draw.number(len(changes) + 3)
    if what < len(changes):
        values[key] = changes[what]()
    elif isinstance(values, dict):
        kept = values.pop(key)
        if what > len(changes):
            values[draw.choice(["", "x", "module." + str(key), str(key).replace("1", "9"), str(key)[::-1]])] = kept
    else:
        del values[key]


def _foreign_network_opened(folder: Path) -> None:
    (name,) = (name for name in _FOREIGN if (folder / name).exists())
    source = folder if name.endswith(".safetensors") else folder / name
    convert(source, folder / "out", images=dead_leaves(1, 8), **_FOREIGN[name])


# JSON, and what stands beside


@functools.cache
def _purifiers() -> list[Files]:
    made = [
        recipes.jpeg(30),
        recipes.eclipse("cifar10-sparse"),
        recipes.puregen_ebm(20),
        recipes.puregen_reps(),
    ]
    return [{"purifier.json": purifier.to_json().encode()} for purifier in made]


@functools.cache
def _rows() -> list[Files]:
    sample = Path(__file__).parents[2] / "examples" / "bench" / "results" / "sample" / "rows.jsonl"
    lines = sample.read_text(encoding="utf-8").splitlines()
    return [{"rows.jsonl": (line + "\n").encode()} for line in lines[::40]]


def _rows_opened(folder: Path) -> None:
    report.markdown(rows.read(folder / "rows.jsonl"))


@functools.cache
def _votes() -> list[Files]:
    def make(at: Path) -> None:
        folder = VoteFolder(at, {"sigma": 0.1}, models=2, inputs=3, classes=4)
        for model in range(2):
            folder.write(model, np.array([0, 1, 2]))

    return [_folder(make)]


def _votes_opened(folder: Path) -> None:
    votes = VoteFolder(folder, {"sigma": 0.1}, models=2, inputs=3, classes=4)
    for model in range(2):
        votes.read(model)


_TRAININGS: dict[str, Callable[[Path], object]] = {
    "denoiser": lambda at: train_denoiser(IMAGES, at, replace(SIGMA, steps=2), progress=False),
    "energy": lambda at: train_energy(IMAGES, at, replace(PAIRED, steps=2, decay_at=()), progress=False),
}


@functools.cache
def _states() -> list[Files]:
    made = []
    with patch("purifyloader.train.energy.task.write_pictures"):
        for name, train in _TRAININGS.items():
            files = _folder(lambda at, name=name, train=train: train(at / name))  # type: ignore[misc]
            made.append({path: data for path, data in files.items() if path.endswith(STATE_FILE)})
    return made


def _states_changed(files: Files, draw: Draw) -> Files:
    ((name, data),) = files.items()
    if draw.number(3):
        header, body = mutations.safetensors_parts(data)
        values = json.loads(header["__metadata__"]["purifyloader"])
        if draw.number(3):
            key = draw.choice([name for name in values if name != "identity"])
            values[key] = json_changed(values[key], draw, 3)
        else:
            values = json_changed(values, draw)
        header["__metadata__"]["purifyloader"] = text_of(values)
        return {name: mutations.safetensors_whole(header, body)}
    return {name: (mutations.safetensors_changed if draw.number(2) else bytes_changed)(data, draw)}


def _states_opened(folder: Path) -> None:
    for name, train in _TRAININGS.items():
        if (folder / name / STATE_FILE).exists():
            train(folder / name)  # which is finished, and so takes no step


def _fields() -> list[Files]:
    texts = (TrainConfig().to_dict(), recipe("fast").to_dict(), EnergyTrainConfig().to_dict(), [1, 2, 3, 8])
    return [{"fields.json": canonical_json(text).encode()} for text in texts]


def _fields_opened(folder: Path) -> None:
    for config in (TrainConfig, EnergyTrainConfig):
        with accepted():
            config.from_dict(fields_of(folder / "fields.json"))
    with accepted():
        read_indices(folder / "fields.json")


_JSON = _one_file(mutations.json_text_changed)

KINDS: dict[str, Kind] = {
    "caches": Kind(_caches, _cache_changed, _cache_opened),
    "exports": Kind(_exports, _export_changed, _export_opened),
    "tars": Kind(_tars, _tar_changed, _tar_opened),
    "samples": Kind(_samples, _sample_changed, lambda folder: load_sample(folder, "train")),
    "images": Kind(_images, _image_changed, _images_opened),
    "poisons": Kind(_poisons, _poison_changed, _poison_opened),
    "models": Kind(_models, _model_changed, _model_opened),
    "foreign models": Kind(_foreign, _foreign_changed, _foreign_opened),
    "foreign networks": Kind(_foreign_networks, _foreign_network_changed, _foreign_network_opened),
    "purifiers": Kind(_purifiers, _JSON, lambda folder: from_file(folder / "purifier.json")),
    "rows": Kind(_rows, _JSON, _rows_opened),
    "votes": Kind(_votes, _JSON, _votes_opened),
    "training states": Kind(_states, _states_changed, _states_opened),
    "fields and indices": Kind(_fields, _JSON, _fields_opened),
}
