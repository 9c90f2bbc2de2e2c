"""New images, as they are given to a head: paths, streams of paths, watched folders, videos.

All become a series of `ImageSet`, one after the other. Files that are named at once are one set. Of
a stream a set is what has come by now, so that nobody waits for an answer until it goes on.
"""

from __future__ import annotations

import math
import os
import queue
import threading
import time
from collections.abc import Collection, Generator, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from .datasets.decoding import decode_image, image_suffixes
from .datasets.images import Files, Folder, ReadableImages, images_among, shown_names
from .datasets.named import default_data_root
from .datasets.tar import TarShards
from .datasets.urls import RemoteFolder, open_url
from .datasets.zip import ZipArchive
from .errors import (
    DatasetError,
    RecipeError,
    missing_package,
    one_line,
    shown_place,
    text_of,
)
from .files import open_file, user_path
from .options import MAX_PIXELS
from .preprocess import Preprocess
from .remote import RemotePlace, is_url, located

if TYPE_CHECKING:
    from PIL import Image


class ImageSet(ReadableImages, Protocol):
    """Images that are there, with their names."""

    @property
    def remote(self) -> bool:
        """Whether each read waits for a network."""

    def where(self, index: int) -> str:
        """Return the path, URL or moment of an image, for messages and results."""


Place = tuple[Files, str]  # where an image file is, and its name there


class PlacedImages:
    """Image files that `find_places` found."""

    def __init__(self, places: Sequence[Place], max_pixels: int = MAX_PIXELS) -> None:
        self._places = places
        self._max_pixels = max_pixels
        self.remote = any(files.remote for files, _ in places)

    def __len__(self) -> int:
        return len(self._places)

    def read(self, index: int, preprocess: Preprocess | None = None) -> Image.Image:
        """Read and decode one image, as `decode_image` does; raises `DatasetError`."""
        files, name = self._places[index]
        return decode_image(files.read(name), files.where(name), preprocess, self._max_pixels)

    def where(self, index: int) -> str:
        """Return the path or URL of an image, as it was given."""
        files, name = self._places[index]
        return files.where(name).removeprefix(f".{os.sep}")


def find_places(paths: Iterable[str | Path]) -> list[Place]:
    """Find the image files at paths and URLs: in their order, and inside each in that of names.

    A file is taken whatever its suffix. Folders, ``.zip`` and ``.tar`` archives are searched at any
    depth for images, without hidden files.
    """
    places: list[Place] = []
    for path in map(located, paths):
        if not isinstance(path, Path):
            if path.suffix in image_suffixes():
                places.append((RemoteFolder(path.parent), path.name))
            else:
                places += _inside(open_url(path)[0], path)
            continue
        folder = _is_folder(path)
        if not folder and path.suffix.lower() not in (".zip", ".tar"):
            places.append((Folder(path.parent), path.name))
            continue
        files: Files
        if folder:
            files = Folder(path)
        elif path.suffix.lower() == ".tar":
            files = TarShards([path], [""], default_data_root())
        else:
            files = ZipArchive(path)
        places += _inside(files, path)
    if not places:
        raise DatasetError("images: expected the path of at least one, found none")
    return places


def _is_folder(path: Path) -> bool:
    """Return whether a path is a folder and no file; raise DatasetError where it is neither."""
    # os.path returns False where pathlib raises: for a path without permission.
    folder = os.path.isdir(path)
    if not folder and not os.path.isfile(path):
        kind = "something else" if os.path.exists(path) else "nothing"
        raise DatasetError(
            f"{path}: expected an image, a folder, or a .zip or .tar of images, found {kind}; "
            "check the path"
        )
    return folder


def _inside(files: Files, path: Path | RemotePlace) -> list[Place]:
    inside = [(files, name) for name in images_among(files, shown_names(files, path)[0])[0]]
    if not inside:
        raise DatasetError(
            f"{path}: expected images (names that end in {', '.join(sorted(image_suffixes()))}), "
            "found none; give another folder, or the files themselves"
        )
    return inside


def named_sets(
    paths: Sequence[str | Path], every: str, max_pixels: int
) -> tuple[Iterator[ImageSet], int | None]:
    """Return the images at paths that are all known, and their number; None of videos.

    Raises DatasetError at once where there is nothing at a path, and EngineUnavailableError for a
    video without PyAV.
    """
    groups: list[PlacedImages | Path] = []
    for video, part in groupby(paths, _is_video):
        if video:
            _import_av()
            groups += [path for path in map(user_path, part) if not _is_folder(path)]
        else:
            groups.append(PlacedImages(find_places(part), max_pixels))
    if not groups:
        find_places(())
    counts = [len(group) for group in groups if isinstance(group, PlacedImages)]

    def sets() -> Iterator[ImageSet]:
        for group in groups:
            if isinstance(group, Path):
                yield from _frame_sets(group, every, max_pixels)
            else:
                yield group

    return sets(), sum(counts) if len(counts) == len(groups) else None


