"""Lifelines between the processes of one run: they meet, wait for each other, and end together.

Every process keeps a TCP connection to process 0, from before jax.distributed starts to the end. At the meeting and at barriers
process 0 knows who is missing, by host. The kernel closes the connection of a process that is killed, at once; a
machine that is lost answers the kernel's probes no more. Either way all others print one line and end, instead of waiting in a
collective for whoever will never come. JAX's own coordination service would abort with stacks of its own: relay.py
keeps such things from it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

FAILED = 1
_PING = 1.0  # seconds
# A process that is alive may still say nothing for long, as while it loads a program on a busy machine with Python's lock held.
_FROZEN = 10  # times the silence, after which it counts as lost all the same
_GRACE = 2.0  # seconds in which a process whose peer has failed may come to the same end by itself, and say it better
_LAST = 0.5  # seconds by which process 0, which holds JAX's coordination service, ends after the others


class PeerError(RuntimeError):
    """Some process did not come; the message names it."""


@dataclasses.dataclass
class _Line:
    """A connection, with what is known of the process at its other end."""

    process: int
    link: socket.socket
    heard: float = dataclasses.field(default_factory=time.monotonic)
    buffer: bytes = b""
    left: bool = False
    why: str = "its connection closed, as when it is killed"

    def probe(self, seconds: float) -> None:
        """Has the kernel close the connection when the other machine has not answered for so long. Its kernel answers for
        processes that are busy."""
        self.link.settimeout(seconds)
        self.link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (
            ("TCP_KEEPIDLE", max(1, int(seconds / 3))), ("TCP_KEEPINTVL", max(1, int(seconds / 6))), ("TCP_KEEPCNT", 4),
            ("TCP_USER_TIMEOUT", int(1000 * seconds)),
        ):  # fmt: skip
            if hasattr(socket, name):  # as Linux has them
                self.link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def ended(self) -> bool:
        """Whether the other end is closed, as of a process that died and was started again."""
        try:
            return not self.link.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def messages(self) -> list[dict[str, Any]] | None:
        """What has come; None at the end of the connection."""
        try:
            data = self.link.recv(1 << 16)
        except ConnectionResetError:
            data = b""
        except OSError as error:
            self.why = f"its machine does not answer ({error})"
            data = b""
        if not data:
            return None
        self.heard = time.monotonic()
        *whole, self.buffer = (self.buffer + data).split(b"\n")
        return [json.loads(message) for message in whole]


class Peers:
    """This process's lifelines. One thread reads them and decides when to end the process."""

    def __init__(self, address: str, count: int, process: int, *, meeting: float, silence: float):
        """Meets the others.

        Args:
          address: host:port where process 0 listens.
          count: how many processes there are.
          process: which of them this is.
          meeting: seconds to wait for the others, here and at barriers.
          silence: seconds without an answer of its machine after which a process counts as lost; one that says nothing on a
            machine that answers does after ten times as long.

        Raises:
          PeerError: not all came; process 0's message says who is missing.
        """
        self.process, self.count, self.meeting, self.silence = process, count, meeting, silence
        self.end: Callable[[str], None] = _print_and_exit
        self._lock, self._changed = threading.Lock(), threading.Condition()
        self._at: dict[str, dict[int, str]] = {}  # barrier -> who has come, with which word, in process 0
        self._open: dict[str, bool] = {}  # barriers that all have come to -> whether with the same word
        self._early: list[dict[str, Any]] = []  # what came with the answer to hello
        self._done = False
        self.waited = 0.0  # seconds that were given to a verdict
        self.hosts = [""] * count
        self.hosts[process] = socket.gethostname()
        until = time.monotonic() + meeting
        self._lines = self._gather(address, until) if process == 0 else [self._connect(address, until)]
        threading.Thread(target=self._watch, name="peers", daemon=True).start()

    def _gather(self, address: str, until: float) -> list[_Line]:
        host, port = _split(address)
        try:
            server = socket.create_server(("", port), backlog=self.count)
        except OSError as error:
            raise PeerError(
                f"port {port}, where the processes meet, cannot be opened: {error}; choose another port"
            ) from None
        lines: dict[int, _Line] = {}
        with server:
            while len(lines) < self.count - 1:
                server.settimeout(max(until - time.monotonic(), 0.01))
                try:
                    line = _Line(-1, server.accept()[0])
                except TimeoutError:
                    missing = ", ".join(str(i) for i in range(1, self.count) if i not in lines)
                    here = ", ".join(self.name(i) for i in (0, *sorted(lines)))
                    text = (
                        f"{self.count} processes were to meet at {host}:{port}; after {self.meeting:.0f} s process {missing} "
                        f"is missing, and {here} is here. Look at the logs of the missing, and whether they reach that port"
                    )
                    self._dismiss(lines.values(), text)
                    raise PeerError(text) from None
                line.link.settimeout(10)
                hello = line.messages()
                if not hello or "hello" not in hello[0]:
                    line.link.close()  # no process of ours: a port scan, or one that died as it came
                    continue
                line.process, hello = hello[0]["hello"], hello[0]
                wrong = None
                if hello["count"] != self.count:
                    wrong = f"process {line.process} counts {hello['count']} processes, process 0 {self.count}"
                elif not 0 < line.process < self.count or (line.process in lines and not lines[line.process].ended()):
                    wrong = f"two processes say that they are process {line.process}"
                if wrong:
                    self._dismiss((line, *lines.values()), wrong)
                    raise PeerError(f"{wrong}: start all with the same --processes, each with a --process of its own")
                self.hosts[line.process] = hello["host"]
                lines[line.process] = line
        for line in lines.values():
            self._send(line, hosts=self.hosts)
        return [lines[i] for i in sorted(lines)]

    def _dismiss(self, lines: Iterable[_Line], text: str) -> None:
        for line in lines:
            self._send(line, failed=text)
            line.link.close()

    def _connect(self, address: str, until: float) -> _Line:
        where, problem = _split(address), ""
        while time.monotonic() < until:
            try:
                line = _Line(0, socket.create_connection(where, timeout=min(self.meeting, 10)))
            except OSError as error:
                problem = str(error)
                time.sleep(0.2)
                continue
            self._send(line, hello=self.process, host=self.hosts[self.process], count=self.count)
            line.link.settimeout(max(until - time.monotonic(), 0) + 5)  # process 0 tells who is missing
            first, *self._early = line.messages() or [{}]
            if "hosts" in first:
                self.hosts = first["hosts"]
                return line
            line.link.close()
            if "failed" in first:
                raise PeerError(first["failed"])
            problem = "it ended before all had come"
            time.sleep(0.2)
        raise PeerError(
            f"process {self.process} cannot reach process 0 at {address} for {self.meeting:.0f} s: {problem}"
        )

    def name(self, process: int) -> str:
        return f"process {process} ({self.hosts[process]})"

    def barrier(self, name: str, word: str = "", seconds: float | None = None) -> bool:
        """Returns when every process has come to the barrier of this name, which is used once: whether all gave the same word.

        Args:
          seconds: to wait for the others; None: as long as at the meeting.

        Raises:
          PeerError: in process 0, which names who has not come in time.
        """
        seconds = self.meeting if seconds is None else seconds
        if self.process:
            self._tell(at=name, word=word)
            with self._changed:
                # Process 0 gives up first and says why; the lifeline tells of that.
                if not self._changed.wait_for(lambda: name in self._open, seconds + 10 * _GRACE):
                    raise PeerError(f"process 0 does not say who is missing at {name!r}")
                return self._open.pop(name)
        with self._changed:
            came = self._at.setdefault(name, {})
            if not self._changed.wait_for(lambda: len(came) == self.count - 1, seconds):
                missing = ", ".join(self.name(i) for i in range(1, self.count) if i not in came)
                raise PeerError(f"after {seconds:.0f} s at {name!r}, {missing} has not come; see its log")
            same = set(self._at.pop(name).values()) == {word}
        self._tell(go=name, same=same)
        return same

    def leave(self) -> None:
        """Says that this process ends as it should: from now on the others are none of its business, nor it of theirs."""
        self._done = True
        self._tell(left=True)

    def fail(self, text: str) -> None:
        """Says that this process ends with an error, for the others to end as well; returns when they had the time to."""
        self._done = True
        self._tell(failed=text, process=self.process)
        until = time.monotonic() + 2 * _GRACE
        # Process 0 holds JAX's coordination service: whoever still needs it would be aborted.
        while self.process == 0 and time.monotonic() < until and not all(line.left for line in self._lines):
            time.sleep(0.05)

    def _send(self, line: _Line, **message: Any) -> None:
        try:
            with self._lock:
                line.link.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            line.left = line.left or self._done  # whoever reads the lines finds the end of this one

    def _tell(self, **message: Any) -> None:
        for line in self._lines:
            self._send(line, **message)

    def _watch(self) -> None:
        reading, pinged = selectors.DefaultSelector(), 0.0
        for line in self._lines:
            line.probe(self.silence)
            line.heard = time.monotonic()
            reading.register(line.link, selectors.EVENT_READ, line)
        for message in self._early:
            self._heed(self._lines[0], message)
        limit, awake = _FROZEN * self.silence, time.monotonic()
        while reading.get_map():
            for key, _ in reading.select(_PING / 2):
                line = key.data
                messages = line.messages()
                if messages is None:
                    reading.unregister(line.link)
                    if not line.left:
                        self._lost(line.process, line.why)
                    line.left = True
                for message in messages or ():
                    self._heed(line, message)
            now = time.monotonic()
            stood, awake = now - awake, now
            for line in self._lines:
                line.heard += stood if stood > 2 * _PING else 0.0  # this process, or its machine, stood still itself
                if not line.left and now - line.heard > limit:
                    self._lost(line.process, f"no sign of life for {limit:.0f} s")
            if now - pinged > _PING:
                pinged = now
                self._tell()

    def _heed(self, line: _Line, message: dict[str, Any]) -> None:
        if "left" in message:
            line.left = True
        elif "failed" in message:
            line.left = True
            whose = message["process"]
            if self.process == 0:
                self._tell(**message)
            wait = _GRACE if self.process else _GRACE + _LAST
            end = threading.Timer(wait, self._stop, [f"{self.name(whose)} failed: {message['failed']}"])
            end.daemon = True
            end.start()
        elif "lost" in message:
            self._lost(message["lost"], message["why"])
        elif "at" in message:
            with self._changed:
                self._at.setdefault(message["at"], {})[line.process] = message["word"]
                self._changed.notify_all()
        elif "go" in message:
            with self._changed:
                self._open[message["go"]] = message["same"]
                self._changed.notify_all()

    def _lost(self, process: int, why: str) -> None:
        if self.process == 0 and not self._done:
            self._tell(lost=process, why=why)
            time.sleep(_LAST)
        self._stop(f"{self.name(process)} is gone: {why}")

    def _stop(self, text: str) -> None:
        if not self._done:
            self.end(text)


