"""Images that arrive together go through the backbone together; a queue that has an end."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..cores import usable_cores
from ..datasets.decoding import decode_image
from ..errors import DatasetError, FeatcacheError
from ..prediction import Extractor, Prediction, predictions_of
from ..probes.head import Head
from .cached import Cached, Near

_BATCH, _FEW = 64, 8  # images at once, as `predict` takes by default; those of few clients
_MOST_WAIT_S = 60
_COMPANY, _TICK_S = 0.2, 0.001  # the share of a batch's time that the next waits for company


class Busy(Exception):
    """The queue is full; ``retry_after_s`` says when it will have room."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__("the queue is full")
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class Answer:
    """What is said of one image: a prediction, or why there is none, and its neighbours."""

    prediction: Prediction
    neighbours: tuple[Near, ...] | None = None


def _failed(name: str, error: FeatcacheError) -> Answer:
    return Answer(Prediction(name, None, None, (), error=str(error)))


@dataclass
class Timing:
    """Where the time of a request went, in seconds, for its images together."""

    decode: float = 0.0
    wait: float = 0.0
    compute: float = 0.0


@dataclass(eq=False)
class _Item:
    """A decoded image that waits for the engine."""

    name: str
    pixels: np.ndarray  # uint8 (s, s, 3)
    top: int
    k: int  # neighbours
    future: asyncio.Future[tuple[Answer, float, float]] | None = None
    since: float = field(default_factory=time.perf_counter)


class Batcher:
    """Decodes in threads, and gives the engine all that waits for it, up to a batch.

    An engine serves one caller at a time: a single thread uses it. While it works, what arrives
    becomes the next batch; ``head`` is asked for at each. With less than keeps every core busy, and
    after a batch of several, the next one waits a fraction of its time for as many; a lone client
    never waits. Use as an asynchronous context, in which its methods are called by the event loop's
    thread alone.
    """

    def __init__(
        self,
        extractor: Extractor,
        head: Callable[[], Head],
        cached: Cached | None,
        *,
        most: int,
        max_pixels: int,
    ) -> None:
        self._extractor, self._head, self._cached = extractor, head, cached
        self._for_few = extractor
        self.most, self._max_pixels = most, max_pixels
        self._held = 0  # images that were accepted and are not done
        self._image_s = 0.05  # the time that an image took lately
        self._least = max(1, extractor.engine.batch_size // 4)  # what keeps every core busy
        self._waiting: deque[_Item] = deque()
        self._there = asyncio.Event()

    def warm_up(self) -> None:
        """Compute an image each way, so that no client waits until kernels are compiled."""
        self._for_few = self._extractor.for_few(_FEW)
        size = self._extractor.preprocess.size
        self._predicted([_Item("black", np.zeros((size, size, 3), np.uint8), 1, 1)])

    async def __aenter__(self) -> Batcher:
        """Start the threads."""
        self._there = asyncio.Event()  # of this loop
        self._decoders = ThreadPoolExecutor(usable_cores(), "featcache-decode")
        self._engine = ThreadPoolExecutor(1, "featcache-engine")
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        """End the threads; what they have begun ends first."""
        self._task.cancel()
        for pool in (self._decoders, self._engine):
            pool.shutdown(wait=True, cancel_futures=True)

    async def answers(
        self, images: Sequence[tuple[str, bytes]], *, top: int, k: int = 0
    ) -> tuple[list[Answer], Timing]:
        """Return an answer for each image, given with its name; raise `Busy` without room."""
        if self._held + len(images) > self.most:
            wait_s = math.ceil(self._held * self._image_s)
            raise Busy(min(max(1, wait_s), _MOST_WAIT_S))
        # A place stays taken until the work is over, even where the client has gone.
        tasks = [asyncio.ensure_future(self._answer(*image, top, k)) for image in images]
        self._held += len(tasks)
        for task in tasks:
            task.add_done_callback(self._let_go)
        # Shielded: a thread that decodes cannot be stopped, and so keeps its place.
        found = await asyncio.shield(asyncio.gather(*tasks))
        timing = Timing(*(max(column) for column in zip(*(times for _, times in found))))  # noqa: B905
        return [answer for answer, _ in found], timing

    def _let_go(self, task: asyncio.Future[Any]) -> None:
        self._held -= 1
        if not task.cancelled():
            task.exception()  # was seen, also where nobody waits any longer

    async def _answer(
        self, name: str, data: bytes, top: int, k: int
    ) -> tuple[Answer, tuple[float, float, float]]:
        loop = asyncio.get_running_loop()
        began = time.perf_counter()
        try:
            pixels = await loop.run_in_executor(self._decoders, self._decoded, name, data)
        except DatasetError as error:
            return _failed(name, error), (time.perf_counter() - began, 0.0, 0.0)
        del data
        future = loop.create_future()
        item = _Item(name, pixels, top, k, future)
        self._waiting.append(item)
        self._there.set()
        answer, wait_s, compute_s = await future
        return answer, (item.since - began, wait_s, compute_s)

    def _decoded(self, name: str, data: bytes) -> np.ndarray:
        """Return canonical pixels uint8 (s, s, 3): what `predict` gives the engine."""
        preprocess = self._extractor.preprocess
        return preprocess.pixels(decode_image(data, name, preprocess, self._max_pixels))

    async def _run(self) -> None:
        loop, usual, took = asyncio.get_running_loop(), 1, 0.0
        while True:
            await self._there.wait()
            end = time.perf_counter() + _COMPANY * took
            while len(self._waiting) < min(usual, self._least) and time.perf_counter() < end:
                await asyncio.sleep(_TICK_S)
            # Half of what is under way: the engine has the other half while these come back.
            most = min(_BATCH, max(self._least, -(-self._held // 2)))
            batch = [self._waiting.popleft() for _ in range(min(most, len(self._waiting)))]
            if not self._waiting:
                self._there.clear()
            began = time.perf_counter()
            answers = await loop.run_in_executor(self._engine, self._computed, batch)
            took = time.perf_counter() - began
            usual = max(len(batch), usual // 2)
            self._image_s += 0.2 * (took / len(batch) - self._image_s)
            for item, answer in zip(batch, answers, strict=True):
                assert item.future is not None
                if item.future.done():
                    continue
                if isinstance(answer, Exception):
                    item.future.set_exception(answer)
                else:
                    item.future.set_result((answer, began - item.since, took))

    def _computed(self, batch: list[_Item]) -> list[Answer | Exception]:
        """Return the answers of a batch; where it fails, those of each image by itself."""
        try:
            return list(self._predicted(batch))
        except Exception as error:
            if len(batch) > 1:
                return [answer for item in batch for answer in self._computed([item])]
            if isinstance(error, FeatcacheError):  # such as features that are not finite
                return [_failed(batch[0].name, error)]
            return [error]

    def _predicted(self, batch: list[_Item]) -> list[Answer]:
        names = [item.name for item in batch]
        extractor = self._for_few if len(batch) <= _FEW else self._extractor
        features = extractor.features(np.stack([item.pixels for item in batch]), names)
        top = max(item.top for item in batch)
        made = predictions_of(self._head(), features, names, top)
        answers = [
            Answer(replace(one, top=one.top[: item.top]))
            for item, one in zip(batch, made, strict=True)
        ]
        asked = [row for row, item in enumerate(batch) if item.k]
        if self._cached is not None and asked:
            k = max(batch[row].k for row in asked)
            near = self._cached.nearest(features[asked], k)
            for row, found in zip(asked, near, strict=True):
                answers[row] = replace(answers[row], neighbours=tuple(found[: batch[row].k]))
        return answers
