"""A training that was stopped goes on at its last save, and ends with the very bytes of one that was left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from storage.artifacts import ArtifactStore
from storage.directory import DirectoryObjects
from storage.errors import InvalidInput
from storage.objects import MemoryObjects
from storage.refs import CheckpointRef
from storage.saves import Saves
from tasks.data import Digits
from tasks.digits_base import DigitsBase, train_digits_base
from tasks.fine_tune import fine_tune
from tasks.resume import flattened, unflattened
from tasks.suites import ImageClassification
from tasks.suites.heads import Orthonormal
from tasks.tuners import AnyTuner, Full, Lora

SUITE = ImageClassification(data=Digits(view="rot90", limit=128, holdout=0.25), head=Orthonormal())
BASE = DigitsBase(width=32, steps=10)
# four steps an epoch; dropout draws from the global generator at every step
LORA = Lora(rank=4, dropout=0.3, steps=14, batch=16, accumulate=2, learning_rate=2e-3)


class Stop(Exception):
    """What a test stops a training with."""


def stop_at(step: int) -> Callable[[int, int, str], None]:
    def report(done: int, total: int, note: str) -> None:
        if done == step:
            raise Stop

    return report


@pytest.fixture(scope="module")
def store() -> ArtifactStore:
    return ArtifactStore(MemoryObjects())


@pytest.fixture(scope="module")
def base(store: ArtifactStore) -> CheckpointRef:
    return train_digits_base(BASE, store)


def saved(store: ArtifactStore) -> list[str]:
    return list(store.objects.list("training/"))


@pytest.mark.parametrize(
    ("tuner", "stop"),
    [
        (replace(LORA, save_every=3), 8),  # in the middle of an epoch, two after the last save
        (replace(LORA, save_every=4), 9),  # at the end of one
        (replace(LORA, save_every=3, validate_every=2, patience=5), 11),
        (Full(steps=14, batch=16, accumulate=2, save_every=5, weights="all"), 13),
    ],
    ids=["middle", "epoch", "validated", "full"],
)
def test_a_stopped_training_ends_as_if_it_had_not_been(
    store: ArtifactStore, base: CheckpointRef, tuner: AnyTuner, stop: int
) -> None:
    undisturbed = fine_tune(base, "rot90", SUITE, tuner, store)
    assert saved(store) == []  # nothing is left of a training that ended
    with pytest.raises(Stop):
        fine_tune(base, "rot90", SUITE, tuner, store, report=stop_at(stop))
    last = stop - 1 - (stop - 1) % tuner.save_every
    assert {key.split("/")[2] for key in saved(store)} == {f"{last:010d}"}  # the newest alone
    seen: list[int] = []
    resumed = fine_tune(base, "rot90", SUITE, tuner, store, report=lambda done, total, note: seen.append(done))
    assert resumed == undisturbed  # weights, losses and all
    assert seen == list(range(last, tuner.steps + 1))
    assert saved(store) == []


def test_saving_changes_nothing(store: ArtifactStore, base: CheckpointRef) -> None:
    refs = {fine_tune(base, "rot90", SUITE, replace(LORA, save_every=every), store) for every in (0, 1, 500)}
    assert len(refs) == 1


def test_a_training_is_never_resumed_with_other_settings(store: ArtifactStore, base: CheckpointRef) -> None:
    with pytest.raises(Stop):
        fine_tune(base, "rot90", SUITE, replace(LORA, save_every=2), store, report=stop_at(5))
    seen: list[int] = []
    other = replace(LORA, seed=1)
    fine_tune(base, "rot90", SUITE, other, store, report=lambda done, total, note: seen.append(done))
    assert seen[0] == 1
    assert saved(store)  # that of the first is still there
    fine_tune(base, "rot90", SUITE, LORA, store)
    assert saved(store) == []


def test_damaged_saves_are_passed_over(store: ArtifactStore, base: CheckpointRef) -> None:
    undisturbed = fine_tune(base, "rot90", SUITE, LORA, store)
    with pytest.raises(Stop):
        fine_tune(base, "rot90", SUITE, replace(LORA, save_every=4), store, report=stop_at(6))
    key = next(key for key in saved(store) if not key.endswith("state"))
    data = bytearray(store.objects.get(key))
    data[-1] ^= 1
    store.objects.put(key, bytes(data))
    assert fine_tune(base, "rot90", SUITE, LORA, store) == undisturbed


def test_saves_are_safetensors_and_json(store: ArtifactStore, base: CheckpointRef) -> None:
    import json

    from safetensors.torch import load

    with pytest.raises(Stop):
        fine_tune(base, "rot90", SUITE, replace(LORA, save_every=4), store, report=stop_at(6))
    tensors: dict[str, torch.Tensor] = {}
    for key in saved(store):
        data = store.objects.get(key)
        if key.endswith("state"):
            names = json.loads(data)
        else:
            tensors |= load(data)
    assert names["files"]
    assert {"save.generators.torch", "save.optimizer.state.0.exp_avg"} <= set(tensors)
    assert all(bool(torch.isfinite(one).all()) for one in tensors.values() if one.is_floating_point())
    fine_tune(base, "rot90", SUITE, LORA, store)


def test_a_diverged_training_keeps_the_last_good_save(store: ArtifactStore, base: CheckpointRef) -> None:
    refs = set(store.refs())
    hot = Full(steps=8, batch=16, learning_rate=1e12, clip=1e30, save_every=1, warmup=0.9)
    with pytest.raises(InvalidInput, match=r"NaN or infinite at step (\d+) of 8.*Lower learning_rate") as caught:
        fine_tune(base, "rot90", SUITE, hot, store)
    steps = {int(key.split("/")[2]) for key in saved(store)}
    step = int(str(caught.value).partition("at step ")[2].split()[0])
    assert steps == {step - 1}
    assert f"after step {step - 1}, the last that was saved, is kept" in str(caught.value)
    assert set(store.refs()) == refs
    Saves(store.objects, saved(store)[0].split("/")[1]).clear()


SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from storage.artifacts import ArtifactStore
from storage.directory import DirectoryObjects
from tasks.digits_base import train_digits_base
from tasks.fine_tune import fine_tune
from tests.tasks.test_resume_training import BASE, LONG, SUITE
store = ArtifactStore(DirectoryObjects(Path(sys.argv[1])))
print(fine_tune(train_digits_base(BASE, store), "rot90", SUITE, LONG, store))
"""
LONG = replace(LORA, steps=150, save_every=5, validate_every=10)


