"""On a GPU: what merges, codes, trains and measures there gives what the CPU gives. Skipped where torch sees none."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from storage.artifacts import ArtifactStore
from storage.refs import CheckpointRef, StateRef, UpdateRef
from tasks.calibrate import layer_inputs
from tasks.checkpoints import load_model
from tasks.codecs import CODECS
from tasks.compress import compress_update
from tasks.data import Digits
from tasks.digits_base import DigitsBase, train_digits_base
from tasks.extract import Extract, extract_update
from tasks.fine_tune import fine_tune
from tasks.inspect_update import inspect_update
from tasks.materialize import materialize
from tasks.merge import fold_update
from tasks.mergers import MERGERS, AnyMerger, Joint, Opcm, Sce, Slerp
from tasks.optimizers import OPTIMIZERS
from tasks.parallel import Budget
from tasks.recipe import Recipe
from tasks.scalings import SCALINGS
from tasks.sparsifiers import SPARSIFIERS
from tasks.spectrum import Thin, leading, thin_svd
from tasks.suites import ImageClassification
from tasks.suites.heads import Orthonormal
from tasks.tensors import read_delta, read_tensor
from tasks.tuners import TUNERS, AnyTuner, Full, Lora
from tests.builders import checkpoint_of, memory_store, update_of
from tests.tasks.test_spectrum import SHAPES as SIDES
from tests.tasks.test_spectrum import built, check, graded

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")

SHAPES: Mapping[str, tuple[int, ...]] = {
    "bare": (5,),
    "embed.weight": (200, 96),
    "empty.weight": (0, 4),
    "layer.0.fc1.weight": (256, 96),
    "layer.0.fc2.weight": (96, 256),
    "layer.0.norm.weight": (96,),
    "layer.0.q_proj.weight": (96, 96),
    "layer.1.fc1.weight": (256, 96),
    "layer.1.q_proj.weight": (96, 96),
    "mlp.experts.down_proj": (4, 96, 48),
    "row.weight": (1, 64),
    "scalar": (),
}
TOLERANCE = 1e-4  # of merged and of decoded deltas, relative to a tensor's largest entry
FULL, COUNT = 40, 3
TRUNCATING = {"low_rank", "skillpack", "auto"}


def drawn(seed: int, size: float) -> dict[str, Tensor]:
    """Deltas of a few directions above noise, as updates are; one tensor that is left alone, one of low rank."""
    generator = torch.Generator().manual_seed(seed)
    found = {name: torch.randn(shape, generator=generator) * size for name, shape in SHAPES.items()}
    for name, tensor in found.items():
        if tensor.ndim == 2 and min(tensor.shape) > FULL:
            left, right = (torch.randn(side, 4, generator=generator) for side in tensor.shape)
            found[name] = tensor + left @ right.T * size
    found["layer.1.q_proj.weight"] *= seed != 2
    found["layer.1.fc1.weight"] = torch.randn(256, 7, generator=generator) @ torch.randn(7, 96, generator=generator)
    found["layer.1.fc1.weight"] *= size
    return found


@pytest.fixture(scope="module")
def store() -> ArtifactStore:
    return memory_store()


def drawn_like(tensors: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(one.shape, generator=generator) * 1e-2 for name, one in tensors.items()}


@pytest.fixture(scope="module")
def base(store: ArtifactStore) -> CheckpointRef:
    """Small beside the updates, so that adding them to it rounds little of them away."""
    return checkpoint_of(drawn(99, 1e-3), store)


@pytest.fixture(scope="module")
def updates(store: ArtifactStore, base: CheckpointRef) -> list[UpdateRef]:
    return [update_of(drawn(seed, 1e-2), base, store) for seed in range(COUNT)]


def merged(
    recipe: Recipe, base: CheckpointRef, updates: list[UpdateRef], store: ArtifactStore, device: str, **budget: Any
) -> tuple[StateRef, CheckpointRef]:
    state: StateRef | None = None
    for update in updates:
        state = fold_update(base, state, update, recipe, store, device, budget=Budget(**budget))
    assert state is not None
    return state, materialize(base, state, store, device, budget=Budget(**budget))


def worst(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> float:
    """The largest difference, relative to the largest entry of its tensor."""
    assert one.keys() == two.keys()
    shares = {
        name: float((one[name].double() - two[name].double()).abs().max() / one[name].double().abs().max())
        for name in one
        if one[name].any()
    }
    return max(shares.values(), default=0.0)


def deltas(model: CheckpointRef, base: CheckpointRef, store: ArtifactStore) -> dict[str, Tensor]:
    after, before = store.open(model), store.open(base)
    return {name: read_tensor(after, name).double() - read_tensor(before, name).double() for name in SHAPES}


def every_merger() -> dict[str, AnyMerger]:
    found: dict[str, AnyMerger] = {name: kind() for name, kind in MERGERS.items()}
    found["opcm, diagonal left in"] = Opcm(diagonal="leave")
    found["opcm, paper"] = Opcm(variant="paper")
    found["opcm in float64"] = Opcm(accumulate="float64")
    found["sce of mergekit"] = Sce(variant="mergekit", select_topk=0.2)
    return found


RECIPES = {name: Recipe(merger) for name, merger in every_merger().items()}
RECIPES |= {f"opcm after {name}": Recipe(Opcm(), sparsify=kind()) for name, kind in SPARSIFIERS.items()}
RECIPES |= {f"opcm by {name}": Recipe(Opcm(), scaling=kind()) for name, kind in SCALINGS.items()}


@pytest.mark.parametrize("condition", [1.0, 30.0, 1e3, 1e5, 1e12])
@pytest.mark.parametrize("shape", [*SIDES, (300, 200), (200, 300), (500, 40)], ids=str)
def test_a_decomposition(shape: tuple[int, int], condition: float) -> None:
    """To the tolerances of the CPU; of full rank, of low rank, and with columns of zeros."""
    full = built(*shape, graded(min(shape), condition))
    low = built(*shape, torch.arange(min(3, *shape), 0, -1, dtype=torch.float64))
    sparse = full.clone().index_fill_(1, torch.tensor([0]), 0.0)
    for matrix in (full, low, sparse):
        for dtype, tolerance in ((torch.float32, 2e-5), (torch.float64, 1e-13)):
            found = thin_svd(matrix.to("cuda", dtype))
            check(Thin(*(one.cpu() for one in found)), matrix.to(dtype), tolerance)


def test_many_threads_may_be_the_first_to_decompose() -> None:
    """In a process of its own, as torch loads its linear algebra once."""
    script = (
        "import torch; from concurrent.futures import ThreadPoolExecutor; from tasks.spectrum import thin_svd\n"
        "some = [torch.randn(64, 64).cuda() for _ in range(16)]\n"
        "print(sum(len(one.s) for one in ThreadPoolExecutor(16).map(thin_svd, some)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1024"]


@pytest.mark.parametrize("condition", [1.0, 30.0, 1e3, 1e5])
@pytest.mark.parametrize("alpha", [0.2, 0.8])
def test_the_leading_directions(condition: float, alpha: float) -> None:
    matrix = built(300, 200, graded(200, condition)).float()
    here, there = leading(matrix, alpha), leading(matrix.cuda(), alpha)
    assert len(here.s) == len(there.s)
    torch.testing.assert_close(there.s.cpu(), here.s, rtol=1e-5, atol=0)
    torch.testing.assert_close((there.U @ there.U.T).cpu(), here.U @ here.U.T, rtol=0, atol=3e-3)


@pytest.mark.parametrize("name", RECIPES)
def test_a_merge(name: str, store: ArtifactStore, base: CheckpointRef, updates: list[UpdateRef]) -> None:
    recipe = RECIPES[name]
    some = updates[:2] if isinstance(recipe.merger, Slerp) else updates
    here = merged(recipe, base, some, store, "cpu")[1]
    there = merged(recipe, base, some, store, "cuda")[1]
    found = worst(deltas(here, base, store), deltas(there, base, store))
    assert found < TOLERANCE


@pytest.mark.parametrize("name", RECIPES)
def test_a_merge_gives_the_same_bytes_again(
    name: str, store: ArtifactStore, base: CheckpointRef, updates: list[UpdateRef]
) -> None:
    """On one device, however many tensors are worked on at once and whatever memory they may take."""
    recipe = RECIPES[name]
    some = updates[:2] if isinstance(recipe.merger, Slerp) else updates
    once = merged(recipe, base, some, store, "cuda", workers=1)
    assert once == merged(recipe, base, some, store, "cuda", workers=4)
    assert once == merged(recipe, base, some, store, "cuda", workers=8, memory=2**20)


@pytest.mark.parametrize("name", RECIPES)
def test_memory_of_the_device_stays_within_the_budget(name: str) -> None:
    """What tensors take; CUDA and its libraries have some for themselves, such as cuBLAS 32 MiB for every thread."""
    recipe, store, size = RECIPES[name], memory_store(), 4 * 1024 * 768
    generator = torch.Generator().manual_seed(0)
    some = {f"layer.{n}.fc.weight": torch.randn(1024, 768, generator=generator) for n in range(8)}
    base = checkpoint_of(some, store)
    updates = [update_of(drawn_like(some, seed), base, store) for seed in range(2)]
    for workers in (1, 6):
        merged(recipe, base, updates, store, "cuda", workers=workers)  # the libraries take what they need
        before = torch.cuda.memory_allocated()
        joint = recipe.merger.workspace(2) if isinstance(recipe.merger, Joint) else 0
        allowed = size * max(recipe.workspace(joint=joint), recipe.workspace(joint=4)) * min(workers, 3)
        torch.cuda.reset_peak_memory_stats()
        merged(recipe, base, updates, store, "cuda", workers=workers, memory=allowed)
        peak = torch.cuda.max_memory_allocated() - before
        assert peak <= allowed, f"{peak / size:.1f} tensors instead of {allowed / size:.1f}"


@pytest.mark.parametrize("name", CODECS)
def test_a_codec(name: str, store: ArtifactStore, base: CheckpointRef) -> None:
    tuned = checkpoint_of({key: one + drawn(7, 1e-2)[key] for key, one in drawn(99, 1.0).items()}, store)
    update = extract_update(base, tuned, Extract(), store)
    here, there = (store.open(compress_update(update, CODECS[name](), store, device)) for device in ("cpu", "cuda"))
    if name in TRUNCATING:  # where a spectrum is cut rounding turns directions, and what is lost stays the same
        for one, two in zip(here.manifest.tensors, there.manifest.tensors, strict=True):
            assert two.error == pytest.approx(one.error, rel=0.02)
    else:
        assert worst(*({key: read_delta(one, key) for key in one.names} for one in (here, there))) < TOLERANCE


def test_an_inspection(store: ArtifactStore, updates: list[UpdateRef]) -> None:
    here, there = (inspect_update(updates[0], store, device, codecs=[]) for device in ("cpu", "cuda"))
    for one, two in zip(here.tensors, there.tensors, strict=True):
        assert (one.ranks is None) == (two.ranks is None)
        if one.ranks is not None and two.ranks is not None:
            assert one.ranks.rank == two.ranks.rank
            assert two.ranks.stable == pytest.approx(one.ranks.stable)
            assert two.ranks.effective == pytest.approx(one.ranks.effective)


SUITE = ImageClassification(data=Digits(view="rot90", limit=256), head=Orthonormal())
BRIEF: dict[str, Any] = {"steps": 40, "batch": 32, "learning_rate": 2e-3}
SMALL: dict[str, dict[str, Any]] = {"adalora": {"rank": 2, "initial": 4}, "lora": {"rank": 4}, "randlora": {"rank": 8}}
STEPS: dict[str, dict[str, Any]] = {"galore": {"rank": 4, "every": 8, "scale": 1.0}, "apollo": {"rank": 4, "every": 8}}
TRAININGS: dict[str, AnyTuner] = {name: kind(**BRIEF, **SMALL.get(name, {})) for name, kind in TUNERS.items()}
TRAININGS |= {
    f"full by {name}": Full(**BRIEF, weights="all", optimizer=kind(**STEPS.get(name, {})))
    for name, kind in OPTIMIZERS.items()
}
TRAININGS["lora in bfloat16"] = Lora(**BRIEF, rank=4, precision="bfloat16")
TRAININGS["lora in float16"] = Lora(**BRIEF, rank=4, precision="float16")


class Task:
    name = "rot90"
    suite = SUITE


@pytest.fixture(scope="module")
def digits(store: ArtifactStore) -> CheckpointRef:
    return train_digits_base(DigitsBase(width=32, steps=150), store)


def accuracy(model: CheckpointRef, store: ArtifactStore, device: str = "cpu") -> float:
    return (
        SUITE.open(store.open(model))
        .score(load_model(store.open(model), device), device, lambda done, total: None)[0]
        .value
    )


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training(name: str, store: ArtifactStore, digits: CheckpointRef) -> None:
    """Learns as on the CPU, and the same twice; the numbers are others, as the order of every sum is."""
    tuner = TRAININGS[name]
    torch.cuda.reset_peak_memory_stats()
    twice = [fine_tune(digits, "rot90", SUITE, one, store, "cuda") for one in (tuner, tuner)]
    assert torch.cuda.max_memory_allocated() > 2**20  # it was there
    after = accuracy(twice[0], store)
    beside = tuner if tuner.precision == "float32" else replace(tuner, precision="float32")
    there = accuracy(fine_tune(digits, "rot90", SUITE, beside, store), store)
    assert abs(after - there) < 0.08
    assert twice[0] == twice[1]


def test_an_evaluation(store: ArtifactStore, digits: CheckpointRef) -> None:
    assert accuracy(digits, store, "cuda") == pytest.approx(accuracy(digits, store), abs=0.005)


def test_a_calibration(store: ArtifactStore, digits: CheckpointRef) -> None:
    tuned = fine_tune(digits, "rot90", SUITE, Full(**BRIEF, weights="all"), store)
    update = extract_update(digits, tuned, Extract(), store)
    found: list[dict[str, Tensor]] = []
    for device in ("cpu", "cuda"):
        with layer_inputs(update, Task(), store, device, 24) as one:
            found.append({name: get().cpu().clone() for name, get in one.inputs.items()})
    assert worst(*found) < TOLERANCE
