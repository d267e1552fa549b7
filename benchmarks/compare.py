"""Two files of results: which ratios have changed by more than they scatter."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Pair:
    """A benchmark in both files; None where one does not have it.

    ``verdict``: "slower" or "faster" where the spreads of the two ratios do not overlap, else "same"; "new"
    and "gone" where one is missing.
    """

    name: str
    old: float | None
    new: float | None
    change: float | None
    goal: float | None
    verdict: str

    def json(self) -> dict[str, Any]:
        return asdict(self)


def load(path: str) -> dict[str, dict[str, Any]]:
    """The results by name. ValueError: it is no file of results."""
    try:
        found = {one["name"]: one for one in json.loads(Path(path).read_text())["results"]}
        for one in found.values():
            low, high = map(float, one["spread"])
            one.update(ratio=float(one["ratio"]), spread=(low, high))
            one["goal"] = None if one["goal"] is None else float(one["goal"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: no results of `pymirror bench --json`: {error!r}") from None
    return found


def pairs(old: dict[str, dict[str, Any]], new: dict[str, dict[str, Any]]) -> list[Pair]:
    """In the order of the new file, then what only the old one has."""
    return [_pair(name, old.get(name), new.get(name)) for name in dict.fromkeys([*new, *old])]


def _pair(name: str, old: dict[str, Any] | None, new: dict[str, Any] | None) -> Pair:
    if old is None or new is None:
        there = old or new or {}
        ratios = (old and old["ratio"], new and new["ratio"])
        return Pair(name, *ratios, None, there["goal"], "new" if old is None else "gone")
    verdict = "same"
    if new["spread"][0] > old["spread"][1]:
        verdict = "slower"
    elif new["spread"][1] < old["spread"][0]:
        verdict = "faster"
    return Pair(name, old["ratio"], new["ratio"], new["ratio"] / old["ratio"], new["goal"], verdict)
