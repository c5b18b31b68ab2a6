"""Surroundings: what is told of code, packages and hardware, and that it is what is there."""

from __future__ import annotations

import hashlib
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

import tasks.surroundings
from tasks.surroundings import packages, surroundings


@pytest.fixture(autouse=True)
def afresh() -> None:
    surroundings.cache_clear()


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    command = ["git", "-C", str(folder), *identity, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_the_code_is_that_of_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks.surroundings, "_ROOT", tmp_path)
    assert surroundings()["code"] == version("deltaworks")
    git(tmp_path, "init")
    (tmp_path / "file").write_text("one")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-m", "one")
    surroundings.cache_clear()
    assert (
        surroundings()["code"] == f"{version('deltaworks')}, commit {git(tmp_path, 'rev-parse', '--short=12', 'HEAD')}"
    )
    (tmp_path / "file").write_text("two")
    surroundings.cache_clear()
    assert surroundings()["code"].endswith(" with changes")


def test_packages_are_those_that_are_installed() -> None:
    lines = packages().splitlines()
    assert f"torch=={version('torch')}" in lines
    assert lines == sorted(lines, key=lambda one: one.partition("==")[0].lower())
    found = surroundings()
    assert found["packages.sha256"] == hashlib.sha256(packages().encode()).hexdigest()
    assert "cores" in found["hardware"] and "GiB" in found["hardware"]
