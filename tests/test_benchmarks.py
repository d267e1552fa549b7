"""The benchmarks at tiny sizes: they run, do the work, and give figures that add up. Nothing is timed."""

from __future__ import annotations

import ctypes
import errno
import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from seams import needs

import pymirror as pm
from benchmarks import cases, floors
from benchmarks.cases.fault import by_loop, by_numpy
from benchmarks.measure import Result, Samples, measure, spread_of_ratio
from benchmarks.memory import PAGE, WorkError, expect, mirrored, small_pages
from benchmarks.registry import Benchmark, Scale, Sides, only_scale, registered
from pymirror.cli import bench
from pymirror.cli.main import EXIT_FAILURE, EXIT_OK, EXIT_REFUSED, EXIT_USAGE, main

ROOT = Path(__file__).resolve().parent.parent
FLOORS = sorted(path.stem for path in floors.SOURCES.glob("*.c"))

#: What the benchmarks whose names begin so are about.
NEEDS = {
    ("fault-back", "migrate"): ("uffd_kernel", "uffd_events", "sigbus", "move", "pagemap"),
    ("gup-dma", "dma-read", "pin"): ("io_uring", "pagemap"),
}

#: The rows that every `bench --json` has, whether met or not, and the greatest ratio each may have.
GOALS = {
    "fault-warm": 1.15,
    "presence-warm": 0.9,
    "fault-warm-huge": 0.5,
    "fault-cold": 1.05,
    "fault-one-page": 4,
    "invalidate-million": 1.5,
    "idle-touch": 1.03,
    "idle-sort": 1.03,
    "idle-malloc": 1.02,
    "watched-madvise": 1.15,
    "device-read": 1.1,
    "fault-back-thread": 1.15,
    "fault-back-inline": 1.15,
    "fault-back-stream": 3,
    "migrate-4k": 1.15,
    "hmm-dma-map": 1.5,
    "bytes-per-page": 1,
    "dma-bytes-per-page": 1,
}

cases.load()


def results(capsys: pytest.CaptureFixture[str], *args: str) -> list[dict[str, object]]:
    capsys.readouterr()
    assert main(["bench", *args, "--json", "--scale", "256", "--rounds", "2"]) == EXIT_OK
    return json.loads(capsys.readouterr().out)["results"]


@pytest.mark.parametrize("name", registered())
def test_a_benchmark_runs_and_gives_sane_figures(
    name: str, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    for prefixes, features in NEEDS.items():
        if name.startswith(prefixes):
            needs(*features)
    if "hugetlb" in name:
        request.getfixturevalue("hugepages")
    (result,) = results(capsys, name)
    assert list(result) == ["name", "ours", "floor", "ratio", "spread", "goal", "unit"]
    assert result["name"] == name
    assert result["goal"] is None, "tiny sizes are not judged"
    assert result["ours"] > 0
    assert result["floor"] > 0
    assert result["ratio"] == pytest.approx(result["ours"] / result["floor"])
    low, high = result["spread"]
    assert 0 < low <= high


def test_the_fixed_rows_are_there_with_their_goals() -> None:
    known = registered()
    assert {name: known[name].goal for name in GOALS} == GOALS
    assert known["migrate-2m"].goal is not None


def test_names_may_be_patterns(capsys: pytest.CaptureFixture[str]) -> None:
    assert {one["name"] for one in results(capsys, "notifier-*")} == {"notifier-insert", "notifier-remove"}


def test_an_unknown_name_is_refused() -> None:
    assert main(["bench", "no-such"]) == EXIT_USAGE


def test_what_the_system_refuses_is_left_out_and_the_others_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: object) -> None:
        raise pm.MirrorError(errno.ENOMEM, "pin_user_pages: the limit", hint="raise it")

    monkeypatch.setattr(pm, "pin_user_pages", refuse)
    small = ["--json", "--rounds", "1", "--scale", "256"]
    assert main(["bench", "dma-debug", "gup-dma-map", *small]) == EXIT_REFUSED
    out, err = capsys.readouterr()
    measured = {one["name"] for one in json.loads(out)["results"]}
    assert measured == {"dma-debug"}
    assert err == "left out: gup-dma-map: [Errno 12] ENOMEM: pin_user_pages: the limit; do: raise it\n"


