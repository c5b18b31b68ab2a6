"""Worker: one of the processes of a training, started by `accelerate launch` (tasks/launched.py).

python -m tasks.worker FOLDER        with job.json in it; the leading process writes result.json
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from functools import partial
from pathlib import Path

from storage.errors import DeltaworksError
from tasks.launched import Job
from tasks.told import tell_error, tell_progress, tell_result

_LOOK = 1.0  # seconds between two looks at whether somebody waits for us


def main(folder: Path) -> int:
    import torch

    from storage.address import open_objects
    from storage.artifacts import ArtifactStore
    from tasks.fine_tune import work

    told = json.loads((folder / "job.json").read_text())
    _end_without(told["parent"])
    rank = int(os.environ.get("RANK", "0"))
    torch.set_num_threads(told["threads"])
    try:
        ref = work(Job.read(told["job"]), ArtifactStore(open_objects(told["store"])), partial(tell_progress, folder))
    except DeltaworksError as error:
        tell_error(folder, rank, error)
        return 1
    except Exception as error:
        tell_error(folder, rank, error)
        raise
    if ref is not None:
        tell_result(folder, ref)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


def _end_without(parent: int) -> None:
    """End this process when the one that launched it, or the one that waits for the training, is gone."""
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher and _runs(parent):
            time.sleep(_LOOK)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
