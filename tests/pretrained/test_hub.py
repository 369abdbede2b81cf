"""Models of the hub: asked for by an id and not otherwise, from a server that speaks as the hub does.

The client reads its settings when it is imported, so each test is a process that imports it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from purifyloader import pretrained
from purifyloader.energy import EnergyConfig, EnergyNetwork
from purifyloader.errors import InputError
from purifyloader.pretrained import hub
from tests import processes
from tests.conftest import tiny_denoiser

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Repositories from folders; notes what was asked of it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Path] = {}
        self.asked: list[str] = []
        self.gated = {"some/gated"}
        self.broken = False

    @property
    def downloads(self) -> set[str]:
        """The files that were sent, not only asked about."""
        return {
            path.split(f"/resolve/{COMMIT}/")[1]
            for path in self.asked
            if path.startswith("GET") and "/resolve/" in path
        }


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = self.path.split("?")[0]
        self.server.asked.append(f"{self.command} {path}")
        if self.server.broken:
            return self._send(500, b"broken")
        parts = path.strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        repository, rest = "/".join(parts[2:4] if api else parts[:2]), parts[4:] if api else parts[2:]
        if repository in self.server.gated:
            return self._send(403, b"gated", {"X-Error-Code": "GatedRepo"})
        folder = self.server.repositories.get(repository)
        if folder is None:
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        if api and rest[:1] == ["tree"]:
            entries = [
                {"type": "file", "path": f, "size": (folder / f).stat().st_size, "oid": _oid(folder / f)} for f in files
            ]
            return self._send(200, json.dumps(entries).encode())
        if api:
            if rest[1:] and rest[1] not in ("main", "v1", COMMIT):
                return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
            siblings = [{"rfilename": file} for file in files]
            return self._send(200, json.dumps({"id": repository, "sha": COMMIT, "siblings": siblings}).encode())
        assert rest[0] == "resolve", path
        file = "/".join(rest[2:])
        if file not in files:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        return self._send(
            200, (folder / file).read_bytes(), {"ETag": f'"{_oid(folder / file)}"', "X-Repo-Commit": COMMIT}
        )

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _oid(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture
def server() -> Iterator[Hub]:
    with Hub() as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def _no_settings_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
        monkeypatch.delenv(name)


def run(code: str, endpoint: str, home: Path, prelude: str = "", **environment: str) -> str:
    """What a process prints that looks at a hub at `endpoint`; its working directory is empty."""
    home.mkdir(exist_ok=True)
    variables = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
    }
    done = processes.run(processes.Code(prelude + PRELUDE + code), env={**variables, **environment}, cwd=home)
    assert done.returncode == 0, done.stderr
    return done.stdout


# the server of the processes has the client, and with it the settings of that moment
PRELUDE = """
import sys
for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
    del sys.modules[name]
from purifyloader import pretrained
from purifyloader.files.weights import weights_sha256
from purifyloader.errors import CheckpointError
assert "huggingface_hub" not in sys.modules

def fails(name, **options):
    try:
        pretrained.load(name, **options)
    except CheckpointError as error:
        print(str(error).replace(chr(10), " "))
    else:
        raise AssertionError(name)
"""


# As in a new interpreter, nothing is there yet that imports the client; whoever imports it now fails.
WITHOUT_THE_CLIENT = """
import sys

class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in CLIENTS:
            raise AssertionError(name)

CLIENTS = "huggingface_hub", "accelerate", "diffusers", "timm", "transformers"
for name in [name for name in sys.modules if name.partition(".")[0] in (*CLIENTS, "purifyloader")]:
    del sys.modules[name]
