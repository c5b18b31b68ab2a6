"""The S3 backend of the object store. How the server is spoken to is in s3_client.py, how large objects travel in
s3_transfer.py, what its errors mean in s3_errors.py.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from botocore.exceptions import ClientError

from storage.conditions import ROUNDS, Conditional, examine
from storage.errors import DeltaworksError, InvalidInput, Missing, Unavailable
from storage.keys import Listed, check_key, check_prefix
from storage.objects import Known, add_once_named
from storage.s3_client import S3Settings, connect
from storage.s3_errors import ASK, BROKEN_OFF, FOREIGN, WAIT, answer_of, translate, without_login
from storage.s3_transfer import BREAKS, SINGLE, Transfer
from storage.streams import Bytes, Content, exactly

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

_PAUSES = (0.1, 0.3, 0.6, 1.0)  # seconds between attempts at a conditional write that collided with another
_MD5 = 64 * 2**10  # objects up to this size go with an MD5 too: it costs nothing, and locked buckets ask for it
# Not a key that check_key lets pass, so nobody else's, and hidden from lists as hidden files are in a folder.
_NOTES = ".deltaworks/"


class S3Objects:
    """Objects below `prefix` of an S3 bucket. May be shared by threads; connects when first used."""

    def __init__(self, bucket: str, prefix: str) -> None:
        if not bucket:
            raise InvalidInput("an S3 store needs a bucket", remedy="Write its address as s3://bucket/prefix")
        self.bucket = bucket
        self.prefix = check_key(prefix) if prefix else ""
        self.settings = S3Settings.from_environment()
        self._root = f"{prefix}/" if prefix else ""
        self._lock = threading.Lock()
        self._client: S3Client | None = None
        self._transfer: Transfer | None = None
        self._conditional: Conditional | None = None

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def ready(self) -> None:
        place = self._root
        with self.errors(place):
            self.connected().list_objects_v2(Bucket=self.bucket, Prefix=place, MaxKeys=1)
            self._check_conditions()

    def get(self, key: str) -> bytes:
        place = self._place(key)
        with self.errors(place):
            return self._get(place)

    def view(self, key: str) -> memoryview:
        place = self._place(key)
        with self.errors(place):
            return memoryview(self._moving().fetch(place))

    def read(self, key: str) -> Iterator[memoryview]:
        place = self._place(key)
        with self.errors(place):
            yield from self._moving().pieces(place)

    def put(self, key: str, data: bytes) -> None:
        self._put(key, len(data), [data])

    def write(self, key: str, size: int, pieces: Iterable[Bytes]) -> None:
        self._put(key, size, pieces)

    def add(self, folder: str, content: Content, known: Known) -> str:
        return add_once_named(self, folder, content, known)

    def create(self, key: str, data: bytes) -> bool:
        """Write `data` if `key` is free. True also if `key` already holds the very same bytes.

        A repeated request whose first answer was lost is told that the key is taken: by itself. Whether that happened
        cannot be seen from the answer, a proxy may repeat requests too, so what the key holds decides.
        """
        place = self._place(key)
        with self.errors(place):
            self._check_conditions()
            for pause in _PAUSES:
                if self.put_if_absent(place, data):
                    return True
                try:
                    return self.get(key) == data
                except Missing:
                    time.sleep(pause)  # it collided with a write that has not finished, or that failed
        raise Unavailable(f"{key}: other writers kept the server from deciding who was first", remedy=WAIT)

    def size(self, key: str) -> int | None:
        found = self.stat(key)
        return None if found is None else found.bytes

    def stat(self, key: str) -> Listed | None:
        """Bytes and time of `key`, None if there is none. A missing bucket is None too: the server does not tell them
        apart."""
        place = self._place(key)
        try:
            with self.errors(place):
                found = self.connected().head_object(Bucket=self.bucket, Key=place)
        except Missing:
            return None
        return Listed(key, found["ContentLength"], found["LastModified"].timestamp())

    def list(self, prefix: str) -> Iterator[str]:
        return (one.key for one in self.listed(prefix))

    def listed(self, prefix: str) -> Iterator[Listed]:
        place = self._root + check_prefix(prefix)
        with self.errors(place):
            pages = self.connected().get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=place)
            found = [
                Listed(item["Key"].removeprefix(self._root), item["Size"], item["LastModified"].timestamp())
                for page in pages
                for item in page.get("Contents", [])
            ]
        # Consoles mark folders by empty objects that end in a slash. Not every kind of bucket lists in order.
        return iter(sorted(one for one in found if not one.key.endswith("/") and not one.key.startswith(_NOTES)))

    def delete(self, key: str) -> None:
        place = self._place(key)
        with self.errors(place):
            self.connected().delete_object(Bucket=self.bucket, Key=place)  # a success too if there was nothing

    def put_if_absent(self, place: str, data: bytes) -> bool:
        """One attempt at a conditional write, at a place in the bucket; False if the server says it is taken."""
        try:
            self._put_at(place, data, IfNoneMatch="*")
        except ClientError as error:
            code, status = answer_of(error)
            if code == "NotImplemented" or status == 501:
                raise self._unsafe("says so itself") from error
            if status == 412 or code in ("PreconditionFailed", "ConditionalRequestConflict"):
                return False
            raise
        return True

    def examine_conditions(self, rounds: int = ROUNDS) -> Conditional:
        """Find out whether the server keeps the promise of `create`, and note it in the store. Errors are boto3's."""
        scratch = f"{self._root}{_NOTES}{uuid4().hex}/"
        try:
            found = examine(self.put_if_absent, self._found, scratch, rounds)
        finally:
            with suppress(DeltaworksError, *FOREIGN):  # leftovers are small, and what went wrong first is the news
                self.remove(scratch)
        self._put_at(self._note_place(), json.dumps({**found.__dict__, "server": self.endpoint}).encode())
        self._conditional = found
        return found

    def remove(self, place: str) -> int:
        """Remove whatever begins with `place`, as far as these credentials may; how many objects are left."""
        client, left = self.connected(), 0
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=place):
            keys = [item["Key"] for item in page.get("Contents", [])]
            if not keys:
                continue
            with suppress(*FOREIGN):  # some servers have no removal of many, or ask for other rights
                said = client.delete_objects(Bucket=self.bucket, Delete={"Objects": [{"Key": key} for key in keys]})
                keys = [one["Key"] for one in said.get("Errors", [])]
            for key in keys:
                try:
                    client.delete_object(Bucket=self.bucket, Key=key)
                except FOREIGN:
                    left += 1
        return left

    @property
    def endpoint(self) -> str:
        return without_login(self.connected().meta.endpoint_url)

    def connected(self) -> S3Client:
        with self._lock:  # boto3's clients may be shared by threads, but not made by several at once
            if self._client is None:
                try:
                    self._client = connect(self.settings)
                except ValueError as error:  # how botocore refuses an address
                    raise InvalidInput(f"cannot connect for {self.url}: {error}", remedy=ASK) from error
                self._transfer = Transfer(self._client, self.bucket, self.settings.parallel, self.settings.writing)
            return self._client

    @contextmanager
    def errors(self, place: str) -> Iterator[None]:
        """Errors of boto3 that arise inside become ours, about what is at `place`."""
        try:
            yield
        except FOREIGN as error:
            endpoint = self._client.meta.endpoint_url if self._client else "its endpoint"
            what = f"s3://{self.bucket}/{place}"
            raise translate(error, what=what, bucket=self.bucket, endpoint=endpoint) from error

    def _place(self, key: str) -> str:
        return self._root + check_key(key)

    def _moving(self) -> Transfer:
        self.connected()
        assert self._transfer is not None
        return self._transfer

    def _get(self, place: str) -> bytes:
        for pause in (*BREAKS, None):
            answer = self.connected().get_object(Bucket=self.bucket, Key=place)
            try:
                with closing(answer["Body"]) as body:  # `with body` alone would hand out urllib3's stream and errors
                    return body.read()
            except BROKEN_OFF:
                if pause is None:
                    raise
                time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    def _found(self, place: str) -> bytes:
        with self.errors(place):
            return self._get(place)

    def _put(self, key: str, size: int, pieces: Iterable[Bytes]) -> None:
        place = self._place(key)
        with self.errors(place):
            if size > SINGLE:
                self._moving().upload(place, size, pieces)
            else:
                self._put_at(place, b"".join(exactly(pieces, size)))

    def _put_at(self, place: str, data: bytes, **condition: str) -> None:
        said: dict[str, Any] = {**condition, **self.settings.writing}
        if len(data) <= _MD5:
            said["ContentMD5"] = _md5(data)
        self.connected().put_object(Bucket=self.bucket, Key=place, Body=data, **said)

    def _check_conditions(self) -> None:
        """InvalidInput unless the server is known, or found, to decide between two writers."""
        if self._conditional is None:
            self._conditional = self._remembered() or self.examine_conditions()
        if not self._conditional.holds:
            raise self._unsafe(f"was tried, and {self._conditional.said}")

    def _remembered(self) -> Conditional | None:
        """What was found before about the server at this address, if it was good news; bad news is looked at again."""
        try:
            note = json.loads(self._get(self._note_place()))
            found = Conditional(*(note[name] for name in ("sequential", "most_winners", "rounds")))
        except ClientError as error:
            if answer_of(error)[1] != 404:
                raise
            return None
        except (ValueError, KeyError, TypeError):  # not what this version writes: looked at again
            return None
        return found if found.holds else None

    def _note_place(self) -> str:
        """Another address may lead to the same bucket through something that drops conditions: a note for each."""
        return f"{self._root}{_NOTES}create-{hashlib.sha256(self.endpoint.encode()).hexdigest()[:16]}"

    def _unsafe(self, why: str) -> InvalidInput:
        return InvalidInput(
            f"the server of {self.url} cannot write an object only if it is absent (it {why}), which a line's journal "
            f"needs to be safe against two merges at the same time",
            remedy="Use an S3 server with conditional writes (If-None-Match: `deltaworks store doctor` shows it), or a "
            "file:// store. What is in this store can still be read, exported and copied",
        )


def _md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
