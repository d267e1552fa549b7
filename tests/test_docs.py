"""Pages name what there is, links lead somewhere. What pages show: test_docs_blocks.py."""

import re
from pathlib import Path

import pytest
from docpages import PAGES, ROOT

import pymirror as pm

README = ROOT / "README.md"


def test_the_api_page_has_every_public_name() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    assert [name for name in pm.__all__ if not re.search(rf"\b{name}\b", text)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", [page for page in PAGES if page != README], ids=lambda path: path.name)
def test_the_readme_leads_to_every_page(page: Path) -> None:
    assert f"]({page.relative_to(ROOT)})" in README.read_text()


def test_the_readme_has_the_figures_of_the_performance_page() -> None:
    results = (ROOT / "docs" / "performance.md").read_text().partition("## Results")[2]
    measured = {float(cells[4]) for cells in map(_cells, results.splitlines()) if _is_figure(cells)}
    shown = re.findall(r"^\| .* \| ([\d.]+) \|$", README.read_text(), re.MULTILINE)
    assert shown
    rounded = measured | {round(figure, 1) for figure in measured}
    assert set(map(float, shown)) <= rounded


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")]


def _is_figure(cells: list[str]) -> bool:
    return len(cells) > 4 and re.fullmatch(r"[\d.]+", cells[4]) is not None
