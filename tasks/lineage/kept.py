"""The page and the picture of a version, and the packages that made it, kept beside its numbers: files of its run."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from storage.artifacts import ArtifactStore
from storage.lines import Entry
from storage.registry import ModelVersion, Registry
from storage.registry_lines import LineVersions, RunFiles
from tasks.lineage.measures import LIGHT, measure
from tasks.lineage.page import page
from tasks.lineage.picture import svg
from tasks.lineage.versions import version_lineage
from tasks.surroundings import packages

PAGE, PICTURE, PACKAGES = "lineage.html", "lineage.svg", "packages.txt"
NEWEST = 40  # merges on a page that is kept: each version has one, and lines grow for years


def keep_lineage(made: ModelVersion, entries: Sequence[Entry], store: ArtifactStore, registry: Registry) -> bool:
    """Write the files of a version unless they are there; whether they were written.

    `entries`: the folds that made it. The version is registered by then, and is worth more than its page: whatever goes
    wrong here, a full disk or a store of files that does not answer, is said and left for the next run.
    """
    files = RunFiles(registry, made.run_id)
    try:
        if PAGE in files.names():
            return False
        versions = LineVersions(registry, made.name)
        known = versions.all()
        one = next(version for version in known if version.number == made.version)
        pages = {each.number: {"": at} for each in known if (at := versions.page(each))}
        pages[one.number] = versions.stage_pages(one)
        lineage = version_lineage(one, known, entries, store, pages, newest=NEWEST)
        html = page(lineage, measure(lineage, store, LIGHT), one.description)
        files.write(PICTURE, svg(lineage))
        files.write(PACKAGES, packages())
        files.write(PAGE, html)  # last: it says that all are there
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        logging.getLogger(__name__).warning(
            "the lineage of %s version %d was not kept: %s", made.name, made.version, said
        )
        return False
    return True
