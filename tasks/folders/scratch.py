"""Scratch: results that took longer to compute than to read back, kept on disk from one pass to the next."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file

from tasks.mergers import Parts

_BYTES_PER_SECOND = 200e6  # what any disk manages, there and back


class Scratch:
    """Tensors by key in a folder of their own. What is kept depends on the time it took; results never do."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def offer(self, key: str, parts: Parts, seconds: float) -> None:
        """Keep `parts` if reading them is cheaper than the `seconds` that they took."""
        if parts and sum(part.nbytes for part in parts.values()) < seconds * _BYTES_PER_SECOND:
            self._folder.mkdir(exist_ok=True)
            save_file({name: part.contiguous() for name, part in parts.items()}, self._path(key))

    def take(self, key: str) -> Parts | None:
        path = self._path(key)
        return load_file(path) if path.exists() else None

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.safetensors"
