"""Tuners against their papers: what is added to a weight, how many numbers learn, and where."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, set_seed

from storage.artifacts import ArtifactStore
from storage.objects import MemoryObjects
from tasks.checkpoints import skeleton_of
from tasks.data import Digits
from tasks.digits_base import DigitsBase, train_digits_base
from tasks.fine_tune import fine_tune
from tasks.naming import Skeleton
from tasks.suites import ImageClassification
from tasks.suites.heads import Orthonormal
from tasks.tensors import read_tensor
from tasks.tuners import AdaLora, AnyTuner, Factors, Lora, Osf, RandLora, Shira
from tasks.tuners.adalora import Allocation, penalty
from tasks.tuners.targets import find
from tests.builders import ingested, memory_store, tiny_model

SUITE = ImageClassification(data=Digits(view="rot90", limit=128), head=Orthonormal())
SCHEDULE: dict[str, Any] = {"steps": 10, "batch": 16, "learning_rate": 1e-2}


class Tiny:
    """A small model, a tuner attached to it, and what it makes of it."""

    def __init__(self, tuner: AnyTuner, folder: Path, architecture: str = "ViTModel") -> None:
        store = memory_store()
        self.base = tiny_model(architecture)
        self.skeleton: Skeleton = skeleton_of(store.open(ingested(self.base, folder, store)))
        self.tuner, self.model = tuner, deepcopy(self.base)
        set_seed(tuner.seed)
        tuner.attach(self.model, self.skeleton)

    def drawn(self) -> Tiny:
        """With numbers where zeros would hide a mistake."""
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(generator=generator, std=0.1)
        return self

    def layer(self, path: str) -> Any:
        return self.model.get_submodule(path)

    def kept(self, path: str) -> Any:
        return dict(self.tuner.collect(self.model, self.skeleton))[f"{path}.weight"]

    def weight(self, path: str) -> Tensor:
        return self.base.get_submodule(path).weight.detach()  # type: ignore[return-value]


PATH = "layers.0.mlp.fc1"


@pytest.mark.parametrize(("rslora", "scale"), [(False, 6.0 / 4), (True, 6.0 / 2)])
def test_lora_adds_scaled_b_a(rslora: bool, scale: float, tmp_path: Path) -> None:
    """alpha / rank, or alpha / sqrt(rank)."""
    tiny = Tiny(Lora(rank=4, alpha=6.0, rslora=rslora), tmp_path).drawn()
    layer, found = tiny.layer(PATH), tiny.kept(PATH)
    assert isinstance(found, Factors)
    torch.testing.assert_close(found.B, scale * layer.lora_B["default"].weight)
    assert torch.equal(found.A, layer.lora_A["default"].weight)


def test_dora_scales_each_row_to_its_length(tmp_path: Path) -> None:
    """m (W + s B A) / ||W + s B A||, equation 5 of its paper."""
    tiny = Tiny(Lora(rank=4, alpha=8.0, dora=True), tmp_path)
    with torch.no_grad():
        for name, parameter in tiny.model.named_parameters():
            if "lora_" in name:
                parameter.uniform_(0.1, 1.0, generator=torch.Generator().manual_seed(len(name)))
    layer = tiny.layer(PATH)
    length = layer.lora_magnitude_vector["default"].weight.detach()
    direction = tiny.weight(PATH) + 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    expected = (length[:, None] * direction / direction.norm(dim=1, keepdim=True)).detach()
    torch.testing.assert_close(tiny.kept(PATH), expected)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # peft says that it saw the Conv1D layers, which is what we want
@pytest.mark.parametrize(
    "tuner", [Lora(rank=3), AdaLora(rank=2, initial=3), RandLora(rank=8)], ids=lambda one: one.name
)
def test_weights_that_are_held_transposed_change_as_peft_says(tuner: AnyTuner, tmp_path: Path) -> None:
    """GPT-2's, of which one is no square."""
    tiny, path = Tiny(tuner, tmp_path, "GPT2LMHeadModel").drawn(), "transformer.h.0.mlp.c_fc"
    expected = tiny.layer(path).get_delta_weight("default").detach()
    found = dict(tiny.tuner.collect(tiny.model, tiny.skeleton))["h.0.mlp.c_fc.weight"]
    change = found.B @ found.A if isinstance(found, Factors) else found - tiny.weight(path)
    assert change.shape == (32, 128)
    torch.testing.assert_close(change, expected, rtol=0, atol=1e-6)


