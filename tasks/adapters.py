"""Adapters: a LoRA adapter of peft, as the checkpoint that it makes of its base. The factors are kept as factors.

What peft writes: under the path of each module `lora_A.weight` [r, n] and `lora_B.weight` [m, r], of an embedding
`lora_embedding_A` [r, rows] and `lora_embedding_B` [columns, r], and under their own names the tensors that were saved
whole (biases, `modules_to_save`). The change of a weight is (alpha / r) B A, or (alpha / sqrt(r)) B A with rsLoRA
(arXiv 2106.09685, 2312.03732), and that of a bias as much of `lora_B.bias`. Layers that hold their weight the other way
round get (B A)'.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from storage.artifacts import Artifact, ArtifactStore
from storage.errors import InvalidInput, Mismatch
from storage.manifest import Lineage
from storage.refs import CheckpointRef, short
from tasks.checkpoints import skeleton_of
from tasks.inbox import ADAPTER, ADAPTER_CONFIG
from tasks.naming import Skeleton
from tasks.tensors import check_finite, dtype_name, prefixed, read_tensor
from tasks.tuners.base import Factors

_PREFIX = "base_model.model."
_PARTS = {
    "lora_A.weight": ("weight", "A"),
    "lora_B.weight": ("weight", "B"),
    "lora_B.bias": ("weight", "bias"),
    "lora_embedding_A": ("weight", "A'"),
    "lora_embedding_B": ("weight", "B'"),
}
_OTHER_MATHS = ("use_dora", "use_qalora", "use_bdlora", "target_parameters", "layer_replication")
_REMEDY = "Merge it where it was made (peft: model.merge_and_unload()), and submit the whole model"


def ingest_adapter(folder: Path, base: CheckpointRef, store: ArtifactStore) -> CheckpointRef:
    """The checkpoint that the adapter in `folder` makes of `base`; blobs of the base are shared.

    Raises InvalidInput for adapters of another kind than LoRA, and Mismatch if it does not fit the base.
    """
    source = store.open(base, "checkpoint")
    skeleton = skeleton_of(source)
    settings = _settings(folder)
    factors, whole = _read(folder, settings, skeleton, source)
    draft = store.draft("checkpoint", Lineage("ingest", {"base": base}, {"form": "lora"}))
    for record in source.manifest.tensors:
        where = f"{folder} on {short(base)}"
        if record.name in whole:
            tensor = whole.pop(record.name)
            _check_shape(record.name, tuple(tensor.shape), record.shape, where)
            check_finite(tensor, record.name, where)
            draft.add(
                record.name, {"tensor": tensor}, role=record.role, dtype=dtype_name(tensor.dtype), shape=record.shape
            )
        elif record.name in factors:
            one = factors.pop(record.name)
            _check_shape(record.name, (one.B.shape[0], one.A.shape[1]), record.shape, where)
            for factor in one:
                check_finite(factor, record.name, where)
            if record.rank is not None or record.onto is not None or record.codec != "dense@1":
                tuned = read_tensor(source, record.name).float() + one.B @ one.A
                draft.add(record.name, {"tensor": tuned}, role=record.role, dtype="F32", shape=record.shape)
                continue
            parts = {**prefixed({"tensor": one.A}, "A"), **prefixed({"tensor": one.B}, "B")}
            rank = one.A.shape[0]
            draft.add(
                record.name, parts, role=record.role, dtype="F32", shape=record.shape, rank=rank, onto=record.blob
            )
        else:
            draft.share(record)
    draft.share_assets(source.manifest.assets)
    draft.facts.update(source.manifest.facts)
    return CheckpointRef(draft.commit())


def _settings(folder: Path) -> Mapping[str, Any]:
    try:
        found = json.loads((folder / ADAPTER_CONFIG).read_bytes())
        kind = found["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInput(f"{folder / ADAPTER_CONFIG} is not the config of an adapter: {error!r}") from error
    if kind != "LORA":
        raise InvalidInput(f"{folder} is an adapter of the kind {kind!r}, and only LORA is read", remedy=_REMEDY)
    other = [name for name in _OTHER_MATHS if found.get(name)]
    if other:
        raise InvalidInput(f"{folder} is a LoRA adapter with {', '.join(other)}, which is not read", remedy=_REMEDY)
    settings: Mapping[str, Any] = found
    return settings


def _read(
    folder: Path, settings: Mapping[str, Any], skeleton: Skeleton, source: Artifact
) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    """Factors and whole tensors, by the canonical names of the base's tensors."""
    halves: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    paths: dict[str, str] = {}
    unknown = []
    for disk, tensor in _tensors(folder).items():
        name = disk.removeprefix(_PREFIX).replace(".base_layer.", ".")  # where peft has wrapped what it saves
        ending = next((one for one in _PARTS if name.endswith(f".{one}")), None)
        path = name.removesuffix(f".{ending}") if ending else ""
        target = _place(f"{path}.weight" if ending else name, skeleton, source)
        if target is None:
            unknown.append(disk)
        elif ending:
            halves.setdefault(target, {})[_PARTS[ending][1]] = tensor
            paths[target] = path
        else:
            whole[target] = tensor
    if unknown:
        raise Mismatch(
            f"{folder} on {short(source.ref)}",
            expected=f"tensors for the modules of {skeleton.architecture}",
            found=f"{len(unknown)} for others: {', '.join(sorted(unknown)[:3])}",
            remedy="It was trained on another model, or has a head that this base lacks",
        )
    transposed = bool(settings.get("fan_in_fan_out"))
    factors = {}
    for name, some in halves.items():
        bias = some.pop("bias", None)
        factors[name] = _product(some, paths[name], name, settings, transposed, folder)
        if bias is not None:
            own = f"{name.removesuffix('weight')}bias"
            if own not in source:
                raise Mismatch(f"{folder} on {short(source.ref)}", expected=f"a bias {own!r}", found="none")
            scale = _scale(settings, paths[name], some["A"].shape[0])
            whole[own] = read_tensor(source, own).float() + scale * bias.float()
    return factors, whole


