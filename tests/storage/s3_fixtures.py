"""Fixtures for tests that need a real S3 server. Loaded as a pytest plugin, so that every test folder has them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING
from uuid import uuid4

import boto3
import pytest

from tests.storage.s3_server import ServerNotStarted, running_s3_server

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

BUCKET = "deltaworks-test"

# What a developer may have set for other work, and what would win over the test server's variables or add to them.
_IN_THE_WAY = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_MAX_ATTEMPTS")


def client(environment: dict[str, str]) -> S3Client:
    """boto3 itself, for what a store does not do: making buckets and cleaning up."""
    return boto3.session.Session(
        environment.get("AWS_ACCESS_KEY_ID"),
        environment.get("AWS_SECRET_ACCESS_KEY"),
        environment.get("AWS_SESSION_TOKEN"),
        region_name=environment["AWS_DEFAULT_REGION"],
    ).client("s3", endpoint_url=environment["AWS_ENDPOINT_URL"])


@pytest.fixture(scope="session")
def s3_environment() -> Iterator[dict[str, str]]:
    """The variables that lead boto3 to the test server, on which the bucket `deltaworks-test` exists."""
    with ExitStack() as stack:
        try:
            environment = stack.enter_context(running_s3_server())
        except ServerNotStarted as error:
            if os.environ.get("CI"):  # where a skip would pass for a success
                pytest.fail(f"no S3 server: {error}", pytrace=False)
            pytest.skip(f"no S3 server: {error}")
        s3 = client(environment)
        if BUCKET not in [bucket["Name"] for bucket in s3.list_buckets()["Buckets"]]:
            s3.create_bucket(Bucket=BUCKET)
        yield environment


@pytest.fixture
def s3_url(s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of an empty store of this test's own; the environment leads to its server."""
    for name in _IN_THE_WAY:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    for name, value in s3_environment.items():
        monkeypatch.setenv(name, value)
    prefix = str(uuid4())
    yield f"s3://{BUCKET}/{prefix}"
    s3 = client(s3_environment)
    for page in s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{prefix}/"):
        if found := page.get("Contents"):
            s3.delete_objects(Bucket=BUCKET, Delete={"Objects": [{"Key": item["Key"]} for item in found]})
