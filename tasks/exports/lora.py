"""An adapter for peft: low-rank factors of the update's linear weights, and whole modules for what has no rank.

B [m, r] and A [r, n] with lora_alpha = r, so that B A is added as it is, here and in programs that scale all modules
alike. `r` of the config is the largest rank; modules of another have their own in rank_pattern and alpha_pattern.
"""

from __future__ import annotations

import json
import math
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from storage.errors import InvalidInput
from storage.refs import short
from tasks.exports.applied import RECORD, Applied, Exported, Report, cast, silent, some
from tasks.exports.factors import LoraForm, Product, product, square
from tasks.exports.peft_layout import Kept, Linear, Modules, is_saved
from tasks.exports.spool import Spool
from tasks.folders.writer import new_folder
from tasks.parallel import Budget, in_order
from tasks.tensors import decode_factors

PREFIX = "base_model.model."
_WORKSPACE = 8  # sizes of a matrix in float32 that its decomposition takes
_CAUSAL = ("ForCausalLM", "LMHeadModel")


@dataclass
class _Sizes:
    """Squares of norms, summed over tensors."""

    off: float = 0.0
    linear: float = 0.0
    rest: float = 0.0
    lost: float = 0.0
    tensors: dict[str, dict[str, Any]] = field(default_factory=dict)

    def errors(self) -> dict[str, float]:
        total = self.linear + self.rest
        return {
            "error_of_linear_weights": math.sqrt(self.off / self.linear) if self.linear else 0.0,
            "error": math.sqrt((self.off + self.lost) / total) if total else 0.0,
        }


def export_lora(
    applied: Applied, folder: Path, form: LoraForm | None = None, budget: Budget | None = None, report: Report = silent
) -> Exported:
    """Write an adapter to `folder` that `peft.PeftModel.from_pretrained(base, folder)` loads.

    Raises InvalidInput if no linear weight changes. Peak memory is what the
    decomposition of the tensors in work takes.
    """
    return _Writer(applied, form or LoraForm(), budget or Budget(workers=1), report).write(folder)


