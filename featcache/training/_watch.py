"""Hearing at once of a process of the run that ended, whatever this one is busy with.

A process that is killed leaves the others in the middle of a sum: PyTorch on a processor then
raises an error that names a port, OneFlow and PyTorch's NCCL wait. So each process holds a
connection to rank 0 and nothing is sent over it, but a word when it leaves in good order: where
a connection ends without one, a thread hears of it, and ends this process unless that comes out
of its work by itself.
"""

from __future__ import annotations

import os
import secrets
import selectors
import socket
import sys
import threading
from collections.abc import Callable

from ..errors import RankError

__all__ = ["Watch", "open_watch"]

# What a process says when it leaves: in good order, or with an error of its own; and what rank 0
# passes on of another.
_BYE, _FAILED, _LOST = b"b", b"f", b"l"
_WORD_BYTES = 5  # one of these, and a rank

_CONNECT_S = 60.0
_LOOK_S = 1.0  # how often the launcher is looked for
# That a process has to come out of a sum by itself. OneFlow, which does not, ends it after up to
# ten seconds, with a trace of its C++ code.
_COME_OUT_S = 0.5
_HEAR_S = 5.0  # that it takes to hear why a sum failed
_TOKEN_BYTES = 16


class Watch:
    """The connections of a process, and the thread that listens to them.

    Parameters
    ----------
    rank, size : int
        The place of this process.
    connections : dict of int to socket
        Of rank 0: one to each other; of others: one to rank 0.
    """

    def __init__(self, rank: int, size: int, connections: dict[int, socket.socket]) -> None:
        self._rank = rank
        self._size = size
        self._connections = connections
        self._launcher = os.getppid()
        self._lock = threading.Lock()
        self._error: RankError | None = None
        self._known = threading.Event()
        self._out = threading.Event()  # this process needs the others no more
        self._advice: Callable[[], str] = lambda: "nothing was written yet; start it again"
        self.is_orphan = False
        self._thread = threading.Thread(target=self._listen, name="featcache-watch", daemon=True)
        self._thread.start()

    def advise(self, advice: Callable[[], str]) -> None:
        """Say from now on, where a process is lost, what there is to go on from."""
        self._advice = advice

    def part(self) -> None:
        """Mind no more how the others end: all leave now."""
        with self._lock:
            self._out.set()

    def check(self) -> None:
        """Raise what is known of a lost process.

        Raises
        ------
        RankError
            There is one.
        """
        if self._known.is_set():
            raise self.cause(None)

    def cause(self, error: Exception | None) -> RankError:
        """Return why a sum over all ranks failed, once it is known."""
        self._known.wait(_HEAR_S)
        self.part()
        return self._error or RankError(
            f"rank {self._rank} of {self._size}: the processes lost each other: {error}; "
            f"{self._advice()}"
        )

    @property
    def is_out(self) -> bool:
        """Whether this process leaves together with the others, or needs them no more."""
        return self._out.is_set()

    @property
    def is_lost(self) -> bool:
        """Whether a process ended that was needed still."""
        return self._known.is_set()

    def close(self, *, failed: bool) -> None:
        """Leave, and tell the others how."""
        self.part()
        for connection in self._connections.values():
            try:
                connection.sendall(_word(_FAILED if failed else _BYE, self._rank))
                connection.shutdown(socket.SHUT_WR)
            except OSError:
                continue  # it has left before

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            for rank, connection in self._connections.items():
                selector.register(connection, selectors.EVENT_READ, rank)
            while selector.get_map():
                for key, _ in selector.select(_LOOK_S):
                    selector.unregister(key.fileobj)
                    self._hear(key.data, _received(self._connections[key.data]))
                self.is_orphan = self.is_orphan or os.getppid() != self._launcher
        for connection in self._connections.values():
            connection.close()

    def _hear(self, rank: int, word: bytes) -> None:
        """Hear the last that comes from a connection: a word, or none."""
        kind, about = word[:1] or _LOST, int.from_bytes(word[1:], "big") if word else rank
        if kind == _BYE or self._out.is_set():
            return
        for other, connection in self._connections.items():
            if self._rank == 0 and other != rank:
                try:
                    connection.sendall(_word(kind, about))
                except OSError:
                    continue
        with self._lock:
            if self._out.is_set() or self._error is not None:
                return
            self._error = self._told(kind, about)
            self._known.set()
        if self._out.wait(_COME_OUT_S):
            return
        if not self._error.is_told:
            _tell(f"error: {self._error}")
        os._exit(1)

    def _told(self, kind: bytes, rank: int) -> RankError:
        who = f"rank {rank} of {self._size}"
        if kind == _FAILED:  # and says itself why
            return RankError(f"{who} ended with an error of its own", is_told=True)
        speaker = 0 if rank else 1
        text = f"{who} ended without a word: killed, or out of memory; {self._advice()}"
        return RankError(text, is_told=self._rank != speaker)


