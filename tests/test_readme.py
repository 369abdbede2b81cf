"""The README tells the truth: its commands, links, code and figures."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from purifyloader import pretrained
from purifyloader.bench import report
from purifyloader.certify import report as certificates
from purifyloader.results import rows

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_two_commands():
    commands = re.findall(r"```bash\npip install (.*)\n```", TEXT)
    assert commands == ['".[plots]" && python examples/quickstart.py', '-e ".[dev]" && pytest -n auto']


@pytest.mark.parametrize("page", ["README.md", "transforms/README.md"])
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text(encoding="utf-8"))
    assert len(links) >= 4
    for link in links:
        assert link.startswith("https://") or (ROOT / page).parent.joinpath(link).exists(), link


def test_the_page_of_the_transforms_shows_what_was_measured():
    page = (ROOT / "transforms" / "README.md").read_text(encoding="utf-8")
    results = json.loads((ROOT / "examples" / "results" / "loader_speed.json").read_text())
    assert example("loader_speed").with_tables(page, results) == page
    # compensation costs no more than kornia's two augmentations
    assert results["compensate"]["RandomCompensate"] > results["compensate"]["kornia's two"]


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL))
def test_code_compiles_and_its_imports_exist(block):
    tree = ast.parse(block)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("purifyloader"):
            module = importlib.import_module(node.module)
            for name in node.names:
                assert hasattr(module, name.name), name.name


def example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where a dataclass looks for its types
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_the_measured_results():
    folder = ROOT / "examples" / "results"
    results, speed = (json.loads((folder / name).read_text()) for name in ("ablation.json", "speed.json"))
    assert example("ablation").with_tables(TEXT, results, speed) == TEXT
    assert all(len(entry["accuracy"]) == 3 for entry in results.values()), "three seeds in every cell"


def test_the_tables_of_puregen_are_the_measured_ones():
    results = json.loads((ROOT / "examples" / "results" / "puregen.json").read_text())
    assert example("puregen").with_tables(TEXT, results) == TEXT
    assert "<!-- audit -->" in TEXT


def test_the_table_of_cuda_is_the_measured_one():
    results = json.loads((ROOT / "examples" / "results" / "against_cuda.json").read_text())
    assert example("against_cuda").with_table(TEXT, results) == TEXT
    assert "RandomGaussianBlur" in TEXT


RESULTS = ROOT / "examples" / "bench" / "results"


@pytest.mark.parametrize("folder", sorted(path.parent for path in RESULTS.glob("*/rows.jsonl")), ids=lambda p: p.name)
def test_the_tables_of_the_bench_are_of_their_rows(folder):
    found = rows.read(folder / "rows.jsonl")
    assert report.markdown(found) == (folder / "README.md").read_text(encoding="utf-8")
    for row in found:
        assert row["fingerprint"] == rows.fingerprint(row["settings"])
        assert not re.search(r'"(/|[A-Za-z]:\\)', json.dumps(row)), "a row has no path"


def test_the_table_of_the_bench_is_the_measured_one():
    found = report.cells(rows.read(RESULTS / "sample" / "rows.jsonl"))
    start = TEXT.index("<!-- bench -->")
    head, _, *lines = TEXT[start : TEXT.index("<!-- end -->", start)].splitlines()[1:]
    defences = [word.strip("` ") for word in head.strip("|").split("|")[1:]]
    assert len(lines) >= 9
    for line in lines:
        attack, *cells = [word.strip(" *") for word in line.strip("|").split("|")]
        key = "none" if attack == "clean" else attack.lower()
        for defence, shown in zip(defences, cells, strict=True):
            cell = found.get((key, defence))
            if cell is None:
                assert shown == "–", (attack, defence)
                continue
            spread = f" ± {statistics.stdev(cell.accuracy):.1f}" if len(cell.accuracy) > 1 else ""
            assert shown == f"{statistics.fmean(cell.accuracy):.1f}{spread}", (attack, defence)


CERTIFIED = ROOT / "examples" / "certify" / "results"


def test_the_page_of_the_certificates_is_of_their_votes():
    results = json.loads((CERTIFIED / certificates.RESULTS_FILE).read_text())
    page = (CERTIFIED / certificates.PAGE_FILE).read_text(encoding="utf-8")
    assert certificates.markdown(results, picture=certificates.PICTURE_FILE) == page
    assert not re.search(r'"(/|[A-Za-z]:\\)', json.dumps(results)), "no path"
    assert "seed" not in json.dumps(results), "no secret"


def test_the_table_of_the_certificates_is_the_measured_one():
    results = json.loads((CERTIFIED / certificates.RESULTS_FILE).read_text())
    start = TEXT.index("<!-- certificates -->")
    head, _, *lines = TEXT[start : TEXT.index("<!-- end -->", start)].splitlines()[1:]
    radii = [float(word) for word in re.findall(r"within ([\d.]+)", head)]
    assert len(radii) >= 3
    for line, its in zip(lines, results["conditions"], strict=True):
        cells = [word.strip() for word in line.strip("|").split("|")]
        curve = its["curve"]
        at = [sum(radius <= r for radius in curve["radii"]) - 1 for r in radii]
        shown = [its["one_model"]["mean"], its["vote"]["accuracy"], its["certificate"]["certified"]]
        assert cells[0] == its["name"]
        assert cells[1:] == [f"{value:.1f}" for value in (*shown, *(curve["accuracy"][i] for i in at))]


def test_the_table_of_poisoned_certificates_is_the_measured_one():
    found = json.loads((CERTIFIED / "poisoned.json").read_text())
    page = (CERTIFIED.parent / "README.md").read_text(encoding="utf-8")
    assert f"<!-- poisoned -->\n{example('certify_poisoned').table(found)}\n<!-- end -->" in page
    certain = [row for row in found["rows"] if row["must_hold"]]
    assert certain
    assert all(row["held"] == row["covered"] > 0 and row["against"] == 0 for row in certain)


def test_the_table_of_reading_is_the_measured_one():
    results = json.loads((ROOT / "examples" / "results" / "cache_speed.json").read_text())
    assert example("cache_speed").with_tables(TEXT, results) == TEXT


def test_the_table_of_models_is_what_their_files_say():
    start, end = TEXT.index("<!-- models -->"), TEXT.index("<!-- end -->", TEXT.index("<!-- models -->"))
    rows = TEXT[start:end].splitlines()[3:]
    assert len(rows) == len(pretrained.available())
    for row, name in zip(rows, pretrained.available(), strict=True):
        config = json.loads((ROOT / "pretrained" / name / "config.json").read_text())
        if "energy" in config:
            parameters = sum(p.numel() for p in pretrained.load(name, kind="energy").parameters())
            for cell in (f"](pretrained/{name}/README.md)", f"{parameters / 1e6:.2f} M", "an energy"):
                assert cell in row, name
            continue
        psnr = {entry["sigma_px"]: entry["denoiser"] for entry in config["details"]["psnr"]}
        figures = " / ".join(f"{psnr[px]:.1f}" for px in (10, 25, 50))
        low, high = (255 * sigma for sigma in config["denoiser"]["sigma_range"])
        parameters = sum(p.numel() for p in pretrained.load(name).parameters())
        for cell in (
            f"](pretrained/{name}/README.md)",
            f"{parameters / 1e6:.1f} M",
            f"{low:.2g} to {high:.0f} px",
            figures,
        ):
            assert cell in row, name


@pytest.mark.parametrize(
    "line", re.findall(r"^(?:purifyloader|accelerate launch) .*(?:\n    .*)*", TEXT, flags=re.MULTILINE)
)
def test_commands_have_the_options_they_show(line):
    words = [word for word in shlex.split(line.replace("\\\n", " ")) if not word.startswith("purifyloader.")]
    name = [word for word in words[1:4] if re.fullmatch(r"[a-z]+", word) and word not in ("launch",)]
    command = (
        ["precompute"]
        if words[0] == "accelerate"
        else name[:2]
        if name[0] in ("train", "cache", "denoiser", "audit")
        else name[:1]
    )
    done = subprocess.run([sys.executable, "-m", "purifyloader", *command, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for option in (word for word in words if word.startswith("--")):
        assert option in done.stdout
