"""Printing: results on standard output, notes and progress on standard error."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from ..errors import RecipeError, visible, visible_line
from ..progress import OnProgress, Progress

if TYPE_CHECKING:
    from ..doctor import Finding
    from ..extraction.result import ExtractResult
    from ..finetuning.fit import FitResult
    from ..store.cache import Cache


T = TypeVar("T")

_LINE_EVERY_S = 5.0
_BRIEF_S = 1.0  # a shorter stage needs no line in a log
_READABLE = 100  # columns; wider text is hard to read


class _Safe(Console):
    """A console that writes control characters out, whichever text, table or bar they are in.

    Names of files, classes and runs are foreign: an escape sequence in one could rewrite what a
    terminal shows. rich's own sequences are styles and control segments, and are not text.
    """

    def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
        """Return the segments of a renderable."""
        for part in super().render(renderable, options):
            if "…" in part.text and not self.encoding.startswith("utf"):  # where a cell is cut off
                part = Segment(part.text.replace("…", "~"), part.style)
            if part.control or part.text.isprintable():
                yield part
            else:
                yield Segment(visible(part.text), part.style)


class _Results(_Safe):
    """Standard output; `main` handles a reader that has gone away."""

    def on_broken_pipe(self) -> None:
        """Raise, where rich would exit with a code of its own."""
        raise BrokenPipeError


# Names of files and classes are data, so their square brackets and colons are no markup. Tables
# written to a pipe take the width they need, unless COLUMNS sets one.
_plain: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
_has_width = sys.stdout.isatty() or "COLUMNS" in os.environ
_results = _Results(width=None if _has_width else 160, **_plain)
_messages = _Safe(stderr=True, **_plain)


def width() -> int:
    """Return the width of standard output in columns."""
    return _results.width


def encoding() -> str:
    """Return the encoding of standard output."""
    return _results.encoding


def show(
    result: T, as_json: bool, view: Callable[[T], Any], facts: Callable[[T], Any] | None = None
) -> None:
    """Print a result: as JSON (its fields, or ``facts`` of it), or as ``view`` shows it."""
    if as_json:
        plain = facts(result) if facts else result
        plain = list(map(_fields, plain)) if isinstance(plain, list) else _fields(plain)
        print(json.dumps(_finite(plain), default=str, allow_nan=False))
        return
    shown = view(result)
    for item in shown if isinstance(shown, list) else [shown]:
        _results.print(item, soft_wrap=isinstance(item, str))


def _fields(value: Any) -> Any:
    """Return the fields of a dataclass, and anything else as it is."""
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def _finite(value: Any) -> Any:
    """Return a value with null for NaN and infinity, which are no JSON."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return value


def counted(n: int, noun: str) -> str:
    """Return ``1 image``, ``2,000 images``."""
    return f"{n:,} {noun}{'s' * (n != 1)}"


def name(text: str) -> Text:
    """Return a name from a data set as cell text, with control characters escaped."""
    return Text(visible_line(text))


