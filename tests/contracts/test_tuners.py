"""The contract of tuners and optimizers: what all of them promise. The tables drive it: what is listed is tested.

Every case trains on the real digits; what is stored is what was trained, nothing else changes, and a training that was
stopped ends with the same bytes.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, set_seed

from storage.artifacts import ArtifactStore
from storage.objects import MemoryObjects
from tasks.checkpoints import HISTORY, load_model, skeleton_of
from tasks.data import Digits
from tasks.digits_base import DigitsBase, train_digits_base
from tasks.evaluate import evaluate, leading
from tasks.extract import Extract, extract_update
from tasks.fine_tune import fine_tune, train
from tasks.materialize import materialize
from tasks.merge import fold_update
from tasks.mergers import Average
from tasks.optimizers import OPTIMIZERS
from tasks.recipe import Recipe
from tasks.suites import ImageClassification
from tasks.suites.heads import Orthonormal
from tasks.tensors import read_delta, read_tensor
from tasks.tuners import TUNERS, AnyTuner, Factors, Full, Lora
from tasks.tuners.adapter import Adapter
from tasks.tuners.targets import find
from tests.builders import ingested

SUITE = ImageClassification(data=Digits(view="rot90", limit=128), head=Orthonormal())
SCHEDULE: dict[str, Any] = {"steps": 12, "batch": 16, "learning_rate": 1e-2}
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "full": [{}],  # and all weights by every optimizer, below
    "lora": [
        {"rank": 4, "dropout": 0.2},
        {"rank": 4, "rslora": True, "ratio": 8.0, "learning_rate": 2e-3},
        {"rank": 4, "dora": True, "targets": "all"},
        {"rank": 4, "targets": ("q_proj", "fc1")},
    ],
    "adalora": [{"rank": 2, "initial": 4}, {"rank": 2, "initial": 4, "targets": "all"}],
    "randlora": [{"rank": 8}, {"rank": 8, "sparse": True}],
    "osf": [{}],
    "shira": [{"rank": 2}, {"rank": 2, "mask": "magnitude"}],
}
STEPS: dict[str, dict[str, Any]] = {  # of optimizers: small, so that subspaces are renewed within a training
    "galore": {"rank": 4, "every": 4, "scale": 1.0},
    "apollo": {"rank": 4, "every": 4},
}
MADE = {name: kind(**STEPS.get(name, {})) for name, kind in OPTIMIZERS.items()}
# a tuner or an optimizer that is in none of these tables is tried with its defaults
CASES: dict[str, AnyTuner] = {
    " ".join([name, *(one for one in settings if one != "learning_rate")]): kind(**{**SCHEDULE, **settings})
    for name, kind in TUNERS.items()
    for settings in SETTINGS.get(name, [{}])
}
CASES |= {f"full by {name}": Full(**SCHEDULE, weights="all", optimizer=one) for name, one in MADE.items()}
CASES["lora by muon"] = Lora(**SCHEDULE, rank=4, optimizer=MADE["muon"], schedule="linear")
EVERY = pytest.mark.parametrize("case", CASES)

# two orders of the same float32 operations, on weights and activations of the size of 1
WEIGHTS, OUTPUTS = 2e-6, 2e-5

STORE = ArtifactStore(MemoryObjects())


@pytest.fixture(scope="module", autouse=True)
def _little_garbage() -> Iterator[None]:
    """Each training begins with a collection by accelerate, which takes longer than its steps among all modules."""
    gc.freeze()
    yield
    gc.unfreeze()


class Task:
    name = "rot90"
    suite = SUITE


@dataclass(frozen=True)
class InMemory:
    """A training that is not stored: the base, the names of its frozen parameters, and what it learned."""

    before: dict[str, Tensor]
    after: dict[str, Tensor]  # all parameters, of adapters too
    frozen: set[str]
    outputs: Tensor
    given: dict[str, Tensor | Factors]


@cache
def base() -> Any:
    return train_digits_base(DigitsBase(width=32, steps=60), STORE)


@cache
def tuned(case: str) -> Any:
    return fine_tune(base(), "rot90", SUITE, CASES[case], STORE)


@cache
def trained(case: str) -> InMemory:
    """The same training once more, with its adapters still beside the weights."""
    source, tuner = STORE.open(base()), CASES[case]
    problem, skeleton = SUITE.open(source), skeleton_of(source)
    torch.manual_seed(len(case))  # whatever was drawn before
    with torch.random.fork_rng():
        model = load_model(source, dtype=torch.float32)
        before = copies(model)
        set_seed(tuner.seed)
        tuner.attach(model, skeleton)
        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        train(problem.wrap(model), problem, tuner, "cpu", lambda done, total, note: None)
    model.eval()
    return InMemory(before, copies(model), frozen, outputs(model), dict(tuner.collect(model, skeleton)))


def copies(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def outputs(model: PreTrainedModel) -> Tensor:
    pixels = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found: Tensor = model(pixel_values=pixels).last_hidden_state
    return found


@EVERY
def test_the_loss_falls(case: str) -> None:
    losses = [point["loss"] for point in json.loads(STORE.open(tuned(case)).asset(HISTORY))]
    assert len(losses) == SCHEDULE["steps"]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


@EVERY
def test_the_base_is_untouched_while_a_tuner_trains(case: str) -> None:
    """Weights that are frozen stay as they were, bit for bit, under an adapter too."""
    found = trained(case)
    held = {name.replace(".base_layer.", "."): found.after[name] for name in found.frozen}
    kept = {name for name in held if name in found.before}
    assert bool(kept) == (getattr(CASES[case], "weights", "") != "all")
    assert all(torch.equal(held[name], found.before[name]) for name in kept)


@EVERY
def test_equal_seeds_give_equal_bytes_and_only_what_should_change_changed(case: str) -> None:
    source, after, given = STORE.open(base()), STORE.open(tuned(case)), trained(case).given
    for record in after.manifest.tensors:
        old, value = source.record(record.name), given.get(record.name)
        assert (record.shape, record.role) == (old.shape, old.role)
        if isinstance(value, Factors):
            assert record.onto == old.blob
            assert torch.equal(after.parts(record.name)["A.tensor"], value.A)
            assert torch.equal(after.parts(record.name)["B.tensor"], value.B)
        elif value is not None:
            assert torch.equal(read_tensor(after, record.name), value)
        else:
            assert record == old
    roles = {source.record(name).role for name in given}
    targets = getattr(CASES[case], "targets", "")
    if getattr(CASES[case], "weights", "") != "all":
        assert roles == {"linear.weight", "conv.weight"} if targets == "all" else {"linear.weight"}
    if isinstance(targets, tuple):
        assert {name.split(".")[-2] for name in given} == set(targets)


@EVERY
def test_what_is_stored_is_what_was_trained(case: str) -> None:
    before, after = (outputs(load_model(STORE.open(ref))) for ref in (base(), tuned(case)))
    assert (after - before).abs().max() > 0.02
    # a product added to the output, or to the weight first
    torch.testing.assert_close(after, trained(case).outputs, rtol=0, atol=OUTPUTS)


def merged_by_peft(case: str) -> dict[str, Tensor]:
    """What peft's own wrapper makes of the numbers that were learned: `merge_and_unload`."""
    from peft import get_peft_model

    source, tuner, learned = STORE.open(base()), CASES[case], trained(case).after
    assert isinstance(tuner, Adapter)
    with torch.random.fork_rng():
        model = load_model(source, dtype=torch.float32)
        layers = find(tuner.targets, skeleton_of(source), tuner.adapts, tuner.name)
        set_seed(tuner.seed)  # of SHiRA's places
        wrapped = get_peft_model(model, tuner.config("|".join(layer.path for layer in layers)))
    names = {name.removeprefix("base_model.model."): parameter for name, parameter in wrapped.named_parameters()}
    assert set(names) == set(learned)
    with torch.no_grad():
        for name, parameter in names.items():
            if parameter.requires_grad:
                parameter.copy_(learned[name])
    return dict(wrapped.merge_and_unload().state_dict())


