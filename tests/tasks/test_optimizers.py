"""Optimizers against their formulas, written out again in float64, and what a pair of them promises."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.optim import Optimizer

from storage.errors import InvalidInput
from tasks.optimizers import AdamW, Apollo, Galore, Muon, Rates
from tasks.optimizers.base import split
from tasks.optimizers.projected import _generator

RATES = Rates(learning_rate=1e-2, weight_decay=0.1, seed=5)
SHAPES = [(6, 10), (10, 6), (8, 8)]
STEPS = 7
# float32 against float64 after a few steps of size 1e-2
CLOSE = 2e-6


def gradients(shape: tuple[int, ...], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * 3**step for step in range(STEPS)]


def stepped(method: Any, shapes: Sequence[tuple[int, ...]] = SHAPES, pause: int | None = None) -> list[Tensor]:
    """Matrices after some steps. At `pause`, another optimizer goes on with the state of the first."""

    def made() -> Optimizer:
        found = method.build(layers, RATES)
        assert found is not None
        return found

    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(columns, rows, bias=False) for rows, columns in shapes)
    optimizer = made()
    for step in range(STEPS):
        if step == pause:
            kept = optimizer.state_dict()
            optimizer = made()
            torch.randn(3)  # whatever else is drawn
            optimizer.load_state_dict(kept)
        for number, layer in enumerate(layers.parameters()):
            layer.grad = gradients(tuple(layer.shape), number)[step]
        optimizer.step()
    return [one.detach() for one in layers.parameters()]


def by_hand(step: Callable[[Tensor, Tensor, dict[str, Any], int, int], Tensor]) -> list[Tensor]:
    """The same with `step(matrix, gradient, state, number of the step, number of the matrix)`, in float64."""
    torch.manual_seed(0)
    found = []
    for number, (rows, columns) in enumerate(SHAPES):
        matrix = nn.Linear(columns, rows, bias=False).weight.detach().double()
        state: dict[str, Any] = {"m": 0.0, "v": 0.0}
        for count, gradient in enumerate(gradients((rows, columns), number)):
            matrix = matrix * (1 - RATES.learning_rate * RATES.weight_decay)
            matrix = matrix - step(matrix, gradient.double(), state, count, number)
        found.append(matrix)
    return found


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=CLOSE)


def adam(state: dict[str, Any], gradient: Tensor) -> Tensor:
    state["m"] = 0.9 * state["m"] + 0.1 * gradient
    state["v"] = 0.999 * state["v"] + 0.001 * gradient**2
    found: Tensor = state["m"] / (state["v"].sqrt() + 1e-8)
    return found


def correction(count: int) -> float:
    return math.sqrt(1 - 0.999 ** (count + 1)) / (1 - 0.9 ** (count + 1))


@pytest.mark.parametrize("rank", [1, 4])
def test_galore_is_algorithm_2_of_its_paper(rank: int) -> None:
    def step(matrix: Tensor, gradient: Tensor, state: dict[str, Any], count: int, number: int) -> Tensor:
        if count % 3 == 0:
            U, _, Vh = torch.linalg.svd(gradient)
            state["P"], state["Q"] = (
                torch.stack([one * torch.sign(max(one, key=abs)) for one in vectors], dim=1)
                for vectors in (U.T[:rank], Vh[:rank])
            )
        P, Q = state["P"], state["Q"]
        if gradient.shape[0] <= gradient.shape[1]:
            back = P @ adam(state, P.T @ gradient)
        else:
            back = adam(state, gradient @ Q) @ Q.T
        return RATES.learning_rate * 0.25 * correction(count) * back

    assert_equal(stepped(Galore(rank=rank, every=3)), by_hand(step))


@pytest.mark.parametrize("per", ["channel", "tensor"])
def test_apollo_is_algorithm_1_of_its_paper(per: Any) -> None:
    rank = 2

    def step(matrix: Tensor, gradient: Tensor, state: dict[str, Any], count: int, number: int) -> Tensor:
        turned = gradient.shape[0] > gradient.shape[1]
        G = gradient.T if turned else gradient
        if count % 3 == 0:
            drawn = torch.randn(rank, len(G), generator=_generator(RATES.seed, number, count))
            state["P"] = drawn.double() / math.sqrt(rank)
        R = state["P"] @ G
        N = adam(state, R)
        if per == "channel":
            scaled = torch.stack([G[:, j] * N[:, j].norm() / R[:, j].norm() for j in range(G.shape[1])], dim=1)
        else:
            scaled = G * N.norm() / R.norm()
        if "norm" in state and scaled.norm() > 1.01 * state["norm"]:  # the gradients here grow, so it is
            scaled = scaled * 1.01 * state["norm"] / scaled.norm()
        state["norm"] = scaled.norm()
        return RATES.learning_rate * correction(count) * (scaled.T if turned else scaled)

    assert_equal(stepped(Apollo(rank=rank, every=3, per=per)), by_hand(step))


def test_apollo_goes_on_after_a_step_without_a_gradient() -> None:
    layer = nn.Linear(6, 6, bias=False)
    optimizer = Apollo(rank=2).build(layer, RATES)
    assert optimizer is not None
    layer.weight.grad = torch.zeros(6, 6)
    optimizer.step()
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.ones(6, 6)
    optimizer.step()
    assert (layer.weight - before).abs().min() > 1e-3


def test_apollo_draws_by_the_seed_of_the_tuner() -> None:
    def drawn(seed: int, number: int, step: int) -> Tensor:
        return Apollo(rank=2).basis(torch.zeros(5, 9), _generator(seed, number, step))

    assert torch.equal(drawn(1, 0, 0), drawn(1, 0, 0))
    assert len({drawn(*key).sum().item() for key in ((1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 200))}) == 4


@pytest.mark.parametrize("adjust", ["match_rms_adamw", "original"])
def test_muon_is_orthogonalised_momentum(adjust: Any) -> None:
    """torch iterates in bfloat16: singular values come out around 1, and the step is compared by what it points at."""
    shape = (6, 10)
    torch.manual_seed(0)
    layer = nn.Linear(shape[1], shape[0], bias=False)
    optimizer = Muon(adjust=adjust).build(layer, Rates(1e-2, 0.0, 0))
    assert optimizer is not None
    momentum = torch.zeros(shape)
    for gradient in gradients(shape, 0):
        before = layer.weight.detach().clone()
        layer.weight.grad = gradient
        optimizer.step()
        momentum = 0.95 * momentum + 0.05 * gradient
        U, _, Vh = torch.linalg.svd(0.05 * gradient + 0.95 * momentum, full_matrices=False)
        size = 0.2 * math.sqrt(max(shape)) if adjust == "match_rms_adamw" else math.sqrt(max(1, shape[0] / shape[1]))
        change = (before - layer.weight.detach()) / (1e-2 * size)
        values = torch.linalg.svdvals(change)
        assert values.min() > 0.6 and values.max() < 1.3
        assert torch.nn.functional.cosine_similarity(change.flatten(), (U @ Vh).flatten(), dim=0) > 0.97


@pytest.mark.parametrize("method", [Galore(rank=4, every=3), Apollo(rank=4, every=3), Muon()], ids=lambda one: one.name)
@pytest.mark.parametrize("pause", [1, 3, 5])
def test_a_state_that_is_put_back_goes_on_the_same(method: Any, pause: int) -> None:
    """GaLore and APOLLO leave two of the matrices to AdamW."""
    shapes = [*SHAPES, (4, 9), (3, 3)]
    for one, other in zip(stepped(method, shapes), stepped(method, shapes, pause), strict=True):
        assert torch.equal(one, other)


def test_memory_is_what_the_catalogue_says() -> None:
    """`rank (s + 2 l)`, and one number for the limiter of APOLLO; Muon one number per entry."""
    for method, most in ((Galore(rank=2), 2 * (6 + 2 * 10)), (Apollo(rank=2), 2 * (6 + 2 * 10) + 1), (Muon(), 60)):
        layer = nn.Linear(10, 6, bias=False)
        optimizer = method.build(layer, RATES)
        assert optimizer is not None
        layer.weight.grad = torch.ones(6, 10)
        optimizer.step()
        state = optimizer.state_dict()["state"][0]
        assert sum(one.numel() for one in state.values() if isinstance(one, Tensor)) == most


def test_everything_that_learns_is_stepped_once_and_vectors_do_not_decay() -> None:
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    model = transformers.BertForMaskedLM(config)
    model.bert.encoder.layer[0].attention.self.query.weight.requires_grad_(False)
    parts = split(model, "muon")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert not any("embeddings" in names[id(one)] or "decoder" in names[id(one)] for one in parts.hidden)
    assert all(one.ndim == 1 for one in parts.vectors)
    for method in (Muon(), Galore(rank=8), Apollo(rank=8)):
        optimizer = method.build(model, RATES)
        assert optimizer is not None
        seen = [id(one) for group in optimizer.param_groups for one in group["params"]]
        assert sorted(seen) == sorted(id(one) for one in model.parameters() if one.requires_grad)
        decays = {id(one): group["weight_decay"] for group in optimizer.param_groups for one in group["params"]}
        assert {decays[id(one)] for one in parts.vectors} == {0.0}
        assert {decays[id(one)] for one in (*parts.hidden, *parts.other)} == {0.1}


def test_a_schedule_reaches_both_of_a_pair() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    optimizer = Muon().build(model, RATES)
    assert optimizer is not None
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    for moved in (True, False):
        before = [one.detach().clone() for one in model.parameters()]
        for one in model.parameters():
            one.grad = torch.ones_like(one)
        optimizer.step()
        schedule.step()
        assert [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)] == [moved, moved]


def test_adamw_is_the_trainers_own() -> None:
    assert AdamW().build(nn.Linear(2, 2), RATES) is None


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: Muon(momentum=1.0), r"momentum must be in \[0, 1\), found 1.0"),
        (lambda: Galore(rank=0), "rank must be positive, found 0"),
        (lambda: Galore(every=0), "every must be positive, found 0"),
        (lambda: Apollo(scale=-1.0), "scale must be positive, found -1.0"),
        (
            lambda: Galore(rank=8).build(nn.Linear(8, 9), RATES),
            "rank of optimizer galore must be less than 8, the shor",
        ),
        (
            lambda: Muon().build(nn.LayerNorm(4), RATES),
            "works on matrices, and none of the parameters that learn is on",
        ),
    ],
)
def test_what_cannot_be_is_refused(made: Callable[[], object], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        made()
