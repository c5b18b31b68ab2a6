"""Fine-tune: a checkpoint trained on a task, by transformers' Trainer, into a tuned checkpoint."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainingArguments, set_seed
from transformers.trainer_utils import SchedulerType

from storage.artifacts import Artifact, ArtifactStore
from storage.errors import InvalidInput
from storage.manifest import Lineage, canonical, digest
from storage.refs import CheckpointRef, short
from storage.saves import Saves
from tasks.checkpoints import HISTORY, load_model, skeleton_of
from tasks.data import Rows, Split
from tasks.devices import require_trainable
from tasks.exclusive import PROCESS_STATE
from tasks.headroom import advised_on_memory
from tasks.loop import Best, Loop, Point, Report, Watcher
from tasks.resume import put_back
from tasks.suites import AnySuite
from tasks.suites.base import Trainable, batches
from tasks.tensors import check_finite, dtype_name, prefixed, read_tensor
from tasks.tuners import AnyTuner, Factors

_SCHEDULES = {
    "cosine": SchedulerType.COSINE,
    "linear": SchedulerType.LINEAR,
    "constant": SchedulerType.CONSTANT_WITH_WARMUP,
}


def fine_tune(
    base: CheckpointRef,
    task: str,
    suite: AnySuite,
    tuner: AnyTuner,
    store: ArtifactStore,
    device: str = "cpu",
    report: Report = lambda done, total, note: None,
) -> CheckpointRef:
    """`base` trained on `suite`. Parameters that did not change share the base's blobs; those that did are float32.

    The master weights are float32 whatever the base's dtype, so that small changes are not rounded away. Equal inputs
    give equal bytes on one machine with one thread count; between devices the last bits differ. A training that was
    killed goes on at its last save, and on a CPU ends with the bytes that it would have had.
    """
    require_trainable(device, tuner.precision)
    source = store.open(base, "checkpoint")
    problem = suite.open(source)
    spec = {"task": task, "suite": suite.spec(), "data": suite.fingerprint(), "tuner": tuner.spec()}
    lineage = Lineage("fine_tune", {"base": base}, spec)
    saves = Saves(store.objects, digest(canonical([lineage.step, lineage.inputs, lineage.spec])))
    seen = problem.check(problem.rows("train"), "train")
    if tuner.validate_every:
        problem.check(problem.rows("validation"), "validation")
    if seen.get("cut"):
        report(0, tuner.steps, f"{seen['cut']} of {seen['examples']} examples are too long and are cut")
    with PROCESS_STATE, torch.random.fork_rng():
        backbone = load_model(source, dtype=torch.float32)
        set_seed(tuner.seed)
        tuner.attach(backbone, skeleton_of(source))
        _trade_time_for_memory(backbone, tuner)
        trained = train(problem.wrap(backbone), problem, tuner, device, report, saves if tuner.save_every else None)
    tuned = _store(source, backbone, tuner, lineage, task, trained._replace(seen=seen), store)
    saves.clear()
    return tuned


def train(
    model: nn.Module, problem: Trainable, tuner: AnyTuner, device: str, report: Report, saves: Saves | None = None
) -> Trained:
    """Run the schedule of `tuner` over what is trainable in `model`, from the last save if there is one.

    The caller holds the global generator: see `fine_tune`.
    """
    rows = _rows(problem, "train")
    held_out = _rows(problem, "validation") if tuner.validate_every else None
    validate = None if held_out is None else partial(_loss, problem, held_out, tuner.batch)
    watcher = Watcher(tuner, report, saves, validate, tuner.companions(model))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=tuner.steps,
            per_device_train_batch_size=tuner.batch,
            gradient_accumulation_steps=tuner.accumulate,
            learning_rate=tuner.learning_rate,
            weight_decay=tuner.weight_decay,
            warmup_steps=round(tuner.warmup * tuner.steps),
            lr_scheduler_type=_SCHEDULES[tuner.schedule],
            max_grad_norm=tuner.clip,
            bf16=tuner.precision == "bfloat16",
            fp16=tuner.precision == "float16",
            seed=tuner.seed,
            use_cpu=device == "cpu",
            logging_strategy="no",
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=device != "cpu",
        )
        if arguments.n_gpu > 1:
            arguments._n_gpu = 1  # one GPU a training: the Trainer would split batches over all that it sees
        with advised_on_memory(tuner, device):
            loop = Loop(
                watcher,
                tuner,
                model=model,
                args=arguments,
                train_dataset=_Examples(rows),
                data_collator=problem.collate,
            )
            loop.train(resume_from_checkpoint=watcher.resume_folder(Path(folder), tuner.batch))
    model.to("cpu").eval()
    if watcher.best is not None:
        put_back(model, watcher.best.weights)
    return Trained(watcher.history, watcher.best)


class Trained(NamedTuple):
    """What a training tells of itself: losses by step, the best on the validation split, numbers of the examples."""

    history: list[Point]
    best: Best | None
    seen: Mapping[str, int] = {}


def _rows(problem: Trainable, split: Split) -> Rows:
    rows = problem.rows(split)
    if len(rows) == 0:
        raise InvalidInput(f"the {split} split is empty", remedy="Check the path and the split names of the data")
    return rows


@torch.no_grad()
def _loss(problem: Trainable, rows: Rows, batch: int, model: nn.Module) -> float:
    """The mean loss of all rows."""
    device = next(model.parameters()).device
    model.eval()
    total = 0.0
    for number, one in enumerate(batches(rows, batch, problem.collate)):
        loss = model(**{name: value.to(device) for name, value in one.items()})["loss"]
        total += float(loss) * min(batch, len(rows) - number * batch)
    model.train()
    return total / len(rows)


def _trade_time_for_memory(backbone: PreTrainedModel, tuner: AnyTuner) -> None:
    if not tuner.gradient_checkpointing:
        return
    if not backbone.supports_gradient_checkpointing:
        raise InvalidInput(
            f"{type(backbone).__name__} cannot checkpoint its gradients",
            remedy="Set gradient_checkpointing to false; a smaller batch takes less memory too",
        )
    settings = {"use_reentrant": False}
    if hasattr(backbone, "activation_checkpointing_enable"):  # how later releases of transformers 5 call it
        backbone.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:
        backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)


class _Examples(Dataset[dict[str, Any]]):
    """Rows as the Trainer wants them."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rows[index]


