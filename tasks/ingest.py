"""Ingest: a Hugging Face checkpoint, from a folder or the hub, into the store."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from safetensors import SafetensorError, safe_open
from torch import Tensor

from storage.artifacts import ArtifactStore
from storage.errors import InvalidInput, Unavailable
from storage.manifest import Lineage
from storage.refs import CheckpointRef
from tasks.checkpoints import CONFIG, config_of, write_checkpoint
from tasks.choice import Choice

if TYPE_CHECKING:
    from tasks.naming import Skeleton

_ASSETS = (".json", ".txt", ".model", ".jinja")
_NOT_ASSETS = ("model.safetensors.index.json", "trainer_state.json", "adapter_config.json")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_HUB_ID = re.compile(r"[\w\-.]+/[\w\-.]+")


@dataclass(frozen=True)
class Checkpoint(Choice):
    """A checkpoint somebody else made.

    source:       a folder, or a hub id such as `openai/clip-vit-base-patch32`
    revision:     branch, tag or commit of a hub id; give a commit for a chain that must never change
    architecture: the class to read it as, if not the one it names: `CLIPVisionModel` takes the vision tower of a
                  whole CLIP model, and what belongs to no parameter of that class is then left out
    ignore:       regular expressions for tensors that may be left out
    """

    name: Literal["checkpoint"] = "checkpoint"
    version: Literal[1] = 1
    source: str = ""
    revision: str | None = None
    architecture: str | None = None
    ignore: tuple[str, ...] = ()


def ingest(spec: Checkpoint, store: ArtifactStore, before: CheckpointRef | None = None) -> CheckpointRef:
    """Read `spec.source` into the store under canonical names, one tensor at a time.

    The ref depends on the weights and model files alone, not on where they were read from. With `before`, an earlier
    checkpoint of the same architecture, only what changed since is written, and the ref depends on it too.
    """
    folder = locate(spec)
    files = _weight_files(folder)
    config = _read_config(folder)
    from tasks.naming import Skeleton  # transformers takes seconds to import: only for those who need it

    skeleton = Skeleton(config, spec.architecture)
    assets = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if _is_asset(path)}
    assets[CONFIG] = config if spec.architecture is None else config_of(skeleton)
    tensors = _read(folder, files, skeleton, spec)
    if before is None:
        return write_checkpoint(store, skeleton, tensors, assets, Lineage("ingest"), where=spec.source)
    lineage, earlier = Lineage("ingest", {"before": before}), store.open(before, "checkpoint")
    return write_checkpoint(store, skeleton, tensors, assets, lineage, where=spec.source, before=earlier)


def locate(spec: Checkpoint) -> Path:
    """The folder of the checkpoint; a hub id is downloaded (safetensors and model files only)."""
    folder = Path(spec.source).expanduser()
    if folder.is_dir():
        return folder
    if not _HUB_ID.fullmatch(spec.source):
        raise InvalidInput(f"checkpoint {spec.source!r} is neither a folder nor a hub id like org/model")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    patterns = ["*.safetensors", *(f"*{suffix}" for suffix in _ASSETS)]
    try:
        return Path(snapshot_download(spec.source, revision=spec.revision, allow_patterns=patterns))
    except RepositoryNotFoundError as error:
        raise InvalidInput(
            f"the hub has no repository {spec.source!r} that you may read",
            remedy="Check the spelling; for private repositories set HF_TOKEN",
        ) from error
    except RevisionNotFoundError as error:
        raise InvalidInput(f"{spec.source!r} has no revision {spec.revision!r} on the hub") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise Unavailable(f"cannot download {spec.source!r} from the hub: {error}") from error


def _weight_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file, of a single or sharded checkpoint."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            shards = {name: folder / file for name, file in json.loads(index.read_bytes())["weight_map"].items()}
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise InvalidInput(f"{index} is not a shard index: {error!r}") from error
        outside = sorted(path for path in shards.values() if path.parent != folder or path.name == "..")
        if outside:
            raise InvalidInput(f"{index} names a shard that is not a file of this folder: {outside[0]}")
        absent = sorted({path.name for path in shards.values() if not path.exists()})
        if absent:
            raise InvalidInput(f"{index} names shards that are not there: {', '.join(absent)}")
        return shards
    single = folder / "model.safetensors"
    if single.exists():
        with _opened(single) as file:
            return dict.fromkeys(file.keys(), single)
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise InvalidInput(
            f"{folder} has weights only as pickles ({', '.join(pickles[:3])}), which can run code when they are read",
            remedy="Load the model where you trust it and save it again: model.save_pretrained(folder)",
        )
    raise InvalidInput(
        f"{folder} has no model.safetensors and no model.safetensors.index.json",
        remedy="A pull request on the hub often adds safetensors: then set `revision: refs/pr/<number>`",
    )


def _read(folder: Path, files: dict[str, Path], skeleton: Skeleton, spec: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    def read(name: str) -> Tensor:
        with _opened(files[name]) as file:
            try:
                tensor: Tensor = file.get_tensor(name)
            except SafetensorError as error:
                raise InvalidInput(f"{files[name]} does not hold {name!r}, as the shard index says") from error
            return tensor

    known = set(skeleton.slots) | set(skeleton.tied)
    refused = []
    for name, tensor in skeleton.from_disk(files, read):
        if name in known:
            yield name, tensor
        elif not (spec.architecture or skeleton.expected_extra(name) or any(re.search(p, name) for p in spec.ignore)):
            refused.append(name)
    if refused:
        raise InvalidInput(
            f"{folder} has {len(refused)} tensors that {skeleton.architecture} does not know: {', '.join(refused[:5])}",
            remedy="Set `architecture` to the class that was saved, or list patterns of what to leave out in `ignore`",
        )


def _opened(path: Path):  # type: ignore[no-untyped-def]
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InvalidInput(f"{path} is not a readable safetensors file: {error}", remedy="Copy it again") from error


def _read_config(folder: Path) -> bytes:
    try:
        return (folder / CONFIG).read_bytes()
    except FileNotFoundError:
        raise InvalidInput(f"{folder} has no {CONFIG}", remedy="Save the model with save_pretrained") from None


def _is_asset(path: Path) -> bool:
    return path.is_file() and path.suffix in _ASSETS and path.name not in _NOT_ASSETS