_ending = threading.Lock()


def _print_and_exit(text: str) -> None:
    """Ends the process at once: its other threads may be waiting for ever."""
    if not _ending.acquire(blocking=False):  # another thread is about to
        return
    print(f"error: {text}. The same command continues from the newest checkpoint", file=sys.stderr, flush=True)
    os._exit(FAILED)


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


_current: Peers | None = None


def meet(address: str, count: int, process: int, *, meeting: float, silence: float) -> Peers:
    """Meets the others, as Peers does, for the functions below to use."""
    global _current
    _current = Peers(address, count, process, meeting=meeting, silence=silence)
    return _current


def several() -> bool:
    """Whether this process has met others."""
    return _current is not None


def barrier(name: str, word: str = "", seconds: float | None = None) -> bool:
    """Peers.barrier; nothing in a process of its own."""
    return _current is None or _current.barrier(name, word, seconds)


def leave() -> None:
    """Peers.leave; nothing in a process of its own."""
    if _current is not None:
        _current.leave()


def fail(text: str) -> None:
    """Peers.fail; nothing in a process of its own."""
    if _current is not None:
        _current.fail(text)


# How errors of JAX's runtime and its collectives begin, whatever class they come as: ValueError among others.
_STATUS = re.compile(r"\b(UNKNOWN|INTERNAL|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|FAILED_PRECONDITION): ")


def await_verdict(error: BaseException) -> None:
    """After an error: gives the lifelines the time to find out who is gone, and to end the process. Returns if all are well, so
    that the error has another reason; nothing in a process of its own.

    An error of JAX's runtime waits until a lost machine must have been found, any other as long as a killed process takes.
    """
    if _current is None:
        return
    chain, deep = [], error
    while deep is not None and deep not in chain:
        chain.append(deep)
        deep = deep.__cause__ or deep.__context__
    runtime = any(type(e).__name__ == "JaxRuntimeError" or _STATUS.search(str(e)) for e in chain)
    wait = (_current.silence if runtime else 0.0) + 2 * _PING
    time.sleep(max(wait - _current.waited, 0.0))
    _current.waited = max(wait, _current.waited)
