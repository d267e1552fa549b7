"""What pydoc tells of every public name: that it tells, and of the errors that the calls give."""

from __future__ import annotations

import errno
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from calls import CALLS, OK, Call

import pymirror as pm

CLASSES = [name for name in pm.__all__ if inspect.isclass(getattr(pm, name))]
FUNCTIONS = [name for name in pm.__all__ if inspect.isroutine(getattr(pm, name))]


def members(owner: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The public methods and properties that are pymirror's own, as functions."""
    for name in dir(owner):
        if name.startswith("_"):
            continue
        home = next((base for base in owner.__mro__ if name in vars(base)), object)
        found = vars(home).get(name)
        if not home.__module__.startswith("pymirror"):
            continue
        function = found.fget if isinstance(found, property) else getattr(found, "__func__", found)
        if inspect.isroutine(function):
            yield name, function


def told(function: Callable[..., Any]) -> str:
    return inspect.getdoc(function) or ""


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_its_methods_and_properties(name: str) -> None:
    owner = getattr(pm, name)
    text = owner.__doc__ or ""
    assert text
    assert not text.startswith(f"{name}("), "a dataclass writes its signature where nothing is told"
    assert [member for member, function in members(owner) if not told(function)] == []


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function(name: str) -> None:
    assert told(getattr(pm, name))


def test_every_public_name_is_one_of_these_or_a_number() -> None:
    others = set(pm.__all__) - set(CLASSES) - set(FUNCTIONS)
    assert {name for name in others if not isinstance(getattr(pm, name), int | float | str)} == set()


@pytest.mark.parametrize("name", [*CLASSES, *FUNCTIONS])
def test_the_first_line_is_a_sentence_of_one_line(name: str) -> None:
    """It is all that pydoc and help() show in lists."""
    first, _, rest = told(getattr(pm, name)).partition("\n")
    assert not rest or rest.startswith("\n"), first
    assert first.endswith((".", ":", "?", ")")), first


def look_up(owner: str, name: str) -> str:
    """The docstring that another one refers to: of the same class, `Class.name()`, or a function."""
    place, _, member = name.rpartition(".")
    for where in (getattr(pm, place or owner, None), pm):
        if where is not None and hasattr(where, member):
            return told(getattr(where, member))
    return ""


def with_those_it_refers_to(owner: str, text: str) -> str:
    """`Errors as read_into()`: what is told there, and where that refers to, is told here."""
    names = re.findall(r"(?:\b[Aa]s|\bErrors of|\b[Ee]lse as) ([\w.]+)\(\)", text)
    return text + "".join(with_those_it_refers_to(owner, look_up(owner, name)) for name in names)


@pytest.mark.parametrize(
    "call", [call for call in CALLS if call.callback == errno.EDEADLK], ids=lambda call: call.name
)
def test_what_a_callback_may_not_call_says_so(call: Call) -> None:
    owner, _, member = call.name.partition(".")
    found = getattr(pm, owner)
    text = told(getattr(found, member) if member else found)
    assert "EDEADLK" in with_those_it_refers_to(owner, text)


def test_every_errno_that_a_docstring_names_exists() -> None:
    names = set()
    for name in (*CLASSES, *FUNCTIONS):
        texts = [told(getattr(pm, name))]
        if name in CLASSES:
            texts += [told(function) for _, function in members(getattr(pm, name))]
        names |= {word for text in texts for word in re.findall(r"\bE[A-Z]{3,}[0-9]*\b", text)}
    known = {"EDEADLK", "EOPNOTSUPP", *errno.errorcode.values()}  # Python knows two by their other names
    assert names - set(pm.Event.__members__) <= known


def test_there_are_calls_that_a_callback_may_make() -> None:
    assert {call.callback for call in CALLS} >= {OK, errno.EDEADLK}
