"""The folder of a run while it runs: its configuration, its log, and its last checkpoint."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..cores import usable_cores
from ..errors import FeatcacheError, OutputError, WeightsError
from ..files import remove_leftovers, split_safetensors, user_path, write_atomically
from ..progress import OnNote
from ..runs import RECORD, new_run
from ..version import __version__
from .ranks import Ranks

LATEST = "latest"

_CHECKPOINT = "checkpoint.safetensors"
_CONFIG = "config.json"
_ENVIRONMENT = "environment.json"
_METRICS = "metrics.jsonl"
# All that a kill may leave half of.
_FILES = (
    _CHECKPOINT,
    _CONFIG,
    _ENVIRONMENT,
    _METRICS,
    RECORD,
    "head.safetensors",
    "model.safetensors",
)
_PACKAGES = ("numpy", "oneflow", "torch", "pillow", "safetensors")
# What a run of an earlier featcache was, before these could be chosen.
_EARLIER = {"engine": "oneflow", "precision": "f32"}


class RunFolder:
    """The files of one run.

    ``config.json`` is what was asked for, ``environment.json`` what computes,
    ``metrics.jsonl`` one JSON object per step and per epoch, ``checkpoint.safetensors`` the
    state to go on from. ``run.json`` and ``model.safetensors`` come at the end, when the
    checkpoint goes.

    Parameters
    ----------
    path : Path
        The folder.
    identity : mapping of str to Any
        All that changes the outcome of the run.
    on_note : callable
        Hears of what could not be written.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], on_note: OnNote) -> None:
        self.path = path
        self._identity = dict(identity)
        self._on_note = on_note
        self._saved_step: int | None = None
        self._log_failed = False

    @classmethod
    def create(
        cls,
        runs: Path,
        method: str,
        identity: Mapping[str, Any],
        facts: Mapping[str, Any],
        on_note: OnNote,
    ) -> RunFolder:
        """Make the folder of a new run, with its configuration."""
        folder = cls(new_run(runs, method), identity, on_note)
        config = {"identity": folder._identity, **facts}
        _write_json(folder.path / _CONFIG, config)
        _write_json(folder.path / _ENVIRONMENT, _environment(facts))
        return folder

    @property
    def kept(self) -> str:
        """What there is to go on from, for a message."""
        if self._saved_step is None:
            return "there is no checkpoint yet"
        return f"the last good checkpoint, {self.path / _CHECKPOINT}, is of step {self._saved_step}"

    @property
    def advice(self) -> str:
        """How to go on with a run that ends here, for a message."""
        if self.has_checkpoint:
            return f"{self.kept}; add --resume {self.path} to the same command to go on"
        return f"{self.kept}; give the same command again"

    @property
    def has_checkpoint(self) -> bool:
        """Whether this process wrote a checkpoint, or read one."""
        return self._saved_step is not None

    def save(self, arrays: Mapping[str, np.ndarray], progress: Mapping[str, Any]) -> bool:
        """Write a checkpoint; where it cannot be written, say so and keep the one before."""
        facts = {"identity": self._identity, "progress": dict(progress)}
        try:
            save_checkpoint(self.path / _CHECKPOINT, arrays, facts)
        except OutputError as error:
            self._on_note(f"no checkpoint of step {progress['step']}: {error}; {self.kept}")
            return False
        self._saved_step = progress["step"]
        return True

    def load(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Read the checkpoint of this very run, and forget what was logged after it.

        Raises
        ------
        WeightsError
            No checkpoint, a damaged one, or one of another run; the message lists the fields.
        """
        path = self.path / _CHECKPOINT
        if not path.exists() and (self.path / RECORD).exists():
            raise WeightsError(
                f"{self.path}: expected a run that was stopped, found one that is finished; its "
                "network is model.safetensors there: begin a new run with --weights"
            )
        arrays, facts = load_checkpoint(path)
        theirs, progress = facts.get("identity"), facts.get("progress")
        if not isinstance(theirs, dict) or not isinstance(progress, dict):
            raise WeightsError(f"{path}: expected a checkpoint, found a part of one; begin anew")
        theirs = {**_EARLIER, **theirs}
        mine = json.loads(json.dumps(self._identity))
        differing = [
            f"{name}: checkpoint {theirs.get(name)!r:.80}, here {mine.get(name)!r:.80}"
            for name in sorted({*mine, *theirs})
            if mine.get(name) != theirs.get(name)
        ]
        if differing:
            raise WeightsError(
                f"{path}: expected a checkpoint of this run, found one of another: "
                f"{'; '.join(differing)}; repeat the command that it was made with, or begin anew "
                "without --resume"
            )
        self._saved_step = progress["step"]
        for name in _FILES:
            remove_leftovers(self.path / name)
        self._shorten_log(progress["step"])
        return arrays, progress

    def note_processes(self, processes: int) -> None:
        """Tell of rounding differences where the run was begun by another number of processes."""
        try:
            before = json.loads((self.path / _ENVIRONMENT).read_text(encoding="utf-8"))
            begun_by = before.get("processes", 1)
        except (OSError, ValueError, AttributeError):
            return
        if begun_by != processes:
            self._on_note(
                f"{self.path}: begun by {begun_by}, gone on with by {processes} process"
                f"{'es' * (processes > 1)}: expect rounding differences"
            )

    def log(self, **values: Any) -> None:
        """Append a line to the metrics; a full disk ends the log and not the run."""
        if self._log_failed:
            return
        try:
            with open(self.path / _METRICS, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(values) + "\n")
        except OSError as error:
            self._log_failed = True
            self._on_note(f"{self.path / _METRICS}: no more lines: {error.strerror}")

    def remove_checkpoint(self) -> None:
        """Delete the checkpoint of a run whose network and record are written."""
        (self.path / _CHECKPOINT).unlink(missing_ok=True)

    def _shorten_log(self, step: int) -> None:
        path = self.path / _METRICS
        try:
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        except OSError:
            return
        kept = [line for line in lines if _step_of(line) <= step]
        write_atomically(path, "".join(kept).encode())


class _FolderElsewhere(RunFolder):
    """The folder of a run that rank 0 writes: this rank leaves it alone."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, {}, lambda _: None)

    @property
    def kept(self) -> str:
        """What there is to go on from, as far as this machine sees it."""
        path = self.path / _CHECKPOINT
        return f"the last checkpoint is {path}" if path.exists() else "there is no checkpoint yet"

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint, as far as this machine sees it."""
        return (self.path / _CHECKPOINT).exists()

    def save(self, arrays: Mapping[str, np.ndarray], progress: Mapping[str, Any]) -> bool:
        """Write nothing."""
        return False

    def log(self, **values: Any) -> None:
        """Write nothing."""

    def remove_checkpoint(self) -> None:
        """Delete nothing."""


def shared_folder(ranks: Ranks, make: Callable[[], RunFolder]) -> RunFolder:
    """Return the folder that rank 0 makes or finds; on other ranks, one that writes nothing.

    Raises
    ------
    FeatcacheError
        Rank 0 cannot have it.
    """
    mine = ranks.agreed(lambda: make() if ranks.is_first else None)
    path = ranks.from_first(b"" if mine is None else os.fsencode(mine.path))
    return mine or _FolderElsewhere(Path(os.fsdecode(path)))


def shared_state(ranks: Ranks, folder: RunFolder) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return on every rank what `RunFolder.load` reads on rank 0, which alone sees it for sure.

    Raises
    ------
    WeightsError
        As `RunFolder.load`.
    """
    from safetensors.numpy import load, save

    state = ranks.agreed(lambda: folder.load() if ranks.is_first else None)
    if ranks.size == 1:
        assert state is not None
        return state
    tensors, progress = (b"", b"") if state is None else (save(state[0]), _json(state[1]))
    tensors, progress = ranks.from_first(tensors), ranks.from_first(progress)
    return state or (dict(load(tensors)), json.loads(progress))


def find_resumable(resume: str | Path | bool, runs: Path, method: str) -> Path:
    """Return the folder of the run to go on with.

    Parameters
    ----------
    resume : str, Path or True
        A run's folder or its name; True or ``"latest"``: the newest unfinished run of
        the method.
    runs : Path
        Where runs are.
    method : str
        The method.

    Raises
    ------
    WeightsError
        There is none.
    """
    if resume is True or resume == LATEST:
        for path in sorted(runs.glob(f"*-{method}-*"), reverse=True):
            if (path / _CHECKPOINT).exists() and not (path / RECORD).exists():
                return path
        raise WeightsError(
            f"{runs}: expected an unfinished run of method {method}, found none; begin one without "
            "--resume"
        )
    named = user_path(str(resume))
    for path in (named, runs / named.name):
        if path.is_dir():
            return path
    raise WeightsError(
        f"{named}: expected the folder of a run, found none; name one of {runs}, or use --resume "
        f"{LATEST}"
    )


def _step_of(line: str) -> float:
    """Return the step of a line of the log; infinity for half a line."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _environment(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what may change rounding: versions, processor, cores, processes."""
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "featcache": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": usable_cores(),
        "processes": facts.get("processes", 1),
        "device": str(facts.get("device")),
        **versions,
    }


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(value, indent=1, default=str).encode())


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


