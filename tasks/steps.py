"""Steps: a tensor stated against that of an earlier checkpoint, bit by bit. What changed little takes little."""

from __future__ import annotations

from torch import Tensor

from storage.artifacts import Artifact
from storage.errors import Mismatch
from storage.manifest import TensorRecord
from storage.refs import short
from tasks.codecs import Exact, Leaf
from tasks.tensors import dtype_name, foundation, read_tensor


def write_step(before: Artifact, name: str, tensor: Tensor, where: str) -> TensorRecord:
    """The record of `tensor`, which was `name` in the checkpoint `before`, stored as the steps between both.

    A tensor with the same bits is the earlier one, shared; what would save nothing is stored whole. `where` names the
    source of `tensor` in errors. Raises Mismatch if `before` has no such tensor, or of another shape.
    """
    held = before.record(name) if name in before else None
    if held is None or held.shape != tuple(tensor.shape):
        raise Mismatch(
            f"tensor {name!r} of {where}",
            expected=f"{list(held.shape) if held else 'no such tensor'} as in {short(before.ref)}",
            found=list(tensor.shape),
            remedy="Versions of one series have the same architecture: begin another series for this one",
        )
    base, codec = read_tensor(before, name), Exact()
    coded = codec.encode(Leaf(name, held.role, tensor, sides=lambda: (base, tensor)), {})
    dtype = dtype_name(tensor.dtype)
    if not coded.parts and dtype == held.dtype:
        return held
    ground = foundation(held, coded.codec)
    if ground is not None and sum(part.nbytes for part in coded.parts.values()) < tensor.nbytes:
        return before.store.write_tensor(
            name,
            coded.parts,
            role=held.role,
            dtype=dtype,
            shape=held.shape,
            codec=coded.codec,
            onto=ground[0],
            through=ground[1],
            digest=coded.digest,
        )
    return before.store.write_tensor(name, {"tensor": tensor}, role=held.role, dtype=dtype, shape=held.shape)
