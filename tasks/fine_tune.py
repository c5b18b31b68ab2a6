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
from tasks.launched import Job, Log, launch
from tasks.loop import Best, Loop, Point, Report, Watcher
from tasks.resume import put_back
from tasks.sharding import put_together, shard
from tasks.suites import AnySuite
from tasks.suites.base import Trainable, batches
from tasks.tensors import check_finite, dtype_name, prefixed, read_tensor
from tasks.tuners import AnyTuner, Factors
from tasks.world import WEIGHT, Shared, World, this_world, weighed

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
    start: CheckpointRef | None = None,
    log: Log = lambda line: None,
) -> CheckpointRef:
    """`base` trained on `suite`. Parameters that did not change share the base's blobs; those that did are float32.

    `start`: a model merged onto the base, to train from instead. Heads, tokenizer and processor stay the base's.
    The master weights are float32 whatever the base's dtype, so that small changes are not rounded away. Equal inputs
    give equal bytes on one machine with one thread count; between devices the last bits differ. A training that was
    killed goes on at its last save, and on a CPU ends with the bytes that it would have had. What several processes
    print goes to `log`, a line at a time.
    """
    require_trainable(device, tuner.precision, tuner.processes)
    problem = suite.open(store.open(base, "checkpoint"))
    rows = problem.rows("train")
    seen = problem.check(rows, "train")
    if tuner.validate_every:
        problem.check(problem.rows("validation"), "validation")
    if seen.get("cut"):
        report(0, tuner.steps, f"{seen['cut']} of {seen['examples']} examples are too long and are cut")
    job = Job(base, start, task, suite, tuner, device, seen)
    if tuner.processes > 1:
        _require_parts(problem, rows, suite)
        return launch(job, store, report, log)
    tuned = work(job, store, report)
    assert tuned is not None
    return tuned


def work(job: Job, store: ArtifactStore, report: Report) -> CheckpointRef | None:
    """Train, in this process or as one of several, and store the tuned model. None: another process stores it."""
    base, tuner, suite = store.open(job.base, "checkpoint"), job.tuner, job.suite
    source = base if job.start is None else store.open(job.start, "checkpoint")
    problem = suite.open(base)
    spec = {"task": job.task, "suite": suite.spec(), "data": suite.fingerprint(), "tuner": tuner.spec()}
    lineage = Lineage("fine_tune", {"base": job.base, **({"start": job.start} if job.start else {})}, spec)
    saves = Saves(store.objects, digest(canonical([lineage.step, lineage.inputs, lineage.spec])))
    with PROCESS_STATE, torch.random.fork_rng():
        backbone = load_model(source, dtype=torch.float32)
        set_seed(tuner.seed)
        tuner.attach(backbone, skeleton_of(source))
        _trade_time_for_memory(backbone, tuner)
        kept = saves if tuner.save_every else None
        trained = train(problem.wrap(backbone), problem, tuner, job.device, report, kept)
    if not this_world().leads:
        return None
    tuned = _store(source, backbone, tuner, lineage, job.task, trained._replace(seen=job.seen), store)
    saves.clear()
    return tuned


def _require_parts(problem: Trainable, rows: Rows, suite: AnySuite) -> None:
    """Refuse to share batches whose loss is more than that of their rows."""
    if problem.counted(problem.collate([rows[0]])) is None:
        raise InvalidInput(
            f"{suite.name} compares the rows of a batch with each other, so processes cannot share it",
            remedy="Set processes to 1",
        )


def trained_from(lineage: Lineage) -> str | None:
    """The checkpoint that a training started from, by the lineage of what it gave; None if nothing was trained here."""
    if lineage.step != "fine_tune":
        return None
    return lineage.inputs.get("start", lineage.inputs.get("base"))


def train(
    model: nn.Module, problem: Trainable, tuner: AnyTuner, device: str, report: Report, saves: Saves | None = None
) -> Trained:
    """Run the schedule of `tuner` over what is trainable in `model`, from the last save if there is one.

    The caller holds the global generator: see `fine_tune`.
    """
    rows = _rows(problem, "train")
    held_out = _rows(problem, "validation") if tuner.validate_every else None
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
            ddp_backend="gloo" if device == "cpu" and tuner.processes > 1 else None,
        )
        if arguments.n_gpu > 1:
            arguments._n_gpu = 1  # one GPU a process: the Trainer would split batches over all that it sees
        world = this_world()
        if tuner.sharding == "fsdp" and world.size > 1:
            shard(model, world, arguments.device)  # before the Trainer would move the whole of it to one GPU
        validate = None if held_out is None else partial(_loss, Shared(held_out, problem, world), tuner.batch, world)
        companions = tuner.companions(model)
        watcher = Watcher(tuner, report if world.leads else _silent, saves, validate, world, companions)
        examples: Any = Shared(rows, problem, world)
        settings = {"model": model, "args": arguments, "train_dataset": examples, "data_collator": examples.collate}
        with advised_on_memory(tuner, device):
            loop = Loop(watcher, tuner, world, **settings)
            loop.train(resume_from_checkpoint=watcher.resume_folder(Path(folder), tuner.batch))
    put_together(model, world)
    model.to("cpu").eval()
    if watcher.best is not None and world.leads:
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
def _loss(shared: Shared, batch: int, world: World, model: nn.Module) -> float:
    """The mean loss of all rows. Every process looks at its share of each batch, and all find the same."""
    device = next(model.parameters()).device
    model.eval()
    examples: Any = shared
    total = 0.0
    for number, one in enumerate(batches(examples, batch, shared.collate)):
        weight = one.pop(WEIGHT, None)
        loss = model(**{name: value.to(device) for name, value in one.items()})["loss"]
        if weight is not None:
            loss = world.total(weighed(loss, float(weight), world)) / world.size
        total += float(loss) * min(batch, len(shared) - number * batch)
    model.train()
    return total / len(shared)


def _silent(done: int, total: int, note: str) -> None:
    """What processes that do not lead report."""


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
    known = store.open(lineage.inputs["base"]).manifest.facts  # a merged model has facts of its merge beside them
    draft.facts.update({**known, "task": task, **trained.seen, **final})
    return CheckpointRef(draft.commit())
