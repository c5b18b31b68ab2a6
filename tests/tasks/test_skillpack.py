"""SkillPack: the released code's errors, the choice by kind of module, its rivals, and sizes."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file
from torch import Tensor

from configs.codec_words import codec_from_words
from storage.blobs import encode_parts
from storage.errors import InvalidInput, Mismatch
from tasks.codecs import Coded, Leaf, decode_parts
from tasks.codecs.rtn import Rtn
from tasks.codecs.skillpack import SkillPack
from tasks.codecs.triplets import read_groups
from tasks.kinds import kind_of
from tests.tasks.test_gptq import GOLDEN, case, moments_of

QUERY, FC1 = "layers.0.self_attn.q_proj.weight", "layers.0.mlp.fc1.weight"
GROUPS = SkillPack(rivals=())


def made(
    codec: SkillPack, delta: Tensor, name: str = FC1, role: str = "linear.weight", moments: Tensor | None = None
) -> Coded:
    return codec.encode(Leaf(name, role, delta, inputs=None if moments is None else lambda: moments), {})


def back(coded: Coded, shape: tuple[int, ...]) -> Tensor:
    """Through a file."""
    return decode_parts(coded.codec, safetensors.torch.load(encode_parts(coded.parts)), shape)


def size(coded: Coded) -> int:
    return len(encode_parts(coded.parts))


def low(rows: int, columns: int, decay: float = 0.05, seed: int = 0) -> Tensor:
    """A matrix whose singular values fall by `decay` from one to the next."""
    generator = torch.Generator().manual_seed(seed)
    width = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, width, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(columns, width, generator=generator))[0]
    return 1e-3 * (left * torch.exp(-decay * torch.arange(width))) @ right.T


def off(wanted: Tensor, found: Tensor) -> float:
    return float((wanted - found).norm() / wanted.norm())


def test_the_released_codes_errors_from_the_update_itself() -> None:
    """The signs of singular vectors are another library's choice, and codes with them: the errors are not."""
    given, (_, moments) = load_file(GOLDEN / "graftllm_fp32_base0.in.safetensors"), case()
    delta = given["finetuned"] - given["base"]
    codec = SkillPack(mlp=((8, 2), (4, 8), (2, 38)), scales="f32", rivals=())
    rows = given["calib"].reshape(-1, 192)
    errors = []
    for data in (moments, None):
        error = delta - back(made(codec, delta, moments=data), (96, 192))
        errors.append((float((rows @ error.T).norm() / (rows @ delta.T).norm()), float(error.norm() / delta.norm())))
    assert errors[0][0] == pytest.approx(0.3015, rel=0.05) and errors[0][1] == pytest.approx(0.6726, rel=0.05)
    assert errors[1][0] > 1.1 * errors[0][0] and errors[1][1] < 0.9 * errors[0][1], "without data the matrix counts"


@pytest.mark.parametrize(
    ("name", "role", "kind"),
    [
        ("embed_tokens.weight", "embedding.weight", "embedding"),
        ("lm_head.weight", "linear.weight", "head"),
        ("classifier.weight", "linear.weight", "head"),
        (QUERY, "linear.weight", "attention"),
        ("encoder.layer.0.attention.output.dense.weight", "linear.weight", "attention"),
        ("decoder.block.0.layer.1.EncDecAttention.q.weight", "linear.weight", "attention"),
        ("decoder.layers.0.fc1.weight", "linear.weight", "mlp"),
        ("encoder.layer.0.output.dense.weight", "linear.weight", "mlp"),
        ("layers.0.mlp.down_proj.weight", "linear.weight", "mlp"),
        ("layers.0.post_attention_layernorm.weight", "norm.weight", "other"),
        ("layers.0.self_attn.q_proj.bias", "linear.bias", "other"),
        ("embeddings.patch_embeddings.projection.weight", "conv.weight", "other"),
        ("layers.0.mlp.experts.down_proj", "bare", "other"),
        ("weight", "linear.weight", "mlp"),
    ],
)
def test_kinds(name: str, role: str, kind: str) -> None:
    assert kind_of(name, role) == kind