def test_lora_plus_has_two_rates(tmp_path: Path) -> None:
    tiny = Tiny(Lora(rank=4, ratio=16.0, learning_rate=1e-3), tmp_path)
    optimizer = tiny.tuner.optimizer_for(tiny.model)
    assert optimizer is not None
    rates = {id(one): group["lr"] for group in optimizer.param_groups for one in group["params"]}
    found = {name.split(".")[-3]: rates[id(one)] for name, one in tiny.model.named_parameters() if one.requires_grad}
    assert found == {"lora_A": 1e-3, "lora_B": pytest.approx(1.6e-2)}
    assert Lora().optimizer_for(tiny.model) is None  # the Trainer's


def test_the_ranks_of_adalora_are_what_peft_allocates(tmp_path: Path) -> None:
    """Step by step, on the same gradients; in the middle another allocation goes on with the state of the first."""
    tuner = AdaLora(rank=2, initial=4, steps=20, hold=0.1, settle=0.3)
    tiny = Tiny(tuner, tmp_path)
    layers = find(tuner.targets, tiny.skeleton, tuner.adapts, tuner.name)
    theirs: Any = get_peft_model(deepcopy(tiny.base), tuner.config("|".join(layer.path for layer in layers)))
    twins = {name.removeprefix("base_model.model."): one for name, one in theirs.named_parameters()}
    ours = dict(tiny.model.named_parameters())
    generator = torch.Generator().manual_seed(0)
    ran = Allocation(tuner.config(""), tiny.model)
    for step in range(1, 21):
        if step in (5, 16):
            kept, ran = ran.state(), Allocation(tuner.config(""), tiny.model)
            ran.load(kept)
        for name, parameter in ours.items():
            if parameter.requires_grad:
                with torch.no_grad():
                    parameter.normal_(generator=generator)
                    twins[name].copy_(parameter)
                parameter.grad = torch.randn(parameter.shape, generator=generator)
                twins[name].grad = parameter.grad.clone()
        ran.stepped(step, skipped=False)
        theirs.base_model.update_and_allocate(step)
        assert all(torch.equal(ours[name], twins[name]) for name in ours)
    ranks = [int((one != 0).sum()) for name, one in ours.items() if "lora_E" in name]
    assert sum(ranks) == 2 * len(layers)
    assert len(set(ranks)) > 1


def test_adalora_asks_for_orthonormal_factors(tmp_path: Path) -> None:
    tiny = Tiny(AdaLora(rank=2, initial=3), tmp_path).drawn()
    layers = [one for one in tiny.model.modules() if hasattr(one, "lora_E")]
    eye, norms = torch.eye(3), []
    for layer in layers:
        A, B = layer.lora_A["default"], layer.lora_B["default"]  # type: ignore[index]
        norms += [(A @ A.T - eye).square().sum().sqrt(), (B.T @ B - eye).square().sum().sqrt()]
    assert float(penalty(tiny.model)) == pytest.approx(float(sum(norms) / len(norms)), rel=1e-6)
    for layer in layers:
        nn.init.orthogonal_(layer.lora_A["default"])  # type: ignore[index]
        nn.init.orthogonal_(layer.lora_B["default"])  # type: ignore[index]
    assert float(penalty(tiny.model)) < 1e-5


class WithLoss(nn.Module):
    def __init__(self, backbone: PreTrainedModel) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self) -> dict[str, Tensor]:
        return {"loss": torch.tensor(1.0)}