def _store(
    source: Artifact,
    backbone: PreTrainedModel,
    tuner: AnyTuner,
    lineage: Lineage,
    task: str,
    trained: Trained,
    store: ArtifactStore,
) -> CheckpointRef:
    draft = store.draft("checkpoint", lineage)
    changed = dict(tuner.collect(backbone, skeleton_of(source)))
    for record in source.manifest.tensors:
        value = changed.pop(record.name, None)
        if isinstance(value, Factors) and (record.rank is not None or record.onto is not None):
            # the base is stated against another tensor here itself, and factors can only be against a dense blob
            value = read_tensor(source, record.name) + value.B @ value.A
        if value is None:
            draft.share(record)
        elif isinstance(value, Factors):
            for factor in value:
                check_finite(factor, record.name, f"task {task!r} tuned from {short(source.ref)}")
            parts = {**prefixed({"tensor": value.A}, "A"), **prefixed({"tensor": value.B}, "B")}
            rank = value.A.shape[0]
            draft.add(
                record.name, parts, role=record.role, dtype="F32", shape=record.shape, rank=rank, onto=record.blob
            )
        else:
            check_finite(value, record.name, f"task {task!r} tuned from {short(source.ref)}")
            draft.add(
                record.name, {"tensor": value}, role=record.role, dtype=dtype_name(value.dtype), shape=record.shape
            )
    assert not changed, f"trained parameters without a place in the base: {sorted(changed)}"
    draft.share_assets(source.manifest.assets)
    draft.add_asset(HISTORY, json.dumps(trained.history).encode())
    losses = [point["loss"] for point in trained.history if "loss" in point]
    final: dict[str, float] = {"loss": losses[-1]} if losses else {}
    if trained.best is not None:
        final |= {"best_validation_loss": trained.best.loss, "best_step": trained.best.step}
    draft.facts.update({**source.manifest.facts, "task": task, **trained.seen, **final})
    return CheckpointRef(draft.commit())
