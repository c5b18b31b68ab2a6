"""Scores of a line whose merges are asked by an exam, as its lineage shows them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tasks.lineage.measures import measure
from tasks.lineage.page import page
from tasks.lineage.versions import MEASURED, version_lineage
from tests.builders import memory_store
from tests.tasks.lineage_case import Grown, scores
from tests.tasks.test_lineage import version


@pytest.fixture(scope="module")
def grown() -> Grown:
    return Grown(memory_store())


def test_an_exam_asks_suites_that_are_nobodys_task(grown: Grown) -> None:
    """As a queue registers them; what else was measured of the models is no part of the exam."""
    store = grown.store
    exam = [{"upright": 0.8, "turned": 0.4}, {"upright": 0.7, "turned": 0.6}, {"upright": 0.9, "turned": 0.5}]
    asked = [scores(model, grown.base, one, store) for model, one in zip(grown.models, exam, strict=True)]
    extra = scores(grown.models[2], grown.base, {"ability": 0.1}, store)
    at_base = scores(grown.base, grown.base, {"upright": 0.3, "turned": 0.2}, store)
    versions = [version(grown, step) for step in range(3)]
    versions = [
        replace(one, tags={**one.tags, "scores": ref, MEASURED: " ".join([extra, *[at_base] * (one.number == 1)])})
        for one, ref in zip(versions, asked, strict=True)
    ]
    found = version_lineage(versions[2], versions, grown.entries, store)
    assert found.accuracy.tasks == () and found.accuracy.suites == ("upright", "turned")
    assert found.accuracy.base_average == pytest.approx(0.25)
    assert [row.average for row in found.accuracy.rows] == pytest.approx([0.6, 0.65, 0.7])
    told = page(found, measure(found, store))
    assert "upright, turned of every merge" in told and "The base was not asked" not in told and "ability" not in told
    parted = [replace(one, tags={**one.tags, MEASURED: ""}) for one in versions]
    found = version_lineage(parted[2], parted, grown.entries, store)
    assert "The base was not asked" in page(found, measure(found, store))


def test_tasks_of_the_line_go_before_what_else_its_exam_asks(grown: Grown) -> None:
    """Forgetting is of the tasks, the average of all that is asked; a task is shown once it is merged."""
    store = grown.store
    exam = [dict(zip(grown.tasks, row, strict=False)) | {"upright": 0.5} for row in grown.matrix]
    exam[0] |= {"names": 0.2}
    asked = [scores(model, grown.base, one, store) for model, one in zip(grown.models, exam, strict=True)]
    versions = [version(grown, step) for step in range(3)]
    versions = [
        replace(one, tags={**one.tags, "scores": ref, MEASURED: ""}) for one, ref in zip(versions, asked, strict=True)
    ]
    found = version_lineage(versions[2], versions, grown.entries, store).accuracy
    assert found.columns == (*grown.tasks, "upright")
    assert list(found.rows[0].scores) == ["sums", "upright"]
    summary = found.rows[2].summary
    assert summary is not None and summary.forgetting == grown.summary(2).forgetting
