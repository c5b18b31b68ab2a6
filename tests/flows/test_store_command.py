"""`deltaworks store doctor` as a person meets it."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from flows.cli import app
from storage.s3 import S3Objects
from storage.s3_doctor import abandoned
from tests.storage import s3_faults as faults
from tests.storage.s3_fixtures import BUCKET


def doctor(*options: str) -> Result:
    return CliRunner().invoke(app, ["store", "doctor", *options])


@pytest.mark.usefixtures("home")
class TestDoctor:
    def test_a_folder(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("DELTAWORKS_STORE", str(tmp_path / "store"))
        done = doctor()
        assert done.exit_code == 0, done.output
        assert "one winner among 8 writers, 6 times" in done.output
        assert "can be trusted" in done.output
        assert list((tmp_path / "store").rglob("*")) == []  # as it was
        refused = doctor("--remove-uploads")
        assert refused.exit_code == 1
        assert "for s3:// stores" in refused.output

    def test_a_server(self, monkeypatch: pytest.MonkeyPatch, s3_url: str) -> None:
        monkeypatch.setenv("DELTAWORKS_STORE", s3_url)
        store = S3Objects(BUCKET, s3_url.rpartition("/")[2])
        store.put("blob/mine", b"data")
        done = doctor()
        assert done.exit_code == 0, done.output
        for what in (
            "one winner among 8",
            "read in pieces",
            "24 MiB in 2 parts",
            "altered bytes are refused",
            "s apart",
        ):
            assert what in done.output
        assert list(store.list("")) == ["blob/mine"]
        assert abandoned(store, older=timedelta(0)) == []
        assert "0 abandoned uploads removed" in doctor("--remove-uploads").output

    def test_a_server_that_cannot_be_trusted(self, monkeypatch: pytest.MonkeyPatch, s3_url: str) -> None:
        broken = {
            "of 8 writers": (faults.look_then_write, faults.conditional),
            "ignored: large objects are read in one piece": (
                faults.ignore_ranges,
                lambda request: "Range" in request.headers,
            ),
        }
        endpoint = os.environ["AWS_ENDPOINT_URL"]
        for number, (said, (fault, matches)) in enumerate(broken.items()):
            monkeypatch.setenv("DELTAWORKS_STORE", f"{s3_url}/{number}")  # a process opens each address once
            with faults.relay(endpoint, fault, matches=matches, always=True) as (address, _):
                monkeypatch.setenv("AWS_ENDPOINT_URL", address)
                done = doctor()
            assert said in done.output
            assert done.exit_code == (1 if fault is faults.look_then_write else 0)
            assert ("merges into lines are refused" in done.output) == (fault is faults.look_then_write)

    def test_nobody_answers(self, monkeypatch: pytest.MonkeyPatch, s3_url: str) -> None:
        monkeypatch.setenv("DELTAWORKS_STORE", s3_url)
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        done = doctor()
        assert done.exit_code == 1
        assert "Check that the server runs" in done.output
