"""Examples run, pages name what there is, links lead somewhere. What pages show: test_docs_blocks.py."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from docpages import PAGES, ROOT

import pymirror as pm

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def output(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=50, cwd=ROOT, check=False
    )
    assert not done.stderr
    return done.stdout


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_an_example_runs_and_is_short(example: Path) -> None:
    assert output(str(example))
    assert len(example.read_text().splitlines()) < 60


def test_the_api_page_has_every_public_name() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    assert [name for name in pm.__all__ if not re.search(rf"\b{name}\b", text)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target
