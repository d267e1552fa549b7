"""`pymirror completion`: scripts for the TAB key of bash, zsh and fish.

Made from the parser itself, once, and not asked of it at every TAB: importing the package takes some tenths
of a second.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pymirror.cli.main import EXIT_OK, build_parser

_FILES = "FILE"


@dataclass(frozen=True, slots=True)
class Argument:
    """An option (``flags``) or a positional (no flags). ``value``: what it takes, "" for nothing."""

    flags: tuple[str, ...]
    value: str
    choices: tuple[str, ...]
    help: str

    @property
    def takes_files(self) -> bool:
        return self.value == _FILES


@dataclass(frozen=True, slots=True)
class Subcommand:
    name: str
    help: str
    arguments: tuple[Argument, ...]

    @property
    def options(self) -> Iterator[Argument]:
        return (one for one in self.arguments if one.flags)

    @property
    def positionals(self) -> Iterator[Argument]:
        return (one for one in self.arguments if not one.flags)


class CompletionCommand:
    """Print a script that makes the TAB key know pymirror's commands and options.

    Argument: the shell: bash, zsh or fish.

    examples:
      pymirror completion bash > ~/.local/share/bash-completion/completions/pymirror
      pymirror completion zsh > ~/.zfunc/_pymirror      # with fpath+=~/.zfunc before compinit
      pymirror completion fish > ~/.config/fish/completions/pymirror.fish
      source <(pymirror completion bash)                # in this bash only
    """

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("shell", metavar="SHELL", choices=sorted(SCRIPTS), help="bash, zsh or fish")

    def run(self, args: argparse.Namespace) -> int:
        own, commands = _described(build_parser())
        sys.stdout.write(SCRIPTS[args.shell](own, commands))
        return EXIT_OK


def _described(parser: argparse.ArgumentParser) -> tuple[Subcommand, list[Subcommand]]:
    """The program's own options, and its commands."""
    own: list[Argument] = []
    commands: list[Subcommand] = []
    for action in parser._actions:
        if not isinstance(action, argparse._SubParsersAction):
            own.append(_argument(action))
            continue
        helps = {one.dest: one.help or "" for one in action._choices_actions}
        for name, sub in action.choices.items():
            arguments = tuple(_argument(one) for one in sub._actions)
            commands.append(Subcommand(name, helps[name], arguments))
    return Subcommand("", "", tuple(own)), commands


def _argument(action: argparse.Action) -> Argument:
    takes = action.nargs != 0
    value = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    choices = tuple(map(str, action.choices or ()))
    return Argument(tuple(action.option_strings), value if takes else "", choices, action.help or "")


def _words(command: Subcommand) -> list[str]:
    flags = [flag for one in command.options for flag in one.flags]
    return [*flags, *(choice for one in command.positionals for choice in one.choices)]


def _bash(own: Subcommand, commands: list[Subcommand]) -> str:
    names = "|".join(command.name for command in commands)
    lines = [
        "# bash completion of pymirror",
        "_pymirror() {",
        "    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]} command= i",
        "    COMPREPLY=()",
        "    for ((i = 1; i < COMP_CWORD; i++)); do",
        "        case ${COMP_WORDS[i]} in",
        f"        {names}) command=${{COMP_WORDS[i]}} && break ;;",
        "        esac",
        "    done",
        "    case $command:$prev in",
        *_bash_values([own, *commands]),
        "    esac",
        "    case $command in",
        f"    '') {_compgen([*(command.name for command in commands), *_words(own)])} ;;",
        *_bash_commands(commands),
        "    esac",
        "}",
        "complete -F _pymirror pymirror",
    ]
    return "\n".join(lines) + "\n"


def _compgen(words: list[str]) -> str:
    return f'COMPREPLY=($(compgen -W {shlex.quote(" ".join(words))} -- "$cur"))'


def _bash_values(commands: list[Subcommand]) -> Iterator[str]:
    """What follows an option that takes a value."""
    for command in commands:
        for option in command.options:
            if not option.value:
                continue
            pattern = "|".join(f"{command.name}:{flag}" for flag in option.flags)
            then = "compopt -o default" if option.takes_files else ":"
            yield f"    {pattern}) {_compgen(list(option.choices)) if option.choices else then}; return ;;"


def _bash_commands(commands: list[Subcommand]) -> Iterator[str]:
    for command in commands:
        yield f"    {command.name})"
        if any(one.takes_files for one in command.positionals):
            yield "        [[ $cur == -* ]] || { compopt -o default; return; }"
        yield f"        {_compgen(_words(command))} ;;"


def _zsh(own: Subcommand, commands: list[Subcommand]) -> str:
    lines = [
        "#compdef pymirror",
        "_pymirror() {",
        "    local state line",
        "    typeset -A opt_args",
        "    local -a commands=(",
        *(f"        {shlex.quote(_zsh_plain(one.name) + ':' + one.help)}" for one in commands),
        "    )",
        f"    _arguments -C {' '.join(_zsh_options(own))} '1:command:->command' '*::argument:->argument'",
        "    case $state in",
        "    command) _describe command commands ;;",
        "    argument)",
        "        case $line[1] in",
        *(f"        {one.name}) _arguments {' '.join(_zsh_options(one))} ;;" for one in commands),
        "        esac ;;",
        "    esac",
        "}",
        'if [ "$funcstack[1]" = _pymirror ]; then _pymirror "$@"; else compdef _pymirror pymirror; fi',
    ]
    return "\n".join(lines) + "\n"


def _zsh_plain(text: str) -> str:
    for char in "\\:[]":
        text = text.replace(char, f"\\{char}")
    return text


def _zsh_options(command: Subcommand) -> Iterator[str]:
    for one in command.options:
        others = f"({' '.join(one.flags)})" if len(one.flags) > 1 else ""
        for flag in one.flags:
            yield shlex.quote(f"{others}{flag}[{_zsh_plain(one.help)}]{_zsh_value(one)}")
    for one in command.positionals:
        yield shlex.quote(f"*{_zsh_value(one)}")


def _zsh_value(one: Argument) -> str:
    if not one.value:
        return ""
    action = f"({' '.join(one.choices)})" if one.choices else "_files" if one.takes_files else " "
    return f":{_zsh_plain(one.value)}:{action}"


def _fish(own: Subcommand, commands: list[Subcommand]) -> str:
    lines = ["# fish completion of pymirror", "complete -c pymirror -f"]
    lines += [_fish_line("__fish_use_subcommand", one) for one in own.options]
    for command in commands:
        name, text = shlex.quote(command.name), _fish_quote(command.help)
        lines.append(f"complete -c pymirror -n __fish_use_subcommand -a {name} -d {text}")
        there = f"__fish_seen_subcommand_from {command.name}"
        lines += [_fish_line(there, one) for one in command.arguments]
    return "\n".join(lines) + "\n"


def _fish_line(condition: str, one: Argument) -> str:
    parts = ["complete -c pymirror -n", _fish_quote(condition)]
    parts += [f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}" for flag in one.flags]
    if one.flags and one.value:
        parts.append("-r")
    if one.takes_files:
        parts.append("-F")
    if one.choices:
        parts.append(f"-a {_fish_quote(' '.join(one.choices))}")
    return " ".join([*parts, f"-d {_fish_quote(one.help)}"])


def _fish_quote(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


SCRIPTS: dict[str, Callable[[Subcommand, list[Subcommand]], str]] = {
    "bash": _bash,
    "zsh": _zsh,
    "fish": _fish,
}
