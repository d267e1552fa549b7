"""Imports go downward only, in the layers below, and none runs in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "pymirror"

#: From the bottom; the parts of one may import each other. A name with a dot at its end is a whole folder.
LAYERS: dict[str, tuple[str, ...]] = {
    "native code, errors, and what knows of no memory": (
        "_shim",
        "_version",
        "arguments",
        "encoding",
        "errors",
        "event",
        "exporter",
        "features",
        "history",
        "interpreter",
        "lock",
        "pfn",
        "refusals",
        "stale_sequence",
        "trace",
        "trace_file",
        "waiting",
    ),
    "mm: regions, vmas, operations": (
        "adopt",
        "affected",
        "mapping",
        "mm_base",
        "operation",
        "ops",
        "other_userfaultfd",
        "pin_registry",
        "region",
        "vma",
    ),
    "notifier": (
        "callback",
        "delivery",
        "dispatcher",
        "forking",
        "notifier",
        "notifier_set",
    ),
    "the address space, of these": ("dump", "mm"),
    "dma": ("dma.", "range_base"),
    "hmm, gup, migrate": (
        "device_memory",
        "exclusive",
        "gup",
        "gup_dma",
        "gup_flags",
        "gup_pinning",
        "hmm",
        "hmm_dma",
        "hmm_dma_map",
        "hmm_mirror",
        "hmm_range",
        "hmm_series",
        "migrate",
        "migrate_device",
        "migrate_pfn",
        "migrate_vma",
        "walk",
    ),
    "device": ("device", "device_fault", "fault_buffer", "page_table"),
    "the public face": ("__init__",),
    "drivers": ("drivers.",),
    "programs": ("demo.", "doctor.", "inspection.", "replay.", "study."),
    "cli": ("cli.",),
}
PLACES = {part: level for level, parts in enumerate(LAYERS.values()) for part in parts}


def modules() -> dict[str, Path]:
    """By name, of a package with `__init__`."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        found[".".join(path.relative_to(PACKAGE).with_suffix("").parts)] = path
    found["_shim"] = PACKAGE / "_shim.pyi"
    return found


MODULES = modules()


def level(name: str) -> int:
    head, dot, _ = name.partition(".")
    return PLACES[head + dot]


def statements(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Those that run: not what only type checkers see."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for one in node.orelse:
                yield from statements(ast.Module([one], []))
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        else:
            yield from statements(node)


def named(module: str) -> str:
    """Of a package its `__init__`."""
    return module if module in MODULES else f"{module}.__init__" if module else "__init__"


def targets(name: str, node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    if isinstance(node, ast.Import):
        names = [
            one.name.removeprefix("pymirror").lstrip(".")
            for one in node.names
            if one.name.startswith("pymirror")
        ]
        yield from map(named, names)
        return
    base = ["pymirror", *name.split(".")][: -node.level] if node.level else []
    full = ".".join([*base, *([node.module] if node.module else [])])
    if full.partition(".")[0] != "pymirror":
        return
    inside = full.removeprefix("pymirror").lstrip(".")
    for one in node.names:
        part = f"{inside}.{one.name}".lstrip(".")
        yield part if part in MODULES else named(inside)


@cache
def imports(name: str) -> frozenset[str]:
    if name == "_shim":
        return frozenset()
    tree = ast.parse(MODULES[name].read_text())
    return frozenset(one for node in statements(tree) for one in targets(name, node)) - {name}


def test_every_module_has_a_layer() -> None:
    heads = {name.partition(".")[0] + name.partition(".")[1] for name in MODULES}
    assert heads == set(PLACES)


def test_nothing_imports_upward() -> None:
    upward = [
        f"{name} imports {one}" for name in MODULES for one in imports(name) if level(one) > level(name)
    ]
    assert upward == []


def test_no_import_is_part_of_a_circle() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " imports ".join((*path[path.index(name) :], name))
        if name in done:
            return
        for one in imports(name):
            visit(one, (*path, name))
        done.add(name)

    for name in MODULES:
        visit(name, ())


def test_what_imports_is_found() -> None:
    assert {"hmm_range", "walk"} <= imports("page_table")
    assert "cli.main" in imports("cli.inspect")
    assert "mm" not in imports("notifier")  # for type checkers only