def open_watch(rank: int, size: int, address: str, from_first: Callable[[bytes], bytes]) -> Watch:
    """Connect every rank with rank 0.

    Parameters
    ----------
    rank, size : int
        The place of this process.
    address : str
        The machine of rank 0.
    from_first : callable
        As `Ranks.from_first`.

    Raises
    ------
    RankError
        No connection came about.
    """
    try:
        if rank:
            port, _, token = from_first(b"").partition(b" ")
            return Watch(rank, size, {0: _connect(address, int(port), token, rank)})
        with socket.create_server(("", 0), backlog=size) as server:
            token = secrets.token_bytes(_TOKEN_BYTES)
            from_first(b"%d " % server.getsockname()[1] + token)
            return Watch(rank, size, _accept_all(server, token, size))
    except OSError as error:
        raise RankError(
            f"rank {rank} of {size}: expected a connection with rank 0 at {address}, found: "
            f"{error}; let the machines reach each other's ports"
        ) from None


def _connect(address: str, port: int, token: bytes, rank: int) -> socket.socket:
    connection = socket.create_connection((address, port), timeout=_CONNECT_S)
    connection.sendall(token + _word(_BYE, rank))
    return _kept_alive(connection)


def _accept_all(server: socket.socket, token: bytes, size: int) -> dict[int, socket.socket]:
    """Accept a connection of each other rank; whoever does not know the token is sent away."""
    server.settimeout(_CONNECT_S)
    connections: dict[int, socket.socket] = {}
    while len(connections) < size - 1:
        connection, _ = server.accept()
        connection.settimeout(_CONNECT_S)
        said = _received(connection, len(token) + _WORD_BYTES)
        if secrets.compare_digest(said[: len(token)], token):
            connections[int.from_bytes(said[len(token) + 1 :], "big")] = _kept_alive(connection)
        else:
            connection.close()
    return connections


def _kept_alive(connection: socket.socket) -> socket.socket:
    """Have the system find out within two minutes or so that a whole machine is gone."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 6)):
        if hasattr(socket, name):  # not everywhere
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection


def _received(connection: socket.socket, n_bytes: int = _WORD_BYTES) -> bytes:
    """Return so many bytes, or nothing where the connection ends before."""
    received = b""
    try:
        while len(received) < n_bytes:
            part = connection.recv(n_bytes - len(received))
            if not part:
                return b""
            received += part
    except OSError:
        return b""
    return received


def _word(kind: bytes, rank: int) -> bytes:
    return kind + rank.to_bytes(_WORD_BYTES - 1, "big")


def _tell(text: str) -> None:
    """Write a line beneath whatever a terminal shows, its cursor visible."""
    if sys.stderr.isatty():
        text = f"\r\x1b[?25h\x1b[K{text}"
    print(" ".join(text.split("\n")), file=sys.stderr, flush=True)
