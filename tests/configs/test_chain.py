"""Chains from YAML: presets, the README's example, and errors that name the field and the choices."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.chain import PRESETS, dump_chain, load_chain, parse_chain, presets
from configs.exam import load_exam
from configs.settings import Settings
from storage.errors import InvalidInput
from tasks.mergers import Opcm, TsvM
from tasks.optimizers import Galore
from tasks.retry import Nothing, OtherRecipe
from tasks.scalings import Lines
from tasks.search import Search
from tasks.tuners import Lora

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", presets())
def test_presets_are_complete_and_survive_a_round_trip(name: str) -> None:
    config = load_chain(name)
    assert config == load_chain(PRESETS / f"{name}.yaml")
    assert parse_chain(dump_chain(config)) == config
    assert config.name == name


def test_all_presets_are_there() -> None:
    assert presets() == ["chat-jsonl", "clip-parquet", "clip-vit-b32-8tasks", "demo", "llama-lora", "smoke"]
    assert len(load_chain("clip-vit-b32-8tasks").tasks) == 8


def test_the_readmes_chain_is_valid(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    chain, tuners, lines, retained, _ = (yaml.safe_load(block) for block in blocks)
    config = parse_chain(chain)
    assert isinstance(config.lines[0].merger, Opcm)
    several = parse_chain({**chain, **lines})
    assert several.lines[-1].search == Search(factors=(0.5, 1.0, 1.5, 2.0))
    lora, full = (parse_chain({**chain, **tuner}).tuner for tuner in tuners)
    assert lora == Lora(rank=16, rslora=True, targets=("q_proj", "v_proj"), steps=500, learning_rate=2e-4)
    assert full.optimizer == Galore(rank=128)
    gated = parse_chain({**chain, **retained})
    assert gated.retained[0].name == "upright"
    assert [recipe.merger.name for recipe in gated.lines[0].recipes] == ["opcm", "opcm", "tsv_m", "tsv_m"]
    (tmp_path / "exam.yaml").write_text(blocks[-1])
    exam = load_exam(tmp_path / "exam.yaml", "support")
    assert exam.gate is not None
    assert (exam.suites[0].name, exam.gate.on_failure) == ("sums", "leave_out")


@pytest.mark.parametrize(
    ("tuner", "message"),
    [
        (
            {"name": "lorra"},
            "there is no 'lorra' .did you mean lora.*choices: full, lora, adalora, randlora",
        ),
        ({"name": "lora", "rnk": 3}, "rnk: there is no such field .did you mean rank"),
        ({"name": "lora", "optimizer": {"name": "moun"}}, "there is no 'moun' .did you mean muon.*adamw, muon, galore"),
        ({"name": "full", "optimizer": {"name": "muon", "rank": 3}}, "no such field; fields: name, version, momentum"),
        ({"name": "full", "optimizer": {"name": "galore", "rank": 0}}, "galore: rank must be positive, found 0"),
        ({"name": "full", "optimizer": {"name": "apollo", "per": "row"}}, "'row' is not one of 'channel' or 'tensor'"),
        ({"name": "full", "schedule": "cos"}, "'cos' is not one of 'cosine', 'linear' or 'constant'"),
        ({"name": "full", "clip": -1}, "clip must be 0 or more, found -1.0"),
        ({"name": "full", "learning_rate": float("inf")}, "learning_rate must be positive"),
        ({"name": "lora", "targets": []}, "targets must be a word or some names"),
        ({"name": "lora", "targets": "q_proj"}, "'q_proj' is not one of 'all-linear', 'all-conv' or 'all'"),
        ({"name": "lora", "ratio": 0.5}, "ratio must be 1 or more, found 0.5"),
        ({"name": "lora", "ratio": 2, "optimizer": {"name": "muon"}}, "ratio must be 1 with optimizer 'muon'"),
        ({"name": "adalora", "initial": 8, "rank": 8}, "initial must be more than rank, 8, found 8"),
        ({"name": "adalora", "hold": 0.6, "settle": 0.6}, "hold and settle must be less than all steps together"),
        ({"name": "randlora", "projection_seed": -1}, "projection_seed must be 0 or more"),
        ({"name": "osf", "processes": 2, "sharding": "fsdp"}, "must be none with tuner 'osf' and optimizer 'adamw'"),
        (
            {"name": "full", "processes": 2, "sharding": "fsdp", "optimizer": {"name": "muon"}},
            "sharding must be none with tuner 'full' and optimizer 'muon', found 'fsdp'",
        ),
        ({"name": "osf", "keep": 1.0}, r"keep must be in \(0, 1\), found 1.0"),
        (
            {"name": "shira", "optimizer": {"name": "muon"}},
            "optimizer must be adamw: entries that learn are",
        ),
    ],
)
def test_a_tuner_that_cannot_be_is_refused_before_anything_runs(tuner: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        parse_chain({**smoke(), "tuner": tuner})


def test_a_wrong_field_of_a_search_is_named() -> None:
    values = dump_chain(load_chain("smoke"))
    values["lines"][0]["search"] = {"factor": [1.0]}
    with pytest.raises(InvalidInput, match=r"search.factor: .*did you mean factors\?.*fields: name, version, factors"):
        parse_chain(values)


@pytest.mark.parametrize(
    ("retry", "message"),
    [
        (["tsv_m"], r"gate\.retry\.0: must be a factor such as 0\.5, or a recipe such as .*, found 'tsv_m'"),
        (
            [0.5, {"name": "tsv_m"}],
            r"retry\.1\.mapping\.name: there is no such field; fields: merger, sparsify, scaling",
        ),
        ([{}], r"retry\.0\.mapping: a recipe to retry by names nothing"),
        ([{"merger": {"name": "tsvm"}}], r"merger: there is no 'tsvm' \(did you mean tsv_m\?\); choices: average, "),
        ([{"merger": {"name": "ties", "densty": 0.1}}], r"ties\.densty: there is no such field \(did you mean density"),
        ([{"merger": {"name": "ties", "density": 3}}], r"ties: density must be in \(0, 1\], found 3"),
        (
            [{"scaling": {"name": "line"}}],
            r"there is no 'line' \(did you mean lines\?\); choices: match_norm, lines, none",
        ),
        (
            [{"scaling": {"name": "lines", "alhpa": 1}}],
            r"lines\.alhpa: there is no such field \(did you mean alpha\?\)",
        ),
        (
            [{"merger": {"name": "slerp"}}],
            r"'smoke-opcm', whose gate lists it in retry, has 3 updates, but merger 'slerp'",
        ),
        ([0.5, -1], "retry must be factors, finite and positive"),
    ],
)
def test_a_retry_that_cannot_be_is_refused_before_anything_runs(retry: list[Any], message: str) -> None:
    values = smoke()
    values["lines"][0]["gate"] = {"name": "gate", "retry": retry}
    with pytest.raises(InvalidInput, match=message) as caught:
        parse_chain(values)
    assert str(caught.value).count("\n") == 1, "one thing is wrong"


def test_a_retry_survives_a_round_trip() -> None:
    values = smoke()
    scaled = {"scaling": {"name": "lines"}, "sparsify": {"name": "none"}}
    values["lines"][0]["gate"] = {"name": "gate", "retry": [1, 0.5, {"merger": {"name": "tsv_m"}}, scaled]}
    config = parse_chain(values)
    assert config.lines[0].gate is not None
    assert config.lines[0].gate.retry == (1.0, 0.5, OtherRecipe(TsvM()), OtherRecipe(None, Nothing(), Lines()))
    assert [recipe.merger.name for recipe in config.lines[0].recipes] == ["opcm", "tsv_m", "opcm", "tsv_m"]
    assert parse_chain(json.loads(json.dumps(dump_chain(config)))) == config


def test_weights_are_for_mergers_that_have_them() -> None:
    values = smoke()
    values["tasks"][0]["weight"] = 2
    with pytest.raises(
        InvalidInput, match=r"'smoke-opcm' has 3 updates, 'rot90' weighs 2, but merger 'opcm' lets every"
    ):
        parse_chain(values)


def smoke() -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((PRESETS / "smoke.yaml").read_text())
    return values


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            ("lines", 0, "merger", "name"),
            "opmc",
            r"lines\.0\.merger: there is no 'opmc' \(did you mean opcm\?\); choices:",
        ),
        (
            ("lines", 0, "merger", "aplha"),
            0.3,
            r"aplha: there is no such field \(did you mean alpha\?\); fields: .*alpha",
        ),
        (("lines", 0, "merger", "alpha"), 3, r"alpha must be in \[0, 1\), found 3"),
        (("tasks", 0, "suite", "data", "view"), "rot91", r"view: 'rot91' is not one of 'id', 'rot90'"),
        (("tasks", 0, "suite", "head"), {"index": 1}, r"head: has no `name`"),
        (("tasks", 0, "nmae"), "x", r"tasks\.0\.nmae: there is no such field \(did you mean name\?\)"),
        (("tasks", 1, "name"), "rot90", "the name 'rot90' is used twice"),
        (("tuner", "steps"), "many", r"steps: input should be a valid integer.*found 'many'"),
        (("tasks",), [], "tasks is empty"),
        (("lines",), [], "lines is empty"),
        (("lines", 0, "name"), "Smoke Line", "is no name"),
        (("codec", "density"), 2, "density must be between 0 and 1, found 2"),
        (("bse",), 1, r"bse: there is no such field \(did you mean base\?\)"),
    ],
)
def test_errors_name_the_field(path: tuple[Any, ...], value: Any, message: str) -> None:
    values = copy.deepcopy(smoke())
    place: Any = values
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    with pytest.raises(InvalidInput, match=message):
        parse_chain(values)


def test_a_missing_field_is_named() -> None:
    values = smoke()
    del values["base"]
    with pytest.raises(InvalidInput, match="base: is missing"):
        parse_chain(values)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"no file 'dmeo'. Did you mean demo\?"):
        load_chain("dmeo")
    broken = tmp_path / "broken.yaml"
    broken.write_text("name: [")
    with pytest.raises(InvalidInput, match="is not YAML"):
        load_chain(broken)
    broken.write_text("just a text")
    with pytest.raises(InvalidInput, match="must be a mapping"):
        load_chain(broken)


def test_settings_have_embedded_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("DELTAWORKS_STORE", "MLFLOW_TRACKING_URI", "DELTAWORKS_DEVICE", "DELTAWORKS_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DELTAWORKS_HOME", str(tmp_path))
    found = Settings.from_environment()
    assert found.store == (tmp_path / "store").as_uri()
    assert found.tracking == f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert found.threads == 1


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("DELTAWORKS_THREADS", "two", "must be a positive whole number, found 'two'"),
        ("DELTAWORKS_DEVICE", "gpu", "must be cpu, cuda or cuda:<number>, found 'gpu'"),
    ],
)
def test_wrong_settings(monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InvalidInput, match=message):
        Settings.from_environment()
