"""What stands before every route: who may ask, how much, how long; and what an error looks like."""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import json
import re
import secrets
import time
import traceback
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ..errors import RecipeError, one_line
from ..progress import OnNote

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]{16,200}")
_COOKIE = "featcache"
_BODIES = 8  # times the most bytes of one request, that all requests together may hold
_DRAIN_S = 1.0  # a client that still sends does not hear why it may not
_MARGIN_S = 2.0
# Scripts, styles and images come from here alone; pictures that a user drops are blobs.
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(self), microphone=(), geolocation=()",
    "cache-control": "no-store",
}


def is_loopback(host: str) -> bool:
    """Tell whether an address can be reached from this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_token(host: str, token: str | None) -> None:
    """Refuse to listen where others can ask without a token, and a token that can be guessed."""
    if token is None and not is_loopback(host):
        raise RecipeError(
            f"host: expected a token for {one_line(host)}, which others can reach, found none; "
            "set FEATCACHE_TOKEN to a secret, such as that of: openssl rand -hex 16"
        )
    if token is not None and not _TOKEN.fullmatch(token):
        raise RecipeError(
            f"token: expected 16 to 200 letters, digits or ._~+/=-, found {len(token)} characters "
            "or others; try the output of: openssl rand -hex 16"
        )


class Guard:
    """The whole application: its routes, behind the checks and limits of this module."""

    def __init__(
        self,
        app: App,
        *,
        host: str,
        token: str | None,
        max_bytes: int,
        timeout_s: float,
        on_note: OnNote,
    ) -> None:
        self._app, self._on_note = app, on_note
        self._max_bytes, self._timeout_s = max_bytes, timeout_s
        self._held_bytes = 0
        self._token = None if token is None else token.encode()
        # Elsewhere, the names by which the machine is reached are not known; there is the token.
        self._hosts = {"127.0.0.1", "localhost", "::1", host} if is_loopback(host) else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return None
        answer = _Answer(send)
        body = _Body(self, scope, receive)
        scope["app"] = self  # Starlette then raises its errors, which get our form below
        try:
            self._check(scope)
            await asyncio.wait_for(
                self._app(scope, body.receive, answer.send), self._timeout_s + _MARGIN_S
            )
        except HTTPException as refused:
            if refused.status_code == 413 and not body.is_held_back:
                await body.drain()
            await answer.refuse(refused)
        except ClientDisconnect:
            pass
        except asyncio.TimeoutError:
            await answer.refuse(
                HTTPException(503, "it took too long; try again", {"retry-after": "5"})
            )
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(at.filename).name}:{at.lineno}"
            self._on_note(f"warning: {scope['path']!r:.80}: {type(error).__name__} at {place}")
            await answer.refuse(
                HTTPException(500, "internal error; the server's terminal has a line")
            )
        finally:
            body.let_go()
        return None

    def _check(self, scope: Scope) -> None:
        """Refuse a request by what stands in its head."""
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get(b"host", "")
        if self._hosts is not None and _host_of(host) not in self._hosts:
            # A page of another site may have had its own name resolve to this machine.
            raise HTTPException(421, "host: expected 127.0.0.1 or localhost, found another name")
        origin = headers.get(b"origin")
        unsafe = scope["method"] not in ("GET", "HEAD")
        if unsafe and origin is not None and urlsplit(origin).netloc != host:
            raise HTTPException(403, "origin: expected this server's own pages, found another site")
        if self._token is not None and scope["path"] != "/health":
            self._check_token(scope, headers)
        length = headers.get(b"content-length", "0")
        if not length.isdecimal() or int(length) > self._max_bytes:
            raise self.too_large()

    def _check_token(self, scope: Scope, headers: dict[bytes, str]) -> None:
        assert self._token is not None
        kind, _, given = headers.get(b"authorization", "").partition(" ")
        if kind.lower() == "bearer" and _same(given.strip().encode("latin-1"), self._token):
            return
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        cookie = hashlib.sha256(b"featcache " + self._token).hexdigest()
        found = [value for name, value in query if name == "token"]
        if found and _same(found[0].encode("latin-1", "replace"), self._token):
            # The address loses the token, which would stay in the browser's history.
            rest = urlencode([pair for pair in query if pair[0] != "token"])
            raise HTTPException(
                303,
                "see the address without the token",
                {
                    "location": "/"
                    + scope["raw_path"].decode().lstrip("/")
                    + (f"?{rest}" if rest else ""),
                    "set-cookie": f"{_COOKIE}={cookie}; HttpOnly; SameSite=Strict; Path=/",
                },
            )
        try:
            kept = SimpleCookie(headers.get(b"cookie", "")).get(_COOKIE)
        except CookieError:
            kept = None
        if kept is None or not _same(kept.value.encode("latin-1", "replace"), cookie.encode()):
            raise HTTPException(
                401,
                "token: expected the server's; send the header Authorization: Bearer TOKEN, or "
                "open the address with ?token=TOKEN once",
                {"www-authenticate": "Bearer"},
            )

    def too_large(self) -> HTTPException:
        """Return the answer to a request of too many bytes."""
        return HTTPException(
            413,
            f"body: expected at most {self._max_bytes:,} bytes, found more",
            {"connection": "close"},
        )

    def take(self, n_bytes: int) -> None:
        """Count bytes of bodies that are in memory."""
        if self._held_bytes + n_bytes > _BODIES * self._max_bytes:
            raise HTTPException(503, "busy; try again", {"retry-after": "1", "connection": "close"})
        self._held_bytes += n_bytes

    def give(self, n_bytes: int) -> None:
        """Count bytes that are no longer in memory."""
        self._held_bytes -= n_bytes

    @property
    def limits(self) -> tuple[int, float]:
        """Return the most bytes and seconds of a request."""
        return self._max_bytes, self._timeout_s


class _Body:
    """The body of a request as it arrives, with its limits of bytes and time."""

    def __init__(self, guard: Guard, scope: Scope, receive: Receive) -> None:
        self._guard, self._receive = guard, receive
        self._max_bytes, timeout_s = guard.limits
        self._end = time.monotonic() + timeout_s
        self._taken = 0
        self._over = False
        # Such a client sends nothing until it is told to, which reading would do.
        self.is_held_back = any(name == b"expect" for name, _ in scope["headers"])

    async def receive(self) -> Message:
        """Return the next part; raise HTTPException for one part too many, or too late."""
        if self._over:
            return await self._receive()  # waits for the client to leave
        try:
            message = await asyncio.wait_for(self._receive(), self._end - time.monotonic())
        except asyncio.TimeoutError:
            raise HTTPException(
                408, "body: expected it sooner; the connection is too slow", {"connection": "close"}
            ) from None
        n_bytes = len(message.get("body", b""))
        if self._taken + n_bytes > self._max_bytes:
            raise self._guard.too_large()
        self._guard.take(n_bytes)
        self._taken += n_bytes
        self._over = not message.get("more_body", False)
        return message

    async def drain(self) -> None:
        """Read on for a moment, so that a client that still sends gets the answer."""

        async def rest() -> None:
            while not self._over:
                message = await self._receive()
                self._over = not message.get("more_body", False)

        with_limit = asyncio.wait_for(rest(), _DRAIN_S)
        try:
            await with_limit
        except asyncio.TimeoutError:
            return

    def let_go(self) -> None:
        """Give back what was counted."""
        self._guard.give(self._taken)


class _Answer:
    """The way back to the client: adds our headers, and knows whether an answer has begun."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._begun = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._begun = True
            own = {name for name, _ in message.get("headers", ())}
            more = [
                (name.encode(), value.encode())
                for name, value in _HEADERS.items()
                if name.encode() not in own
            ]
            message = {**message, "headers": [*message.get("headers", ()), *more]}
        await self._send(message)

    async def refuse(self, refused: HTTPException) -> None:
        """Answer with an error as JSON, unless another answer has begun."""
        if self._begun:
            return
        body = json.dumps({"error": refused.detail}).encode()
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            **(refused.headers or {}),
        }
        pairs = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        await self.send(
            {"type": "http.response.start", "status": refused.status_code, "headers": pairs}
        )
        await self.send({"type": "http.response.body", "body": body})


def _host_of(header: str) -> str:
    """Return the name in a Host header, without its port and an address's brackets."""
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""


def _same(found: bytes, wanted: bytes) -> bool:
    """Compare without telling by the time how much of it was right."""
    return secrets.compare_digest(hashlib.sha256(found).digest(), hashlib.sha256(wanted).digest())
