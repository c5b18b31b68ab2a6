"""Resume: everything that decides how a training goes on, as JSON and tensors, and back.

Weights that learn, the optimiser, the schedule, the loss scale, and the generators of torch, numpy and Python. The
Trainer's own checkpoints hold the same as pickles, which can run code when they are read; nothing is pickled here.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from storage.errors import InvalidInput
from tasks.sharding import like, whole
from tasks.world import World

_PLAIN = (str, int, float, bool, type(None))


def flattened(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON, its tensors put into `tensors` under names that begin with `name`."""
    if isinstance(value, Tensor):
        tensors[name] = whole(value.detach())
        return {"tensor": name}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Mapping):  # keys may be numbers, which JSON would turn into texts
        return {"items": [[key, flattened(item, f"{name}.{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [flattened(item, f"{name}.{number}", tensors) for number, item in enumerate(value)]}
    raise InvalidInput(
        f"{name} is a {type(value).__name__}, which cannot be saved without pickling it",
        remedy="Set save_every to 0, so that this training is not saved while it is under way",
    )


def unflattened(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `flattened`."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "items":
        return {key: unflattened(item, tensors) for key, item in content}
    items = [unflattened(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


def learned(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that learn, by name; of a sharded model, their parts that are here."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def put_back(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give the parameters that learn these values."""
    with torch.no_grad():
        for name, parameter in learned(model).items():
            parameter.copy_(like(parameter, values[name]))


def generators(world: World) -> dict[str, Any]:
    """The states of all generators that a training may draw from; of one among several, those of its own GPU."""
    kind, words, *rest = np.random.get_state()
    found = {
        "python": random.getstate(),
        "numpy": (kind, np.asarray(words).tolist(), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state_all() if world.size == 1 else [torch.cuda.get_rng_state()]
    return found


def set_generators(states: Mapping[str, Any], world: World) -> None:
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states and world.size > 1:
        torch.cuda.set_rng_state(states["cuda"][0])
    elif "cuda" in states and torch.cuda.device_count() == len(states["cuda"]):
        torch.cuda.set_rng_state_all(states["cuda"])
