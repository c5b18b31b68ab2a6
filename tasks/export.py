"""Export: a checkpoint of the store as a Hugging Face folder, which `from_pretrained` loads anywhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp

import safetensors.torch
from torch import Tensor

from storage.artifacts import ArtifactStore
from storage.errors import InvalidInput, StoreFull
from storage.refs import CheckpointRef
from tasks.checkpoints import HISTORY, skeleton_of
from tasks.tensors import read_tensor

SHARD_BYTES = 2 << 30
CARD = "README.md"


def export(
    model: CheckpointRef,
    folder: Path,
    store: ArtifactStore,
    shard_bytes: int = SHARD_BYTES,
    report: Callable[[int, int], None] = lambda done, total: None,
    card: str = "",
) -> list[Path]:
    """Write `model` to `folder`: config, tokenizer or processor files, and safetensors under their names on disk.
    `card`: the text of its README.md (tasks/card.py).

    The folder must be new or empty. It appears whole or not at all. Peak memory is one shard. Returns the files.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        what = "not empty" if folder.is_dir() else "not a folder"
        raise InvalidInput(f"{folder} is {what}", remedy="Name a new folder; nothing is overwritten")
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _write(model, work, store, shard_bytes, report)
        if card:
            (work / CARD).write_text(card)
        work.chmod(0o755)
        work.replace(folder)  # atomic on one file system, and replaces an empty folder
    except OSError as error:
        raise StoreFull(f"cannot write {folder}: {error}", remedy="Free some space and export again") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return sorted(folder.iterdir())


def _write(
    model: CheckpointRef, folder: Path, store: ArtifactStore, limit: int, report: Callable[[int, int], None]
) -> None:
    artifact = store.open(model, "checkpoint")
    total = len(artifact.names)
    shards: list[dict[str, int]] = []
    shard: dict[str, Tensor] = {}

    def flush() -> None:
        path = folder / f"part-{len(shards):05d}"
        safetensors.torch.save_file(shard, path, metadata={"format": "pt"})
        shards.append({name: tensor.nbytes for name, tensor in shard.items()})
        shard.clear()

    for done, (name, tensor) in enumerate(skeleton_of(artifact).to_disk(lambda name: read_tensor(artifact, name))):
        if shard and sum(held.nbytes for held in shard.values()) + tensor.nbytes > limit:
            flush()
        shard[name] = tensor.contiguous()
        report(min(done + 1, total), total)
    flush()
    _name_shards(folder, shards)
    for name in set(artifact.manifest.assets) - {HISTORY}:
        artifact.save_asset(name, folder / name)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes files that only their owner can read


def _name_shards(folder: Path, shards: list[dict[str, int]]) -> None:
    """Give the parts the names transformers looks for, which hold their number and so are known only at the end."""
    if len(shards) == 1:
        (folder / "part-00000").rename(folder / "model.safetensors")
        return
    weights: dict[str, str] = {}
    for number, shard in enumerate(shards):
        name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"part-{number:05d}").rename(folder / name)
        weights.update(dict.fromkeys(shard, name))
    size = sum(bytes for shard in shards for bytes in shard.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weights.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
