"""The run itself, phase by phase: map, first fault, quiet checksum, checksum under fire, drain, close."""

from __future__ import annotations

import errno
import itertools
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import pymirror as pm
from pymirror.demo.checker import Checker, DeviceThread, Work
from pymirror.demo.driver import FAULT_DEADLINE, DemoDriver
from pymirror.demo.foreign import ForeignMutator
from pymirror.demo.memory import HUGE_CHUNK, Chunk, Memory
from pymirror.demo.missing import missing_features
from pymirror.demo.mutator import Mutator
from pymirror.demo.options import Options, Stop
from pymirror.demo.pages import PageStates
from pymirror.demo.report import Phase, Report
from pymirror.demo.source import DataSource
from pymirror.demo.world import Worker, World, make_pool

DEVICE_THREADS = 2
UNDER_FIRE = "checksum under fire"
JOIN_TIMEOUT = 30.0
SYNC_TIMEOUT = 10.0
# The threads hand the GIL round all the time; with the default of 5 ms they would mostly wait for it.
SWITCH_INTERVAL = 0.0005

Progress = Callable[[str, float, str], None]


def silent(_phase: str, _fraction: float, _note: str) -> None:
    """A Progress that shows nothing."""


class Demo:
    """One run.

    `stop` may be requested at any time, by a signal handler too: the phase ends early, everything is drained
    and closed, and the report tells what was done. `progress` is called with phase, fraction and a note, in
    the caller's thread.
    """

    def __init__(self, options: Options, stop: Stop | None = None, progress: Progress = silent) -> None:
        self.options = options
        self.stop = stop or Stop()
        self.progress = progress
        self.report = Report(pm.__version__, options)

    def run(self) -> Report:
        """Run all phases. What goes wrong with memory is in report.failures; set-up errors are raised."""
        with pm.AddressSpace() as mm:
            self._run_in(mm)
        self.report.signum = self.stop.signum
        return self.report

    def _run_in(self, mm: pm.AddressSpace) -> None:
        source = DataSource(self.options.seed)
        memory = Memory(mm, source)
        device = pm.Device("d0", fault_timeout=FAULT_DEADLINE)
        pool = make_pool(self.options.seed, 2 * HUGE_CHUNK)
        try:
            with DemoDriver(mm, device) as driver:
                world = World(mm, device, driver, memory, pool, self.report.failures)
                try:
                    self._phases(world)
                finally:
                    self._account(world)
        finally:
            with self._phase("close"):
                memory.close()
                source.close()
            self.report.missing = missing_features(mm.features, memory.refused)

    def _phases(self, world: World) -> None:
        for phase in (self._map, self._first_fault, self._quiet, self._under_fire):
            phase(world)
            if self.stop.requested:
                break
        self._drain(world)

    def _map(self, world: World) -> None:
        with self._phase("map") as phase:
            self.progress("map", 0.0, "")
            for chunk in world.memory.build(self.options.size):
                phase.bytes += chunk.size
                self.progress("map", phase.bytes / self.options.size, "")
                if self.stop.requested:
                    break
        memory: Counter[str] = Counter()
        for chunk in world.memory.chunks:
            memory[chunk.kind.value] += chunk.size
        self.report.memory = dict(memory)
        self.report.from_files = world.memory.source.from_files
        self.report.generated = world.memory.source.generated

    def _first_fault(self, world: World) -> None:
        with self._phase("first fault") as phase:
            mapped = 0
            for chunk in self._each(sorted(world.memory.chunks, key=lambda chunk: chunk.addr), "first fault"):
                if chunk.end > mapped:
                    mapped = world.driver.map_window(world.mm, max(chunk.addr, mapped), chunk.end)
                phase.bytes += chunk.size
        self.report.pages["first fault"] = self._page_states(world)

    def _quiet(self, world: World) -> None:
        self._checksum_all(world, "quiet checksum")

    def _under_fire(self, world: World) -> None:
        devices, mutators = self._workers(world)
        with self._phase(UNDER_FIRE) as phase, _switch_interval(SWITCH_INTERVAL):
            try:
                for worker in (*devices, *mutators):
                    _start(worker)
                self._wait(world, devices)
            finally:
                world.running = False
                self._join(world, [*devices, *mutators])
            phase.work = Work()
            for device in devices:
                phase.work.add(device.checker.work)
            phase.bytes = phase.work.bytes
        self._tally(devices, mutators)

    def _workers(self, world: World) -> tuple[list[DeviceThread], list[Worker]]:
        seeds = ([self.options.seed, i] for i in itertools.count(1))
        chunks = world.memory.chunks
        mapped = [chunk for chunk in chunks if not chunk.kind.raw]
        raw = [chunk for chunk in chunks if chunk.kind.raw]
        devices = [DeviceThread(world, f"device-{i}", next(seeds), chunks) for i in range(DEVICE_THREADS)]
        mutators: list[Worker] = [
            Mutator(world, f"cpu-{i}", next(seeds), mapped) for i in range(self.options.threads)
        ]
        mutators.append(ForeignMutator(world, "foreign", next(seeds), raw))
        return devices, mutators

    def _wait(self, world: World, devices: list[DeviceThread]) -> None:
        """Until the time is over, a stop is requested or a thread has failed."""
        begin = time.monotonic()
        while (spent := time.monotonic() - begin) < self.options.seconds:
            if self.stop.requested or not world.running:
                return
            self.progress(UNDER_FIRE, spent / self.options.seconds, self._note(world, devices))
            time.sleep(0.05)

    def _join(self, world: World, workers: Iterable[Worker]) -> None:
        deadline = time.monotonic() + JOIN_TIMEOUT
        for worker in workers:
            if worker.ident is None:
                continue
            worker.join(max(0.0, deadline - time.monotonic()))
            if worker.is_alive():
                world.fail(f"{worker.name} hangs\n{world.mm.dump()}")
                world.memory.abandon()

    def _note(self, world: World, devices: list[DeviceThread]) -> str:
        checked = sum(device.checker.work.bytes for device in devices)
        events = sum(dict(world.driver.events).values())
        return (
            f"{checked / 1e6:,.0f} MB checksummed, {events:,} invalidations, {len(world.failures)} failures"
        )

    def _drain(self, world: World) -> None:
        """Wait for the callbacks of all events, then compare everything once more."""
        with self._phase("drain"):
            world.mm.sync(timeout=SYNC_TIMEOUT)
        if not world.failures and not self.stop.requested:
            self._checksum_all(world, "final checksum")
            self.report.pages["end"] = self._page_states(world)

    def _checksum_all(self, world: World, name: str) -> None:
        checker = Checker(world)
        with self._phase(name) as phase:
            for chunk in self._each(world.memory.chunks, name):
                with chunk.lock:
                    checker.check(chunk)
            phase.work = checker.work
            phase.bytes = checker.work.bytes

    def _page_states(self, world: World) -> dict[str, PageStates]:
        zero_pfn = world.mm.features.zero_pfn or None
        states: dict[str, PageStates] = {}
        for chunk in world.memory.chunks:
            with chunk.lock:
                pfns = world.driver.snapshot(chunk).pfns
            states.setdefault(chunk.kind.value, PageStates()).count(pfns, zero_pfn)
        return states

    def _tally(self, devices: list[DeviceThread], mutators: list[Worker]) -> None:
        operations: dict[str, Counter[str]] = {"api": Counter(), "raw": Counter(), "device": Counter()}
        for worker in (*devices, *mutators):
            group = {DeviceThread: "device", ForeignMutator: "raw"}.get(type(worker), "api")
            operations[group].update(worker.tally)
        refused: Counter[str] = Counter()
        for counter in operations.values():
            for key in [key for key in counter if key.endswith("_refused")]:
                refused[key] += counter.pop(key)
        self.report.operations = {group: dict(counter.most_common()) for group, counter in operations.items()}
        self.report.refused = dict(refused)

    def _account(self, world: World) -> None:
        """What driver, device and address space have counted; callback errors are failures."""
        driver, report, stats = world.driver, self.report, world.device.stats
        report.events = dict(driver.events)
        report.faults = dict(driver.faults)
        report.retries = {
            key: driver.retries[key] for key in ("EAGAIN", "EBUSY", "map_refused", "window_halved")
        }
        report.device = {
            "pages_mapped": driver.pages_mapped,
            "entries_cleared": driver.entries_cleared,
            "reads_redone": stats.redone,
            "changes_detected": stats.detected,
        }
        report.stale = stats.stale
        for error in list(world.mm.errors):
            world.fail(f"a callback went wrong: {error}")

    @contextmanager
    def _phase(self, name: str) -> Iterator[Phase]:
        phase = Phase(name, 0.0)
        begin = time.perf_counter()
        try:
            yield phase
        finally:
            phase.seconds = time.perf_counter() - begin
            self.report.phases.append(phase)

    def _each(self, chunks: list[Chunk], name: str) -> Iterator[Chunk]:
        """The chunks, with progress, until a stop is requested."""
        for i, chunk in enumerate(chunks):
            if self.stop.requested:
                return
            self.progress(name, i / len(chunks), "")
            yield chunk


def _start(worker: Worker) -> None:
    try:
        worker.start()
    except RuntimeError as error:
        raise OSError(
            errno.EAGAIN, f"{error}: the limit of processes or of memory (ulimit -u, -v)"
        ) from error


@contextmanager
def _switch_interval(seconds: float) -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(seconds)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
