"""Which tensors of several folders are one parameter, and what role it has; checked before anything is written.

Folders that store the same names need no more. Otherwise the architecture of the base's config.json tells which names
are one parameter: with or without the prefix of the backbone, tied weights stored once or twice, buffers that older
versions saved.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from storage.errors import InvalidInput, Mismatch
from tasks.folders.reader import Place, Weights
from tasks.mergers import Target

if TYPE_CHECKING:
    from tasks.naming import Skeleton

_CHUNK = 1 << 20
_EMBEDDINGS = re.compile(r".*embed(ding|dings|s|_tokens|_positions|_in)?|wte|wpe|shared|relative_attention_bias")
_NORMS = ("norm", "ln_", ".ln")


@dataclass(frozen=True)
class Parameter:
    """One parameter to merge: its names on disk in the base and in every tuned folder, and its form in the base.

    `copies`: other names under which the base stores the same numbers (tied weights).
    """

    target: Target
    base: str
    tuned: tuple[str, ...]
    place: Place
    copies: tuple[str, ...] = ()


@dataclass(frozen=True)
class Matched:
    """`parameters` to merge in the order of their canonical names; `kept`: names of the base that stay as they are."""

    parameters: list[Parameter]
    kept: list[str]
    notes: list[str]


def match(base: Weights, tuned: Sequence[Weights], *, roles: bool) -> Matched:
    """Find the parameters. `roles`: whether the merger looks at them, which takes the time to build the architecture.

    Raises Mismatch if a folder lacks a tensor or has another one, or if shapes, kinds of numbers or ties differ.
    """
    notes: list[str] = []
    skeleton: Skeleton | None = None
    if roles or any(one.places.keys() != base.places.keys() for one in tuned):
        try:
            skeleton = _skeleton(base.folder)
        except InvalidInput as error:
            notes.append(f"roles of parameters are told by their names and shapes: {error}")
    names = [_Names(one, skeleton) for one in (base, *tuned)]
    first, others = names[0], names[1:]
    for one in others:
        _check_names(first, one)
    parts = [] if skeleton is None else sorted(first.canonical.keys() - skeleton.slots.keys())
    if parts and roles:
        notes.append(
            f"{len(parts)} tensors are merged one by one, as the files have them: {_some(parts)}. A line holds"
        )
        notes[-1] += " the experts of a layer as one tensor, with the gate and up projections of each in one matrix"
    parameters = [_parameter(name, first, others, skeleton) for name in sorted(first.canonical)]
    return Matched(parameters, first.extras, notes)


class _Names:
    """The tensors of one folder by canonical name, without copies of tied weights and computed buffers."""

    def __init__(self, weights: Weights, skeleton: Skeleton | None) -> None:
        self.weights = weights
        self.canonical = {name: name for name in weights.places}
        self.extras: list[str] = []
        self.copies: dict[str, list[str]] = {}
        if skeleton is not None:
            self._translate(skeleton)

    def _translate(self, skeleton: Skeleton) -> None:
        known = _slots_of(skeleton, self.weights)
        self.canonical = {known.get(disk, disk): disk for disk in self.weights.places}
        for name, disk in list(self.canonical.items()):
            source = skeleton.tied.get(name)
            if source in self.canonical:
                self._check_tie(disk, self.canonical[source])
                self.copies.setdefault(source, []).append(disk)
                del self.canonical[name]
            elif name not in skeleton.slots and skeleton.expected_extra(disk):
                self.extras.append(disk)
                del self.canonical[name]

    def _check_tie(self, copy: str, source: str) -> None:
        places = self.weights.places
        if places[copy].shape != places[source].shape or not _equal((self.weights, copy), (self.weights, source)):
            raise Mismatch(
                f"tensor {copy!r} of {self.weights.where(copy)}",
                expected=f"equal to {source!r}, which the base's config ties it to",
                found="other numbers",
                remedy="Set tie_word_embeddings to false in the base's config.json and store both there",
            )


def _slots_of(skeleton: Skeleton, weights: Weights) -> dict[str, str]:
    """Name on disk -> canonical name, of the tensors that are a parameter each (and no part of a fused one)."""
    read: dict[int, str] = {}
    held: list[Tensor] = []

    def stand_in(disk: str) -> Tensor:
        place = weights.places[disk]
        held.append(torch.empty(place.shape, dtype=place.dtype, device="meta"))
        read[id(held[-1])] = disk
        return held[-1]

    pairs = skeleton.from_disk(weights.places, stand_in)
    return {read[id(tensor)]: name for name, tensor in pairs if id(tensor) in read}


def _check_names(base: _Names, tuned: _Names) -> None:
    missing = sorted(base.canonical[name] for name in base.canonical.keys() - tuned.canonical.keys())
    beyond = sorted(tuned.canonical[name] for name in tuned.canonical.keys() - base.canonical.keys())
    if missing or beyond:
        raise Mismatch(
            f"tensor names of {tuned.weights.folder}",
            expected=f"those of the base {base.weights.folder}",
            found=f"missing: {_some(missing)}; more: {_some(beyond)}",
            remedy="Merge models of one architecture; heads that differ can be kept apart by a chain (extract.heads)",
        )


def _parameter(name: str, base: _Names, others: Sequence[_Names], skeleton: Skeleton | None) -> Parameter:
    disk = base.canonical[name]
    place = base.weights.places[disk]
    for other in others:
        _check_form(disk, place, base.weights, other.canonical[name], other.weights)
    slot = skeleton.slots.get(name) if skeleton is not None else None
    role = slot.role if slot is not None else role_by_name(name, place.shape)
    tuned = tuple(other.canonical[name] for other in others)
    return Parameter(Target(name, role), disk, tuned, place, tuple(base.copies.get(name, ())))


def _check_form(disk: str, place: Place, base: Weights, theirs: str, other: Weights) -> None:
    found = other.places[theirs]
    what = f"tensor {theirs!r} of {other.where(theirs)}"
    if found.shape != place.shape:
        raise Mismatch(
            what,
            expected=f"shape {list(place.shape)} as in {base.where(disk)}",
            found=list(found.shape),
            remedy="Tune a model of the same size and vocabulary, or name the base it was tuned from",
        )
    if place.dtype.is_floating_point and found.dtype.is_floating_point:
        return  # of any width: updates are taken in float32 or wider
    if found.dtype != place.dtype:
        raise Mismatch(what, expected=f"{place.dtype} as in {base.where(disk)}", found=found.dtype)
    if not _equal((base, disk), (other, theirs)):
        raise Mismatch(f"integer {what}", expected=f"the numbers of {base.where(disk)}", found="a difference")


def _equal(one: tuple[Weights, str], two: tuple[Weights, str]) -> bool:
    count = one[0].places[one[1]].elements
    return all(
        torch.equal(*(weights.read(name, at, min(at + _CHUNK, count)) for weights, name in (one, two)))
        for at in range(0, count, _CHUNK)
    )


def _skeleton(folder: Path) -> Skeleton:
    from tasks.naming import Skeleton  # transformers takes seconds to import: only for those who need it

    try:
        return Skeleton((folder / "config.json").read_bytes())
    except OSError as error:
        raise InvalidInput(f"{folder / 'config.json'} cannot be read ({error.strerror})") from error


def role_by_name(name: str, shape: Sequence[int]) -> str:
    """What role a parameter probably has: for architectures without a class, and parts of fused parameters.

    Leaf modules call what they have `weight` and `bias`; anything else belongs to a module that has others in it.
    """
    module, _, leaf = name.rpartition(".")
    if any(word in f".{module}".lower() for word in _NORMS):
        return f"norm.{leaf}"
    if leaf not in ("weight", "bias") or not module:
        return "bare"
    if len(shape) > 2:
        return f"conv.{leaf}"
    embedding = len(shape) == 2 and _EMBEDDINGS.fullmatch(module.rpartition(".")[2])
    return f"{'embedding' if embedding else 'linear'}.{leaf}"


def _some(names: list[str]) -> str:
    return (", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")) or "none"
