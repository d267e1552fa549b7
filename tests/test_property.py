"""Random operations on real memory, in any order, against the model of an address space.

PYMIRROR_STRESS=N runs N times as many examples; with CI set they are the same ones every time.
"""

from __future__ import annotations

import os

import pytest
import tally
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, run_state_machine_as_test
from machine_changes import ChangeSteps
from machine_cpu import CpuSteps
from machine_devices import DeviceSteps
from machine_library import LibrarySteps
from machine_mapping import MappingSteps
from machine_mremap import MremapSteps

from pymirror.replay.hugepages import overcommit

STRESS = int(os.environ.get("PYMIRROR_STRESS", "1"))
EXAMPLES, STEPS = 40, 50
HUGE_PAGES = 64


class AddressSpaceMachine(
    MappingSteps, ChangeSteps, MremapSteps, CpuSteps, DeviceSteps, LibrarySteps, RuleBasedStateMachine
):
    """All the steps; what must hold after each of them is in model_world.py."""

    @invariant()
    def what_must_hold(self) -> None:
        tally.add("steps on an address space", steps=1)
        self.world.check(self.touched)
        self.touched = []

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.close()


@pytest.mark.timeout(120 * STRESS)
def test_the_address_space_behaves_as_the_model() -> None:
    with overcommit(HUGE_PAGES), tally.timed("steps on an address space"):
        run_state_machine_as_test(AddressSpaceMachine, settings=SETTINGS)


SETTINGS = settings(
    max_examples=EXAMPLES * STRESS,
    stateful_step_count=STEPS,
    deadline=None,
    derandomize="CI" in os.environ,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
