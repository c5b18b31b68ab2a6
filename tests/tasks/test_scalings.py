"""Scalings against the reference implementation and by hand, and the blocks of the architectures that LiNeS reads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from storage.artifacts import ArtifactStore
from storage.errors import InvalidInput
from storage.refs import CheckpointRef
from tasks.materialize import materialize
from tasks.merge import fold_update
from tasks.mergers import Average, Karcher, Opcm, Sce, TaskArithmetic, Ties
from tasks.naming import Skeleton
from tasks.recipe import Recipe
from tasks.scalings import Lines, MatchNorm
from tasks.scalings.blocks import block_of, depths
from tasks.tensors import read_tensor
from tests.builders import checkpoint_of, memory_store, random_tensors, update_of
from tests.contracts.test_scalings import factors

GOLDEN = Path(__file__).parents[1] / "golden" / "merge"
LINES = {
    "lines_sum_b0.5_f32": (Lines(beta=0.5), [0, 1, 2, 3]),
    "lines_single_a0.1_f32": (Lines(rule="single", alpha=0.1), [0]),
}

Tensors = dict[str, Tensor]


def golden_deltas(task: int) -> Tensors:
    base, tuned = (load_file(GOLDEN / f"in_{one}.safetensors") for one in ("base", f"task{task}"))
    return {name: tuned[name] - tensor for name, tensor in base.items()}


def written(
    recipe: Recipe, before: Tensors, deltas: list[Tensors], store: ArtifactStore | None = None
) -> tuple[Tensors, ArtifactStore]:
    """The model after folding these updates one by one through a store."""
    store = store or memory_store()
    base: CheckpointRef = checkpoint_of(before, store)
    state = None
    for delta in deltas:
        state = fold_update(base, state, update_of(delta, base, store), recipe, store)
    assert state is not None
    model = store.open(materialize(base, state, store))
    return {name: read_tensor(model, name) for name in model.names}, store


class TestLines:
    @pytest.mark.parametrize("file", LINES)
    def test_it_is_the_reference(self, file: str) -> None:
        """The multi rule on the sum of four tasks, where alpha is 1/4, and the single rule on the first task."""
        scaling, tasks = LINES[file]
        base, expected = (load_file(GOLDEN / f"{one}.safetensors") for one in ("in_base", file))
        deltas = [golden_deltas(task) for task in tasks]
        merged = {name: torch.stack([one[name] for one in deltas]).sum(0) for name in base}
        found = factors(scaling, deltas, merged)
        for name, tensor in expected.items():
            torch.testing.assert_close(base[name] + merged[name] * found[name], tensor, rtol=0, atol=5e-7)

    @pytest.mark.parametrize("file", LINES)
    def test_it_is_the_reference_through_a_store(self, file: str) -> None:
        scaling, tasks = LINES[file]
        recipe = Recipe(TaskArithmetic(scale=1.0), scaling=scaling)
        base, expected = (load_file(GOLDEN / f"{one}.safetensors") for one in ("in_base", file))
        model, _ = written(recipe, base, [golden_deltas(task) for task in tasks])
        assert model.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(model[name], tensor, rtol=0, atol=5e-7)

    @pytest.mark.parametrize("merger", [Ties(), Karcher(), Sce(select_topk=0.3)], ids=lambda one: one.name)
    def test_alpha_is_a_ratio_of_l1_norms(self, merger: Any) -> None:
        """TIES merges something else than the sum, joint mergers keep none. By hand: sums of magnitudes over the whole
        model, by count."""
        base, deltas = load_file(GOLDEN / "in_base.safetensors"), [golden_deltas(task) for task in range(3)]
        plain, _ = written(Recipe(merger), base, deltas)
        scaled, _ = written(Recipe(merger, scaling=Lines(beta=0.2)), base, deltas)
        total = sum(float(sum(one[name] for one in deltas).abs().sum()) for name in base)  # type: ignore[union-attr]
        merged = sum(float((plain[name] - base[name]).double().abs().sum()) for name in base)
        alpha = total / merged / 3
        for name, tensor in base.items():
            depth = next((index / 2 for index in range(3) if f".resblocks.{index}." in name), 0.0)
            expected = tensor + (alpha + 0.2 * depth) * (plain[name] - tensor)
            torch.testing.assert_close(scaled[name], expected, rtol=0, atol=2e-6)

    def test_the_first_step_of_a_line_is_the_first_tuned_model(self) -> None:
        base, delta = load_file(GOLDEN / "in_base.safetensors"), golden_deltas(2)
        for merger in (TaskArithmetic(), Average(), Opcm()):
            model, _ = written(Recipe(merger, scaling=Lines()), base, [delta])
            for name, tensor in base.items():
                torch.testing.assert_close(model[name], tensor + delta[name], rtol=0, atol=5e-7)

    def test_an_unknown_architecture_is_refused(self) -> None:
        with pytest.raises(InvalidInput, match=r"'class_token', 'embed\.weight', 'layer\.bias' and 2 more"):
            written(Recipe(Average(), scaling=Lines()), random_tensors(0), [random_tensors(1)])


class TestMatchNorm:
    @pytest.mark.parametrize("merger", [TaskArithmetic(), Average(), Ties()], ids=lambda one: one.name)
    @pytest.mark.parametrize("count", [1, 3])
    def test_the_merged_delta_has_the_mean_norm(self, merger: Any, count: int) -> None:
        base, deltas = random_tensors(0), [random_tensors(seed, size=0.01 * seed) for seed in range(1, count + 1)]
        model, _ = written(Recipe(merger, scaling=MatchNorm(factor=0.5)), base, deltas)
        norms = [norm_of(delta) for delta in deltas]
        moved = norm_of({name: model[name] - tensor for name, tensor in base.items()})
        assert moved == pytest.approx(0.5 * sum(norms) / count, rel=1e-4)

    @pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (1.0, 2.0, 3.0)])
    def test_in_quadrature_it_is_the_norm_of_a_sum_of_orthogonal_updates(self, weights: tuple[float, ...]) -> None:
        """Three updates that share no entry. Weights are ratios: all equal, they are the plain sum."""
        base = random_tensors(0)
        deltas = [
            {
                name: torch.where(torch.arange(one.numel()).reshape(one.shape) % 3 == place, one * 0.01, 0)
                for name, one in random_tensors(1).items()
            }
            for place in range(3)
        ]
        store = memory_store()
        root, state = checkpoint_of(base, store), None
        recipe = Recipe(Average(), scaling=MatchNorm(norm="quadrature"))
        for delta, weight in zip(deltas, weights, strict=True):
            state = fold_update(root, state, update_of(delta, root, store), recipe, store, weight=weight)
        assert state is not None
        model = store.open(materialize(root, state, store))
        moved = norm_of({name: read_tensor(model, name) - tensor for name, tensor in base.items()})
        squares = [norm_of(delta) ** 2 for delta in deltas]
        shares = [weight / sum(weights) for weight in weights]
        expected = (3 * sum(share * one for share, one in zip(shares, squares, strict=True))) ** 0.5
        assert moved == pytest.approx(expected, rel=1e-4)
        if len(set(weights)) == 1:
            assert moved == pytest.approx(norm_of(random_tensors(1)) * 0.01, rel=1e-4)

    def test_it_changes_nothing_in_opcm(self) -> None:
        """Whose scale it is."""
        base, deltas = random_tensors(0), [random_tensors(seed, size=0.01 * seed) for seed in (1, 2, 3)]
        plain, _ = written(Recipe(Opcm()), base, deltas)
        scaled, _ = written(Recipe(Opcm(), scaling=MatchNorm()), base, deltas)
        for name, tensor in plain.items():
            torch.testing.assert_close(scaled[name], tensor, rtol=0, atol=1e-6)

    def test_updates_of_zeros_leave_the_base(self) -> None:
        base = random_tensors(0)
        zeros = {name: torch.zeros_like(tensor) for name, tensor in base.items()}
        model, _ = written(Recipe(Average(), scaling=MatchNorm()), base, [zeros, zeros])
        assert all(torch.equal(model[name], tensor) for name, tensor in base.items())


def norm_of(tensors: Tensors) -> float:
    return float(torch.cat([tensor.double().flatten() for tensor in tensors.values()]).norm())


_TINY = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
_TEXT = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_IMAGE = {"image_size": 8, "patch_size": 4}
_PAIR = {"text_config": {**_TINY, **_TEXT, "num_hidden_layers": 2}}
_SPARSE = {"num_key_value_heads": 2, "num_experts": 3, "moe_intermediate_size": 16, "head_dim": 8}
_HIERARCHY = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 3], "num_heads": [2, 2]}

# Architecture: its configuration, and how many blocks each of its stacks has.
ARCHITECTURES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "ViTModel": ({**_TINY, **_IMAGE, "num_hidden_layers": 3}, {"layers": 3}),
    "CLIPVisionModel": ({**_TINY, **_IMAGE, "num_hidden_layers": 12}, {"encoder.layers": 12}),
    "CLIPModel": (
        {**_PAIR, "vision_config": {**_TINY, **_IMAGE, "num_hidden_layers": 4}},
        {"text_model.encoder.layers": 2, "vision_model.encoder.layers": 4},
    ),
    "BertForMaskedLM": ({**_TINY, **_TEXT, "num_hidden_layers": 3}, {"encoder.layer": 3}),
    "T5ForConditionalGeneration": (
        {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_heads": 4, "num_layers": 8, "num_decoder_layers": 3, **_TEXT},
        {"encoder.block": 8, "decoder.block": 3},
    ),
    "LlamaForCausalLM": ({**_TINY, **_TEXT, "num_hidden_layers": 11}, {"layers": 11}),
    "Qwen3ForCausalLM": ({**_TINY, **_TEXT, **_SPARSE, "num_hidden_layers": 3}, {"layers": 3}),
    "MixtralForCausalLM": ({**_TINY, **_TEXT, "num_key_value_heads": 2, "num_hidden_layers": 3}, {"layers": 3}),
    "Qwen3MoeForCausalLM": ({**_TINY, **_TEXT, **_SPARSE, "num_hidden_layers": 3}, {"layers": 3}),
    "GPT2LMHeadModel": ({"n_embd": 32, "n_layer": 3, "n_head": 4, **_TEXT}, {"h": 3}),
    "SwinModel": (_HIERARCHY, {"encoder.layers": 4}),
    "ConvNextModel": ({"hidden_sizes": [8, 16, 16], "depths": [2, 3, 1], "num_stages": 3}, {"encoder.stages": 6}),
    "Wav2Vec2Model": ({**_TINY, "vocab_size": 32, "num_hidden_layers": 3}, {"encoder.layers": 3}),
}


def names_of(architecture: str, settings: dict[str, Any]) -> list[str]:
    """The canonical names of a real architecture's parameters, without its weights."""
    config = getattr(transformers, architecture).config_class(**settings)
    return list(Skeleton(config.to_json_string(use_diff=False).encode(), architecture).slots)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_blocks_of_an_architecture(architecture: str) -> None:
    """Every block of every stack is found, evenly spaced; the first of each is 0, the last 1, all others outside."""
    settings, stacks = ARCHITECTURES[architecture]
    found = depths(names_of(architecture, settings))
    for stack, count in stacks.items():
        mine = {depth for name, depth in found.items() if name.startswith(f"{stack}.")}
        assert sorted(mine) == pytest.approx([index / (count - 1) for index in range(count)])
    for name, depth in found.items():
        stack = next((stack for stack in stacks if name.startswith(f"{stack}.")), None)
        if stack is None:
            assert depth == 0, name
            continue
        place, inner = re.match(rf"{re.escape(stack)}\.(\d+)(?:\.(?:blocks|layers)\.(\d+))?\.", name).groups()  # type: ignore[union-attr]
        before = sum(settings["depths"][: int(place)]) if "depths" in settings else int(place)
        assert depth == pytest.approx((before + int(inner or 0)) / (stacks[stack] - 1)), name