def test_a_process_killed_with_sigkill_goes_on(store: ArtifactStore, base: CheckpointRef, tmp_path: Path) -> None:
    undisturbed = fine_tune(base, "rot90", SUITE, LONG, store)
    objects = DirectoryObjects(tmp_path)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for beyond in (20, 70):
        child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        deadline = time.monotonic() + 120
        while not any(int(key.split("/")[2]) >= beyond for key in objects.list("training/")):
            assert child.poll() is None, child.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.005)
        child.kill()
        child.communicate()
        assert child.returncode == -signal.SIGKILL
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == undisturbed
    assert list(objects.list("training/")) == []


@pytest.mark.parametrize(
    "value",
    [
        {0: {"step": torch.tensor(3.0), "betas": (0.9, 0.999)}, "none": None, "list": [1, [2.5, "x"], {}]},
        (float("inf"), True, {"a": torch.arange(3, dtype=torch.uint8)}),
    ],
)
def test_states_come_back_as_they_were(value: Any) -> None:
    import json

    tensors: dict[str, torch.Tensor] = {}
    plain = json.loads(json.dumps(flattened(value, "x", tensors)))
    found = unflattened(plain, tensors)
    assert str(found) == str(value)


def test_what_would_have_to_be_pickled_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"x\.a is a object, which cannot be saved.*save_every to 0"):
        flattened({"a": object()}, "x", {})
