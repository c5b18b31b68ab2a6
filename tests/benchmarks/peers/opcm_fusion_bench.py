"""The peer of the OPCM benchmark: one merge step of fusion_bench's own OPCM, run by an interpreter that has it.

usage: <python with fusion_bench> opcm_fusion_bench.py      prints wall, cpu and peak as one line of JSON
"""

import json
import time
from pathlib import Path

import torch
from fusion_bench.method.opcm.opcm_general import OPCM
from transformers import CLIPVisionConfig, CLIPVisionModel


class Pool:
    """What OPCM asks of a model pool: a base and two models tuned from it."""

    model_names = ("one", "two")

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.base = CLIPVisionModel(CLIPVisionConfig(patch_size=32))
        self.tuned = {name: self._tuned(seed) for seed, name in enumerate(self.model_names, 1)}

    def _tuned(self, seed: int) -> CLIPVisionModel:
        torch.manual_seed(seed)
        model = CLIPVisionModel(self.base.config)
        model.load_state_dict(self.base.state_dict())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=1e-4)
        return model

    def load_pretrained_model(self) -> CLIPVisionModel:
        return self.base

    def load_model(self, name: str) -> CLIPVisionModel:
        return self.tuned[name]


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")  # before the models, which the method needs in memory
pool = Pool()
method = OPCM(alpha=0.5, shuffle_order=False, save_on_every_step=False)
start, cpu = time.perf_counter(), time.process_time()
method.run(pool)
usage = {
    "wall": time.perf_counter() - start,
    "cpu": time.process_time() - cpu,
    "peak": status("VmHWM") - before,
}
print()
print(json.dumps(usage))
