"""Checkpoints in the store: writing tensors with their model files, and loading a model without a detour over disk."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from storage.artifacts import Artifact, ArtifactStore
from storage.errors import Mismatch
from storage.manifest import Lineage
from storage.refs import CheckpointRef
from tasks.codecs.streams import tensor_digest
from tasks.exclusive import PROCESS_STATE
from tasks.steps import write_step
from tasks.tensors import check_finite, dtype_name, read_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tasks.naming import Skeleton

CONFIG = "config.json"
HISTORY = "training.json"  # asset of tuned checkpoints: the loss at every tenth of the training


def skeleton_of(checkpoint: Artifact) -> Skeleton:
    from tasks.naming import Skeleton  # transformers takes seconds to import: only for those who need it

    return Skeleton(checkpoint.asset(CONFIG))


def write_checkpoint(
    store: ArtifactStore,
    skeleton: Skeleton,
    tensors: Iterable[tuple[str, Tensor]],
    assets: Mapping[str, bytes],
    lineage: Lineage,
    *,
    where: str,
    before: Artifact | None = None,
) -> CheckpointRef:
    """Store a whole model from its canonical (name, tensor) pairs, one tensor at a time.

    Shapes and names are held against the skeleton, numbers must be finite, tied weights are stored once. `where`
    names the source in errors. `before`: an earlier checkpoint of the same architecture that tensors are stated
    against, bit by bit (tasks/steps.py); its ref belongs into the lineage.
    """
    draft = store.draft("checkpoint", lineage)
    copies: dict[str, str] = {}
    originals: dict[str, str] = {}
    ties = set(skeleton.tied.values())
    for name, tensor in tensors:
        if name in skeleton.tied:
            copies[name] = tensor_digest(tensor)
            continue
        slot = skeleton.slots[name]
        if tuple(tensor.shape) != slot.shape:
            raise Mismatch(f"tensor {name!r} of {where}", expected=list(slot.shape), found=list(tensor.shape))
        check_finite(tensor, name, where)
        if before is not None:
            draft.share(write_step(before, name, tensor, where))
        else:
            draft.add(name, {"tensor": tensor}, role=slot.role, dtype=dtype_name(tensor.dtype), shape=slot.shape)
        if name in ties:
            originals[name] = tensor_digest(tensor)
    _check_ties(copies, originals, skeleton, where)
    written = set(draft.names)
    missing = sorted(set(skeleton.slots) - written)
    if missing:
        raise Mismatch(
            f"{where} as {skeleton.architecture}",
            expected=f"{len(skeleton.slots)} tensors",
            found=f"{len(written)}; missing {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}",
            remedy="Set `architecture` to the class that was saved, or complete the checkpoint",
        )
    for name, data in assets.items():
        draft.add_asset(name, data)
    draft.facts.update({"architecture": skeleton.architecture, "tied": skeleton.tied})
    return CheckpointRef(draft.commit())


def _check_ties(copies: Mapping[str, str], originals: Mapping[str, str], skeleton: Skeleton, where: str) -> None:
    """Files may hold both names of a tied tensor. They must then agree, because only one is kept."""
    for name, copy in copies.items():
        source = skeleton.tied[name]
        if originals.get(source) != copy:
            raise Mismatch(
                f"tensor {name!r} of {where}",
                expected=f"equal to {source!r}, which the config ties it to",
                found="other numbers" if source in originals else f"no {source!r}",
                remedy="Set tie_word_embeddings to false in config.json if they really differ",
            )


def load_model(checkpoint: Artifact, device: str = "cpu", dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model in evaluation mode, on `device`, in its stored dtypes or all in `dtype`.

    Peak memory is the model plus one tensor.
    """
    from transformers.initialization import no_init_weights

    skeleton = skeleton_of(checkpoint)
    with PROCESS_STATE, no_init_weights():
        model: PreTrainedModel = skeleton.model_class(skeleton.config)
    places = dict(model.state_dict(keep_vars=True))
    with torch.no_grad():
        for name, slot in skeleton.slots.items():
            tensor = read_tensor(checkpoint, name)
            place = places[slot.memory]
            place.data = tensor.to(dtype or tensor.dtype) if tensor.is_floating_point() else tensor
    model.tie_weights()
    return model.to(device).eval()


def config_of(skeleton: Skeleton) -> bytes:
    """config.json of a skeleton, without the library's version, which would change the ref at every upgrade."""
    found = skeleton.config.to_diff_dict()
    found.pop("transformers_version", None)
    return json.dumps(found, indent=2, sort_keys=True).encode()


@contextmanager
def assets_folder(artifact: Artifact) -> Iterator[Path]:
    """The artifact's assets as files, for libraries that read tokenizers and processors from a folder."""
    with tempfile.TemporaryDirectory() as folder:
        for name in artifact.manifest.assets:
            artifact.save_asset(name, Path(folder, name))
        yield Path(folder)