sys.meta_path.insert(0, Forbidden())
"""


def address(server: Hub) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


def test_loading_downloads_the_three_files_once(server: Hub, tmp_path: Path) -> None:
    from purifyloader.files.weights import weights_sha256

    folder = tmp_path / "repository"
    pretrained.save(tiny_denoiser(), folder, name="mine")
    (folder / "samples.png").write_bytes(b"large")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    server.repositories["some/model"] = folder
    code = 'print(weights_sha256(pretrained.load("some/model")), pretrained.load("some/model@v1").name)'
    home = tmp_path / "home"
    assert run(code, address(server), home).split() == [weights_sha256(tiny_denoiser()), "mine"]
    assert server.downloads == {"config.json", "model.safetensors", "README.md"}
    assert sorted(path.name for path in home.rglob("refs/*")) == ["main", "v1"]
    # without a network: what is there from before
    code = 'print(pretrained.load("some/model").name)'
    assert run(code, "http://127.0.0.1:9", home).split() == ["mine"]
    assert run(code, address(server), home, HF_HUB_OFFLINE="1").split() == ["mine"]


def test_that_the_hub_is_asked_is_said_before(server: Hub, tmp_path: Path) -> None:
    """A mistyped or unmounted folder must not become a download that nobody notices."""
    folder = tmp_path / "repository"
    pretrained.save(tiny_denoiser(), folder, name="mine")
    server.repositories["models/mine"] = folder
    code = """
import logging
class Handler(logging.Handler):
    def emit(self, record):
        print(record.levelname, record.getMessage(), "huggingface_hub" in sys.modules)
logging.getLogger("purifyloader").addHandler(Handler())
logging.getLogger("purifyloader").setLevel(logging.INFO)
pretrained.load("models/mine")
fails("models/mien@v1")
"""
    before, after, mistyped, error = run(code, address(server), tmp_path / "home").splitlines()
    assert before == "WARNING no folder models/mine here: taking it from the hub False"
    assert after == f"INFO models/mine on the hub is commit {COMMIT} True"
    assert mistyped == "WARNING no folder models/mien@v1 here: taking it from the hub True"
    assert "'models/mien@v1'" in error
    (tmp_path / "home/models/mine").mkdir(parents=True)
    pretrained.save(tiny_denoiser(), tmp_path / "home/models/mine", name="here")
    assert run('print(pretrained.load("models/mine").name)', address(server), tmp_path / "home") == "here\n"


def test_a_revision_is_no_path(server: Hub, tmp_path: Path) -> None:
    """The client looks for a revision at CACHE/refs/REVISION, and for its commit at CACHE/snapshots/COMMIT."""
    home = tmp_path / "home"
    pretrained.save(tiny_denoiser(), tmp_path / "repository")
    server.repositories["some/model"] = tmp_path / "repository"
    run('pretrained.load("some/model")', address(server), home)
    elsewhere = tmp_path / "elsewhere"
    pretrained.save(tiny_denoiser(), elsewhere / "model")
    (elsewhere / "ref").write_text(str(elsewhere / "model"))
    up = "../" * 4
    assert (next(home.rglob("refs")) / up / "elsewhere/ref").is_file()
    server.asked.clear()
    for offline in ("0", "1"):
        code = f"""
from purifyloader.errors import InputError
from purifyloader.pretrained import hub
fails("some/model@{up}elsewhere/ref")
for ask in (lambda: hub.download("some/model", "{up}elsewhere/ref", []), lambda: hub.files("some/model", "/etc")):
    try:
        ask()
    except InputError as error:
        print(error)
assert "huggingface_hub" not in sys.modules
"""
        name, download, files = run(code, address(server), home, HF_HUB_OFFLINE=offline).splitlines()
        for message in (name, download):
            assert f"{up}elsewhere/ref'" in message
        assert "a branch, a tag or a commit. Got '/etc'" in files
    assert server.asked == []


def test_a_folder_comes_before_the_hub(server: Hub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    pretrained.save(tiny_denoiser(seed=1), home / "some/model", name="local")
    code = 'print(pretrained.load("some/model").name); assert "huggingface_hub" not in sys.modules'
    assert run(code, address(server), home).split() == ["local"]
    assert server.asked == []


def test_errors_of_the_hub(server: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    pretrained.save(tiny_denoiser(), folder)
    server.repositories["some/model"] = folder
    energy = tmp_path / "energy"
    pretrained.save(EnergyNetwork(EnergyConfig(4)), energy, name="low")
    server.repositories["some/energy"] = energy
    code = """
