"""The routes of the server, as an ASGI application."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router

from ..errors import DatasetError, RecipeError, visible_line
from ..options import MAX_PIXELS
from ..prediction import Extractor, PredictOptions, checked_head, evaluate_head, load_extractor
from ..probes.head import Head
from ..probes.question import opened
from ..progress import OnNote, OnProgress, silent
from ..reporting.page import page_file
from ..reporting.pictures import find_pictures
from ..reporting.style import stylesheet
from ..store.cache import Cache
from ..version import __version__
from .batching import Answer, Batcher, Busy, Timing
from .cached import Cached
from .guard import Guard, check_token
from .labelling import Labelling
from .labelling_routes import labelling_routes

_PER_REQUEST = 64  # images
_MOST_NEIGHBOURS = 100
_FIELDS = 16  # of a form, besides its files
_NAME = 200  # characters of a client's name of an image
_STATIC = {
    "/": ("page.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/common.js": ("common.js", "text/javascript"),
    "/docs": ("docs.html", "text/html"),
    "/docs.js": ("docs.js", "text/javascript"),
}
_LABELLING = {
    "/label": ("label.html", "text/html"),
    "/label.js": ("label.js", "text/javascript"),
}


@dataclass(frozen=True)
class ServeOptions:
    """Options of the server.

    Parameters
    ----------
    weights, backbone, device : as in `featcache.predict`
        What computes the features.
    cache : str or Path, optional
        The head's cache, or one made alike: shows the nearest images, and the accuracy on its
        test split.
    dataset, data_root : str or Path, optional
        Where the images of the cache are, for their pictures.
    label : str or Path, optional
        A CSV file of labels, made where there is none, to which the page /label appends.
    host : str
        Address to listen on; all but loopback ones need a token.
    port : int
        0 takes a free one.
    token : str, optional
        The secret that every request must bring, in 16 to 200 characters.
    max_pixels : int
        Images of more pixels are refused.
    max_bytes : int
        Most bytes of a request.
    timeout_s : float
        Most seconds that a request may take, its sending included.
    connections : int
        Most connections at a time; a further one is answered 503.
    queue : int
        Most images that are under way; a request for which there is no room is answered 503.
    """

    weights: str | Path | None = None
    backbone: str | Path | None = None
    device: str = "auto"
    cache: str | Path | None = None
    dataset: str | Path | None = None
    data_root: str | Path | None = None
    label: str | Path | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    max_pixels: int = MAX_PIXELS
    max_bytes: int = 32 << 20
    timeout_s: float = 30.0
    connections: int = 256
    queue: int = 256

    def __post_init__(self) -> None:
        for name in ("max_pixels", "max_bytes", "timeout_s", "connections", "queue"):
            value = getattr(self, name)
            if not value >= 1:
                raise RecipeError(f"{name.replace('_', ' ')}: expected at least 1, found {value:g}")
        if not 0 <= self.port <= 65535:
            raise RecipeError(f"port: expected 0 to 65535, found {self.port}")
        if self.dataset is not None and self.cache is None:
            raise RecipeError("dataset: expected a cache of its images, found none; add --cache")
        if self.label is not None and self.cache is None:
            raise RecipeError("label: expected a cache of the images, found none; add --cache")
        check_token(self.host, self.token)


def create_app(
    head: str | Path | Head,
    *,
    options: ServeOptions,
    on_progress: OnProgress = silent,
    on_note: OnNote = silent,
) -> Guard:
    """Load everything, and return the application, for any ASGI server.

    Raises what `featcache.predict` and `featcache.load` raise.
    """
    head, where = checked_head(head, of_classes=options.label is not None)
    cached = session = accuracy = None
    if options.cache is not None:
        cache = opened(options.cache)
        cached = Cached(cache, head, where)
        if options.dataset is not None or options.label is not None:
            cached.pictures, why = find_pictures(
                cache, options.dataset, options.data_root, on_progress
            )
            if cached.pictures is None and options.label is not None:
                raise DatasetError(f"label: expected the images of {cache.path}, found none: {why}")
        accuracy = _accuracy(head, cache)
        del cache  # which keeps the arrays that it has read
    extractor = load_extractor(
        head.ingredients,
        where,
        PredictOptions(options.weights, options.backbone, options.device),
        on_progress=on_progress,
        on_note=on_note,
    )
    if cached is not None and options.label is not None:
        session = Labelling(cached, head, options.label)
    routes = _Routes(head, options, extractor, cached, session, accuracy)

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        async with routes.batcher:
            with session or nullcontext():
                yield
        if session is not None and session.to_keep():
            on_note(f"to keep the head that was learnt, type: {session.to_keep()}")

    return Guard(
        Router(routes.all(), redirect_slashes=False, lifespan=lifespan),
        host=options.host,
        token=options.token,
        max_bytes=options.max_bytes,
        timeout_s=options.timeout_s,
        on_note=on_note,
    )


def _accuracy(head: Head, cache: Cache) -> dict[str, Any] | None:
    """Return the accuracy on the test split of a cache, where it has one with the same classes."""
    if head.task != "classes" or not len(cache.test) or cache.class_names != head.class_names:
        return None
    result = evaluate_head(head, cache)
    return {
        "top1": result.top1,
        "top1_interval": list(result.top1_interval),
        "n_test": result.n_test,
    }


class _Routes:
    """What the server answers."""

    def __init__(
        self,
        head: Head,
        options: ServeOptions,
        extractor: Extractor,
        cached: Cached | None,
        session: Labelling | None,
        accuracy: dict[str, Any] | None,
    ) -> None:
        self._given, self._session, self._cached = head, session, cached
        self.batcher = Batcher(
            extractor, self._head, cached, most=options.queue, max_pixels=options.max_pixels
        )
        self.batcher.warm_up()
        self._most_images = min(_PER_REQUEST, options.queue)
        self._shows = cached is not None and cached.pictures is not None
        self._facts = {
            "task": head.task,
            "backbone": head.ingredients["backbone"],
            "weights_sha256": head.ingredients["weights_sha256"],
            "size": extractor.preprocess.size,
            "fingerprint": head.fingerprint,
            "accuracy": accuracy,
            "neighbours": cached is not None,
            "pictures": self._shows,
            "labelling": session is not None,
            "max_bytes": options.max_bytes,
            "max_pixels": options.max_pixels,
            "max_images": self._most_images,
            "featcache_version": __version__,
        }

    def _head(self) -> Head:
        return self._given if self._session is None else self._session.newest[0]

    def all(self) -> list[Route]:
        """Return the routes; those of files that ship with featcache are read once."""
        files = resources.files(__package__)
        static = _STATIC if self._session is None else {**_STATIC, **_LABELLING}
        fixed = {path: ((files / name).read_bytes(), kind) for path, (name, kind) in static.items()}
        style = stylesheet() + page_file("page.css") + (files / "page.css").read_text("utf-8")
        described = json.loads((files / "openapi.json").read_text("utf-8"))
        described["info"]["version"] = __version__
        fixed["/page.css"] = style.encode(), "text/css"
        fixed["/openapi.json"] = json.dumps(described).encode(), "application/json"
        fixed["/health"] = b'{"status": "ok"}', "application/json"
        return [
            *(Route(path, _constant(*content)) for path, content in fixed.items()),
            Route("/model", self.model),
            Route("/predict", self.predict, methods=["POST"]),
            Route("/picture/{split}/{row:int}", self.picture),
            *(labelling_routes(self._session) if self._session is not None else ()),
        ]

    async def model(self, _: Request) -> Response:
        """Answer with what the head is that answers now."""
        head, point = (self._given, None) if self._session is None else self._session.newest
        answer = {**self._facts, "classes": list(head.class_names), "learnt": None}
        if head is not self._given and self._session is not None:
            # The accuracy is that of the given head, and test images are no part of labelling.
            learnt = {**(vars(point) if point is not None else {}), **self._session.holdout()}
            answer |= {"accuracy": None, "learnt": learnt}
        return JSONResponse(answer)

    async def predict(self, request: Request) -> Response:
        """Answer with a prediction of each image in the body."""
        n_classes = len(self._head().class_names)
        top = _number(request, "top", 1, n_classes, at_least=1)
        k = _number(request, "neighbours", 0, _MOST_NEIGHBOURS)
        if k and self._cached is None:
            raise HTTPException(400, "neighbours: this server has no cache to look in")
        images = await self._images(request)
        try:
            answers, timing = await self.batcher.answers(images, top=top, k=k)
        except Busy as busy:
            raise HTTPException(
                503, "busy; try again", {"retry-after": str(busy.retry_after_s)}
            ) from None
        errors = [answer.prediction.error for answer in answers]
        if all(error is not None for error in errors):
            raise HTTPException(400, errors[0])
        rows = [self._row(answer) for answer in answers]
        return JSONResponse(rows, headers={"server-timing": _server_timing(timing)})

    def _row(self, answer: Answer) -> dict[str, Any]:
        row = asdict(answer.prediction)
        if answer.neighbours is not None:
            row["neighbours"] = [
                {
                    **asdict(one),
                    "picture": f"/picture/{one.split}/{one.row}" if self._shows else None,
                }
                for one in answer.neighbours
            ]
        return row

    async def _images(self, request: Request) -> list[tuple[str, bytes]]:
        """Return the images of the body, each with a name for messages: never one of ours."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "multipart/form-data":
            limits = {"max_files": self._most_images, "max_fields": _FIELDS}
            async with request.form(**limits) as form:
                files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
                images = [
                    (_name_of(file, row), await file.read()) for row, file in enumerate(files)
                ]
        else:
            images = [("image", await request.body())]
        if not images or not all(data for _, data in images):
            raise HTTPException(
                400,
                "body: expected the bytes of an image, or multipart/form-data with files, found "
                "none; try: curl --data-binary @image.jpg",
            )
        return images

    async def picture(self, request: Request) -> Response:
        """Answer with the picture of an image of the cache."""
        found = None
        if self._cached is not None:
            split, row = request.path_params["split"], request.path_params["row"]
            loop = asyncio.get_running_loop()
            found = await loop.run_in_executor(None, self._cached.picture, split, row)
        if found is None:
            raise HTTPException(404, "there is no such picture")
        return Response(found, media_type="image/webp", headers={"cache-control": "max-age=3600"})


def _constant(content: bytes, kind: str) -> Any:
    async def answer(_: Request) -> Response:
        return Response(content, media_type=kind)

    return answer


def _number(request: Request, name: str, default: int, most: int, at_least: int = 0) -> int:
    """Return a number of the address's query, at most ``most``."""
    text = request.query_params.get(name, str(default))
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) >= at_least):
        raise HTTPException(400, f"{name}: expected a whole number from {at_least}")
    return min(int(text), most)


def _name_of(file: UploadFile, row: int) -> str:
    """Return the client's own name of a file, without its folders; else its place."""
    name = visible_line((file.filename or "").replace("\\", "/").rpartition("/")[2])
    return name[:_NAME] or f"image {row + 1}"


def _server_timing(timing: Timing) -> str:
    """Return https://www.w3.org/TR/server-timing/ in milliseconds."""
    return ", ".join(f"{name};dur={1000 * value:.2f}" for name, value in vars(timing).items())
