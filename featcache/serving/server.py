"""The process that listens: connections and their ends. HTTP itself is uvicorn's."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import EngineUnavailableError, OutputError, one_line
from ..progress import OnNote, OnProgress, silent

if TYPE_CHECKING:
    from ..probes.head import Head
    from .app import ServeOptions

_HEAD_S = 10.0  # for the head of a request, and between two of a connection
_REFUSED, _REFUSED_S = 2, 1.0  # times the most connections; seconds that one too many stays
_END_S = 5  # for what is under way when the server ends
_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\n"
    b"content-type: application/json\r\ncontent-length: 28\r\n\r\n"
    b'{"error": "busy; try again"}'
)


def require_server() -> None:
    """Raise EngineUnavailableError unless the packages of the server are installed."""
    try:
        import python_multipart  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise EngineUnavailableError(
            f"server: expected starlette, uvicorn and python-multipart, found: {error}; type: "
            "pip install 'featcache[serve]'"
        ) from None


def serve(
    head: str | Path | Head,
    *,
    options: ServeOptions,
    on_ready: Callable[[str], None] = silent,
    on_progress: OnProgress = silent,
    on_note: OnNote = silent,
) -> None:
    """Answer requests until Ctrl-C or SIGTERM; ``on_ready`` gets the address when it listens.

    Raises
    ------
    OutputError
        The address cannot be listened on: the port is in use.
    FeatcacheError
        As `create_app` does.
    """
    from .app import create_app

    with bound(options.host, options.port) as listener:
        app = create_app(head, options=options, on_progress=on_progress, on_note=on_note)
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{port}/"
        server = uvicorn_server(app, options.connections, lambda: on_ready(address), on_note)
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:
            return  # uvicorn has ended in order, and raises it again


def bound(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address; uvicorn listens."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family)
    except OSError as error:
        raise OutputError(
            f"host: expected an address of this machine, found {one_line(host)} "
            f"({error.strerror}); try 127.0.0.1"
        ) from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        used = error.errno == errno.EADDRINUSE
        found = "found one that is in use" if used else f"found: {error.strerror}"
        raise OutputError(
            f"{one_line(host)}:{port}: expected a free port, {found}; give another with --port, or "
            "--port 0 for any"
        ) from None
    return listener


def uvicorn_server(
    app: Any,
    connections: int,
    on_ready: Callable[[], None] = lambda: None,
    on_note: OnNote = silent,
) -> Any:
    """Return a `uvicorn.Server` of an application, with our limits and without its logs."""
    import uvicorn

    def on_trouble(_: Any, context: dict[str, Any]) -> None:
        on_note(f"warning: {one_line(context.get('exception') or context['message'])}")

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            asyncio.get_running_loop().set_exception_handler(on_trouble)
            await super().startup(sockets)
            on_ready()

    return Server(
        uvicorn.Config(
            app,
            http=_protocol(connections),
            ws="none",
            lifespan="on",
            log_config=None,
            log_level="critical",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=5,
            timeout_graceful_shutdown=_END_S,
        )
    )


def _protocol(most: int) -> Any:
    """Return uvicorn's HTTP with two more limits: connections, and seconds for a request's head.

    uvicorn waits for ever for the first byte of a connection.
    """
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Protocol(H11Protocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._is_refused = len(self.connections) > most
            if not self._is_refused:
                self._watch()
            elif len(self.connections) > _REFUSED * most:
                transport.abort()
            else:
                # A close while the client sends would reset the connection, and the answer with it.
                transport.write(_FULL)
                transport.write_eof()
                self._timer = self.loop.call_later(_REFUSED_S, transport.abort)

        def data_received(self, data: bytes) -> None:
            if not self._is_refused:
                super().data_received(data)
                self._watch()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._stop()

        def _watch(self) -> None:
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop()
            elif self._timer is None:
                self._timer = self.loop.call_later(_HEAD_S, self.transport.abort)

        def _stop(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return Protocol
