"""The processes that share a run: their parts of a batch, and what they tell each other.

Each process, a *rank*, takes its part of every batch. What is a sum over the batch, a loss, a
gradient, a statistic, is added up over all ranks, so that each takes the step that a single
process would have taken, to rounding. A run by one process is the trivial case: its part is
the whole, and sums are what they are.
"""

from __future__ import annotations

import os
import secrets
import selectors
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from ..errors import FeatcacheError, RankError

T = TypeVar("T")

_FINE, _STOP, _FAILED = 0, 1, 2


class Stopped(KeyboardInterrupt):
    """All ranks stop here, between two steps, since one of them was asked to."""


class Ranks:
    """One process alone.

    Attributes
    ----------
    rank, size : int
        The place of this process, from 0, and how many there are.
    stop : callable
        Says whether this process is to stop.
    """

    rank = 0
    size = 1

    def __init__(self) -> None:
        self.stop: Callable[[], bool] = lambda: False

    def heed(self, stop: Callable[[], bool], advice: Callable[[], str]) -> None:
        """Stop when asked to; and know what there is to go on from, if a process is lost."""
        self.stop = stop

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which alone writes, and speaks to a person."""
        return self.rank == 0

    def part(self, whole: slice) -> slice:
        """Return this rank's part of a range: contiguous, in the order of ranks."""
        n = whole.stop - whole.start
        begin, end = (n * rank // self.size for rank in (self.rank, self.rank + 1))
        return slice(whole.start + begin, whole.start + end)

    def agreed(self, function: Callable[[], T]) -> T:
        """Return what a function of this rank does, if it succeeds on all; all must call it.

        Raises
        ------
        FeatcacheError
            The function's own, on rank 0.
        RankError
            It failed on another rank.
        Stopped
            A rank was asked to stop.
        """
        value = function()
        if self.stop():
            raise Stopped
        return value

    def met(self, error: FeatcacheError) -> FeatcacheError:
        """Return what to raise for an error that all ranks meet at this very moment."""
        return error

    def from_first(self, text: bytes) -> bytes:
        """Return what rank 0 calls this with."""
        return text

    def total(self, tensor: Any) -> Any:
        """Return the sum of a tensor over all ranks; its own memory may hold it."""
        return tensor

    def totals(self, tensors: Sequence[Any]) -> None:
        """Replace each tensor by its sum over all ranks."""

    def total_array(self, array: np.ndarray) -> np.ndarray:
        """Return the sum of an int64 array over all ranks."""
        return array


class JoinedRanks(Ranks):
    """One of several processes that a launcher started.

    Parameters
    ----------
    rank, size : int
        The place of this process, and how many there are.
    flow : module
        The framework.
    all_reduce : callable
        As `Framework.all_reduce`.
    """

    def __init__(self, rank: int, size: int, flow: Any, all_reduce: Callable[[Any], Any]) -> None:
        super().__init__()
        self.rank = rank
        self.size = size
        self._flow = flow
        self._all_reduce = all_reduce
        self.watch: Watch | None = None

    def heed(self, stop: Callable[[], bool], advice: Callable[[], str]) -> None:
        """Stop when asked to; and know what there is to go on from, if a process is lost."""
        watch = self.watch
        if watch is None:
            self.stop = stop
            return
        watch.advise(advice)
        self.stop = lambda: stop() or watch.is_orphan

    def agreed(self, function: Callable[[], T]) -> T:
        """Return what a function of this rank does, if it succeeds on all; all must call it."""
        error: FeatcacheError | None = None
        try:
            value = function()
        except FeatcacheError as found:
            error = found
        states = np.zeros(self.size, np.int64)
        states[self.rank] = _FAILED if error else _STOP if self.stop() else _FINE
        states = self.total_array(states)
        if states.max() == _FAILED:
            failed = int(states.argmax())
            said = self._from(failed, str(error).encode()).decode()
            who = f"rank {failed} of {self.size}: " if failed else ""
            mine = error if error is not None and self.is_first else None
            raise self.met(mine or RankError(who + said))
        if states.max() == _STOP:
            self._part()
            raise Stopped
        return value

    def met(self, error: FeatcacheError) -> FeatcacheError:
        """Return what to raise for an error that all ranks meet at this very moment."""
        self._part()
        return error if self.is_first else RankError(str(error), is_told=True)

    def from_first(self, text: bytes) -> bytes:
        """Return what rank 0 calls this with."""
        return self._from(0, text)

    def total(self, tensor: Any) -> Any:
        """Return the sum of a tensor over all ranks; its own memory may hold it."""
        if self.watch is not None:
            self.watch.check()
        try:
            self._all_reduce(tensor)
        except Exception as error:
            if self.watch is None:
                raise
            raise self.watch.cause(error) from None
        return tensor

    def totals(self, tensors: Sequence[Any]) -> None:
        """Replace each tensor by its sum over all ranks: one message for all of them."""
        with self._flow.no_grad():
            flat = self.total(self._flow.cat([tensor.reshape(-1) for tensor in tensors]))
            start = 0
            for tensor in tensors:
                stop = start + tensor.numel()
                tensor.copy_(flat[start:stop].reshape(tensor.shape))
                start = stop

    def total_array(self, array: np.ndarray) -> np.ndarray:
        """Return the sum of an int64 array over all ranks."""
        tensor = self._flow.empty(*array.shape, dtype=self._flow.int64, device="cpu")
        tensor.numpy()[...] = array
        return np.array(self.total(tensor).numpy())

    def _from(self, source: int, text: bytes) -> bytes:
        """Return the bytes that one rank calls this with."""
        mine = self.rank == source
        n = int(self.total_array(np.array([len(text) if mine else 0], np.int64))[0])
        words = np.zeros(-(-n // 8), np.int64)
        if mine and n:
            words.view(np.uint8)[:n] = np.frombuffer(text, np.uint8)
        return self.total_array(words).tobytes()[:n] if n else b""

    def _part(self) -> None:
        if self.watch is not None:
            self.watch.part()


# What a process says when it leaves: in good order, or with an error of its own; and what rank 0
# passes on of another.
_BYE, _FAILURE, _LOST = b"b", b"f", b"l"
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
                connection.sendall(_word(_FAILURE if failed else _BYE, self._rank))
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
        if kind == _FAILURE:  # and says itself why
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
