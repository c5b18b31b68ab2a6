"""The causal_lm suite on a tiny random Llama: labels, losses and scores against formulas written down a second time."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from storage.artifacts import ArtifactStore
from storage.errors import InvalidInput, Mismatch
from storage.objects import MemoryObjects
from storage.refs import CheckpointRef
from tasks.checkpoints import HISTORY, load_model
from tasks.data import Jsonl, Parquet
from tasks.extract import Extract, extract_update
from tasks.fine_tune import fine_tune
from tasks.ingest import Checkpoint, ingest
from tasks.suites import CausalLm
from tasks.suites.answers import IGNORED
from tasks.suites.base import Score
from tasks.suites.causal_lm import CausalLmProblem
from tasks.tensors import read_tensor
from tasks.tuners import Full, Lora
from tests.tasks.tiny_tokenizer import BOS, EOS, IDS, ids, quiet, save_tokenizer

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def store() -> ArtifactStore:
    return ArtifactStore(MemoryObjects())


def llama_config(**more: Any) -> LlamaConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    # wide enough weights that the frozen head can tell words apart
    return LlamaConfig(vocab_size=len(IDS), max_position_embeddings=64, initializer_range=0.2, **{**sizes, **more})


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    LlamaForCausalLM(llama_config()).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def llama(llama_folder: Path, store: ArtifactStore) -> CheckpointRef:
    return ingest(Checkpoint(source=str(llama_folder)), store)


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Parquet:
    folder = tmp_path_factory.mktemp("sums")
    pairs = [(n, m) for n in range(10) for m in range(10)]
    rows = [{"prompt": f"{n} plus {m}", "answer": f"is {n + m}", "note": "x"} for n, m in pairs]
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    pq.write_table(pa.Table.from_pylist(rows[::7]), folder / "test.parquet")
    return Parquet(train=(str(folder / "train.parquet"),), test=(str(folder / "test.parquet"),))


def opened(suite: CausalLm, store: ArtifactStore, base: CheckpointRef) -> CausalLmProblem:
    return suite.open(store.open(base, "checkpoint"))


def test_labels_mask_exactly_the_prompt_and_the_padding(
    llama: CheckpointRef, sums: Parquet, store: ArtifactStore
) -> None:
    problem = opened(CausalLm(sums), store, llama)
    rows = [{"prompt": "1 plus 2", "answer": "is 3"}, {"prompt": "4", "answer": "is"}]
    batch = problem.collate(rows)
    first, second = [BOS, *ids("1 plus 2 is 3"), EOS], [BOS, *ids("4 is"), EOS]
    assert batch["input_ids"].tolist() == [first, second + [EOS] * 3]  # no padding token: the end of text stands in
    assert batch["attention_mask"].tolist() == [[1] * 7, [1] * 4 + [0] * 3]
    no = IGNORED
    assert batch["labels"].tolist() == [[no] * 4 + [*ids("is 3"), EOS], [no, no, *ids("is"), EOS, no, no, no]]


def test_texts_are_ended_once_whatever_the_tokenizer_adds(tmp_path: Path, sums: Parquet) -> None:
    LlamaForCausalLM(llama_config(num_hidden_layers=1)).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, ends=True)
    store = ArtifactStore(MemoryObjects())
    problem = opened(CausalLm(sums), store, ingest(Checkpoint(source=str(tmp_path)), store))
    batch = problem.collate([{"prompt": "1 plus 2", "answer": "is 3"}])
    assert batch["input_ids"].tolist() == [[BOS, *ids("1 plus 2 is 3"), EOS]]


def test_loss_and_scores_equal_an_independent_computation(
    llama: CheckpointRef, llama_folder: Path, sums: Parquet, store: ArtifactStore
) -> None:
    reference = LlamaForCausalLM.from_pretrained(llama_folder).eval()
    losses, right = [], 0
    for row in sums.rows("test"):
        prompt, answer = [BOS, *ids(row["prompt"])], [*ids(row["answer"]), EOS]
        with torch.no_grad():
            chances = reference(torch.tensor([prompt + answer])).logits[0].log_softmax(dim=-1)
        for place, token in enumerate(answer, start=len(prompt)):
            losses.append(-float(chances[place - 1, token]))
            right += int(chances[place - 1].argmax()) == token
    mean = math.fsum(losses) / len(losses)

    problem = opened(CausalLm(sums, batch=4), store, llama)
    backbone = load_model(store.open(llama, "checkpoint"))
    found = problem.wrap(backbone)(**problem.collate(list(problem.rows("test"))))
    # one padded batch against single examples: float32 sums in another order
    assert found["loss"].item() == pytest.approx(mean, abs=1e-5)
    assert found["logits"].shape == (15, 7, len(IDS))
    accuracy, perplexity = problem.score(backbone, "cpu", quiet)
    assert (accuracy.metric, accuracy.samples) == ("token_accuracy", len(losses))
    assert accuracy.value == right / len(losses)
    assert perplexity.metric == "perplexity"
    assert perplexity.value == pytest.approx(math.exp(mean), rel=1e-5)


def test_long_prompts_lose_their_beginning_but_not_the_first_token(
    llama: CheckpointRef, sums: Parquet, store: ArtifactStore
) -> None:
    row = {"prompt": "1 2 3 4 5", "answer": "6 7"}
    for most, prompt in ((9, [BOS, *ids("1 2 3 4 5")]), (6, [BOS, *ids("4 5")]), (4, [BOS]), (3, [])):
        batch = opened(CausalLm(sums, max_tokens=most), store, llama).collate([row])
        assert batch["input_ids"].tolist() == [[*prompt, *ids("6 7"), EOS]]
        assert batch["labels"].tolist() == [[IGNORED] * len(prompt) + [*ids("6 7"), EOS]]
    with pytest.raises(InvalidInput, match=r"begins '1 2 3 4 5.*expected 1 to 1 tokens and an end, found 2"):
        opened(CausalLm(sums, max_tokens=2), store, llama).collate([row])


def test_an_answer_without_tokens_is_refused(llama: CheckpointRef, sums: Parquet, store: ArtifactStore) -> None:
    with pytest.raises(InvalidInput, match="expected 1 to 63 tokens and an end, found 0"):
        opened(CausalLm(sums), store, llama).collate([{"prompt": "1", "answer": " "}])


def test_long_examples_are_counted_or_refused_before_training(
    llama: CheckpointRef, sums: Parquet, store: ArtifactStore
) -> None:
    rows = [{"prompt": " ".join("1" * count), "answer": "is 2"} for count in (2, 5, 9, 80)]
    cut = opened(CausalLm(sums, max_tokens=9), store, llama).check(rows, "train")
    assert cut == {"examples": 4, "cut": 2}  # <s>, five words, the answer's two, and its end are nine
    assert (
        opened(CausalLm(sums), store, llama).check(rows, "train")["cut"] == 1
    )  # the base reads 64 tokens, not the 512 wanted
    refusing = opened(CausalLm(sums, max_tokens=9, too_long="refuse"), store, llama)
    assert refusing.check(rows[:2], "train")["cut"] == 0
    with pytest.raises(InvalidInput, match=r"example 2 of the train split: expected at most 9 tokens .* found 13"):
        refusing.check(rows, "train")


def test_what_was_cut_is_told_and_kept(llama: CheckpointRef, sums: Parquet, store: ArtifactStore) -> None:
    notes: list[str] = []
    tuner = Lora(steps=2, batch=4, rank=2)
    suite = CausalLm(sums, max_tokens=6)
    tuned = fine_tune(llama, "sums", suite, tuner, store, report=lambda done, total, note: notes.append(note))
    assert notes[0] == "100 of 100 examples are too long and are cut"
    facts = store.open(tuned).manifest.facts
    assert (facts["examples"], facts["cut"]) == (100, 100)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path, sums: Parquet) -> None:
    store = ArtifactStore(MemoryObjects())
    config = llama_config(num_hidden_layers=1)
    config.vocab_size = len(IDS) - 5
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    small = ingest(Checkpoint(source=str(tmp_path)), store)
    expected = f"expected at most {len(IDS) - 5}, its embeddings, found {len(IDS)}"
    refs = set(store.refs())
    with pytest.raises(Mismatch, match=expected):
        fine_tune(small, "sums", CausalLm(sums), Lora(steps=2), store)
    assert set(store.refs()) == refs


@pytest.mark.parametrize("family", ["gpt2", "qwen"])
def test_other_families_learn_chats_from_json_lines(tmp_path: Path, family: str) -> None:
    small = {"vocab_size": len(IDS) + 8, "bos_token_id": BOS, "eos_token_id": EOS}
    torch.manual_seed(0)
    if family == "gpt2":
        model: Any = GPT2LMHeadModel(GPT2Config(n_positions=32, n_embd=32, n_layer=2, n_head=4, **small))
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = Qwen2ForCausalLM(Qwen2Config(max_position_embeddings=32, num_key_value_heads=2, **sizes, **small))
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    chats = [
        [{"role": "user", "content": f"{n} plus {m}"}, {"role": "assistant", "content": f"is {n + m}"}]
        for n in range(10)
        for m in range(10)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    data = Jsonl(train=(str(tmp_path / "train.jsonl"),), holdout=0.2)
    suite = CausalLm(data, messages="messages")
    store = ArtifactStore(MemoryObjects())
    base = ingest(Checkpoint(source=str(tmp_path)), store)
    full = Full(steps=40, batch=16, learning_rate=1e-2, weights="all", validate_every=10)
    tuned = fine_tune(base, "sums", suite, full, store)
    scores = []
    for ref in (base, tuned):
        checkpoint = store.open(ref)
        scores.append(suite.open(store.open(base)).score(load_model(checkpoint), "cpu", quiet))
    assert scores[1][1].value < scores[0][1].value / 3
    assert scores[1][0].value > 0.6  # "is" and the end are certain
    assert store.open(tuned).manifest.facts["best_validation_loss"] < 1.5


def test_wrong_columns_are_named(llama: CheckpointRef, sums: Parquet, store: ArtifactStore) -> None:
    problem = opened(CausalLm(sums, prompt="question"), store, llama)
    with pytest.raises(Mismatch, match="expected question, answer, found answer, note, prompt"):
        problem.rows("train")
    with pytest.raises(Mismatch, match="column 'answer' of the data: expected text, found None"):
        opened(CausalLm(sums), store, llama).collate([{"prompt": "1", "answer": None}])


def test_chats_train_the_last_message(llama: CheckpointRef, sums: Parquet, store: ArtifactStore) -> None:
    problem = opened(CausalLm(sums, messages="chat"), store, llama)
    chat = [{"role": "user", "content": "1 plus 2"}, {"role": "assistant", "content": "is 3"}]
    batch = problem.collate([{"chat": chat}])
    prompt = [BOS, *ids("26 Jul 2024 user 1 plus 2 assistant")]  # the same day on every day
    # the template writes both special tokens itself, and neither is written twice
    assert batch["input_ids"].tolist() == [[*prompt, *ids("is 3"), EOS]]
    assert batch["labels"].tolist() == [[IGNORED] * len(prompt) + [*ids("is 3"), EOS]]
    with pytest.raises(Mismatch, match="the last with role assistant"):
        problem.collate([{"chat": chat[:1]}])
    with pytest.raises(Mismatch, match="expected chat, found answer, note, prompt"):
        problem.rows("test")


def test_bases_that_cannot_do_it_are_refused(tmp_path: Path, llama: CheckpointRef, sums: Parquet) -> None:
    store = ArtifactStore(MemoryObjects())
    LlamaForCausalLM(llama_config(num_hidden_layers=1)).save_pretrained(tmp_path / "bare")
    bare = ingest(Checkpoint(source=str(tmp_path / "bare")), store)
    with pytest.raises(InvalidInput, match="has no tokenizer that can be read"):
        opened(CausalLm(sums), store, bare)
    save_tokenizer(tmp_path / "bare", eos=False, chat=None)
    with pytest.raises(InvalidInput, match="has no end-of-text token"):
        opened(CausalLm(sums), store, ingest(Checkpoint(source=str(tmp_path / "bare")), store))

    LlamaModel(llama_config(num_hidden_layers=1)).save_pretrained(tmp_path / "headless")
    save_tokenizer(tmp_path / "headless", chat=None)
    headless = ingest(Checkpoint(source=str(tmp_path / "headless")), store)
    problem = opened(CausalLm(sums, messages="chat"), store, headless)
    with pytest.raises(InvalidInput, match="LlamaModel predicts no tokens"):
        problem.wrap(load_model(store.open(headless, "checkpoint")))
    chat = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    with pytest.raises(InvalidInput, match="no chat template"):
        problem.collate([{"chat": chat}])


@pytest.fixture(scope="module")
def tuned(llama: CheckpointRef, sums: Parquet, store: ArtifactStore) -> CheckpointRef:
    return fine_tune(llama, "sums", CausalLm(sums, max_tokens=16), LORA, store)


LORA = Lora(steps=60, batch=16, learning_rate=2e-2, rank=4, alpha=8.0)


def test_lora_learns_and_is_reproducible(
    llama: CheckpointRef, tuned: CheckpointRef, sums: Parquet, store: ArtifactStore
) -> None:
    suite = CausalLm(sums, max_tokens=16)
    assert fine_tune(llama, "sums", suite, LORA, store) == tuned
    history = json.loads(store.open(tuned, "checkpoint").asset(HISTORY))
    assert history[-1]["loss"] < history[0]["loss"] / 3

    def scores(ref: CheckpointRef) -> list[Score]:
        model = store.open(ref, "checkpoint")
        return suite.open(model).score(load_model(model), "cpu", quiet)

    before, after = scores(llama), scores(tuned)
    assert after[1].value < before[1].value / 3  # perplexity: "is" and the end of text are certain after this
    assert after[0].value > before[0].value + 0.3


def test_update_keeps_the_factors(llama: CheckpointRef, tuned: CheckpointRef, store: ArtifactStore) -> None:
    ref = extract_update(llama, tuned, Extract(), store)
    base, after, update = store.open(llama, "checkpoint"), store.open(tuned, "checkpoint"), store.open(ref, "update")
    linear = [name for name in base.names if name.endswith("_proj.weight")]
    assert len(linear) == 14
    for name in base.names:
        record = update.record(name)
        delta = read_tensor(update, name)
        assert (record.rank == LORA.rank) == (name in linear)
        assert bool(delta.any()) == (name in linear)
        # exact: the tuned tensor is stored as the base's blob and these factors
        assert torch.equal(read_tensor(base, name) + delta, read_tensor(after, name))
