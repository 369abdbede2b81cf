"""The READMEs tell the truth: their commands, links, code and figures."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import importlib.util
import io
import json
import re
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.transforms import v2

from purifyloader import pretrained
from purifyloader.bench import report
from purifyloader.certify import output
from purifyloader.certify import report as certificates
from purifyloader.commands import main as cli
from purifyloader.results import rows
from tests.conftest import PictureDataset, random_images

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "examples" / "results"

FOLDERS = [".", "transforms", "pretrained", "examples", "examples/data", "examples/certify"]
PAGES = sorted(
    [f"{folder}/README.md".removeprefix("./") for folder in FOLDERS]
    + [
        str(page.relative_to(ROOT))
        for page in (ROOT / "purifyloader").glob("*/README.md")
        if not page.parent.is_symlink()
    ]
)


@functools.cache
def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(language: str) -> list[Any]:
    """Every block of code of a language, as (page, code)."""
    pattern = rf"^```{language}\n(.*?)^```"
    found = [(page, code) for page in PAGES for code in re.findall(pattern, text(page), re.DOTALL | re.MULTILINE)]
    return [pytest.param(page, code, id=f"{page}-{number}") for number, (page, code) in enumerate(found)]


def page_with(table: str) -> str:
    """The text of the one page that has the table `table` between its marks."""
    (found,) = [page for page in PAGES if f"<!-- {table} -->" in text(page)]
    return text(found)


def table(name: str) -> list[list[str]]:
    """The rows of a page's table, its head first, as the words of their cells."""
    page = page_with(name)
    start = page.index(f"<!-- {name} -->")
    head, _, *lines = page[start : page.index("<!-- end -->", start)].splitlines()[1:]
    return [[word.strip() for word in line.strip("|").split("|")] for line in (head, *lines)]


@functools.cache
def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where a dataclass looks for its types
    spec.loader.exec_module(module)
    return module


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


# -- the first page ----------------------------------------------------------------------------------


def test_the_first_page_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 10_000


def test_the_first_page_links_to_every_other():
    links = {link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text("README.md"))}
    assert {page for page in PAGES if page.startswith(("purifyloader/", "transforms/", "pretrained/"))} <= links


def test_the_two_commands():
    commands = re.findall(r"```bash\npip install (.*)\n```", text("README.md"))
    assert commands == ['".[plots]" && python examples/quickstart.py', '-e ".[dev]" && pytest -n auto']


def test_the_three_uses_run_as_they_are_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "photos" / "train" / "even"
    folder.mkdir(parents=True)
    for number in range(2):
        image = v2.functional.to_pil_image(random_images(1, 32, seed=number)[0])
        image.save(folder / f"{number}.png")
    converted = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    scope: dict[str, Any] = {
        "your_dataset": PictureDataset(random_images(3, 32), converted),
        "your_transform": converted,
        "epochs": 1,
        "v2": v2,
        "torch": torch,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
    }
    parts = re.findall(r"^```(python|bash)\n(.*?)^```", text("README.md"), re.DOTALL | re.MULTILINE)
    run = 0
    for language, code in parts:
        if language == "python":
            exec(compile(code.replace("num_workers=2", "num_workers=0"), "README.md", "exec"), scope)
            run += 1
        elif code.startswith("purifyloader "):
            words = shlex.split(code.replace("\\\n", " "))
            assert cli.main([*words[1:], "--quiet"]) == 0
            run += 1
    assert run == 4
    assert scope["images"].shape == (3, 3, 32, 32)
    assert scope["transform"](image).shape == (3, 32, 32)
    assert len(scope["train"]) == 2
    assert scope["train"][0][0].shape == (3, 32, 32)


def test_the_first_table_is_measured():
    found = report.cells(rows.read(ROOT / "examples" / "bench" / "results" / "float32" / "rows.jsonl"))
    speed = load(RESULTS / "speed.json")["purify_images_per_second"]
    _, *lines, seconds = table("results")
    for attack, line in zip(("none", "lsp", "ar", "tap bfloat16=False"), lines, strict=True):
        shown = [found[attack, defence].accuracy for defence in ("none", "jpeg-10", "eclipse@25")]
        assert all(len(values) == 3 for values in shown)
        assert line[1:] == [f"{statistics.fmean(v):.1f} ± {statistics.stdev(v):.1f}" for v in shown]
    assert seconds[1:] == ["–", *(f"{1000 / speed[name]:.1f}" for name in ("JPEG-10", "1 call"))]