@pytest.mark.parametrize("role", ["embedding.weight", "linear.weight"])
def test_embeddings_and_heads_keep_their_largest_entries(role: str) -> None:
    delta = torch.randn(200, 50, generator=torch.Generator().manual_seed(0)) * 1e-4
    coded = made(SkillPack(density=0.05), delta, "lm_head.weight", role)
    found = back(coded, (200, 50))
    order = delta.abs().flatten().argsort(descending=True)
    kept = found.flatten() != 0
    assert int(kept.sum()) == 501 and bool(kept[order[:501]].all())
    assert torch.equal(found.flatten()[kept], delta.flatten()[kept].bfloat16().float())
    assert size(coded) < 2 * 0.05 * 10_000 + 0.3 * 10_000 / 8 + 300
    exact = back(made(SkillPack(density=0.05, values="f32"), delta, "lm_head.weight", role), (200, 50))
    assert torch.equal(exact.flatten()[kept], delta.flatten()[kept])


def test_vectors_stay_and_other_tensors_are_rounded() -> None:
    vector, stack = torch.randn(300), torch.randn(3, 40, 50)
    assert torch.equal(back(made(SkillPack(), vector, "norm.weight", "norm.weight"), (300,)).float(), vector.bfloat16())
    assert torch.equal(back(made(SkillPack(values="f32"), vector, "b", "linear.bias"), (300,)), vector)
    assert made(SkillPack(), stack, "experts.gate_up_proj", "bare").codec == "rtn@1"
    plain = made(SkillPack(others=None), stack, "experts.gate_up_proj", "bare")
    assert torch.equal(back(plain, (3, 40, 50)).float(), stack.bfloat16())


def test_attention_and_mlp_have_their_own_groups() -> None:
    codec = SkillPack(attention=((8, 3),), mlp=((8, 1), (4, 0.5)), rivals=())
    delta = low(40, 60)
    counts = []
    for name in (QUERY, FC1):
        groups = read_groups(made(codec, delta, name).parts, (40, 60))
        counts.append([(bits, one.right.codes_RC.shape) for bits, one in zip(groups.bits, groups.pairs, strict=True)])
    assert counts == [[(8, (3, 60))], [(8, (1, 60)), (4, (20, 60))]]


def test_energy_takes_the_fewest_triplets() -> None:
    delta = low(40, 60)
    squares = torch.linalg.svdvals(delta.double()).square().cumsum(0)
    wanted = int((squares < 0.9 * squares[-1]).sum()) + 1
    for mlp in (((8, 2), (4, 3), (2, 1)), ((8, 100),)):
        groups = read_groups(made(SkillPack(mlp=mlp, energy=0.9, rivals=()), delta).parts, (40, 60))
        assert len(groups.share_K) == wanted and groups.pairs[0].left.codes_RC.shape[1] == min(mlp[0][1], wanted)


def test_no_more_triplets_than_the_matrix_has() -> None:
    codec = SkillPack(mlp=((8, 20), (4, 180), (2, 1200)), rivals=())
    groups = read_groups(made(codec, low(30, 50)).parts, (30, 50))
    assert groups.bits == (8, 4) and len(groups.share_K) == 30
    thin = torch.randn(30, 2) @ torch.randn(2, 50)
    assert len(read_groups(made(codec, thin).parts, (30, 50)).share_K) == 2, "noise of the arithmetic is no triplet"
    assert off(thin, back(made(codec, thin), (30, 50))) < 0.02
    one = torch.randn(1, 50)
    assert off(one, back(made(GROUPS, one), (1, 50))) < 0.02


def test_the_published_groups_cost_what_the_published_code_would() -> None:
    """1.134 bits of codes a number on average of all its layers, 1.21 with scales: here of a square one, coded."""
    delta = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    coded = made(GROUPS, delta, QUERY)
    counts = (round(0.005 * 512), round(0.044 * 512), round(0.195 * 512))
    payload = sum(bits * count for bits, count in zip((8, 4, 2), counts, strict=True)) * 2 / 512
    assert 0.8 * payload < 8 * size(coded) / delta.numel() < 1.05 * payload


