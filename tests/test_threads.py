"""Threads of which the first failure wins; no TensorFlow in here."""

import os
import signal
import threading
import time
import traceback

import pytest

from fdg_keras import threads
from fdg_keras.threads import Crew, Inbox

#: Longer than anything here takes, shorter than anybody waits.
SOON = 10.0


class Gate:
    """Something that threads wait for, and that `release` opens."""

    def __init__(self):
        self._open = threading.Event()
        self.released = 0

    def release(self):
        self.released += 1
        self._open.set()

    def wait(self):
        assert self._open.wait(SOON), "nobody released this thread"


@pytest.fixture
def gate():
    return Gate()


def fail_with(error):
    def target():
        raise error

    return target


def alive(name):
    return any(thread.name == name for thread in threading.enumerate())


def nothing(crew):
    """What a caller does who receives nothing."""


def run(release, targets, then=Crew.receive):
    """Starts `fdg-0`, `fdg-1`, ...; returns what `then(crew)` returns."""
    with Crew(release) as crew:
        for i, target in enumerate(targets):
            crew.start(f"fdg-{i}", target)
        return then(crew)


# -- Work that succeeds -------------------------------------------------------


def test_results_come_in_the_order_they_were_sent(gate):
    with Crew(gate.release) as crew:

        def count():
            for i in range(100):
                crew.send(i)

        crew.start("fdg-count", count)
        assert [crew.receive() for _ in range(100)] == list(range(100))
    assert gate.released == 0


def test_threads_have_their_names(gate):
    with Crew(gate.release) as crew:
        crew.start(
            "fdg-named", lambda: crew.send(threading.current_thread().name)
        )
        assert crew.receive() == "fdg-named"


def test_leaving_joins_threads_that_still_work(gate):
    ended = []

    def work():
        time.sleep(0.1)
        ended.append(True)

    with Crew(gate.release) as crew:
        crew.start("fdg-work", work)
    assert ended
    assert not alive("fdg-work")
    assert not crew.stopping


def test_a_crew_without_threads_ends_at_once(gate):
    with Crew(gate.release) as crew:
        pass
    assert not crew.stopping


# -- Failures -----------------------------------------------------------------


def test_receive_raises_the_failure_itself(gate):
    error = ZeroDivisionError("in the stage")
    with pytest.raises(ZeroDivisionError, match="in the stage") as caught:
        run(gate.release, [fail_with(error)])
    assert caught.value is error
    # The traceback still shows where it was raised.
    frames = traceback.extract_tb(caught.value.__traceback__)
    assert "target" in [frame.name for frame in frames]


def test_a_failure_nobody_received_is_raised_on_leaving(gate):
    with pytest.raises(ZeroDivisionError, match="unseen"):
        run(gate.release, [fail_with(ZeroDivisionError("unseen"))], nothing)
    assert gate.released == 1


def test_a_failure_wakes_the_others(gate):
    fails = fail_with(ValueError("first"))
    with pytest.raises(ValueError, match="first"):
        run(gate.release, [gate.wait, gate.wait, fails])
    assert gate.released == 1
    assert not any(alive(f"fdg-{i}") for i in range(3))


def test_the_first_failure_wins_and_its_consequences_are_dropped(gate):
    """Whatever their type: a consequence may look like a genuine error."""

    def consequence():
        gate.wait()
        raise RuntimeError("the link was closed")

    fails = fail_with(ValueError("cause"))
    with pytest.raises(ValueError, match="cause"):
        run(gate.release, [consequence, consequence, fails, consequence])


def test_two_failures_at_once_are_one(gate):
    barrier = threading.Barrier(4)

    def fail():
        barrier.wait(SOON)
        raise ValueError("one of several")

    with pytest.raises(ValueError, match="one of several"):
        run(gate.release, [fail] * 4)
    assert gate.released == 1


def test_a_failure_goes_before_results_that_wait(gate):
    def receive_late(crew):
        crew.send("a result")
        while not crew.stopping:
            time.sleep(0.001)
        return crew.receive()

    with pytest.raises(ValueError, match="more important"):
        run(
            gate.release,
            [fail_with(ValueError("more important"))],
            receive_late,
        )


def test_system_exit_in_a_thread_is_a_failure(gate):
    """Python's threads swallow it: a stage would end and nobody know."""
    with pytest.raises(SystemExit, match="2"):
        run(gate.release, [fail_with(SystemExit(2))])


