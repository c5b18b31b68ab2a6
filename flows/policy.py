"""Policy: how a step runs under Prefect. Done once per content, retried only when that can help.

What a step gave is remembered in the artifact store, beside the artifacts, and not in Prefect's result storage: the
memory is then shared by all workers, cannot outlive the bucket it points into, and is trusted only while the artifact
is still there. Prefect shows a remembered step in the state `Cached`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.runtime import task_run
from prefect.states import Completed

from flows import progress
from flows.pools import gpu_slot
from flows.workplace import here
from storage.artifacts import Memo
from storage.errors import Unavailable
from storage.manifest import canonical, digest
from storage.refs import Ref
from tasks.choice import Choice, plain
from tasks.recipe import Recipe

P = ParamSpec("P")
R = TypeVar("R", bound=Ref)

RETRY_DELAYS = [1.0, 5.0, 20.0, 60.0]  # seconds between attempts

_versions: dict[str, int] = {}  # of the steps that are done once
_costs: dict[str, dict[str, Any]] = {}
_COSTS = 10_000  # of so many results, the newest


def once(version: int, *, gpu: bool = False) -> Callable[[Callable[P, R]], Task[P, R]]:
    """A step that is done once per content: the second time the remembered ref is returned.

    gpu: it works on the device of the settings, and waits for a slot of it where they are counted (flows/pools.py).

    The content key holds the step's name and `version`, its refs and specs, and the fingerprints of its data; not the
    device and not the addresses. Raise `version` when the numbers of a step change for another reason than a choice's.
    """

    def decorate(function: Callable[P, R]) -> Task[P, R]:
        _versions[function.__name__] = version

        @wraps(function)
        def step(*args: P.args, **kwargs: P.kwargs) -> Any:
            store = here().store
            key = content_key(function.__name__, version, [*args, *kwargs.values()])
            found = store.recall(key)
            if found is not None:
                _note(found.ref, found.about)
                store.remember(key, found.ref, found.about)  # in use again: a prune keeps what was remembered lately
                return cached(found.ref)
            progress.started(label())
            device = here().settings.device
            with gpu_slot(device if gpu else "cpu"):
                start = time.perf_counter()
                ref = function(*args, **kwargs)
                took = {"seconds": round(time.perf_counter() - start, 3), "device": device}
            store.remember(key, ref, {"step": function.__name__, "version": version, **took})
            _note(ref, took)
            progress.finished(label())
            return ref

        return _as_task(step)

    return decorate


def always(function: Callable[P, Any]) -> Task[P, Any]:
    """A step that looks itself whether there is anything to do, and says so with `cached`."""

    @wraps(function)
    def step(*args: P.args, **kwargs: P.kwargs) -> Any:
        progress.started(label())
        found = function(*args, **kwargs)
        if not isinstance(found, State):
            progress.finished(label())
        return found

    return _as_task(step)


def remembered(step: Task[P, R], *inputs: Any) -> Ref | None:
    """What a `once` step would find done, without running it."""
    found = _memo(step, inputs)
    return None if found is None else found.ref


def seconds(step: Task[P, R], *inputs: Any) -> float | None:
    """How long a `once` step took when it was done, if that is known."""
    found = _memo(step, inputs)
    return None if found is None or "seconds" not in found.about else float(found.about["seconds"])


def costs() -> Mapping[str, Mapping[str, Any]]:
    """Ref -> `seconds` and `device` of the steps that this process did, or found done."""
    return dict(_costs)


def _note(ref: str, about: Mapping[str, Any]) -> None:
    known = {name: about[name] for name in ("seconds", "device") if name in about}
    if known:
        _costs.pop(ref, None)
        _costs[ref] = known
        while len(_costs) > _COSTS:
            _costs.pop(next(iter(_costs)), None)


def _memo(step: Task[P, R], inputs: Sequence[Any]) -> Memo | None:
    name = step.fn.__name__
    return here().store.recall(content_key(name, _versions[name], list(inputs)))


def named(step: Any, name: str) -> Any:
    """The step under a name that people understand."""
    return step.with_options(task_run_name=name)


def run_now(step: Any, name: str, *inputs: Any) -> Any:
    """Run a step now, under that name, and return what it gave."""
    return named(step, name)(*inputs, return_state=True).result()


def cached(value: Any) -> State[Any]:
    """What a step returns when it had nothing to do."""
    progress.reused(label())
    return Completed(name="Cached", message="Nothing to do: the result is in the store", data=value)


def content_key(name: str, version: int, inputs: list[Any]) -> str:
    """sha256 over everything that decides what a step gives. What was left out at the end is as if it were None."""
    given = [_content(one) for one in inputs]
    while given and given[-1] is None:
        given.pop()
    return digest(canonical({"step": name, "version": version, "inputs": given}))


def _content(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_content(one) for one in value]
    if hasattr(value, "suite"):  # a task: its name and what it asks, but not how models are tuned for it
        return [value.name, _content(value.suite)]
    if isinstance(value, Recipe):
        return value.spec()
    if isinstance(value, Choice):
        fingerprint = getattr(value, "fingerprint", None)
        return [value.spec(), fingerprint() if fingerprint else None]
    return plain(value)


def label() -> str:
    """The name of the running step, as people see it."""
    return str(task_run.name or "step")


def _as_task(function: Callable[P, Any]) -> Task[P, Any]:
    decorate: Callable[[Callable[P, Any]], Task[P, Any]] = task(
        name=function.__name__.replace("_", "-"),
        cache_policy=NO_CACHE,
        persist_result=False,
        retries=len(RETRY_DELAYS),
        retry_delay_seconds=RETRY_DELAYS,
        retry_condition_fn=_worth_retrying,
    )
    return decorate(function)


def _worth_retrying(_task: Any, _run: Any, state: State[Any]) -> bool:
    """Only what did not answer: damaged, missing or mismatched data would fail the same way again."""
    try:
        state.result()
    except Unavailable as error:
        progress.waiting(label(), str(error))
        return True
    except BaseException:
        return False
    return False
