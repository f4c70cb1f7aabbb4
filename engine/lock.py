"""One call at a time on one engine, and the streamed answers of which one may be that call."""

import threading
from collections.abc import Generator, Iterator
from inspect import GEN_CREATED, GEN_SUSPENDED, getgeneratorstate

from .errors import UsageError

CLOSED = "this engine is closed", "load it again with Engine.from_pretrained"


class Closed(UsageError):
    """Work that a closed engine is asked for, or an answer that closing it has cut short."""


class CallLock:
    """A lock that other threads wait for, and that refuses a second call of the thread that holds it.

    The holder may be a streamed answer that its thread has not finished reading: waiting would never end. A stream may
    be resumed in another thread, which then `adopt`s the lock; whichever thread ends or collects it releases it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holder: int | None = None

    def __enter__(self) -> None:
        self.check()
        self._lock.acquire()
        self._holder = threading.get_ident()

    def check(self) -> None:
        """Raises UsageError where the calling thread holds it."""
        if self._holder == threading.get_ident():
            raise UsageError(
                "this engine is still busy with a call of the same thread",
                "return from the callback, or read the streamed answer to its end or close() it, before the next call",
            )

    def adopt(self) -> None:
        """The calling thread goes on with what another one began."""
        self._holder = threading.get_ident()

    def __exit__(self, *exc: object) -> None:
        self._holder = None
        self._lock.release()


class Stream(Iterator[str]):
    """The pieces of an answer as they come. Where the engine was closed before its end, reading on raises UsageError.

    Begun and not yet at its end, it has the engine's lock.
    """

    def __init__(self, pieces: Generator[str]) -> None:
        """`pieces` raises Closed where it sees the engine closing."""
        self.pieces, self._resumed = pieces, threading.RLock()
        self._cut = self._closed = False

    def __next__(self) -> str:
        if self._cut:  # asked first, since whoever cuts it may wait for its end
            raise Closed(*CLOSED)
        try:
            with self._resumed:
                if self._cut:
                    raise Closed(*CLOSED)
                return next(self.pieces)
        except Closed:
            self._cut = True
            raise
        finally:
            if self._closed:  # meanwhile, by another thread
                self.close()

    def close(self) -> None:
        """End it, so that the engine can do something else. A thread that is in it ends it behind its next piece."""
        self._closed = True
        if self._resumed.acquire(blocking=False):
            try:
                self.pieces.close()
            finally:
                self._resumed.release()

    @property
    def is_held(self) -> bool:
        """Whether it waits in its middle for somebody to read on."""
        return getgeneratorstate(self.pieces) == GEN_SUSPENDED

    def cut(self) -> bool:
        """End it for the engine that closes; False where a thread is just in it."""
        if not self._resumed.acquire(blocking=False):
            return False
        try:
            if getgeneratorstate(self.pieces) in (GEN_CREATED, GEN_SUSPENDED):
                self._cut = True
            self.pieces.close()
        except ValueError:  # it runs, further up in this thread
            return False
        finally:
            self._resumed.release()
        return True
