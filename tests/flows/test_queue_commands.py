"""The commands of a queue as a person meets them: open a line, submit, look, put back, give up."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from flows.cli import app
from flows.workplace import here
from storage.queue import Queue
from storage.refs import CheckpointRef
from tests.flows.arrivals import LINE, MODEL, of_another_base, open_line, pickled, submit, tuned

pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture
def base(tmp_path: Path, home: Path) -> CheckpointRef:
    return open_line(tmp_path)


def deltaworks(*arguments: str, code: int = 0) -> str:
    found: Result = CliRunner().invoke(app, list(arguments))
    assert found.exit_code == code, found.output + found.stderr
    return " ".join((found.output if code == 0 else found.stderr).split())


def queue() -> Queue:
    return Queue(here().store.objects, LINE)


def test_a_folder_is_queued_once_and_may_go_away(base: CheckpointRef, tmp_path: Path) -> None:
    folder = tuned(tmp_path / "tuned on: billing", 1)
    said = deltaworks("submit", str(folder), "--line", LINE, "--base", base[:20])
    assert "queued tuned-on-billing for line support, after 0 others" in said
    assert "merge-pending --line support" in said
    (one,) = queue().submissions()
    assert one.reference.startswith("checkpoint/") and here().store.has(one.reference)
    again = shutil.copytree(folder, tmp_path / "copy")
    assert "nothing to do: line support has this content already, as 'tuned-on-billing', pending" in deltaworks(
        "submit", str(again), "--line", LINE
    )
    queue().quarantine(one.content, "Mismatch", "it does not fit")
    said = deltaworks("submit", str(again), "--line", LINE)
    assert "quarantined Mismatch: it does not fit next:" in said and f"line requeue {LINE}" in said
    assert len(queue().submissions()) == 1


def test_what_lies_in_a_bucket_stays_there(base: CheckpointRef, tmp_path: Path, s3_url: str) -> None:
    from storage.address import open_objects

    bucket = open_objects(f"{s3_url}/inbox/run-7")
    for path in tuned(tmp_path / "run-7", 1).iterdir():
        if path.name != "config.json":
            bucket.put(path.name, path.read_bytes())
    address = f"{s3_url}/inbox/run-7/"
    assert "is not complete: it lacks config.json" in deltaworks("submit", address, "--line", LINE, code=1)
    bucket.put("config.json", (tmp_path / "run-7" / "config.json").read_bytes())
    assert "queued run-7" in deltaworks("submit", address, "--line", LINE)
    assert [one.reference for one in queue().submissions()] == [f"{s3_url}/inbox/run-7"]
    assert "nothing to do" in deltaworks("submit", str(tmp_path / "run-7"), "--line", LINE), "the same bytes elsewhere"


def test_mistakes_are_answered_and_queue_nothing(base: CheckpointRef, tmp_path: Path) -> None:
    good = str(tuned(tmp_path / "good", 1))
    other = of_another_base(tmp_path / "bert", 1)
    stored = deltaworks("line", "open", "another", str(other), "--merger", "average")
    assert "line another: checkpoint/" in stored
    ref = next(str(one) for one in here().store.refs("checkpoint") if one != base)
    for arguments, said in (
        ((good, "--line", "none"), "there is no line 'none'"),
        ((str(pickled(tmp_path / "p", 2)), "--line", LINE), "only as pickles"),
        ((str(tmp_path / "nowhere"), "--line", LINE), "neither a folder nor a hub id"),
        ((str(tmp_path), "--line", LINE), "holds no weights"),
        ((good, "--line", LINE, "--base", ref), "the base of line 'support'"),
        ((good, "--line", LINE, "--weight", "0"), "a positive weight"),
    ):
        assert said in deltaworks("submit", *arguments, code=1)
    assert queue().submissions() == []


def test_status_tells_people_and_programs(base: CheckpointRef, tmp_path: Path) -> None:
    assert "line support: nothing was ever submitted" in deltaworks("line", "status", LINE)
    contents = {name: submit(tuned(tmp_path / name, seed), base) for seed, name in enumerate(("a", "b", "c", "d"), 1)}
    queue().start(contents["a"], "run 1")
    queue().merge(contents["a"], 1)
    queue().quarantine(contents["b"], "Mismatch", "it does not fit")
    queue().start(contents["c"], "run 2")
    said = deltaworks("line", "status", LINE)
    for words in ("1 pending, 1 running, 1 merged, 1 quarantined", "entry 1", "run 2", "Mismatch: it does not fit"):
        assert words in said
    found = json.loads(CliRunner().invoke(app, ["line", "status", LINE, "--json"]).output)
    assert {key: found[key] for key in ("pending", "running", "merged", "quarantined", "queue_length", "failures")} == {
        "pending": 1, "running": 1, "merged": 1, "quarantined": 1, "queue_length": 2, "failures": {"Mismatch": 1},
    }  # fmt: skip
    assert 0 <= found["oldest_pending_seconds"] < 60
    assert [one["task"] for one in found["submissions"]] == ["b", "c", "d"]
    assert found["head"]["entry"] == 0
    assert "there is no line 'none'" in deltaworks("line", "status", "none", code=1)


def test_put_back_and_give_up(base: CheckpointRef, tmp_path: Path) -> None:
    first, second = (submit(tuned(tmp_path / name, seed), base) for seed, name in enumerate(("a", "b"), 1))
    assert "is pending: requeue does not apply" in deltaworks("line", "requeue", LINE, "a", code=1)
    queue().quarantine(first, "Mismatch", "")
    assert "a waits again, as the last of 2" in deltaworks("line", "requeue", LINE, first[:8], "--why", "fixed")
    assert [one.task for one in queue().submissions()] == ["b", "a"]
    assert "b is discarded; 1 left" in deltaworks("line", "discard", LINE, "b")
    assert "'x' is none of the submissions" in deltaworks("line", "discard", LINE, "x", code=1)
    found = queue().find(second)
    assert found is not None and found.state == "discarded"


def test_the_policy_of_a_line(base: CheckpointRef) -> None:
    assert "codec ternary density 0.5" in deltaworks("line", "policy", LINE)
    assert "codec rtn" in deltaworks("line", "policy", LINE, "--codec", "rtn bits=2", "--heads", "keep")
    assert dict(queue().policy())["extract"]["heads"] == "keep"
    assert "looks at examples" in deltaworks("line", "policy", LINE, "--codec", "skillpack", code=1)
    assert "there is no line 'none'" in deltaworks("line", "policy", "none", code=1)


def test_a_line_is_opened_once_with_its_policy(tmp_path: Path) -> None:
    MODEL.save_pretrained(tmp_path / "base")
    for _ in range(2):
        said = deltaworks("line", "open", "new", str(tmp_path / "base"), "--merger", "tsv_m", "--codec", "dense")
        assert "merged by tsv_m, written by dense" in said
    assert "did you mean tsv_m" in deltaworks("line", "open", "x", str(tmp_path / "base"), "--merger", "tsvm", code=1)
    assert "line rebuild new" in deltaworks("line", "open", "new", str(tmp_path / "base"), "--merger", "ties", code=1)
