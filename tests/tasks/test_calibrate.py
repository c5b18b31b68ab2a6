"""What layers are given on a task's examples: the numbers, in one pass or many, and what becomes of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.chain import Task
from storage.artifacts import ArtifactStore
from storage.errors import InvalidInput
from storage.manifest import Lineage
from storage.objects import MemoryObjects
from storage.refs import CheckpointRef, UpdateRef
from tasks.calibrate import calibrated, layer_inputs
from tasks.checkpoints import load_model
from tasks.codecs import Dense
from tasks.codecs.skillpack import SkillPack
from tasks.compress import compress_update
from tasks.data.digits import Digits
from tasks.digits_base import DigitsBase, train_digits_base
from tasks.extract import Extract, extract_update
from tasks.fine_tune import fine_tune
from tasks.suites import ImageClassification
from tasks.suites.base import first
from tasks.suites.heads import Orthonormal
from tasks.tensors import read_delta
from tasks.tuners import Full, Lora
from tests.builders import memory_store

ROWS = 24
CODEC = SkillPack(mlp=((8, 2), (4, 4), (2, 16)), attention=((4, 4), (2, 16)), rivals=(), calibration=ROWS)


@dataclass(frozen=True)
class Tuned:
    store: ArtifactStore
    base: CheckpointRef
    tuned: CheckpointRef
    update: UpdateRef
    task: Task


def tuned_with(tuner: Any) -> Tuned:
    store = memory_store()
    base = train_digits_base(DigitsBase(width=32, steps=40), store)
    task = Task("rot90", ImageClassification(data=Digits(view="rot90"), head=Orthonormal(index=0)))
    model = fine_tune(base, task.name, task.suite, tuner, store)
    return Tuned(store, base, model, extract_update(base, model, Extract(), store), task)


@pytest.fixture(scope="module")
def tuned() -> Tuned:
    return tuned_with(Full(weights="all", steps=40, learning_rate=2e-3))


def read(tuned: Tuned, rows: int = ROWS, room: int = 2**30) -> tuple[dict[str, Tensor], dict[str, Any], list[int]]:
    steps: list[int] = []
    with layer_inputs(
        tuned.update,
        tuned.task,
        tuned.store,
        rows=rows,
        room=room,
        report=lambda done, total, note: steps.append(total),
    ) as found:
        return {name: one() for name, one in found.inputs.items()}, dict(found.facts), steps


def test_the_moments_of_what_each_layer_is_given(tuned: Tuned) -> None:
    """Against one pass over all rows at once: the queries' input is that of the norm before, kept on the way."""
    found, facts, _ = read(tuned)
    model: Any = load_model(tuned.store.open(tuned.tuned))
    problem = tuned.task.suite.open(tuned.store.open(tuned.base))
    batch = problem.collate(list(first(problem.rows("train"), ROWS)))
    seen: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.register_forward_hook(lambda module, given, out, name=name: seen.update({name: out}))
    with torch.inference_mode():
        model(pixel_values=batch["pixel_values"])
    before = seen["layers.0.layernorm_before"].flatten(0, 1)
    wanted = before.T @ before / len(before)
    for which in "qkv":
        name = next(one for one in found if one.startswith("layers.0") and f"{which}_proj" in one)
        torch.testing.assert_close(found[name], wanted, rtol=1e-4, atol=1e-6)
    assert facts["rows"] == ROWS and facts["data"] == tuned.task.suite.fingerprint() and facts["task"] == "rot90"


def test_every_linear_layer_that_is_reached(tuned: Tuned) -> None:
    found, _, _ = read(tuned)
    changed = [
        one
        for one in tuned.store.open(tuned.update).manifest.tensors
        if one.role == "linear.weight" and one.bytes > 200
    ]
    assert len(changed) > 6
    for record in changed:
        if record.name in found:
            assert found[record.name].shape == (record.shape[1], record.shape[1])
            assert found[record.name].dtype == torch.float32 and bool(found[record.name].any())
    assert {one.name for one in changed if "pooler" not in one.name} <= set(found) <= {one.name for one in changed}


