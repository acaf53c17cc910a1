"""Named threads of which the first failure wins.

Knows nothing of Keras or TensorFlow: it runs callables. The thread that opens
a `Crew` never blocks in anything but a Python queue, so that Ctrl-C always
reaches it.
"""

import contextlib
import queue
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

# A thread that is asked to stop ends at its next hand-off. One that has not
# ended after this many seconds is named in a warning, and waited for.
_PATIENCE_S = 30.0


class Crew:
    """Runs named threads until their work is done or one of them fails.

    The first failure wins: it is raised, as it is, by `receive` in the thread
    that opened the crew. What fails after a stop was requested is a
    consequence, whatever its type, and is dropped. Leaving the `with` block
    joins all threads; leaving it by an exception (Ctrl-C included) stops them
    first.

    Args:
        release: Called once when the crew stops early. It must unblock every
            thread that waits in something the crew does not know of, and must
            not block.
    """

    def __init__(self, release: Callable[[], None]):
        self._release = release
        self._threads: list[threading.Thread] = []
        self._results: queue.SimpleQueue = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._failure: BaseException | None = None

    @property
    def stopping(self) -> bool:
        """Whether the crew was asked to stop before its work was done."""
        return self._stopping.is_set()

    def start(self, name: str, target: Callable[[], None]) -> None:
        """Starts `target()` in a thread called `name`."""
        thread = threading.Thread(
            target=self._run, args=(target,), name=name, daemon=True
        )
        self._threads.append(thread)
        thread.start()

    def send(self, result: Any) -> None:
        """Hands `result` to the thread that opened the crew."""
        self._results.put(result)

    def receive(self) -> Any:
        """Waits for the next result, in the order of `send`.

        Raises:
            BaseException: The first failure of any thread, as it was raised.
        """
        result = self._results.get()
        if self._failure is not None:
            raise self._failure
        return result

    def stop(self) -> None:
        """Asks all threads to end at their next hand-off."""
        with self._lock:
            if self._stopping.is_set():
                return
            self._stopping.set()
        # What fails from here on is a consequence. Raised, it would keep the
        # failure that came first from being received.
        with contextlib.suppress(Exception):
            self._release()

    def _run(self, target: Callable[[], None]) -> None:
        try:
            target()
        except BaseException as failure:
            with self._lock:
                if self._stopping.is_set() or self._failure is not None:
                    return
                self._failure = failure
            self.stop()
            self._results.put(None)

    def _join(self) -> None:
        deadline = time.monotonic() + _PATIENCE_S
        # An interrupt may have come before the last one was started.
        started = [t for t in self._threads if t.ident is not None]
        for thread in started:
            thread.join(max(deadline - time.monotonic(), 0.0))
        late = [thread for thread in started if thread.is_alive()]
        if late:
            names = ", ".join(thread.name for thread in late)
            warnings.warn(
                f"Still waiting for {names} to end a computation that cannot "
                "be interrupted.",
                stacklevel=3,
            )
            for thread in late:
                thread.join()

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if error is not None:
            self.stop()
        self._join()
        if error is None and self._failure is not None:
            raise self._failure


class Inbox:
    """An unbounded queue of messages to one thread of a crew."""

    _CLOSED = object()

    def __init__(self) -> None:
        self._messages: queue.SimpleQueue = queue.SimpleQueue()

    def put(self, message: Any) -> None:
        """Adds a message."""
        self._messages.put(message)

    def close(self) -> None:
        """Ends iteration, after the messages that were put before."""
        self._messages.put(self._CLOSED)

    def __iter__(self) -> Iterator[Any]:
        """Yields messages as they come, until the inbox is closed."""
        while (message := self._messages.get()) is not self._CLOSED:
            yield message