def test_a_rival_stays_where_it_is_smaller_and_no_further_off() -> None:
    """Of a matrix of full rank, groups of all its triplets cost more than rounding its numbers."""
    full = torch.randn(96, 128, generator=torch.Generator().manual_seed(0))
    everything = ((8, 10), (4, 86))
    groups = made(SkillPack(mlp=everything, rivals=()), full)
    chosen = made(SkillPack(mlp=everything), full)
    assert groups.codec == "skillpack@1" and chosen.codec == "rtn@1"
    assert size(chosen) < size(groups)
    assert off(full, back(chosen, (96, 128))) <= off(full, back(groups, (96, 128)))
    assert made(SkillPack(mlp=everything, rivals=(2,)), full).codec == "skillpack@1", "smaller but further off"
    assert made(SkillPack(), low(96, 128, 0.5)).codec == "skillpack@1"
    tiny = torch.randn(3, 4)
    assert made(SkillPack(), tiny).codec == "dense@1" and made(GROUPS, tiny).codec == "skillpack@1"


def test_with_inputs_rivals_are_compared_by_what_the_layer_gives_out() -> None:
    """Of inputs in few directions GPTQ serves just these, at the price of numbers further off."""
    full, moments = torch.randn(96, 128, generator=torch.Generator().manual_seed(0)), moments_of(3, 128)
    codec = SkillPack(mlp=((8, 10), (4, 86)), rivals=(4,))
    assert made(codec, full).codec == "rtn@1"
    chosen = made(codec, full, moments=moments)
    assert chosen.codec == "skillpack@1"
    rtn = Rtn.decode(Rtn(bits=4).encode(Leaf(FC1, "linear.weight", full), {}).parts, (96, 128))
    errors = [full - back(chosen, (96, 128)), full - rtn]
    assert ((errors[0] @ moments) * errors[0]).sum() < ((errors[1] @ moments) * errors[1]).sum()
    assert errors[0].norm() > errors[1].norm()


@pytest.mark.parametrize("factor", [1e-42, 1e-30, 1e30])
def test_any_size(factor: float) -> None:
    delta = low(30, 40, 0.5) * 1e3 * factor
    assert off(delta.double(), back(made(GROUPS, delta), (30, 40)).double()) < 0.5


def test_what_cannot_be_written_is_refused_by_name() -> None:
    delta = low(20, 30)
    with pytest.raises(Mismatch, match="fc1"):
        made(SkillPack(), delta, moments=torch.eye(20))
    with pytest.raises(InvalidInput, match="fc1"):
        made(SkillPack(), torch.full((20, 30), 3e38))
    with pytest.raises(InvalidInput, match="bias"):
        made(SkillPack(values="bf16"), torch.full((5,), 3.4e38), "bias", "linear.bias")


@pytest.mark.parametrize(
    "settings",
    [
        {"density": 0},
        {"density": 1},
        {"mlp": ()},
        {"mlp": ((8, 1.5),)},
        {"attention": ((8, 0),)},
        {"attention": ((8, -3),)},
        {"energy": 0},
        {"energy": 1.1},
        {"group": 0},
        {"calibration": -1},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(InvalidInput, match=next(iter(settings))):
        SkillPack(**settings)  # type: ignore[arg-type]


def test_settings_as_words() -> None:
    found = codec_from_words("skillpack", ["mlp=[[8, 20], [2, 0.5]]", "rivals=[2]", "energy=null"])
    assert found == SkillPack(mlp=((8, 20), (2, 0.5)), rivals=(2,))
    assert found.examples == 128 and SkillPack(calibration=0).examples == 0
    with pytest.raises(InvalidInput):
        codec_from_words("skillpack", ["mlp=[[5, 20]]"])


def test_inputs_are_left_alone() -> None:
    delta, moments = low(30, 40), moments_of(100, 40)
    before, seen = delta.clone(), moments.clone()
    made(GROUPS, delta.T.contiguous().T, moments=moments)
    made(SkillPack(), delta.double(), "lm_head.weight")
    assert torch.equal(delta, before) and torch.equal(moments, seen)


def test_an_rtn_rival_is_rtn() -> None:
    full = torch.randn(96, 128, generator=torch.Generator().manual_seed(0))
    chosen = made(SkillPack(mlp=((8, 10), (4, 86)), rivals=(4,)), full)
    own = Rtn(bits=4).encode(Leaf(FC1, "linear.weight", full), {})
    assert encode_parts(chosen.parts) == encode_parts(own.parts)
