"""The S3 backend of the object store: the only file that knows boto3, and where its errors end.

Endpoint, region and credentials are found by boto3 itself: AWS_ENDPOINT_URL (or AWS_ENDPOINT_URL_S3),
AWS_DEFAULT_REGION, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, or a profile. boto3 puts the bucket into the path, not
into the host name, as soon as an endpoint is given, which is what servers other than Amazon's need.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

import boto3
import botocore.session
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore import exceptions as raised
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from storage.errors import DeltaworksError, InvalidInput, Missing, StoreFull, Unavailable
from storage.keys import Listed, check_key

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

_MULTIPART = 64 * 2**20
# More than four parts at once gained nothing when measured. "classic": the C transfer client that boto3 may choose
# otherwise ignores custom endpoints without a word.
_TRANSFER = TransferConfig(
    multipart_threshold=_MULTIPART,
    multipart_chunksize=32 * 2**20,
    max_concurrency=4,
    preferred_transfer_client="classic",
)
_PAUSES = (0.1, 0.3, 0.6, 1.0)  # seconds between attempts at a conditional write that collided with another

_WAIT = "Check that the server runs and answers at this address (AWS_ENDPOINT_URL), then run again"
_KEYS = (
    "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE) to a user who may list, read and write the "
    "bucket, and check that the clock is right"
)
_REGION = "Set AWS_DEFAULT_REGION to the bucket's region and AWS_ENDPOINT_URL to the server it is on"
_CERTIFICATE = "Check http:// or https:// in AWS_ENDPOINT_URL, and name a private authority's file in AWS_CA_BUNDLE"
_BUCKET = "Create it, for example with `aws s3 mb s3://{bucket}`, or correct the store's address"
_ROOM = "Free some space or raise the quota, then run the same command again"
_ASK = "Check the store's address, AWS_ENDPOINT_URL and what this server supports"

_Verdict = tuple[type[DeltaworksError], str]

# By S3 error code. Codes come first because servers disagree about the status that goes with one: throttling may be
# 400 or 503, a full quota 403 or 507.
_BY_CODE: dict[str, _Verdict] = {
    **dict.fromkeys(("NoSuchKey", "NotFound", "404"), (Missing, "")),
    "NoSuchBucket": (Missing, _BUCKET),
    **dict.fromkeys(("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"), (InvalidInput, _KEYS)),
    **dict.fromkeys(("ExpiredToken", "InvalidToken", "RequestTimeTooSkewed"), (InvalidInput, _KEYS)),
    **dict.fromkeys(
        ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"),
        (InvalidInput, _REGION),
    ),
    **dict.fromkeys(
        ("EntityTooLarge", "QuotaExceeded", "InsufficientStorage", "InsufficientCapacity", "XMinioStorageFull"),
        (StoreFull, _ROOM),
    ),
    **dict.fromkeys(("SlowDown", "Throttling", "ThrottlingException", "RequestThrottled"), (Unavailable, _WAIT)),
    **dict.fromkeys(("RequestLimitExceeded", "TooManyRequests", "OperationAborted"), (Unavailable, _WAIT)),
    # This attempt failed on its way, another one need not.
    **dict.fromkeys(("RequestTimeout", "IncompleteBody", "BadDigest", "NoSuchUpload"), (Unavailable, _WAIT)),
    **dict.fromkeys(("XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"), (Unavailable, _WAIT)),
    "NotImplemented": (InvalidInput, _ASK),
}
_BY_STATUS: dict[int, _Verdict] = {
    301: (InvalidInput, _REGION),
    401: (InvalidInput, _KEYS),
    403: (InvalidInput, _KEYS),
    404: (Missing, ""),
    408: (Unavailable, _WAIT),
    429: (Unavailable, _WAIT),
    501: (InvalidInput, _ASK),
    507: (StoreFull, _ROOM),
}
# Errors that never reached a server, or whose answer never reached us. The order matters: the first match decides.
_BY_TYPE: tuple[tuple[type[Exception], _Verdict], ...] = (
    (raised.NoCredentialsError, (InvalidInput, _KEYS)),
    (raised.PartialCredentialsError, (InvalidInput, _KEYS)),
    (raised.ProfileNotFound, (InvalidInput, _KEYS)),
    (raised.CredentialRetrievalError, (Unavailable, _KEYS)),  # the machine's own credential service, which may be late
    (raised.MetadataRetrievalError, (Unavailable, _KEYS)),
    (raised.SSLError, (Unavailable, _CERTIFICATE)),
    (raised.ConnectionError, (Unavailable, _WAIT)),
    (raised.HTTPClientError, (Unavailable, _WAIT)),
    (raised.IncompleteReadError, (Unavailable, _WAIT)),
    (raised.FlexibleChecksumError, (Unavailable, _WAIT)),
    (ResponseParserError, (Unavailable, _WAIT)),  # an answer, but not S3's: a proxy's error page, for instance
    (HTTPError, (Unavailable, _WAIT)),  # what botocore lets through of the library below it
    (OSError, (Unavailable, _WAIT)),
)
_FOREIGN = (BotoCoreError, ClientError, Boto3Error, ResponseParserError, HTTPError, OSError)


def translate(error: Exception, *, what: str, bucket: str, endpoint: str) -> DeltaworksError:
    """The error of ours that stands for `error`, which met `what` (an object's address) at `endpoint`."""
    if isinstance(error, ClientError):
        code, status = _answer(error)
        kind, remedy = _BY_CODE.get(code) or _BY_STATUS.get(status) or _by_class(status)
        message = error.response.get("Error", {}).get("Message") or ""  # some servers send none
        said = f"{code or f'HTTP {status}'} {message}".rstrip(" .")
    else:
        kind, remedy = next((verdict for known, verdict in _BY_TYPE if isinstance(error, known)), (InvalidInput, _ASK))
        said = _without_login(str(error)).rstrip(" .") or type(error).__name__
    return kind(f"{what} at {_without_login(endpoint)}: {said}", remedy=remedy.format(bucket=bucket))


def _by_class(status: int) -> _Verdict:
    return (Unavailable, _WAIT) if status >= 500 else (InvalidInput, _ASK)


def _answer(error: ClientError) -> tuple[str, int]:
    """Code and HTTP status of a refusal. The answer to a HEAD has no body, so its code is only the status again."""
    return error.response.get("Error", {}).get("Code", ""), error.response.get("ResponseMetadata", {}).get(
        "HTTPStatusCode", 0
    )


def _without_login(text: str) -> str:
    return re.sub(r"//[^/@\s]*@", "//", text)  # an endpoint may carry a proxy's user and password


class S3Objects:
    """Objects below `prefix` of an S3 bucket. May be shared by threads; connects when first used."""

    def __init__(self, bucket: str, prefix: str) -> None:
        if not bucket:
            raise InvalidInput("an S3 store needs a bucket", remedy="Write its address as s3://bucket/prefix")
        self.bucket = bucket
        self.prefix = check_key(prefix) if prefix else ""
        self._root = f"{prefix}/" if prefix else ""
        self._lock = threading.Lock()
        self._client: S3Client | None = None

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def get(self, key: str) -> bytes:
        place = self._place(key)
        with self._errors(place):
            answer = self._connect().get_object(Bucket=self.bucket, Key=place)
            with closing(answer["Body"]) as body:  # `with body` alone would hand out urllib3's stream, and its errors
                data = body.read()
        if len(data) != answer["ContentLength"]:
            raise Unavailable(f"{key}: {len(data):,} of {answer['ContentLength']:,} bytes came", remedy=_WAIT)
        return data

    def view(self, key: str) -> memoryview:
        return memoryview(bytearray(self.get(key)))

    def put(self, key: str, data: bytes) -> None:
        place = self._place(key)
        with self._errors(place):
            if len(data) < _MULTIPART:
                self._connect().put_object(Bucket=self.bucket, Key=place, Body=data, ContentMD5=_md5(data))
            else:
                self._connect().upload_fileobj(io.BytesIO(data), self.bucket, place, Config=_TRANSFER)

    def create(self, key: str, data: bytes) -> bool:
        """Write `data` if `key` is free. True also if `key` already holds the very same bytes.

        A repeated request whose first answer was lost is told that the key is taken: by itself. Whether that happened
        cannot be seen from the answer, a proxy may repeat requests too, so what the key holds decides.
        """
        place = self._place(key)
        with self._errors(place):
            for pause in _PAUSES:
                if self._put_if_absent(place, data):
                    return True
                try:
                    return self.get(key) == data
                except Missing:
                    time.sleep(pause)  # it collided with a write that has not finished, or that failed
        raise Unavailable(f"{key}: other writers kept the server from deciding who was first", remedy=_WAIT)

    def size(self, key: str) -> int | None:
        found = self.stat(key)
        return None if found is None else found.bytes

    def stat(self, key: str) -> Listed | None:
        """Bytes and time of `key`, None if there is none. A missing bucket is None too: the server does not tell them
        apart."""
        place = self._place(key)
        try:
            with self._errors(place):
                found = self._connect().head_object(Bucket=self.bucket, Key=place)
        except Missing:
            return None
        return Listed(key, found["ContentLength"], found["LastModified"].timestamp())

    def list(self, prefix: str) -> Iterator[str]:
        return (one.key for one in self.listed(prefix))

    def listed(self, prefix: str) -> Iterator[Listed]:
        place = self._root + prefix
        with self._errors(place):
            pages = self._connect().get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=place)
            found = [
                Listed(item["Key"].removeprefix(self._root), item["Size"], item["LastModified"].timestamp())
                for page in pages
                for item in page.get("Contents", [])
            ]
        # Consoles mark folders by empty objects that end in a slash. Not every kind of bucket lists in order.
        return iter(sorted(one for one in found if one.key and not one.key.endswith("/")))

    def delete(self, key: str) -> None:
        place = self._place(key)
        with self._errors(place):
            self._connect().delete_object(Bucket=self.bucket, Key=place)  # a success too if there was nothing

    def _place(self, key: str) -> str:
        return self._root + check_key(key)

    def _put_if_absent(self, place: str, data: bytes) -> bool:
        try:
            self._connect().put_object(Bucket=self.bucket, Key=place, Body=data, ContentMD5=_md5(data), IfNoneMatch="*")
        except ClientError as error:
            code, status = _answer(error)
            if code == "NotImplemented" or status == 501:
                raise InvalidInput(
                    f"the server of {self.url} cannot write an object only if it is absent, which a line's journal "
                    f"needs to be safe against two merges at the same time",
                    remedy="Use an S3 server with conditional writes (If-None-Match), or a file:// store",
                ) from error
            if status == 412 or code in ("PreconditionFailed", "ConditionalRequestConflict"):
                return False
            raise
        return True

    def _connect(self) -> S3Client:
        with self._lock:  # boto3's clients may be shared by threads, but not made by several at once
            if self._client is None:
                core = botocore.session.Session()
                session = boto3.session.Session(botocore_session=core)
                attempts = core.get_config_variable("max_attempts") or 4  # AWS_MAX_ATTEMPTS, if it is set
                config = Config(
                    connect_timeout=10,
                    read_timeout=60,
                    retries={"mode": "standard", "total_max_attempts": attempts},
                    max_pool_connections=32,
                )
                region = session.region_name or "us-east-1"
                try:
                    self._client = session.client("s3", region_name=region, config=config)
                except ValueError as error:  # how botocore refuses an address
                    raise InvalidInput(f"cannot connect for {self.url}: {error}", remedy=_ASK) from error
            return self._client

    @contextmanager
    def _errors(self, place: str) -> Iterator[None]:
        try:
            yield
        except _FOREIGN as error:
            endpoint = self._client.meta.endpoint_url if self._client else "its endpoint"
            what = f"s3://{self.bucket}/{place}"
            raise translate(error, what=what, bucket=self.bucket, endpoint=endpoint) from error


def _md5(data: bytes) -> str:
    """The checksum that servers old and new verify on arrival; boto3's newer ones are accepted but often ignored."""
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
