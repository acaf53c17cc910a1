"""Looks after workers while Python cannot.

While TensorFlow tells workers of a new function it holds Python's lock, so that
nobody in the chief could notice that one of them does not answer (see `vigil`).
A process of its own can: it ends the chief's connections to a worker that gives
no sign of life, and what waits for it fails. It imports neither TensorFlow nor
Keras, costs a few megabytes, and ends with the chief.
"""

import contextlib
import os
import pathlib
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from fdg_keras import sockets

#: So many seconds one sign of life is waited for.
ANSWER_S = 5.0
#: Who is lost is cut off so often: TensorFlow connects anew.
CUT_S = 0.05
#: Signs of life are asked for so often, or ten times within the time limit.
INTERVAL_S = 2.0

# Imports this module, and not all of the package with it.
_START = """
import sys, types
package = types.ModuleType("fdg_keras")
package.__path__ = [sys.argv[1]]
sys.modules["fdg_keras"] = package
from fdg_keras.lookout import main
main(sys.argv[2:])
"""


class Lookout:
    """A process that looks after the workers of this one, until this one ends.

    Args:
        ends: Where the workers are.
        timeout_s: After how many seconds without a sign of life they are cut
            off. A little more are allowed for: a `Vigil` that can notice names
            who is lost.
    """

    def __init__(self, ends: Sequence[sockets.End], timeout_s: float):
        folder = pathlib.Path(__file__).parent
        parts = [part for end in ends for part in end]
        arguments = [folder, os.getpid(), timeout_s, *parts]
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", _START, *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # It ends with the chief, not by Ctrl-C.
        )
        sockets.allow(self._process.pid)

    def end(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.wait()


def main(arguments: Sequence[str]) -> None:
    """Looks after workers until the chief has ended.

    Args:
        arguments: The number of the chief's process, the time limit in
            seconds, and the IP address and port of each worker.
    """
    chief, timeout_s = int(arguments[0]), float(arguments[1])
    with contextlib.suppress(ProcessLookupError):
        handle = os.pidfd_open(chief)
        for host, port in zip(arguments[2::2], arguments[3::2]):
            threading.Thread(
                target=_look_after,
                args=((host, int(port)), chief, timeout_s),
                daemon=True,
            ).start()
        select.select([handle], [], [])


def _look_after(end: sockets.End, chief: int, timeout_s: float) -> None:
    interval_s = min(INTERVAL_S, timeout_s / 10)
    answered = time.monotonic()
    while True:
        time.sleep(interval_s)
        begun = time.monotonic()
        left = answered + timeout_s + 2 * interval_s - begun
        patience_s = min(ANSWER_S, timeout_s / 2, max(left, interval_s))
        if sockets.unanswered(end, patience_s) is None:
            answered = begun
        elif time.monotonic() >= begun + left:
            until = time.monotonic() + interval_s
            while time.monotonic() < until:
                with contextlib.suppress(OSError):  # It is tried again.
                    sockets.cut_off([end], chief)
                time.sleep(CUT_S)
