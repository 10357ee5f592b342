"""When one process of a training ends, the others end in seconds, and say why.

A collective operation would wait for a lost process until its time-out, half an hour. So every process holds a
connection to the first one. The operating system closes the connection of a process that dies, by whatever cause, and
the first process tells all others; a machine that vanishes is noticed by TCP's keep-alive.
"""

import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from secrets import token_hex
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from sltt.parallel.signals import Preempted

if TYPE_CHECKING:
    from lightning_fabric import Fabric

# seconds: to leave by an exception of one's own, and to wait at the end for those that are still at work
GRACE, FAREWELL = 1.0, 60.0


class Watchdog:
    """Inside this block, the end of another process ends this one, with exit code 1; a block within it does nothing.

    A process that leaves the block by an exception ends the others too. The first process prints that exception. Where
    it fails itself, in the same way perhaps, it says why alone.

    Args:
        fabric: launched.
    """

    _held = False

    def __init__(self, fabric: "Fabric"):
        self.fabric = fabric
        self._links: dict[int, _Link] = {}
        self._untold: list[_Link] = []
        self._failed = False
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self.active = self.fabric.world_size > 1 and not Watchdog._held
        if self.active:
            self._connect()
            Watchdog._held = True
            if hasattr(os, "register_at_fork"):  # a forked data worker would keep the connections of the dead
                os.register_at_fork(after_in_child=self._release)
            self._untold = [*self._links.values()]
            for link in self._links.values():
                threading.Thread(target=self._watch, args=(link,), daemon=True, name="watchdog").start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self.active:
            return
        Watchdog._held = False
        agreed = isinstance(error, Preempted) or (isinstance(error, KeyboardInterrupt) and bool(error.args))
        if error is not None and not agreed:
            # a collective fails when another process has gone: that one's end is the cause, and is known at once
            time.sleep(GRACE if isinstance(error, RuntimeError) else 0)
            self._failed = True
            self._tell(f"{self._me()} failed: {type(error).__name__}: {error}")
            if self.fabric.global_rank:
                time.sleep(GRACE)  # what the first process says of its own failure ends this one in silence
        else:
            for link in self._links.values():
                link.send(done=True)
            until = time.monotonic() + FAREWELL
            for link in self._links.values():  # the first process, whose end is the end of the command, is the last
                if self.fabric.global_rank == 0:
                    link.over.wait(max(until - time.monotonic(), 0))
        for link in self._links.values():
            link.close()

    def _release(self) -> None:
        for link in self._links.values():
            link.release()

    def _me(self) -> str:
        place = f"pid {os.getpid()} on {socket.gethostname()}"
        return f"process {self.fabric.global_rank} of {self.fabric.world_size} ({place})"

    def _connect(self) -> None:
        fabric = self.fabric
        if fabric.global_rank == 0:
            server = socket.create_server(("", 0), backlog=fabric.world_size)
            key = token_hex(16)
            fabric.broadcast((server.getsockname()[1], key))
            server.settimeout(300)
            while len(self._links) < fabric.world_size - 1:
                link = _Link(server.accept()[0])
                link.connection.settimeout(10)
                hello = link.receive()
                link.connection.settimeout(None)
                if hello and hello.get("key") == key:  # and not whoever looks for open ports
                    link.name = hello["name"]
                    self._links[hello["rank"]] = link
            server.close()
        else:
            port, key = fabric.broadcast(None)  # type: ignore[misc]
            link = _Link(socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=300))
            link.name = f"process 0 of {fabric.world_size}"
            link.send(key=key, rank=fabric.global_rank, name=self._me())
            self._links[0] = link

    def _watch(self, link: "_Link") -> None:
        """Wait for what another process says, or for its end; runs in a thread."""
        while message := link.receive():
            if message.get("done"):
                link.over.set()
                return
            first = self.fabric.global_rank == 0
            if (why := message.get("ended")) and not (first and self._failed):
                self._end(why, show=first)
        link.over.set()
        if not link.closed:
            self._end(f"{link.name} died: killed, out of memory, or its machine is gone")

    def _end(self, why: str, show: bool = True) -> None:
        self._tell(why)
        if show:
            print(f"sltt: {why}; the other processes end too", file=sys.stderr, flush=True)
        os._exit(1)  # the main thread may be in a collective that never returns

    def _tell(self, why: str) -> None:
        """Say to the others that the training is over; the first reason counts."""
        with self._lock:
            links, self._untold = self._untold, []
        for link in links:
            link.send(ended=why)


class _Link:
    """A connection to another process: a JSON object in a line, in both directions."""

    def __init__(self, connection: socket.socket):
        connection.settimeout(None)  # seconds without a word are no end
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 5)):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self.connection = connection
        self.lines = connection.makefile("rb")
        self.name = ""
        self.closed = False
        self.over = threading.Event()  # the other process has said its last word

    def send(self, **message: Any) -> None:
        with suppress(OSError):  # it has gone, and its watcher knows
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict[str, Any] | None:
        """The next message; None when the connection has ended."""
        try:
            line = self.lines.readline()
            return json.loads(line) if line else None
        except (OSError, ValueError):
            return None

    def close(self) -> None:
        self.closed = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)  # also ends the watcher, which reads from it
        self.connection.close()

    def release(self) -> None:
        """Give the connection up in a forked process, without an end for the others."""
        descriptor = self.connection.detach()
        if descriptor >= 0:
            os.close(descriptor)
