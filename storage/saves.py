"""Saves: where a training that is under way has got to. A short cut like a memo: without it the training starts anew.

    training/<content key>/<step>/<00000000, ...>    safetensors files with the tensors
    training/<content key>/<step>/state              JSON: names and digests of these files, and all that is no tensor

The state is written last, so a save that can be read is whole. Only the newest is kept, and none once the training has
ended. Nothing is pickled. No artifact names a save: whoever wants the room may remove all of `training/`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from storage.blobs import Parts, decode_parts, encode_parts
from storage.errors import Damaged, Missing
from storage.manifest import digest
from storage.objects import ObjectStore

_FILE = 256 * 2**20  # bytes of tensors in one file, so that a large training is never in memory as a whole twice
_STATE = "state"


class Save(NamedTuple):
    """After `step` steps: `state` is plain JSON, `tensors` by the names that the state knows them by."""

    step: int
    state: dict[str, Any]
    tensors: Parts


class Saves:
    """The saves of the training with content key `key`."""

    def __init__(self, objects: ObjectStore, key: str) -> None:
        self._objects = objects
        self._root = f"training/{key}"

    def write(self, step: int, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Store a save, then remove those before it."""
        place = self._place(step)
        files = []
        for number, lot in enumerate(_lots(tensors)):
            data = encode_parts(lot)
            self._objects.put(f"{place}/{number:08d}", data)
            files.append({"file": f"{number:08d}", "sha256": digest(data)})
        self._objects.put(f"{place}/{_STATE}", json.dumps({"files": files, "state": state}).encode())
        self._remove(keep=f"{place}/")

    def newest(self) -> Save | None:
        """The newest save that is whole. One that is damaged is passed over: the training repeats some steps."""
        states = [key for key in self._objects.list(f"{self._root}/") if key.endswith(f"/{_STATE}")]
        for key in sorted(states, reverse=True):
            try:
                return self._read(key.removesuffix(f"/{_STATE}"))
            except (Missing, Damaged, ValueError, KeyError, TypeError):
                continue
        return None

    def clear(self) -> None:
        self._remove(keep=None)

    def _read(self, place: str) -> Save:
        found = json.loads(self._objects.get(f"{place}/{_STATE}"))
        tensors: Parts = {}
        for file in found["files"]:
            key = f"{place}/{file['file']}"
            data = self._objects.view(key)
            if digest(data) != file["sha256"]:
                raise Damaged(f"{key} is not what was written")
            tensors |= decode_parts(data, what=key)
        return Save(int(place.rpartition("/")[2]), found["state"], tensors)

    def _place(self, step: int) -> str:
        return f"{self._root}/{step:010d}"

    def _remove(self, keep: str | None) -> None:
        """States go first: what is left of a removal that was cut short is no save."""
        keys = [key for key in self._objects.list(f"{self._root}/") if keep is None or not key.startswith(keep)]
        for key in sorted(keys, key=lambda key: not key.endswith(f"/{_STATE}")):
            self._objects.delete(key)


def _lots(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    lot: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if lot and size + tensor.nbytes > _FILE:
            yield lot
            lot, size = {}, 0
        lot[name] = tensor
        size += tensor.nbytes
    if lot:
        yield lot
