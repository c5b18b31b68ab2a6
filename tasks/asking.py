"""Asking: what one model reaches on one suite after the other. Each is asked once, whatever list it is asked in, and
the encoder's features of the same inputs are made once for the heads of all.

What was measured is kept at once under a key of all that decides it: the model, whoever lends tokenizer and heads, the
suite's settings and the fingerprint of its data. The device is not in the key, as it is in no key of this project: the
last digits of scores differ between devices, and the first result wins. The entry says where it was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from storage.artifacts import ArtifactStore
from storage.manifest import canonical, digest
from storage.measured import Measured
from storage.refs import CheckpointRef
from storage.trust import check_count, check_name
from tasks.checkpoints import load_model
from tasks.suites import AnySuite
from tasks.suites.base import Score
from tasks.suites.features import ROOM, Features, Sharing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VERSION = 2  # of how suites are asked; what was measured by another one is measured again


class Asking:
    """Asks `model`, which is loaded when there is something to ask. `base` lends its tokenizer and heads."""

    def __init__(self, model: CheckpointRef, base: CheckpointRef | None, store: ArtifactStore, device: str) -> None:
        self._model, self._device = model, device
        self._artifact = store.open(model, "checkpoint")
        self._source = self._artifact if base is None else store.open(base, "checkpoint")
        self._kept = Measured(store.objects)
        self._backbone: PreTrainedModel | None = None
        self._shared = Features(ROOM)

    def scores(self, suite: AnySuite, asked: Mapping[str, Any]) -> list[Score]:
        """The scores on the suite's test split, found or measured. `asked`: its settings, and what its data are."""
        key = digest(canonical({"version": VERSION, "source": self._source.ref, **asked}))
        found = _scores(self._kept.read(self._model, key))
        if found is None:
            if self._backbone is None:
                self._backbone = load_model(self._artifact, self._device)
            problem = suite.open(self._source)
            if isinstance(problem, Sharing):
                problem.shared = self._shared
            measured = problem.score(self._backbone, self._device, lambda done, total: None)
            found = [_plain(one) for one in measured]
            entry = {"device": self._device, "scores": [one.__dict__ for one in found]}
            self._kept.write(self._model, key, entry)
        return found


def _plain(score: Score) -> Score:
    """Numbers of Python, which JSON gives back bit by bit."""
    low, high, outcomes = float(score.low), float(score.high), tuple(map(float, score.outcomes))
    return Score(str(score.metric), float(score.value), int(score.samples), low, high, outcomes)


def _scores(entry: Any) -> list[Score] | None:
    """The scores of an entry; None for anything else, which is measured again."""
    try:
        found = [_plain(Score(**one)) for one in entry["scores"]]
        for one in found:
            check_name(one.metric, "a metric")
            check_count(one.samples, "samples")
    except (TypeError, KeyError, ValueError, OverflowError):
        return None
    return found or None
