"""Canonical parameter names: one name per parameter, whichever file or class it came from.

The same architecture has files of several forms (transformers 5 renames and even fuses tensors on loading, and some
hub files carry a prefix that freshly saved ones lack). A skeleton is the architecture without its weights; the
canonical name of a parameter is its name in the skeleton's memory, without the backbone's prefix, so that
`BertModel` and `BertForSequenceClassification` agree on every tensor they share.

Only this file touches transformers' loading machinery (`conversion_mapping`, `core_model_loading`).
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.pytorch_utils import Conv1D

from storage.errors import InvalidInput

Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class Slot:
    """One parameter of the architecture: its name in memory, its shape, its role in the module that owns it."""

    memory: str
    shape: tuple[int, ...]
    role: str


class Skeleton:
    """An architecture on the meta device: names, shapes, roles and ties, no weights."""

    def __init__(self, config_json: bytes, architecture: str | None = None) -> None:
        self.config, self.model_class = _resolve(config_json, architecture)
        with torch.device("meta"):
            self.model: PreTrainedModel = self.model_class(self.config)
        prefix = self.model.base_model_prefix
        self._prefix = f"{prefix}." if prefix and hasattr(self.model, prefix) else ""
        tied: dict[str, str] = dict(self.model.all_tied_weights_keys)
        self.tied = {self.canonical(name): self.canonical(source) for name, source in tied.items()}
        roles = _roles(self.model)
        self.slots: dict[str, Slot] = {}
        for memory, tensor in self.model.state_dict().items():
            name = self.canonical(memory)
            if name in self.slots:
                raise InvalidInput(f"{self.architecture}: {memory} and {self.slots[name].memory} share a name")
            if name not in self.tied:
                self.slots[name] = Slot(memory, tuple(tensor.shape), roles[memory])

    @property
    def architecture(self) -> str:
        return self.model_class.__name__

    def canonical(self, memory: str) -> str:
        return memory.removeprefix(self._prefix)

    def expected_extra(self, disk: str) -> bool:
        """Names that older versions wrote and transformers ignores: buffers that are computed, not learned."""
        buffers = {name.rpartition(".")[2] for name, _ in self.model.named_buffers()} | {"inv_freq", "position_ids"}
        patterns = self.model._keys_to_ignore_on_load_unexpected or ()
        return disk.rpartition(".")[2] in buffers or any(re.search(pattern, disk) for pattern in patterns)

    def from_disk(self, names: Iterable[str], read: Read) -> Iterator[tuple[str, Tensor]]:
        """Canonical (name, tensor) pairs from the names of a file, read one group at a time.

        A group is one tensor, or the few that transformers fuses into one (the experts of a layer). Names that fit
        nowhere come out as they are: the caller decides whether that is an error.
        """
        transforms = get_model_conversion_mapping(self.model)
        renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
        converters = [one for one in transforms if isinstance(one, WeightConverter)]
        by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
        meta = self.model.state_dict()
        prefix = self.model.base_model_prefix
        groups: dict[str, list[tuple[str, str | None]]] = {}
        for disk in sorted(names, key=dot_natural_key):
            memory, pattern = rename_source_key(disk, renamings, converters, prefix, meta)
            if memory not in meta and disk in meta:
                memory, pattern = disk, None
            groups.setdefault(memory, []).append((disk, pattern))
        for memory, members in groups.items():
            if members[0][1] is None:
                for disk, _ in members:
                    yield self.canonical(memory), read(disk)
                continue
            converter = deepcopy(by_pattern[members[0][1]])
            for disk, pattern in members:
                converter.add_tensor(memory, disk, pattern, read(disk))
            for target, found in converter.convert(memory, model=self.model, config=self.config).items():
                yield self.canonical(target), found[0] if isinstance(found, list) else found

    def to_disk(self, read: Read) -> Iterator[tuple[str, Tensor]]:
        """The inverse: (name, tensor) pairs as `save_pretrained` would write them. `read` takes canonical names."""
        transforms = get_model_conversion_mapping(self.model, add_legacy=False)
        reverse = [one.reverse_transform() for one in transforms[::-1] if not isinstance(one, PrefixChange)]
        renamings = [one for one in reverse if isinstance(one, WeightRenaming)]
        converters = [one for one in reverse if isinstance(one, WeightConverter)]
        by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
        groups: dict[str, list[tuple[str, str]]] = {}
        for name, slot in sorted(self.slots.items(), key=lambda item: dot_natural_key(item[1].memory)):
            matched, pattern = rename_source_key(slot.memory, [], converters, reverse=True)
            if pattern is None:
                yield rename_source_key(slot.memory, renamings, [], reverse=True)[0], read(name)
            else:
                groups.setdefault(matched, []).append((name, pattern))
        for matched, members in groups.items():
            converter = deepcopy(by_pattern[members[0][1]])
            for name, pattern in members:
                converter.add_tensor(matched, self.slots[name].memory, pattern, read(name))
            for target, found in converter.convert(matched, model=self.model, config=self.config).items():
                disk = rename_source_key(target, renamings, [], reverse=True)[0]
                yield disk, found[0] if isinstance(found, list) else found


def _resolve(config_json: bytes, architecture: str | None) -> tuple[Any, type[PreTrainedModel]]:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_bytes(config_json)
        try:
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except (ValueError, KeyError, OSError) as error:
            raise InvalidInput(
                f"config.json is not a configuration that transformers {transformers.__version__} knows: {error}"
            ) from error
        wanted = architecture or next(iter(config.architectures or ()), None)
        if wanted is None:
            raise InvalidInput(
                f"config.json of model type {config.model_type!r} names no architecture",
                remedy="Set `architecture` to the class to load, for instance BertModel",
            )
        model_class = getattr(transformers, wanted, None)
        if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
            raise InvalidInput(
                f"architecture {wanted!r} is not a model class of transformers {transformers.__version__}",
                remedy="Code from a checkpoint is never run; set `architecture` to a class that transformers has",
            )
        config_class: Any = model_class.config_class  # type: ignore[attr-defined]
        if not isinstance(config, config_class):  # the vision tower of a CLIP checkpoint, for instance
            config = config_class.from_pretrained(folder)
    config.architectures = [wanted]
    return config, model_class


def _roles(model: nn.Module) -> dict[str, str]:
    """Role of every entry of the state dict: what its module is, and which of its parameters it is."""
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for leaf, _ in own:
            name = f"{path}.{leaf}" if path else leaf
            found[name] = "bare" if any(True for _ in module.children()) else f"{_family(module)}.{leaf}"
    for name in model.state_dict():  # tied parameters appear once above, under the first of their names
        found.setdefault(name, "tied")
    return found


def _family(module: nn.Module) -> str:
    match module:
        case nn.Linear() | Conv1D():
            return "linear"
        case nn.Embedding():
            return "embedding"
        case nn.Conv1d() | nn.Conv2d() | nn.Conv3d():
            return "conv"
        case _:
            kind = type(module).__name__.lower()
            return "norm" if "norm" in kind else kind
