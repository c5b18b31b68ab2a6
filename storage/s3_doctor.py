"""What the doctor asks an S3 server beyond what every store is asked: ranges, parts, checksums, clock, leftovers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from botocore.exceptions import ClientError

from storage.conditions import Conditional
from storage.doctor import RACES, Check
from storage.objects import ObjectStore
from storage.s3 import S3Objects
from storage.s3_errors import FOREIGN, answer_of
from storage.s3_transfer import PIECE, SINGLE

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

_SKEW = 300  # seconds between two clocks that are worth a note; signatures are refused from 900


class S3Ward:
    """A bucket, and what may be asked of its server."""

    def __init__(self, objects: ObjectStore) -> None:
        assert isinstance(objects, S3Objects)
        self._objects = objects

    @contextmanager
    def beside(self) -> Iterator[ObjectStore]:
        scratch = S3Objects(self._objects.bucket, f"{self._objects.prefix}/doctor-{uuid4().hex}".lstrip("/"))
        try:
            yield scratch
        finally:
            with scratch.errors(scratch.prefix):
                scratch.remove(f"{scratch.prefix}/")

    def conditional(self, scratch: ObjectStore) -> Conditional:
        with self._objects.errors(self._objects.prefix):
            return self._objects.examine_conditions(RACES)

    def more(self, scratch: ObjectStore) -> Iterator[Check]:
        assert isinstance(scratch, S3Objects)
        client, bucket = scratch.connected(), scratch.bucket
        with scratch.errors(scratch.prefix):
            yield _ranges(client, bucket, f"{scratch.prefix}/range")
            yield _parts(scratch)
            yield _checksum(client, bucket, f"{scratch.prefix}/altered")
            yield _clock(client, bucket)
            yield _removal(client, bucket, f"{scratch.prefix}/removed")
            yield _leftovers(self._objects)


def _ranges(client: S3Client, bucket: str, place: str) -> Check:
    data = bytes(range(100))
    client.put_object(Bucket=bucket, Key=place, Body=data)
    answer = client.get_object(Bucket=bucket, Key=place, Range="bytes=10-19")
    found = answer["Body"].read()
    if found == data[10:20] and answer.get("ContentRange") == "bytes 10-19/100":
        return Check("ranges", "good", "large objects are read in pieces, several at once")
    if found == data:
        return Check("ranges", "note", "ignored: large objects are read in one piece, and again when it breaks off")
    return Check("ranges", "bad", f"bytes 10 to 19 were asked for, {len(found)} others came")


def _parts(scratch: S3Objects) -> Check:
    data = os.urandom(1 << 16) * ((SINGLE + PIECE // 2) >> 16)
    try:
        scratch.put("parts", data)
    except ValueError as error:  # InvalidInput: the server has no uploads in parts
        return Check("uploads in parts", "bad", str(error))
    if scratch.view("parts") != data:
        return Check("uploads in parts", "bad", "what was sent in parts does not come back")
    return Check("uploads in parts", "good", f"{len(data) >> 20} MiB in {-(-len(data) // PIECE)} parts came back")


def _checksum(client: S3Client, bucket: str, place: str) -> Check:
    """Send bytes that are not those that were signed."""

    def alter(request: Any, **_: Any) -> None:
        if request.url.endswith(place):
            request.body = b"as it was smudged"

    client.meta.events.register("before-send.s3.PutObject", alter)
    try:
        client.put_object(Bucket=bucket, Key=place, Body=b"as it was written")
    except ClientError as error:
        return Check("checksums of uploads", "good", f"altered bytes are refused: {answer_of(error)[0]}")
    finally:
        client.meta.events.unregister("before-send.s3.PutObject", alter)
    return Check(
        "checksums of uploads", "note", "altered bytes are taken; they are found when they are read, by sha256"
    )


def _clock(client: S3Client, bucket: str) -> Check:
    answer = client.head_bucket(Bucket=bucket)
    told = answer["ResponseMetadata"]["HTTPHeaders"].get("date", "")
    try:
        apart = abs(datetime.now(UTC) - datetime.strptime(told, "%a, %d %b %Y %H:%M:%S %Z").replace(tzinfo=UTC))
    except ValueError:
        return Check("clock", "note", "the server does not tell the time")
    seconds = round(apart.total_seconds())
    return Check("clock", "note" if seconds > _SKEW else "good", f"{seconds} s apart from this machine's")


def _removal(client: S3Client, bucket: str, place: str) -> Check:
    client.put_object(Bucket=bucket, Key=place, Body=b"")
    try:
        client.delete_object(Bucket=bucket, Key=place)
    except FOREIGN:
        return Check("removal", "note", "these credentials may not remove anything: what the doctor wrote stays")
    return Check("removal", "good", "allowed to these credentials")


def _leftovers(objects: S3Objects) -> Check:
    try:
        found = abandoned(objects)
    except FOREIGN:
        return Check("abandoned uploads", "note", "cannot be listed here")
    if not found:
        return Check("abandoned uploads", "good", "none older than a day")
    oldest = min(begun for _, _, begun in found)
    said = f"{len(found)}, the oldest of {oldest:%Y-%m-%d}: `deltaworks store doctor --remove-uploads` removes them"
    return Check("abandoned uploads", "note", said)


def abandoned(objects: S3Objects, older: timedelta = timedelta(days=1)) -> list[tuple[str, str, datetime]]:
    """Uploads that nobody ended: place, id and beginning of each. Their parts take room and are in no list."""
    client = objects.connected()
    place = f"{objects.prefix}/".lstrip("/")
    found = []
    for page in client.get_paginator("list_multipart_uploads").paginate(Bucket=objects.bucket, Prefix=place):
        for one in page.get("Uploads", []):
            if one["Initiated"] <= datetime.now(UTC) - older:
                found.append((one["Key"], one["UploadId"], one["Initiated"]))
    return found


def remove_uploads(objects: ObjectStore, older: timedelta = timedelta(days=1)) -> int:
    """End the uploads that nobody ended; how many."""
    assert isinstance(objects, S3Objects)
    with objects.errors(objects.prefix):
        found = abandoned(objects, older)
        for place, upload, _ in found:
            objects.connected().abort_multipart_upload(Bucket=objects.bucket, Key=place, UploadId=upload)
    return len(found)
