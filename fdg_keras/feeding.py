"""From batches to links: windows, their parts, and the thread that feeds.

The feeder moves the batches of a window into the links, part by part, and has
the stages run each part once it is there. It waits while one part is being run
and another is ready, beside the batches by which the first stage is ahead of
the last: so little waits in the links, however long a window is.
"""

import contextlib
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

from fdg_keras import delays
from fdg_keras.data import Epoch
from fdg_keras.pipeline import Pipeline
from fdg_keras.threads import Inbox

# A part is grown to last about this long: what Python does for each part then
# does not count, and the batches that wait to be run are few.
_PART_S = 0.1
# Calling a stage on another machine takes milliseconds, in which it rests.
_PART_FAR_AWAY_S = 1.0
_LONGEST_PART = 4096
# Nor does a part have more bytes, unless one batch has: two of them wait.
_PART_BYTES = 32 * 2**20


class Part(NamedTuple):
    """An announcement to the stages: run ticks `start <= t < stop`.

    Attributes:
        start: The first tick.
        stop: The tick after the last one.
        ends_window: Whether it is the last part of a window.
        last: Whether it is the last part of the epoch, so that stages drain.
        learning_rate: For all updates made within it.
    """

    start: int
    stop: int
    ends_window: bool
    last: bool
    learning_rate: float


class Pace:
    """How many ticks there are in a window, and in each part of one.

    Args:
        window: Ticks of a window; `None` if nobody minds, so that each part
            is a window.

    Attributes:
        asked: What the user asked for, or `None`.
    """

    def __init__(self, window: int | None = None):
        self.asked = window
        self._grown = 1
        self._part_s = _PART_S
        self._last = 0.0

    @property
    def window(self) -> int:
        """Ticks of the next window."""
        return self.asked or self._grown

    @property
    def part(self) -> int:
        """Ticks of the next part."""
        return min(self.window, self._grown)

    def start(self, far_away: bool = False) -> None:
        """Starts the clock, at the begin of an epoch.

        Args:
            far_away: Whether a stage is on another machine.
        """
        self._part_s = _PART_FAR_AWAY_S if far_away else _PART_S
        self._last = time.perf_counter()

    def measure(self, ticks: int) -> None:
        """Takes note that a part of `ticks` has just ended."""
        if not ticks:
            return
        now = time.perf_counter()
        per_tick = (now - self._last) / ticks
        self._last = now
        wanted = int(self._part_s / max(per_tick, 1e-9))
        self._grown = max(min(wanted, 2 * self._grown, _LONGEST_PART), 1)


class Feeder:
    """Feeds a window for each order, and announces it part by part.

    `run` is what its thread does; the other methods are for other threads.

    Args:
        pipeline: Whose links to feed.
        pace: How long windows and parts are.
        epoch: Where batches come from.
        limit: How many to draw at most, or `None`.
        inboxes: Of the stages.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        pace: Pace,
        epoch: Epoch,
        limit: int | None,
        inboxes: Sequence[Inbox],
    ):
        self._pipeline = pipeline
        self._pace = pace
        self._epoch = epoch
        self._limit = limit
        self._inboxes = inboxes
        self._orders, self._progress = Inbox(), Inbox()
        self._position = 0
        self._rate = 0.0
        self._lock = threading.Lock()
        self._has_ended = False
        self._drawing: float | None = None

    def order(self, learning_rate: float) -> None:
        """Orders another window."""
        self._orders.put(learning_rate)

    def finish(self) -> None:
        """Has it end the stream after all windows that were ordered."""
        self._orders.close()

    def advance(self, position: int) -> None:
        """Tells it that the last stage has run all before `position`."""
        self._progress.put(position)

    def close(self) -> None:
        """Wakes it for good."""
        self._orders.close()
        self._progress.close()

    def draws_since(self) -> float:
        """Returns for how many seconds it has been drawing what it draws."""
        started = self._drawing
        return 0.0 if started is None else time.perf_counter() - started

    def give_up(self) -> bool:
        """Ends the stream with what was announced.

        Returns:
            Whether it had not ended before.
        """
        return self._announce(None, True, True)

    def run(self) -> None:
        """Feeds until the data or the orders end."""
        splits = len(self._pipeline.stages)
        late = delays.stage_delay(0, splits, self._pipeline.delay)
        progress = iter(self._progress)
        finished = 0
        for rate in self._orders:
            self._rate = rate
            stop = self._position + self._pace.window
            if self._limit is not None:
                stop = min(stop, self._limit)
            while self._position < stop:
                wanted = min(self._part(), stop - self._position)
                # Stage 0 runs `late` batches ahead of the last one. Beside
                # them one part is being run, and another one waits.
                while self._position - finished > late + wanted:
                    try:
                        finished = next(progress)
                    except StopIteration:
                        return
                end = self._position + self._feed(wanted)
                last = end < self._position + wanted or end == self._limit
                self._announce(end, last or end == stop, last)
                if self._has_ended:
                    return
        # No more orders: all that is left to do is to drain.
        self._announce(None, True, True)

    def _part(self) -> int:
        """Returns the batches of the next part."""
        size = self._pipeline.feed.batch_bytes
        most = 1 if size is None else max(_PART_BYTES // max(size, 1), 1)
        return min(self._pace.part, most)

    def _feed(self, wanted: int) -> int:
        """Moves batches into the links; returns how many there were."""
        feed = self._pipeline.feed
        self._drawing = time.perf_counter()
        try:
            with self._epoch.original_failure():
                return feed(self._epoch.iterator, wanted)
        except BaseException as error:
            with contextlib.suppress(Exception):
                batch = self._epoch.drawn_before + self._position + feed.moved()
                error.add_note(
                    f"Raised in the feeder, drawing batch {batch} of this "
                    "epoch, or a later one ahead of time."
                )
            raise
        finally:
            self._drawing = None

    def _announce(
        self, stop: int | None, ends_window: bool, last: bool
    ) -> bool:
        with self._lock:
            if self._has_ended:
                return False
            if stop is None:
                stop = self._position
            part = Part(self._position, stop, ends_window, last, self._rate)
            for inbox in self._inboxes:
                inbox.put(part)
            self._position = stop
            self._has_ended = last
            return True