@pytest.mark.parametrize("architecture", ["ViTModel", "LlamaForCausalLM", "BertForMaskedLM", "GPT2LMHeadModel"])
def test_one_block_is_the_first(architecture: str) -> None:
    settings = {**ARCHITECTURES[architecture][0]}
    settings["n_layer" if "n_layer" in settings else "num_hidden_layers"] = 1
    assert set(depths(names_of(architecture, settings)).values()) == {0.0}


@pytest.mark.parametrize(
    ("name", "stack", "index"),
    [
        ("visual.transformer.resblocks.11.attn.in_proj_weight", "visual.transformer.resblocks", 11),
        ("transformer.resblocks.3.ln_1.weight", "transformer.resblocks", 3),
        ("encoder.block.7.layer.0.SelfAttention.q.weight", "encoder.block", 7),
        ("decoder.block.2.layer.2.DenseReluDense.wi.weight", "decoder.block", 2),
        ("layers.3.mlp.experts.0.gate_proj.weight", "layers", 3),
        ("layers.3.mlp.experts.gate_up_proj", "layers", 3),
        ("layers.3.block_sparse_moe.experts.2.w1.weight", "layers", 3),
        ("h.10.mlp.c_fc.weight", "h", 10),
        ("blocks.5.attn.qkv.weight", "blocks", 5),
        ("layers.4.lambda_1", "layers", 4),
    ],
)
def test_names_of_blocks(name: str, stack: str, index: int) -> None:
    found = block_of(name)
    assert found is not None
    assert (found.stack, found.stage, found.number) == (stack, index, 0)


