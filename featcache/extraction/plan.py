"""What an extraction makes, decided before the first image is read: provenance, name, shards."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..backbones.choice import EngineChoice
from ..backbones.engine import computed_by
from ..backbones.weights import Weights
from ..datasets.dataset import Dataset, Split, listing_digest
from ..datasets.images import FileImages
from ..datasets.stat_cache import remembering
from ..errors import CacheError, CacheMismatchError, OutputError
from ..files import user_path
from ..progress import OnProgress
from ..store.cache import Cache, load
from ..store.format import differences, fingerprint
from ..store.index import default_folder
from ..store.rows import KnownRows
from ..store.shards import LISTED, UNDIVIDED, ShardRange, shards_path, unfinished_folder
from ..version import __version__
from .options import ExtractOptions

SUFFIXES = (".h5", ".shards")
# In front of the digest of the names and labels, which stands for that of the data set until its
# images have been read.
NAMES = "names:"
MAKE_AGAIN = "use --force to make it again, or name another --output"


@dataclass(frozen=True)
class Work:
    """What is made of every image, on whichever machine; ``n_passes`` counts the whole data set.

    ``evidence`` is what the precision was chosen by, where that was left to featcache.
    """

    options: ExtractOptions
    weights: Weights
    choice: EngineChoice
    n_passes: int
    evidence: dict[str, Any] | None = None


@dataclass(frozen=True)
class Plan:
    """Which images an extraction reads, what it makes of them, and in which shards."""

    dataset: Dataset
    work: Work
    shard_rows: int

    @property
    def options(self) -> ExtractOptions:
        """The options, with the output on this machine."""
        return self.work.options

    def listed(self) -> dict[str, Split]:
        """Return the split of each role, or all images of an undivided data set as one."""
        division = self.dataset.undivided
        return {UNDIVIDED: division.whole} if division else dict(self.dataset.splits())

    @property
    def n_listed(self) -> dict[str, int]:
        """Number of images by role, as `shard_ranges` takes them."""
        return {f"n_{role}": len(split) for role, split in self.listed().items()}

    def shards(self) -> list[ShardRange]:
        """Return the shards of all splits, in the order of the rows."""
        return shard_ranges(self.shard_rows, **self.n_listed)

    def meta(self, digest: str) -> dict[str, Any]:
        """Return the provenance, with this as the digest of the data set."""
        dataset, work = self.dataset, self.work
        fields = {
            **computed_by(work.choice, work.weights),
            "class_names": list(dataset.class_names),
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "dataset": dataset.name,
            "dataset_digest": digest,
            "dataset_path": dataset.path,
            "dataset_source": dataset.source,
            "featcache_version": __version__,
            "views": list(work.options.views_of("train")),
            "weights": work.weights.name,
            "weights_source": work.weights.source,
        }
        if dataset.divided_by != "given":
            fields["split"] = dataset.divided_by
        if work.evidence is not None:
            fields["precision_evidence"] = work.evidence
        return {
            **dict(sorted(fields.items())),
            "cuts": list(work.options.cuts),
            "dtype": work.options.dtype,
        }

    def meta_before_reading(self, on_progress: OnProgress) -> dict[str, Any]:
        """Return the provenance with the digest of the names; of arrays, with the real one."""
        if not all(isinstance(split.images, FileImages) for split in self.listed().values()):
            return self.meta(self.dataset.digest_with(on_progress, self.options.on_error))
        return self.meta(NAMES + listing_digest(self.dataset))

    def path(self, meta: Mapping[str, Any]) -> Path:
        """Return where the cache goes, as a packed file."""
        return cache_path(self.options.output, meta)

    def may_be_there(self) -> bool:
        """Tell whether there is a cache that differs in nothing but perhaps its images.

        Only then are the images hashed before the work. A cache of the very name asked for counts
        whatever is in it, so that an error lists what differs.
        """
        if self._is_named:
            return any(True for _ in self.caches_there())
        meta = self.meta("")
        return any(_may_be_of(path, meta) for path in self.caches_there())

    @property
    def _is_named(self) -> bool:
        return Path(self.options.output or "").suffix in SUFFIXES

    def caches_there(self) -> Iterator[Path]:
        """Yield the caches that have the name of this one, but for the fingerprint."""
        if self._is_named:
            path = user_path(self.options.output or "").with_suffix(".h5")
            yield from filter(os.path.lexists, (path, shards_path(path)))
            return
        stem, folder = name_stem(self.meta("")), output_folder(self.options)
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.suffix in SUFFIXES and path.name.startswith(f"{stem}-"):
                yield path

    def unfinished_there(self) -> Iterator[Path]:
        """Yield the folders of runs that may be those of this cache, and did not end."""
        if self._is_named:
            yield unfinished_folder(user_path(self.options.output or ""))
            return
        pattern = f".{glob.escape(name_stem(self.meta('')))}-*.h5.parts"
        yield from output_folder(self.options).glob(pattern)


def output_folder(options: ExtractOptions) -> Path:
    """Return where the cache goes."""
    target = user_path(options.output) if options.output else default_folder()
    return target.parent if target.suffix in SUFFIXES else target


def remembered_hashes(dataset: Dataset, options: ExtractOptions) -> AbstractContextManager[None]:
    """Remember the hashes of local images beside the cache, and trust those from before."""
    images = (split.images for split in dataset.listed())
    files = [one.files for one in images if isinstance(one, FileImages)]
    return remembering(files, output_folder(options), verify=options.verify_images)


def known_rows(plan: Plan) -> KnownRows:
    """Return the rows of caches beside the one that is made, and of the default folder."""
    shapes = plan.work.weights.shapes(plan.options.cuts)
    folders = (output_folder(plan.options), default_folder())
    return KnownRows(folders, plan.meta(""), shapes)


def shard_ranges(shard_rows: int, **n_listed: int) -> list[ShardRange]:
    """Return the shards of so many images (``n_train``, …), in the order of the rows."""
    return [
        ShardRange(role, start, min(start + shard_rows, n_listed[f"n_{role}"]))
        for role in LISTED
        for start in range(0, n_listed.get(f"n_{role}", 0), shard_rows)
    ]


def cache_path(output: str | Path | None, meta: Mapping[str, Any]) -> Path:
    """Return where a cache goes: ``<dataset>-<backbone>-<weights>-<size>-<fingerprint8>.h5``."""
    target = user_path(output) if output else default_folder()
    if target.suffix in SUFFIXES:
        return target.with_suffix(".h5")
    if target.suffix and not target.is_dir() and not str(output).endswith(os.sep):
        raise OutputError(
            f"{target}: expected a name that ends in .h5, or a folder (with {os.sep} at its end "
            f"where it is not there yet), found {target.suffix!r}; rename it"
        )
    return target / f"{name_stem(meta)}-{fingerprint(meta)[:8]}.h5"


def name_stem(meta: Mapping[str, Any]) -> str:
    """Return how a cache's name begins: all but the fingerprint."""
    size = str(meta["preprocess"]["size"])
    names = (re.sub(r"[^A-Za-z0-9._-]+", "-", meta[key])[:80] for key in ("backbone", "weights"))
    return "-".join((meta["dataset"], *names, size))


