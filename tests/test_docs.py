"""The documentation: every command and snippet in it runs, and it covers every command and name.

The blocks of a page run in order, in a folder of their own, with the ``featcache`` and ``python``
under test:

- ``sh`` runs as a whole and must succeed.
- ``console`` is a session: each ``$`` line runs, and the lines shown under it must be printed in
  that order, apart from numbers. A line that ends in ``…`` is a prefix. Where a line starts with
  ``error:``, the command must fail with that message.
- ``python`` is a program and must succeed.

A block that cannot run in a test has ``<!-- not run: REASON -->`` on the line before it, one that
takes long ``<!-- slow: REASON -->``: its page is run by the slow tests.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import typer
from conftest import write_gaussian_cache
from PIL import Image

import featcache
from featcache.cli.commands import app
from featcache.frameworks import oneflow_status, openvino_status, torch_status

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md")))
}
WRITTEN = {name: page for name, page in PAGES.items() if name != "docs/reference.md"}
RUN = ("console", "python", "sh")
OTHER = ("julia", "r", "yaml")  # code that no test runs: must say why
MARKERS = ("not run", "slow")
EXTRAS = {  # what a block uses, and the package that it then needs
    r"--plot|featcache report": "bokeh",
    r"to_pandas": "pandas",
    r"--to parquet": "pyarrow",
    r"featcache serve": "uvicorn",
}
COMMANDS = typer.main.get_command(app).commands


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, text, line in the page, marker and the marker's reason."""

    language: str
    text: str
    line: int
    marker: str = ""
    reason: str = ""


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page."""
    found: list[Block] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    opened = None
    for number, line in enumerate(lines):
        if not line.lstrip().startswith("```"):
            continue
        if opened is None:
            opened = number
            continue
        above = re.fullmatch(r"<!-- ([a-z ]+):(.*)-->", lines[opened - 1].strip())
        marker, reason = (above[1], above[2].strip()) if above else ("", "")
        text = "\n".join(lines[opened + 1 : number])
        found.append(Block(lines[opened].strip("` "), text, opened + 1, marker, reason))
        opened = None
    assert opened is None, f"{page}: the fence of line {opened} is never closed"
    return found


# What the pages take for granted.


def picture(tint: int, seed: int) -> Image.Image:
    """Draw clouds of one colour, a class that a linear head can learn."""
    generator = np.random.default_rng((tint, seed))
    coarse = generator.integers(0, 256, (6, 8, 3)).astype(np.float32)
    coarse[..., tint] = 0.8 * coarse[..., tint] + 51
    return Image.fromarray(coarse.astype(np.uint8)).resize((96, 72), Image.Resampling.BICUBIC)


@pytest.fixture(scope="session")
def given(tmp_path_factory):
    """The files that pages assume: ``photos/`` with class folders."""

    folder = tmp_path_factory.mktemp("given")
    for index, name in enumerate(("cat", "dog", "horse")):
        (folder / "photos" / name).mkdir(parents=True)
        for number in range(1, 31):
            picture(index, number).save(folder / "photos" / name / f"{number:03d}.jpg")
    return folder


def prepare(page: str, folder: Path) -> None:
    """Add the files that only this page assumes."""
    data = ROOT / "tests" / "data"
    if page == "docs/format.md":
        (folder / "cache").mkdir()
        shutil.copytree(data / "format-1.shards", folder / "cache" / "big.shards")
        for block in blocks(PAGES[page]):  # under the name that it says
            for name in re.findall(r"cache/[\w-]+\.h5", block.text):
                shutil.copyfile(data / "format-1.h5", folder / name)
    if page in ("docs/audit.md", "docs/report.md"):
        write_gaussian_cache(folder / "cache" / "gaussian.h5")


@pytest.fixture
def desk(tmp_path, given, monkeypatch):
    """A folder with the given files, and the environment that blocks run in."""
    folder = tmp_path / "desk"
    shutil.copytree(given, folder)
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, arguments in (("featcache", "-m featcache"), ("python", "")):
        tool = tools / name
        tool.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
        tool.chmod(0o755)
    monkeypatch.delenv("FEATCACHE_DIR")  # pages use cache/ in the current folder
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    # No page may need the network silently: requests fail at once.
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    return folder


def shell(command: str, folder: Path) -> tuple[int, str]:
    """Run a shell command: exit status, and all that it printed."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=600,
        text=True,
    )
    return done.returncode, done.stdout


