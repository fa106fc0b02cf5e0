"""The gate that requests pass on their way to servers: shut while weights are replaced."""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

from rollouts.vllm_server import ServerLost


class Gate:
    """Requests of any thread pass it. It is shut while weights are replaced, and from the moment at which a
    server turned out to be lost, or to have other weights, until it has the right ones again. Requests of
    before belong to an earlier era: nobody knows which weights they were answered with."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._shut = self._over = False
        self._inside = 0
        self._since = 0.0  # when the first of those inside came
        self._busy: deque[tuple[float, float]] = deque(maxlen=4096)  # not every recipe asks for it
        self.era = 0
        self.trouble = ""  # what ended the last era, until the gate is open again

    @contextlib.contextmanager
    def passage(self, era: int | None = None) -> Iterator[None]:
        """Wait until the gate is open. Raises ServerLost if this is another era than the caller's, or the
        run has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._over or era is None or era != self.era or not self._shut)
            if self._over or era not in (None, self.era):
                raise ServerLost(self.trouble or "the run has ended")
            if not self._inside:
                self._since = time.time()
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                if not self._inside:
                    self._busy.append((self._since, time.time()))
                self._changed.notify_all()

    @contextlib.contextmanager
    def shut(self, abort: Callable[[], None]) -> Iterator[None]:
        """The gate is shut, and nobody inside: `abort` ends requests, and is repeated for those that were
        still on their way. An error within leaves it shut."""
        with self._changed:
            self._shut = True
        while self._inside:
            abort()
            with self._changed:
                self._changed.wait_for(lambda: not self._inside, timeout=0.05)
        yield
        with self._changed:
            self._shut, self.trouble = False, ""
            self._changed.notify_all()

    def lost(self, reason: str, era: int) -> None:
        """Shut the gate until weights are sent again: requests of this era are worth nothing."""
        with self._changed:
            if era == self.era:
                self.era, self.trouble, self._shut = era + 1, reason, True
                self._changed.notify_all()

    def close(self) -> None:
        """For good: who waits gets ServerLost."""
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def busy(self) -> list[tuple[float, float]]:
        """When servers had something to do since the last call, as (begin, end) of `time.time()`."""
        with self._changed:
            found, now = list(self._busy), time.time()
            self._busy.clear()
            if self._inside:
                found.append((self._since, now))
                self._since = now
        return found
