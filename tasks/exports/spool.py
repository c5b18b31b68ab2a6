"""A spool: tensors of sizes that nobody knows beforehand, gathered on disk and then written as safetensors.

Ranks and numbers of changed entries are only known once a tensor is done, but a header comes before the tensors. So
they wait in an unnamed file in the new folder, and not in memory.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryFile

import torch
from torch import Tensor

from storage.errors import InvalidInput
from tasks.folders.reader import SINGLE, bytes_of
from tasks.folders.writer import Form, ShardWriter

_CHUNK = 16 << 20


class Spool:
    """Holds the tensors of one file. Use `put` in any order, `write` once, and `close`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = TemporaryFile(dir=folder)  # noqa: SIM115 (closed by `close`)
        self._forms: dict[str, Form] = {}
        self._starts: dict[str, int] = {}

    @property
    def bytes(self) -> int:
        return sum(form.bytes for form in self._forms.values())

    def put(self, name: str, tensor: Tensor) -> None:
        if name in self._forms:
            raise InvalidInput(f"two tensors would be called {name!r}")
        flat = tensor.detach().cpu().contiguous()
        self._forms[name] = Form(flat.dtype, tuple(flat.shape))
        self._starts[name] = self._file.tell()
        if flat.numel():
            self._file.write(bytes_of(flat.reshape(-1)))

    def write(self, file: str) -> None:
        """Write all tensors, sorted by name, to `file` in the folder."""
        forms = {name: self._forms[name] for name in sorted(self._forms)}
        writer = ShardWriter(self._folder, forms, self.bytes + 1)
        try:
            for name, form in forms.items():
                self._copy(writer, name, form)
        finally:
            writer.close()
        (self._folder / SINGLE).rename(self._folder / file)  # it is no model, and should not be called so

    def close(self) -> None:
        """Give the room on the disk back."""
        self._file.close()

    def _copy(self, writer: ShardWriter, name: str, form: Form) -> None:
        self._file.seek(self._starts[name])
        done = 0
        while done < form.bytes:
            data = bytearray(self._file.read(min(_CHUNK, form.bytes - done)))
            writer.write(name, done // form.dtype.itemsize, torch.frombuffer(data, dtype=form.dtype))
            done += len(data)
