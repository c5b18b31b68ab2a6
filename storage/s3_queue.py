"""Notices of new objects, from a queue that speaks SQS: S3 buckets can be told to write to one.

A notice is only a knock: what came is found by looking into the bucket, so that a lost, doubled or forged one does no
harm. Notices are removed when the look that they caused has ended well; until then the queue gives them again.
"""

from __future__ import annotations

import time
from typing import Any
from urllib.parse import urlparse

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from storage.errors import InvalidInput, Unavailable

_LONGEST = 20  # seconds that SQS lets one request wait
_AT_ONCE = 10  # messages that SQS gives or removes at once
_LOST = ("AWS.SimpleQueueService.NonExistentQueue", "QueueDoesNotExist", "InvalidAddress", "InvalidClientTokenId",
         "SignatureDoesNotMatch", "AccessDenied", "InvalidSecurity")  # fmt: skip  # waiting does not help


class S3Queue:
    """The queue at `url`, as its server shows it: https://sqs.eu-west-1.amazonaws.com/123456789012/inbox."""

    def __init__(self, url: str) -> None:
        parsed = urlparse(url)
        if parsed.scheme not in ("http", "https") or not parsed.path.strip("/"):
            raise InvalidInput(f"{url!r} is no address of a queue", remedy="Write it like https://host/account/name")
        self.url = url
        self._endpoint = f"{parsed.scheme}://{parsed.netloc}"
        self._client: Any = None
        self._held: list[str] = []

    def wait(self, seconds: float) -> None:
        """Wait for a notice, so many seconds at most. Unavailable if the queue does not answer."""
        end = time.monotonic() + seconds
        while not self._receive(min(_LONGEST, max(0, round(end - time.monotonic())))):
            if (left := end - time.monotonic()) <= 1:  # SQS waits for whole seconds
                time.sleep(max(0.0, left))
                return

    def answered(self) -> None:
        """The look has ended well: remove what was received before it."""
        while self._held:
            some, self._held = self._held[:_AT_ONCE], self._held[_AT_ONCE:]
            entries = [{"Id": str(number), "ReceiptHandle": handle} for number, handle in enumerate(some)]
            self._ask("delete_message_batch", Entries=entries)

    def _receive(self, seconds: int) -> bool:
        """Whether there were notices. All that are there are taken: one look answers them."""
        found = self._ask("receive_message", MaxNumberOfMessages=_AT_ONCE, WaitTimeSeconds=seconds).get("Messages", [])
        some = found
        while some:
            self._held += [one["ReceiptHandle"] for one in some]
            some = []
            if len(self._held) % _AT_ONCE == 0:
                some = self._ask("receive_message", MaxNumberOfMessages=_AT_ONCE).get("Messages", [])
        return bool(found)

    def _ask(self, verb: str, **values: Any) -> dict[str, Any]:
        try:
            if self._client is None:
                session = boto3.session.Session()
                config = Config(connect_timeout=10, read_timeout=_LONGEST + 10, retries={"total_max_attempts": 2})
                self._client = session.client(
                    "sqs", region_name=session.region_name or "us-east-1", endpoint_url=self._endpoint, config=config
                )
            found: dict[str, Any] = getattr(self._client, verb)(QueueUrl=self.url, **values)
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            kind = InvalidInput if code in _LOST else Unavailable
            raise kind(
                f"the queue {self.url} refused: {code}", remedy="Check its address and AWS_ variables"
            ) from error
        except (BotoCoreError, OSError) as error:
            raise Unavailable(
                f"the queue {self.url} does not answer: {type(error).__name__}",
                remedy="Check that its server runs, and the AWS_ variables",
            ) from error
        return found
