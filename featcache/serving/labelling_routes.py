"""The routes of labelling: JSON for its page. Who may ask, and how much, is the guard's."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..errors import DatasetError, OutputError
from ..schema import count, words, wrong_fields
from .labelling import Item, Labelling

_BROWSER = re.compile(r"[A-Za-z0-9-]{1,40}")
_MOST_BYTES = 64 << 10  # of a correction


def labelling_routes(session: Labelling) -> list[Route]:
    """Return the routes of a session."""
    answers = _Answers(session)
    return [
        Route("/label/next", answers.next),
        Route("/label/state", answers.state),
        Route("/label/correct", answers.correct, methods=["POST"]),
        Route("/label/undo", answers.undo, methods=["POST"]),
        Route("/label/skip", answers.skip, methods=["POST"]),
    ]


class _Answers:
    """What the routes answer; those that are no coroutines run in threads."""

    def __init__(self, session: Labelling) -> None:
        self._session = session

    def next(self, request: Request) -> Response:
        return self._with_state(item=_item(self._session.next(_browser(request))))

    def state(self, _: Request) -> Response:
        return JSONResponse(self._session.state())

    async def correct(self, request: Request) -> Response:
        given = await _body(request, id=words, label=words, version=count())
        return await self._changed(
            request, self._session.correct, given["id"], given["label"], given["version"]
        )

    async def undo(self, request: Request) -> Response:
        given = await _body(request, id=words, version=count())
        return await self._changed(request, self._session.undo, given["id"], given["version"])

    async def skip(self, request: Request) -> Response:
        browser, given = _browser(request), await _body(request, id=words)
        item = await _in_thread(self._session.next, browser, given["id"])
        return self._with_state(item=_item(item))

    async def _changed(
        self, request: Request, change: Callable[..., tuple[bool, Item]], *given: Any
    ) -> Response:
        """Change a label, and answer with the image as it is now and the next one."""
        browser = _browser(request)
        done, item = await _in_thread(change, *given)
        if not done:
            said = "somebody else has labelled this image since; nothing was changed"
            return self._with_state(409, error=said, item=_item(item))
        coming = await _in_thread(self._session.next, browser)
        return self._with_state(item=_item(item), next=_item(coming))

    def _with_state(self, status: int = 200, **facts: Any) -> Response:
        return JSONResponse({**facts, "state": self._session.state()}, status)


def _item(item: Item | None) -> dict[str, Any] | None:
    return None if item is None else {**vars(item), "image": f"/picture/train/{item.row}"}


def _browser(request: Request) -> str:
    """Return the name that a page gave itself: images that it shows are not shown to others."""
    browser = request.query_params.get("browser", "")
    if not _BROWSER.fullmatch(browser):
        raise HTTPException(400, "browser: expected 1 to 40 letters, digits or -")
    return browser


async def _body(request: Request, **fields: Any) -> dict[str, Any]:
    """Return the JSON object of a request."""
    data = b""
    async for part in request.stream():
        data += part
        if len(data) > _MOST_BYTES:
            raise HTTPException(413, f"body: expected at most {_MOST_BYTES:,} bytes, found more")
    try:
        given = json.loads(data)
    except (ValueError, RecursionError):
        given = None
    wrong = wrong_fields(given, fields, {})
    if wrong:
        raise HTTPException(
            400,
            f"body: expected JSON with {', '.join(fields)}, found no {wrong[0]}, or another kind",
        )
    found: dict[str, Any] = given
    return found


async def _in_thread(function: Callable[..., Any], *given: Any) -> Any:
    """Call a method of the session; errors become answers without a path."""
    try:
        return await run_in_threadpool(function, *given)
    except DatasetError as error:
        raise HTTPException(400, str(error)) from None
    except OutputError:
        raise HTTPException(
            507, "the table cannot be written, and nothing was changed; free space on the server"
        ) from None
