"""The README and the docs are true: their code runs, their commands exist, their links and words lead to something."""

from __future__ import annotations

import keyword
import os
import re
import runpy
import shutil
import subprocess
import sys
import tokenize
import warnings
from pathlib import Path

import pytest

import carve_kernels
from carve_kernels.models.scenes import draw_scene

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("docs", "benchmarks/results", "examples/*")
PAGES = sorted([ROOT / "README.md", *(path for folder in FOLDERS for path in ROOT.glob(f"{folder}/*.md"))])
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMANDS = {"demo", "run", "batch", "profile", "doctor", "check"}


def blocks(language: str) -> list[tuple[str, str]]:
    pages = [(path.relative_to(ROOT).as_posix(), BLOCK.findall(path.read_text(encoding="utf-8"))) for path in PAGES]
    return [(name, code) for name, codes in pages for kind, code in codes if kind == language]


def lines() -> list[tuple[str, str]]:
    """Every command line of a shell block, without its comment, and every one in backquotes."""
    shell = [(name, line.split("#")[0].strip()) for name, code in blocks("sh") for line in code.splitlines()]
    inline = [
        (path.relative_to(ROOT).as_posix(), code)
        for path in PAGES
        for code in re.findall(r"`((?:make|carve-kernels|python -m|python examples)[^`]*)`", path.read_text("utf-8"))
    ]
    return sorted({entry for entry in shell + inline if entry[1]})


