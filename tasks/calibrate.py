"""Calibrate: what the linear layers of a tuned model are given on examples of its task, for codecs that look at it.

The model of the tuned checkpoint reads the first rows of the task's training split, one at a time, so that no padding
counts; a hook on every linear layer adds up X'X. These matrices are as large as the squares of the layers' widths: as
many as fit into `ROOM` are summed at once, and written to a temporary folder, from which `compress_update` reads one
at a time. A small model is read through once, a large one as often as its matrices fill the room.

Conv1D (GPT-2) keeps its weight the other way round, and fused experts are no layers of their own: they have no inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from storage.artifacts import Artifact, ArtifactStore
from storage.blobs import encode_parts
from storage.errors import InvalidInput
from storage.manifest import digest
from storage.refs import UpdateRef, short
from tasks.checkpoints import load_model, skeleton_of
from tasks.codecs import Codec
from tasks.compress import Inputs
from tasks.data import Rows
from tasks.evaluate import NamedSuite
from tasks.suites.base import Trainable, batches, first

ROOM = 4 * 2**30  # bytes of matrices that are summed at once
_NOTHING = digest(encode_parts({}))  # the blob of a tensor that did not change

Report = Callable[[int, int, str], None]  # rows done, rows in all, a word about them


class Calibration(NamedTuple):
    """`inputs`: X'X / rows of what each linear layer was given, by the name of its weight. `facts`: of which data."""

    inputs: Inputs
    facts: Mapping[str, Any]


@contextmanager
def calibrated(
    update: UpdateRef,
    codec: Codec,
    task: NamedSuite | None,
    store: ArtifactStore,
    device: str = "cpu",
    report: Report = lambda done, total, note: None,
) -> Iterator[Calibration]:
    """The inputs that `codec` asks for; none if it asks for none, or there is no task to take examples from."""
    if task is None or not codec.examples:
        yield Calibration({}, {})
        return
    with layer_inputs(update, task, store, device, codec.examples, report=report) as found:
        yield found


@contextmanager
def layer_inputs(
    update: UpdateRef,
    task: NamedSuite,
    store: ArtifactStore,
    device: str = "cpu",
    rows: int = 128,
    *,
    room: int = ROOM,
    report: Report = lambda done, total, note: None,
) -> Iterator[Calibration]:
    """What the tuned model's linear layers are given on the first `rows` rows of the task's training split.

    Of those layers whose delta `update` holds as a whole matrix that is not zero. The matrices [inputs, inputs] are
    float32, and there until the context ends; layers that nothing reached have none.
    """
    source = store.open(update, "update")
    tuned = _checkpoint(source, "tuned")
    problem = task.suite.open(_checkpoint(source, "base"))
    examples = first(problem.rows("train"), rows)
    if not len(examples):
        raise InvalidInput("the train split is empty", remedy="Check the path and the split names of the data")
    facts = {
        "task": task.name,
        "suite": task.suite.spec(),
        "data": task.suite.fingerprint(),
        "split": "train",
        "rows": len(examples),
    }
    with TemporaryDirectory() as folder:
        inputs = _watch(source, tuned, problem, examples, device, room, Path(folder), report)
        yield Calibration(inputs, facts)


def _checkpoint(source: Artifact, side: str) -> Artifact:
    ref = source.manifest.lineage.inputs.get(side)
    if ref is None or not source.store.has(ref):
        why = "not in its lineage" if ref is None else f"no longer stored ({short(ref)})"
        raise InvalidInput(
            f"calibration needs both checkpoints; the {side} of {short(source.ref)} is {why}",
            remedy="Ingest both checkpoints again and extract the update from them, or set calibration to 0",
        )
    return source.store.open(ref, "checkpoint")


def _watch(
    source: Artifact,
    tuned: Artifact,
    problem: Trainable,
    examples: Rows,
    device: str,
    room: int,
    folder: Path,
    report: Report,
) -> Inputs:
    """Run the model over the examples, once for every lot of layers, and leave their matrices in the folder."""
    wanted = {
        record.name
        for record in source.manifest.tensors
        if record.role == "linear.weight" and record.rank is None and record.blob != _NOTHING
    }
    if not wanted:
        return {}
    backbone = load_model(tuned, device)
    model = problem.wrap(backbone).to(device).eval()
    skeleton = skeleton_of(tuned)
    layers = {
        name: module
        for path, module in backbone.named_modules()
        if isinstance(module, nn.Linear) and (name := skeleton.canonical(f"{path}.weight")) in wanted
    }
    lots = _lots({name: 4 * module.in_features**2 for name, module in layers.items()}, room)
    found: dict[str, Callable[[], Tensor]] = {}
    for number, lot in enumerate(lots):
        before = number * len(examples)
        sums = [_Sum(layers[name], device) for name in lot]
        try:
            with torch.inference_mode():
                for done, batch in enumerate(batches(examples, 1, problem.collate), 1):
                    model(**{key: value.to(device) for key, value in batch.items()})
                    report(before + done, len(lots) * len(examples), "calibration")
        finally:
            for one in sums:
                one.hook.remove()
        for name, one in zip(lot, sums, strict=True):
            if one.rows:
                path = folder / f"{len(found)}.pt"
                torch.save((one.moments_NN / one.rows).cpu(), path)
                found[name] = partial(torch.load, path, weights_only=True)
    return found


def _lots(sizes: Mapping[str, int], room: int) -> list[list[str]]:
    """Names in lots whose sizes come to at most `room`; what is larger is a lot of its own."""
    lots: list[list[str]] = []
    left = 0
    for name, size in sizes.items():
        if not lots or size > left:
            lots.append([])
            left = room
        lots[-1].append(name)
        left -= size
    return lots


class _Sum:
    """X'X of a layer, as the model runs."""

    def __init__(self, layer: nn.Linear, device: str) -> None:
        self.rows = 0
        self.moments_NN = torch.zeros(layer.in_features, layer.in_features, device=device)
        self.hook = layer.register_forward_pre_hook(self._add)

    def _add(self, layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        rows_RN = given[0].detach().reshape(-1, given[0].shape[-1]).float()
        self.rows += len(rows_RN)
        self.moments_NN.addmm_(rows_RN.T, rows_RN)