# -- all pages ---------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The places that a link to a page may name: its headings as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", text(page)):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize(("page", "code"), blocks("python"))
def test_code_compiles_and_its_imports_exist(page, code):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("purifyloader"):
            module = importlib.import_module(node.module)
            for name in node.names:
                there = hasattr(module, name.name) or importlib.util.find_spec(f"{node.module}.{name.name}")
                assert there, name.name


def command_lines() -> list[Any]:
    """Every command line on the pages, in blocks and inside sentences."""
    found = []
    for page in PAGES:
        fenced = re.findall(r"^```bash\n(.*?)^```", text(page), re.DOTALL | re.MULTILINE)
        lines = [line for block in fenced for line in re.sub(r"\\\n\s*", "", block).splitlines()]
        prose = re.sub(r"^```.*?^```", "", text(page), flags=re.DOTALL | re.MULTILINE)
        lines += [line.replace("\n", " ") for line in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose)]
        wanted = r"(purifyloader [a-z]|accelerate launch -m purifyloader|python examples/)"
        found += [pytest.param(line, id=f"{page}-{line[:60]}") for line in lines if re.match(wanted, line)]
    return found


@functools.cache
def help_of(*command: str) -> str:
    output = io.StringIO()
    with contextlib.redirect_stdout(output), pytest.raises(SystemExit) as leaving:
        cli.main([*command, "--help"])
    assert leaving.value.code == 0, command
    return output.getvalue()


GROUPS = {"cache", *(row.name.split()[0] for row in cli.COMMANDS if " " in row.name)}


@pytest.mark.parametrize("line", command_lines())
def test_commands_have_the_options_they_show(line):
    words = shlex.split(line.partition("&&")[0])
    if words[0] == "python":
        known = (ROOT / words[1]).read_text(encoding="utf-8")
    else:
        at = next(i for i, word in enumerate(words) if word.startswith("purifyloader"))
        rest = words[at + 1 :]
        if words[at] == "purifyloader.precompute":
            rest = ["precompute", *rest]
        known = help_of(*rest[: 2 if rest[0] in GROUPS else 1])
    if "fade" in words:  # the plugin that a page adds; tests/contracts/test_plugin.py runs it
        return
    for option in (word for word in words if re.match(r"--\w", word)):
        assert re.search(rf"{option}(?![\w-])", known), option


# -- measured tables ---------------------------------------------------------------------------------


def test_the_tables_of_the_recipes_are_the_measured_results():
    results, speed = load(RESULTS / "ablation.json"), load(RESULTS / "speed.json")
    page = page_with("parts")
    assert example("ablation").with_tables(page, results, speed) == page
    assert all(len(entry["accuracy"]) == 3 for entry in results.values()), "three seeds in every cell"


@pytest.mark.parametrize("name", ["puregen", "audit"])
def test_the_tables_of_puregen_are_the_measured_ones(name):
    page = page_with(name)
    assert example("puregen").with_tables(page, load(RESULTS / "puregen.json")) == page


def test_the_table_of_cuda_is_the_measured_one():
    page = page_with("cuda")
    assert example("against_cuda").with_table(page, load(RESULTS / "against_cuda.json")) == page
    assert "RandomGaussianBlur" in page


def test_the_tables_of_the_transforms_are_the_measured_ones():
    results = load(RESULTS / "loader_speed.json")
    page = page_with("loader speed")
    assert example("loader_speed").with_tables(page, results) == page
    # compensation costs no more than kornia's two augmentations
    assert results["compensate"]["RandomCompensate"] > results["compensate"]["kornia's two"]


def test_the_tables_of_the_fast_denoiser_are_the_measured_ones():
    page = page_with("core")
    assert example("speed").with_table(page, load(RESULTS / "speed_core.json")) == page
    assert example("fast_defence").with_table(page, load(RESULTS / "fast_defence.json")) == page


def test_the_tables_of_sanitizing_are_the_measured_ones():
    page = page_with("found")
    assert example("sanitize").with_tables(page, load(RESULTS / "sanitize.json")) == page


