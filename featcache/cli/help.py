"""Help pages: sections of two columns, in colour on a terminal, whole at any width.

Typer draws boxes whose columns are too narrow to read where a command has many options. Here the
right column begins at the same place in every section, and a name that is too long for the left
one has a line of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from inspect import cleandoc
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

# Sections that several commands have; they follow what is a command's own.
BACKBONE, ENGINE, IMAGES, RESULTS = _SHARED = "Backbone", "Engine", "Images", "Results"

_MAX_WIDTH = 100  # longer lines are hard to read
_LEFT = 26  # columns for names where there is room
_MORE = "More"  # the section of a command that is in no section

# What the parser calls the kind of a value, and what help calls it.
_KINDS = {"int": "N", "int range": "N", "float": "X", "float range": "X", "path": "PATH"}
_KINDS |= {"str": "TEXT", "list[Path]": "PATH"}

_Row = tuple[str, str, str]


class HelpfulCommand(TyperCommand):
    """A command whose help page is drawn here."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the page."""
        formatter.write(_page(self, ctx))


class HelpfulGroup(TyperGroup):
    """Commands in sections: the table of contents, with an example of each.

    Attributes
    ----------
    contents : mapping of str to sequence of str
        Section to the names of its commands, in the order in which one meets them.
    """

    contents: Mapping[str, Sequence[str]] = {}

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the commands' names, those of no section last."""
        listed = [name for names in self.contents.values() for name in names]
        known = super().list_commands(ctx)
        return [name for name in listed if name in known] + sorted({*known} - {*listed})

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the table of contents."""
        formatter.write(_page(self, ctx, _commands(self, ctx)))


def _commands(group: HelpfulGroup, ctx: Any) -> dict[str, list[_Row]]:
    """Return the rows of each section: a command, what it does, an example."""
    section_of = {name: section for section, names in group.contents.items() for name in names}
    sections: dict[str, list[_Row]] = {}
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        if command is not None and not command.hidden:
            summary, *others = _paragraphs(command.help)
            examples = (text[len("Example: ") :] for text in others if text.startswith("Example: "))
            example = next((f"$ {text}" for text in examples), "")
            sections.setdefault(section_of.get(name, _MORE), []).append((name, summary, example))
    return sections


def _page(command: Any, ctx: Any, commands: Mapping[str, list[_Row]] | None = None) -> str:
    console = Console(highlight=False, markup=False, emoji=False)
    console.width = min(console.width, _MAX_WIDTH)
    with console.capture() as captured:
        console.print(Text(" ".join(command.get_usage(ctx).split()), style="bold"))
        for paragraph in _paragraphs(command.help):
            console.print()
            console.print(Text(paragraph))
        for section, rows in (commands or {}).items():
            longest = max(len(name) for rows in (commands or {}).values() for name, _, _ in rows)
            _print_section(console, section, rows, longest, "\n")
        for section, rows in _parameters(command, ctx).items():
            _print_section(console, section, rows, min(_LEFT, console.width // 3), "  ")
        if command.epilog:
            console.print()
            console.print(Text(cleandoc(command.epilog)))
    return re.sub(r" +$", "", captured.get(), flags=re.MULTILINE).rstrip("\n")


def _paragraphs(text: str | None) -> list[str]:
    """Return the paragraphs of a docstring, unbroken and without rich's markup."""
    plain = (Text.from_markup(part).plain for part in cleandoc(text or "").split("\n\n"))
    return [" ".join(part.split()) for part in plain]


def _parameters(command: Any, ctx: Any) -> dict[str, list[_Row]]:
    """Return the rows of each section: names, what they mean, default and range."""
    sections: dict[str, list[_Row]] = {}
    for parameter in command.get_params(ctx):
        record = parameter.get_help_record(ctx)
        if record is None:
            continue
        names = re.sub(r"<([^>]+)>", lambda kind: _KINDS.get(kind[1], kind[1]), record[0])
        is_argument = parameter.param_type_name == "argument"
        if is_argument:
            names = names.split(" ")[0]
        text, _, extra = record[1].partition("  [")
        section = getattr(parameter, "rich_help_panel", None)
        section = section or ("Arguments" if is_argument else "Options")
        row = (names, text, _in_words(extra.removesuffix("]")))
        sections.setdefault(section, []).append(row)
    own = [name for name in sections if name not in _SHARED]
    return {name: sections[name] for name in (*own, *_SHARED) if name in sections}


def _in_words(extra: str) -> str:
    """Return ``default: (the newest); x>=1`` as ``[default: the newest; at least 1]``."""
    extra = re.sub(r"default: \((.*?)\)(?=;|$)", r"default: \1", extra)
    extra = re.sub(r"; 0<=x<=\d{9,}", "", extra)  # the range of any whole number
    extra = re.sub(r"(\S+?)<=x<=(\S+)", r"\1 to \2", extra)
    extra = re.sub(r"x>=(\S+)", r"at least \1", extra)
    return f"[{extra}]" if extra else ""


def _print_section(
    console: Console, title: str, rows: Sequence[_Row], left: int, between: str
) -> None:
    """Print a title and rows of two columns; ``between`` separates text and what is dim."""
    console.print()
    console.print(Text(title, style="bold"))
    for names, text, extra in rows:
        right = Text(text).append(between if extra and text else "").append(extra, style="dim")
        line = Table.grid(padding=(0, 2, 0, 0))
        line.add_column(width=left + 2, no_wrap=True)
        line.add_column(overflow="fold")
        shown = Text(f"  {names}", style="cyan")
        if len(shown) > left + 2:
            console.print(shown)
            shown = Text()
        line.add_row(shown, right)
        console.print(line)
