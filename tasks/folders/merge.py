"""Merge folders: Hugging Face checkpoints straight into a new one, without a store or a line.

The mergers, sparsifiers and scalings are those of lines, and so are the numbers, except of experts that files store one
by one: here these are tensors of their own; in a line, as in transformers, a layer's are one tensor. All inputs
are checked before anything is written; the new folder appears whole or not at all, with a record of how it was made.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from storage.errors import InvalidInput
from tasks.folders.names import Matched, match
from tasks.folders.passes import Passes
from tasks.folders.pieces import PIECE, Piece, Sources, whole
from tasks.folders.reader import Weights, sha256_of
from tasks.folders.scratch import Scratch
from tasks.folders.writer import Form, ShardWriter, new_folder
from tasks.mergers import Sums
from tasks.parallel import Budget, Report, in_order
from tasks.recipe import Recipe
from tasks.tensors import check_finite, dtype_name

RECORD = "deltaworks.json"
SHARD_BYTES = 5 * 10**9
_ASSETS = (".json", ".txt", ".model", ".jinja")
_NOT_ASSETS = ("model.safetensors.index.json", "trainer_state.json", RECORD)


@dataclass(frozen=True)
class Options:
    """dtype:   of floating-point tensors in the new folder, in safetensors' spelling; the base's own if None
    hashes:     whether the record holds the sha256 of every input file, which reads them once more
    shard_bytes: largest file, unless one tensor is larger
    """

    dtype: torch.dtype | None = None
    hashes: bool = False
    shard_bytes: int = SHARD_BYTES


@dataclass(frozen=True)
class MergedFolder:
    """What was merged: counts for a table."""

    folder: Path
    files: dict[str, int]  # weight files and their bytes
    tensors: int
    parameters: int
    read: int  # bytes of all inputs
    notes: list[str]

    @property
    def written(self) -> int:
        return sum(self.files.values())


def merge_folders(
    base: Path,
    tuned: Sequence[Path],
    out: Path,
    recipe: Recipe,
    *,
    weights: Sequence[float] | None = None,
    options: Options | None = None,
    budget: Budget | None = None,
    report: Callable[[str], Report | None] = lambda label: None,
) -> MergedFolder:
    """Write base plus the merged updates of `tuned` to `out`, with the base's names, dtypes and model files.

    `weights`: how much each tuned model counts, 1 if None. `report` is asked for the progress of every pass by its
    label. Raises InvalidInput or Mismatch that name file and tensor before anything is written; StoreFull if the disk
    is. Files of the result depend neither on the workers nor on the memory of the budget.
    """
    chosen, allowed = options or Options(), budget or Budget()
    counts = _checked_weights(recipe, tuned, weights)
    with ExitStack() as stack:
        first, *others = (stack.enter_context(Weights(folder)) for folder in (base, *tuned))
        matched = match(first, others, roles=not recipe.entrywise)
        if not matched.parameters:
            raise InvalidInput(f"{base} has no tensors to merge")
        keys = [one.fingerprint() for one in others] if recipe.sparsify else [""] * len(others)
        sources = Sources(first, others, counts, keys)
        work = stack.enter_context(new_folder(out))
        _copy_assets(base, work, chosen.dtype)
        forms = {name: _form(place.dtype, place.shape, chosen.dtype) for name, place in first.places.items()}
        writer = ShardWriter(work, forms, chosen.shard_bytes)
        stack.callback(writer.close)
        _merge(recipe, sources, matched, writer, forms, allowed, work / ".scratch", report)
        shutil.rmtree(work / ".scratch", ignore_errors=True)
        record = _record(recipe, sources, matched, chosen, allowed, report)
        (work / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    read = sum(file.stat().st_size for one in (first, *others) for file in one.files)
    parameters = sum(one.place.elements for one in matched.parameters)
    return MergedFolder(out, writer.files, len(forms), parameters, read, matched.notes)


def _merge(
    recipe: Recipe,
    sources: Sources,
    matched: Matched,
    writer: ShardWriter,
    forms: dict[str, Form],
    budget: Budget,
    scratch: Path,
    report: Callable[[str], Report | None],
) -> None:
    def write(piece: Piece, merged: Tensor) -> Sums:
        for part in piece.split(PIECE):
            names = (piece.parameter.base, *piece.parameter.copies)
            delta = merged[part.start - piece.start : part.stop - piece.start]
            entries = _entries(part, delta, forms[names[0]].dtype)
            for name in names:
                writer.write(name, part.start, entries)
        return {}

    for name in matched.kept:
        kept = sources.base.read(name)
        writer.write(name, 0, kept.to(forms[name].dtype))
    wholes = [whole(sources, parameter) for parameter in matched.parameters]
    Passes(recipe, wholes, budget, Scratch(scratch)).run(write, report)


def _entries(piece: Piece, delta: Tensor, dtype: torch.dtype) -> Tensor:
    """Base plus delta, added in the dtype of arithmetic and cast once. Where nothing changed, the base's own bits."""
    parameter = piece.parameter
    if not (bool(delta.sum() != 0) or bool(delta.any())):
        return piece.sources.base.read(parameter.base, piece.start, piece.stop).to(dtype)
    found = piece.base.to(delta.dtype) if delta.dtype == torch.float64 else piece.base
    found = found.add(delta).to(dtype)
    if not bool(found.sum(dtype=torch.float32).isfinite()):
        check_finite(found, parameter.base, "the merged model")
    return found


