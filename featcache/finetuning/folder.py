"""The folder of a run: its configuration, its log, and its last checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..backbones.network import arrays_digest
from ..cores import usable_cores
from ..errors import FeatcacheError, OutputError, WeightsError, one_line
from ..files import (
    parse_safetensors,
    refuse_links,
    remove_leftovers,
    user_path,
    write_atomically,
)
from ..process import installed_version
from ..progress import OnNote
from ..runs import RECORD, new_run
from ..schema import count, list_of, number, object_of, wrong_fields
from ..version import __version__
from .processes import identity_differences

LATEST = "latest"

_CHECKPOINT = "checkpoint.safetensors"
_CONFIG = "config.json"
_ENVIRONMENT = "environment.json"
_METRICS = "metrics.jsonl"
# Everything that a kill may leave half-written.
_FILES = (
    _CHECKPOINT,
    _CONFIG,
    _ENVIRONMENT,
    _METRICS,
    RECORD,
    "head.safetensors",
    "model.safetensors",
)
_PACKAGES = ("numpy", "oneflow", "torch", "peft", "pillow", "safetensors")
# Fields that checkpoints of an earlier featcache lack.
_EARLIER = {"engine": "oneflow", "precision": "f32"}
_EPOCH = object_of(
    {"epoch": count(1), "train_loss": number(), "top1": number(0, 1), "wall_s": number(0)}
)
_PROGRESS = {
    "step": count(),
    "curve": list_of(_EPOCH),
    "batch": count(),
    "loss_sum": number(),
    "epoch_s": number(0),
    "trained_s": number(1e-9),  # a step has been taken
    "wall_s": number(0),
}


class RunFolder:
    """The files of one run.

    ``config.json`` holds the options, ``environment.json`` the versions, ``metrics.jsonl`` one
    JSON object per step and per epoch, ``checkpoint.safetensors`` the state to resume from.
    ``run.json`` and ``model.safetensors`` are written at the end, when the checkpoint is deleted.
    ``identity`` is everything that changes the outcome.
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
        """Create the folder of a new run, with its configuration."""
        folder = cls(new_run(runs, method), identity, on_note)
        config = {"identity": folder._identity, **facts}
        _write_json(folder.path / _CONFIG, config)
        _write_json(folder.path / _ENVIRONMENT, _environment(facts))
        return folder

    @property
    def kept(self) -> str:
        """The last checkpoint, for a message."""
        if self._saved_step is None:
            return "there is no checkpoint yet"
        return f"the last good checkpoint, {self.path / _CHECKPOINT}, is of step {self._saved_step}"

    @property
    def advice(self) -> str:
        """How to resume the run, for a message."""
        if self._saved_step is not None:
            return f"{self.kept}; add --resume {self.path} to the same command to resume"
        return f"{self.kept}; give the same command again"

    def save(self, arrays: Mapping[str, np.ndarray], progress: Mapping[str, Any]) -> None:
        """Write a checkpoint; where it cannot be written, note it and keep the one before."""
        facts = {"identity": self._identity, "progress": dict(progress)}
        try:
            save_checkpoint(self.path / _CHECKPOINT, arrays, facts)
        except OutputError as error:
            self._on_note(f"no checkpoint of step {progress['step']}: {error}; {self.kept}")
        else:
            self._saved_step = progress["step"]

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
                "network is model.safetensors there: start a new run with --weights"
            )
        arrays, facts = load_checkpoint(path)
        theirs, progress = facts.get("identity"), facts.get("progress")
        wrong = wrong_fields(progress, _PROGRESS, {})
        if not isinstance(theirs, dict) or not isinstance(progress, dict) or wrong:
            found = f"no usable {', '.join(wrong)}" if wrong else "a part of one"
            raise WeightsError(f"{path}: expected a checkpoint, found {found}; start anew")
        theirs = {**_EARLIER, **theirs}
        mine = json.loads(json.dumps(self._identity))
        differing = identity_differences(theirs, mine, "checkpoint")
        if differing:
            raise WeightsError(
                f"{path}: expected a checkpoint of this run, found one of another: "
                f"{differing}; repeat the command that made it, or start anew "
                "without --resume"
            )
        self._saved_step = progress["step"]
        for name in _FILES:
            remove_leftovers(self.path / name)
        self._shorten_log(progress["step"])
        return arrays, progress

    def note_processes(self, processes: int) -> None:
        """Note rounding differences where the run started with another number of processes."""
        try:
            before = json.loads((self.path / _ENVIRONMENT).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return
        if wrong_fields(before, {"processes": count(1)}, {}):
            return
        started_with = before["processes"]
        if started_with != processes:
            self._on_note(
                f"{self.path}: started with {started_with} process{'es' * (started_with > 1)}, "
                f"resumed with {processes}: expect rounding differences"
            )

    def log(self, **values: Any) -> None:
        """Append a line to the metrics; a full disk ends the log, not the run."""
        if self._log_failed:
            return
        try:
            refuse_links(self.path / _METRICS)
            with open(self.path / _METRICS, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(values) + "\n")
        except OSError as error:
            self._log_failed = True
            self._on_note(f"{self.path / _METRICS}: no more lines: {error.strerror or error}")

    def remove_checkpoint(self) -> None:
        """Delete the checkpoint of a run whose network and record are written."""
        (self.path / _CHECKPOINT).unlink(missing_ok=True)

    def _shorten_log(self, step: int) -> None:
        path = self.path / _METRICS
        try:
            lines = path.read_bytes().splitlines(keepends=True)
        except OSError:
            return
        kept = [line for line in lines if _step_of(line) <= step]
        write_atomically(path, b"".join(kept))


class FolderElsewhere(RunFolder):
    """The folder of a run that rank 0 writes: this rank writes nothing."""

    def save(self, arrays: Mapping[str, np.ndarray], progress: Mapping[str, Any]) -> None:
        """Write nothing."""

    def log(self, **values: Any) -> None:
        """Write nothing."""


def find_resumable(resume: str | Path | bool, runs: Path, method: str) -> Path:
    """Return the folder of the run to resume: a folder, the name of one in ``runs``, or the newest.

    True and ``"latest"`` mean the newest unfinished run of the method.
    """
    if resume is True or resume == LATEST:
        for path in sorted(runs.glob(f"*-{method}-*"), reverse=True):
            if (path / _CHECKPOINT).exists() and not (path / RECORD).exists():
                return path
        raise WeightsError(
            f"{runs}: expected an unfinished run of method {method}, found none; start one without "
            "--resume"
        )
    named = user_path(str(resume))
    for path in (named, runs / named.name):
        if os.path.isdir(path):  # pathlib raises where a name is too long
            return path
    raise WeightsError(
        f"{named}: expected the folder of a run, found none; name one of {runs}, or use --resume "
        f"{LATEST}"
    )


def _step_of(line: bytes) -> float:
    """Return the step of a line of the log; infinity for an incomplete line."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return float("inf")
    return float("inf") if wrong_fields(fields, {"step": count()}, {}) else fields["step"]


def _environment(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what may change rounding: versions, platform, cores, processes."""
    return {
        "featcache": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": usable_cores(),
        "processes": facts.get("processes", 1),
        "device": str(facts.get("device")),
        **{package: installed_version(package) for package in _PACKAGES},
    }


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(value, indent=1, default=str).encode())


