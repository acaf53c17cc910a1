"""Who answers, who is cut off, who may connect."""

import contextlib
import select
import shutil
import socket
import subprocess
import sys
import threading
import time
import unittest.mock

import pytest
from worker_processes import ENVIRONMENT

from fdg_keras import sockets


@contextlib.contextmanager
def listening(answer=None, family=socket.AF_INET):
    """A server that answers each connection so, or accepts none."""
    with socket.socket(family) as server:
        server.bind(("", 0))
        server.listen()
        if answer is not None:

            def serve():
                with contextlib.suppress(OSError):
                    while True:
                        connection, _ = server.accept()
                        with connection:
                            connection.recv(100)
                            connection.sendall(answer)

            threading.Thread(target=serve, daemon=True).start()
        yield ("127.0.0.1", server.getsockname()[1]), server
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("10.0.0.2:2222", ("10.0.0.2", 2222)),
        ("worker-0.fdg:80", ("worker-0.fdg", 80)),
        ("[::1]:2222", ("::1", 2222)),
    ],
)
def test_addresses(address, parts):
    assert sockets.split_address(address) == parts


@pytest.mark.parametrize(
    "address", ["", "host", "host:", ":2222", "host:http", "host:65536", "a:0"]
)
def test_no_addresses(address):
    with pytest.raises(ValueError, match=r"as 'host:port'.* Received: '"):
        sockets.split_address(address)


def test_loopback():
    assert sockets.is_loopback("127.0.0.1:1")
    assert sockets.is_loopback("localhost:1")
    assert sockets.is_loopback("127.1.2.3:1")
    assert not sockets.is_loopback("10.0.0.2:1")
    assert not sockets.is_loopback("0.0.0.0:1")


def test_a_grpc_server_answers():
    with listening(bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])) as (end, _):
        assert sockets.unanswered(end, 5.0) is None


def test_another_server_does_not():
    with listening(b"HTTP/1.1 400 Bad Request\r\n") as (end, _):
        assert "no gRPC server" in str(sockets.unanswered(end, 5.0))


def test_who_accepts_nothing_does_not_answer():
    """As a process that is stopped: the kernel connects for it."""
    with listening() as (end, _):
        started = time.monotonic()
        assert isinstance(sockets.unanswered(end, 0.2), TimeoutError)
        assert time.monotonic() - started < 2.0


def test_nobody_does_not_answer():
    end = ("127.0.0.1", sockets.free_port())
    assert isinstance(sockets.unanswered(end, 1.0), ConnectionRefusedError)


def test_own_host():
    with listening() as (end, _):
        assert sockets.own_host(end, 1.0) == "127.0.0.1"


def test_is_free():
    with listening() as ((_, port), _):
        assert not sockets.is_free(port)
    assert sockets.is_free(port)


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_cut_off(family):
    """Those who wait for an answer are told, the others are left alone."""
    with (
        listening() as (end, _),
        listening() as (other, _),
        socket.socket(family) as cut,
        socket.create_connection(other) as stays,
    ):
        mapped = "::ffff:" if family == socket.AF_INET6 else ""
        cut.connect((mapped + end[0], end[1]))
        timer = threading.Timer(0.2, sockets.cut_off, [[end]])
        timer.start()
        cut.settimeout(10)
        assert cut.recv(1) == b""
        timer.join()
        stays.settimeout(0.2)
        with pytest.raises(TimeoutError, match="timed out"):
            stays.recv(1)


def test_sockets_are_cut_off_without_copies():
    """With one, epoll tells the owner of events at a socket it has closed."""
    with (
        listening() as (end, _),
        socket.create_connection(end) as cut,
        select.epoll() as events,
    ):
        events.register(cut, select.EPOLLIN)
        shutdown = socket.socket.shutdown

        def close_at_once(one, how):
            shutdown(one, how)
            cut.close()  # as gRPC does when it is told
            assert events.poll(0) == []

        with unittest.mock.patch("socket.socket.shutdown", close_at_once):
            sockets.cut_off([end])
        assert cut.fileno() == -1


def test_a_connection_that_is_being_made_is_cut_off():
    """To a server that has no room for it; the kernel tries for minutes."""
    with socket.socket() as server, contextlib.ExitStack() as full:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        end = server.getsockname()
        for _ in range(4):
            waits = full.enter_context(socket.socket())
            waits.setblocking(False)
            waits.connect_ex(end)
        time.sleep(0.1)
        assert not select.select([], [waits], [], 0)[1]
        sockets.cut_off([end])
        assert select.select([], [waits], [], 10)[1]


CONNECTED = """
import os, socket, sys
from fdg_keras import sockets
end = ("127.0.0.1", int(sys.argv[1]))
found = socket.create_connection(end)
found.settimeout(30)
sockets.allow(os.getppid())
print(os.getpid(), flush=True)
print(found.recv(1))
"""


def test_another_process_is_cut_off():
    with listening() as (end, _):
        process = subprocess.Popen(
            [sys.executable, "-c", CONNECTED, str(end[1])],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            text=True,
        )
        number = int(process.stdout.readline())
        sockets.cut_off([("127.0.0.1", 1)], number)
        assert process.poll() is None
        sockets.cut_off([end], number)
        assert process.communicate(timeout=30)[0] == "b''\n"
    with pytest.raises(ProcessLookupError, match="No such process"):
        sockets.cut_off([end], number)


FOR_GOOD = """
import socket, sys
from fdg_keras import sockets
end = ("127.0.0.1", int(sys.argv[1]))
before = socket.create_connection(end)
sockets.cut_off_for_good([end])
print(before.recv(1))
try:
    socket.create_connection(end)
except OSError as error:
    print(error.strerror)
"""


def test_cut_off_for_good():
    with listening() as ((_, port), _):
        done = subprocess.run(
            [sys.executable, "-c", FOR_GOOD, str(port)],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.stdout == "b''\nToo many open files\n", done.stderr


IN_A_NETWORK = """
ip link set lo up
unshare -n sleep 60 & other=$!
until [ "$(cat /proc/$other/comm)" = sleep ]; do sleep 0.05; done
ip link add here type veth peer name there netns /proc/$other/ns/net
ip addr add 10.9.0.1/24 dev here; ip link set here up
nsenter -t $other -n ip addr add 10.9.0.2/24 dev there
nsenter -t $other -n ip link set there up
IN_OTHER="nsenter -t $other -n" "$0" -c "$1"
kill $other
"""
HOLD = """
import os, shlex, socket, subprocess, sys
from fdg_keras import sockets
server = socket.create_server(("", 0))
port = server.getsockname()[1]
connect = [sys.executable, "-c", "import socket, sys;"
    f"socket.create_connection((sys.argv[1], {port}), 5)"]
other = shlex.split(os.environ["IN_OTHER"])
def reaches(*command):
    return subprocess.run(command, capture_output=True).returncode == 0
print(reaches(*connect, "127.0.0.1"), reaches(*other, *connect, "10.9.0.1"))
print(sockets.hold_to_loopback(port))
print(reaches(*connect, "127.0.0.1"), reaches(*other, *connect, "10.9.0.1"))
"""


@pytest.mark.skipif(
    not shutil.which("ip")
    or subprocess.run(["unshare", "-Urn", "true"]).returncode != 0,
    reason="needs iproute2 and network namespaces",
)
def test_only_this_machine_may_connect():
    done = subprocess.run(
        [
            *("unshare", "-Urn", "--fork", "--kill-child"),
            *("bash", "-c", IN_A_NETWORK, sys.executable, HOLD),
        ],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.split() == ["True", "True", "True", "True", "False"], (
        done.stderr
    )
