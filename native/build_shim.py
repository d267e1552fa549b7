"""The cffi builder of pymirror._shim: declarations from pymirror.h, code from the C files beside it.

setuptools calls it from the project's root (see setup.py). `--requires` prints what pyproject.toml wants for
a build, one requirement a line. Environment: PYMIRROR_CFLAGS and PYMIRROR_LDFLAGS add compiler and linker
options, PYMIRROR_WERROR=1 turns warnings into errors.
"""

import os
import re
import shlex
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NATIVE = ROOT / "native"

CFLAGS = ["-std=c11", "-D_GNU_SOURCE", "-O2", "-g", "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra"]
# The file that cffi writes names no parameter it does not need and leaves the ends of its tables out.
GENERATED_CODE = ["-Wno-unused-parameter", "-Wno-missing-field-initializers"]


def version() -> str:
    text = (ROOT / "pymirror" / "_version.py").read_text()
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if found is None:
        raise SystemExit("pymirror/_version.py: no __version__")
    return found.group(1)


def declarations() -> str:
    """pymirror.h without its preprocessor lines, which cffi's parser does not take."""
    text = (NATIVE / "pymirror.h").read_text()
    return re.sub(r"^[ \t]*#(?:.*\\\n)*.*$", "", text, flags=re.MULTILINE)


def sources() -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in NATIVE.glob("*.c"))


def flags(name: str) -> list[str]:
    return shlex.split(os.environ.get(name, ""))


def builder() -> Any:
    import cffi

    ffi = cffi.FFI()
    ffi.cdef(declarations())
    werror = ["-Werror"] if os.environ.get("PYMIRROR_WERROR") == "1" else []
    ffi.set_source(
        "pymirror._shim",
        '#include "pymirror.h"',
        sources=sources(),
        depends=sorted(str(path.relative_to(ROOT)) for path in NATIVE.glob("*.h")),
        include_dirs=["native"],
        define_macros=[("PM_VERSION_STRING", f'"{version()}"')],
        extra_compile_args=[*CFLAGS, *GENERATED_CODE, *werror, *flags("PYMIRROR_CFLAGS")],
        extra_link_args=["-pthread", *flags("PYMIRROR_LDFLAGS")],
    )
    return ffi


if sys.argv[1:] == ["--requires"]:
    print("\n".join(tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]))
else:
    ffi = builder()
