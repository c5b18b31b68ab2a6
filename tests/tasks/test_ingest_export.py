"""Models in and out: every form of file gives one ref, and what goes out is what transformers loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from storage.artifacts import ArtifactStore
from storage.errors import InvalidInput, Mismatch
from storage.refs import CheckpointRef
from tasks.checkpoints import load_model
from tasks.export import export
from tasks.extract import Extract, extract_update
from tasks.ingest import Checkpoint, ingest
from tasks.tensors import read_tensor
from tests.builders import FORMS, ingested, memory_store, perturbed, tiny_model

TIED = {"LlamaForCausalLM": "lm_head.weight", "GPT2LMHeadModel": "lm_head.weight"}


@pytest.fixture
def store() -> ArtifactStore:
    return memory_store()


@pytest.fixture(params=FORMS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_model(request.param)


def read(folder: Path, store: ArtifactStore, **settings: object) -> CheckpointRef:
    return ingest(Checkpoint(source=str(folder), **settings), store)  # type: ignore[arg-type]


def with_weights(folder: Path, original: Path, tensors: dict[str, Tensor]) -> Path:
    """A copy of the folder `original` with other weights in it."""
    shutil.copytree(original, folder)
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def loads_as(folder: Path, model: PreTrainedModel) -> None:
    """`folder` loads without a warning's worth of difference, and is `model` bit for bit."""
    loaded, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    expected = model.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


class TestForms:
    """One model, whichever way it was written."""

    def test_in_out_and_in_again(self, model: PreTrainedModel, store: ArtifactStore, tmp_path: Path) -> None:
        ref = ingested(model, tmp_path / "in", store)
        export(ref, tmp_path / "out", store)
        loads_as(tmp_path / "out", model)
        assert read(tmp_path / "out", store) == ref
        assert (
            load_file(tmp_path / "out/model.safetensors").keys() == load_file(tmp_path / "in/model.safetensors").keys()
        )

    def test_names_in_memory_give_the_same_ref(
        self, model: PreTrainedModel, store: ArtifactStore, tmp_path: Path
    ) -> None:
        """A file of the state dict as it is in memory, both names of tied weights included."""
        ref = ingested(model, tmp_path / "saved", store)
        assert read(with_weights(tmp_path / "plain", tmp_path / "saved", model.state_dict()), store) == ref

    def test_shards_give_the_same_ref(self, model: PreTrainedModel, store: ArtifactStore, tmp_path: Path) -> None:
        ref = ingested(model, tmp_path / "whole", store)
        model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
        assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
        assert read(tmp_path / "shards", store) == ref

    def test_export_in_shards(self, model: PreTrainedModel, store: ArtifactStore, tmp_path: Path) -> None:
        ref = ingested(model, tmp_path / "in", store)
        files = export(ref, tmp_path / "out", store, shard_bytes=20_000)
        assert len([path for path in files if path.suffix == ".safetensors"]) > 1
        loads_as(tmp_path / "out", model)
        assert read(tmp_path / "out", store) == ref

    def test_loading_from_the_store(self, model: PreTrainedModel, store: ArtifactStore, tmp_path: Path) -> None:
        loaded = load_model(store.open(ingested(model, tmp_path, store)))
        expected = model.state_dict()
        assert loaded.state_dict().keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())

    def test_every_parameter_has_a_role(self, model: PreTrainedModel, store: ArtifactStore, tmp_path: Path) -> None:
        artifact = store.open(ingested(model, tmp_path, store))
        linear = [one for one in artifact.manifest.tensors if one.role == "linear.weight"]
        kinds = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
        expected = [path for path, module in model.named_modules() if isinstance(module, kinds)]
        tied = [path for path in expected if path in ("lm_head", "cls.predictions.decoder")]
        untied = 1 if type(model).__name__ == "MixtralForCausalLM" else 0
        assert len(linear) == len(expected) - len(tied) + untied
        assert all(len(one.shape) == 2 for one in linear)