@EVERY
def test_the_update_is_merged_minus_pristine_base(case: str) -> None:
    source, found = STORE.open(base()), trained(case)
    update = STORE.open(extract_update(base(), tuned(case), Extract(), STORE))
    merged = merged_by_peft(case) if isinstance(CASES[case], Adapter) else found.after
    assert set(merged) == set(found.before)
    for name, slot in skeleton_of(source).slots.items():
        change = merged[slot.memory] - found.before[slot.memory]
        torch.testing.assert_close(read_delta(update, name), change, rtol=0, atol=WEIGHTS)
        assert torch.equal(read_tensor(source, name), found.before[slot.memory])


@EVERY
def test_the_update_merges(case: str) -> None:
    update = extract_update(base(), tuned(case), Extract(), STORE)
    after = STORE.open(tuned(case))
    merged = STORE.open(materialize(base(), fold_update(base(), None, update, Recipe(Average()), STORE), STORE))
    for name in after.names:
        torch.testing.assert_close(read_tensor(merged, name), read_tensor(after, name), rtol=0, atol=WEIGHTS)


@pytest.mark.parametrize("name", TUNERS)
def test_small_changes_of_a_bfloat16_base_are_not_rounded_away(name: str, tmp_path: Path) -> None:
    """The masters are float32: steps far below what bfloat16 can tell apart are in the update."""
    half = ingested(load_model(STORE.open(base())).to(torch.bfloat16), tmp_path, STORE)
    small = replace(next(one for one in CASES.values() if one.name == name), learning_rate=1e-5, steps=4)
    after = STORE.open(fine_tune(half, "rot90", SUITE, small, STORE))
    update = STORE.open(extract_update(half, after.ref, Extract(), STORE))
    source = STORE.open(half)
    assert {record.dtype for record in source.manifest.tensors} == {"BF16"}
    changed = [record.name for record in after.manifest.tensors if record != source.record(record.name)]
    assert {after.record(one).dtype for one in changed} == {"F32"}
    deltas = {one: read_delta(update, one) for one in changed if "pooler" not in one}  # which the digits do not reach
    assert all(bool((delta != 0).any()) for delta in deltas.values())
    lost = [read_tensor(source, one) + delta.bfloat16() == read_tensor(source, one) for one, delta in deltas.items()]
    assert torch.cat([one.flatten() for one in lost]).float().mean() > 0.5  # had the weights been bfloat16


