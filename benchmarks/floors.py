"""The floors: C programs of floor/ compiled with the shim's flags, children that do a round on request.

And timed.c, the loops that our side has timed in C, as a library.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from benchmarks.registry import Side

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "benchmarks" / "floor"
OUT = ROOT / "build" / "floor"


class FloorError(RuntimeError):
    """A floor could not be built, died, or did not do all of its work."""


@cache
def shim_flags() -> tuple[str, ...]:
    spec = importlib.util.spec_from_file_location("build_shim", ROOT / "native" / "build_shim.py")
    assert spec is not None
    assert spec.loader is not None
    build_shim = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build_shim)
    return tuple(build_shim.CFLAGS)


@cache
def build(name: str) -> Path:
    """The program, compiled anew: it takes a tenth of a second, and is then never out of date."""
    return _compile(SOURCES / f"{name}.c", name)


@cache
def timed() -> ctypes.CDLL:
    """The loops of timed.c. What they return is 64 bits wide, addresses are ints."""
    library = ctypes.CDLL(
        str(_compile(ROOT / "benchmarks" / "timed.c", "timed.so", "-shared", "-fPIC", "-fvisibility=default"))
    )
    word = ctypes.c_uint64
    loops = {"touches": 3, "copy": 4, "removes": 2, "writes": 2, "churn": 1, "check": 3}
    for name, arguments in loops.items():
        function = getattr(library, f"timed_{name}")
        function.restype, function.argtypes = word, [word] * arguments
    return library


def _compile(source: Path, name: str, *options: str) -> Path:
    OUT.mkdir(parents=True, exist_ok=True)
    program = OUT / f"{name}.{os.getpid()}"
    command = [*shlex.split(os.environ.get("CC", "cc")), *shim_flags(), "-Werror", *options]
    command += [f"-I{ROOT / 'native'}", "-o", str(program), str(source)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise FloorError(f"{shlex.join(command)}\n{done.stderr}")
    return program.replace(OUT / name)


@contextmanager
def floor(name: str, *args: int, work: int, per: int = 1) -> Iterator[Side]:
    """One round of the program a call, in nanoseconds, divided by ``per``.

    ``work`` is what a round must report to have done: pages found present, bytes copied, calls made.
    """
    with _child(name, [str(build(name)), *map(str, args)], work, per) as one_round:
        yield one_round


@contextmanager
def program(work: str, size: int, *, watched: bool, done: int) -> Iterator[Side]:
    """The same of the Python program idle.py, whose memory is watched or not."""
    command = [sys.executable, "-m", "benchmarks.idle", work, str(size), str(int(watched))]
    with _child(work, command, done, 1) as one_round:
        yield one_round


@contextmanager
def _child(name: str, command: list[str], work: int, per: int) -> Iterator[Side]:
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        requests, answers = child.stdin.fileno(), child.stdout

        def one_round() -> float:
            with suppress(BrokenPipeError):
                os.write(requests, b"\n")
            answer = answers.readline().split()
            if not answer:
                raise FloorError(f"{name} died")
            ns, done = map(int, answer)
            if done != work:
                raise FloorError(f"{name} did {done} of {work}")
            return ns / per

        try:
            yield one_round
        finally:
            child.kill()
