# SPDX-License-Identifier: MIT
"""The report of a study as one page of HTML that needs nothing else: pictures are in it, as SVG."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from . import plot
from .options import Options
from .ranking import AGAINST_COUNTS, NOISE, Ranked, rank
from .results import Report
from .tables import COLUMNS, legend, row, which_round
from .verdict import verdict
from .workloads import WORKLOADS

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .3rem; }
table { border-collapse: collapse; width: 100%; margin: .6rem 0; font-size: 13px; }
table { font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #ddd; }
th { vertical-align: bottom; border-bottom: 2px solid #888; font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
tr.wrong td { color: #a02020; }
.wide { overflow-x: auto; } figure { margin: 1rem 0; } figure svg { max-width: 100%; height: auto; }
p:has(+ ul) { margin-bottom: .2rem; } ul { margin-top: 0; }
figcaption, .about { color: #555; } pre { background: #f4f4f4; padding: .6rem; overflow-x: auto; }
"""


def page(report: Report) -> str:
    """The whole page."""
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Mirror or pin?</title><style>{_STYLE}</style></head><body>",
        *_head(report),
        *_figure(plot.times_svg(report), _times(report.options)),
        *_figure(plot.memory_svg(report), _MEMORY),
        f'<p class="about">Of the tables: {escape(legend(report.options))}.</p>',
        *(line for workload in report.workloads for line in _section(report, workload)),
        "<h2>What the figures say</h2>",
        *_says(report),
        *_again(report),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


_MEMORY = (
    "Memory when the last operation was over. What is pinned the kernel can neither write out nor move; some"
    " of it the process may have given back already."
)


def _times(options: Options) -> str:
    whisker = "" if options.rounds == 1 else ", with a whisker to the slowest"
    return (
        f"Time an operation in {which_round(options)}{whisker}. The grey part is not"
        " measured: it is the number of faults and invalidations times what a device is taken to need."
    )


def _head(report: Report) -> Iterable[str]:
    options = report.options
    yield "<h1>Mirror or pin?</h1>"
    yield (
        "<p>Drivers that follow the CPU's page table (they mirror) against drivers that pin, on real memory"
        " of one process: real faults, real pins. The device is software, and its own latency a model:"
        f" {options.fault_us:g} us a device fault, {options.invalidation_us:g} us an invalidation."
        " The drivers are Python, which is in their times; what carries over to a driver in C are the"
        " counts.</p>"
    )
    yield f"<p>pymirror {escape(report.version)} on {escape(str(report.machine))}.</p>"
    if report.machine.missing:
        yield f"<p>This kernel or user does not have: {escape(', '.join(report.machine.missing))}.</p>"


def _figure(svg: str, caption: str) -> Iterable[str]:
    yield f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def _section(report: Report, workload: str) -> Iterable[str]:
    about = next(one for one in WORKLOADS if one.name == workload)
    text = f"{about.about}; an operation is {about.operation}."
    yield f'<h2>{escape(workload)}</h2><p class="about">{escape(text)}</p>'
    yield '<div class="wide"><table><thead><tr>'
    yield "".join(f"<th>{escape(name)}</th>" for name in COLUMNS)
    yield "</tr></thead><tbody>"
    for one in rank(report.of(workload), report.options):
        yield _row(one, report)
    yield "</tbody></table></div>"
    for cell in report.cells:
        if cell.workload == workload and cell.left_out is not None:
            yield f"<p>{escape(cell.driver)} is left out: {escape(cell.left_out)}</p>"


def _row(one: Ranked, report: Report) -> str:
    cells = "".join(f"<td>{escape(text)}</td>" for text in row(one, report.options))
    return f"<tr{' class=wrong' if one.place is None else ''}>{cells}</tr>"


def _says(report: Report) -> Iterable[str]:
    for workload in report.workloads:
        if sentences := verdict(report, workload):
            items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
            yield f"<p><b>{escape(workload)}</b></p><ul>{items}</ul>"
    yield (
        f'<p class="about">Times that differ by less than {NOISE:g} times, or whose rounds overlap, are taken'
        f" for noise, and by less than {AGAINST_COUNTS:g} times where they contradict the counts; such"
        " drivers are ranked by what was counted, which is the same in every run.</p>"
    )


def _again(report: Report) -> Iterable[str]:
    yield f"<h2>Again</h2><p>{report.seconds:.0f} s on this machine:</p>"
    yield f"<pre>{escape(report.options.command())} --html report.html</pre>"
