# SPDX-License-Identifier: MIT
"""A study as one JSON object."""

from __future__ import annotations

from typing import Any

from .ranking import rank
from .results import Report
from .verdict import verdict


def to_json(report: Report) -> dict[str, Any]:
    """What `pymirror study --json` prints."""
    return {
        "version": report.version,
        "options": report.options.to_json(),
        "machine": report.machine.to_json(),
        "seconds": report.seconds,
        "cells": [cell.to_json(report.options) for cell in report.cells],
        "ranking": {
            workload: [
                {"driver": one.cell.driver, "place": one.place, "by": one.by}
                for one in rank(report.of(workload), report.options)
            ]
            for workload in report.workloads
        },
        "says": {workload: verdict(report, workload) for workload in report.workloads},
    }
