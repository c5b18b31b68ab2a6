"""The S3 store when things go wrong, and what only it does: errors, retries, lost answers, uploads in parts.

What it shares with the other backends is in tests/contracts/test_object_stores.py.
"""

from __future__ import annotations

import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from urllib.parse import urlparse

import pytest
from botocore import exceptions as raised
from botocore.exceptions import ClientError
from botocore.parsers import ResponseParserError
from urllib3.exceptions import ProtocolError

from storage.address import open_objects
from storage.errors import DeltaworksError, InvalidInput, Missing, StoreFull, Unavailable
from storage.s3 import S3Objects
from storage.s3_errors import translate
from tests.storage.s3_server import free_port

SECRET = "a-secret-that-must-not-be-told"


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], S3Objects]:
    """Opens a store on a server at any address, with credentials but no patience."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)

    def open_at(endpoint: str) -> S3Objects:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
        return S3Objects("a-bucket", "a/prefix")

    return open_at


@contextmanager
def answering(*answers: bytes) -> Iterator[tuple[str, list[bytes]]]:
    """A server that gives these answers in turn, the last one for ever; yields its address and the requests it got.

    No real server can be told to run full, break off or refuse a feature at the right moment, so this one plays it.
    """
    requests: list[bytes] = []

    def serve(listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, connection.makefile("rb") as received:
                lines = list(iter(received.readline, b"\r\n"))
                head = b"".join(lines).lower()
                if b"expect: 100-continue" not in head:  # else the client sends nothing more before it is answered
                    lengths = [line.split(b":")[1] for line in head.splitlines() if line.startswith(b"content-length:")]
                    received.read(int(lengths[0]) if lengths else 0)
                requests.append(lines[0])
                connection.sendall(answers[min(len(requests), len(answers)) - 1])

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", requests
        listener.shutdown(socket.SHUT_RDWR)


def answer(status: int, code: str = "", *, body: bytes | None = None, length: int | None = None) -> bytes:
    body = f"<Error><Code>{code}</Code><Message>as told</Message></Error>".encode() if body is None else body
    size = len(body) if length is None else length
    return f"HTTP/1.1 {status} X\r\nContent-Length: {size}\r\nConnection: close\r\n\r\n".encode() + body


@contextmanager
def losing_the_first_answer(endpoint: str) -> Iterator[str]:
    """A relay in front of a real server: requests get through, but the first success is never heard of."""
    target = urlparse(endpoint)
    lost = threading.Event()

    def pump(source: socket.socket, sink: socket.socket, *, answers: bool) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if answers and data.startswith(b"HTTP/1.1 200") and not lost.is_set():
                    lost.set()
                    break
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)  # unlike close, is noticed by the thread that waits on the other pump

    def relay(client: socket.socket) -> None:
        with client, socket.create_connection((target.hostname or "", target.port or 80)) as server:
            requests = threading.Thread(target=pump, args=(client, server), kwargs={"answers": False}, daemon=True)
            requests.start()
            pump(server, client, answers=True)
            requests.join()

    def serve(listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=relay, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        assert lost.is_set()


def uses(store: S3Objects) -> list[Callable[[], object]]:
    """Every way to use a store."""
    return [
        lambda: store.get("key"),
        lambda: store.put("key", b"data"),
        lambda: store.create("key", b"data"),
        lambda: store.size("key"),
        lambda: list(store.list("")),
    ]


class TestWithoutAServer:
    """What is said and raised when the other side is absent or odd."""

    def test_nobody_answers(self, elsewhere: Callable[[str], S3Objects]) -> None:
        endpoint = f"http://127.0.0.1:{free_port()}"
        started = time.monotonic()
        for use in uses(elsewhere(endpoint)):
            with pytest.raises(Unavailable) as caught:
                use()
            for part in (endpoint, "a-bucket", "AWS_ENDPOINT_URL"):
                assert part in str(caught.value)
        assert time.monotonic() - started < 15

    def test_the_login_in_an_address_is_not_told(self, elsewhere: Callable[[str], S3Objects]) -> None:
        with pytest.raises(DeltaworksError) as caught:
            elsewhere(f"http://me:{SECRET}@127.0.0.1:{free_port()}").get("key")
        assert SECRET not in str(caught.value)

    def test_no_credentials(self, elsewhere: Callable[[str], S3Objects], monkeypatch: pytest.MonkeyPatch) -> None:
        store = elsewhere("http://127.0.0.1:1")
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            monkeypatch.setenv(name, os.devnull)
        with pytest.raises(InvalidInput, match="Set AWS_ACCESS_KEY_ID"):
            store.get("key")

    @pytest.mark.parametrize("endpoint", ["localhost:9000", "http://", "nonsense"])
    def test_an_address_that_is_none(self, elsewhere: Callable[[str], S3Objects], endpoint: str) -> None:
        with pytest.raises(InvalidInput, match="AWS_ENDPOINT_URL"):
            elsewhere(endpoint).get("key")

    def test_a_bucket_name_that_is_none(self, elsewhere: Callable[[str], S3Objects]) -> None:
        elsewhere("http://127.0.0.1:1")
        with pytest.raises(InvalidInput, match="bucket"):
            open_objects("s3://")
        with pytest.raises(InvalidInput, match="not an object key"):
            open_objects("s3://a-bucket/../up")
        with pytest.raises(InvalidInput):
            open_objects("s3://no%20bucket").get("key")

    @pytest.mark.parametrize(
        ("status", "code", "kind"),
        [
            (403, "QuotaExceeded", StoreFull),
            (507, "Whatever", StoreFull),
            (400, "EntityTooLarge", StoreFull),
            (503, "SlowDown", Unavailable),
            (500, "InternalError", Unavailable),
            (502, "", Unavailable),
            (400, "BadDigest", Unavailable),
            (404, "NoSuchBucket", Missing),
            (400, "ExpiredToken", InvalidInput),
            (405, "MethodNotAllowed", InvalidInput),
        ],
    )
    def test_refusals(
        self, elsewhere: Callable[[str], S3Objects], status: int, code: str, kind: type[DeltaworksError]
    ) -> None:
        with answering(answer(status, code)) as (endpoint, _):
            store = elsewhere(endpoint)
            for use in (
                lambda: store.put("key", b"data"),
                lambda: store.create("key", b"data"),
                lambda: store.get("key"),
            ):
                with pytest.raises(kind) as caught:
                    use()
                assert type(caught.value) is kind
                assert endpoint in str(caught.value)
                assert "s3://a-bucket/a/prefix/key" in str(caught.value)

    def test_a_server_without_conditional_writes(self, elsewhere: Callable[[str], S3Objects]) -> None:
        refusing = answering(answer(404, "NoSuchKey"), answer(501, "NotImplemented"))
        with refusing as (endpoint, _), pytest.raises(InvalidInput, match="only if it is absent"):
            elsewhere(endpoint).create("line/main/00000000", b"entry")

    def test_an_answer_that_breaks_off(self, elsewhere: Callable[[str], S3Objects]) -> None:
        breaking_off = answering(answer(200, body=b"the first bytes", length=1000))
        with breaking_off as (endpoint, _), pytest.raises(Unavailable, match="a-bucket"):
            elsewhere(endpoint).get("key")

    def test_something_answers_that_is_not_s3(self, elsewhere: Callable[[str], S3Objects]) -> None:
        welcoming = answering(answer(200, body=b"<html><p>Welcome & log in"))
        with welcoming as (endpoint, _), pytest.raises(Unavailable):
            list(elsewhere(endpoint).list(""))

    def test_a_hiccup_is_not_noticed(self, elsewhere: Callable[[str], S3Objects]) -> None:
        with answering(answer(503, "SlowDown"), answer(200, body=b"data")) as (endpoint, requests):
            assert elsewhere(endpoint).get("key") == b"data"
            assert len(requests) == 2

    def test_create_tries_again_when_it_collided(self, elsewhere: Callable[[str], S3Objects]) -> None:
        collided, nothing, done = (
            answer(409, "ConditionalRequestConflict"),
            answer(404, "NoSuchKey"),
            answer(200, body=b""),
        )
        note = answer(200, body=b'{"sequential": true, "most_winners": 1, "rounds": 3, "server": ""}')
        with answering(note, collided, nothing, done) as (endpoint, requests):
            assert elsewhere(endpoint).create("key", b"data") is True
            assert [request.split()[0] for request in requests] == [b"GET", b"PUT", b"GET", b"PUT"]
        with (
            answering(note, *[collided, nothing] * 4) as (endpoint, _),
            pytest.raises(Unavailable, match="who was first"),
        ):
            elsewhere(endpoint).create("key", b"data")


class TestWithAServer:
    """Against the real one."""

    def test_wrong_secret(self, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        for use in uses(open_objects(s3_url)):  # type: ignore[arg-type]
            with pytest.raises(InvalidInput, match="AWS_SECRET_ACCESS_KEY") as caught:
                use()
            assert SECRET not in f"{caught.value!r} {caught.value.__cause__!r}"

    def test_unknown_user(self, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
        with pytest.raises(InvalidInput, match="AWS_ACCESS_KEY_ID"):
            open_objects(s3_url).get("key")

    def test_missing_bucket(self, s3_url: str) -> None:
        store = S3Objects("deltaworks-no-such-bucket", "prefix")
        for use in (use for number, use in enumerate(uses(store)) if number != 3):
            with pytest.raises(Missing, match="Create it, for example with `aws s3 mb s3://deltaworks-no-such-bucket`"):
                use()
        assert store.size("key") is None

    def test_a_server_by_name_gets_the_bucket_in_the_path(self, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        address = os.environ["AWS_ENDPOINT_URL"]
        if "127.0.0.1" in address:  # by number there is no other way, so it would prove nothing
            monkeypatch.setenv("AWS_ENDPOINT_URL", address.replace("127.0.0.1", "localhost"))
        store = open_objects(s3_url)
        store.put("key", b"data")
        assert store.get("key") == b"data"

    def test_a_store_may_be_a_whole_bucket(self, s3_url: str) -> None:
        below, whole = open_objects(s3_url), S3Objects("deltaworks-test", "")
        prefix = s3_url.rpartition("/")[2]
        whole.put(f"{prefix}/a/b", b"data")
        assert whole.url == "s3://deltaworks-test"
        assert list(whole.list(f"{prefix}/")) == [f"{prefix}/a/b"]
        assert list(below.list("")) == ["a/b"]

    def test_large_objects_travel_in_parts(self, s3_url: str) -> None:
        store = open_objects(s3_url)
        data = random.Random(7).randbytes(80 * 2**20)
        store.put("large", data)
        assert store.size("large") == len(data)
        assert sha256(store.get("large")).digest() == sha256(data).digest()

    def test_a_lost_answer_does_not_lose_the_race_against_itself(
        self, s3_url: str, s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with losing_the_first_answer(s3_environment["AWS_ENDPOINT_URL"]) as relay:
            monkeypatch.setenv("AWS_ENDPOINT_URL", relay)
            store = open_objects(s3_url)
            assert store.create("line/main/00000000", b"my entry, at noon") is True
            assert store.create("line/main/00000000", b"another entry") is False
            assert store.get("line/main/00000000") == b"my entry, at noon"


def refusal(status: int, code: str) -> ClientError:
    return ClientError(
        {"Error": {"Code": code, "Message": ""}, "ResponseMetadata": {"HTTPStatusCode": status}},  # type: ignore[typeddict-item]
        "PutObject",
    )


URL = {"endpoint_url": "http://s3.example"}


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (raised.EndpointConnectionError(**URL, error="refused"), Unavailable),
        (raised.ConnectTimeoutError(**URL), Unavailable),
        (raised.ReadTimeoutError(**URL), Unavailable),
        (raised.ConnectionClosedError(**URL), Unavailable),
        (raised.SSLError(**URL, error=OSError("self-signed")), Unavailable),
        (raised.ProxyConnectionError(proxy_url="http://proxy.example"), Unavailable),
        (raised.HTTPClientError(error="?"), Unavailable),
        (raised.ResponseStreamingError(error="reset"), Unavailable),
        (raised.IncompleteReadError(actual_bytes=1, expected_bytes=2), Unavailable),
        (raised.FlexibleChecksumError(error_msg="crc32"), Unavailable),
        (raised.CredentialRetrievalError(provider="iam-role", error_msg="late"), Unavailable),
        (ResponseParserError("not XML"), Unavailable),
        (ProtocolError("broken"), Unavailable),
        (ConnectionResetError("reset"), Unavailable),
        (raised.NoCredentialsError(), InvalidInput),
        (raised.PartialCredentialsError(provider="env", cred_var="AWS_SECRET_ACCESS_KEY"), InvalidInput),
        (raised.ProfileNotFound(profile="work"), InvalidInput),
        (raised.ParamValidationError(report="Invalid bucket name"), InvalidInput),
        (refusal(403, "AccessDenied"), InvalidInput),
        (refusal(403, "InvalidAccessKeyId"), InvalidInput),
        (refusal(403, "SignatureDoesNotMatch"), InvalidInput),
        (refusal(403, "RequestTimeTooSkewed"), InvalidInput),
        (refusal(403, "403"), InvalidInput),
        (refusal(301, "PermanentRedirect"), InvalidInput),
        (refusal(301, "301"), InvalidInput),
        (refusal(400, "InvalidBucketName"), InvalidInput),
        (refusal(501, "NotImplemented"), InvalidInput),
        (refusal(404, "NoSuchKey"), Missing),
        (refusal(404, "NoSuchBucket"), Missing),
        (refusal(404, "404"), Missing),
        (refusal(404, "NoSuchUpload"), Unavailable),
        (refusal(400, "RequestTimeout"), Unavailable),
        (refusal(400, "ThrottlingException"), Unavailable),
        (refusal(429, ""), Unavailable),
        (refusal(500, "InternalError"), Unavailable),
        (refusal(503, "SlowDown"), Unavailable),
        (refusal(599, ""), Unavailable),
        (refusal(400, "EntityTooLarge"), StoreFull),
        (refusal(403, "QuotaExceeded"), StoreFull),
        (refusal(507, "InsufficientStorage"), StoreFull),
        (refusal(507, "507"), StoreFull),
    ],
    ids=lambda value: getattr(value, "__name__", None) or str(value)[:60],
)
def test_every_foreign_error_becomes_one_of_ours(error: Exception, kind: type[DeltaworksError]) -> None:
    found = translate(error, what="s3://b/key", bucket="b", endpoint="http://s3.example")
    assert type(found) is kind
    assert "s3://b/key at http://s3.example" in str(found)
    assert found.remedy or kind is Missing
