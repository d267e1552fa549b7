# SPDX-License-Identifier: MIT
"""Random steps on device memory against the model of machine_device_memory.py, by both deliveries.

PYMIRROR_STRESS=N runs N times as many examples; with CI set they are the same ones every time.
"""

from __future__ import annotations

import os

import pytest
import tally
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from machine_device_memory import DeviceMemoryMachine
from seams import needs

STRESS = int(os.environ.get("PYMIRROR_STRESS", "1"))
SETTINGS = settings(
    max_examples=30 * STRESS,
    stateful_step_count=40,
    deadline=None,
    derandomize="CI" in os.environ,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)


class Inline(DeviceMemoryMachine):
    delivery = "inline"


class Copying(DeviceMemoryMachine):
    off = ("move",)


@pytest.mark.root
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
@pytest.mark.parametrize(
    "machine", [DeviceMemoryMachine, Inline, Copying], ids=["thread", "inline", "copying"]
)
@pytest.mark.timeout(120 * STRESS)
def test_device_memory_behaves_as_the_model(machine: type[DeviceMemoryMachine]) -> None:
    needs("uffd_kernel", "sigbus", "move", "uffd_events", "event_fork", "wp_async", "pagemap")
    with tally.timed("steps on device memory"):
        run_state_machine_as_test(machine, settings=SETTINGS)
