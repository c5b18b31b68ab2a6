"""Work pools of each type in a real Prefect server, and GPU slots that are held one at a time."""

from __future__ import annotations

import threading
import time

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolUpdate
from prefect.settings import PREFECT_API_URL
from prefect.utilities.schema_tools import validate
from prefect.utilities.templating import apply_values
from typer.testing import CliRunner

from flows.cli import app
from flows.pools import GPU_SLOTS, Kind, Pool, ensure_pool, gpu_slot, set_gpu_slots
from storage.errors import InvalidInput
from tests.flows.arrivals import open_line

pytestmark = pytest.mark.usefixtures("prefect_server", "home")


@pytest.mark.parametrize("kind", ["process", "docker", "kubernetes"])
def test_a_pool_of_each_type_is_taken_by_prefect(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its server checks the template; what a run would be given is checked against the template's own schema."""
    monkeypatch.setenv("DELTAWORKS_STORE", "s3://models/store")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "known-to-nobody")
    pool = Pool(f"a-{kind}", kind, "registry/deltaworks:1")
    with get_client(sync_client=True) as client:
        assert ensure_pool(client, pool)
        assert not ensure_pool(client, pool)
        held = client.read_work_pool(pool.name)
        client.update_work_pool(pool.name, WorkPoolUpdate(base_job_template=held.base_job_template))
    assert held.type == kind
    assert "known-to-nobody" not in str(held.base_job_template)
    variables = held.base_job_template["variables"]
    given = {name: one["default"] for name, one in variables["properties"].items() if "default" in one}
    validate(given, variables, raise_on_error=True)
    if kind == "process":
        return
    job = apply_values(held.base_job_template["job_configuration"], {**given, "command": "prefect flow-run execute"})
    env = given["env"]
    assert env["DELTAWORKS_STORE"] == "s3://models/store"
    if kind == "docker":
        assert (job["image"], job["volumes"]) == (pool.image, ["/etc/deltaworks/aws:/home/deltaworks/.aws:ro"])
        return
    (container,) = job["job_manifest"]["spec"]["template"]["spec"]["containers"]
    assert (container["image"], container["env"]) == (pool.image, env)
    assert container["envFrom"] == [{"secretRef": {"name": "deltaworks", "optional": True}}]
    assert job["job_manifest"]["spec"]["ttlSecondsAfterFinished"] == 3600


def test_a_pool_of_another_type_and_a_password_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with get_client(sync_client=True) as client:
        ensure_pool(client, Pool("for-processes"))
        with pytest.raises(InvalidInput, match="of type process, not docker"):
            ensure_pool(client, Pool("for-processes", "docker"))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://user:secret@mlflow")
        with pytest.raises(InvalidInput, match="MLFLOW_TRACKING_URI holds a password") as caught:
            ensure_pool(client, Pool("leaky", "docker"))
    assert "secret@" not in str(caught.value)


def test_the_command_makes_pools_and_slots(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", PREFECT_API_URL.value() or "")
    open_line(tmp_path, "theta")  # type: ignore[arg-type]
    options = ["--line", "theta", "--pool", "cluster", "--pool-type", "kubernetes", "--gpu-slots", "2"]
    found = CliRunner().invoke(app, ["deploy", *options])
    assert found.exit_code == 0, found.stderr
    assert "prefect worker start --pool cluster --type kubernetes" in found.output
    with get_client(sync_client=True) as client:
        assert client.read_global_concurrency_limit_by_name(GPU_SLOTS).limit == 2
        set_gpu_slots(client, 0)
    wrong = CliRunner().invoke(app, ["deploy", "--line", "theta", "--pool-type", "slurm"])
    assert wrong.exit_code == 1 and "--pool-type must be process, docker, kubernetes" in wrong.stderr


def overlapping(device: str) -> bool:
    """Whether two stages on this device were at work at the same time."""
    inside, most = [0], [0]
    lock = threading.Lock()

    def stage() -> None:
        with gpu_slot(device):
            with lock:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
            time.sleep(1.0)
            with lock:
                inside[0] -= 1

    threads = [threading.Thread(target=stage) for _ in range(2)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    return most[0] > 1


def test_gpu_stages_take_turns_only_where_slots_are_counted() -> None:
    with get_client(sync_client=True) as client:
        set_gpu_slots(client, 0)
        assert overlapping("cuda:0")
        set_gpu_slots(client, 1)
        try:
            assert not overlapping("cuda")
            assert overlapping("cpu")
        finally:
            set_gpu_slots(client, 0)
            set_gpu_slots(client, 0)  # a second time does nothing
