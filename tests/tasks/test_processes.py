"""Trainings in several processes: the same mathematics as in one, and no process that outlives who waits for it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest
import torch

from configs.chain import load_chain, presets
from storage.artifacts import ArtifactStore
from storage.directory import DirectoryObjects
from storage.errors import DeltaworksError, InvalidInput
from storage.objects import MemoryObjects
from storage.refs import CheckpointRef
from tasks.choice import plain, restored
from tasks.data import Digits, Jsonl
from tasks.devices import require_trainable
from tasks.digits_base import DigitsBase, train_digits_base
from tasks.fine_tune import fine_tune
from tasks.ingest import Checkpoint, ingest
from tasks.suites import AnySuite, ImageClassification, TextEmbedding
from tasks.suites.heads import Orthonormal
from tasks.tensors import read_tensor
from tasks.tuners import AnyTuner, Full, Lora
from tasks.world import World
from tests.tasks.tiny_bert import save_bert

SUITE = ImageClassification(data=Digits(view="rot90", limit=101, holdout=0.25), head=Orthonormal())
BASE = DigitsBase(width=32, steps=10)
FULL = Full(steps=14, batch=15, learning_rate=1e-3)  # the last batch of an epoch has 11 rows: shares of 5 and 6
DROPOUT = Lora(rank=4, dropout=0.3, steps=60, batch=15, learning_rate=2e-3, processes=2, save_every=5)
CLOSE = 1e-6  # of any weight: gradients are summed in another order; 1e-8 was measured after 14 steps


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ArtifactStore:
    return ArtifactStore(DirectoryObjects(tmp_path_factory.mktemp("processes")))


@pytest.fixture(scope="module")
def base(store: ArtifactStore) -> CheckpointRef:
    return train_digits_base(BASE, store)


def farthest(store: ArtifactStore, one: CheckpointRef, other: CheckpointRef) -> float:
    """The largest difference of any weight."""
    first, second = store.open(one), store.open(other)
    return max(float((read_tensor(first, name) - read_tensor(second, name)).abs().max()) for name in first.names)


def losses(store: ArtifactStore, ref: CheckpointRef) -> list[dict[str, float]]:
    found: list[dict[str, float]] = json.loads(store.open(ref).asset("training.json"))
    return found


def in_one(tuner: AnyTuner) -> AnyTuner:
    return replace(tuner, processes=1, sharding="none")


def ended(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=20)[1]


@pytest.mark.parametrize(
    "tuner",
    [
        pytest.param(
            replace(FULL, processes=2, sharding="fsdp", accumulate=2, validate_every=4), marks=pytest.mark.slow
        ),
        pytest.param(replace(FULL, processes=2, accumulate=2, validate_every=4), marks=pytest.mark.slow),
        pytest.param(replace(FULL, processes=3, sharding="fsdp", gradient_checkpointing=True), marks=pytest.mark.slow),
        pytest.param(replace(DROPOUT, dropout=0.0, steps=14, sharding="fsdp"), marks=pytest.mark.slow),
    ],
    ids=["fsdp", "ddp", "three", "fsdp-lora"],
)
def test_several_processes_compute_what_one_does(store: ArtifactStore, base: CheckpointRef, tuner: AnyTuner) -> None:
    alone = fine_tune(base, "rot90", SUITE, in_one(tuner), store)
    seen: list[int] = []
    said: list[str] = []
    together = fine_tune(base, "rot90", SUITE, tuner, store, report=lambda done, *_: seen.append(done), log=said.append)
    assert seen == list(range(1, 15)), said
    assert farthest(store, base, alone) > 1e-3
    assert farthest(store, alone, together) < CLOSE
    assert store.open(together).manifest.lineage == store.open(alone).manifest.lineage
    for one, other in zip(losses(store, alone), losses(store, together), strict=True):
        assert other == pytest.approx(one, rel=1e-5)
    assert not list(store.objects.list("training/"))


SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from storage.artifacts import ArtifactStore
from storage.directory import DirectoryObjects
from tasks.digits_base import train_digits_base
from tasks.fine_tune import fine_tune
from tests.tasks.test_processes import BASE, KILLED, SUITE
store = ArtifactStore(DirectoryObjects(Path(sys.argv[1])))
print(fine_tune(train_digits_base(BASE, store), "rot90", SUITE, KILLED[sys.argv[2]], store, log=print))
"""
KILLED = {
    "ddp": replace(FULL, steps=60, processes=2, save_every=5, validate_every=1),  # slow enough to be killed
    "dropout": DROPOUT,
    "fsdp": replace(DROPOUT, sharding="fsdp", validate_every=10),
}