def test_the_command_prints_the_machine_and_a_table() -> None:
    command = [sys.executable, "-m", "benchmarks", "fault-one-page", "--scale", "256", "--rounds", "1"]
    done = subprocess.run([*command, "--json"], cwd=ROOT, capture_output=True, text=True, check=True)
    machine = json.loads(done.stdout)["machine"]
    assert machine["pymirror"] == pm.__version__
    assert machine["cpus"] >= 1
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "fault-one-page" in done.stdout
    assert "ratio" in done.stdout


def constant(cost: float, name: str, calls: list[str]) -> float:
    calls.append(name)
    return cost


def test_rounds_are_interleaved_after_an_uncounted_one_each() -> None:
    calls: list[str] = []
    sides = Sides(lambda: constant(3, "ours", calls), lambda: constant(2, "floor", calls))
    samples = measure(lambda: nullcontext(sides), 1, 3, primed=False)
    assert calls == ["ours", "floor"] * 4
    assert list(samples.ours) == [3, 3, 3]
    calls.clear()
    measure(lambda: nullcontext(sides), 1, 2, primed=True)
    assert calls == ["ours", "floor"] + ["ours", "ours", "floor", "floor"] * 2


@pytest.mark.parametrize(("setups", "rounds"), [(3, 7), (5, 2), (1, 1)])
def test_all_rounds_are_spread_over_the_setups(setups: int, rounds: int) -> None:
    made = []

    def setup() -> nullcontext[Sides]:
        made.append(1)
        return nullcontext(Sides(lambda: 1.0, lambda: 1.0, {"other": lambda: 2.0}))

    samples = measure(setup, setups, rounds, primed=False)
    assert len(made) == min(setups, rounds)
    assert len(samples.ours) == len(samples.floor) == len(samples.alternatives["other"]) == rounds


def test_a_result_has_medians_their_ratio_and_its_spread() -> None:
    ours, floor = np.array([2e3, 4e3, 6e3, 8e3, 100e3]), np.array([1e3, 4e3, 2e3, 4e3, 4e3])
    benchmark = Benchmark("x", "work", 1.5, "us", 5, 1, False, only_scale, lambda scale: nullcontext())
    result = Result.of(benchmark, Samples(ours, floor, {"other": ours * 2}), judged=True)
    assert (result.ours, result.floor, result.ratio) == (6, 4, 1.5)
    assert result.spread[0] < 1.5 < result.spread[1]
    assert result.alternatives == {"other": 12}
    assert result.met
    assert Result.of(benchmark, Samples(ours, floor, {}), judged=False).met is None
    assert not Result.of(benchmark, Samples(ours * 1.01, floor, {}), judged=True).met


@pytest.mark.parametrize("rounds", [1, 2, 12, 41, 200])
def test_the_ratio_lies_in_its_spread(rounds: int) -> None:
    """Also where it lies outside the quartiles of the pairs' ratios, as with sides that are both skewed."""
    rng = np.random.default_rng(rounds)
    load = rng.lognormal(sigma=1, size=rounds)
    ours, floor = load * rng.lognormal(sigma=0.5, size=rounds) * 3, load**1.5
    low, high = spread_of_ratio(ours, floor)
    assert low <= np.median(ours) / np.median(floor) <= high
    assert spread_of_ratio(ours, ours * 2) == (0.5, 0.5), "what strikes both sides is no spread"


