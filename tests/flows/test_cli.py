"""The command as a person meets it: what it prints, what it returns, and how it says what is wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from urllib.request import urlopen

import pyarrow.parquet
import pytest
import yaml
from transformers import AutoModel

from configs.chain import PRESETS
from storage.directory import DirectoryObjects
from storage.lines import Line

COMMAND = [sys.executable, "-c", "from flows.cli import main; main()"]


def deltaworks(home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        env={**os.environ, "DELTAWORKS_HOME": str(home), **environment},
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home in which the smoke chain has run."""
    home = tmp_path_factory.mktemp("grown")
    found = deltaworks(home, "run", "smoke", "--memory", "500MB", "--workers", "2")
    assert found.returncode == 0, found.stderr
    assert "the merged models" in found.stdout
    assert "times smaller than the model in bfloat16" in found.stdout
    assert "best: smoke-" in found.stdout
    assert "export smoke-" in found.stdout
    assert (home / "reports" / "smoke.png").stat().st_size > 10_000
    rows = pyarrow.parquet.read_table(home / "reports" / "smoke.parquet").to_pylist()
    assert len(rows) == 3 + 3 + 2 * (1 + 2 + 3)  # base, alone, and two lines of three steps
    return home


@pytest.fixture
def home(grown: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged at will."""
    shutil.copytree(grown, tmp_path / "home")
    return tmp_path / "home"


def test_help_teaches() -> None:
    start = time.monotonic()
    found = deltaworks(Path(), "--help")
    assert found.returncode == 0
    words = ("run", "line", "mergers", "show", "export", "verify", "ui", "deltaworks run demo", "DELTAWORKS_STORE")
    for word in (*words, "DELTAWORKS_MEMORY", "DELTAWORKS_WORKERS"):
        assert word in found.stdout
    assert time.monotonic() - start < 10, "help must not wait for heavy imports"


def test_quiet_says_only_the_result(grown: Path) -> None:
    found = deltaworks(grown, "run", "smoke", "--quiet")
    assert found.returncode == 0
    assert found.stderr == ""
    lines = found.stdout.strip().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("nothing to do")
    assert lines[1].startswith("best: ")


def test_line_and_show(grown: Path) -> None:
    log = deltaworks(grown, "line", "log", "smoke-opcm").stdout
    assert [task for task in ("rot90", "invert", "permute") if task in log] == ["rot90", "invert", "permute"]
    shown = deltaworks(grown, "line", "show", "smoke-opcm").stdout
    update = next(word for word in shown.split() if word.startswith("update/"))
    about = deltaworks(grown, "show", update[:20]).stdout
    assert update in about
    assert "made by compress" in about
    assert "ternary@2" in about


def test_mergers_are_listed_quickly(tmp_path: Path) -> None:
    start = time.monotonic()
    found = deltaworks(tmp_path / "home", "mergers")
    assert found.returncode == 0
    for word in ("opcm", "ties", "sce", "dare", "match_norm", "arXiv 2501.09522"):
        assert word in found.stdout
    assert time.monotonic() - start < 10, "neither prefect nor transformers is needed for that"
    assert not (tmp_path / "home").exists()
    one = deltaworks(tmp_path / "home", "mergers", "ties").stdout
    assert "trim" in one and "model | tensor" in one
    wrong = deltaworks(tmp_path / "home", "mergers", "tise")
    assert wrong.returncode == 1
    assert "Did you mean ties?" in wrong.stderr


def test_a_dry_rebuild_only_tells(grown: Path) -> None:
    before = deltaworks(grown, "line", "log", "smoke-opcm").stdout
    options = ("--drop", "invert", "--sparsify", "dare", "--set", "sparsify.density=0.5", "--dry-run")
    found = deltaworks(grown, "line", "rebuild", "smoke-opcm", *options)
    assert found.returncode == 0, found.stderr
    assert "sparsify dare density 0.5" in found.stdout
    assert found.stdout.count("to be merged") == 2
    assert found.stdout.count("left out") == 1
    reused = deltaworks(grown, "line", "rebuild", "smoke-opcm", "--drop", "permute", "--dry-run").stdout
    assert reused.count("found: state/") == 2
    nothing = deltaworks(grown, "line", "rebuild", "smoke-opcm", "--order", "rot90,2,permute")
    assert (nothing.returncode, nothing.stdout.startswith("nothing to do")) == (0, True)
    assert deltaworks(grown, "line", "log", "smoke-opcm").stdout == before


def test_roll_back_and_forth(home: Path) -> None:
    back = deltaworks(home, "line", "rollback", "smoke-opcm", "1", "--why", "start [again]")
    assert back.returncode == 0, back.stderr
    assert "rollback" in back.stdout and "start [again]" in back.stdout
    shown = deltaworks(home, "line", "show", "smoke-opcm").stdout
    assert "rot90" in shown and "invert" not in shown
    forth = deltaworks(home, "line", "rollback", "smoke-opcm", "--entry", "3", "--why", "no, do not")
    assert forth.returncode == 0, forth.stderr
    assert "permute" in deltaworks(home, "line", "show", "smoke-opcm").stdout
    again = deltaworks(home, "line", "rollback", "smoke-opcm", "3", "--why", "twice")
    assert again.stdout.startswith("nothing to do")
    empty = deltaworks(home, "line", "rollback", "smoke-opcm", "0", "--why", "everything")
    assert empty.returncode == 0 and "export" not in empty.stdout
    assert "nothing merged yet" in deltaworks(home, "line", "show", "smoke-opcm").stdout


def test_the_same_state_with_another_factor_is_another_place(home: Path) -> None:
    line = Line(DirectoryObjects(home / "store"), "smoke-opcm")
    folds = [entry.fold for entry in line.history()]
    line.rebuild(line.head(), line.head().merger, [*folds[:-1], replace(folds[-1], factor=1.5)])
    assert "factor  1.5 of the merged delta" in deltaworks(home, "line", "show", "smoke-opcm").stdout
    assert "written x1.5" in " ".join(deltaworks(home, "line", "log", "smoke-opcm", COLUMNS="200").stdout.split())
    back = deltaworks(home, "line", "rollback", "smoke-opcm", "--entry", "3", "--why", "too much")
    assert (back.returncode, back.stdout.startswith("nothing to do")) == (0, False)
    assert line.head().factor == 1
    assert "factor" not in deltaworks(home, "line", "show", "smoke-opcm").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rebuild", "smoke-opmc", "--drop", "1"), "there is no line 'smoke-opmc'"),
        (("rebuild", "smoke-opcm", "--drop", "rot"), "1 rot90 (update/"),
        (("rebuild", "smoke-opcm", "--order", "rot90,invert"), "--order lacks permute"),
        (("rebuild", "smoke-opcm", "--merger", "tise"), "did you mean ties"),
        (("rebuild", "smoke-opcm", "--weight", "rot90"), "--weight rot90=2.0"),
        (("rebuild", "smoke-opcm", "--weight", "rot90=2"), "lets every update count the same"),
        (("rebuild", "smoke-opcm", "--memory", "lots"), "'lots' is not an amount of memory"),
        (("rollback", "smoke-opcm", "4", "--why", "x"), "has 3 updates, not 4"),
        (("rollback", "smoke-opcm", "--entry", "9", "--why", "x"), "has the entries 0 to 3, not 9"),
        (("rollback", "smoke-opcm", "--why", "x"), "give either a step"),
    ],
)
def test_wrong_arguments_of_line_are_explained(grown: Path, arguments: tuple[str, ...], message: str) -> None:
    found = deltaworks(grown, "line", *arguments)
    assert found.returncode == 1
    assert message in " ".join(found.stderr.split())
    assert "Traceback" not in found.stderr
    assert len(found.stderr.splitlines()) < 8


def test_export_loads_in_transformers(grown: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    assert deltaworks(grown, "export", "smoke-opcm", str(folder)).returncode == 0
    _, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    again = deltaworks(grown, "export", "smoke-opcm", str(folder))
    assert again.returncode == 1
    assert "not empty" in again.stderr


def test_why_a_task_lost(grown: Path) -> None:
    """Left out, the newest update gives the model of the version before: its score is known from there."""
    found = json.loads(deltaworks(grown, "why", "smoke-opcm@3", "--leave-one-out", "--json").stdout)
    assert (found["version"], found["before"], found["task"]) == ("smoke-opcm@3", "smoke-opcm@2", "permute")
    changes = {one["task"]: one for one in found["changes"]}
    assert set(changes) == {"rot90", "invert", "permute"} and changes["permute"]["before"] is None
    lost = found["changes"][0]
    assert lost["after"] - lost["before"] == min(
        one["after"] - one["before"] for one in (changes["rot90"], changes["invert"])
    )
    assert all(0 <= one["p"] <= 1 for one in (changes["rot90"], changes["invert"]))
    left = {one["task"]: one for one in found["without"]}
    assert set(left) == {"rot90", "invert", "permute"} - {lost["task"]}
    assert left["permute"]["score"] == lost["before"]
    assert all(one["gain"] == pytest.approx(one["score"] - lost["after"]) for one in left.values())
    told = deltaworks(grown, "why", "smoke-opcm@2").stdout
    assert "smoke-opcm@2 is smoke-opcm@1 + invert" in told and "why smoke-opcm@2 --leave-one-out" in told
    wrong = deltaworks(grown, "why", "smoke-opcm@2", "--task", "nope")
    assert wrong.returncode == 1 and "Its tasks: rot90, invert" in " ".join(wrong.stderr.split())


def test_verify_names_the_changed_blob(home: Path) -> None:
    assert deltaworks(home, "verify", "--all").returncode == 0
    objects = DirectoryObjects(home / "store")
    key = sorted(objects.list("blob/"), key=lambda one: -(objects.size(one) or 0))[0]
    path = home / "store" / key
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    found = deltaworks(home, "verify", "--all")
    assert found.returncode == 1
    assert key in found.stderr
    assert "needed by" in found.stderr


def test_truncated_blob_stops_a_run_with_one_message(home: Path) -> None:
    objects = DirectoryObjects(home / "store")
    for key in [*objects.list("memo/"), *objects.list("checkpoint/")]:
        (home / "store" / key).unlink()  # so that the chain has to read its updates again
    for key in objects.list("blob/"):
        path = home / "store" / key
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    found = deltaworks(home, "run", "smoke")
    assert found.returncode == 1
    assert "is damaged" in found.stderr or "is not in" in found.stderr
    assert "Traceback" not in found.stderr
    assert found.stderr.count("error:") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": []}, "tasks is empty"),
        ({"lines": [{"name": "x", "merger": {"name": "opmc"}}]}, "did you mean opcm"),
        ({"codec": {"name": "ternary", "densty": 0.1}}, "did you mean density"),
        ({"base": {"name": "checkpoint", "source": "/no/such/folder"}}, "neither a folder nor a hub id"),
    ],
)
def test_wrong_configs_are_explained(tmp_path: Path, change: dict[str, object], message: str) -> None:
    values = {**yaml.safe_load((PRESETS / "smoke.yaml").read_text()), **change}
    path = tmp_path / "chain.yaml"
    path.write_text(yaml.safe_dump(values))
    found = deltaworks(tmp_path / "home", "run", str(path))
    assert found.returncode == 1
    assert message in found.stderr
    assert "Traceback" not in found.stderr
    assert not list((tmp_path / "home").rglob("checkpoint/*"))


def test_unreachable_endpoint_is_one_message(tmp_path: Path) -> None:
    found = deltaworks(
        tmp_path,
        "run",
        "smoke",
        DELTAWORKS_STORE="s3://bucket/prefix",
        AWS_ENDPOINT_URL="http://127.0.0.1:9",
        AWS_ACCESS_KEY_ID="someone",
        AWS_SECRET_ACCESS_KEY="a-secret-that-stays-secret",
    )
    assert found.returncode == 1
    assert "127.0.0.1:9" in found.stderr
    assert "Traceback" not in found.stderr
    assert "a-secret-that-stays-secret" not in found.stdout + found.stderr


def test_ui_answers_on_loopback(grown: Path) -> None:
    child = subprocess.Popen(
        [*COMMAND, "ui", "--mlflow-port", "5811", "--prefect-port", "4811"],
        env={**os.environ, "DELTAWORKS_HOME": str(grown), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout is not None
        addresses = {}
        for text in child.stdout:
            name, _, address = text.strip().partition(" ")
            addresses[name] = address.strip()
            if name == "Ctrl-C":
                break
        assert addresses["MLflow"].startswith("http://127.0.0.1:")
        with urlopen(addresses["MLflow"].split("#")[0], timeout=10) as answer:
            assert answer.status == 200
        with urlopen(f"{addresses['Prefect']}/api/health", timeout=10) as answer:
            assert answer.read() == b"true"
    finally:
        child.terminate()
        assert child.wait(timeout=30) == 0