def same_but_images(meta: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    """Tell whether a cache differs in nothing but perhaps its images."""
    same_images = {**expected, "dataset_digest": meta["dataset_digest"]}
    return bool(fingerprint(same_images) == meta["fingerprint"])


def _may_be_of(path: Path, meta: Mapping[str, Any]) -> bool:
    try:
        return same_but_images(load(path).meta, meta)
    except CacheError:
        return True  # `matching` says what is wrong with it


def matching(path: Path, expected: Mapping[str, Any], on_error: str) -> Cache:
    """Open the cache at a path, and refuse one of other ingredients."""
    try:
        cache = load(path)
    except CacheError as error:
        raise type(error)(f"{error} ({MAKE_AGAIN})") from None
    check_ingredients(path, cache.meta, expected)
    skipped = [name for _, split in cache.splits() for name in split.skipped]
    check_none_skipped(path, len(skipped), on_error, f" ({skipped[0]} …)" if skipped else "")
    return cache


def check_ingredients(path: object, meta: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse a cache of other ingredients; the message lists them."""
    if meta["fingerprint"] != fingerprint(expected):
        raise CacheMismatchError(
            f"{path}: expected a cache of these ingredients, found one of others: "
            f"{'; '.join(differences(meta, expected))}; {MAKE_AGAIN}"
        )


def check_none_skipped(path: object, n_skipped: int, on_error: str, such_as: str = "") -> None:
    """Refuse a cache that leaves out images, where every image is asked for."""
    if n_skipped and on_error == "fail":
        raise CacheMismatchError(
            f"{path}: expected every image of the data set, found a cache without {n_skipped} that "
            f"did not decode{such_as}; use --on-error skip to take it as it is, or {MAKE_AGAIN}"
        )