def _form(dtype: torch.dtype, shape: tuple[int, ...], wanted: torch.dtype | None) -> Form:
    return Form(wanted if wanted is not None and dtype.is_floating_point else dtype, shape)


def _checked_weights(recipe: Recipe, tuned: Sequence[Path], weights: Sequence[float] | None) -> list[float]:
    if not tuned:
        raise InvalidInput("nothing to merge: name at least one tuned folder beside the base")
    found = [1.0] * len(tuned) if weights is None else [float(weight) for weight in weights]
    if len(found) != len(tuned):
        raise InvalidInput(f"weights: expected {len(tuned)}, one per tuned folder, found {len(found)}")
    for weight in found:
        if not 0 < weight < math.inf:
            raise InvalidInput(f"weight must be positive, found {weight}")
    if not recipe.merger.weighted and any(weight != 1 for weight in found):
        raise InvalidInput(
            f"merger {recipe.merger.name!r} lets every update count the same, found weights {found}",
            remedy="Remove the weights, or take a merger that has weights",
        )
    return found


def _copy_assets(base: Path, work: Path, dtype: torch.dtype | None) -> None:
    """Configuration, tokenizer and processor files. With another dtype the configuration says so."""
    for path in sorted(base.iterdir()):
        if path.is_file() and path.suffix in _ASSETS and path.name not in _NOT_ASSETS:
            shutil.copyfile(path, work / path.name)
    config = work / "config.json"
    if dtype is None or not config.exists():
        return
    values = json.loads(config.read_text())
    for key in {"torch_dtype", "dtype"} & values.keys():
        values[key] = str(dtype).removeprefix("torch.")
    config.write_text(json.dumps(values, indent=2) + "\n")


def _record(
    recipe: Recipe,
    sources: Sources,
    matched: Matched,
    options: Options,
    budget: Budget,
    report: Callable[[str], Report | None],
) -> dict[str, Any]:
    """How the folder was made: enough to make it again, and with `hashes` to prove from what."""
    folders = [sources.base, *sources.tuned]
    files = [file for one in folders for file in one.files]
    hashes: dict[Path, str] = {}
    if options.hashes:
        hashes = dict(zip(files, in_order(files, sha256_of, lambda _: 0, budget, report("hashing")), strict=True))

    def described(one: Weights) -> dict[str, Any]:
        entries = [
            {"name": file.name, "bytes": file.stat().st_size, **({"sha256": hashes[file]} if hashes else {})}
            for file in one.files
        ]
        return {"folder": str(one.folder), "files": entries}

    tuned = [
        {**described(one), "weight": weight, **({"mask_key": key} if key else {})}
        for one, weight, key in zip(sources.tuned, sources.weights, sources.keys, strict=True)
    ]
    return {
        "made_by": "deltaworks merge",
        "versions": {name: version(name) for name in ("deltaworks", "torch", "safetensors")},
        "recipe": recipe.spec(),
        "base": described(sources.base),
        "tuned": tuned,
        "dtype": None if options.dtype is None else dtype_name(options.dtype),
        "parameters": sum(one.place.elements for one in matched.parameters),
        "notes": matched.notes,
    }