fails("nobody/nothing")
fails("some/gated")
fails("some/model@no-such-branch")
fails("some/energy")
print(type(pretrained.load("some/energy", kind="energy")).__name__)
"""
    missing, gated, revision, kind, right = run(code, address(server), tmp_path / "home").splitlines()
    for part in ("'nobody/nothing'", "folder here", "no such model", "private", "Got", "spelling"):
        assert part in missing
    for part in ("'some/gated'", "access", "Got", "hf auth login"):
        assert part in gated
    for part in ("'no-such-branch'", "Got", "branch"):
        assert part in revision
    for part in ("a denoiser", "Got an energy model", "kind='energy'"):
        assert part in kind
    assert right == "EnergyNetwork"


def test_foreign_repositories_say_how_to_convert(server: Hub, tmp_path: Path) -> None:
    diffusers = tmp_path / "diffusers"
    diffusers.mkdir()
    (diffusers / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    save_file({"a": torch.zeros(1)}, diffusers / "diffusion_pytorch_model.safetensors")
    pipeline = tmp_path / "pipeline"
    (pipeline / "unet").mkdir(parents=True)
    (pipeline / "model_index.json").write_text("{}")
    (pipeline / "unet/config.json").write_text("{}")
    pickles = tmp_path / "pickles"
    pickles.mkdir()
    torch.save({}, pickles / "ema.pt")
    puregen = tmp_path / "puregen"
    puregen.mkdir()
    (puregen / "config.json").write_text('{"nf": 128, "patch_size": 1}')
    save_file({"a": torch.zeros(1)}, puregen / "model.safetensors")
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("hello")
    for name in ("diffusers", "pipeline", "pickles", "puregen", "other"):
        server.repositories[f"some/{name}"] = tmp_path / name
    code = 'for name in ("diffusers", "pipeline", "pickles", "puregen", "other"): fails(f"some/{name}")'
    lines = run(code, address(server), tmp_path / "home").splitlines()
    formats = ["diffusers", "diffusers", "FORMAT", "puregen-energy", "FORMAT"]
    for line, name, format_ in zip(
        lines, ("diffusers", "pipeline", "pickles", "puregen", "other"), formats, strict=True
    ):
        assert f"purifyloader convert some/{name} OUT --format {format_}" in line
    assert "ema.pt" in lines[2]
    assert "notes.txt" in lines[4]
    # the weights of none of them were downloaded to find that out
    assert server.downloads == {"config.json"}


def test_no_network(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}"
    code = 'fails("some/model"); fails("models/mine")'
    for line, name in zip(
        run(code, closed, tmp_path / "home").splitlines(), ("some/model", "models/mine"), strict=True
    ):
        for part in (f"'{name}'", "could not be reached", "no such folder", "Got", "another machine"):
            assert part in line
    (line,) = run('fails("some/model")', closed, tmp_path / "home", HF_HUB_OFFLINE="1").splitlines()
    assert "HF_HUB_OFFLINE" in line


def test_a_broken_hub(server: Hub, tmp_path: Path) -> None:
    server.broken = True
    (line,) = run('fails("some/model")', address(server), tmp_path / "home").splitlines()
    assert "could not be reached" in line
    assert "500" in line


def test_nothing_but_an_id_asks_the_hub(server: Hub, tmp_path: Path) -> None:
    """Names, paths and typing errors in them stay on this machine; so does importing everything."""
    code = """
from pathlib import Path
import purifyloader.recipes, purifyloader.energy, purifyloader.commands.convert
for name in ("cifar10-sprase", "./models/mine", "/models/mine", "a/b/c", "models/mine.pt", Path("models/mine"), "a b/c",
             "../mine/x", "mine/", ""):
    fails(name)
