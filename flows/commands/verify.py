"""`deltaworks verify`: everything is read and held against the digests that name it, and repaired from a copy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Annotated

import typer

from flows.terminal import Quiet, console, errors, errors_explained, open_workplace

if TYPE_CHECKING:
    from flows.workplace import Workplace
    from storage.refs import Ref
    from storage.roots import AnyJournal
    from storage.verify import Finding, Verdict


def verify(
    ref: Annotated[str | None, typer.Argument(help="A ref, or the beginning of one.")] = None,
    line: Annotated[str | None, typer.Option("--line", metavar="NAME", help="What a line is made of.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Everything in the store.")] = False,
    repair_from: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Take what is damaged or missing from this store, if it is good there."),
    ] = None,
    afresh: Annotated[
        bool, typer.Option("--afresh", help="Read again what a verify that was interrupted today has found good.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON, and nothing else.")] = False,
    quiet: Quiet = False,
) -> None:
    """Read stored bytes and hold them against the digests that name them. Exit code 1 if anything is wrong.

    What an artifact needs is read too. Interrupted, the same command goes on where it stopped.

    Examples:  deltaworks verify --all        deltaworks verify --line demo-opcm --repair-from s3://backup/store
    """
    with errors_explained():
        if sum((ref is not None, line is not None, everything)) != 1:
            raise typer.BadParameter("give either a ref, --line or --all")
        place = open_workplace()
        refs, journals, broken = _chosen(place, ref, line)
        from flows.board import bar
        from flows.words import other_store
        from storage.checked import Checked
        from storage.verify import damaged_journals, verify_and_repair
        from storage.verify import verify as check

        checked = Checked.of_store(place.settings.home / "verified", place.store.url, age=0.0 if afresh else 86_400.0)
        with closing(checked), bar(console, "checking blobs", quiet or as_json) as report:
            if repair_from is None:
                verdict = check(place.store, refs, report, journals=journals, checked=checked)
            else:
                source = other_store(repair_from)
                verdict = verify_and_repair(place.store, refs, source, report, journals=journals, checked=checked)
        checked.clear()
        findings = [*verdict.findings, *damaged_journals(broken)]
        if as_json:
            typer.echo(json.dumps(_as_json(verdict, findings), indent=2))
        else:
            _print(verdict, findings)
        if findings:
            raise typer.Exit(1)


def _chosen(
    place: Workplace, ref: str | None, line: str | None
) -> tuple[list[Ref], Sequence[AnyJournal], dict[str, str]]:
    """The refs and journals to check, and the journals that cannot be read."""
    from storage.roots import read_journal, read_journals

    store = place.store
    if ref is not None:
        return [store.resolve(ref)], (), {}
    if line is not None:
        return [], [read_journal(store.objects, line)], {}
    journals = read_journals(store.objects)
    return list(store.refs()), journals.all, journals.problems


def _print(verdict: Verdict, findings: Sequence[Finding]) -> None:
    for finding in findings:
        errors.print(f"[red]bad[/]  {finding.object}\n     ", end="")
        errors.print(finding.problem, markup=False)
        errors.print(f"     needed by {', '.join(finding.needed_by)}", markup=False)
    for key in verdict.repaired:
        console.print(f"repaired  {key}")
    if verdict.pruned:
        lines = ", ".join(sorted({name for one in verdict.pruned for name in one.needed_by}))
        console.print(f"{len(verdict.pruned)} older states of {lines} were pruned; a rollback folds them again")
    counted = f"{verdict.artifacts} artifacts, {verdict.blobs} blobs, {verdict.bytes / 1e6:.1f} MB"
    if verdict.resumed:
        counted += f" ({verdict.resumed} blobs read before an interruption)"
    console.print(f"{counted}: {'all as named' if not findings else f'{len(findings)} bad'}")


def _as_json(verdict: Verdict, findings: Sequence[Finding]) -> dict[str, object]:
    return {
        "artifacts": verdict.artifacts,
        "blobs": verdict.blobs,
        "bytes": verdict.bytes,
        "resumed": verdict.resumed,
        "bad": [{"object": one.object, "problem": one.problem, "needed_by": one.needed_by} for one in findings],
        "repaired": verdict.repaired,
        "pruned_states": [one.object for one in verdict.pruned],
    }