def _product(
    halves: Mapping[str, Tensor], path: str, name: str, settings: Mapping[str, Any], transposed: bool, folder: Path
) -> Factors:
    """The change of one weight, the scale in B."""
    if sorted(halves) not in (["A", "B"], ["A'", "B'"]) or any(one.ndim != 2 for one in halves.values()):
        raise InvalidInput(f"{folder} has no pair of matrices for {name!r}, but {sorted(halves)}", remedy=_REMEDY)
    A, B = (halves[side].float() for side in sorted(halves))
    rank = A.shape[0]
    if B.shape[1] != rank:
        raise Mismatch(f"the factors of {name!r} in {folder}", expected=f"one rank ({rank})", found=B.shape[1])
    B = B * _scale(settings, path, rank)
    is_turned = transposed or "A'" in halves
    return Factors(A.T.contiguous(), B.T.contiguous()) if is_turned else Factors(B.contiguous(), A.contiguous())


def _scale(settings: Mapping[str, Any], path: str, rank: int) -> float:
    """What the product of the factors is multiplied by."""
    patterns = (settings.get("alpha_pattern") or {}).items()
    try:
        own = next((value for pattern, value in patterns if re.match(rf"(.*\.)?({pattern})$", path)), None)
    except re.error as error:
        raise InvalidInput(f"alpha_pattern of the adapter is no pattern: {error}") from error
    alpha = settings.get("lora_alpha", rank) if own is None else own
    return float(alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank))


def _place(memory: str, skeleton: Skeleton, source: Artifact) -> str | None:
    """The canonical name of a parameter that the adapter calls `memory`: its class may be one around the base's."""
    prefix = f"{skeleton.model.base_model_prefix}."
    for name in (skeleton.canonical(memory), memory.removeprefix(prefix)):
        found = skeleton.tied.get(name, name)
        if found in source:
            return found
    return None


def _tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / ADAPTER
    if not path.exists():
        raise InvalidInput(
            f"{folder} has no {ADAPTER}; pickled adapters are refused, because reading them can run code",
            remedy="Load it where you trust it and save it again: model.save_pretrained(folder)",
        )
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except (SafetensorError, OSError) as error:
        raise InvalidInput(f"{path} is not a readable safetensors file: {error}", remedy="Copy it again") from error


def _check_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...], where: str) -> None:
    if found != expected:
        raise Mismatch(
            f"tensor {name!r} of {where}",
            expected=list(expected),
            found=list(found),
            remedy="The adapter was trained on a model of another size",
        )
