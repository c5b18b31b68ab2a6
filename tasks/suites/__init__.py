"""Suites: what a task asks of a model, in training and in evaluation. `AnySuite` is the list; one file each."""

from __future__ import annotations

from typing import Annotated

from tasks.choice import BY_NAME
from tasks.suites.base import Problem, Score, Suite
from tasks.suites.causal_lm import CausalLm
from tasks.suites.image_classification import ImageClassification
from tasks.suites.text_classification import TextClassification
from tasks.suites.text_embedding import TextEmbedding

AnySuite = Annotated[ImageClassification | TextClassification | TextEmbedding | CausalLm, BY_NAME]

__all__ = [
    "AnySuite",
    "CausalLm",
    "ImageClassification",
    "Problem",
    "Score",
    "Suite",
    "TextClassification",
    "TextEmbedding",
]
