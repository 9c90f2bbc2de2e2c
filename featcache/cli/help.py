"""Help pages: the parser's own, with options and commands in named sections.

Typer's boxes leave the text of an option too narrow to read where a command has many options, so
the pages are those of its plain formatter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import cleandoc
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

# Sections that several commands share; they come after a command's own.
_SHARED = ("Backbone", "Preprocessing", "Engine", "Images", "Results")
BACKBONE, PIXELS, ENGINE, IMAGES, RESULTS = _SHARED

_MOST_NAMES = 26  # columns; a longer name has a line of its own

_Row = tuple[str, str]


class HelpfulCommand(TyperCommand):
    """A command with its options in sections."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the sections of options."""
        _write_sections(formatter, _options(self, ctx))


class HelpfulGroup(TyperGroup):
    """Commands in sections, with an example of each.

    Attributes
    ----------
    contents : mapping of str to sequence of str
        Section to the names of its commands.
    """

    contents: Mapping[str, Sequence[str]] = {}

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the commands' names in the order of the sections."""
        listed = [name for names in self.contents.values() for name in names]
        return sorted(super().list_commands(ctx), key=listed.index)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the sections of commands, and the options."""
        sections: dict[str, list[_Row]] = {}
        for section, names in self.contents.items():
            for name in names:
                summary, example = _summary_and_example(self.commands[name].help)
                sections.setdefault(section, []).extend([(name, summary), ("", f"$ {example}")])
        _write_sections(formatter, sections | _options(self, ctx))


def _options(command: Any, ctx: Any) -> dict[str, list[_Row]]:
    """Return the rows of each section of options: name and text."""
    sections: dict[str, list[_Row]] = {}
    for parameter in command.get_params(ctx):
        row = parameter.get_help_record(ctx)
        if row is not None:
            section = getattr(parameter, "rich_help_panel", None)
            section = section or f"{parameter.param_type_name.capitalize()}s"
            sections.setdefault(section, []).append(row)
    own = [name for name in sections if name not in _SHARED]
    return {name: sections[name] for name in (*own, *_SHARED) if name in sections}


def _summary_and_example(text: str | None) -> tuple[str, str]:
    """Return the first paragraph of a command's docstring, and its example."""
    paragraphs = [" ".join(part.split()) for part in cleandoc(text or "").split("\n\n")]
    example = next(part for part in paragraphs if part.startswith("Example: "))
    return paragraphs[0], example[len("Example: ") :]


def _write_sections(formatter: Any, sections: Mapping[str, Sequence[_Row]]) -> None:
    for title, rows in sections.items():
        with formatter.section(typer.style(title, bold=True)):
            coloured = [(name and typer.style(name, fg="cyan"), text) for name, text in rows]
            formatter.write_dl(coloured, col_max=_MOST_NAMES)