def test_the_table_of_reading_is_the_measured_one():
    page = page_with("reading")
    assert example("cache_speed").with_tables(page, load(RESULTS / "cache_speed.json")) == page


BENCH = ROOT / "examples" / "bench" / "results"


@pytest.mark.parametrize("folder", sorted(path.parent for path in BENCH.glob("*/rows.jsonl")), ids=lambda p: p.name)
def test_the_tables_of_the_bench_are_of_their_rows(folder):
    found = rows.read(folder / "rows.jsonl")
    assert report.markdown(found) == (folder / "README.md").read_text(encoding="utf-8")
    for row in found:
        assert row["fingerprint"] == rows.fingerprint(row["settings"])
        assert not re.search(r'"(/|[A-Za-z]:\\)', json.dumps(row)), "a row has no path"


def test_the_table_of_the_bench_is_the_measured_one():
    found = report.cells(rows.read(BENCH / "sample" / "rows.jsonl"))
    head, *lines = table("bench")
    defences = [word.strip("`") for word in head[1:]]
    assert len(lines) >= 9
    for attack, *cells in lines:
        key = "none" if attack == "clean" else attack.strip("*").lower()
        for defence, shown in zip(defences, cells, strict=True):
            cell = found.get((key, defence))
            if cell is None:
                assert shown == "–", (attack, defence)
                continue
            spread = f" ± {statistics.stdev(cell.accuracy):.1f}" if len(cell.accuracy) > 1 else ""
            assert shown.strip("*") == f"{statistics.fmean(cell.accuracy):.1f}{spread}", (attack, defence)


CERTIFIED = ROOT / "examples" / "certify" / "results"


def test_the_page_of_the_certificates_is_of_their_votes():
    results = load(CERTIFIED / output.RESULTS_FILE)
    page = (CERTIFIED / output.PAGE_FILE).read_text(encoding="utf-8")
    assert certificates.markdown(results, picture=output.PICTURE_FILE) == page
    assert not re.search(r'"(/|[A-Za-z]:\\)', json.dumps(results)), "no path"
    assert "seed" not in json.dumps(results), "no secret"


def test_the_table_of_the_certificates_is_the_measured_one():
    results = load(CERTIFIED / output.RESULTS_FILE)
    head, *lines = table("certificates")
    radii = [float(word.removeprefix("within ")) for word in head if word.startswith("within ")]
    assert len(radii) >= 3
    for cells, condition in zip(lines, results["conditions"], strict=True):
        curve = condition["curve"]
        at = [sum(radius <= r for radius in curve["radii"]) - 1 for r in radii]
        shown = [condition["one_model"]["mean"], condition["vote"]["accuracy"], condition["certificate"]["certified"]]
        assert cells == [condition["name"], *(f"{v:.1f}" for v in (*shown, *(curve["accuracy"][i] for i in at)))]


def test_the_table_of_poisoned_certificates_is_the_measured_one():
    found = load(CERTIFIED / "poisoned.json")
    assert f"<!-- poisoned -->\n{example('certify_poisoned').table(found)}\n<!-- end -->" in page_with("poisoned")
    certain = [row for row in found["rows"] if row["must_hold"]]
    assert certain
    assert all(row["held"] == row["covered"] > 0 and row["against"] == 0 for row in certain)


def test_the_table_of_models_is_what_their_files_say():
    _, *lines = table("models")
    for line, name in zip(lines, pretrained.available(), strict=True):
        config = load(ROOT / "pretrained" / name / "config.json")
        row = " | ".join(line)
        assert f"]({name}/README.md)" in row, name
        if "energy" in config:
            parameters = sum(p.numel() for p in pretrained.load(name, kind="energy").parameters())
            cells = [f"{parameters / 1e6:.2f} M", "an energy"]
        else:
            psnr = {entry["sigma_px"]: entry["denoiser"] for entry in config["details"]["psnr"]}
            low, high = (255 * sigma for sigma in config["denoiser"]["sigma_range"])
            parameters = sum(p.numel() for p in pretrained.load(name).parameters())
            cells = [f"{parameters / 1e6:.1f} M", f"{low:.2g} to {high:.0f} px"]
            cells.append(" / ".join(f"{psnr[px]:.1f}" for px in (10, 25, 50)))
        for cell in cells:
            assert cell in row, name
