"""The flows that are deployed: what a schedule, an event or a person at Prefect's form starts on a worker.

Their parameters are plain texts and numbers, described where the form shows them. The work is that of the commands of
the same names; it is imported when a run has begun, so that Prefect sees the run seconds earlier.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefect import flow, get_run_logger

if TYPE_CHECKING:
    from flows.notices import Folded


@flow(name="merge-pending", flow_run_name="{line}")
def merge_pending(line: str, at_most: int | None = None) -> Folded:
    """Merge what waits in the queue of a line, oldest first, and register a version for each merge.

    Args:
        line: Name of the line, such as demo-opcm. It must exist.
        at_most: End after so many submissions, and leave the others to the next run.
    """
    from flows.pending import work_off

    return work_off(line, at_most)


@flow(name="ingest-checkpoint", flow_run_name="{line}: {reference}")
def ingest_checkpoint(
    reference: str, line: str, base: str = "", content: str = "", task: str = "", weight: float = 1.0
) -> Folded:
    """Queue a checkpoint for a line, unless it is queued, and merge what waits there.

    Args:
        reference: Where it is: s3://bucket/folder, a folder that the worker sees, or a ref of the store.
        line: Name of the line, such as demo-opcm. It must exist.
        base: Ref of the checkpoint that it was tuned from; empty for the line's own base.
        content: Digest of its weights, as the event tells it; empty to find it out.
        task: What the line's journal will call it; empty for the folder's name.
        weight: How much it counts, in mergers that have weights.
    """
    from flows.pending import take_in, work_off

    take_in(reference, line, base, content, task, weight)
    return work_off(line)


@flow(name="watch", flow_run_name="{line}")
def watch(source: str, line: str, every: float = 5.0, minutes: float = 55.0) -> int:
    """Watch an inbox for complete new checkpoints, queue them for a line and send the events that start their merging.

    Args:
        source: The inbox: s3://bucket/inbox, or a folder that the worker sees.
        line: Name of the line that they are merged into. It must exist.
        every: Seconds from one look to the next.
        minutes: End after so long, so that the next scheduled run takes over; 0 looks until nothing changes.
    """
    from flows.watch import keep_watching

    say = get_run_logger().info
    return keep_watching(source, line, every, say, lasting=60 * minutes, once=minutes == 0)


@flow(name="fine-tune-and-merge", flow_run_name="{config}")
def fine_tune_and_merge(config: str) -> dict[str, int]:
    """Run a chain: fine-tune, extract, compress, merge, evaluate, register. What was done before is found done.

    Args:
        config: Path of a YAML file that the worker sees, or the name of a preset, such as demo.
    """
    from configs.chain import load_chain
    from flows.chain import chain

    outcome = chain(load_chain(config))
    return {line.name: line.last.version.version for line in outcome.lines}


@flow(name="rebuild-line", flow_run_name="{line}")
def rebuild_line(
    line: str,
    drop: list[str] | None = None,
    order: list[str] | None = None,
    merger: str | None = None,
    settings: list[str] | None = None,
    why: str = "",
) -> str:
    """Merge the updates of a line again: without a bad one, in another order, or by another method.

    Args:
        line: Name of the line.
        drop: Updates that are left out, each by its task, its step, or the beginning of its ref.
        order: The new order; every update that is kept, exactly once.
        merger: Merge with this one, at its defaults, instead of the line's own.
        settings: Settings of the merger, like density=0.3.
        why: The reason, for the journal.
    """
    from flows.upkeep import rebuild_by_words

    return rebuild_by_words(line, drop or [], order or [], merger, settings or [], why)


@flow(name="evaluate-line", flow_run_name="{line}")
def evaluate_line(line: str, config: str) -> str:
    """Evaluate the newest model of a line on the tasks of a chain. The scores are stored; the run shows a table.

    Args:
        line: Name of the line.
        config: The chain whose tasks say what to ask: a YAML file that the worker sees, or the name of a preset.
    """
    from flows.upkeep import evaluate_head

    return evaluate_head(line, config)


@flow(name="verify-and-prune")
def verify_and_prune(prune: bool = False, grace_days: float = 7.0) -> dict[str, int]:
    """Read everything in the store and hold it against its digests; then remove what nothing needs any more.

    Nothing is removed if anything is damaged.

    Args:
        prune: Whether to remove. Otherwise what would go is only counted.
        grace_days: What was written or used in so many days stays.
    """
    from flows.upkeep import tidy

    return tidy(prune, grace_days)
