"""Sharding: weights, gradients and the optimizer's state spread over the processes of a training (PyTorch's FSDP2).

Each layer is put together when it is computed, and taken apart again. What is saved and stored is always whole: a
training that was saved by one number of processes goes on with another.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from tasks.world import World


def shard(model: nn.Module, world: World, device: torch.device) -> None:
    """Spread `model`, which all processes hold with equal weights, layer by layer, onto their devices."""
    mesh = init_device_mesh(device.type, (world.size,))
    layers = {
        name
        for module in model.modules()
        if isinstance(module, PreTrainedModel)
        for name in module._no_split_modules or ()
    }
    for module in list(model.modules()):
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def spread_again(model: nn.Module) -> None:
    """Take apart what a forward without a backward has left together: until then it has other parameters."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """The tensor put together on the CPU, if it is spread. Then all processes must call it."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def part(tensor: Tensor) -> Tensor:
    """What this process has of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(place: Tensor, value: Tensor) -> Tensor:
    """`value`, of which all processes have the whole, spread as `place` is."""
    if not isinstance(place, DTensor):
        return value
    moved = value.to(place.device, place.dtype, copy=True)  # what was read from a file cannot be resized
    return distribute_tensor(moved, place.device_mesh, place.placements, src_data_rank=None)


def spread_state(optimizer: Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of an optimizer, saved whole, as it belongs to the parameters of `optimizer`."""
    places = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not any(isinstance(place, DTensor) for place in places):
        return dict(state)
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    known = dict(zip(numbers, places, strict=True))

    def fitted(number: Any, value: Any) -> Any:
        same = isinstance(value, Tensor) and value.shape == known[number].shape
        return like(known[number], value) if same else value

    spread = {
        number: {name: fitted(number, value) for name, value in one.items()} for number, one in state["state"].items()
    }
    return {**state, "state": spread}


def put_together(model: nn.Module, world: World) -> None:
    """Every spread parameter whole again, on the CPU, in place: the model can be read, but not run any more.

    In the leading process: the others help, and keep what they have.
    """
    spread_again(model)
    found: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if not isinstance(parameter, DTensor):
                continue
            if id(parameter) not in found:
                values = whole(parameter.detach())
                kept = values if world.leads else torch.empty(0)
                found[id(parameter)] = nn.Parameter(kept, requires_grad=parameter.requires_grad)
            module.register_parameter(name, found[id(parameter)])
        if isinstance(module, FSDPModule):
            module.__class__ = type(module).__bases__[1]  # what it was before: FSDP moves only what is spread
