"""lm_eval: a task of EleutherAI's lm-evaluation-harness, by its name. For measuring only: nothing is trained on one.

The harness brings prompts, few-shot examples, filters and metrics, and loads the task's data from the hub, or from
where a task of your own says. It is an extra, `deltaworks[lm-eval]`, and is imported when it is needed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch
from torch import nn

from storage.artifacts import Artifact
from storage.errors import InvalidInput
from tasks.choice import Choice, require
from tasks.data import Rows, Split
from tasks.suites.answers import answering
from tasks.suites.base import Batch, Score
from tasks.suites.intervals import mean, share
from tasks.suites.texts import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SEED = 1234  # of few-shot examples, as the harness draws them by itself
_DRAWS = 200  # of the harness's own bootstrap, for metrics that are no mean over the samples
_Z = 1.959963984540054  # of the normal distribution, at 97.5 %


@dataclass(frozen=True)
class LmEval(Choice):
    """`task`: its name, as `lm_eval ls tasks` lists it. `include`: a folder with YAML files of tasks of your own, whose
    `!function` words run the Python beside them. `shots`: examples before each question; left out, as the task says.
    `limit`: only the first so many questions. `chat`: questions in the base's chat template.
    """

    task: str
    name: Literal["lm_eval"] = "lm_eval"
    version: Literal[1] = 1
    include: str | None = None
    shots: int | None = None
    limit: int | None = None
    chat: bool = False
    batch: int = 8

    def __post_init__(self) -> None:
        require(bool(self.task.strip()), "task", "a task's name", self.task)
        require(self.shots is None or self.shots >= 0, "shots", "0 or more", self.shots)
        require(self.limit is None or self.limit > 0, "limit", "positive", self.limit)
        require(self.batch > 0, "batch", "positive", self.batch)

    def fingerprint(self) -> str:
        """sha256 over the harness's release, the task's settings and every question that it asks."""
        return _fingerprint(self.task, self.include)

    def open(self, base: Artifact) -> LmEvalProblem:
        return LmEvalProblem(self, base)


class LmEvalProblem:
    def __init__(self, suite: LmEval, base: Artifact) -> None:
        self._suite = suite
        self._tokenizer: Any = load_tokenizer(base)
        if suite.chat and not self._tokenizer.chat_template:
            raise InvalidInput(
                "the base's tokenizer has no chat template, but `chat` is asked for",
                remedy="Use the instruction-tuned variant of the base, or leave `chat` out",
            )

    def rows(self, split: Split) -> Rows:
        self._refuse(f"gives no {split} split")

    def check(self, rows: Rows, split: Split) -> dict[str, int]:
        self._refuse(f"has no {split} split to check")

    def collate(self, rows: list[dict[str, Any]]) -> Batch:
        self._refuse("has no batches")

    def counted(self, batch: Batch) -> int | None:
        self._refuse("has no batches")

    def wrap(self, backbone: PreTrainedModel) -> nn.Module:
        self._refuse("has no loss")

    @torch.inference_mode()
    def score(
        self,
        backbone: PreTrainedModel,
        device: str,
        report: Callable[[int, int], None],
        split: Split = "test",
        limit: int | None = None,
    ) -> list[Score]:
        """The task's metrics, first the one that leads: the first of its list of which more is better."""
        if split != "test":
            self._refuse(f"is for the last word: it gives no {split} split to choose by")
        suite = self._suite
        task = _load(suite.task, suite.include)
        answering(backbone, self._tokenizer)  # refuses what predicts no tokens
        model: Any = backbone  # transformers decorates `to`
        model.to(device).eval()
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        found = simple_evaluate(
            model=HFLM(pretrained=backbone, tokenizer=self._tokenizer, batch_size=suite.batch),
            tasks=[task],
            num_fewshot=suite.shots,
            limit=min((one for one in (suite.limit, limit) if one is not None), default=None),
            bootstrap_iters=_DRAWS,
            apply_chat_template=suite.chat,
            fewshot_random_seed=_SEED,
            random_seed=0,
            numpy_random_seed=_SEED,
            torch_random_seed=_SEED,
        )
        assert found is not None  # only other ranks of a distributed run get nothing
        scores = list(_scores(suite.task, found))
        report(scores[0].samples, scores[0].samples)
        return scores

    def _refuse(self, why: str) -> NoReturn:
        raise InvalidInput(
            f"the lm_eval task {self._suite.task!r} {why}: such tasks only measure a finished model",
            remedy="Train, search and calibrate on a suite with data of its own, such as multiple_choice or causal_lm",
        )