def whole_after(key: str) -> int:
    """The step of a save, if this is the file that is written last."""
    return int(key.split("/")[2]) if key.endswith("/state") else 0


def killed(folder: Path, case: str) -> None:
    """Train in two processes, and kill the one that waits for them without warning after 10 steps."""
    objects = DirectoryObjects(folder)
    command = [sys.executable, "-c", SCRIPT, str(folder), case]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 200
    while not any(whole_after(key) >= 10 for key in objects.list("training/")):
        assert child.poll() is None, child.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    workers = psutil.Process(child.pid).children(recursive=True)
    assert len(workers) >= 3  # accelerate, and what it launched
    child.kill()
    assert ended(workers)
    child.communicate()
    assert child.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_a_killed_training_goes_on(tmp_path: Path) -> None:
    """Its processes end with the one that waits for them. The result is that of one process, undisturbed."""
    killed(tmp_path, "ddp")
    store = ArtifactStore(DirectoryObjects(tmp_path))
    base, tuner = train_digits_base(BASE, store), KILLED["ddp"]
    seen: list[int] = []
    resumed = fine_tune(base, "rot90", SUITE, tuner, store, report=lambda done, *_: seen.append(done))
    assert seen[0] >= 10 and seen[0] % 5 == 0 and seen == list(range(seen[0], 61))
    alone = fine_tune(base, "rot90", SUITE, in_one(tuner), store)
    assert farthest(store, alone, resumed) < 2e-5  # after 60 steps
    for one, other in zip(losses(store, alone), losses(store, resumed), strict=True):
        assert other == pytest.approx(one, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["dropout", "fsdp"])
def test_every_process_goes_on_with_its_own_dropout(tmp_path: Path, case: str) -> None:
    """On a CPU the bytes are those of an undisturbed training in as many processes."""
    killed(tmp_path, case)
    store = ArtifactStore(DirectoryObjects(tmp_path))
    base = train_digits_base(BASE, store)
    resumed = fine_tune(base, "rot90", SUITE, KILLED[case], store)
    assert fine_tune(base, "rot90", SUITE, KILLED[case], store) == resumed
    assert fine_tune(base, "rot90", SUITE, in_one(KILLED[case]), store) != resumed


@pytest.mark.slow
def test_another_number_of_processes_goes_on(tmp_path: Path) -> None:
    killed(tmp_path, "fsdp")
    store = ArtifactStore(DirectoryObjects(tmp_path))
    base = train_digits_base(BASE, store)
    seen: list[int] = []
    fine_tune(base, "rot90", SUITE, in_one(KILLED["fsdp"]), store, report=lambda done, *_: seen.append(done))
    assert seen[0] >= 10 and seen[-1] == 60


@pytest.mark.slow
def test_a_failure_is_told_as_what_it_is(store: ArtifactStore, base: CheckpointRef) -> None:
    refs = set(store.refs())
    hot = replace(FULL, learning_rate=1e30, clip=1e30, processes=2, weights="all")
    said: list[str] = []
    with pytest.raises(InvalidInput, match=r"NaN or infinite at step \d+ of 14.*Lower learning_rate") as caught:
        fine_tune(base, "rot90", SUITE, hot, store, log=said.append)
    assert "Traceback" not in str(caught.value)
    assert caught.value.remedy.startswith("Lower learning_rate")
    assert any("tasks.worker FAILED" in line for line in said)  # what the processes print is in the log
    assert set(store.refs()) == refs


