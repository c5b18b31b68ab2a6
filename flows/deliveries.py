"""Deliveries: whether a message that came over HTTP is from somebody who knows the secret, is of now, and came once.

The scheme is that of Standard Webhooks (standardwebhooks.com), which MLflow's registry uses under header names of its
own: HMAC-SHA256 over `id.timestamp.body`, base64, after `v1,`. A header may hold several signatures, and there may be
several secrets, so that a secret can be changed without a gap.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from storage.errors import InvalidInput

TOLERANCE = 300  # seconds that a delivery may be old, or ahead of this machine's clock
_MOST = 100_000  # deliveries that are remembered, all of them signed
_SHORTEST = 16  # characters of a secret
_HEADERS = (
    ("webhook-id", "webhook-timestamp", "webhook-signature"),
    ("x-mlflow-delivery-id", "x-mlflow-timestamp", "x-mlflow-signature"),
)


class Refused(Exception):
    """A delivery that is not taken. `status`: of the answer."""

    def __init__(self, status: int, why: str) -> None:
        self.status, self.why = status, why
        super().__init__(why)


class Deliveries:
    """Checks deliveries, each of which it takes once.

    What it has taken it remembers in memory, for as long as a copy would be young enough. So what was signed before it
    began is refused: a process before it may have taken that. Senders sign again, or the next look finds what came.
    """

    def __init__(self, secrets: Sequence[str], clock: Callable[[], float] = time.time) -> None:
        self._keys = [_key(secret) for secret in secrets]
        self._clock = clock
        self._began = int(clock())
        self._seen: dict[str, float] = {}
        self._lock = threading.Lock()

    def take(self, headers: Mapping[str, str], body: bytes) -> str:
        """The id of a delivery, by its headers in lower case. Refused if it is forged, old, or came before."""
        names = next((names for names in _HEADERS if names[2] in headers), None)
        if names is None or not all(name in headers for name in names):
            raise Refused(401, "it is not signed")
        found, moment, signatures = (headers[name] for name in names)
        if not re.fullmatch(r"[0-9]{1,12}", moment) or not 0 < len(found) <= 256:
            raise Refused(401, "its id or timestamp is none")
        if not self._signed(f"{found}.{moment}.".encode() + body, signatures):
            raise Refused(401, "its signature is wrong")
        now = self._clock()
        if abs(now - int(moment)) > TOLERANCE:
            raise Refused(401, "it was signed too long ago, or the clocks differ")
        if int(moment) < self._began:
            raise Refused(409, "it was signed before this process began, and may have been taken then")
        with self._lock:
            self._seen = {one: until for one, until in self._seen.items() if until >= now}
            if found in self._seen:
                raise Refused(409, "it came before")
            if len(self._seen) >= _MOST:
                raise Refused(503, "too many came in five minutes")
            self._seen[found] = int(moment) + TOLERANCE
        return found

    def _signed(self, content: bytes, signatures: str) -> bool:
        """Whether one of the signatures is by one of the secrets; all are compared, in the same time each."""
        fits = False
        for given in _of_version_one(signatures):
            for key in self._keys:
                own = hmac.new(key, content, hashlib.sha256).digest()
                fits |= hmac.compare_digest(own, given)
        return fits


def signature(secret: str, found: str, moment: int, body: bytes) -> str:
    """What a sender writes into the header."""
    content = f"{found}.{moment}.".encode() + body
    return f"v1,{base64.b64encode(hmac.new(_key(secret), content, hashlib.sha256).digest()).decode()}"


def _key(secret: str) -> bytes:
    """The standard's own secrets are base64 after `whsec_`; MLflow's, and others, are texts."""
    if not secret.startswith("whsec_"):
        return secret.encode()
    try:
        return base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    except ValueError as error:
        raise InvalidInput("a secret that begins with whsec_ must go on in base64") from error


def read_secrets(text: str, where: str) -> list[str]:
    """One secret a line. During a change there are two: the new one, and the one that senders still use."""
    found = [line.strip() for line in text.splitlines() if line.strip()]
    if not found or any(len(one) < _SHORTEST for one in found):
        raise InvalidInput(
            f"{where} must hold secrets of at least {_SHORTEST} characters, one a line",
            remedy="Make one with `openssl rand -hex 32`",
        )
    return found


def secrets_of(file: str | None, value: str | None) -> list[str]:
    """The secrets in a file, or else in the variable."""
    if file is None and value is None:
        raise InvalidInput(
            "there is no secret to check signatures with",
            remedy="Write one into a file (`openssl rand -hex 32 > webhook.secret`) and give it with --secret-file",
        )
    if file is None:
        return read_secrets(value or "", "DELTAWORKS_WEBHOOK_SECRET")
    try:
        return read_secrets(Path(file).read_text(), file)
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"the secret's file {file} cannot be read: {error}") from error


def _of_version_one(signatures: str) -> Iterator[bytes]:
    for one in signatures.split(" ")[:8]:
        version, _, text = one.partition(",")
        try:
            given = base64.b64decode(text, validate=True)
        except ValueError:
            continue
        if version == "v1":
            yield given
