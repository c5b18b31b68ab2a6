"""An S3 server for the tests: the one that is given, or a Ceph gateway started for this run."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_SCRIPT = Path(__file__).parents[2] / "infra" / "s3-server"
_LIMIT = 15 * 60  # seconds; starting takes twelve, but on a fresh machine the packages are installed first

_CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION")

# the second user of infra/s3-server
GUEST = ("guest", "guest-test")


class ServerNotStarted(Exception):
    """There is no S3 server here, and why."""


@contextmanager
def running_s3_server() -> Iterator[dict[str, str]]:
    """The environment in which boto3 finds an S3 server, which is there until the block ends.

    DELTAWORKS_TEST_S3_ENDPOINT names a server that runs already; its credentials are in the usual AWS variables.
    """
    if given := os.environ.get("DELTAWORKS_TEST_S3_ENDPOINT"):
        known = {name: os.environ[name] for name in _CREDENTIALS if name in os.environ}
        yield {"AWS_DEFAULT_REGION": "us-east-1", **known, "AWS_ENDPOINT_URL": given}
        return
    with tempfile.TemporaryDirectory(prefix="deltaworks-s3-") as parent:
        folder, port = f"{parent}/server", free_port()
        try:
            _run("start", folder, str(port))
        except ServerNotStarted:
            with suppress(ServerNotStarted):  # why it did not start is the news, not that there is little to stop
                _run("stop", folder)
            raise
        try:
            yield {
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
                "AWS_ACCESS_KEY_ID": "deltaworks",  # fixed in infra/s3-server
                "AWS_SECRET_ACCESS_KEY": "known-to-all",
                "AWS_DEFAULT_REGION": "us-east-1",
            }
        finally:
            _run("stop", folder)


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _run(*arguments: str) -> None:
    with tempfile.TemporaryFile("w+") as said:  # not a pipe: the daemons would keep it open, and reading would not end
        try:
            code = subprocess.run(
                [_SCRIPT, *arguments], stdout=said, stderr=said, timeout=_LIMIT, check=False
            ).returncode
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ServerNotStarted(f"infra/s3-server {arguments[0]}: {error}") from error
        if code:
            said.seek(0)
            raise ServerNotStarted(f"infra/s3-server {arguments[0]} ended with {code}:\n{said.read()[-4000:]}")