_MOST_AT_ONCE = 512  # paths that make a set


def streamed_sets(
    arriving: Iterable[Sequence[str | Path]], every: str, max_pixels: int
) -> Iterator[ImageSet]:
    """Yield the images at paths as these come, some at a time.

    What is wrong with a path becomes an image that cannot be read.
    """
    for some in arriving:
        for video, part in groupby(some, _is_video):
            if not video:
                yield from _located_sets(part, max_pixels)
                continue
            for path in map(user_path, part):
                yield from _frame_sets(path, every, max_pixels)


def _located_sets(paths: Iterable[str | Path], max_pixels: int) -> Iterator[ImageSet]:
    places: list[Place] = []
    for path in paths:
        try:
            places += find_places([path])
        except DatasetError as error:
            if places:
                yield PlacedImages(places, max_pixels)
            places = []
            yield _Decoded([str(path)], [str(error)])
    if places:
        yield PlacedImages(places, max_pixels)


def arrivals(paths: Iterable[str | Path]) -> Iterator[list[str | Path]]:
    """Yield what has come of a stream since the last time; a thread waits for it."""
    arrived: queue.Queue[Any] = queue.Queue(_MOST_AT_ONCE)
    ended = object()
    stop = threading.Event()

    def receive() -> None:
        try:
            for path in paths:
                arrived.put((path, None))
                if stop.is_set():
                    return
        except BaseException as error:
            arrived.put((None, error))
        arrived.put((ended, None))

    # A daemon: nothing can end its wait for a line.
    threading.Thread(target=receive, name="featcache paths", daemon=True).start()
    try:
        while True:
            some = [arrived.get()]
            with suppress(queue.Empty):
                while len(some) < _MOST_AT_ONCE:
                    some.append(arrived.get_nowait())
            known = [path for path, error in some if error is None and path is not ended]
            if known:
                yield known
            for path, error in some:
                if error is not None:
                    raise error
                if path is ended:
                    return
    finally:
        stop.set()
        with suppress(queue.Empty):
            arrived.get_nowait()  # lets it go on, and end


_MOST_BYTES = 1 << 16  # of a line; no system has longer paths


def read_paths(lines: IO[bytes]) -> Iterator[str]:
    """Yield the paths of a stream that has one a line; empty lines are left out."""
    while line := lines.readline(_MOST_BYTES):
        text = os.fsdecode(line.rstrip(b"\r\n"))
        if len(line) == _MOST_BYTES and not line.endswith(b"\n"):
            raise DatasetError(
                f"standard input: expected a path a line, found a line of more than "
                f"{_MOST_BYTES:,} bytes that begins {text[:40]!r}; put a line feed after each path"
            )
        if text:
            yield text


POLL_S = 1.0
_IDLE = 4  # times as long as a look took: at most a fifth of a core looks


def watch_folders(
    folders: Sequence[str | Path], answered: Collection[str] = ()
) -> Iterator[list[str]]:
    """Yield the images of folders, and new ones as they come, for ever; not those ``answered``.

    A file is taken when it is not empty and its size and time stood still from one look to the
    next. One that changes later is new.
    """
    if not folders:
        find_places(())
    for folder in folders:
        if not isinstance(located(folder), Path) or not os.path.isdir(folder):
            raise RecipeError(
                f"watch: expected folders of this machine, found {shown_place(str(folder))}; "
                "name the folder that new images come into"
            )
    return _watched([user_path(folder) for folder in folders], answered)


def _watched(folders: Sequence[Path], answered: Collection[str]) -> Iterator[list[str]]:
    taken: dict[str, tuple[int, int]] = {}
    seen: dict[str, tuple[int, int]] = {}
    while True:
        began = time.monotonic()
        now: dict[str, tuple[int, int]] = {}
        for files in map(Folder, folders):
            for name in images_among(files, shown_names(files, files.path)[0])[0]:
                with suppress(OSError):  # gone since
                    status = files.status(name)
                    now[files.where(name)] = (status.st_size, status.st_mtime_ns)
        taken |= {
            path: now[path] for path in now if path not in taken and text_of(path) in answered
        }
        ready = [
            path
            for path, state in now.items()
            if state[0] and state == seen.get(path) != taken.get(path)
        ]
        seen = now
        for start in range(0, len(ready), _MOST_AT_ONCE):
            some = ready[start : start + _MOST_AT_ONCE]
            taken |= {path: now[path] for path in some}
            yield some
        time.sleep(max(POLL_S, _IDLE * (time.monotonic() - began)))


