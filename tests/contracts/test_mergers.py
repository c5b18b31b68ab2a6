"""The contract of mergers: what every merger promises. The table drives it, so a new merger is tested when listed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

import pytest
import safetensors.torch
import torch
from torch import Tensor

from storage.blobs import encode_parts
from storage.errors import InvalidInput
from storage.manifest import canonical
from tasks.choice import Choice
from tasks.mergers import MERGERS, Average, Opcm, Parts, Sequential, Target, TaskArithmetic, Ties
from tests.builders import random_tensors, role_of

State = tuple[dict[str, Parts], Mapping[str, float]]
Update = dict[str, Tensor]


def fold(
    merger: Sequential, state: State | None, update: Update, role: Callable[[str, Tensor], str] = role_of
) -> State:
    """What `fold_update` does, without a store."""
    before, facts = state if state is not None else ({}, {})
    merged = None if state is None else lambda: delta(merger, state, role).values()
    survey = merger.survey(lambda: update.values(), merged)
    parts: dict[str, Parts] = {}
    sums: dict[str, float] = {}
    for name, tau in update.items():
        target = Target(name, role(name, tau))
        parts[name], share = merger.fold(before.get(name), tau, target, facts, survey)
        for key, value in share.items():
            sums[key] = sums.get(key, 0.0) + value
    return parts, merger.close(facts, sums, survey)


def fold_all(merger: Sequential, updates: list[Update]) -> State:
    state = None
    for update in updates:
        state = fold(merger, state, update)
    assert state is not None
    return state


def delta(merger: Sequential, state: State, role: Callable[[str, Tensor], str] = role_of) -> Update:
    parts, facts = state
    shapes = random_tensors(0)  # a role needs the shape, which a state's parts need not show
    return {
        name: merger.delta(one, facts, Target(name, role(name, shapes.get(name, next(iter(one.values()))))))
        for name, one in parts.items()
    }


def updates(count: int) -> list[Update]:
    return [random_tensors(seed, size=1e-3) for seed in range(count)]


def zeros() -> Update:
    return {name: torch.zeros_like(tensor) for name, tensor in random_tensors(0).items()}


def through_store(state: State) -> State:
    """Parts as safetensors bytes and facts as canonical JSON, and back: all that is kept between two merges."""
    parts, facts = state
    read = {name: safetensors.torch.load(encode_parts(one)) for name, one in parts.items()}
    return read, json.loads(canonical(dict(facts)))


SEQUENTIAL = {name: kind for name, kind in MERGERS.items() if issubclass(kind, Sequential)}


@pytest.fixture(params=SEQUENTIAL.values(), ids=SEQUENTIAL.keys())
def merger(request: pytest.FixtureRequest) -> Sequential:
    """Every sequential merger of the table, with its defaults."""
    made: Sequential = request.param()
    return made


@pytest.mark.parametrize("count", [1, 2, 5])
def test_merged_deltas_are_finite_and_have_the_shape(merger: Sequential, count: int) -> None:
    merged = delta(merger, fold_all(merger, updates(count)))
    for name, tensor in random_tensors(0).items():
        assert merged[name].shape == tensor.shape
        assert merged[name].dtype == tensor.dtype
        assert torch.isfinite(merged[name]).all()
        assert merged[name].any()


def test_resuming_from_a_file_changes_no_bit(merger: Sequential) -> None:
    kept, resumed = fold(merger, None, updates(1)[0]), through_store(fold(merger, None, updates(1)[0]))
    for update in updates(4)[1:]:
        kept, resumed = fold(merger, kept, update), through_store(fold(merger, resumed, update))
    assert kept[1] == resumed[1]
    for name, tensor in delta(merger, kept).items():
        assert torch.equal(tensor, delta(merger, resumed)[name]), name


def test_the_state_does_not_grow(merger: Sequential) -> None:
    def size(count: int) -> int:
        return sum(len(encode_parts(parts)) for parts in fold_all(merger, updates(count))[0].values())

    if merger.name == "tsv_m":  # its tasks share out what the first one had alone, and the division leaves a rest
        assert max(map(size, range(2, 9))) <= size(1)
    else:
        assert size(2) == size(8)


def test_folding_leaves_its_inputs_alone(merger: Sequential) -> None:
    state = fold_all(merger, updates(2))
    before = through_store(state)
    update = updates(3)[2]
    fold(merger, state, update)
    delta(merger, state)
    assert all(torch.equal(update[name], tensor) for name, tensor in updates(3)[2].items())
    assert state[1] == before[1]
    for name, parts in state[0].items():
        assert all(torch.equal(part, before[0][name][key]) for key, part in parts.items())


def test_updates_of_zeros_only_merge_to_zeros(merger: Sequential) -> None:
    merged = delta(merger, fold_all(merger, [zeros(), zeros(), zeros()]))
    assert all(torch.equal(tensor, torch.zeros_like(tensor)) for tensor in merged.values())


@pytest.mark.parametrize("merger", [kind() for name, kind in SEQUENTIAL.items() if name != "tsv_m"], ids=str)
def test_an_update_of_zeros_turns_no_direction(merger: Sequential) -> None:
    """It may weaken what is there (a mean has one more member), tensor by tensor by the same factor.

    Not so TSV-M, where every newcomer takes directions from the others. Iso-C adds matrices up and averages the rest.
    """
    before = fold_all(merger, updates(2))
    after = delta(merger, fold(merger, before, zeros()))
    factors: dict[bool, list[float]] = {False: [], True: []}
    for name, tensor in delta(merger, before).items():
        factor = float((after[name] * tensor).sum() / tensor.square().sum())
        torch.testing.assert_close(after[name], tensor * factor)
        factors[merger.name == "iso_c" and tensor.ndim == 2].append(factor)
    for alike in filter(None, factors.values()):
        assert alike == pytest.approx([alike[0]] * len(alike), rel=1e-5)
        assert 0 < alike[0] < 1 + 1e-6


def test_the_first_update_after_zeros_is_merged(merger: Sequential) -> None:
    """A line may begin with an update that changed nothing; what follows must not be swallowed, nor become NaN."""
    update = updates(1)[0]
    merged = delta(merger, fold_all(merger, [zeros(), update]))
    for name, tensor in merged.items():
        assert torch.isfinite(tensor).all()
        assert float((tensor * update[name]).sum()) > 0


@pytest.mark.parametrize("merger", [Average(), TaskArithmetic(), Ties(), Ties(aggregate="sum")], ids=str)
def test_order_does_not_matter(merger: Sequential) -> None:
    """Up to the rounding of sums; the updates differ enough that a wrong order would show."""
    several = updates(4)
    expected = delta(merger, fold_all(merger, several))
    for order in [(3, 2, 1, 0), (2, 0, 3, 1)]:
        found = delta(merger, fold_all(merger, [several[place] for place in order]))
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-9)


def test_order_does_matter_to_opcm() -> None:
    several = updates(3)
    there, back = (delta(Opcm(), fold_all(Opcm(), one)) for one in (several, several[::-1]))
    assert not torch.allclose(there["layer.weight"], back["layer.weight"], rtol=0.01)


def test_each_tensor_can_be_folded_alone(merger: Sequential) -> None:
    """Given the facts, a tensor's parts depend on no other tensor: so tensors may be folded anywhere."""
    several = updates(3)
    state = fold_all(merger, several[:2])
    survey = merger.survey(lambda: several[2].values(), lambda: delta(merger, state).values())
    whole = fold(merger, state, several[2])
    for name, update in reversed(several[2].items()):
        parts, _ = merger.fold(state[0][name], update, Target(name, role_of(name, update)), state[1], survey)
        assert all(torch.equal(part, whole[0][name][key]) for key, part in parts.items())


def test_settings_are_all_a_merger_is(merger: Sequential) -> None:
    assert isinstance(merger, Choice)
    spec = json.loads(canonical(merger.spec()))
    assert MERGERS[merger.name](**spec) == merger


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (Opcm, {"alpha": -0.1}),
        (Opcm, {"alpha": 1.0}),
        (Ties, {"density": 0.0}),
        (Ties, {"density": 1.1}),
        (Ties, {"scale": 0.0}),
        (TaskArithmetic, {"scale": -1.0}),
    ],
)
def test_invalid_settings(kind: type, settings: dict[str, float]) -> None:
    with pytest.raises(InvalidInput, match=next(iter(settings))):
        kind(**settings)
