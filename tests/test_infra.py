"""Infra without a Docker engine: compose.yaml by the specification and our own rules, the Dockerfile, the scripts."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose

INFRA = Path(__file__).parents[1] / "infra"
COMPOSE: dict[str, Any] = yaml.safe_load((INFRA / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILE = (INFRA / "Dockerfile").read_text()


def test_the_file_is_one_of_the_compose_specification() -> None:
    PyCompose.from_json(json.dumps(COMPOSE)).to_spec()
    broken = {**COMPOSE, "services": {"worker": {**SERVICES["worker"], "volums": []}}}
    with pytest.raises(ValueError, match="volums"):
        PyCompose.from_json(json.dumps(broken))


def test_it_has_every_part_of_the_service() -> None:
    assert {"postgres", "prefect", "mlflow", "s3", "worker", "worker-gpu", "webhook"} <= set(SERVICES)
    (device,) = SERVICES["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert SERVICES["worker-gpu"]["profiles"] == ["gpu"] and device["capabilities"] == ["gpu"]


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_keeps_the_rules(name: str) -> None:
    """Pinned image, health check, loopback, no secret in a variable, nothing that is not declared."""
    one = SERVICES[name]
    image, _, tag = one["image"].rpartition(":")
    assert image and tag not in ("latest", "")
    ends = one["restart"] == "on-failure"
    assert ends == ("test" not in one["healthcheck"]), "what goes on running says whether it is well"
    for port in one.get("ports", []):
        assert port.startswith("127.0.0.1:"), port
    for variable, value in one.get("environment", {}).items():
        secret = re.search("PASSWORD|SECRET|KEY|TOKEN", variable)
        assert not secret or str(value).startswith("/run/secrets/"), variable
        assert not re.search(r"//[^/@]+:(?!@\w+@)[^/@]+@", str(value)), variable
        if str(value).startswith("/run/secrets/"):
            assert value.removeprefix("/run/secrets/") in one["secrets"]
    assert set(one.get("secrets", [])) <= set(COMPOSE["secrets"])
    for volume in one.get("volumes", []):
        source = volume.split(":")[0]
        assert source in COMPOSE["volumes"] or (INFRA / source).is_file(), volume
    for other, how in one.get("depends_on", {}).items():
        wanted = "service_completed_successfully" if SERVICES[other]["restart"] == "on-failure" else "service_healthy"
        assert how == {"condition": wanted}
    if "build" in one:
        assert f" AS {one['build']['target']}\n" in DOCKERFILE
        assert one["read_only"] and one["cap_drop"] == ["ALL"]


def test_every_file_that_the_image_copies_is_there_and_reaches_the_builder() -> None:
    root = INFRA.parent
    kept = [line[1:] for line in (root / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    sources = []
    for line in re.findall(r"^COPY (?!--from)(?:--\S+ )*(.+)$", DOCKERFILE, re.MULTILINE):
        sources += line.split()[:-1]
    assert len(sources) > 4
    for source in sources:
        assert (root / source).exists(), source
        assert any(fnmatch(source, pattern) for pattern in kept), f"{source} is left out by .dockerignore"
    rooms = re.search(r"include = \[(.*)\]", (root / "pyproject.toml").read_text())
    assert rooms and {one.strip(' "*') for one in rooms[1].split(",")} <= set(sources)


def test_the_image_is_pinned_and_has_no_root() -> None:
    stages = re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, re.MULTILINE)
    names = [name for _, name in stages]
    assert {"cpu", "cuda"} <= set(names) and names[-1] == "cpu"
    for base, _ in stages:
        assert base in names or re.fullmatch(r"\S+:\d+\.\d+\.\d+\S*", base), base
    runtime = DOCKERFILE.split(" AS runtime\n")[1]
    assert "USER deltaworks" in runtime and "USER root" not in runtime


def test_secrets_come_from_files(tmp_path: Path) -> None:
    """into variables of their own, and into addresses."""
    (tmp_path / "password").write_text("p$w 'x'\n")
    environment = {
        "PATH": os.environ["PATH"],
        "SECRETS": f"{tmp_path}/",
        "DB_PASSWORD_FILE": f"{tmp_path}/password",
        "DB": "postgresql://deltaworks:@DB_PASSWORD@@postgres/prefect",
        "OTHER_FILE": "/etc/passwd",
    }
    command = [INFRA / "with-secrets", "printenv", "DB_PASSWORD", "DB", "OTHER_FILE"]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60).stdout
    assert found.splitlines() == ["p$w 'x'", "postgresql://deltaworks:p$w 'x'@postgres/prefect", "/etc/passwd"]
    gone = {**environment, "DB_PASSWORD_FILE": f"{tmp_path}/none"}
    assert subprocess.run(command, env=gone, capture_output=True, timeout=60).returncode


def test_secrets_are_made_once_for_their_owner(tmp_path: Path) -> None:
    shutil.copy(INFRA / "make-secrets", tmp_path)
    folder = tmp_path / "secrets"
    for _ in range(2):
        subprocess.run([tmp_path / "make-secrets"], check=True, capture_output=True, timeout=60)
        found = {path.name: path.read_text() for path in folder.iterdir()}
        assert set(found) == {Path(one["file"]).name for one in COMPOSE["secrets"].values()}
        (identity,) = json.loads(found["s3_identities.json"])["identities"]
        assert identity["credentials"] == [{"accessKey": found["s3_access_key"], "secretKey": found["s3_secret_key"]}]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert len(set(found.values())) == len(found) and all(len(one) >= 20 for one in found.values())
    (folder / "webhook_secret").unlink()
    subprocess.run([tmp_path / "make-secrets"], check=True, capture_output=True, timeout=60)
    assert (folder / "webhook_secret").read_text() != found["webhook_secret"]
    assert (folder / "s3_secret_key").read_text() == found["s3_secret_key"]
