"""`deltaworks series` as a person meets it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from flows.cli import app
from tests.builders import tiny_model


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DELTAWORKS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DELTAWORKS_STORE", f"file://{tmp_path}/store")
    monkeypatch.setenv("DELTAWORKS_DEVICE", "cpu")
    return tmp_path


def command(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_publish_log_and_export(place: Path) -> None:
    model = tiny_model("LlamaForCausalLM").to(torch.bfloat16)
    for number in range(3):
        model.save_pretrained(place / f"step-{number}")
        with torch.no_grad():
            model.model.norm.weight.add_(0.25)
    for number in range(3):
        done = command("series", "publish", "policy", str(place / f"step-{number}"))
        assert done.exit_code == 0, done.output
    assert "2 after a whole one" in done.output
    ref = done.output.partition("whole: ")[2].strip()
    again = command("series", "publish", "policy", str(place / "step-2"))
    assert "nothing to do: version 2" in again.output
    log = command("series", "log", "policy")
    assert [line.split()[0] for line in log.output.splitlines() if "checkpoint/" in line] == ["0", "1", "2"]
    assert command("export", ref, str(place / "out")).exit_code == 0
    found = AutoModelForCausalLM.from_pretrained(place / "out").model.norm.weight
    wanted = AutoModelForCausalLM.from_pretrained(place / "step-2").model.norm.weight
    assert torch.equal(found, wanted)


def test_errors_say_what_there_is(place: Path) -> None:
    tiny_model("LlamaForCausalLM").save_pretrained(place / "one")
    assert command("series", "publish", "policy", str(place / "one")).exit_code == 0
    missing = command("series", "log", "other")
    assert missing.exit_code == 1
    assert "There are: policy" in " ".join(missing.stderr.split())
    bad = command("series", "publish", "../policy", str(place / "one"))
    assert bad.exit_code == 1
    assert "is not a series name" in bad.stderr
