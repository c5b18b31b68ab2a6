"""What went wrong at an S3 server, in our words: every error of boto3 and below becomes one of storage/errors.py.

Also what a failed attempt says about the next one: `BROKEN_OFF` are the ways in which an answer ends too early.
"""

from __future__ import annotations

import re

from boto3.exceptions import Boto3Error
from botocore import exceptions as raised
from botocore.exceptions import BotoCoreError, ClientError
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from storage.errors import DeltaworksError, InvalidInput, Missing, StoreFull, Unavailable

WAIT = "Check that the server runs and answers at this address (AWS_ENDPOINT_URL), then run again"
_KEYS = (
    "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE) to a user who may list, read and write the "
    "bucket, and check that the clock is right"
)
_RIGHTS = (
    "These credentials are known but may not do this. {need}: infra/s3-policies.md has the policies of a reader, a "
    "writer and a pruner"
)
_CLOCK = (
    "The clocks of this machine and of the server differ by more than the quarter of an hour that signatures live: "
    "set this machine's clock (`timedatectl set-ntp true`), then run again"
)
_REGION = "Set AWS_DEFAULT_REGION to the bucket's region and AWS_ENDPOINT_URL to the server it is on"
_CERTIFICATE = "Check http:// or https:// in AWS_ENDPOINT_URL, and name a private authority's file in AWS_CA_BUNDLE"
_BUCKET = "Create it, for example with `aws s3 mb s3://{bucket}`, or correct the store's address"
_ROOM = "Free some space or raise the quota, then run the same command again"
ASK = "Check the store's address, AWS_ENDPOINT_URL and what this server supports"

_Verdict = tuple[type[DeltaworksError], str]

# By S3 error code. Codes come first because servers disagree about the status that goes with one: throttling may be
# 400 or 503, a full quota 403 or 507.
_BY_CODE: dict[str, _Verdict] = {
    **dict.fromkeys(("NoSuchKey", "NotFound", "404"), (Missing, "")),
    "NoSuchBucket": (Missing, _BUCKET),
    **dict.fromkeys(("InvalidAccessKeyId", "SignatureDoesNotMatch"), (InvalidInput, _KEYS)),
    **dict.fromkeys(("ExpiredToken", "InvalidToken"), (InvalidInput, _KEYS)),
    "AccessDenied": (InvalidInput, _RIGHTS),
    "RequestTimeTooSkewed": (InvalidInput, _CLOCK),
    **dict.fromkeys(
        ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"),
        (InvalidInput, _REGION),
    ),
    **dict.fromkeys(
        ("EntityTooLarge", "QuotaExceeded", "InsufficientStorage", "InsufficientCapacity", "XMinioStorageFull"),
        (StoreFull, _ROOM),
    ),
    **dict.fromkeys(("SlowDown", "Throttling", "ThrottlingException", "RequestThrottled"), (Unavailable, WAIT)),
    **dict.fromkeys(("RequestLimitExceeded", "TooManyRequests", "OperationAborted"), (Unavailable, WAIT)),
    # This attempt failed on its way, another one need not.
    **dict.fromkeys(("RequestTimeout", "IncompleteBody", "BadDigest", "NoSuchUpload"), (Unavailable, WAIT)),
    **dict.fromkeys(("XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"), (Unavailable, WAIT)),
    "NotImplemented": (InvalidInput, ASK),
}
_BY_STATUS: dict[int, _Verdict] = {
    301: (InvalidInput, _REGION),
    401: (InvalidInput, _KEYS),
    403: (InvalidInput, _KEYS),  # the answer to a HEAD does not say which
    404: (Missing, ""),
    408: (Unavailable, WAIT),
    429: (Unavailable, WAIT),
    501: (InvalidInput, ASK),
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
    (raised.ConnectionError, (Unavailable, WAIT)),
    (raised.HTTPClientError, (Unavailable, WAIT)),
    (raised.IncompleteReadError, (Unavailable, WAIT)),
    (raised.FlexibleChecksumError, (Unavailable, WAIT)),
    (ResponseParserError, (Unavailable, WAIT)),  # an answer, but not S3's: a proxy's error page, for instance
    (HTTPError, (Unavailable, WAIT)),  # what botocore lets through of the library below it
    (OSError, (Unavailable, WAIT)),
)
# By operation: what a policy must allow. Other operations only change things.
_NEEDS = {
    "GetObject": "Reading needs s3:GetObject",
    "HeadObject": "Reading needs s3:GetObject and s3:ListBucket (without it even a missing object is forbidden)",
    "ListObjectsV2": "Listing needs s3:ListBucket on the bucket",
    "ListMultipartUploads": "Listing uploads needs s3:ListBucketMultipartUploads on the bucket",
    "AbortMultipartUpload": "Removing uploads needs s3:AbortMultipartUpload",
    "DeleteObjects": "Removing needs s3:DeleteObject",
}
_WRITING = "Writing needs s3:PutObject; commands that only read work without"
BROKEN_OFF = (raised.HTTPClientError, raised.IncompleteReadError, raised.FlexibleChecksumError, HTTPError, OSError)
FOREIGN = (BotoCoreError, ClientError, Boto3Error, ResponseParserError, HTTPError, OSError)


def translate(error: Exception, *, what: str, bucket: str, endpoint: str) -> DeltaworksError:
    """The error of ours that stands for `error`, which met `what` (an object's address) at `endpoint`."""
    if isinstance(error, ClientError):
        code, status = answer_of(error)
        kind, remedy = _BY_CODE.get(code) or _BY_STATUS.get(status) or _by_class(status)
        need = _NEEDS.get(error.operation_name, _WRITING)
        message = error.response.get("Error", {}).get("Message") or ""  # some servers send none
        said = f"{code or f'HTTP {status}'} {message}".rstrip(" .")
    else:
        need = ""
        kind, remedy = next((verdict for known, verdict in _BY_TYPE if isinstance(error, known)), (InvalidInput, ASK))
        said = without_login(str(error)).rstrip(" .") or type(error).__name__
    return kind(f"{what} at {without_login(endpoint)}: {said}", remedy=remedy.format(bucket=bucket, need=need))


def _by_class(status: int) -> _Verdict:
    return (Unavailable, WAIT) if status >= 500 else (InvalidInput, ASK)


def answer_of(error: ClientError) -> tuple[str, int]:
    """Code and HTTP status of a refusal. The answer to a HEAD has no body, so its code is only the status again."""
    return error.response.get("Error", {}).get("Code", ""), error.response.get("ResponseMetadata", {}).get(
        "HTTPStatusCode", 0
    )


def without_login(text: str) -> str:
    return re.sub(r"//[^/@\s]*@", "//", text)  # an endpoint may carry a proxy's user and password
