"""The documentation is what the programs do: examples run, outputs shown are real, links lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import pymirror as pm
from pymirror.features import probe

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def output(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=50, cwd=ROOT, check=False
    )
    assert not done.stderr
    return done.stdout


def shown_after(command: str) -> str:
    """The indented block of the README that begins with `$ command`."""
    text = (ROOT / "README.md").read_text()
    block = re.search(rf"^    \$ {re.escape(command)}\n((?:    .*\n)+)", text, re.MULTILINE)
    assert block, command
    return re.sub("^    ", "", block[1], flags=re.MULTILINE)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_an_example_runs_and_is_short(example: Path) -> None:
    assert output(str(example))
    assert len(example.read_text().splitlines()) < 60


@pytest.mark.root
def test_the_readme_shows_the_output_of_its_example() -> None:
    assert output("examples/mirror_loop.py") == shown_after(".venv/bin/python examples/mirror_loop.py")


@pytest.mark.hugetlb
@pytest.mark.root
def test_the_readme_shows_the_counts_of_the_replay() -> None:
    if "pfn" not in probe():
        pytest.skip("PFNs are switched off")
    shown = shown_after(".venv/bin/pymirror replay tests/golden/cpu.jsonl").removesuffix("...\n")
    assert output("-m", "pymirror.cli", "replay", "tests/golden/cpu.jsonl").startswith(shown)


def test_the_api_page_has_every_public_name() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    assert [name for name in pm.__all__ if not re.search(rf"\b{name}\b", text)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target
