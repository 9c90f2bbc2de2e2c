"""The folder of a run while it runs: its configuration, its log, and its last checkpoint."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..cores import usable_cores
from ..errors import OutputError, WeightsError
from ..files import remove_leftovers, user_path, write_atomically
from ..progress import OnNote
from ..runs import RECORD, new_run
from ..training import load_checkpoint, save_checkpoint

__all__ = ["LATEST", "RunFolder", "find_resumable"]

LATEST = "latest"

_CHECKPOINT = "checkpoint.safetensors"
_CONFIG = "config.json"
_ENVIRONMENT = "environment.json"
_METRICS = "metrics.jsonl"
_PACKAGES = ("numpy", "oneflow", "flowvision", "torch", "pillow", "safetensors")
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
        _write_json(folder.path / _ENVIRONMENT, _environment(str(facts.get("device"))))
        return folder

    @property
    def kept(self) -> str:
        """What there is to go on from, for a message."""
        if self._saved_step is None:
            return "there is no checkpoint yet"
        return f"the last good checkpoint, {self.path / _CHECKPOINT}, is of step {self._saved_step}"

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
        remove_leftovers(path)
        self._shorten_log(progress["step"])
        return arrays, progress

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


def _environment(device: str) -> dict[str, Any]:
    """Return what may change rounding: versions, processor, cores."""
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
        "device": device,
        **versions,
    }


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(value, indent=1, default=str).encode())