def table(
    rows: Iterable[Sequence[str | Text]], *columns: Iterable[str], title: str | None = None
) -> Table:
    """Return a table with columns of text, then of numbers, then of text; text may be foreign.

    Where there is little room, text is folded; numbers stay whole.
    """
    made = Table(
        title=name(title) if title else None,
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for number, names in enumerate(columns):
        looks: Any = {"justify": "right", "no_wrap": True} if number == 1 else {"overflow": "fold"}
        for column in names:
            made.add_column(visible_line(column), **looks)
    for row in rows:
        made.add_row(*(name(cell) if isinstance(cell, str) else cell for cell in row))
    return made


def note(text: str) -> None:
    """Print a note on standard error, dim; a warning in bold."""
    style = "bold yellow" if text.startswith("warning: ") else "dim"
    _messages.print(Text(text, style=style), soft_wrap=True)


def command(*words: object) -> None:
    """Print a command as a user would type it."""
    typed = shlex.join(["featcache", *(str(word) for word in words)])
    _results.print(Text(f"\n$ {typed}", style="bold"), soft_wrap=True)


@contextmanager
def progress() -> Iterator[OnProgress]:
    """Yield an `on_progress` that draws bars on a terminal, and prints lines elsewhere."""
    if not _messages.is_terminal or _messages.is_dumb_terminal:
        yield _Lines()
        return
    from rich import progress as bars

    columns = (
        bars.TextColumn("{task.description:>14}"),
        bars.BarColumn(bar_width=30),
        bars.TextColumn("{task.fields[count]:>15}"),
        bars.TextColumn("{task.fields[rate]:>12}"),
        bars.TimeRemainingColumn(compact=True),
        bars.TextColumn("{task.fields[note]}"),
    )
    with bars.Progress(*columns, console=_messages, transient=True) as shown:
        tasks: dict[str, Any] = {}
        paces: dict[str, _Pace] = {}
        reached: dict[str, int] = {}

        def report(message: Progress) -> None:
            stage = message.stage
            if message.done < reached.get(stage, message.done + 1):
                if stage in tasks:
                    shown.remove_task(tasks.pop(stage))
                tasks[stage] = shown.add_task(
                    stage, total=message.total, count="", rate="", note=""
                )
                paces[stage] = _Pace(message)
            reached[stage] = message.done
            shown.update(
                tasks[stage],
                completed=message.done,
                total=message.total,
                count=_count(message),
                rate=paces[stage].shown(message),
                note=message.note,
            )

        yield report


class _Lines:
    """Progress for a log file: a line every few seconds, and one at the end of a long stage."""

    def __init__(self) -> None:
        self._stage = ""
        self._started = self._last = 0.0
        self._done = 0

    def __call__(self, message: Progress) -> None:
        now = time.monotonic()
        if message.stage != self._stage or message.done < self._done:
            self._stage, self._started, self._last = message.stage, now, now
            self._pace = _Pace(message)
        self._done = message.done
        if message.total is not None and message.total // _scale(message)[0] < 2:
            return  # "1/1" is no news
        finished = message.done == message.total
        worth_an_end = finished and now - self._started >= _BRIEF_S
        if now - self._last < _LINE_EVERY_S and not worth_an_end:
            return
        self._last = now
        facts = [_count(message)]
        facts.append(self._pace.shown(message))
        if message.total and not finished and self._pace.per_s(message):
            facts.append(f"{(message.total - message.done) / self._pace.per_s(message):.0f} s left")
        facts.append(message.note)
        print(visible(f"{message.stage}: {', '.join(filter(None, facts))}"), file=sys.stderr)


def _count(message: Progress) -> str:
    """Return how far a stage is: ``1280/50000``, ``41/125 MB``."""
    scale, unit = _scale(message)
    done = f"{message.done // scale}"
    return f"{done}/{message.total // scale}{unit}" if message.total else f"{done}{unit}"


def _scale(message: Progress) -> tuple[int, str]:
    """Return the divisor and the suffix of a stage's counts."""
    return (1_000_000, " MB") if message.unit == "B" else (1, "")


class _Pace:
    """The speed of a stage, measured from its first message on."""

    def __init__(self, first: Progress) -> None:
        self._done = first.done
        self._started = time.monotonic()

    def per_s(self, message: Progress) -> float:
        """Return units per second; 0 while the rate is unknown."""
        spent = time.monotonic() - self._started
        return (message.done - self._done) / spent if spent > 0 else 0.0

    def shown(self, message: Progress) -> str:
        """Return the speed for a person."""
        rate = self.per_s(message)
        if not rate or not message.unit:
            return ""
        if message.unit == "B":
            return f"{rate / 1e6:.1f} MB/s"
        return f"{rate:.{0 if rate >= 10 else 1}f} {message.unit}/s"


def percent(top1: float, interval: Sequence[float]) -> str:
    """Return ``97.2 % (95.0 to 98.5)``."""
    low, high = interval
    return f"{100 * top1:.2f} % ({100 * low:.1f} to {100 * high:.1f})"


def p_value(p: float) -> str:
    """Return ``p = 0.013`` or ``p < 0.001``."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def extract_summary(result: ExtractResult) -> Any:
    """Return one line about a cache and how long it took."""
    what = f"{result.n_rows:,} x {result.feature_dim} features"
    if result.reused:
        how = f"already there (extracted at {result.images_per_s:.0f} img/s)"
    elif result.reused_rows:
        how = f"in {result.wall_s:.1f} s, {counted(result.computed, 'image')} computed"
    else:
        how = (
            f"in {result.wall_s:.1f} s, {result.images_per_s:.0f} img/s, "
            f"bottleneck: {result.bottleneck}"
        )
    left_out = f"; {counted(result.n_skipped, 'image')} left out" if result.n_skipped else ""
    return f"{result.cache}: {what} {how}{left_out}"


def fit_summary(result: FitResult) -> list[Any]:
    """Return the attempts, the winner and the next step."""
    table = Table(title=f"target {100 * result.target:.2f} %", title_justify="left")
    for column in ("attempt", "status", "val top-1", "estimate", "wall"):
        table.add_column(column, justify="left" if column in ("attempt", "status") else "right")
    for attempt in result.attempts:
        outcome = attempt.outcome
        table.add_row(
            attempt.name,
            attempt.status,
            f"{100 * outcome.val_top1:.2f} %" if outcome else "",
            f"{attempt.estimated_s:,.0f} s",
            "" if attempt.wall_s is None else f"{attempt.wall_s:,.1f} s",
        )
    verdict = "reached" if result.reached else "not reached"
    lines = [
        table,
        f"{verdict}: {result.winner}, {100 * result.val_top1:.2f} % on "
        f"{counted(result.n_val, 'validation image')}; top-1 "
        f"{percent(result.top1, result.top1_interval)} on {counted(result.n_test, 'test image')}",
        f"model: {result.head}",
    ]
    if result.over_s:
        lines.append(f"{result.over_s:,.1f} s over the budget")
    if not result.reached:
        lines.append(f"next: {result.next_step or 'none is left'}")
    return lines


def cache_facts(cache: Cache) -> dict[str, Any]:
    """Return a cache's sizes, skipped images and provenance."""
    from ..reporting.provenance import sizes

    return {
        **sizes(cache),
        "in_words": in_words(cache.meta),
        **cache.meta,
        **_table_facts(cache),
    }


def _table_facts(cache: Cache) -> dict[str, Any]:
    """Return where the attached table came from and its columns; one that is damaged says so."""
    from ..errors import CacheError
    from ..store.table_file import column_facts

    try:
        attached = cache.attached_table
    except CacheError as error:
        return {"table": {"error": str(error)}}
    if attached is None:
        return {}
    return {"table": {**attached.facts, "columns": column_facts(attached.table)}}


def columns_in_words(columns: Sequence[Mapping[str, Any]]) -> list[Text]:
    """Return a line per column of a table: its name, kind, and how many different values."""
    return [
        Text.assemble(
            name(column["name"]),
            f": {column['kind']}, {counted(column['n_values'], 'value')}",
            f", {column['n_missing']:,} missing" if column["n_missing"] else "",
        )
        for column in columns
    ]


def _table_summary(table: Mapping[str, Any]) -> Text:
    """Return the attached table for the page of provenance."""
    if "error" in table:
        return Text(table["error"], style="yellow")
    found = (
        f"by {table['key']}: {table['n_matched']:,} images have a row, {table['n_missing']:,} "
        f"have none; of {counted(table['n_rows'], 'row')}, {table['n_doubled']:,} repeat another "
        f"and {table['n_left_over']:,} belong to no image"
    )
    origin = f"{table['source']}, attached {table['created']}"
    lines = [name(origin), name(found)]
    if table["sha256"]:
        lines.append(name(f"sha256 {table['sha256']}"))
    return Text("\n").join([*lines, *columns_in_words(table["columns"])])


def in_words(meta: Mapping[str, Any]) -> str:
    """Return what made the features, in words for the methods section of a paper."""
    if "imported_from" in meta:
        return f"Features were {meta.get('weights')}, from {meta.get('dataset_source')}."
    from ..preprocess import Preprocess

    library = f" of {meta['library']}" if "library" in meta else ""
    try:
        pixels = Preprocess.from_dict(meta["preprocess"]).describe(meta["preprocess"]["decoder"])
    except (
        RecipeError,
        LookupError,
    ):  # of a cache from elsewhere
        pixels = ""
    return (
        f"Features of {meta['backbone']}{library} ({meta.get('weights', 'unnamed')} weights, "
        f"SHA-256 {meta['weights_sha256'][:12]}), {', '.join(meta['cuts'])}, were computed with "
        f"{meta['engine']} {meta['engine_version']} in {meta['precision']}. {pixels}"
    ).rstrip()


def cache_summary(cache: Cache) -> Any:
    """Return the provenance as a table."""
    from ..reporting.provenance import in_words as fact_in_words

    facts = cache_facts(cache)
    rows = {name: fact_in_words(name, value) for name, value in facts.items()}
    table = Table(show_header=False, box=None)
    table.add_column()
    room = min(width(), _READABLE) - max(len(words) for words, _ in rows.values()) - 4
    table.add_column(overflow="fold", max_width=room)  # digests stay whole
    for field, (words, texts) in rows.items():
        shown = (
            _table_summary(facts[field])
            if field == "table"
            else name(", ".join(texts).replace("\u00a0", " "))
        )
        table.add_row(Text(words, style="bold"), shown)
    return table


def backbones_table(listed: list[Any]) -> Any:
    """Return a table of backbones, one a line."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("backbone", "features", "size", "parameters", "weights here"):
        table.add_column(column, justify="left" if column == "backbone" else "right")
    for one in listed:
        here = {True: "yes", False: "no", None: "?"}[one.weights_here]
        parameters = "?" if not one.n_parameters else f"{one.n_parameters / 1e6:,.1f} M"
        sizes = [str(one.feature_dim or "?"), str(one.size or "?")]
        table.add_row(name(one.name), *sizes, parameters, here)
    return table


def backbone_facts(facts: dict[str, Any]) -> Any:
    """Return a backbone's facts, and its cuts with their shapes."""
    table = Table(show_header=False, box=None)
    for key, value in facts.items():
        if key == "cuts":
            value = "\n".join(
                f"{cut}  ({', '.join(map(str, shape))})" for cut, shape in value.items()
            )
        elif isinstance(value, (list, tuple)):
            value = ", ".join(map(str, value))
        table.add_row(Text(key, style="bold"), name(str(value)) if key != "cuts" else Text(value))
    return table


def findings_table(findings: list[Finding]) -> Any:
    """Return a table of facts about the machine."""
    table = Table(show_header=False, box=None)
    for finding in findings:
        mark = Text("yes", style="green") if finding.usable else Text("no", style="yellow")
        table.add_row(Text(finding.topic, style="bold"), mark, Text(finding.detail))
    return table


_BARS = "▁▂▃▄▅▆▇█"
_DIGITS = "0123456789"  # for a terminal that cannot show the bars


def sparkline(values: Sequence[float], encoding: str, most: int = 40) -> str:
    """Return one character per value: the lowest bar for the least, the highest for the most.

    Parameters
    ----------
    values : sequence of float
        One that is not finite becomes a space.
    encoding : str
        Encoding of the output; where it lacks the bars, digits replace them.
    most : int
        Maximum number of characters; longer series are thinned evenly, keeping both ends.
    """
    shown = [values[index] for index in _evenly(len(values), most)]
    finite = [value for value in shown if math.isfinite(value)]
    if not finite:
        return ""
    steps = _BARS if shows(_BARS, encoding) else _DIGITS
    low, span = min(finite), max(finite) - min(finite)
    return "".join(
        steps[int((value - low) / span * (len(steps) - 1)) if span else 0]
        if math.isfinite(value)
        else " "
        for value in shown
    )


def shows(text: str, encoding: str) -> bool:
    """Return whether a text can be written in an encoding."""
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _evenly(count: int, most: int) -> list[int]:
    """Return at most ``most`` of the numbers below ``count``, including the first and the last."""
    if count <= most:
        return list(range(count))
    return [round(place * (count - 1) / (most - 1)) for place in range(most)]
