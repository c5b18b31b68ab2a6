"""A one-shot merge of folders: the numbers of a line bit for bit, nothing half-written, errors before any writing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel

from configs.recipe_words import recipe_from_words
from storage.artifacts import ArtifactStore
from storage.errors import InvalidInput, Mismatch
from storage.refs import StateRef
from tasks.export import export
from tasks.extract import Extract, extract_update
from tasks.folders import passes as folder_passes
from tasks.folders import pieces as folder_pieces
from tasks.folders.merge import RECORD, Options, merge_folders
from tasks.folders.names import role_by_name
from tasks.folders.reader import Weights, sha256_of
from tasks.folders.scratch import Scratch
from tasks.ingest import Checkpoint, ingest
from tasks.materialize import materialize
from tasks.merge import fold_update
from tasks.mergers import MERGERS, Average, Karcher, Opcm, Sce, Target, TaskArithmetic, Ties, TsvM
from tasks.parallel import Budget
from tasks.recipe import Recipe
from tasks.scalings import Lines, MatchNorm
from tasks.sparsifiers import Dare
from tests.builders import FORMS, memory_store, perturbed, tiny_model

NEED_A_LINE = {"continual_ties"}


def folders(place: Path, architecture: str = "LlamaForCausalLM", dtype: torch.dtype = torch.float32) -> list[Path]:
    """A base and three models tuned from it, saved as transformers saves them."""
    base = tiny_model(architecture)
    models = [base, *(perturbed(base, seed) for seed in (1, 2, 3))]
    for number, model in enumerate(models):
        model.to(dtype).save_pretrained(place / str(number))
    return [place / str(number) for number in range(len(models))]


def through_store(inputs: list[Path], recipe: Recipe, place: Path) -> Path:
    """The same merge as a line does it: ingest, extract, fold one by one, write, export."""
    store: ArtifactStore = memory_store()
    base, *tuned = (ingest(Checkpoint(source=str(folder)), store) for folder in inputs)
    state: StateRef | None = None
    for one in tuned:
        state = fold_update(base, state, extract_update(base, one, Extract(), store), recipe, store)
    assert state is not None
    export(materialize(base, state, store), place, store)
    return place


def weights_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def merged(inputs: list[Path], out: Path, recipe: Recipe, **settings: Any) -> dict[str, Tensor]:
    merge_folders(inputs[0], inputs[1:], out, recipe, **settings)
    return weights_of(out)


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    different = [name for name in one if one[name].dtype != two[name].dtype or not torch.equal(one[name], two[name])]
    assert different == []


class TestNumbers:
    @pytest.mark.parametrize("architecture", FORMS)
    @pytest.mark.parametrize("merger", [Average(), TaskArithmetic(), Ties()], ids=lambda one: one.name)
    def test_every_form_of_file_is_merged_as_in_a_line(self, architecture: str, merger: Any, tmp_path: Path) -> None:
        inputs = folders(tmp_path, architecture, torch.bfloat16)
        found = merged(inputs, tmp_path / "out", Recipe(merger))
        same(found, weights_of(through_store(inputs, Recipe(merger), tmp_path / "line")))
        assert not torch.equal(*(weights_of(tmp_path / one)[next(iter(found))] for one in ("0", "out")))

    @pytest.mark.parametrize("name", MERGERS)
    def test_every_merger_gives_the_numbers_of_a_line(self, name: str, tmp_path: Path) -> None:
        """Or says that it needs a line, because it looks at what was merged before."""
        recipe = Recipe(MERGERS[name]())
        inputs = folders(tmp_path)[: 3 if name == "slerp" else 4]  # slerp merges two models
        if name in NEED_A_LINE:
            with pytest.raises(InvalidInput, match=f"{name}.*looks at what was merged before.*a line"):
                merged(inputs, tmp_path / "out", recipe)
            assert not (tmp_path / "out").exists()
            return
        found = merged(inputs, tmp_path / "out", recipe)
        same(found, weights_of(through_store(inputs, recipe, tmp_path / "line")))

    @pytest.mark.parametrize("scaling", [MatchNorm(), Lines(beta=0.1)], ids=lambda one: one.name)
    @pytest.mark.parametrize(
        "merger", [Average(), Ties(), Opcm(variant="reference"), Karcher()], ids=lambda one: one.name
    )
    def test_scalings(self, scaling: Any, merger: Any, tmp_path: Path) -> None:
        inputs, recipe = folders(tmp_path, "CLIPVisionModel"), Recipe(merger, scaling=scaling)
        found = merged(inputs, tmp_path / "out", recipe)
        same(found, weights_of(through_store(inputs, recipe, tmp_path / "line")))

    def test_facts_that_folds_wait_for(self, tmp_path: Path) -> None:
        """The reference's OPCM shrinks bare parameters by the norm of the whole state before."""
        inputs, recipe = folders(tmp_path, "CLIPVisionModel"), Recipe(Opcm(variant="reference"))
        found = merged(inputs, tmp_path / "out", recipe)
        same(found, weights_of(through_store(inputs, recipe, tmp_path / "line")))

    def test_weights(self, tmp_path: Path) -> None:
        inputs = folders(tmp_path)
        found = merged(inputs[:3], tmp_path / "out", Recipe(Average()), weights=[3.0, 1.0])
        base, one, two = (weights_of(folder) for folder in inputs[:3])
        for name, tensor in found.items():
            expected = base[name] + ((one[name] - base[name]) * 3 + (two[name] - base[name])) / 4
            torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-8)

    def test_sparsified_updates_depend_on_the_models_not_on_their_shards(self, tmp_path: Path) -> None:
        inputs, recipe = folders(tmp_path), Recipe(TaskArithmetic(scale=1.0), Dare(density=0.5))
        found = merged(inputs[:2], tmp_path / "out", recipe)
        tiny_model("LlamaForCausalLM").save_pretrained(tmp_path / "shards", max_shard_size="20KB")
        perturbed(tiny_model("LlamaForCausalLM"), 1).save_pretrained(tmp_path / "more shards", max_shard_size="10KB")
        same(merged([tmp_path / "shards", tmp_path / "more shards"], tmp_path / "out2", recipe), found)
        base, tuned = weights_of(inputs[0]), weights_of(inputs[1])
        kept = torch.cat([(found[name] != base[name]).flatten() for name in base]).float().mean()
        assert 0.48 < kept < 0.52
        name = "model.embed_tokens.weight"
        changed = found[name] != base[name]
        doubled = (base[name] + 2 * (tuned[name] - base[name]))[changed]
        torch.testing.assert_close(found[name][changed], doubled, rtol=0, atol=1e-7)

    @pytest.mark.parametrize("memory", [1, 1 << 30], ids=["nothing held", "all held"])
    @pytest.mark.parametrize("merger", [Average(), Ties(), Ties(trim="tensor", tie="positive"), Sce(), Opcm()], ids=str)
    def test_workers_memory_and_the_size_of_pieces_change_nothing(
        self, merger: Any, memory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        inputs = folders(tmp_path)
        merge_folders(inputs[0], inputs[1:], tmp_path / "one", Recipe(merger), budget=Budget(1))
        for module in (folder_pieces, folder_passes):
            monkeypatch.setattr(module, "PIECE", 100)
        monkeypatch.setattr(folder_passes, "_JOB", 300)
        merge_folders(inputs[0], inputs[1:], tmp_path / "two", Recipe(merger), budget=Budget(3, memory))
        files = [{file.name: sha256_of(file) for file in (tmp_path / one).iterdir()} for one in ("one", "two")]
        assert files[0] == files[1]

    @pytest.mark.parametrize("merger", [Average(), TaskArithmetic(), Ties()], ids=lambda one: one.name)
    def test_mergers_that_take_pieces_see_each_entry_alone(self, merger: Any) -> None:
        assert Recipe(merger).entrywise
        several = [torch.randn(40, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
        surveys = [{**merger.survey(lambda one=one: [one], None), "weight": 1.0} for one in several]

        def of(part: slice) -> Tensor:
            parts, target = None, Target("a.weight", "linear.weight")
            for one, survey in zip(several, surveys, strict=True):
                parts, _ = merger.fold(parts, one[part], target, {}, survey)
            return merger.delta(parts, {"count": 3, "weight": 3.0, "majority": 1.0}, target)

        assert torch.equal(torch.cat([of(slice(0, 7)), of(slice(7, 40))]), of(slice(0, 40)))

    def test_kept_results_change_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        inputs, recipe = folders(tmp_path), Recipe(Opcm(), scaling=MatchNorm())
        never = merged(inputs, tmp_path / "never", recipe)
        offered = Scratch.offer
        monkeypatch.setattr(Scratch, "offer", lambda self, key, parts, _: offered(self, key, parts, 1e9))
        same(merged(inputs, tmp_path / "always", recipe), never)

    @pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "CLIPVisionModel", "ViTModel"])
    @pytest.mark.parametrize("merger", [Opcm(), Opcm(variant="reference", project="matrices")], ids=str)
    def test_without_a_config_roles_are_told_by_names(self, architecture: str, merger: Any, tmp_path: Path) -> None:
        inputs = folders(tmp_path, architecture)
        expected = merged(inputs, tmp_path / "known", Recipe(merger))
        (inputs[0] / "config.json").unlink()
        done = merge_folders(inputs[0], inputs[1:], tmp_path / "out", Recipe(merger))
        same(weights_of(tmp_path / "out"), expected)
        assert any("by their names and shapes" in note for note in done.notes)

    def test_experts_are_merged_as_the_files_have_them(self, tmp_path: Path) -> None:
        """Each matrix of each expert by itself, and a note says that a line does otherwise."""
        inputs = folders(tmp_path, "MixtralForCausalLM")[:3]
        done = merge_folders(inputs[0], inputs[1:], tmp_path / "out", Recipe(TsvM()))
        assert any("9 tensors are merged one by one" in note and "experts.0.w1" in note for note in done.notes)
        name = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
        base, one, two, found = (weights_of(folder)[name] for folder in (*inputs, tmp_path / "out"))
        merger, target = TsvM(), Target(name, "linear.weight")
        parts, _ = merger.fold(None, one - base, target, {}, {})
        parts, _ = merger.fold(parts, two - base, target, {"count": 1}, {})
        assert torch.equal(found, base + merger.delta(parts, {"count": 2}, target))
        assert not any("one by one" in note for note in merge_folders(*_split(inputs), Recipe(Average())).notes)


def _split(inputs: list[Path]) -> tuple[Path, list[Path], Path]:
    return inputs[0], inputs[1:], inputs[0].parent / "average"


class TestFolder:
    def test_it_loads_and_says_how_it_was_made(self, tmp_path: Path) -> None:
        inputs = folders(tmp_path, dtype=torch.bfloat16)
        (inputs[0] / "tokenizer.json").write_text("{}")
        options = Options(torch.float16, hashes=True, shard_bytes=20_000)
        done = merge_folders(inputs[0], inputs[1:], tmp_path / "out", Recipe(Average()), options=options)
        assert len(done.files) == 2
        assert AutoModel.from_pretrained(tmp_path / "out").dtype == torch.float16
        assert (tmp_path / "out/tokenizer.json").read_text() == "{}"
        record = json.loads((tmp_path / "out" / RECORD).read_text())
        assert record["recipe"] == {"name": "average", "version": 1}
        assert record["tuned"][1]["files"][0]["sha256"] == sha256_of(inputs[2] / "model.safetensors")

    def test_tied_weights_stored_twice_on_one_side(self, tmp_path: Path) -> None:
        inputs = folders(tmp_path)[:2]
        plain = merged(inputs, tmp_path / "plain", Recipe(Opcm()))
        edit(inputs[1], lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
        same(merged(inputs, tmp_path / "tuned", Recipe(Opcm())), plain)
        edit(inputs[0], lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
        found = merged(inputs, tmp_path / "both", Recipe(Opcm()))
        assert torch.equal(found.pop("lm_head.weight"), found["model.embed_tokens.weight"])
        same(found, plain)

    @pytest.mark.parametrize("error", [KeyboardInterrupt, InvalidInput])
    def test_an_interrupted_merge_leaves_nothing(self, error: type[BaseException], tmp_path: Path) -> None:
        inputs = folders(tmp_path)

        def stop(done: int, total: int, note: str) -> None:
            if done == 3:
                raise error("stop")

        with pytest.raises(error):
            merge_folders(inputs[0], inputs[1:], tmp_path / "out", Recipe(Average()), report=lambda label: stop)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2", "3"]

    @pytest.mark.parametrize("entries", [0, 5, 12])
    def test_any_range_can_be_read(self, entries: int, tmp_path: Path) -> None:
        tensor = torch.arange(12.0).reshape(3, 4).bfloat16()
        save_file({"a": torch.ones(3), "b": tensor, "empty": torch.ones(0)}, tmp_path / "model.safetensors")
        with Weights(tmp_path) as weights:
            assert torch.equal(weights.read("b", 0, entries), tensor.flatten()[:entries])
            assert weights.read("empty").shape == (0,)

    def test_empty_and_single_entries_and_integers(self, tmp_path: Path) -> None:
        base = {"none": torch.ones(0, 3), "one": torch.tensor(2.0), "steps": torch.tensor([5, 7])}
        for name, one in (("base", 2.0), ("tuned", 3.0)):
            (tmp_path / name).mkdir()
            save_file({**base, "one": torch.tensor(one)}, tmp_path / name / "model.safetensors")
        for merger in (Average(), Ties(density=1.0), Opcm()):
            found = merged([tmp_path / "base", tmp_path / "tuned"], tmp_path / merger.name, Recipe(merger))
            assert found["one"].item() == 3.0 and found["none"].shape == (0, 3) and found["steps"].tolist() == [5, 7]


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def to_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("name", "shape", "role"),
    [
        ("layers.0.mlp.shared_expert.gate_proj.weight", (4, 4), "linear.weight"),
        ("layers.0.mlp.experts.3.w1.weight", (4, 4), "linear.weight"),
        ("embeddings_project.weight", (4, 4), "linear.weight"),
        ("shared.weight", (9, 4), "embedding.weight"),
        ("bert.embeddings.word_embeddings.weight", (9, 4), "embedding.weight"),
        ("h.3.ln_1.weight", (4,), "norm.weight"),
        ("encoder.layer.0.output.LayerNorm.weight", (4,), "norm.weight"),
        ("visual.class_embedding", (4,), "bare"),
        ("resblocks.0.attn.in_proj_weight", (12, 4), "bare"),
        ("visual.conv1.weight", (4, 3, 2, 2), "conv.weight"),
        ("temperature", (), "bare"),
    ],
)
def test_roles_told_by_names(name: str, shape: tuple[int, ...], role: str) -> None:
    assert role_by_name(name, shape) == role


NORM = "model.norm.weight"
BAD: dict[str, tuple[Callable[[Path], object], type[InvalidInput], str]] = {
    "pickle": (to_pickle, InvalidInput, r"pytorch_model\.bin.*can run code"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), InvalidInput, "has no model.safetensors"),
    "no folder": (shutil.rmtree, InvalidInput, "is not a folder"),
    "cut off": (lambda f: (f / "model.safetensors").write_bytes(b"\x08"), InvalidInput, "not a readable safetensors"),
    "missing": (lambda f: edit(f, lambda w: w.pop(NORM)), Mismatch, "missing: model.norm.weight"),
    "more": (lambda f: edit(f, lambda w: w.update(x=torch.ones(1))), Mismatch, "more: x"),
    "shape": (
        lambda f: edit(f, lambda w: w.update({NORM: torch.ones(31)})),
        Mismatch,
        r"'model.norm.weight' of .*model.safetensors: expected shape \[32\].*found \[31\]",
    ),
    "kind": (lambda f: edit(f, lambda w: w.update({NORM: torch.ones(32).int()})), Mismatch, "torch.int32"),
    "nan": (lambda f: edit(f, lambda w: w[NORM][3].fill_(torch.nan)), InvalidInput, r"norm.weight.*1 NaN"),
    "untied": (
        lambda f: edit(f, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"] + 1})),
        Mismatch,
        "lm_head.weight.*tie_word_embeddings",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_and_nothing_is_left(name: str, tmp_path: Path) -> None:
    harm, kind, message = BAD[name]
    inputs = folders(tmp_path)
    harm(inputs[2])
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(kind, match=f"(?s){message}"):
        merge_folders(inputs[0], inputs[1:], tmp_path / "out", Recipe(Average()))
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    inputs = folders(tmp_path)
    with pytest.raises(InvalidInput, match="not empty"):
        merge_folders(inputs[0], inputs[1:2], inputs[3], Recipe(Average()))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("tiez", None, None, []), "did you mean ties"),
        (("ties", None, None, ["densty=0.2"]), "did you mean density"),
        (("ties", None, None, ["density=2"]), r"in \(0, 1\]"),
        (("ties", None, None, ["aggregate=median"]), "aggregate"),
        (("ties", None, None, ["density"]), "key=value"),
        (("ties", None, None, ["scaling.factor=2"]), "no scaling.*--scaling NAME"),
    ],
)
def test_recipes_in_words_are_checked(words: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        recipe_from_words(*words)


def test_recipes_in_words() -> None:
    found = recipe_from_words("ties", "dare", "match_norm", ["density=0.3", "sparsify.density=0.5", "scaling.factor=2"])
    assert found == Recipe(Ties(density=0.3), Dare(density=0.5), MatchNorm(factor=2.0))
