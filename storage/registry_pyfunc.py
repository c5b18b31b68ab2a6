"""The folder of a version that `mlflow.pyfunc` loads: it names the weights in the store, and holds none of them.

    MLmodel          which module loads it (`loader_module`), and settings that may be given others
    weights.json     {"ref": "checkpoint/<sha256>", "store": "s3://bucket/prefix"}

Nothing in it is a pickle, so loading runs no code but that of the installed package.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from typing import Any

from storage.refs import CheckpointRef

FOLDER = "model"  # in the artifacts of the version's run
WEIGHTS = "weights.json"


def folder_of(model: CheckpointRef, store: str, loader: str, settings: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of the folder by name. `store`: its address; `loader`: the module that has `_load_pyfunc(path,
    model_config)`, given the path of weights.json; `settings`: its defaults, as model_config may change them."""
    from mlflow.models import Model  # takes a second to import: only for those who register

    described = Model(model_uuid=None)
    described.add_flavor(
        "python_function",
        loader_module=loader,
        data=WEIGHTS,
        config=dict(settings),
        env={},
        python_version=platform.python_version(),
    )
    weights = json.dumps({"ref": model, "store": store}, indent=2).encode()
    return {"MLmodel": described.to_yaml().encode(), WEIGHTS: weights}