def test_many_passes_give_what_one_gives(tuned: Tuned) -> None:
    whole, _, once = read(tuned)
    pieces, _, often = read(tuned, room=4 * 32 * 32 * 3)
    assert whole.keys() == pieces.keys() and set(once) == {ROWS}
    assert len(often) > 3 * len(once) and set(often) == {len(often)}
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)


def test_the_folder_goes_away(tuned: Tuned) -> None:
    with layer_inputs(tuned.update, tuned.task, tuned.store, rows=2) as found:
        one = next(iter(found.inputs.values()))
        folder = Path(one.args[0]).parent  # type: ignore[attr-defined]
        assert len(list(folder.iterdir())) == len(found.inputs)
    assert not folder.exists()


def test_a_codec_that_asks_for_none_gets_none(tuned: Tuned) -> None:
    for codec, task in ((Dense(), tuned.task), (SkillPack(calibration=0), tuned.task), (SkillPack(), None)):
        with calibrated(tuned.update, codec, task, tuned.store) as found:
            assert not found.inputs and not found.facts


def test_compressed_with_inputs(tuned: Tuned) -> None:
    """The layers' outputs come closer, the manifest says of which data, and once more gives the same ref."""
    store = tuned.store
    with calibrated(tuned.update, CODEC, tuned.task, store) as found:
        inputs = {name: one() for name, one in found.inputs.items()}
        refs = [
            compress_update(tuned.update, CODEC, store, inputs=found.inputs, calibration=found.facts) for _ in range(2)
        ]
    plain = compress_update(tuned.update, CODEC, store)
    assert refs[0] == refs[1] != plain
    assert store.open(refs[0]).manifest.facts["calibration"] == dict(found.facts)
    assert "calibration" not in store.open(plain).manifest.facts
    exact, better = store.open(tuned.update), 0
    for name, moments in inputs.items():
        errors = [read_delta(store.open(one), name) - read_delta(exact, name) for one in (refs[0], plain)]
        seen, unseen = (float(((error @ moments) * error).sum()) for error in errors)
        better += seen < unseen
    assert better >= 0.8 * len(inputs)


def test_factors_ask_for_no_inputs() -> None:
    tuned = tuned_with(Lora(rank=2, alpha=4.0, steps=5))
    found, facts, steps = read(tuned)
    assert not found and not steps and facts["rows"] == ROWS
    small = tuned.store.open(compress_update(tuned.update, SkillPack(), tuned.store))
    before = tuned.store.open(tuned.update).manifest.tensors
    factors = {one.name: one for one in before if one.rank is not None}
    assert factors and all(small.record(name) == one for name, one in factors.items())


def test_no_more_rows_than_there_are(tuned: Tuned) -> None:
    problem = tuned.task.suite.open(tuned.store.open(tuned.base))
    few = replace(tuned.task, suite=replace(tuned.task.suite, data=Digits(view="rot90", limit=10)))
    with layer_inputs(tuned.update, few, tuned.store, rows=10_000) as found:
        assert 0 < found.facts["rows"] <= 10 < len(problem.rows("train"))


def test_a_checkpoint_that_is_gone_is_named(tuned: Tuned) -> None:
    objects = tuned.store.objects
    assert isinstance(objects, MemoryObjects)
    store = ArtifactStore(objects)
    for lineage, word in (
        ({"base": tuned.base}, "not in its lineage"),
        ({"base": tuned.base, "tuned": f"checkpoint/{'0' * 64}"}, "no longer stored"),
    ):
        draft = store.draft("update", Lineage("extract", lineage))
        draft.share(tuned.store.open(tuned.update).manifest.tensors[0])
        broken = UpdateRef(draft.commit())
        with pytest.raises(InvalidInput, match=word), layer_inputs(broken, tuned.task, store):
            pass
