"""A relay in front of a real S3 server that breaks what it is told to break, one request or answer at a time."""

from __future__ import annotations

import http.client
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from urllib.parse import urlparse

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

Headers = dict[str, str]


@dataclass
class Request:
    """A request on its way to the server. Faults may change it."""

    method: str
    target: str
    headers: Headers
    body: bytes


@dataclass
class Answer:
    """The server's answer on its way back. `cut`: end the connection after so many bytes of the body."""

    status: int
    headers: Headers
    body: bytes
    cut: int | None = None


Fault = Callable[[Request, Callable[[Request], Answer]], Answer | None]
"""Gets a request and the way to the server; gives the answer, or None to hang up without one."""


@dataclass
class Relay:
    """`faults` are met by one request each, in order; what `matches` does not name passes, and so does the rest."""

    endpoint: str
    faults: list[Fault]
    matches: Callable[[Request], bool]
    always: bool = False
    tls: ssl.SSLContext | None = None
    met: list[str] = field(default_factory=list)
    seen: list[Request] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, request: Request) -> Answer | None:
        with self.lock:
            self.seen.append(Request(request.method, request.target, dict(request.headers), b""))
            fault = None
            if self.faults and self.matches(request):
                fault = self.faults[0] if self.always else self.faults.pop(0)
                self.met.append(f"{request.method} {request.target}")
        return fault(request, self.forward) if fault else self.forward(request)

    def forward(self, request: Request) -> Answer:
        place = urlparse(self.endpoint)
        connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=60)
        try:
            connection.putrequest(request.method, request.target, skip_host=True, skip_accept_encoding=True)
            for name, value in request.headers.items():
                if name.lower() not in ("content-length", "expect", "connection"):
                    connection.putheader(name, value)
            if request.body or request.method in ("PUT", "POST"):
                connection.putheader("Content-Length", str(len(request.body)))
            connection.endheaders(request.body or None)
            found = connection.getresponse()
            return Answer(found.status, dict(found.getheaders()), found.read())
        finally:
            connection.close()


def hang_up(request: Request, forward: Callable[[Request], Answer]) -> None:
    """The connection ends before the server heard of the request."""


def lose_the_answer(request: Request, forward: Callable[[Request], Answer]) -> None:
    """The server did what it was asked, and nobody hears of it."""
    forward(request)


def stall(seconds: float) -> Fault:
    """Nothing comes for a while, then the connection ends."""

    def fault(request: Request, forward: Callable[[Request], Answer]) -> None:
        time.sleep(seconds)

    return fault


def refuse(status: int, code: str) -> Fault:
    """The server's own kind of error, without asking it."""
    body = f"<Error><Code>{code}</Code><Message>as told</Message></Error>".encode()

    def fault(request: Request, forward: Callable[[Request], Answer]) -> Answer:
        return Answer(status, {"Content-Type": "application/xml"}, body)

    return fault


def cut_short(request: Request, forward: Callable[[Request], Answer]) -> Answer:
    """Half of the body, then the connection ends."""
    answer = forward(request)
    answer.cut = len(answer.body) // 2
    return answer


def alter_the_answer(request: Request, forward: Callable[[Request], Answer]) -> Answer:
    """One bit of the body changes on its way back."""
    answer = forward(request)
    answer.body = _flipped(answer.body)
    return answer


def alter_the_request(request: Request, forward: Callable[[Request], Answer]) -> Answer:
    """One bit of the body changes on its way to the server."""
    return forward(Request(request.method, request.target, request.headers, _flipped(request.body)))


def ignore_conditions(request: Request, forward: Callable[[Request], Answer]) -> Answer:
    """As a server does that has never heard of conditional writes."""
    return forward(signed(request.method, request, request.body))


def look_then_write(request: Request, forward: Callable[[Request], Answer]) -> Answer:
    """A conditional write as some servers do it: they look whether the key is free, and write a moment later."""
    if forward(signed("HEAD", request)).status == 200:
        return refuse(412, "PreconditionFailed")(request, forward)  # type: ignore[return-value]
    time.sleep(0.05)
    return ignore_conditions(request, forward)


def ignore_ranges(request: Request, forward: Callable[[Request], Answer]) -> Answer:
    """As a server does that always sends the whole object."""
    return forward(signed("GET", request))


def conditional(request: Request) -> bool:
    return "If-None-Match" in request.headers


def signed(method: str, request: Request, body: bytes = b"") -> Request:
    """A plain request for the same object, with a signature of its own: what was signed cannot be left out of it."""
    host = next(value for name, value in request.headers.items() if name.lower() == "host")
    new = AWSRequest(method, f"http://{host}{request.target}", data=body)
    credentials = Credentials(os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"])
    S3SigV4Auth(credentials, "s3", os.environ["AWS_DEFAULT_REGION"]).add_auth(new)
    return Request(method, request.target, {"Host": host, **dict(new.headers.items())}, body)


def _flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@contextmanager
def relay(
    endpoint: str,
    *faults: Fault,
    matches: Callable[[Request], bool] = lambda request: True,
    always: bool = False,
    tls: ssl.SSLContext | None = None,
) -> Iterator[tuple[str, Relay]]:
    """The address of a relay to `endpoint`, and the relay. `always`: the first fault, at every request that matches."""
    it = Relay(endpoint, list(faults), matches, always, tls)
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        threading.Thread(target=_listen, args=(listener, it), daemon=True).start()
        yield f"{'https' if tls else 'http'}://127.0.0.1:{listener.getsockname()[1]}", it
        listener.shutdown(socket.SHUT_RDWR)


def _listen(listener: socket.socket, it: Relay) -> None:
    with suppress(OSError):
        while True:
            threading.Thread(target=_serve, args=(listener.accept()[0], it), daemon=True).start()


def _serve(connection: socket.socket, it: Relay) -> None:
    with suppress(OSError, http.client.HTTPException, ValueError):
        if it.tls is not None:
            connection = it.tls.wrap_socket(connection, server_side=True)
        _converse(connection, it)


def _converse(connection: socket.socket, it: Relay) -> None:
    with connection, connection.makefile("rb") as received:
        while line := received.readline():
            method, target, _ = line.decode().split(" ", 2)
            headers = {}
            while (one := received.readline()) not in (b"\r\n", b""):
                name, _, value = one.decode("latin-1").partition(":")
                headers[name] = value.strip()
            known = {name.lower(): value for name, value in headers.items()}
            if known.get("expect", "").lower() == "100-continue":
                connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            body = received.read(int(known.get("content-length", "0")))
            answer = it.answer(Request(method, target, headers, body))
            if answer is None:
                return
            _reply(connection, method, answer)
            if answer.cut is not None:
                return


def _reply(connection: socket.socket, method: str, answer: Answer) -> None:
    lines = [f"HTTP/1.1 {answer.status} X"]
    kept = {name: value for name, value in answer.headers.items() if name.lower() not in _HOP}
    if method != "HEAD":
        kept = {name: value for name, value in kept.items() if name.lower() != "content-length"}
        kept["Content-Length"] = str(len(answer.body))
    lines += [f"{name}: {value}" for name, value in kept.items()]
    connection.sendall("\r\n".join([*lines, "", ""]).encode("latin-1"))
    if method != "HEAD":
        connection.sendall(answer.body if answer.cut is None else answer.body[: answer.cut])


_HOP = ("transfer-encoding", "connection", "keep-alive")
