"""Which way an extraction goes: what is there, who makes the rest, and where it is put."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..engines import Engine
from ..files import check_writable
from ..progress import OnNote, OnProgress
from ..store import Cache, discard_unfinished, load, shards_path, single_writer
from ._destination import Destination
from ._here import run_here
from ._once import Make, extract_once, here, may_be_there
from ._provenance import cache_path, matching
from ._result import ExtractResult, result_of
from ._setting import Setting

__all__ = ["Run"]


@dataclass(frozen=True)
class Run:
    """One extraction, all of whose ingredients are known.

    Parameters
    ----------
    setting : Setting
        What is made.
    destination : Destination or None
        Where the cache goes behind a URL.
    command : str
        The command that asks for it.
    force : bool
        As in `featcache.extract`.
    build : callable
        Builds the engine.
    make : callable or None
        Has the shards made elsewhere; None is this machine.
    on_progress, on_note : callable
        As in `featcache.extract`.
    started : float
        When the call began.
    """

    setting: Setting
    destination: Destination | None
    command: str
    force: bool
    build: Callable[[], Engine]
    make: Make | None
    on_progress: OnProgress
    on_note: OnNote
    started: float

    def extract(self) -> ExtractResult:
        """Find the cache, or make it; and put it where it was asked for."""
        setting, there = self.setting, self.destination
        # Elsewhere each machine hashes its own images; of a store, each read is a request.
        reads_once = self.make is not None or setting.reads_once
        if reads_once and (self.force or not self._may_be_there()):
            return self._made_once()
        meta = setting.meta(setting.dataset.digest_with(self.on_progress, setting.on_error))
        path = cache_path(setting.output, setting.dataset.name, meta)
        if there and not self.force:
            same = there.found(path, meta, setting, self.started)
            if same:
                return same
        for existing in (path, shards_path(path)):
            if os.path.lexists(existing) and not self.force:
                cache = matching(existing, meta, setting.on_error)
                discard_unfinished(path)
                if setting.pack is (existing.suffix != ".h5"):
                    self.on_note(
                        f"{existing}: is there in this form; use --force to make the other"
                    )
                return self._delivered(self._result(cache, reused=True))
        if reads_once:
            return self._made_once()
        self._check_destination()
        check_writable(path)
        with single_writer(path):
            made, n_resumed = run_here(
                setting, path, meta, self.force, self.build, self.on_progress, self.on_note
            )
        cache = load(made)
        self._tell_of_skipped_classes(cache)
        return self._delivered(self._result(cache, reused=False, n_resumed=n_resumed))

    def _may_be_there(self) -> bool:
        there = self.destination
        return may_be_there(self.setting) or (there is not None and there.may_be(self.setting))

    def _made_once(self) -> ExtractResult:
        self._check_destination()
        make = self.make or here(self.setting, self.build, self.on_progress, self.on_note)
        return self._delivered(
            extract_once(
                self.setting,
                self.command,
                make,
                self.force,
                self.on_progress,
                self.on_note,
                started=self.started,
            )
        )

    def _check_destination(self) -> None:
        if self.destination:
            self.destination.check_writable()

    def _delivered(self, result: ExtractResult) -> ExtractResult:
        if self.destination is None:
            return result
        return self.destination.deliver(
            result, self.force, self.started, self.on_progress, self.on_note
        )

    def _result(self, cache: Cache, *, reused: bool, n_resumed: int = 0) -> ExtractResult:
        why = self.setting.choice.why
        return result_of(cache, why, reused=reused, n_resumed=n_resumed, started=self.started)

    def _tell_of_skipped_classes(self, cache: Cache) -> None:
        dataset = self.setting.dataset
        for (role, split), found in zip(dataset.splits(), (cache.train, cache.test), strict=True):
            for label in np.setdiff1d(split.labels, found.labels):
                name = dataset.class_names[label]
                self.on_note(f"{role}: every image of class {name!r} was skipped")
