"""The manifest: what an artifact is made of and where it came from, as canonical JSON.

Canonical means that equal content gives equal bytes and therefore an equal ref: keys sorted, no spaces, UTF-8, floats
in Python's shortest round-trip form, no NaN or infinity, tensors sorted by name. There is no clock and no host in a
manifest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from storage import trust
from storage.errors import Damaged, InvalidInput

FORMAT = "deltaworks/1"


@dataclass(frozen=True)
class TensorRecord:
    """One tensor of an artifact.

    name:   the parameter's canonical name (see tasks/naming.py)
    role:   what the parameter is in its module: `linear.weight`, `norm.bias`, `embedding.weight`, `bare` ...
    dtype:  of the decoded tensor, in safetensors' spelling: `F32`, `BF16` ...
    shape:  of the decoded tensor
    blob:   sha256 of the safetensors file with the tensor's parts
    bytes:  size of that file
    codec:  who decodes the parts, `name@version`
    rank:   if set, the parts are the factors B [m, rank] and A [rank, n] of the tensor [m, n], each coded by `codec`
    onto:   if set, sha256 of the dense blob that the tensor is stated against: the decoded tensor is added to it, or,
            of lossless codecs, decoded from it
    through: of lossless codecs, sha256 of the blobs between `onto` and `blob`, by the same codec: each is decoded from
            what the one before it gave. So a tensor can be stated against one that is itself stated against another
    digest: if set, sha256 of the decoded tensor's bytes, checked whenever it is read
    error:  if set, what a lossy codec changed: the Frobenius norm of the difference over that of what was coded
    """

    name: str
    role: str
    dtype: str
    shape: tuple[int, ...]
    blob: str
    bytes: int
    codec: str = "dense@1"
    rank: int | None = None
    onto: str | None = None
    digest: str | None = None
    error: float | None = None
    through: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        trust.check_name(self.name, "the name of a tensor")
        what = f"tensor {self.name!r}"
        for field_ in ("role", "dtype", "codec"):
            trust.check_name(getattr(self, field_), f"{what}, {field_}")
        trust.check_shape(self.shape, f"{what}, shape")
        trust.check_count(self.bytes, f"{what}, bytes")
        trust.check_digest(self.blob, f"{what}, blob")
        for optional in ("onto", "digest"):
            if getattr(self, optional) is not None:
                trust.check_digest(getattr(self, optional), f"{what}, {optional}")
        for blob in self.through:
            trust.check_digest(blob, f"{what}, through")
        if self.rank is not None:
            trust.check_count(self.rank, f"{what}, rank")
        if self.error is not None:
            trust.check_number(self.error, f"{what}, error")

    @property
    def elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    def as_json(self) -> dict[str, Any]:
        found = {key: value for key, value in self.__dict__.items() if value is not None and value != ()}
        return {**found, "shape": list(self.shape)}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> TensorRecord:
        return cls(**{**found, "shape": tuple(found["shape"]), "through": tuple(found.get("through", ()))})


@dataclass(frozen=True)
class Asset:
    """A file carried beside the tensors (config.json, tokenizer.json, scores.parquet), stored as a blob of its own."""

    blob: str
    bytes: int

    def __post_init__(self) -> None:
        trust.check_digest(self.blob, "the blob of an asset")
        trust.check_count(self.bytes, "the bytes of an asset")


@dataclass(frozen=True)
class Lineage:
    """How an artifact was made: which step, from which refs, with which settings."""

    step: str
    inputs: Mapping[str, str] = field(default_factory=dict)
    spec: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        trust.check_name(self.step, "the step of a lineage")
        trust.check_inputs(self.inputs, "the inputs of a lineage")
        trust.check_mapping(self.spec, "the spec of a lineage")


@dataclass(frozen=True)
class Manifest:
    """Everything about an artifact except its bytes. `facts` are numbers and short texts that the step found."""

    kind: str
    lineage: Lineage
    tensors: tuple[TensorRecord, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    assets: Mapping[str, Asset] = field(default_factory=dict)

    def __post_init__(self) -> None:
        trust.check_mapping(self.facts, "facts")
        for name in self.assets:
            trust.check_file_name(name, "the name of an asset")
        names = [record.name for record in self.tensors]
        if names != sorted(set(names)):
            raise InvalidInput(f"the tensors of a {self.kind} must be sorted by name, each once")

    @property
    def tensor_bytes(self) -> int:
        """Bytes of the distinct tensor blobs this artifact reads, those it shares with others included."""
        sizes = {record.blob: record.bytes for record in self.tensors}
        return sum(sizes.values())

    @property
    def parameters(self) -> int:
        return sum(record.elements for record in self.tensors)

    def blobs(self) -> set[str]:
        """Every blob that must be there for this artifact to be whole."""
        found = {record.blob for record in self.tensors} | {asset.blob for asset in self.assets.values()}
        found |= {record.onto for record in self.tensors if record.onto}
        return found.union(*(record.through for record in self.tensors))


def canonical(value: Any) -> bytes:
    """Canonical JSON of `value`: equal values, equal bytes."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"cannot be written as canonical JSON: {error}") from error


def digest(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def encode_manifest(manifest: Manifest) -> bytes:
    return canonical(
        {
            "format": FORMAT,
            "kind": manifest.kind,
            "tensors": [record.as_json() for record in manifest.tensors],
            "lineage": {
                "step": manifest.lineage.step,
                "inputs": dict(manifest.lineage.inputs),
                "spec": dict(manifest.lineage.spec),
            },
            "facts": dict(manifest.facts),
            "assets": {name: {"blob": a.blob, "bytes": a.bytes} for name, a in manifest.assets.items()},
        }
    )


def decode_manifest(data: bytes, *, source: str) -> Manifest:
    """The inverse of `encode_manifest`. `source` names the object in errors."""
    try:
        found = json.loads(data, parse_constant=_refuse)
        if found["format"] != FORMAT:
            raise Damaged(
                f"{source} has format {found['format']!r}, this version reads {FORMAT!r}",
                remedy="Read it with the version of Deltaworks that wrote it",
            )
        return Manifest(
            kind=found["kind"],
            tensors=tuple(TensorRecord.from_json(one) for one in found["tensors"]),
            lineage=Lineage(**found["lineage"]),
            facts=found["facts"],
            assets={name: Asset(**asset) for name, asset in found["assets"].items()},
        )
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:  # also InvalidInput
        said = ascii(str(error))[1:-1][:300]
        raise Damaged(
            f"{source} is not a manifest: {type(error).__name__}: {said}", remedy="Restore it from a copy of the store"
        ) from error


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number that a manifest may hold")