_KEY, _DIGEST = "featcache.checkpoint", "featcache.sha256"
_VERSION = 1
# What the frameworks' tensors become.
_DTYPES = {"F32": "<f4", "F64": "<f8", "I64": "<i8"}


def save_checkpoint(path: Path, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
    """Write float32 and int64 arrays, and JSON facts about them.

    A number that is not finite raises FeatcacheError: such a state cannot be resumed. Where the
    file cannot be written (OutputError), the one before is untouched.
    """
    from safetensors.numpy import save

    for name, value in arrays.items():
        if not np.isfinite(value).all():
            raise FeatcacheError(f"expected finite numbers, found NaN or infinity in {name}")
    text = json.dumps({**facts, "version": _VERSION})
    ready = {name: np.asarray(value, order="C") for name, value in arrays.items()}
    write_atomically(path, save(ready, {_KEY: text, _DIGEST: seal_of(ready, text)}))


def seal_of(arrays: Mapping[str, np.ndarray], text: str) -> str:
    """Return SHA-256 (hex) over all tensors and facts: safetensors has no checksum of its own."""
    return hashlib.sha256(f"{arrays_digest(arrays)} {text}".encode()).hexdigest()


def load_checkpoint(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read what `save_checkpoint` wrote; raise WeightsError for anything else."""
    try:
        tensors, metadata = parse_safetensors(path.read_bytes())
        odd = {tensor.dtype for tensor in tensors.values()} - _DTYPES.keys()
        if odd:
            raise ValueError(f"numbers of type {odd.pop()}")
        arrays = {
            name: np.frombuffer(tensor.data, _DTYPES[tensor.dtype]).reshape(tensor.shape)
            for name, tensor in tensors.items()
        }
        text = metadata[_KEY]
        if metadata.get(_DIGEST) != seal_of(arrays, text):
            raise ValueError("another checksum than in it: it was damaged or changed")
        for name, array in arrays.items():
            if not np.isfinite(array).all():
                raise ValueError(f"NaN or infinity in '{one_line(name)}'")
        facts = json.loads(text)
        if not isinstance(facts, dict) or facts.get("version") != _VERSION:
            raise ValueError(f"another version than {_VERSION}")
    except KeyError:
        problem = f"a safetensors file without {_KEY} in its metadata"
    except (OSError, ValueError, RecursionError) as error:
        problem = getattr(error, "strerror", None) or one_line(error)
    else:
        return arrays, facts
    raise WeightsError(
        f"{path}: expected the checkpoint of a run of featcache finetune, found: {problem}; "
        "name another --resume, or start anew without it"
    )