@pytest.mark.slow
@pytest.mark.parametrize("how", ["interrupted", "worker killed"])
def test_nobody_trains_on_when_the_training_is_given_up(store: ArtifactStore, base: CheckpointRef, how: str) -> None:
    long = replace(FULL, steps=20_000, processes=2, seed=1, save_every=0)
    workers: list[psutil.Process] = []

    def report(done: int, total: int, note: str) -> None:
        if done == 3:
            workers.extend(psutil.Process().children(recursive=True))
            if how == "interrupted":
                raise KeyboardInterrupt
            if how == "worker killed":
                next(one for one in workers if "tasks.worker" in one.cmdline() and not one.children()).kill()

    expected = KeyboardInterrupt if how == "interrupted" else DeltaworksError
    with pytest.raises(expected) as caught:
        fine_tune(base, "rot90", SUITE, long, store, report=report)
    assert len(workers) >= 3 and ended(workers)
    if how == "worker killed":
        assert "2 processes ended without saying why: process" in str(caught.value)
        assert "ended by signal 9. Most often memory ran out" in str(caught.value)


def embedding(tmp_path: Path) -> TextEmbedding:
    rows = [{"query": f"a {number}", "positive": f"b {number}"} for number in range(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TextEmbedding(Jsonl(train=(str(tmp_path / "pairs.jsonl"),), holdout=0.1))


def test_what_cannot_be_shared_is_refused_at_once(store: ArtifactStore, base: CheckpointRef, tmp_path: Path) -> None:
    bert = ingest(Checkpoint(source=str(save_bert(tmp_path / "bert", ["a b"]))), store)
    with pytest.raises(InvalidInput, match="text_embedding compares the rows of a batch with each other"):
        fine_tune(bert, "pairs", embedding(tmp_path), replace(FULL, processes=2), store)
    memory = ArtifactStore(MemoryObjects())
    with pytest.raises(InvalidInput, match="no other process can open the store memory:"):
        fine_tune(train_digits_base(BASE, memory), "rot90", SUITE, replace(FULL, processes=2), memory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"processes": 0}, "processes must be between 1 and batch, which is 15"),
        ({"processes": 16}, "processes must be between 1 and batch, which is 15.*found 16"),
        ({"sharding": "fsdp"}, "processes must be 2 or more with sharding: fsdp, found 1"),
        ({"sharding": "fsdp", "processes": 2, "precision": "float16"}, "precision must be float32 or bfloat16"),
    ],
)
def test_settings_that_do_not_go_together(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        replace(FULL, **changes)  # type: ignore[arg-type]


def test_gpus_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InvalidInput, match=r"processes is 4, a GPU each, but torch sees 1\. Lower processes"):
        require_trainable("cuda", "float32", 4)


def test_processes_are_no_part_of_what_a_training_is() -> None:
    assert replace(FULL, processes=2, sharding="fsdp").spec() == FULL.spec()


@pytest.mark.parametrize("count", [0, 1, 2, 5, 64])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_shares_are_all_rows_once(count: int, size: int) -> None:
    rows = [row for rank in range(size) for row in World(rank, size).share(count)]
    assert rows == list(range(count))


@pytest.mark.parametrize("name", presets())
def test_choices_come_back_as_they_were(name: str) -> None:
    config = load_chain(name)
    for task in config.tasks:
        for kind, one in ((AnySuite, task.suite), (AnyTuner, config.tuner_of(task))):
            assert restored(kind, json.loads(json.dumps(plain(asdict(one))))) == one


def test_lists_and_what_is_not_set_come_back() -> None:
    for one in (
        Jsonl(train=("a", "b"), holdout=0.1, columns=("x",)),
        Jsonl(train=("a",), holdout=0.1),
        Lora(targets=("q", "v")),
        Lora(),
    ):
        assert restored(type(one), json.loads(json.dumps(plain(asdict(one))))) == one
