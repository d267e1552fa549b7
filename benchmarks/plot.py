"""The ratios of a run as a picture, by matplotlib (the extra "plot")."""

from __future__ import annotations

from typing import Any

from pymirror.study.plot import check_format

__all__ = ["check_format", "save"]

_MET, _MISSED, _NO_GOAL = "#228833", "#cc3311", "#777777"


def save(found: dict[str, Any], path: str) -> None:
    """A line a benchmark: its ratio, the spread of it, and its goal. PNG or SVG by the name."""
    from matplotlib.figure import Figure

    results = found["results"]
    figure = Figure(figsize=(8, 1.2 + 0.24 * len(results)), layout="constrained")
    axes = figure.subplots()
    for place, one in enumerate(results):
        low, high = one["spread"]
        axes.plot([low, high], [place, place], color=_color(one), linewidth=3, alpha=0.4)
        axes.plot(one["ratio"], place, "o", color=_color(one))
        if one["goal"] is not None:
            axes.plot(one["goal"], place, "|", color="black", markersize=11)
    axes.axvline(1, color="#bbbbbb", linewidth=1, zorder=0)
    axes.set_xscale("log")
    axes.set_yticks(range(len(results)), [one["name"] for one in results], fontsize=8)
    axes.set_ylim(len(results) - 0.5, -0.5)
    axes.set_xlabel("times the floor; bar: 95 %, tick: goal")
    machine = found["machine"]
    axes.set_title(
        f"Linux {machine['kernel']}, {machine['cpus']} CPUs, load {machine['load']:.1f}", fontsize=9
    )
    figure.savefig(path, dpi=110)


def _color(one: dict[str, Any]) -> str:
    if one["goal"] is None:
        return _NO_GOAL
    return _MET if one["ratio"] <= one["goal"] else _MISSED
