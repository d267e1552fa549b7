"""Replay of recorded scenarios: the same steps on this host's memory, compared with a real kernel."""

from .engine import Result, Summary, play, play_all
from .evidence import RawPage, describe, read_pages
from .scenario import FIELDS, FormatError, Scenario, load

__all__ = [
    "FIELDS",
    "FormatError",
    "RawPage",
    "Result",
    "Scenario",
    "Summary",
    "describe",
    "load",
    "play",
    "play_all",
    "read_pages",
]
