"""Pools: where deployed runs are executed, how many at once, and how many of them may use a GPU.

A pool of type `process` runs them on the worker's machine; `docker` and `kubernetes` in containers of an image that has
Deltaworks in it (infra/Dockerfile). The job templates are Prefect's own, with defaults filled in: secrets come as a
file or as a Secret of the cluster, never as a variable of the template, which everybody who sees Prefect can read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlparse

from storage.errors import InvalidInput

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

Kind = Literal["process", "docker", "kubernetes"]
KINDS: Mapping[str, str] = {"process": "prefect", "docker": "prefect-docker", "kubernetes": "prefect-kubernetes"}
GPU_SLOTS = "deltaworks-gpu"  # the global concurrency limit that GPU stages take a slot of
IMAGE = "deltaworks:cpu"
_LEASE = 60.0  # seconds after which the slot of a process that was killed is free again
_PASSED_ON = ("PREFECT_API_URL", "MLFLOW_TRACKING_URI", "DELTAWORKS_STORE", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION")
_SECRET = "deltaworks"  # a Secret of the cluster: its keys become variables of the run
_FILES = "/etc/deltaworks/aws:/home/deltaworks/.aws:ro"  # the credentials file of boto3, from the worker's machine


@dataclass(frozen=True)
class Pool:
    """A work pool: its name, of which type it is created if it is not there, and the image of its containers."""

    name: str
    kind: Kind = "process"
    image: str = IMAGE


def ensure_pool(client: SyncPrefectClient, pool: Pool) -> bool:
    """Create the work pool unless there is one. Whether it was created. InvalidInput if it is of another type."""
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectNotFound

    try:
        held = client.read_work_pool(pool.name)
    except ObjectNotFound:
        metadata = client.read_worker_metadata()[KINDS[pool.kind]][pool.kind]
        template = job_template(metadata["default_base_job_configuration"], pool)
        client.create_work_pool(WorkPoolCreate(name=pool.name, type=pool.kind, base_job_template=template))
        return True
    if held.type != pool.kind:
        raise InvalidInput(
            f"the work pool {pool.name!r} is of type {held.type}, not {pool.kind}",
            remedy=f"Name another one with --pool, or give --pool-type {held.type}",
        )
    return False


def job_template(default: Mapping[str, Any], pool: Pool) -> dict[str, Any]:
    """Prefect's default template of this type with our defaults in it."""
    found: dict[str, Any] = deepcopy(dict(default))
    if pool.kind == "process":
        return found
    variables = found["variables"]["properties"]
    variables["image"]["default"] = pool.image
    variables["image_pull_policy"]["default"] = "IfNotPresent"
    variables["env"]["default"] = _passed_on()
    if pool.kind == "docker":
        variables["volumes"]["default"] = [_FILES]
        variables["auto_remove"]["default"] = True
        return found
    variables["finished_job_ttl"]["default"] = 3600
    (container,) = found["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]["containers"]
    container["envFrom"] = [{"secretRef": {"name": _SECRET, "optional": True}}]
    container["securityContext"] = {"runAsNonRoot": True, "allowPrivilegeEscalation": False}
    return found


def _passed_on() -> dict[str, str]:
    """Where the services are, for containers. A password in an address would be shown to everybody."""
    found = {name: os.environ[name] for name in _PASSED_ON if os.environ.get(name)}
    for name, value in found.items():
        if urlparse(value).password is not None:
            raise InvalidInput(
                f"{name} holds a password, which a work pool would show to everybody who sees Prefect",
                remedy="Take it out of the address, and give it to the containers as infra/security.md says",
            )
    return found


def ensure_queues(client: SyncPrefectClient, pool: str, queues: Sequence[str]) -> None:
    """Create these work queues unless they are there: one run at a time in each."""
    from prefect.exceptions import ObjectNotFound

    for queue in queues:
        try:
            client.read_work_queue_by_name(queue, pool)
        except ObjectNotFound:
            client.create_work_queue(queue, work_pool_name=pool, concurrency_limit=1)


def set_gpu_slots(client: SyncPrefectClient, count: int) -> None:
    """How many stages may use a GPU at once, over all workers; 0 takes the limit away."""
    from prefect.exceptions import ObjectNotFound

    if count:
        client.upsert_global_concurrency_limit_by_name(GPU_SLOTS, count)
        return
    try:
        client.delete_global_concurrency_limit_by_name(GPU_SLOTS)
    except ObjectNotFound:
        return


@contextmanager
def gpu_slot(device: str) -> Iterator[None]:
    """Hold a slot for as long as the block lasts, if it is about a GPU and slots are counted."""
    if not device.startswith("cuda") or not _are_counted():
        yield
        return
    from prefect.concurrency.sync import concurrency

    # a lease that is short is soon free when its holder is killed, and is renewed as long as it lives
    with concurrency(GPU_SLOTS, occupy=1, lease_duration=_LEASE, raise_on_lease_renewal_failure=False):
        yield


def _are_counted() -> bool:
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as client:
        try:
            return bool(client.read_global_concurrency_limit_by_name(GPU_SLOTS).active)
        except ObjectNotFound:
            return False
