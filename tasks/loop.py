"""The loop: what happens around the steps of transformers' Trainer.

Losses are kept and looked at, the validation split is measured, the best weights are held, and the whole state is
saved now and then. All of it hangs on the Trainer's callbacks. Its own checkpoints are folders of pickles, and its own
evaluation draws from the global generator: neither is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState

from storage.errors import InvalidInput
from storage.saves import Save, Saves
from tasks.resume import flattened, generators, learned, put_back, set_generators, unflattened
from tasks.sharding import part, spread_again, spread_state, whole
from tasks.tuners.base import Companion, Training
from tasks.world import WEIGHT, World, weighed

Report = Callable[[int, int, str], None]  # steps done, steps in all, a word about them
Point = dict[str, float]  # a step, and what was measured there


class Best(NamedTuple):
    """The lowest validation loss so far."""

    step: int
    loss: float
    weights: dict[str, Tensor]


class Watcher(TrainerCallback):
    """The state of a training beside that of the Trainer. `validate` measures the loss on the validation split.

    Every process of a training has one, and all of them know the same.
    """

    def __init__(
        self,
        tuner: Training,
        report: Report,
        saves: Saves | None,
        validate: Callable[[nn.Module], float] | None,
        world: World,
        companions: Sequence[Companion] = (),
    ) -> None:
        self.history: list[Point] = []
        self.best: Best | None = None
        self.scaler: Any = None
        self.companions = companions
        self._tuner, self._report, self._saves, self._validate = tuner, report, saves, validate
        self._world = world
        self._every = max(1, tuner.steps // 10)
        self._sum = 0.0  # of the losses since the last point
        self._misses = 0  # measurements since the best one
        self._save = saves.newest() if saves is not None else None
        self._states: dict[str, Any] | None = None  # of the generators, until they are set

    def resume_folder(self, folder: Path, batch: int) -> str | None:
        """A folder that tells the Trainer at which step to go on, if the training was saved."""
        if self._save is None:
            return None
        epoch = unflattened(self._save.state, self._save.tensors)["epoch"]
        state = TrainerState(epoch, self._save.step, self._tuner.steps, eval_steps=None, train_batch_size=batch)
        state.save_to_json(str(folder / "trainer_state.json"))
        return str(folder)

    def lost(self, loss: float, step: int) -> None:
        """Note the loss of a batch in the step after `step`. Raises InvalidInput if it is no number."""
        if not math.isfinite(loss):
            raise self._diverged(step + 1)
        self._sum += loss

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        save, self._save = self._save, None
        if not self._world.leads:
            torch.manual_seed(
                self._tuner.seed + self._world.rank
            )  # dropout of its own; all batches have another source
        if save is not None:
            self._restore(save, kwargs["model"], kwargs["optimizer"], kwargs["lr_scheduler"])
            self._report(save.step, state.max_steps, f"resumed at step {save.step}")

    # A new epoch draws from the generators before its first step, a step in its middle does not.

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._states is not None:
            set_generators(self._states, self._world)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        states, self._states = self._states, None
        if states is not None and state.epoch % 1:
            set_generators(states, self._world)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for one in self.companions:
            one.stepped(state.global_step + 1, kwargs["optimizer"].step_was_skipped)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step, model = state.global_step, kwargs["model"]
        if step % self._every == 0:
            self._note(step, "loss", self._sum / self._every)
            self._sum = 0.0
        losses = [point["loss"] for point in self.history if "loss" in point]
        self._report(step, state.max_steps, f"loss {losses[-1]:.3f}" if losses else "")
        every = self._tuner.validate_every
        if self._validate is not None and (step % every == 0 or step == state.max_steps):
            self._measure(step, model)
            if self._tuner.patience and self._misses >= self._tuner.patience:
                control.should_training_stop = True
        over = control.should_training_stop or step == state.max_steps
        if self._saves is not None and step % self._tuner.save_every == 0 and not over:
            self._write(step, state.epoch, model, kwargs["optimizer"], kwargs["lr_scheduler"])

    def _measure(self, step: int, model: nn.Module) -> None:
        assert self._validate is not None
        loss = self._validate(model)
        spread_again(model)
        if not math.isfinite(loss):
            raise self._diverged(step)
        self._note(step, "validation_loss", loss)
        if self.best is None or loss < self.best.loss:
            weights = {name: whole(value) for name, value in learned(model).items()}
            kept = weights if self._world.leads else {}  # the others know the loss
            self.best = Best(step, loss, {name: value.cpu().clone() for name, value in kept.items()})
            self._misses = 0
        else:
            self._misses += 1

    def _note(self, step: int, name: str, value: float) -> None:
        if not self.history or self.history[-1]["step"] != step:
            self.history.append({"step": step})
        self.history[-1][name] = value

    def _write(self, step: int, epoch: float, model: nn.Module, optimizer: Any, scheduler: Any) -> None:
        assert self._saves is not None
        weights = learned(model)
        drawn = self._world.gathered(generators(self._world))
        bad = torch.stack([(~torch.isfinite(part(value))).any() for value in weights.values()]).any()
        if bool(self._world.total(bad.int())):
            raise self._diverged(step)
        state: dict[str, Any] = {
            "epoch": epoch,
            "weights": weights,
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
            "generators": drawn[0],
            "history": self.history,
            "sum": self._sum,
            "misses": self._misses,
            "best": None if self.best is None else self.best._asdict(),
            "companions": [one.state() for one in self.companions],
        }
        if self._world.size > 1:
            state["others"] = drawn[1:]
        tensors: dict[str, Tensor] = {} if self._world.leads else _Nowhere()
        found = flattened(state, "save", tensors)  # by all processes: what is sharded is put together
        if self._world.leads:
            self._saves.write(step, found, tensors)

    def _restore(self, save: Save, model: nn.Module, optimizer: Any, scheduler: Any) -> None:
        state = unflattened(save.state, save.tensors)
        put_back(model, state["weights"])
        optimizer.load_state_dict(spread_state(optimizer, state["optimizer"]))
        scheduler.load_state_dict(state["scheduler"])
        if self.scaler is not None and state["scaler"] is not None:
            self.scaler.load_state_dict(state["scaler"])
        drawn = [state["generators"], *state.get("others", [])]
        # another number of processes goes on: those that are new have only a seed
        self._states = drawn[self._world.rank] if self._world.rank < len(drawn) else None
        self.history, self._sum, self._misses = state["history"], state["sum"], state["misses"]
        self.best = None if state["best"] is None else Best(**state["best"])
        for companion, kept in zip(self.companions, state.get("companions", []), strict=True):
            companion.load(kept)

    def _diverged(self, step: int) -> InvalidInput:
        tuner = self._tuner
        save = self._saves.newest() if self._saves is not None else None
        kept = f"; its state after step {save.step}, the last that was saved, is kept" if save else ""
        half = "" if tuner.precision == "float32" else f", or set precision to float32 (it is {tuner.precision})"
        return InvalidInput(
            f"the training diverged: its loss or weights were NaN or infinite at step {step} of {tuner.steps}{kept}",
            remedy=f"Lower learning_rate (it is {tuner.learning_rate:g}), raise warmup, or lower clip{half}",
        )


class _Nowhere(dict[str, Tensor]):
    """Where processes that do not lead put what they helped to put together."""

    def __setitem__(self, name: str, value: Tensor) -> None:
        pass


class Loop(Trainer):
    """The Trainer with a tuner's optimizer, which shows its watcher every loss. One of the processes of `world`."""

    optimizer: Optimizer | None

    def __init__(self, watcher: Watcher, tuner: Training, world: World, **settings: Any) -> None:
        super().__init__(callbacks=[watcher], **settings)
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = False  # losses are means over a batch, and those of `accumulate` are averaged
        self._watcher, self._tuner, self._world = watcher, tuner, world
        watcher.scaler = self.accelerator.scaler
        if tuner.sharding == "fsdp" and world.size > 1:
            # the model is sharded already: not to be wrapped once more
            self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)

    def get_train_dataloader(self) -> Any:
        """The same batches for every process, whose share of them the collator takes."""
        loader = super().get_train_dataloader()
        if self._world.size > 1:
            sampler = loader.batch_sampler
            sampler.num_processes, sampler.process_index, sampler.even_batches = 1, 0, False
        return loader

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        weight = inputs.pop(WEIGHT, None)
        loss: Tensor = super().compute_loss(model, inputs, *args, **kwargs)
        return loss if weight is None else weighed(loss, float(weight), self._world)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        if self.optimizer is None:
            self.optimizer = self._tuner.optimizer_for(self.model)
        found: Optimizer = super().create_optimizer(*args, **kwargs)  # which makes AdamW if there still is none
        return found

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)
        if self._world.size > 1:
            loss = self._world.total(loss.detach()) / self._world.size
        self._watcher.lost(float(loss), self.state.global_step)
        return loss

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the watcher puts the weights back, together with everything else."""