pretrained.load("cifar10-sparse")
pretrained.list()
print("end")
"""
    assert run(code, address(server), tmp_path / "home", prelude=WITHOUT_THE_CLIENT).endswith("\nend\n")
    assert server.asked == []


def test_shards_are_downloaded_with_their_index(server: Hub, tmp_path: Path) -> None:
    golden = Path(__file__).parents[1] / "golden/convert/diffusers"
    folder = server.repositories["some/shards"] = tmp_path / "shards"
    shutil.copytree(golden, folder)
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    shard = "diffusion_pytorch_model-00001-of-00001.safetensors"
    save_file(weights, folder / shard)
    index = {"weight_map": dict.fromkeys(weights, shard)}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    code = 'from purifyloader.pretrained.convert import convert; convert("some/shards", "a", "diffusers")'
    run(code, address(server), tmp_path / "home")
    assert shard in server.downloads


def test_converting_from_the_hub(server: Hub, tmp_path: Path) -> None:
    """The weights as safetensors, what describes them, and nothing else; pickles only where there is nothing else."""
    golden = Path(__file__).parents[1] / "golden/convert"
    diffusers = Path(shutil.copytree(golden / "diffusers", tmp_path / "diffusers"))
    (diffusers / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    (diffusers / "README.md").write_text("theirs")
    pickles = tmp_path / "pickles"
    pickles.mkdir()
    shutil.copy(golden / "improved.pt", pickles / "ema_0.9999_250000.pt")
    (pickles / "opt250000.bin").write_bytes(b"large")
    server.repositories = {"some/diffusers": diffusers, "some/pickles": pickles}
    code = """
from purifyloader.errors import InputError
from purifyloader.pretrained.convert import convert
convert("some/diffusers", "a", "diffusers")
print(pretrained.load("a").name)
try:
    convert("some/pickles", "b", "eclipse", settings={"norm_groups": 2, "heads": 2})
except InputError as error:
    print(error)
convert("some/pickles@main", "b", "eclipse", settings={"norm_groups": 2, "heads": 2}, file="ema_0.9999_250000.pt")
try:
    convert("some/missing", "c", "eclipse")
except CheckpointError as error:
    print(error)
"""
    name, which, missing = run(code, address(server), tmp_path / "home").splitlines()
    assert name == "a"
    assert "ema_0.9999_250000.pt, opt250000.bin" in which
    assert "--file" in which
    assert "no such model" in missing
    description = {"config.json", "scheduler_config.json", "diffusion_pytorch_model.safetensors"}
    assert server.downloads == {*description, "ema_0.9999_250000.pt"}
    source = json.loads((tmp_path / "home/a/config.json").read_text())["details"]["converted"]["source"]
    assert (source["name"], source["commit"]) == ("some/diffusers", COMMIT)
    assert set(source["files"]) == description
    assert f"`some/diffusers` at commit `{COMMIT}`" in (tmp_path / "home/a/README.md").read_text()


@pytest.mark.parametrize(
    ("name", "parsed"),
    [
        ("google/ddpm-cifar10-32", ("google/ddpm-cifar10-32", None)),
        ("SunayBhat1/puregen-ebm-cifar10@v1.0", ("SunayBhat1/puregen-ebm-cifar10", "v1.0")),
        ("a/b@refs/pr/3", ("a/b", "refs/pr/3")),
        ("a/b@feature/x-1_2+3.4", ("a/b", "feature/x-1_2+3.4")),
        (f"a/b@{COMMIT}", ("a/b", COMMIT)),
    ],
)
def test_ids(name: str, parsed: tuple[str, str | None]) -> None:
    assert hub.is_hub_id(name)
    assert hub.parse(name) == parsed


@pytest.mark.parametrize("name", ["a", "a/b/c", "/a/b", "./a", "../a", "a/", "a/b@", "a/b c", "a/.b", "ä/b", "a/b\n",
    "a/b@..", "a/b@../../../etc", "a/b@v/../../x", "a/b@/etc", "a/b@./main", "a/b@a/.b", "a/b@a//b", "a/b@v1..v2",
    "a/b@a/", "a/b@v1\n", "a/b@-x"])  # fmt: skip
def test_what_is_no_id(name: str) -> None:
    assert not hub.is_hub_id(name)
    with pytest.raises(InputError, match="owner/name"):
        hub.parse(name)
