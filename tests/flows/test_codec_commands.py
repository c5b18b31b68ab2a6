"""`deltaworks codecs` and `deltaworks compress` as a person meets them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from flows.cli import app
from storage.artifacts import ArtifactStore
from storage.directory import DirectoryObjects
from storage.manifest import Lineage
from storage.refs import UpdateRef
from tasks.codecs import CODECS
from tasks.tensors import read_delta


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ArtifactStore:
    monkeypatch.setenv("DELTAWORKS_HOME", str(tmp_path))
    monkeypatch.setenv("DELTAWORKS_STORE", f"file://{tmp_path}/store")
    monkeypatch.setenv("COLUMNS", "100")
    return ArtifactStore(DirectoryObjects(tmp_path / "store"))


@pytest.fixture
def update(store: ArtifactStore) -> UpdateRef:
    draft = store.draft("update", Lineage("extract", {"base": f"checkpoint/{'0' * 64}"}))
    delta = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    draft.add("fc1.weight", {"tensor": delta}, role="linear.weight", dtype="F32", shape=delta.shape)
    return UpdateRef(draft.commit())


def deltaworks(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def test_every_codec_is_listed_and_explained() -> None:
    listed = deltaworks("codecs")
    assert listed.exit_code == 0
    assert set(CODECS) <= {line.split()[0] for line in listed.output.splitlines() if line.strip()}
    for name, codec in CODECS.items():
        found = deltaworks("codecs", name)
        assert found.exit_code == 0, found.output
        assert f"{name}, version {codec.version}" in found.output
        assert f"deltaworks compress UPDATE {name}" in found.output


def test_an_update_is_compressed_by_hand(store: ArtifactStore, update: UpdateRef) -> None:
    found = deltaworks("compress", update[:14], "ternary", "density=0.05", "--quiet")
    assert found.exit_code == 0, found.output
    made = UpdateRef(next(ref for ref in store.refs("update") if ref != update))
    assert made in found.output and "ternary@2" in found.output and "%" in found.output
    kept = int(read_delta(store.open(made), "fc1.weight").count_nonzero())
    assert kept == int(64 * 128 * 0.05) + 1
    ratio = store.open(made).manifest.facts["ratio"]
    assert 20 < ratio < 48


@pytest.mark.parametrize("words", [("ternry",), ("ternary", "densty=1")], ids=str)
def test_what_is_wrong_is_said_before_anything_is_written(
    store: ArtifactStore, update: UpdateRef, words: tuple[str, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    found = deltaworks("compress", update, *words)
    assert found.exit_code == 1
    assert "did you mean" in found.output + capfd.readouterr().err
    assert list(store.refs("update")) == [update]