def test_the_alternatives_of_fault_warm_find_the_same_pfns() -> None:
    needs("pfn")
    with pm.AddressSpace() as mm, pm.Mirror(mm) as mirror:
        memory = small_pages(mm, 64 * PAGE)
        memory.bytes[:: 2 * PAGE] = 1
        with mirror.range(memory.start, memory.end) as rng, open("/proc/self/pagemap", "rb") as pagemap:
            rng.snapshot()
            pagemap.seek(memory.start // PAGE * 8)
            data = pagemap.read(64 * 8)
            assert np.count_nonzero(rng.pfns) == 32
            assert list(by_numpy(data)) == list(rng.pfns)
            assert by_loop(data) == list(rng.pfns)


class Mallinfo(ctypes.Structure):
    """``struct mallinfo2``."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def allocated() -> int:
    """Bytes that malloc() has given out."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = Mallinfo
    info = mallinfo2()
    return info.uordblks + info.hblkhd


def test_what_dma_bytes_per_page_says_is_what_the_allocator_gave() -> None:
    npages, device = 16384, pm.Device("d")
    with mirrored(npages * PAGE) as (_, rng):
        out = np.empty(npages, np.uint64)
        pm.hmm_range_dma_map(rng, device, out=out)
        pm.hmm_range_dma_unmap(rng, device)
        before = allocated()
        pm.hmm_range_dma_map(rng, device, out=out)
        given, told = allocated() - before, device.domain.stats()["bytes"]
        pm.hmm_range_dma_unmap(rng, device)
    assert abs(given - told) < 4096
    assert told < npages * 16


def written(path: Path, **ratios: tuple[float, float, float]) -> str:
    """A file of results: by name the ratio in its spread."""
    results = [
        {
            "name": name,
            "ours": 1,
            "floor": 1,
            "ratio": ratio,
            "spread": [low, high],
            "goal": None,
            "unit": "us",
        }
        for name, (low, ratio, high) in ratios.items()
    ]
    path.write_text(json.dumps({"machine": {}, "results": results}))
    return str(path)


def test_two_files_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = written(tmp_path / "old", a=(1, 2, 3), b=(1, 2, 3), c=(5, 6, 7), d=(1, 1, 1))
    new = written(tmp_path / "new", e=(1, 1, 1), a=(2, 4, 5), b=(4, 5, 6), c=(1, 2, 3))
    assert main(["bench", "--compare", old, new, "--json"]) == EXIT_FAILURE
    found = json.loads(capsys.readouterr().out)
    assert [(one["name"], one["verdict"], one["change"]) for one in found] == [
        ("e", "new", None),
        ("a", "same", 2),
        ("b", "slower", 2.5),
        ("c", "faster", pytest.approx(1 / 3)),
        ("d", "gone", None),
    ]
    assert main(["bench", "--compare", new, new]) == EXIT_OK
    assert "slower" not in capsys.readouterr().out
    assert main(["bench", "--compare", old, new]) == EXIT_FAILURE
    assert "slower" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "[]", '{"results": [{"name": "a"}]}', '{"results": [1]}'])
def test_what_is_no_file_of_results_is_said(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad").write_text(text)
    good = written(tmp_path / "good", a=(1, 1, 1))
    assert main(["bench", "--compare", good, str(tmp_path / "bad")]) == EXIT_FAILURE
    assert "bad: no results of `pymirror bench --json`" in capsys.readouterr().err
    assert main(["bench", "--compare", good, str(tmp_path / "missing")]) == EXIT_REFUSED


def test_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "ratios.svg"
    # In a process of its own: matplotlib keeps its fonts open.
    command = [sys.executable, "-m", "benchmarks", "fault-one-page", "--scale", "256", "--rounds", "1"]
    subprocess.run([*command, "--plot", path], cwd=ROOT, timeout=60, check=True, capture_output=True)
    assert path.read_text().startswith("<?xml")
    assert main(["bench", "fault-one-page", "--plot", str(tmp_path / "ratios.txt")]) == EXIT_REFUSED
    assert "ends in .png or .svg" in capsys.readouterr().err


def test_outside_a_clone_the_command_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "_ROOT", tmp_path)
    assert main(["bench", "--list"]) == EXIT_REFUSED
    assert "run it in a clone" in capsys.readouterr().err


@pytest.mark.parametrize("name", FLOORS)
def test_a_floor_is_a_program_of_less_than_sixty_lines(name: str) -> None:
    assert len((floors.SOURCES / f"{name}.c").read_text().splitlines()) < 60
    assert floors.build(name).exists()


def test_a_floor_that_did_not_do_its_work_is_an_error() -> None:
    with (
        floors.floor("populate_read", 16 * PAGE, work=17) as bare,
        pytest.raises(floors.FloorError, match="16 of 17"),
    ):
        bare()


def test_a_floor_that_died_is_an_error() -> None:
    with (
        floors.floor("vm_readv", 1 << 60, PAGE, work=1 << 60) as bare,
        pytest.raises(floors.FloorError, match="died"),
    ):
        bare()


def test_a_side_that_did_not_do_its_work_is_an_error() -> None:
    with pytest.raises(WorkError, match="half"):
        expect(False, "half")


def test_scale_keeps_whole_pages_and_at_least_one() -> None:
    assert Scale(256).size(64 << 20) == 256 << 10
    assert Scale(1 << 30).size(64 << 20) == PAGE
    assert Scale(7).size(64 << 20) % PAGE == 0
    assert Scale(1 << 30).count(5) == 1
