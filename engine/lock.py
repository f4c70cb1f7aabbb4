"""One call at a time on one engine."""

import threading

from .errors import UsageError


class CallLock:
    """A lock that other threads wait for, and that refuses a second call of the thread that holds it.

    The holder may be a streamed answer that its thread has not finished reading: waiting would never end. A stream may
    be resumed in another thread, which then `adopt`s the lock; whichever thread ends or collects it releases it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holder: int | None = None

    def __enter__(self) -> None:
        if self.is_mine:
            raise UsageError(
                "this engine is still busy with a call of the same thread",
                "read the streamed answer to its end, or close() it, before the next call",
            )
        self._lock.acquire()
        self._holder = threading.get_ident()

    @property
    def is_mine(self) -> bool:
        """Whether the calling thread holds it."""
        return self._holder == threading.get_ident()

    def adopt(self) -> None:
        """The calling thread goes on with what another one began."""
        self._holder = threading.get_ident()

    def __exit__(self, *exc: object) -> None:
        self._holder = None
        self._lock.release()