def test_the_penalty_is_in_the_loss_of_training_alone(tmp_path: Path) -> None:
    for weight in (0.25, 0.0):
        tiny = Tiny(AdaLora(rank=2, initial=3, orthogonal=weight), tmp_path)
        model = WithLoss(tiny.model)
        tiny.tuner.companions(model)
        expected = 1.0 + weight * float(penalty(tiny.model))
        assert float(model.train()()["loss"]) == pytest.approx(expected)
        assert float(model.eval()()["loss"]) == 1.0


def test_randlora_mixes_the_same_products_for_all_tasks(tmp_path: Path) -> None:
    """Two seeds share them; another projection_seed has others, and the change is of full rank."""
    changes = {}
    for key, tuner in {
        "first": RandLora(rank=8),
        "other seed": RandLora(rank=8, seed=1),
        "other products": RandLora(rank=8, projection_seed=1),
    }.items():
        tiny = Tiny(tuner, tmp_path).drawn()
        changes[key] = tiny.kept(PATH) - tiny.weight(PATH)
    assert torch.equal(changes["first"], changes["other seed"])
    assert not torch.equal(changes["first"], changes["other products"])
    assert torch.linalg.matrix_rank(changes["first"], rtol=1e-6) == 32  # the smaller side


STORE = ArtifactStore(MemoryObjects())


@pytest.fixture(scope="module")
def base() -> Any:
    return train_digits_base(DigitsBase(width=32, steps=60), STORE)


def changes(base: Any, tuner: AnyTuner) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight and change of each linear layer that the digits reach."""
    before, after = STORE.open(base), STORE.open(fine_tune(base, "rot90", SUITE, tuner, STORE))
    linear = [one.name for one in before.manifest.tensors if one.role == "linear.weight" and "pooler" not in one.name]
    weights = {name: read_tensor(before, name) for name in linear}
    return {name: (weight, read_tensor(after, name) - weight) for name, weight in weights.items()}


def test_osf_changes_little_in_the_leading_directions(base: Any) -> None:
    """Its gradients are orthogonal to them; AdamW turns the steps a little. A random change would have half there."""
    for weight, change in changes(base, Osf(**SCHEDULE, keep=0.5)).values():
        U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
        kept = len(S) // 2
        leading = U[:, :kept].T @ change.double() @ Vh[:kept].T
        assert leading.norm() < 0.05 * change.norm()
        assert torch.linalg.matrix_rank(change.double(), rtol=1e-5) <= 2 * (len(S) - kept)


@pytest.mark.parametrize("mask", ["random", "magnitude"])
def test_shira_changes_as_many_entries_as_lora_would_learn(base: Any, mask: Any) -> None:
    places = {}
    for name, (weight, change) in changes(base, Shira(**SCHEDULE, rank=3, mask=mask)).items():
        places[name] = change != 0
        most = 3 * sum(weight.shape)
        assert 0.9 * most < places[name].sum() <= most
        if mask == "magnitude":
            assert weight[places[name]].abs().min() >= weight.abs().flatten().kthvalue(weight.numel() - most).values
    assert not torch.equal(places["layers.0.attention.q_proj.weight"], places["layers.1.attention.q_proj.weight"])
    other = changes(base, Shira(**SCHEDULE, rank=3, mask=mask, seed=1))["layers.0.mlp.fc1.weight"][1] != 0
    shared = (other & places["layers.0.mlp.fc1.weight"]).sum() / other.sum()
    assert shared > 0.9 if mask == "magnitude" else shared < 0.3


def test_adalora_keeps_factors_of_the_ranks_that_are_left(base: Any) -> None:
    tuner = AdaLora(**SCHEDULE, rank=2, initial=4)
    after = STORE.open(fine_tune(base, "rot90", SUITE, tuner, STORE))
    linear = [one for one in after.manifest.tensors if one.role == "linear.weight"]
    ranks = {one.name: one.rank or 0 for one in linear}
    assert sum(ranks.values()) == 2 * len(linear)
    assert ranks["pooler.dense.weight"] == 0  # no gradient reaches it: it is the base's
    assert len(set(ranks.values())) > 2