def essence(line: str) -> str:
    """Return a line without numbers, bars, boxes and bottlenecks, which differ between runs."""
    line = re.sub(r"[▁▂▃▄▅▆▇█]+", "~", line)
    line = re.sub(r"[─━┏┓┗┛┡┩┃│└┘┴┬┳┻╇]+", " ", line)
    line = re.sub(r"\b(?=[0-9a-f]*\d)[0-9a-f]{4,}\b", "#", line)  # digests
    line = re.sub(r"[+-]?\d[\d.,]*(e[+-]?\d+)?", "#", line)
    line = re.sub(r"(\w)-#", r"\1#", line)
    line = re.sub(r"bottleneck: \w+", "bottleneck", line)
    return " ".join(line.split())


def run_session(block: Block, folder: Path, where: str) -> None:
    """Run each ``$`` line of a session, and compare its output with the lines shown."""
    assert block.text.startswith("$ "), f"{where}: a session starts with a command"
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        command, *shown = part.rstrip().splitlines()
        status, printed = shell(command, folder)
        must_fail = any(line.startswith("error:") for line in shown)
        assert (status != 0) == must_fail, f"{where}: $ {command}\n{printed}"
        lines = iter([essence(line) for line in printed.splitlines()])
        for line in filter(None, map(essence, shown)):
            prefix = line.removesuffix("…").strip() if line.endswith("…") else None
            is_printed = any(
                line == other if prefix is None else other.startswith(prefix) for other in lines
            )
            assert is_printed, f"{where}: $ {command}\nno line like {line!r} in\n{printed}"


def run_page(name: str, folder: Path) -> None:
    """Run the blocks of a page, in order."""
    prepare(name, folder)
    for block in blocks(PAGES[name]):
        if block.language not in RUN or block.marker == "not run":
            continue
        where = f"{name}:{block.line}"
        if block.language == "console":
            run_session(block, folder, where)
            continue
        command = block.text
        if block.language == "python":
            (folder / "snippet.py").write_text(block.text, encoding="utf-8")
            command = "python snippet.py"
        status, printed = shell(command, folder)
        assert status == 0, f"{where}:\n{block.text}\n\n{printed}"


def runnable_pages() -> list:
    """Return the pages that have a block to run, marked by what their blocks need.

    A page is run once, as a whole, with the slow tests.
    """
    pages = []
    for name, page in PAGES.items():
        run = [b for b in blocks(page) if b.language in RUN and b.marker != "not run"]
        if not run:
            continue
        text = "\n".join(block.text for block in run)
        marks = [pytest.mark.slow]
        done = "\n".join(block.text for block in run if "error:" not in block.text)
        if re.search(r"featcache (finetune|fit)\b|--solver sgd", done):
            marks.append(pytest.mark.oneflow)
        pages.append(pytest.param(name, text, id=name, marks=marks))
    return pages


@pytest.mark.parametrize(("name", "text"), runnable_pages())
def test_every_block_of_a_page_runs(name, text, desk):
    engine = oneflow_status()[0] or openvino_status()[0] or torch_status()[0]
    if engine is None and re.search(r"\b(extract|predict|build_engine)\b", text):
        pytest.skip("no engine is installed")
    for option, package in EXTRAS.items():
        if re.search(option, text):
            pytest.importorskip(package)
    run_page(name, desk)


@pytest.mark.parametrize("name", PAGES)
def test_a_block_that_does_not_run_says_why(name):
    for block in blocks(PAGES[name]):
        where = f"{name}:{block.line}"
        assert block.language in (*RUN, *OTHER, "text", ""), f"{where}: {block.language!r}"
        assert block.marker in (*MARKERS, ""), f"{where}: marker {block.marker!r}"
        assert not block.marker or len(block.reason) > 5, f"{where}: a marker without a reason"
        if block.language in OTHER:
            assert block.marker == "not run", f"{where}: {block.language} without a reason"
        if not block.language:  # neither code nor a session in disguise
            assert not re.search(r"^(\$ |featcache [a-z]|python )", block.text, re.MULTILINE), where


