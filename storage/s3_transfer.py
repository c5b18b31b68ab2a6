"""Large objects to and from an S3 bucket: uploads in parts, reads in ranges, several of them at once.

A piece that breaks off is asked for again from where it broke. All ranges of one read are of one version of the
object: each answer's ETag is held against the first one's. (The request could demand it with If-Match, but servers
disagree about the quotes.) An upload that does not succeed takes its parts away again.
"""

from __future__ import annotations

import mmap
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from hashlib import md5
from itertools import islice
from typing import TYPE_CHECKING, Any

from botocore.exceptions import ClientError

from storage.errors import Unavailable
from storage.s3_errors import BROKEN_OFF, answer_of
from storage.streams import Bytes, regrouped

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

PIECE = 16 * 2**20
SINGLE = PIECE  # objects up to this size travel in one request
_GULP = 2**20  # bytes taken from a connection at once: few enough to stay in the processor's cache
_AHEAD = 4  # pieces on their way while one is used
_MOST_PARTS = 10_000
BREAKS = (0.2, 0.6, 2.0)  # seconds before a piece that broke off is asked for again
_AGAIN = "Run the same command again"


@dataclass(frozen=True)
class _Answer:
    """The beginning of an answer to a GET: its body covers `start` to `stop` of an object of `total` bytes."""

    body: Any
    tag: str
    start: int
    stop: int
    total: int