class TestTies:
    @pytest.mark.parametrize(("architecture", "copy"), TIED.items())
    def test_tied_weights_are_stored_once(
        self, architecture: str, copy: str, store: ArtifactStore, tmp_path: Path
    ) -> None:
        model = tiny_model(architecture)
        artifact = store.open(ingested(model, tmp_path, store))
        assert artifact.manifest.parameters == sum(parameter.numel() for parameter in model.parameters())
        assert copy not in artifact
        assert copy in artifact.manifest.facts["tied"]

    @pytest.mark.parametrize(("architecture", "copy"), TIED.items())
    def test_copies_that_differ_are_refused(
        self, architecture: str, copy: str, store: ArtifactStore, tmp_path: Path
    ) -> None:
        model = tiny_model(architecture)
        model.save_pretrained(tmp_path / "saved")
        weights = {**model.state_dict(), copy: model.state_dict()[copy] + 1}
        with pytest.raises(Mismatch, match=copy):
            read(with_weights(tmp_path / "torn", tmp_path / "saved", weights), store)
        assert list(store.refs()) == []


class TestHeads:
    """A backbone, and the same backbone with a head, agree on the names they share."""

    @pytest.fixture
    def pair(self, store: ArtifactStore, tmp_path: Path) -> tuple[CheckpointRef, CheckpointRef]:
        """BertForMaskedLM, and a classifier tuned from its backbone."""
        base, tuned = tiny_model("BertForMaskedLM"), tiny_model("BertForSequenceClassification")
        tuned.bert.load_state_dict(perturbed(base.bert).state_dict(), strict=False)
        return ingested(base, tmp_path / "base", store), ingested(tuned, tmp_path / "tuned", store)

    def test_backbone_names_are_shared(
        self, pair: tuple[CheckpointRef, CheckpointRef], store: ArtifactStore, tmp_path: Path
    ) -> None:
        backbone = tiny_model("BertForSequenceClassification").bert
        names = set(store.open(ingested(backbone, tmp_path / "backbone", store)).names)
        assert names == set(backbone.state_dict())
        base, tuned = (set(store.open(ref).names) for ref in pair)
        pooler = {"pooler.dense.weight", "pooler.dense.bias"}
        assert base & tuned == names - pooler
        assert tuned - base == pooler | {"classifier.weight", "classifier.bias"}

    def test_heads_are_refused_by_name(self, pair: tuple[CheckpointRef, CheckpointRef], store: ArtifactStore) -> None:
        with pytest.raises(Mismatch, match=r"cls\.predictions\.bias.*classifier\.bias"):
            extract_update(*pair, Extract(), store)
        assert list(store.refs("update")) == []

    def test_heads_are_kept_if_asked(self, pair: tuple[CheckpointRef, CheckpointRef], store: ArtifactStore) -> None:
        update = store.open(extract_update(*pair, Extract(heads="keep"), store))
        heads = ["classifier.bias", "classifier.weight", "pooler.dense.bias", "pooler.dense.weight"]
        assert update.manifest.facts["heads"] == heads
        tuned = store.open(pair[1])
        for name in heads:
            assert update.record(name).role == f"head.{tuned.record(name).role}"
            assert torch.equal(read_tensor(update, name), read_tensor(tuned, name))

    def test_the_backbone_can_be_taken_out(
        self, pair: tuple[CheckpointRef, CheckpointRef], store: ArtifactStore, tmp_path: Path
    ) -> None:
        """Read as its backbone class, a model with a head loses the head and nothing else."""
        ref = read(tmp_path / "tuned", store, architecture="BertModel")
        export(ref, tmp_path / "backbone", store)
        loads_as(tmp_path / "backbone", transformers.BertModel.from_pretrained(tmp_path / "tuned"))


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def cut(path: Path, part: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])


def into_shards(folder: Path) -> None:
    tiny_model("BertForMaskedLM").save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()


def lose_shard(folder: Path) -> None:
    into_shards(folder)
    (folder / "model-00002-of-00004.safetensors").unlink()


def lose_name_in_shard(folder: Path) -> None:
    into_shards(folder)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["bert.nowhere.weight"] = "model-00001-of-00004.safetensors"
    path.write_text(json.dumps(index))