_KEY = "featcache.checkpoint"
_VERSION = 1


def save_checkpoint(path: Path, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
    """Write arrays and what they mean.

    Parameters
    ----------
    path : Path
        The file.
    arrays : mapping of str to numpy.ndarray
        float32 and int64 of any shape.
    facts : mapping of str to Any
        JSON types; floats come back to the bit.

    Raises
    ------
    FeatcacheError
        A number is NaN or infinite: such a state is not one to go on from.
    OutputError
        The file cannot be written; the one before is untouched.
    """
    from safetensors.numpy import save

    for name, value in arrays.items():
        if not np.isfinite(value).all():
            raise FeatcacheError(f"expected finite numbers, found NaN or infinity in {name}")
    text = json.dumps({**facts, "version": _VERSION})
    ready = {name: np.asarray(value, order="C") for name, value in arrays.items()}
    write_atomically(path, save(ready, {_KEY: text}))


def load_checkpoint(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read what `save_checkpoint` wrote.

    Raises
    ------
    WeightsError
        No such file, not a checkpoint, or a damaged one.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        data = path.read_bytes()
        arrays = dict(load(data))
        header, _ = split_safetensors(data)
        facts = json.loads((header.get("__metadata__") or {})[_KEY])
        if not isinstance(facts, dict) or facts.get("version") != _VERSION:
            raise ValueError(f"another version than {_VERSION}")
    except KeyError:
        found = f"a safetensors file without {_KEY} in its metadata"
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        found = getattr(error, "strerror", None) or str(error)
    else:
        return arrays, facts
    raise WeightsError(
        f"{path}: expected the checkpoint of a run of featcache finetune, found: {found:.200}; "
        "name another --resume, or begin anew without it"
    )
