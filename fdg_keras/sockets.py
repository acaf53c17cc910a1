"""Sockets to other machines: who answers, who is cut off, who may connect.

TensorFlow opens its sockets itself and has neither a deadline for a call nor a
choice of interface. What is done about that here is done from outside, to the
sockets of this process, or of another that allows it (Linux).
"""

import contextlib
import ctypes
import errno
import ipaddress
import os
import pathlib
import resource
import socket
import struct
from collections.abc import Collection, Iterator
from typing import Any

# What an HTTP/2 client says first, with an empty SETTINGS frame (RFC 9113,
# section 3.4). A gRPC server answers with one, which is of type 4.
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, *[0] * 5])
_FRAME_HEADER, _SETTINGS = 9, 4

#: An IP address and a port.
End = tuple[str, int]

# Not in Python's `socket`: see socket(7).
_SO_BINDTODEVICE = 25

# Neither in Python's `os`: pidfd_getfd(2), of the same number on all machines,
# and prctl(2).
_PIDFD_GETFD = 438
_PR_SET_PTRACER = 0x59616D61


def split_address(address: str) -> tuple[str, int]:
    """Returns host and port of `"host:port"`.

    Raises:
        ValueError: If it is not one.
    """
    host, _, port = str(address).rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(
            "Expected addresses as 'host:port', for example "
            f"'10.0.0.2:2222'. Received: {address!r}"
        )
    return host.strip("[]"), int(port)


def is_loopback(address: str) -> bool:
    """Whether nobody but this machine can mean this one by `address`.

    Raises:
        OSError: If the host's name is not known.
    """
    return all(
        ipaddress.ip_address(ip).is_loopback for ip, _ in resolve(address)
    )


def resolve(address: str) -> list[End]:
    """Returns where an address leads, in the order of preference.

    Raises:
        OSError: If the host's name is not known.
    """
    host, port = split_address(address)
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [(str(end[4][0]), port) for end in found]


def unanswered(end: End, seconds: float) -> OSError | None:
    """Asks the gRPC server at `end` for a sign of life.

    A process that is stopped does not give one, although the kernel accepts
    connections for it.

    Returns:
        `None` if it answers in time, or why it does not.
    """
    try:
        with socket.create_connection(end, seconds) as connection:
            connection.sendall(_PREFACE)
            answer = connection.recv(_FRAME_HEADER)
    except OSError as error:
        return error
    if not answer:
        return ConnectionResetError("the connection was closed")
    if len(answer) < _FRAME_HEADER or answer[3] != _SETTINGS:
        return ConnectionError("what listens there is no gRPC server")
    return None


def own_host(end: End, seconds: float) -> str:
    """Returns the IP address by which `end` can reach this machine.

    Raises:
        OSError: If there is no way there.
    """
    with socket.create_connection(end, seconds) as connection:
        return str(connection.getsockname()[0])


def free_port() -> int:
    """Returns a port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("", 0))
        return int(found.getsockname()[1])


def is_free(port: int) -> bool:
    """Whether a server could listen on `port`, on every interface."""
    with socket.socket() as tried:
        # As gRPC does: connections that have just ended do not count.
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(("", port))
            tried.listen()
        except OSError:
            return False
    return True


def cut_off(ends: Collection[End], process: int | None = None) -> None:
    """Ends every connection of a process to these ends, now.

    Whoever waits for an answer over one of them, or for the connection, is
    told so by an error, as if the process at the other end had died.

    Args:
        ends: Where to.
        process: Its number, if it is not this one. It has to have called
            `allow`, and to be on the same network.

    Raises:
        OSError: If it is not allowed.
    """
    inodes = _inodes(ends)
    found = _own_sockets() if process is None else _sockets_of(process, inodes)
    for one in found:
        # It may be closed meanwhile.
        with contextlib.suppress(OSError):
            if os.fstat(one.fileno()).st_ino in inodes:
                one.shutdown(socket.SHUT_RDWR)


def allow(process: int) -> None:
    """Lets another process of the same user cut off this one's connections."""
    # Where the kernel asks for it. Else it fails, and nothing is lost.
    ctypes.CDLL(None).prctl(_PR_SET_PTRACER, process, 0, 0, 0)


