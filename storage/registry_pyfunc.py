"""The folder of a version that `mlflow.pyfunc` loads: it names the weights in the store, and holds none of them.

    MLmodel          which module loads it (`loader_module`), settings that may be given others, parameters of a request
    weights.json     {"ref": "checkpoint/<sha256>", "store": "s3://bucket/prefix", "scores": "scores/<sha256>"}
    input_example.json, serving_input_example.json     rows that it takes, alone and as a request of the server

Nothing in it is a pickle, so loading runs no code but that of the installed package.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from storage.errors import InvalidInput
from storage.refs import CheckpointRef, ScoresRef

FOLDER = "model"  # in the artifacts of the version's run
WEIGHTS = "weights.json"
EXAMPLE, REQUEST = "input_example.json", "serving_input_example.json"


@dataclass(frozen=True)
class Rows:
    """What a model takes. `example`: a few rows as JSON has them; `shape`: of one row where they are arrays of float32,
    -1 for any size, which MLflow then asks for; None where rows may come in several forms."""

    example: Sequence[Any] = ()
    shape: tuple[int, ...] | None = None


@contextmanager
def answering() -> Iterator[None]:
    """Refusals as MLflow's server passes them on: of other errors its client learns nothing. They stay InvalidInput."""
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import BAD_REQUEST

    class Refused(InvalidInput, MlflowException):
        def __init__(self, said: str) -> None:
            MlflowException.__init__(self, said, error_code=BAD_REQUEST)
            self.remedy = ""  # it is in what is said

    try:
        yield
    except InvalidInput as error:
        raise Refused(str(error)) from error


def folder_of(
    model: CheckpointRef,
    store: str,
    loader: str,
    settings: Mapping[str, Any],
    parameters: Mapping[str, str],
    scores: ScoresRef | None = None,
    rows: Rows | None = None,
) -> dict[str, bytes]:
    """The files of the folder by name. `store`: its address; `loader`: the module that has `_load_pyfunc(path,
    model_config)`, given the path of weights.json; `settings`: its defaults, as model_config may change them;
    `parameters`: what a request may set, with the value if it does not; `scores`: what the model was measured on;
    `rows`: what it takes, if that is known."""
    from mlflow.models import Model, ModelSignature  # takes a second to import: only for those who register
    from mlflow.types import ParamSchema, ParamSpec

    schema = ParamSchema([ParamSpec(name, "string", default) for name, default in parameters.items()])
    rows = rows or Rows()
    example = _example(rows)
    told = {"artifact_path": EXAMPLE, "serving_input_path": REQUEST, "type": "json_object"}
    if rows.shape is not None:
        told["type"] = "ndarray"
    described = Model(
        model_uuid=None,
        signature=ModelSignature(inputs=_arrays(rows.shape), params=schema),
        saved_input_example_info=told if example else None,
    )
    described.add_flavor(
        "python_function",
        loader_module=loader,
        data=WEIGHTS,
        config=dict(settings),
        env={},
        python_version=platform.python_version(),
    )
    named = {"ref": model, "store": store, **({"scores": scores} if scores else {})}
    return {"MLmodel": described.to_yaml().encode(), WEIGHTS: json.dumps(named, indent=2).encode(), **example}


def _arrays(shape: tuple[int, ...] | None) -> Any:
    """The schema of arrays; none for rows of other kinds: MLflow would drop all but the first text of a pair."""
    if shape is None:
        return None
    import numpy
    from mlflow.types import Schema, TensorSpec

    return Schema([TensorSpec(numpy.dtype("float32"), (-1, *shape))])


def _example(rows: Rows) -> dict[str, bytes]:
    if not rows.example:
        return {}
    given = list(rows.example)
    return {EXAMPLE: json.dumps(given).encode(), REQUEST: json.dumps({"inputs": given}).encode()}
