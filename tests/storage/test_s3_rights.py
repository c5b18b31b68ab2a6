"""What the policies of infra/s3-policies.md allow on a real server, what is said beyond them; encryption on the way and
in the store, and which secrets are told: none."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import ssl
import subprocess
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from uuid import uuid4

import pytest

from storage.artifacts import ArtifactStore
from storage.errors import DeltaworksError, InvalidInput, Unavailable
from storage.s3 import S3Objects
from storage.s3_client import S3Settings
from storage.s3_doctor import abandoned, remove_uploads
from tests.storage.s3_faults import relay
from tests.storage.s3_fixtures import BUCKET, client
from tests.storage.s3_server import GUEST

PAGE = Path(__file__).parents[2] / "infra" / "s3-policies.md"
LARGE = bytes(17 * 2**20)
GuestWith = Callable[[str], S3Objects]


def policies() -> dict[str, str]:
    """The policies of the page, by the heading they are under."""
    found = re.findall(r"^## (\w+).*?```json\n(.*?)```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    return {name.lower(): text for name, text in found}


@pytest.fixture
def bucket(s3_url: str, s3_environment: dict[str, str]) -> Iterator[str]:
    """A bucket of this test's own, because a policy is one of a whole bucket."""
    if os.environ.get("DELTAWORKS_TEST_S3_ENDPOINT") and not os.environ.get("DELTAWORKS_TEST_S3_GUEST"):
        pytest.skip("the server that was given may have no second user; DELTAWORKS_TEST_S3_GUEST=1 says it has")
    name, s3 = f"deltaworks-{uuid4().hex}", client(s3_environment)
    s3.create_bucket(Bucket=name)
    yield name
    s3.delete_bucket_policy(Bucket=name)
    for page in s3.get_paginator("list_objects_v2").paginate(Bucket=name):
        for item in page.get("Contents", []):
            s3.delete_object(Bucket=name, Key=item["Key"])
    s3.delete_bucket(Bucket=name)


@pytest.fixture
def guest(bucket: str, s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> GuestWith:
    """The store as a second user finds it whom a policy of the page lets in; the owner has made it and filled it."""
    owner = S3Objects(bucket, "store")
    owner.put("kept", b"by the owner")
    owner.put("large", LARGE)
    owner.ready()

    def with_policy(name: str) -> S3Objects:
        text = policies()[name].replace("BUCKET", bucket).replace("PREFIX", "store").replace("USER", "guest")
        json.loads(text)
        client(s3_environment).put_bucket_policy(Bucket=bucket, Policy=text)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", GUEST[0])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", GUEST[1])
        return S3Objects(bucket, "store")

    return with_policy


def test_a_reader(guest: GuestWith) -> None:
    store = guest("reader")
    assert (store.get("kept"), store.size("kept"), store.size("nothing")) == (b"by the owner", 12, None)
    assert store.view("large") == LARGE
    assert list(store.list("")) == ["kept", "large"]
    for write in (
        lambda: store.put("kept", b"x"),
        lambda: store.put("new", LARGE),
        lambda: store.create("new", b"x"),
    ):
        with pytest.raises(InvalidInput, match="Writing needs s3:PutObject; commands that only read work without"):
            write()
    assert store.remove("store/kept") == 1
    assert store.get("kept") == b"by the owner"


def test_a_writer(guest: GuestWith) -> None:
    store = guest("writer")
    store.ready()
    assert ArtifactStore(store).write_blob(b"small")
    store.put("large", LARGE + b"more")
    assert store.create("line/main/00000000", b"entry")
    assert not store.create("line/main/00000000", b"another")
    assert store.view("large") == LARGE + b"more"
    with pytest.raises(InvalidInput):
        store.write("half", len(LARGE), [LARGE[:-1]])  # an upload that fails is taken away again
    assert abandoned(store, older=timedelta(0)) == []
    assert store.remove("store/kept") == 1
    elsewhere = S3Objects(store.bucket, "another")
    with pytest.raises(InvalidInput, match="s3-policies"):
        elsewhere.put("key", b"x")


def test_a_pruner(guest: GuestWith) -> None:
    store = guest("pruner")
    assert store.get("kept") == b"by the owner"
    assert store.remove("store/kept") == 0
    assert store.size("kept") is None
    assert remove_uploads(store, older=timedelta(0)) == 0
    with pytest.raises(InvalidInput, match="Writing needs s3:PutObject"):
        store.put("new", b"x")