WORD = "bert.embeddings.word_embeddings.weight"
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickled weights only": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        r"pytorch_model\.bin",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), r"no model\.safetensors"),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"no config\.json"),
    "config is no JSON": (lambda folder: cut(folder / "config.json", 0.5), r"config\.json"),
    "config is a list": (lambda folder: (folder / "config.json").write_text("[]"), r"config\.json"),
    "header cut off": (lambda folder: cut(folder / "model.safetensors", 0.001), "not a readable safetensors"),
    "numbers cut off": (lambda folder: cut(folder / "model.safetensors", 0.9), "not a readable safetensors"),
    "empty file": (lambda folder: cut(folder / "model.safetensors", 0), "not a readable safetensors"),
    "NaN": (lambda folder: edit_weights(folder, lambda w: w[WORD][3, 4].fill_(torch.nan)), r"word_embeddings.*1 NaN"),
    "infinity": (
        lambda folder: edit_weights(folder, lambda w: w[WORD][3].fill_(torch.inf)),
        r"word_embeddings.*32 NaN",
    ),
    "unknown architecture": (lambda folder: edit_config(folder, architectures=["NoSuchModel"]), "NoSuchModel"),
    "no model class": (lambda folder: edit_config(folder, architectures=["AutoTokenizer"]), "AutoTokenizer"),
    "no architecture": (lambda folder: edit_config(folder, architectures=None), "names no architecture"),
    "unknown model type": (lambda folder: edit_config(folder, model_type="no-such-type"), "no-such-type"),
    "missing tensor": (lambda folder: edit_weights(folder, lambda w: w.pop(WORD)), r"word_embeddings"),
    "other shape": (
        lambda folder: edit_weights(folder, lambda w: w.update({WORD: torch.zeros(65, 32)})),
        r"word_embeddings.*\[64, 32\].*\[65, 32\]",
    ),
    "unexpected tensor": (
        lambda folder: edit_weights(folder, lambda w: w.update({"bert.extra.weight": torch.zeros(2)})),
        r"1 tensors.*extra\.weight",
    ),
    "missing shard": (lose_shard, r"model-00002-of-00004\.safetensors"),
    "name missing in its shard": (lose_name_in_shard, r"model-00001-of-00004.*bert\.nowhere\.weight"),
    "index is no JSON": (lambda folder: (folder / "model.safetensors.index.json").write_text("{"), "shard index"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_and_nothing_is_committed(name: str, store: ArtifactStore, tmp_path: Path) -> None:
    harm, message = BAD[name]
    folder = tmp_path / "model"
    tiny_model("BertForMaskedLM").save_pretrained(folder)
    harm(folder)
    with pytest.raises(InvalidInput, match=f"(?s){message}"):
        read(folder, store)
    assert list(store.refs()) == []


def test_what_may_be_left_out_can_be_listed(store: ArtifactStore, tmp_path: Path) -> None:
    ref = ingested(tiny_model("BertForMaskedLM"), tmp_path, store)
    edit_weights(tmp_path, lambda weights: weights.update({"bert.extra.weight": torch.zeros(2)}))
    assert read(tmp_path, store, ignore=(r"extra\.",)) == ref


def test_neither_a_folder_nor_a_hub_id(store: ArtifactStore, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="neither a folder nor a hub id"):
        read(tmp_path / "nothing here", store)


@pytest.mark.parametrize("taken", ["folder", "file"])
def test_export_overwrites_nothing(taken: str, store: ArtifactStore, tmp_path: Path) -> None:
    ref = ingested(tiny_model("ViTModel"), tmp_path / "in", store)
    place = tmp_path / "taken"
    precious = place / "precious.txt" if taken == "folder" else place
    precious.parent.mkdir(exist_ok=True)
    precious.write_text("mine")
    with pytest.raises(InvalidInput, match="taken"):
        export(ref, place, store)
    assert precious.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "taken"]


def test_a_failed_export_leaves_nothing(store: ArtifactStore, tmp_path: Path) -> None:
    ref = ingested(tiny_model("ViTModel"), tmp_path / "in", store)
    blob = store.open(ref).manifest.tensors[-1].blob
    store.objects.put(f"blob/{blob}", b"damaged")
    with pytest.raises(Exception, match=blob):
        export(ref, tmp_path / "out", store)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