class _Writer:
    def __init__(self, applied: Applied, form: LoraForm, budget: Budget, report: Report) -> None:
        self._applied, self._form, self._budget, self._report = applied, form, budget, report
        self._modules = Modules(applied.skeleton)
        self._sizes = _Sizes()
        self._ranks: dict[str, int] = {}  # by path of the module

    def write(self, folder: Path) -> Exported:
        with new_folder(folder) as work:
            facts = self._fill(work)
            self._applied.leave_card(work)
        return Exported(sorted(folder.iterdir()), self._said(folder, facts), facts)

    def _fill(self, work: Path) -> dict[str, Any]:
        """Write all files; returns what the record says, but for the single tensors."""
        linears = [one for one in self._modules.linears() if one.weight in self._applied.records]
        changed = self._changed(linears)
        biases = {one.bias for one in linears if one.bias in changed}
        saved, in_place = Kept([], []) if self._form.skip else self._modules.kept(changed - biases)
        targets = [one for one in linears if not is_saved(one.path, saved)]
        whole = {one.weight for one in linears} - {one.weight for one in targets}
        self._sizes.linear += sum(square(self._applied.delta(name)) for name in sorted(whole))
        with closing(Spool(work)) as spool:
            self._write_factors(targets, changed, spool)
            used = [one for one in targets if one.path in self._ranks]
            if not used:
                raise InvalidInput(
                    f"{short(self._applied.update.ref)} changes no linear weight that peft could add factors to",
                    remedy="Export it with `--as delta` or `--as patch`",
                )
            bias = self._write_biases(used, changed, spool)
            self._write_saved(saved, spool)
            self._write_in_place(in_place, spool)
            spool.write("adapter_model.safetensors")
        (work / "adapter_config.json").write_bytes(self._config(used, saved, bias))
        left_out = sorted(changed) if self._form.skip else []
        facts = {**self._sizes.errors(), "saved_whole": saved, "in_place": in_place, "left_out": left_out}
        (work / RECORD).write_bytes(self._applied.record("lora", {**facts, "tensors": self._sizes.tensors}))
        return facts

    def _changed(self, linears: list[Linear]) -> set[str]:
        """Parameters that get no factors, and change."""
        weights, found = {one.weight for one in linears}, set()
        for name in self._applied.records:
            if name not in weights:
                power = square(self._applied.delta(name))
                self._sizes.rest += power
                self._sizes.lost += power if self._form.skip else 0.0
                if power:
                    found.add(name)
        return found

    def _write_factors(self, targets: list[Linear], changed: set[str], spool: Spool) -> None:
        """Factors of every linear weight that changes. One whose bias alone does gets factors of zeros."""
        records = self._applied.records

        def cost(one: Linear) -> float:
            return _WORKSPACE * 4.0 * records[one.weight].elements

        products = in_order(targets, self._product, cost, self._budget, lambda done, all, _: self._report(done, all))
        for one, found in zip(targets, products, strict=True):
            if found is None:
                if self._form.skip or one.bias not in changed:
                    continue
                rows, columns = records[one.weight].shape
                found = Product(torch.zeros(rows, 1), torch.zeros(1, columns), 0.0, 0.0, False)
            B, A = found.B, found.A
            if self._transposed(one):  # the layer holds its weight the other way round: (B A)' = A' B'
                B, A = A.T, B.T
            what = f"{one.weight} of {short(self._applied.update.ref)}"
            spool.put(f"{PREFIX}{one.path}.lora_A.weight", cast(A, self._form.dtype, what))
            spool.put(f"{PREFIX}{one.path}.lora_B.weight", cast(B, self._form.dtype, what))
            self._ranks[one.path] = rank = A.shape[0]
            self._sizes.off += found.off**2
            self._sizes.linear += found.norm**2
            error = found.off / found.norm if found.norm else 0.0
            self._sizes.tensors[one.weight] = {"rank": rank, "error": error, "svd": found.svd}

    def _product(self, one: Linear) -> Product | None:
        """The factors of one weight; None if it does not change."""
        record = self._applied.records[one.weight]
        stored = None
        if record.rank is not None:
            stored = decode_factors(record, self._applied.update.parts(one.weight))
        return product(self._applied.delta(one.weight), self._form, stored)

    def _transposed(self, one: Linear) -> bool:
        return isinstance(self._applied.skeleton.model.get_submodule(one.path), Conv1D)

    def _write_biases(self, used: list[Linear], changed: set[str], spool: Spool) -> str:
        """Write the changes of biases beside factors; returns how: "none", "lora" (a change, which peft can take away
        again) or, where some modules have no bias at all, "all" (new values in place of the base's)."""
        ours = [one for one in used if one.bias in changed]
        if self._form.skip or not ours:
            return "none"
        if all(one.bias is not None for one in used):
            for one in used:
                assert one.bias is not None
                delta = self._delta_or_zeros(one.bias)
                spool.put(f"{PREFIX}{one.path}.lora_B.bias", cast(delta, self._form.dtype, one.bias))
            return "lora"
        for one in ours:
            assert one.bias is not None
            spool.put(f"{PREFIX}{one.path}.base_layer.bias", self._applied.after(one.bias))
        return "all"

    def _delta_or_zeros(self, name: str) -> Tensor:
        if name in self._applied.records:
            return self._applied.delta(name)
        return torch.zeros(self._applied.skeleton.slots[name].shape)

    def _write_saved(self, saved: list[str], spool: Spool) -> None:
        for path in saved:
            for memory, name in self._modules.inside(path).items():
                spool.put(f"{PREFIX}{memory}", self._applied.after(name))

    def _write_in_place(self, names: list[str], spool: Spool) -> None:
        for name in names:
            for memory in self._modules.places(name):
                spool.put(f"{PREFIX}{memory}", self._applied.after(name))

    def _config(self, used: list[Linear], saved: list[str], bias: str) -> bytes:
        from peft import LoraConfig

        top = max(self._ranks.values())
        other = {path: rank for path, rank in sorted(self._ranks.items()) if rank != top}
        architecture = self._applied.skeleton.architecture
        config = LoraConfig(
            r=top,
            lora_alpha=top,
            rank_pattern=other,
            alpha_pattern=other,
            target_modules=[one.path for one in used],
            modules_to_save=saved or None,
            ensure_weight_tying=self._modules.ties(saved),
            fan_in_fan_out=all(self._transposed(one) for one in used),
            bias="all" if bias == "all" else "none",
            lora_bias=bias == "lora",
            task_type="CAUSAL_LM" if architecture.endswith(_CAUSAL) else None,
            inference_mode=True,
        )
        return json.dumps(_plain(config.to_dict()), indent=2, sort_keys=True).encode()

    def _said(self, folder: Path, facts: dict[str, Any]) -> list[str]:
        tensors = self._sizes.tensors
        ranks = sorted({one["rank"] for one in tensors.values()})
        said = [f"{len(tensors)} linear weights of rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "")]
        by_svd = [name for name, one in tensors.items() if one["svd"]]
        if by_svd:
            worst = max(by_svd, key=lambda name: tensors[name]["error"])
            said.append(
                f"{len(by_svd)} of them by SVD: relative error {facts['error_of_linear_weights']:.2%} together, "
                f"{tensors[worst]['error']:.2%} at most ({worst})"
            )
        else:
            said.append("all of them are stored as factors: none was cut")
        if saved := facts["saved_whole"]:
            said.append(f"{len(saved)} modules saved whole, which have no low-rank form: {some(saved)}")
        if placed := facts["in_place"]:
            said.append(
                f"{len(placed)} parameters put in place in the base, as peft cannot save their modules "
                f"({some(placed)}): switching the adapter off does not bring the base's back"
            )
        if left_out := facts["left_out"]:
            said.append(f"left out: {len(left_out)} changed parameters that are no linear weights: {some(left_out)}")
        said.append(f"relative error in all: {facts['error']:.2%}; per tensor in {RECORD}")
        return [*said, *self._applied.notes, f'load it with PeftModel.from_pretrained(base, "{folder}")']


def _plain(value: Any) -> Any:
    """A config of peft as JSON has it: sets in their order."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value
