"""How an S3 server is spoken to: boto3's client, and the settings that its own variables do not cover.

Endpoint, region and credentials are found by boto3 itself: AWS_ENDPOINT_URL (or AWS_ENDPOINT_URL_S3),
AWS_DEFAULT_REGION, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, or a profile; AWS_CA_BUNDLE names the certificates of a
private authority, AWS_MAX_ATTEMPTS and AWS_RETRY_MODE how stubborn to be. boto3 puts the bucket into the path, not
into the host name, as soon as an endpoint is given, which is what most servers other than Amazon's need.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import boto3
import botocore.session
from botocore.config import Config
from botocore.loaders import Loader, create_loader

from storage.errors import InvalidInput

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

_ENCRYPTIONS = ("AES256", "aws:kms", "aws:kms:dsse")
_ADDRESSINGS = ("auto", "path", "virtual")


@dataclass(frozen=True)
class S3Settings:
    """
    parallel:   pieces of large objects on their way at once, 16 MiB each DELTAWORKS_S3_PARALLEL     8
    timeout:    seconds without a byte until an attempt is given up       DELTAWORKS_S3_TIMEOUT      60
    addressing: auto, path, or virtual: the bucket in the host name       DELTAWORKS_S3_ADDRESSING   auto
    encryption: AES256, aws:kms or aws:kms:dsse, asked for at each write  DELTAWORKS_S3_SSE          the bucket's own
    kms_key:    the key to encrypt with, for aws:kms                      DELTAWORKS_S3_SSE_KMS_KEY  the account's own
    """

    parallel: int = 8
    timeout: int = 60
    addressing: str = "auto"
    encryption: str | None = None
    kms_key: str | None = None

    def __post_init__(self) -> None:
        _one_of("DELTAWORKS_S3_ADDRESSING", self.addressing, _ADDRESSINGS)
        if self.encryption is not None:
            _one_of("DELTAWORKS_S3_SSE", self.encryption, _ENCRYPTIONS)
        if self.kms_key and not (self.encryption or "").startswith("aws:kms"):
            raise InvalidInput(
                "DELTAWORKS_S3_SSE_KMS_KEY names a key, but nothing is encrypted with it",
                remedy="Set DELTAWORKS_S3_SSE=aws:kms too, or unset the key",
            )

    @classmethod
    def from_environment(cls) -> S3Settings:
        return cls(
            parallel=_count("DELTAWORKS_S3_PARALLEL", cls.parallel),
            timeout=_count("DELTAWORKS_S3_TIMEOUT", cls.timeout),
            addressing=os.environ.get("DELTAWORKS_S3_ADDRESSING") or cls.addressing,
            encryption=os.environ.get("DELTAWORKS_S3_SSE") or None,
            kms_key=os.environ.get("DELTAWORKS_S3_SSE_KMS_KEY") or None,
        )

    @property
    def writing(self) -> dict[str, Any]:
        """What every request that makes an object says beside its key."""
        found = {"ServerSideEncryption": self.encryption, "SSEKMSKeyId": self.kms_key}
        return {name: value for name, value in found.items() if value}


def connect(settings: S3Settings) -> S3Client:
    """A client for the server that the environment names. ValueError if its address is none."""
    core = botocore.session.Session()
    core.register_component("data_loader", _descriptions(core.get_config_variable("data_path")))
    session = boto3.session.Session(botocore_session=core)
    attempts = core.get_config_variable("max_attempts") or 4  # AWS_MAX_ATTEMPTS, if it is set
    mode = core.get_config_variable("retry_mode")
    config = Config(
        connect_timeout=min(10, settings.timeout),
        read_timeout=settings.timeout,
        retries={"mode": "standard" if mode in (None, "legacy") else mode, "total_max_attempts": attempts},
        max_pool_connections=settings.parallel + 32,  # those of the pieces, and of the threads that use the store
        s3={"addressing_style": settings.addressing},  # type: ignore[arg-type]
        request_checksum_calculation=_checksums(core),
    )
    return session.client("s3", region_name=session.region_name or "us-east-1", config=config)


@cache
def _descriptions(path: str | None) -> Loader:
    """What boto3 reads about services from files: once per process, because it takes longer than all else here."""
    return create_loader(path)


def _checksums(core: botocore.session.Session) -> Any:
    """Without more, every upload is signed with its sha256, which every server checks.

    The trailing checksums that boto3 would send instead over https are refused by older servers, and ignored by
    others. Whoever wants them (Amazon then keeps them beside the object) says so as for any program that uses boto3.
    """
    asked = os.environ.get("AWS_REQUEST_CHECKSUM_CALCULATION")
    return asked or core.get_scoped_config().get("request_checksum_calculation") or "when_required"


def _count(name: str, default: int) -> int:
    found = os.environ.get(name) or str(default)
    if not found.isdecimal() or int(found) == 0:
        raise InvalidInput(f"{name} must be a positive whole number, found {found!r}")
    return int(found)


def _one_of(name: str, found: str, known: tuple[str, ...]) -> None:
    if found not in known:
        raise InvalidInput(f"{name} must be {', '.join(known[:-1])} or {known[-1]}, found {found!r}")
