# SPDX-License-Identifier: MIT
"""The figures of a study as pictures, by matplotlib (the extra "plot")."""

from __future__ import annotations

import errno
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MirrorError
from .options import PAGE
from .results import Cell, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg")

_CPU, _DEVICE, _MODEL = "#4477aa", "#ee8866", "#bbbbbb"
_HELD, _FREE, _STRANDED = "#aa3377", "#44bb99", "#661144"
_MIB = PAGE / (1 << 20)
_COLUMNS = 2


def check_format(path: str) -> None:
    """EINVAL unless it is a file name of a format that save() writes; ENOSYS without matplotlib."""
    if Path(path).suffix.lower() not in FORMATS:
        raise MirrorError(
            errno.EINVAL, f"plot: {path}", hint=f"give a name that ends in {' or '.join(FORMATS)}"
        )
    require_matplotlib()


def require_matplotlib() -> None:
    """ENOSYS without it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MirrorError(
            errno.ENOSYS,
            "plots need matplotlib",
            hint="pip install 'pymirror[plot]', or pip install matplotlib",
        ) from None


def save(report: Report, path: str) -> None:
    """Both figures in one picture, PNG or SVG by the name."""
    figure = _figure(2 * _rows(report), report)
    columns = _columns(report)
    for number, workload in enumerate(report.workloads):
        place = number // columns * 2 * columns + number % columns
        _times(figure.axes[place], report, workload)
        _memory(figure.axes[place + columns], report, workload)
    _finish(figure)
    figure.suptitle(_title(report), fontsize=8, color="#555555")
    figure.savefig(path, dpi=110)


def _title(report: Report) -> str:
    options = report.options
    return (
        f"pymirror {report.version}, {report.machine}\n{options.command()}; the model takes"
        f" {options.fault_us:g} us for a device fault, {options.invalidation_us:g} us for an invalidation"
    )


def times_svg(report: Report) -> str:
    """Time an operation, as an SVG element."""
    return _svg(report, _times)


def memory_svg(report: Report) -> str:
    """Memory that is held and that is not, as an SVG element."""
    return _svg(report, _memory)


def _svg(report: Report, draw: Any) -> str:
    figure = _figure(_rows(report), report)
    for axes, workload in zip(figure.axes, report.workloads, strict=False):
        draw(axes, report, workload)
    _finish(figure)
    out = io.StringIO()
    figure.savefig(out, format="svg")
    text = out.getvalue()
    return text[text.index("<svg") :]


def _figure(rows: int, report: Report) -> Figure:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "pymirror"
    mpl.rcParams["svg.fonttype"] = "none"
    columns = _columns(report)
    height = 1.1 + 0.34 * max(len(report.drivers), 2)
    figure = Figure(figsize=(5.4 * columns, rows * height + 0.4), layout="constrained")
    figure.subplots(rows, columns, squeeze=False)
    return figure


def _rows(report: Report) -> int:
    return -(-len(report.workloads) // _columns(report))


def _columns(report: Report) -> int:
    return min(_COLUMNS, len(report.workloads))


def _finish(figure: Figure) -> None:
    used = [axes for axes in figure.axes if axes.has_data()]
    for axes in figure.axes:
        if not axes.has_data():
            axes.set_axis_off()
    shown: dict[str, Any] = {}
    for axes in used:
        handles, labels = axes.get_legend_handles_labels()
        shown |= dict(zip(labels, handles, strict=True))
    figure.legend(
        shown.values(), shown.keys(), loc="outside lower center", ncols=6, frameon=False, fontsize=8
    )


def _times(axes: Axes, report: Report, workload: str) -> None:
    """One bar a driver: the CPU's part, the device's, what the model adds; a whisker to the slowest round."""
    cells = report.of(workload)
    parts = (
        ("CPU side", _CPU, [cell.best.cpu for cell in cells]),
        ("device side: driver, faults, copies", _DEVICE, [cell.best.device for cell in cells]),
        ("model: faults, invalidations", _MODEL, [cell.model_us(report.options) for cell in cells]),
    )
    left = [0.0] * len(cells)
    for label, color, widths in parts:
        bars = axes.barh(range(len(cells)), widths, left=left, color=color, label=label, height=0.7)
        left = [at + width for at, width in zip(left, widths, strict=True)]
        for cell, bar in zip(cells, bars, strict=True):
            bar.set_alpha(1.0 if cell.safe else 0.35)
    options = report.options
    slower = [cell.slowest_us(options) - cell.total_us(options) for cell in cells]
    axes.errorbar(
        left,
        range(len(cells)),
        xerr=([0.0] * len(cells), slower),
        fmt="none",
        ecolor="#333333",
        elinewidth=1,
        capsize=2,
    )
    _label(axes, cells, f"{workload}: time an operation", "us")
    axes.set_xlim(left=0)


def _memory(axes: Axes, report: Report, workload: str) -> None:
    """One bar a driver: what is pinned, of that what the process gave back, and what the kernel may take."""
    cells = report.of(workload)
    stages = [cell.counts.stage for cell in cells if cell.counts is not None]
    parts = (
        ("pinned, given back by the process", _STRANDED, [stage.stranded * _MIB for stage in stages]),
        ("pinned", _HELD, [(stage.pinned - stage.stranded) * _MIB for stage in stages]),
        ("in RAM, the kernel may take it", _FREE, [stage.reclaimable * _MIB for stage in stages]),
    )
    left = [0.0] * len(cells)
    for label, color, widths in parts:
        axes.barh(range(len(cells)), widths, left=left, color=color, label=label, height=0.7)
        left = [at + width for at, width in zip(left, widths, strict=True)]
    _label(axes, cells, f"{workload}: memory at the end", "MiB")
    axes.set_xlim(0, 1.05 * max(left) or 1)


def _label(axes: Axes, cells: list[Cell], title: str, unit: str) -> None:
    axes.set_title(title, fontsize=9, loc="left")
    names = [cell.driver if cell.safe else f"{cell.driver} (wrong bytes)" for cell in cells]
    axes.set_yticks(range(len(cells)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(unit, fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