@pytest.mark.parametrize("name", WRITTEN)
def test_commands_and_options_that_are_named_exist(name):
    """In the text too: a page must not speak of what was renamed."""
    text = PAGES[name].read_text(encoding="utf-8")
    known = {word for command in COMMANDS.values() for p in command.params for word in p.opts}
    known |= {word for c in COMMANDS.values() for p in c.params for word in p.secondary_opts}
    known |= {"--help", "-h", "--version", "--install-completion", "--show-completion"}
    for span in re.findall(r"`(featcache [^`\n]+)`", text):
        word = span.split()[1]
        assert word in COMMANDS or word.startswith(("-", "COMMAND")), f"{name}: `{span}`"
    for block in blocks(PAGES[name]):
        for line in block.text.splitlines():
            called = re.match(r"(?:\$ )?featcache ([a-z]+)(.*)", line.strip())
            if not called or "error:" in block.text:
                continue
            assert called[1] in COMMANDS, f"{name}: {line}"
            own = {w for p in COMMANDS[called[1]].params for w in (*p.opts, *p.secondary_opts)}
            for option in re.findall(r"(?<=\s)--[a-z][\w-]*", called[2].partition(" #")[0]):
                assert option in own | {"--help"}, f"{name}: {line}"
    for option in re.findall(r"`(--[a-zA-Z][\w-]*)", text):
        assert option in known | {"--master_port", "--python"}, f"{name}: {option}"


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    page = PAGES[name]
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        if path.startswith("cache/") and (ROOT / "PKG-INFO").exists():
            continue  # a source distribution leaves the starter cache out
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{name}: {target}"
        if anchor:
            titles = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {_anchor(title) for title in titles}, f"{name}: {target}"


def _anchor(title: str) -> str:
    """Return what a heading is linked by, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def test_no_command_hides_in_an_indented_block():
    for name, page in PAGES.items():
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        assert re.findall(r"^    (?:\$|featcache|python) .*", text, re.MULTILINE) == [], name


def test_every_room_is_in_the_design():
    rooms = {path.stem for path in (ROOT / "featcache").iterdir() if path.suffix in ("", ".py")}
    table = PAGES["docs/design.md"].read_text(encoding="utf-8").partition("## Pixels")[0]
    assert {room for room in rooms if room[0] != "_"} <= set(re.findall(r"`(\w+)`", table))


def test_every_command_is_documented():
    text = "\n".join(page.read_text(encoding="utf-8") for page in WRITTEN.values())
    assert [name for name in COMMANDS if f"featcache {name}" not in text] == []


def test_every_page_is_in_the_table_of_contents():
    index = PAGES["docs/index.md"]
    linked = {
        (index.parent / target.partition("#")[0]).resolve()
        for target in re.findall(r"\]\(([^)\s]+)\)", index.read_text(encoding="utf-8"))
        if not target.startswith("http")
    }
    missing = [name for name, page in PAGES.items() if page not in linked and page != index]
    assert missing == []


def reference():
    """Return docs/build_reference.py as a module."""
    path = ROOT / "docs" / "build_reference.py"
    spec = importlib.util.spec_from_file_location("build_reference", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_what_the_docstrings_say():
    page = PAGES["docs/reference.md"].read_text(encoding="utf-8")
    # not by ==: pytest would take its time to show how 2,000 lines differ
    same = page == reference().build()
    assert same, "docs/reference.md is out of date: run python docs/build_reference.py"


def test_every_public_name_is_in_the_reference():
    titles = re.findall(r"^### (\w+)$", PAGES["docs/reference.md"].read_text(), re.MULTILINE)
    assert set(featcache.__all__) <= set(titles)


def test_the_runner_fails_on_wrong_output(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "```sh\ntrue\n```\n<!-- not run: a reason -->\n```python\n1 / 0\n```\n"
        "```console\n$ echo 12 cats in 3.5 s\n7 cats in 1 s\n```\n"
    )
    sound = blocks(page)
    assert [(b.language, b.marker) for b in sound] == [
        ("sh", ""), ("python", "not run"), ("console", ""),
    ]  # fmt: skip
    run_session(sound[2], tmp_path, "page.md:7")
    for text in ("$ echo 12 cats\n7 dogs", "$ false", "$ echo error: no\nerror: no"):
        with pytest.raises(AssertionError):
            run_session(Block("console", text, 1), tmp_path, "page.md:1")
    run_session(Block("console", "$ echo error: no; exit 1\nerror: no", 1), tmp_path, "page.md:1")