def _scores(task: str, found: Mapping[str, Any]) -> Iterator[Score]:
    """What the harness reports of one task. Its keys are `metric,filter`; of several filters the first is taken."""
    results, samples = found["results"][task], found["samples"][task]
    keys = [key for key in results if "," in key and "_stderr," not in key]
    filter_name = next((key.partition(",")[2] for key in keys), "none")
    metrics = [key.partition(",")[0] for key in keys if key.partition(",")[2] == filter_name]
    better = found["higher_is_better"][task]
    leading = [name for name in metrics if better.get(name)]
    if not leading:
        raise InvalidInput(
            f"the lm_eval task {task!r} has no metric of which more is better, found {', '.join(metrics) or 'none'}",
            remedy="Scores are compared by such a metric: take another task, or causal_lm for the loss of texts",
        )
    seen = [one for one in samples if one["filter"] == filter_name]
    for name in [*leading, *(one for one in metrics if one not in leading)]:
        value, error = float(results[f"{name},{filter_name}"]), results.get(f"{name}_stderr,{filter_name}")
        yield _score(name, value, error, [one.get(name) for one in seen])


def _score(name: str, value: float, error: Any, outcomes: Sequence[Any]) -> Score:
    """With the interval of its samples where it is their mean, otherwise with that of the harness's standard error."""
    if outcomes and all(isinstance(one, (bool, int, float)) for one in outcomes):
        values = [float(one) for one in outcomes]
        if math.isclose(math.fsum(values) / len(values), value, rel_tol=1e-9, abs_tol=1e-12):
            return share(name, [one == 1 for one in values]) if set(values) <= {0.0, 1.0} else mean(name, values)
    reach = _Z * float(error) if isinstance(error, (int, float)) else 0.0
    return Score(name, value, len(outcomes), value - reach, value + reach)


@lru_cache(maxsize=32)
def _fingerprint(task: str, include: str | None) -> str:
    loaded = _load(task, include)
    digest = hashlib.sha256(f"lm_eval {version('lm_eval')}\n".encode())
    settings = {name: value for name, value in loaded.dump_config().items() if name not in ("metadata", "include")}
    digest.update(json.dumps(settings, sort_keys=True, default=_named).encode())
    for question in loaded.eval_docs:
        digest.update(json.dumps(question, sort_keys=True, default=repr).encode())
    return digest.hexdigest()


def _named(value: Any) -> str:
    """A function of a task's settings, without the address that its repr has."""
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__name__)}"


@lru_cache(maxsize=32)
def _load(task: str, include: str | None) -> Any:
    """The harness's task. Raises InvalidInput if the harness is not installed, or there is no such task, or no data."""
    try:
        version("lm_eval")
    except PackageNotFoundError:
        raise InvalidInput(
            f"the suite lm_eval, task {task!r}, needs the lm-evaluation-harness, which is not installed",
            remedy="pip install -c constraints.txt -e '.[lm-eval]'",
        ) from None
    if include is not None and not Path(include).is_dir():
        raise InvalidInput(f"include of the lm_eval task {task!r} must be a folder with YAML files, found {include!r}")
    manager = _manager(include)
    if task not in manager.all_subtasks:
        known = "a group of tasks, not a task" if task in manager.all_tasks else "no task"
        raise InvalidInput(
            f"{task!r} is {known} of lm_eval {version('lm_eval')}",
            remedy="`lm_eval ls tasks` lists them; a folder with your own is named by `include`",
        )
    try:
        return manager.load([task])["tasks"][task]
    except (OSError, ValueError, KeyError) as error:
        raise InvalidInput(
            f"the data of the lm_eval task {task!r} cannot be had: {type(error).__name__}: {error}",
            remedy="They are downloaded from the hub at their first use: look at the network, or at `include`",
        ) from error


@lru_cache(maxsize=4)
def _manager(include: str | None) -> Any:
    """The list of all tasks; it reads thousands of files, which takes seconds."""
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of the defaults of every task
    return TaskManager(include_path=include)