@EVERY
def test_factors_are_where_the_change_is_low_rank(case: str) -> None:
    """Of no higher rank than the tuner says."""
    after, update = STORE.open(tuned(case)), STORE.open(extract_update(base(), tuned(case), Extract(), STORE))
    low = CASES[case].name in ("lora", "adalora") and not getattr(CASES[case], "dora", False)
    most = getattr(CASES[case], "initial", getattr(CASES[case], "rank", 0))
    ranks = {record.name: record.rank for record in after.manifest.tensors if record.rank is not None}
    assert bool(ranks) == low
    for name, rank in ranks.items():
        assert rank <= most
        assert update.record(name).rank == rank
        assert torch.linalg.matrix_rank(read_delta(update, name).double(), rtol=1e-5) <= rank


class Stop(Exception):
    """What a test stops a training with."""


def stop_at(step: int) -> Callable[[int, int, str], None]:
    def report(done: int, total: int, note: str) -> None:
        if done == step:
            raise Stop

    return report


@EVERY
def test_a_training_that_was_stopped_ends_with_the_same_bytes(case: str) -> None:
    """While AdaLoRA's ranks shrink and between two renewals of a subspace; near the end, where those ranks stay."""
    tuner, known = replace(CASES[case], save_every=3), tuned(case)
    for step in (5, 11) if CASES[case].name == "adalora" else (5,):
        with pytest.raises(Stop):
            fine_tune(base(), "rot90", SUITE, tuner, STORE, report=stop_at(step))
    seen: list[int] = []
    again = fine_tune(base(), "rot90", SUITE, tuner, STORE, report=lambda done, total, note: seen.append(done))
    assert seen == list(range(step - step % 3, 13))
    assert again == known


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@EVERY
def test_a_gpu_trains_about_the_same_and_goes_on(case: str) -> None:
    """What is saved comes back to where the model is."""
    tuner = replace(CASES[case], save_every=3)
    with pytest.raises(Stop):
        fine_tune(base(), "rot90", SUITE, tuner, STORE, "cuda", stop_at(5))
    after = STORE.open(fine_tune(base(), "rot90", SUITE, tuner, STORE, "cuda"))
    losses = [[point["loss"] for point in json.loads(one.asset(HISTORY))] for one in (STORE.open(tuned(case)), after)]
    # sums in another order; where neurons drop out, which ones is up to another generator
    assert losses[1] == pytest.approx(losses[0], rel=0.2 if getattr(tuner, "dropout", 0) else 0.05)


@pytest.mark.parametrize("name", TUNERS)
def test_it_learns(name: str) -> None:
    """A hundred steps are far from the base, which has never seen this head."""
    small = {"adalora": {"initial": 8, "rank": 4}, "lora": {"learning_rate": 2e-3}}
    whole = replace(SUITE, data=Digits(view="rot90"))

    class Whole:
        name = "rot90"
        suite = whole

    after = fine_tune(base(), "rot90", whole, TUNERS[name](steps=100, batch=32, **small.get(name, {})), STORE)
    accuracy = [leading(STORE.open(evaluate(model, [Whole()], STORE)))["rot90"] for model in (base(), after)]
    assert accuracy[0] < 0.3
    assert accuracy[1] > 0.6