def cut_off_for_good(ends: Collection[End]) -> None:
    """Ends every connection to these ends, and lets no file be opened again.

    For the very end of a process, which then cannot connect anew.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = [int(name) for name in os.listdir("/proc/self/fd")]
    cut_off(ends)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, most))
    # One that was opened between is found without opening anything.
    for number in range(max(used) + 8):
        with contextlib.suppress(OSError):
            one = socket.socket(fileno=number)
            with contextlib.suppress(OSError):
                if _plain(one.getpeername()) in ends:
                    one.shutdown(socket.SHUT_RDWR)
            one.detach()


def hold_to_loopback(port: int) -> bool:
    """Lets nobody but this machine connect to what listens on `port` here.

    For a server of this process that listens on every interface, as gRPC's
    does. The kernel then refuses what comes in from elsewhere.

    Returns:
        Whether it worked; some kernels want a privilege for it.
    """
    held = False
    for one in _own_sockets():
        with contextlib.suppress(OSError):
            listens = one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            if listens and one.getsockname()[1] == port:
                one.setsockopt(socket.SOL_SOCKET, _SO_BINDTODEVICE, b"lo\0")
                held = True
    return held


def _inodes(ends: Collection[End]) -> set[int]:
    """Returns the inodes of sockets that are, or are to be, connected so.

    Of a connection that is being made only the kernel's table tells the end.
    """
    found = set()
    for table in ("/proc/self/net/tcp", "/proc/self/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in pathlib.Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if _decode(fields[2]) in ends:
                    found.add(int(fields[9]))
    return found


def _decode(end: str) -> End:
    """Returns an end as the kernel's table writes it: see proc(5)."""
    host, _, port = end.partition(":")
    # Each 32 bits are in the machine's own order of bytes.
    words = struct.unpack(f"!{len(host) // 8}I", bytes.fromhex(host))
    ip = ipaddress.ip_address(struct.pack(f"={len(words)}I", *words))
    mapped = ip.ipv4_mapped if ip.version == 6 else None
    return str(mapped or ip), int(port, 16)


def _plain(peer: Any) -> End:
    host, port = peer[:2]
    return host.removeprefix("::ffff:"), port


def _own_sockets() -> Iterator[socket.socket]:
    """Yields the sockets of this process, whoever opened them.

    Not copies: as long as there is a copy of a socket that its owner has
    closed, the kernel tells its owner of events at something that is gone.
    """
    for name in os.listdir("/proc/self/fd"):
        # It may be something else, or be closed meanwhile.
        with contextlib.suppress(OSError):
            found = socket.socket(fileno=int(name))
            try:
                yield found
            finally:
                found.detach()


def _sockets_of(
    process: int, inodes: Collection[int]
) -> Iterator[socket.socket]:
    """Yields copies of those sockets of another process, one at a time.

    Raises:
        OSError: If there is no such process, or it does not allow that.
    """
    call = ctypes.CDLL(None, use_errno=True).syscall
    handle = os.pidfd_open(process)
    wanted = {f"socket:[{inode}]" for inode in inodes}
    folder = f"/proc/{process}/fd"
    try:
        for name in os.listdir(folder):
            try:
                if os.readlink(f"{folder}/{name}") not in wanted:
                    continue
            except FileNotFoundError:
                continue  # It was closed meanwhile.
            copy = call(_PIDFD_GETFD, handle, int(name), 0)
            if copy < 0:
                number = ctypes.get_errno()
                if number == errno.EBADF:
                    continue  # It was closed meanwhile.
                raise OSError(number, os.strerror(number))
            try:
                found = socket.socket(fileno=copy)
            except OSError:
                os.close(copy)  # It has become something else.
                continue
            with found:
                yield found
    finally:
        os.close(handle)
