"""Inboxes: checkpoints that others put into a folder or a bucket. Which of them are complete, and what is in them.

Everything here is told from listings, small JSON files and the first bytes of weights; no tensor is read. The digest
of an offer is over its weights, so that the same fine-tuning is the same content wherever it lies, and a tokenizer that
comes later, optimizer states or logs change nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import PurePosixPath

from storage.errors import InvalidInput
from storage.keys import Listed
from storage.manifest import canonical, digest
from storage.objects import ObjectStore

MARKER = "_SUCCESS"
CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PICKLED_INDEX = "pytorch_model.bin.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_ASSETS = (".json", ".txt", ".model", ".jinja")
_OF_TRAINERS = ("trainer_state.json", "training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth")
_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)(\.safetensors|\.bin)")
_MOST_SHARDS = 10_000
_HEADER = 100 * 2**20  # bytes that safetensors allows for a header


@dataclass(frozen=True)
class Offer:
    """A folder with weights in it. `folder` is its path below the inbox, empty for the inbox itself."""

    folder: str
    files: Mapping[str, Listed]

    @property
    def name(self) -> str:
        return PurePosixPath(self.folder).name

    @property
    def signature(self) -> str:
        """Changes when a file comes, goes, grows or is written again."""
        return digest(canonical([[name, one.bytes, one.modified] for name, one in sorted(self.files.items())]))

    @property
    def completed(self) -> float:
        """When the newest of its files was written, by the inbox's clock."""
        return max(one.modified for one in self.files.values())

    @property
    def is_adapter(self) -> bool:
        return ADAPTER_CONFIG in self.files and SINGLE not in self.files and INDEX not in self.files

    @property
    def weights(self) -> list[str]:
        """The files that its digest is over, by name: of an adapter its config too, which says how much it counts."""
        found = [name for name in self.files if name.endswith(".safetensors")]
        found = found or [name for name in self.files if name.endswith(_PICKLES) and name not in _OF_TRAINERS]
        return sorted([*found, ADAPTER_CONFIG] if found and self.is_adapter else found)

    @property
    def content(self) -> list[str]:
        """The files that an ingest reads, by name."""
        assets = {name for name in self.files if name.endswith(_ASSETS)}
        return sorted({*self.weights, *assets} - set(_OF_TRAINERS))


def task_name(folder: str) -> str:
    """A name as journals have them; folders are called all kinds of things."""
    return re.sub(r"[^A-Za-z0-9_.\-]+", "-", folder).strip("-.") or "submission"


def offers(inbox: ObjectStore) -> list[Offer]:
    """Every folder of the inbox that holds weights, complete or not."""
    folders: dict[str, dict[str, Listed]] = {}
    for one in inbox.listed(""):
        folder, _, name = one.key.rpartition("/")
        folders.setdefault(folder, {})[name] = one
    found = [Offer(folder, files) for folder, files in sorted(folders.items())]
    return [one for one in found if one.weights]


def offer_at(place: ObjectStore) -> Offer:
    """The checkpoint that lies in this very folder."""
    files = {one.key: one for one in place.listed("") if "/" not in one.key}
    found = Offer("", files)
    if not found.weights:
        raise InvalidInput(
            f"{place.url} holds no weights",
            remedy="Name a folder with model.safetensors, its shards, or an adapter of peft",
        )
    return found


def lacking(inbox: ObjectStore, offer: Offer) -> str:
    """What is still to come, as far as that can be known; empty if nothing is.

    A marker that is as new as the newest file speaks for all of them. What can never be read is not lacking: somebody
    has to look at it.
    """
    files = offer.files
    if MARKER in files and files[MARKER].modified >= max(files[name].modified for name in offer.content):
        return ""
    wanted = sorted(_wanted(inbox, offer) - set(files))
    if wanted:
        return f"{', '.join(wanted[:3])}{f' and {len(wanted) - 3} more' if len(wanted) > 3 else ''}"
    cut = (name for name in offer.content if _is_cut(inbox, files[name]))
    return next((f"the end of {name}" for name in cut), "")


def fingerprint(inbox: ObjectStore, offer: Offer) -> str:
    """The digest of an offer's content. Reads every byte of its weights."""
    return fingerprint_of(offer, {name: _digest_of(inbox, offer.files[name].key) for name in offer.weights})


def fingerprint_of(offer: Offer, digests: Mapping[str, str]) -> str:
    """The digest of an offer's content from the sha256 of its files, by their names."""
    return digest(canonical([[name, digests[name]] for name in offer.weights]))


def _wanted(inbox: ObjectStore, offer: Offer) -> set[str]:
    """The files without which this cannot be complete."""
    files = offer.files
    if offer.is_adapter or (ADAPTER in files and SINGLE not in files):
        pickled = any(name.endswith(_PICKLES) for name in offer.content)
        return {ADAPTER_CONFIG} if pickled else {ADAPTER_CONFIG, ADAPTER}
    numbered = {shard for name in files for shard in _siblings(name)}
    for index in (INDEX, _PICKLED_INDEX):
        if index in files:
            return {CONFIG, *numbered, *_shards(inbox, files[index])}
    if SINGLE in files or not any(name.endswith(".safetensors") for name in files):
        return {CONFIG}
    return {CONFIG, INDEX, *numbered}


def _siblings(name: str) -> set[str]:
    """All shards, if this is one by its name: `model-00002-of-00005.safetensors`."""
    found = _SHARD.fullmatch(name)
    if found is None or int(found[3]) > _MOST_SHARDS:
        return set()
    digits = len(found[3])
    return {f"{found[1]}-{number:0{digits}d}-of-{found[3]}{found[4]}" for number in range(1, int(found[3]) + 1)}


def _shards(inbox: ObjectStore, index: Listed) -> Iterator[str]:
    """The files that an index names; none if it is no index, which whoever reads it will say."""
    data = inbox.get(index.key)
    try:
        named = json.loads(data)["weight_map"].values()
        yield from {name for name in named if isinstance(name, str)}
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return


def _is_cut(inbox: ObjectStore, file: Listed) -> bool:
    """Whether a file is still being written: weights that are shorter than their header says, settings that are no
    JSON yet. Weights without a header are not cut, but bad."""
    name = file.key.rpartition("/")[2]
    if name in (CONFIG, INDEX, ADAPTER_CONFIG):
        data = inbox.get(file.key)
        try:
            json.loads(data)
        except (ValueError, RecursionError):
            return True
        return False
    return name.endswith(".safetensors") and _ends_early(inbox, file)


def _ends_early(inbox: ObjectStore, file: Listed) -> bool:
    pieces = inbox.read(file.key)
    data = b""
    try:
        for piece in pieces:
            data += piece
            if len(data) >= 8 and len(data) >= 8 + min(int.from_bytes(data[:8], "little"), _HEADER):
                break
    finally:
        close = getattr(pieces, "close", None)
        if close is not None:
            close()
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > _HEADER:
        return len(data) < 8
    if len(data) < 8 + size:
        return True
    try:
        header = json.loads(data[8 : 8 + size])
        ends = [one["data_offsets"][1] for name, one in header.items() if name != "__metadata__"]
        return bool(8 + size + max(ends, default=0) > file.bytes)
    except (ValueError, KeyError, IndexError, AttributeError, TypeError, RecursionError):
        return False


def _digest_of(inbox: ObjectStore, key: str) -> str:
    seen = sha256()
    for piece in inbox.read(key):
        seen.update(piece)
    return seen.hexdigest()