@pytest.fixture
def authority(tmp_path: Path) -> tuple[Path, ssl.SSLContext]:
    """A certificate that nobody knows, for 127.0.0.1, and who answers with it."""
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=deltaworks -addext subjectAltName=IP:127.0.0.1"
    )
    done = subprocess.run([*command.split(), "-keyout", key, "-out", certificate], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return certificate, context


class TestTheWay:
    def test_a_private_authority(
        self, s3_url: str, authority: tuple[Path, ssl.SSLContext], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        prefix = s3_url.rpartition("/")[2]
        with relay(os.environ["AWS_ENDPOINT_URL"], tls=authority[1]) as (address, it):
            monkeypatch.setenv("AWS_ENDPOINT_URL", address)
            monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
            with pytest.raises(Unavailable, match="AWS_CA_BUNDLE"):
                S3Objects(BUCKET, prefix).get("key")
            monkeypatch.setenv("AWS_CA_BUNDLE", str(authority[0]))
            store = S3Objects(BUCKET, prefix)
            for size in (0, 1000, 100_000, len(LARGE)):
                store.put("key", LARGE[:size])
                assert store.view("key") == LARGE[:size]
            assert store.create("line/main/00000000", b"entry")
            sent = [one.headers.get("X-Amz-Content-SHA256") for one in it.seen if one.method == "PUT"]
            assert hashlib.sha256(LARGE[:100_000]).hexdigest() in sent

    @pytest.mark.parametrize(
        ("setting", "address"), [("path", "s3.example/models/a/key"), ("virtual", "models.s3.example/a/key")]
    )
    def test_where_the_bucket_is_written(self, monkeypatch: pytest.MonkeyPatch, setting: str, address: str) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "https://s3.example")
        monkeypatch.setenv("DELTAWORKS_S3_ADDRESSING", setting)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        signed = (
            S3Objects("models", "a")
            .connected()
            .generate_presigned_url("get_object", {"Bucket": "models", "Key": "a/key"})
        )
        assert signed.startswith(f"https://{address}?")

    def test_no_secret_is_written_down(
        self, s3_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Not in what the store keeps of its server, not in errors and what caused them, not in our logs."""
        secret, address = os.environ["AWS_SECRET_ACCESS_KEY"], os.environ["AWS_ENDPOINT_URL"]
        login = "//somebody:a-password@"
        monkeypatch.setenv("AWS_ENDPOINT_URL", address.replace("//", login))
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        caplog.set_level(logging.INFO)
        told = [caplog.text]
        store = S3Objects(BUCKET, s3_url.rpartition("/")[2])
        for use in (store.ready, lambda: store.get("nothing"), lambda: store.put("key", b"data")):
            try:
                use()
            except DeltaworksError as error:
                told += [str(error), repr(error), error.remedy]
        told.append(store.endpoint)
        keys = client({**os.environ, "AWS_ENDPOINT_URL": address}).list_objects_v2(Bucket=BUCKET, Prefix=store.prefix)
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        plain = S3Objects(BUCKET, store.prefix)
        plain.ready()
        told += [plain._found(item["Key"]).decode() for item in keys.get("Contents", [])]
        for words in told:
            assert secret not in words
            assert "a-password" not in words


def test_nobody(guest: GuestWith, s3_environment: dict[str, str]) -> None:
    store = guest("reader")
    client(s3_environment).delete_bucket_policy(Bucket=store.bucket)
    for use in (lambda: store.get("kept"), lambda: list(store.list("")), store.ready):
        with pytest.raises(InvalidInput, match=r"s3:(GetObject|ListBucket)"):
            use()


class TestEncryption:
    def test_every_way_to_write_asks_for_it(self, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of the keys that the test server knows."""
        monkeypatch.setenv("DELTAWORKS_S3_SSE", "aws:kms")
        monkeypatch.setenv("DELTAWORKS_S3_SSE_KMS_KEY", "deltaworks-test")
        store = S3Objects("deltaworks-test", s3_url.rpartition("/")[2])
        store.put("small", b"secret")
        store.put("large", LARGE)
        assert store.create("entry", b"secret")
        for key, data in (("small", b"secret"), ("large", LARGE), ("entry", b"secret")):
            assert store.view(key) == data
            found = store.connected().head_object(Bucket=store.bucket, Key=f"{store.prefix}/{key}")
            assert (found["ServerSideEncryption"], found["SSEKMSKeyId"]) == ("aws:kms", "deltaworks-test"), key

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("DELTAWORKS_S3_SSE", "rot13"),
            ("DELTAWORKS_S3_SSE_KMS_KEY", "a-key-without-a-method"),
            ("DELTAWORKS_S3_PARALLEL", "0"),
            ("DELTAWORKS_S3_TIMEOUT", "soon"),
            ("DELTAWORKS_S3_ADDRESSING", "by-name"),
        ],
    )
    def test_settings_that_make_no_sense(self, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
        monkeypatch.setenv(name, value)
        with pytest.raises(InvalidInput, match=name):
            S3Settings.from_environment()
