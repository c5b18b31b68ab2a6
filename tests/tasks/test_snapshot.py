"""Series of checkpoints: every bit of every version, what a version costs, and who may publish."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from storage.artifacts import ArtifactStore
from storage.errors import Conflict, InvalidInput, Mismatch
from storage.objects import MemoryObjects
from storage.refs import CheckpointRef
from storage.roots import read_journals
from storage.series import Series
from storage.sweep import Wishes, mark, sweep
from storage.transfer import mirror
from storage.verify import verify
from tasks.checkpoints import load_model
from tasks.codecs import Exact
from tasks.compress import compress_update
from tasks.extract import Extract, extract_update
from tasks.ingest import Checkpoint, ingest
from tasks.snapshot import Published, own_bytes, snapshot
from tasks.tensors import read_tensor
from tests.builders import FORMS, tiny_model


class Training:
    """A model in bfloat16 that moves a little, and is published every time."""

    def __init__(self, folder: Path, architecture: str = "LlamaForCausalLM") -> None:
        self.folder, self.store = folder, ArtifactStore(MemoryObjects())
        self.series = Series(self.store.objects, "policy")
        self.model = tiny_model(architecture).to(torch.bfloat16)
        self.generator = torch.Generator().manual_seed(3)

    def move(self, share: float = 0.03) -> None:
        """Another last bit for a share of the numbers, as a small step of an optimizer does it."""
        with torch.no_grad():
            for parameter in self.model.parameters():
                chosen = torch.rand(parameter.shape, generator=self.generator) < share
                parameter.copy_(torch.where(chosen, parameter * 1.01, parameter))

    def publish(self, anchors: int = 4, after: CheckpointRef | None = None) -> Published:
        return snapshot(self.saved(), self.series, self.store, anchors=anchors, after=after)

    def saved(self) -> Checkpoint:
        target = self.folder / "saved"
        self.model.save_pretrained(target)
        return Checkpoint(source=str(target))

    def state(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}


def same(model: PreTrainedModel, state: dict[str, Tensor]) -> bool:
    found = model.state_dict()
    return found.keys() == state.keys() and all(
        torch.equal(found[name].view(torch.int16), tensor.view(torch.int16)) for name, tensor in state.items()
    )


@pytest.mark.parametrize("architecture", FORMS)
def test_every_version_comes_back_bit_by_bit(architecture: str, tmp_path: Path) -> None:
    training = Training(tmp_path, architecture)
    states, since = [], []
    for _ in range(6):
        done = training.publish()
        assert done.is_new
        states.append(training.state())
        since.append(done.version.since_anchor)
        training.move()
    assert since == [0, 1, 2, 3, 0, 1]
    for version, state in zip(training.series.versions(), states, strict=True):
        assert same(load_model(training.store.open(version.checkpoint)), state)
    refs = [version.checkpoint for version in training.series.versions()]
    assert not verify(training.store, refs).findings


def test_a_version_takes_what_changed_and_an_anchor_is_the_plain_checkpoint(tmp_path: Path) -> None:
    training = Training(tmp_path)
    refs = []
    for _ in range(5):
        refs.append(training.publish().version.checkpoint)
        training.move(0.01)
    manifests = [training.store.open(ref).manifest for ref in refs]
    whole = own_bytes(None, manifests[0])
    for before, now in pairwise(manifests[:4]):
        assert own_bytes(before, now) < 0.6 * whole  # files of a tiny model are mostly headers
        assert all(record.bytes <= 2 * record.elements + 200 for record in now.tensors)
    assert not any(record.through or record.onto for record in manifests[4].tensors)
    training.model.load_state_dict(load_model(training.store.open(refs[4])).state_dict())
    assert ingest(training.saved(), ArtifactStore(MemoryObjects())) == refs[4]


def test_what_did_not_change_is_no_version_and_frozen_layers_cost_nothing(tmp_path: Path) -> None:
    training = Training(tmp_path)
    first = training.publish()
    again = training.publish()
    assert (again.is_new, again.version) == (False, first.version)
    with torch.no_grad():
        next(iter(training.model.parameters())).mul_(1.5)
    second = training.publish().version
    old, new = (training.store.open(one.checkpoint).manifest for one in (first.version, second))
    assert sum(one != other for one, other in zip(old.tensors, new.tensors, strict=True)) == 1


def test_publishing_from_an_older_version_is_refused(tmp_path: Path) -> None:
    training = Training(tmp_path)
    with pytest.raises(Conflict, match="none yet"):
        training.publish(after=CheckpointRef(f"checkpoint/{'0' * 64}"))  # type: ignore[arg-type]
    first = training.publish().version
    training.move()
    second = training.publish(after=first.checkpoint).version
    training.move()
    with pytest.raises(Conflict, match="newest version is"):
        training.publish(after=first.checkpoint)
    assert training.series.head() == second
    with pytest.raises(Conflict, match="already holds"):
        training.series.append(first, first.checkpoint, anchor=True)
    assert training.series.append(first, second.checkpoint, anchor=False) == second


def test_another_architecture_and_a_series_without_anchors_are_refused(tmp_path: Path) -> None:
    training = Training(tmp_path)
    first = training.publish().version
    other = Training(tmp_path / "other", "ViTModel")
    with pytest.raises(Mismatch, match="begin another series"):
        snapshot(other.saved(), training.series, training.store)
    with pytest.raises(InvalidInput, match="found 0"):
        training.publish(anchors=0)
    assert training.series.head() == first


def test_versions_are_bases_and_tuned_sides_like_any_checkpoint(tmp_path: Path) -> None:
    """An update between two versions, exact against a base that is stated against another itself."""
    training = Training(tmp_path)
    for _ in range(3):
        training.publish(anchors=10)
        training.move()
    base, tuned = [one.checkpoint for one in training.series.versions()][1:]
    store = training.store
    exact = compress_update(extract_update(base, tuned, Extract(), store), Exact(), store)
    found, wanted = store.open(exact), store.open(tuned)
    assert any(record.through for record in found.manifest.tensors)
    for name in wanted.names:
        assert torch.equal(read_tensor(found, name), read_tensor(wanted, name))


def test_a_series_is_kept_mirrored_and_verified_with_all_its_versions(tmp_path: Path) -> None:
    training = Training(tmp_path)
    for _ in range(3):
        training.publish()
        training.move()
    store, target = training.store, ArtifactStore(MemoryObjects())
    ingest(Training(tmp_path / "other", "ViTModel").saved(), store)  # what nobody wants
    before = set(store.objects.list(""))
    gone = mark(store, Wishes(grace=0))
    assert len(gone.manifests) == 1
    sweep(store, Wishes(grace=0))
    assert 0 < len(before - set(store.objects.list(""))) == len(gone)
    assert mirror(store, target).entries == 3
    for version in Series(target.objects, "policy").versions():
        loaded = load_model(target.open(version.checkpoint)).state_dict()
        assert same(load_model(store.open(version.checkpoint)), loaded)
    anchor = next(training.series.versions()).checkpoint
    store.objects.delete(f"blob/{store.open(anchor).manifest.tensors[0].blob}")
    (finding,) = verify(store, list(store.refs()), journals=read_journals(store.objects).all).findings
    assert any("series 'policy' version 2" in one for one in finding.needed_by)