def test_a_release_that_fails_does_not_hide_the_failure(gate):
    def release():
        gate.release()
        raise OSError("the worker is gone")

    fails = fail_with(ValueError("cause"))
    with pytest.raises(ValueError, match="cause"):
        run(release, [gate.wait, fails])
    assert not alive("fdg-0")


# -- Leaving early ------------------------------------------------------------


def test_an_exception_in_the_caller_stops_and_joins(gate):
    def consequence():
        gate.wait()
        raise RuntimeError("the link was closed")

    def callback(crew):
        raise KeyError("callback")

    with pytest.raises(KeyError, match="callback"):
        run(gate.release, [gate.wait, consequence], callback)
    assert gate.released == 1
    assert not alive("fdg-0")


def test_ctrl_c_reaches_a_caller_that_waits(gate):
    def interrupt():
        os.kill(os.getpid(), signal.SIGINT)
        gate.wait()

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        run(gate.release, [interrupt])  # There is nothing to receive.
    assert time.monotonic() - started < SOON / 2
    assert gate.released == 1
    assert not alive("fdg-0")


def test_stopping_is_seen_by_threads(gate):
    seen = []
    with Crew(gate.release) as crew:

        def work():
            while not crew.stopping:
                time.sleep(0.001)
            seen.append(True)

        crew.start("fdg-polls", work)
        crew.stop()
        crew.stop()
    assert seen
    assert gate.released == 1


def test_what_fails_after_a_stop_is_not_raised(gate):
    def work():
        gate.wait()
        raise RuntimeError("the link was closed")

    run(gate.release, [work], Crew.stop)
    assert not alive("fdg-0")


def test_stragglers_are_named_and_waited_for(gate, monkeypatch):
    monkeypatch.setattr(threads, "_PATIENCE_S", 0.05)
    ended = []

    def slow():
        time.sleep(0.5)
        ended.append(True)

    message = "Still waiting for fdg-1 to end"
    with pytest.warns(UserWarning, match=message):
        run(gate.release, [lambda: None, slow], nothing)
    assert ended


# -- Inboxes ------------------------------------------------------------------


def test_an_inbox_yields_in_order_until_closed():
    inbox = Inbox()
    for message in ("a", None, "b"):
        inbox.put(message)
    inbox.close()
    inbox.put("too late")
    assert list(inbox) == ["a", None, "b"]


def test_closing_an_inbox_wakes_who_waits(gate):
    inbox = Inbox()
    with Crew(gate.release) as crew:
        crew.start("fdg-reads", lambda: crew.send(list(inbox)))
        inbox.put(1)
        inbox.close()
        assert crew.receive() == [1]


def test_a_thread_that_may_be_left_is_left(monkeypatch):
    monkeypatch.setattr(threads, "_GRACE_S", 0.1)
    opened = threading.Event()

    def train():
        with Crew(lambda: None) as crew:
            crew.start("fdg-stuck", lambda: opened.wait(SOON), may_be_left=True)
            crew.start("fdg-1", fail_with(KeyError("first")))
            crew.receive()

    with (
        pytest.warns(UserWarning, match="fdg-stuck is in code that does not"),
        pytest.raises(KeyError, match="first"),
    ):
        train()
    (stuck,) = [t for t in threading.enumerate() if t.name == "fdg-stuck"]
    opened.set()
    stuck.join(SOON)


def test_a_thread_that_may_be_left_is_joined_otherwise():
    with Crew(lambda: None) as crew:
        crew.start("fdg-slow", lambda: time.sleep(0.2), may_be_left=True)
    assert not alive("fdg-slow")


def test_an_interrupt_is_put_off():
    done = []

    def work():
        with threads.uninterrupted():
            for i in range(3):
                os.kill(os.getpid(), signal.SIGINT)
                done.append(i)

    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        work()
    assert done == [0, 1, 2]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_impatience_while_links_are_being_closed():
    """A second interrupt comes while the first one's release still runs."""
    released = threading.Event()

    def release():
        time.sleep(0.4)
        released.set()

    crews = []

    def train():
        with Crew(release) as crew:
            crews.append(crew)
            crew.start("fdg-1", lambda: released.wait(SOON))
            for after_s in (0.1, 0.2, 0.3):
                kill = (os.getpid(), signal.SIGINT)
                threading.Timer(after_s, os.kill, kill).start()
            crew.receive()

    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        train()
    assert released.is_set()
    assert crews[0].has_ended
