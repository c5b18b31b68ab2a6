"""Fine-tune: a checkpoint trained on a task, by transformers' Trainer, into a tuned checkpoint."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import SchedulerType

from storage.artifacts import Artifact, ArtifactStore
from storage.errors import InvalidInput
from storage.manifest import Lineage
from storage.refs import CheckpointRef, short
from tasks.checkpoints import HISTORY, load_model, skeleton_of
from tasks.exclusive import PROCESS_STATE
from tasks.suites import AnySuite
from tasks.suites.base import Trainable
from tasks.tensors import check_finite, dtype_name, prefixed, read_tensor
from tasks.tuners import AnyTuner, Factors

Report = Callable[[int, int, str], None]  # steps done, steps in all, a word about them


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
    give equal bytes on one machine with one thread count; between devices the last bits differ.
    """
    source = store.open(base, "checkpoint")
    problem = suite.open(source)
    with PROCESS_STATE, torch.random.fork_rng():
        backbone = load_model(source, dtype=torch.float32)
        set_seed(tuner.seed)
        tuner.attach(backbone, skeleton_of(source))
        history = train(problem.wrap(backbone), problem, tuner, device, report)
    spec = {"task": task, "suite": suite.spec(), "data": suite.fingerprint(), "tuner": tuner.spec()}
    return _store(source, backbone, tuner, Lineage("fine_tune", {"base": base}, spec), task, history, store)


def train(model: nn.Module, problem: Trainable, tuner: AnyTuner, device: str, report: Report) -> list[dict[str, float]]:
    """Run the schedule of `tuner` over what is trainable in `model`. Returns step and loss, ten times a run.

    The caller holds the global generator: see `fine_tune`.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=tuner.steps,
            per_device_train_batch_size=tuner.batch,
            gradient_accumulation_steps=tuner.accumulate,
            learning_rate=tuner.learning_rate,
            weight_decay=tuner.weight_decay,
            warmup_steps=round(tuner.warmup * tuner.steps),
            lr_scheduler_type=SchedulerType.COSINE,
            max_grad_norm=tuner.clip,
            bf16=tuner.precision == "bfloat16",
            seed=tuner.seed,
            use_cpu=device == "cpu",
            logging_steps=max(1, tuner.steps // 10),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=device != "cpu",
        )
        rows: Any = _Examples(problem.rows("train"))
        if len(rows) == 0:
            raise InvalidInput("the train split is empty", remedy="Check the path and the split names of the data")
        watcher = _Watcher(report)
        trainer = Trainer(
            model=model, args=arguments, train_dataset=rows, data_collator=problem.collate, callbacks=[watcher]
        )
        trainer.remove_callback(_printer())
        try:
            trainer.train()
        except torch.OutOfMemoryError as error:
            raise InvalidInput(
                f"the device ran out of memory at batch {tuner.batch}",
                remedy=f"Set batch {max(1, tuner.batch // 2)} and accumulate {tuner.accumulate * 2}, or tune with lora",
            ) from error
    model.to("cpu").eval()
    return watcher.history


class _Examples(Dataset[dict[str, Any]]):
    """Rows as the Trainer wants them."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        found: dict[str, Any] = self._rows[index]
        return found


class _Watcher(TrainerCallback):
    """Passes progress on, and keeps the losses."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self.history: list[dict[str, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        note = f"loss {self.history[-1]['loss']:.3f}" if self.history else ""
        self._report(state.global_step, state.max_steps, note)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.history.append({"step": state.global_step, "loss": float(logs["loss"])})


def _printer() -> Any:
    from transformers import PrinterCallback

    return PrinterCallback


def _store(
    source: Artifact,
    backbone: PreTrainedModel,
    tuner: AnyTuner,
    lineage: Lineage,
    task: str,
    history: list[dict[str, float]],
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
    draft.add_asset(HISTORY, json.dumps(history).encode())
    final = {"loss": history[-1]["loss"]} if history else {}
    draft.facts.update({**source.manifest.facts, "task": task, **final})
    return CheckpointRef(draft.commit())
