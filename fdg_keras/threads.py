"""Named threads of which the first failure wins.

Knows nothing of Keras or TensorFlow: it runs callables. The thread that opens
a `Crew` waits in Python only (for a queue, and last for the threads to end), so
that Ctrl-C always reaches it.
"""

import contextlib
import functools
import inspect
import queue
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

# A thread that is asked to stop ends at its next hand-off. One that has not
# ended after this many seconds is named in a warning, and waited for.
_PATIENCE_S = 30.0
# One that may be left behind is waited for so long.
_GRACE_S = 1.0

# Whose frames lie between a warning and the user's line that it is about: those
# of this package, and of context managers.
_OWN = (__name__.partition(".")[0], "contextlib")


class _Thread(threading.Thread):
    """A thread that is known to run for as long as it does.

    Python 3.11 takes one for ended if a `join` of it was interrupted.

    Args:
        function: What to run.
        name: Shown by debuggers.
    """

    def __init__(self, function: Callable[[], None], name: str):
        super().__init__(name=name, daemon=True)
        self._function = function
        self._has_run = threading.Event()

    def run(self) -> None:
        try:
            self._function()
        finally:
            self._has_run.set()

    @property
    def is_running(self) -> bool:
        """Whether it was started and has not ended."""
        return self.ident is not None and not self._has_run.is_set()

    def wait(self, seconds: float | None) -> None:
        """Waits until it has ended, for so long at most."""
        if self._has_run.wait(seconds):
            self.join()


class NothingCame(Exception):
    """A wait was in vain. Nobody else raises it, as they do `TimeoutError`."""


class Crew:
    """Runs named threads until their work is done or one of them fails.

    The first failure wins: it is raised, as it is, by `receive` in the thread
    that opened the crew. What fails after a stop was requested is a
    consequence, whatever its type, and is dropped. Leaving the `with` block
    joins all threads; leaving it by an exception (Ctrl-C included) stops them
    first. Only a thread that may be left, and is stopped in code that does not
    return, goes on, with a warning; what it fails with is dropped.

    Args:
        release: Called once when the crew stops early. It must unblock every
            thread that waits in something the crew does not know of, and must
            not block.
    """

    def __init__(self, release: Callable[[], None]):
        self._release = release
        self._threads: list[_Thread] = []
        self._may_be_left: list[_Thread] = []
        self._releasing: list[_Thread] = []
        self._results: queue.SimpleQueue = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._failure: BaseException | None = None
        self._leaves = False

    @property
    def stopping(self) -> bool:
        """Whether the crew was asked to stop before its work was done."""
        return self._stopping.is_set()

    @property
    def has_ended(self) -> bool:
        """Whether no thread of the crew is running."""
        threads = self._threads + self._may_be_left + self._releasing
        return not any(thread.is_running for thread in threads)

    def start(
        self, name: str, target: Callable[[], None], may_be_left: bool = False
    ) -> None:
        """Starts `target()` in a thread called `name`.

        Args:
            name: Shown by debuggers, and in warnings.
            target: What to run.
            may_be_left: Whether a stop may leave it behind, because it runs
                code that may block for as long as it likes.
        """
        thread = _Thread(functools.partial(self._run, target), name)
        group = self._may_be_left if may_be_left else self._threads
        group.append(thread)
        thread.start()

    def send(self, result: Any) -> None:
        """Hands `result` to the thread that opened the crew."""
        self._results.put(result)

    def receive(self, seconds: float | None = None) -> Any:
        """Waits for the next result, in the order of `send`.

        Args:
            seconds: How long to wait; `None` for as long as it takes.

        Raises:
            NothingCame: If nothing did in that time.
            BaseException: The first failure of any thread, as it was raised.
        """
        try:
            result = self._results.get(timeout=seconds)
        except queue.Empty:
            raise NothingCame from None
        if self._failure is not None:
            raise self._failure
        return result

    def leave(self) -> None:
        """Has the end of the `with` block stop what may be left, too."""
        self._leaves = True

    def stop(self) -> None:
        """Asks all threads to end at their next hand-off."""
        # In a thread of its own: a second Ctrl-C must not end it half way.
        releasing = _Thread(self._release_all, "fdg-release")
        self._releasing.append(releasing)
        releasing.start()
        releasing.join()

    def _release_all(self) -> None:
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
        threads = self._releasing + self._threads
        if self.stopping:
            for name in _still_running(self._may_be_left, _GRACE_S):
                self._warn(
                    f"{name} is in code that does not return, and is left "
                    "behind. It ends when that code returns."
                )
        else:
            threads = threads + self._may_be_left
        late = _still_running(threads, _PATIENCE_S)
        if late:
            self._warn(
                f"Still waiting for {', '.join(late)} to end a computation "
                "that cannot be interrupted."
            )
            _still_running(threads, None)

    def _warn(self, message: str) -> None:
        # Where warnings are errors, this one must not hide the failure that
        # is on its way, nor keep the other threads from being joined.
        with contextlib.suppress(UserWarning):
            warn(message)

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        try:
            if error is not None or self._leaves:
                self.stop()
            self._join()
        except KeyboardInterrupt:
            # Impatience; what waits for a link has been woken, or is now.
            with uninterrupted():
                self.stop()
                self._join()
            if error is None:
                raise
        if error is None and self._failure is not None:
            raise self._failure


def _still_running(threads: list[_Thread], seconds: float | None) -> list[str]:
    """Joins threads, for so long all in all; names those that go on."""
    deadline = time.monotonic() + (seconds or 0.0)
    # An interrupt may have come before the last one was started.
    started = [thread for thread in threads if thread.ident is not None]
    for thread in started:
        left = max(deadline - time.monotonic(), 0.0)
        thread.wait(None if seconds is None else left)
    return [thread.name for thread in started if thread.is_running]


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


@contextlib.contextmanager
def noting(where: str) -> Iterator[None]:
    """Adds a note to an exception that says where it came from."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"Raised {where}.")
        raise


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Puts Ctrl-C off to the end of the block, which must be short."""
    handler = signal.getsignal(signal.SIGINT)
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or handler is None:
        yield
        return
    pending: list[Any] = []
    signal.signal(signal.SIGINT, lambda *details: pending.append(details))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if pending and callable(handler):
            handler(*pending[0])
        elif pending:
            signal.raise_signal(signal.SIGINT)


def warn(message: str) -> None:
    """Warns, as of the innermost line that is not of this package."""
    level = 1
    frame = inspect.currentframe()
    while frame is not None and _is_own(frame.f_globals):
        frame = frame.f_back
        level += 1
    warnings.warn(message, stacklevel=level)


def _is_own(names: dict) -> bool:
    return str(names.get("__name__")).partition(".")[0] in _OWN