class Transfer:
    """Moves objects of one bucket. May be shared by threads; at most `parallel` pieces are on their way at once."""

    def __init__(self, client: S3Client, bucket: str, parallel: int, writing: dict[str, Any]) -> None:
        self._client, self._bucket, self._parallel, self._writing = client, bucket, parallel, writing
        self._lock = threading.Lock()
        self._threads: ThreadPoolExecutor | None = None

    def upload(self, place: str, size: int, pieces: Iterable[Bytes]) -> None:
        """Write an object of `size` bytes in parts. What `pieces` raises ends the upload, and is raised."""
        part_size = PIECE * -(-size // (PIECE * _MOST_PARTS))
        begun = self._client.create_multipart_upload(Bucket=self._bucket, Key=place, **self._writing)
        name: dict[str, Any] = {"Bucket": self._bucket, "Key": place, "UploadId": begun["UploadId"]}
        sent: deque[Future[str]] = deque()
        try:
            tags = list(self._send(name, sent, regrouped(pieces, size, part_size)))
            self._complete(name, size, tags)
        except BaseException:
            for future in sent:
                future.cancel()
            wait(sent)  # a part that arrived after the removal would stay for ever
            with suppress(Exception):  # what went wrong first is the news
                self._client.abort_multipart_upload(**name)
            raise

    def fetch(self, place: str) -> bytearray | mmap.mmap:
        """All bytes of an object, in memory of their own."""
        first = self._first(place)
        # mapped memory is cleared page by page when it is written, and given back at once when it is dropped
        whole = mmap.mmap(-1, first.total) if first.total > SINGLE else bytearray(first.total)
        room = memoryview(whole)

        def fill(start: int, stop: int, answer: _Answer | None = None) -> None:
            for chunk in self._chunks(place, first.tag, start, stop, answer):
                room[start : start + len(chunk)] = chunk
                start += len(chunk)

        rest = [
            self._pool().submit(fill, start, min(start + PIECE, first.total))
            for start in range(first.stop, first.total, PIECE)
        ]
        try:
            fill(0, first.stop, first)
            for future in rest:
                future.result()
        finally:
            for future in rest:
                future.cancel()
            wait(rest)
        return whole

    def pieces(self, place: str) -> Iterator[memoryview]:
        """The bytes of an object in order, piece by piece, with the next ones on their way."""
        first = self._first(place)
        starts = iter(range(first.stop, first.total, PIECE))
        rest: deque[Future[list[bytes]]] = deque()

        def chunks(start: int) -> list[bytes]:
            return list(self._chunks(place, first.tag, start, min(start + PIECE, first.total)))

        try:
            rest.extend(self._pool().submit(chunks, start) for start in islice(starts, min(_AHEAD, self._parallel)))
            # the first answer is only a piece, or all if the server knows no ranges
            yield from (memoryview(chunk) for chunk in self._chunks(place, first.tag, 0, first.stop, first))
            while rest:
                found = rest.popleft().result()
                rest.extend(self._pool().submit(chunks, start) for start in islice(starts, 1))
                yield from (memoryview(chunk) for chunk in found)
        finally:
            for future in rest:
                future.cancel()

    def _send(
        self, name: dict[str, Any], sent: deque[Future[str]], parts: Iterable[bytes | bytearray]
    ) -> Iterator[tuple[int, str]]:
        """Number and ETag of every part, in order."""
        done = 0
        for number, part in enumerate(parts, 1):
            sent.append(self._pool().submit(self._part, name, number, part))
            while len(sent) > self._parallel:
                done += 1
                yield done, sent.popleft().result()
        while sent:
            done += 1
            yield done, sent.popleft().result()

    def _part(self, name: dict[str, Any], number: int, part: bytes | bytearray) -> str:
        return self._client.upload_part(**name, PartNumber=number, Body=part)["ETag"]  # type: ignore[arg-type]

    def _complete(self, name: dict[str, Any], size: int, tags: list[tuple[int, str]]) -> None:
        parts: list[Any] = [{"PartNumber": number, "ETag": tag} for number, tag in tags]
        try:
            self._client.complete_multipart_upload(**name, MultipartUpload={"Parts": parts})
        except ClientError as error:
            if answer_of(error)[0] != "NoSuchUpload":
                raise
            # A repeated completion whose first answer was lost finds no upload. The object then has the ETag that the
            # parts give.
            found = self._client.head_object(Bucket=name["Bucket"], Key=name["Key"])
            if found["ContentLength"] != size or found["ETag"].strip('"') != _tag_of_parts(tags):
                raise

    def _first(self, place: str) -> _Answer:
        """The first piece's answer, or the whole object's if the server ignores ranges."""
        try:
            return self._ask(place, 0, PIECE)
        except ClientError as error:
            if answer_of(error)[1] != 416:  # no range lies in an empty object
                raise
        return self._ask(place)

    def _ask(self, place: str, start: int = 0, stop: int | None = None) -> _Answer:
        wanted: dict[str, Any] = {} if stop is None else {"Range": f"bytes={start}-{stop - 1}"}
        found = self._client.get_object(Bucket=self._bucket, Key=place, **wanted)
        length = found["ContentLength"]
        where = found.get("ContentRange")  # bytes 0-99/1000
        if where is None:
            return _Answer(found["Body"], found.get("ETag", ""), 0, length, length)
        start = int(where.split()[-1].partition("-")[0])
        return _Answer(found["Body"], found.get("ETag", ""), start, start + length, int(where.rpartition("/")[2]))

    def _chunks(self, place: str, tag: str, start: int, stop: int, answer: _Answer | None = None) -> Iterator[bytes]:
        """The object's bytes from `start` to `stop`, out of `answer` as far as that goes."""
        for pause in (*BREAKS, None):
            try:
                if answer is None:
                    answer = self._again(place, tag, start, stop)
                while start < stop:
                    chunk = answer.body.read(min(_GULP, stop - start))
                    if not chunk:
                        raise ConnectionError(f"the answer ended {stop - start:,} bytes too early")
                    yield chunk
                    start += len(chunk)
                return
            except BROKEN_OFF:
                if pause is None:
                    raise
                time.sleep(pause)
            finally:
                if answer is not None:
                    answer.body.close()
            answer = None

    def _again(self, place: str, tag: str, start: int, stop: int) -> _Answer:
        answer = self._ask(place, start, stop)
        if answer.tag != tag:
            answer.body.close()
            raise Unavailable(f"s3://{self._bucket}/{place} was replaced while it was read", remedy=_AGAIN)
        left = start - answer.start
        while left > 0 and (chunk := answer.body.read(min(_GULP, left))):  # the server knows no ranges: read on
            left -= len(chunk)
        return answer

    def _pool(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(self._parallel, thread_name_prefix="s3")
            return self._threads


def _tag_of_parts(tags: list[tuple[int, str]]) -> str:
    """The ETag that S3 gives an object made of parts."""
    try:
        joined = b"".join(bytes.fromhex(tag.strip('"')) for _, tag in tags)
    except ValueError:
        return ""
    return f"{md5(joined, usedforsecurity=False).hexdigest()}-{len(tags)}"
