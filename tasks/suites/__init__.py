"""Suites: what a task asks of a model, in training and in evaluation. `AnySuite` is the list; one file each."""

from __future__ import annotations

from typing import Annotated

from tasks.choice import BY_NAME
from tasks.suites.base import Problem, Score, Suite
from tasks.suites.causal_lm import CausalLm
from tasks.suites.image_classification import ImageClassification
from tasks.suites.lm_eval import LmEval
from tasks.suites.multiple_choice import MultipleChoice
from tasks.suites.text_classification import TextClassification
from tasks.suites.text_embedding import TextEmbedding

AnySuite = Annotated[
    ImageClassification | TextClassification | TextEmbedding | CausalLm | MultipleChoice | LmEval, BY_NAME
]

__all__ = [
    "AnySuite",
    "CausalLm",
    "ImageClassification",
    "LmEval",
    "MultipleChoice",
    "Problem",
    "Score",
    "Suite",
    "TextClassification",
    "TextEmbedding",
    "source_of",
]


def source_of(suite: AnySuite) -> str:
    """Where its questions come from, in a word: the kind of its data, or the harness's name for the task."""
    return suite.task if isinstance(suite, LmEval) else suite.data.name