@pytest.mark.parametrize(("page", "code"), [entry for entry in blocks("python") if entry[0] != "README.md"])
def test_code_blocks_run(page: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(code.splitlines()) <= 15
    monkeypatch.chdir(tmp_path)
    exec(compile(code, page, "exec"), {"__name__": "__main__"})


def test_the_blocks_of_the_readme_run_in_order(tmp_path: Path) -> None:
    """In a process of their own, beside what the demo has written, and they print what their comments say."""
    maps, carve = (code for page, code in blocks("python") if page == "README.md")
    assert len(maps.splitlines()) <= 8 and len(carve.splitlines()) <= 5
    folder = tmp_path / "out" / "demo"
    folder.mkdir(parents=True)
    draw_scene(seed=18, level=4, split="test").image.save(folder / "image.png")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    program = f"import tests.support.tiny_models\n{maps}{carve}"
    run = [sys.executable, "-c", program]
    result = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    printed = result.stdout.splitlines()
    assert printed[0] == "torch.Size([1, 2, 2, 1, 144])" and f"  # {printed[1]}\n" in carve
    assert (folder.parent / "refined.png").is_file()


def test_the_readme_and_the_verdicts_are_short() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(readme) <= 80 and max(map(len, readme)) <= 100
    assert len((ROOT / "docs" / "performance.md").read_text(encoding="utf-8").splitlines()) <= 80
    assert (ROOT / "docs" / "panel.png").stat().st_size < 200 * 1024


@pytest.mark.parametrize("path", [path for path in PAGES if path.parent.name == "docs"], ids=lambda path: path.name)
def test_the_lines_of_the_docs_can_be_read(path: Path) -> None:
    long = [line for line in path.read_text(encoding="utf-8").splitlines() if len(line) > 120]
    assert all(line.startswith(("|", "    ")) or " " not in line for line in long), long


def names_of_the_code() -> set[str]:
    """The names of the package's programs, their files, and the parts that those consist of."""
    names: set[str] = set()
    for path in (ROOT / "carve_kernels").rglob("*.py"):
        names |= {path.stem, path.parent.name}
        with path.open(encoding="utf-8") as file:
            names |= {token.string for token in tokenize.generate_tokens(file.readline) if token.type == tokenize.NAME}
    return {name for name in names if not keyword.iskeyword(name)}


def test_the_words_of_the_glossary_are_in_the_code() -> None:
    rows = re.findall(
        r"^\| ([^|]+) \| ([^|]+) \| `(\w+)` \|$", (ROOT / "docs" / "glossary.md").read_text("utf-8"), re.M
    )
    assert len(rows) > 40 and len({word for word, *_ in rows}) == len(rows)
    known = names_of_the_code()
    assert [name for *_, name in rows if name not in known] == []


def tree_of_the_docs() -> list[str]:
    """Each path of the tree in docs/architecture.md; folders end with a slash."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    paths, folders = [], [""]
    for line in page.split("## The tree\n\n")[1].split("\n\n")[0].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2 - 2
        paths += [f"{folders[depth]}{name}" for name in line.strip().split("  ")[0].split(", ")]
        folders[depth + 1 :] = [paths[-1]]
    return paths


def test_the_tree_of_the_docs_is_that_of_the_package() -> None:
    """Each path exists; each module of the package is listed, or in a folder that is listed without its files."""
    listed = tree_of_the_docs()
    assert [path for path in listed if not (ROOT / path).exists()] == []
    folders = {path for path in listed if path.endswith("/")}
    whole = {folder for folder in folders if not any(path != folder and path.startswith(folder) for path in listed)}
    modules = [path.relative_to(ROOT).as_posix() for path in (ROOT / "carve_kernels").rglob("*.py")]
    known = {*listed, *(f"{folder}__init__.py" for folder in folders)}
    assert [path for path in modules if path not in known and not path.startswith(tuple(whole))] == []


def options_of(module: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What `python -m module words --help` prints, in this process: torch is imported already."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        # A module that has been imported runs once more under its other name.
        warnings.simplefilter("ignore", RuntimeWarning)
        patch.setenv("COLUMNS", "200")
        patch.setenv("NO_COLOR", "1")
        patch.setattr(sys, "argv", [module, *words, "--help"])
        with pytest.raises(SystemExit) as end:
            runpy.run_module(module, run_name="__main__")
    assert not end.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize(("page", "line"), lines())
def test_commands_exist(
    page: str, line: str, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    words = line.split()
    options = re.findall(r"--[a-z-]+", line)
    if words[0] == "make":
        result = subprocess.run(["make", "-n", *words[1:2]], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    elif words[0] == "carve-kernels":
        assert len(words) == 1 or words[1] in COMMANDS
        printed = options_of("carve_kernels", words[1:2], capsys)
        assert all(option in printed for option in options)
    elif words[:3] == ["python", "-m", "pytest"]:
        markers = {marker.split(":")[0] for marker in request.config.getini("markers")}
        assert words[3] == "-m" and words[4] in markers and not options
    elif words[:2] == ["python", "-m"] and ".test_" in words[2]:
        assert '__name__ == "__main__"' in (ROOT / f"{words[2].replace('.', '/')}.py").read_text(encoding="utf-8")
    elif words[:2] == ["python", "-m"]:
        printed = options_of(words[2], [word for word in words[3:4] if not word.startswith("-")], capsys)
        assert all(option in printed for option in options)
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file()
    else:
        assert words[0] in {"pip", "tail", "nohup"} and shutil.which(words[0])


def anchors(path: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_lead_somewhere() -> None:
    for path in PAGES:
        for target in re.findall(r"\]\(([^)]+)\)", path.read_text(encoding="utf-8")):
            if not target.startswith("https://"):
                file, _, anchor = target.partition("#")
                page = path.parent / file if file else path
                assert page.exists() and (not anchor or anchor in anchors(page)), f"{path.name}: {target}"


def test_the_families_of_the_docs_are_those_of_the_code() -> None:
    from carve_kernels.hf.families import FAMILIES, VIDEO_FAMILIES

    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    column = [line.split("|")[1] for line in page.splitlines() if line.startswith("| ")]
    # A processor that is not named as the model type has it in brackets.
    assert set(FAMILIES) <= set(re.findall(r"`([\w.-]+)`", " ".join(column)))
    images = sum(family.kind is not None for family in FAMILIES.values())
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"[{images} families](docs/families.md)" in readme and f"{len(VIDEO_FAMILIES)} with video" in readme
    assert f"\n{images} families have a layout" in page


def test_the_presets_of_the_docs_are_those_of_the_code() -> None:
    page = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
    paper, release = carve_kernels.Preset.paper(), carve_kernels.Preset.release()
    cells = {row.split("|")[1].strip(): row.split("|")[2:4] for row in page.splitlines() if row.startswith("| ")}
    assert f"top {paper.keep:.0%}".replace("%", " %") in cells["selected pixels"][0]
    assert f"top {release.keep:.0%}".replace("%", " %") in cells["selected pixels"][1]
    assert (
        f"best {paper.top}" in cells["selected regions"][0]
        and f"at least {release.floor}" in cells["selected regions"][1]
    )
    assert paper.lam == "mean" and '"mean"' in cells["lam"][0]
    assert f"{release.lam:g}".replace("e-08", "e-8") == cells["lam"][1].strip()
    assert f'"{release.suffix}"' in cells["suffix of every prompt"][1] and paper.suffix == ""
    assert all(
        str(preset.max_new_tokens) in cell for preset, cell in zip((paper, release), cells["new tokens"], strict=True)
    )
    assert f"at most {paper.limit:g} times" in page and f"`{paper.steps}`" in cells["steps"][0]
    assert paper.connectivity == release.connectivity == 4 and "4-connected" in page


@pytest.mark.parametrize("name", sorted(set(carve_kernels.__all__) - {"__version__"}))
def test_public_docstrings_say_what_they_must(name: str) -> None:
    public = getattr(carve_kernels, name)
    text = public.__doc__ or ""
    assert re.match(r"[A-Z][^\n]+", text), "a first sentence"
    if name in {"capture", "capture_layers", "contrast", "regions", "zoom", "carve", "capture_attention"}:
        assert "Equals" in text and "Raises" in text and "Source" in text and "=====" in text