@pytest.mark.parametrize(
    "name", ["embed_tokens.weight", "conv_layers.0.conv.weight", "layers", "layers.0", "pooler.h.weight", "layer1.0.w"]
)
def test_names_outside_of_blocks(name: str) -> None:
    assert block_of(name) is None


def test_stages_hold_blocks() -> None:
    """Blocks are counted through; what a stage has beside them counts with its first one."""
    sizes = {0: 2, 1: 3}
    names = [
        f"encoder.stages.{stage}.layers.{block}.conv.weight" for stage, size in sizes.items() for block in range(size)
    ]
    found = depths([*names, "encoder.stages.1.downsampling_layer.0.weight", "norm.weight"])
    assert list(found.values()) == [0, 0.25, 0.5, 0.75, 1, 0.5, 0]


def test_a_head_of_layers_is_no_stack() -> None:
    """Its entries are plain layers, not blocks with modules in them; where there is nothing else, it is refused."""
    head = [f"bbox_predictor.layers.{index}.weight" for index in range(3)]
    body = [f"encoder.layers.{index}.attn.weight" for index in range(2)]
    assert list(depths([*head, *body]).values()) == [0, 0, 0, 0, 1]
    with pytest.raises(InvalidInput, match=r"bbox_predictor\.layers\.0\.weight.*match_norm"):
        depths(head)


def test_a_block_that_is_missing_keeps_its_place() -> None:
    assert list(depths([f"layers.{index}.fc.weight" for index in (0, 3, 4)]).values()) == [0, 0.75, 1]


def test_no_names_have_no_depths() -> None:
    assert depths([]) == {}