# Videos. A file is read as what its name says: among the formats that FFmpeg recognises are lists
# of other files and addresses.

_FORMATS = {
    **dict.fromkeys((".mp4", ".m4v", ".mov", ".3gp"), "mov"),
    **dict.fromkeys((".mkv", ".webm"), "matroska"),
    **dict.fromkeys((".mpg", ".mpeg"), "mpeg"),
    ".avi": "avi",
    ".ts": "mpegts",
}
_SET_BYTES = 1 << 26  # of frames that are decoded at once
_MOST_FRAMES = 64


def _is_video(path: str | Path) -> bool:
    return not is_url(path) and os.path.splitext(path)[1].lower() in _FORMATS


def step_of(every: str) -> tuple[float | None, int]:
    """Read ``"2s"`` as seconds, and ``"10"`` as frames; RecipeError for anything else."""
    with suppress(ValueError):
        if every.endswith("s") and 0 < float(every[:-1]) < math.inf:
            return float(every[:-1]), 1
        if every.isdecimal() and int(every) > 0:
            return None, int(every)
    raise RecipeError(
        f"every: expected seconds such as 1s or 0.5s, or frames such as 10, found {every!r:.40}"
    )


@dataclass(frozen=True)
class _Decoded:
    """Images in memory; a text in place of one says why there is none."""

    names: list[str]
    images: list[Image.Image | str]
    remote = False

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int, preprocess: Preprocess | None = None) -> Image.Image:
        """Return an image; raises `DatasetError`."""
        image = self.images[index]
        if isinstance(image, str):
            raise DatasetError(image)
        return image

    def where(self, index: int) -> str:
        """Return the name of an image."""
        return self.names[index]


def _frame_sets(path: Path, every: str, max_pixels: int) -> Iterator[ImageSet]:
    """Yield the frames of a video, a few at a time."""
    frames = _Decoded([], [])
    n_bytes = 0
    with closing(_frames(path, every, max_pixels)) as decoded:
        for name, image in decoded:
            frames.names.append(name)
            frames.images.append(image)
            n_bytes += 0 if isinstance(image, str) else 3 * image.width * image.height
            if n_bytes >= _SET_BYTES or len(frames) >= _MOST_FRAMES:
                yield frames
                frames, n_bytes = _Decoded([], []), 0
    if len(frames):
        yield frames


def _frames(
    path: Path, every: str, max_pixels: int
) -> Generator[tuple[str, Image.Image | str], None, None]:
    """Yield every so many seconds or frames of a video; what is wrong, last.

    A frame is called ``video.mp4#t=12.0``, in seconds (https://www.w3.org/TR/media-frags).
    """
    av = _import_av()
    seconds, step = step_of(every)
    shown, due, n_taken = shown_place(str(path)), -math.inf, 0
    try:
        with (
            open_file(path) as file,
            av.open(file, format=_FORMATS[path.suffix.lower()]) as container,
        ):
            if not container.streams.video:
                raise ValueError("no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            stream.codec_context.options = {"max_pixels": str(max_pixels)}
            began = (container.start_time or 0) / av.time_base
            for number, frame in enumerate(container.decode(stream)):
                rate = float(stream.average_rate or 1)
                moment = max(0.0, number / rate if frame.time is None else frame.time - began)
                if number % step or (seconds is not None and moment < due):
                    continue
                if seconds is not None:
                    due = (math.floor(moment / seconds + 1e-6) + 1) * seconds - 1e-6
                image = frame.to_image()
                turn = getattr(frame, "rotation", 0)  # counterclockwise
                yield f"{path}#t={_decimal(moment)}", image.rotate(turn, expand=True)
                n_taken += 1
        if not n_taken:
            raise ValueError("no frame")
    except Exception as error:  # FFmpeg's errors are of many kinds
        why = one_line(getattr(error, "strerror", None) or error)
        wrong = f"one that does not decode after {n_taken} frames ({why})"
        expected = f"{shown}: expected a video of at most {max_pixels:,} pixels"
        yield str(path), f"{expected}, found {wrong}; replace or remove the file"


def _decimal(seconds: float) -> str:
    """Return seconds with one to three decimals: ``12.0``, ``0.333``."""
    text = f"{seconds:.3f}".rstrip("0")
    return text + "0" if text.endswith(".") else text


def _import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise missing_package("videos", "av", error, "video") from None
    return av
