"""A tokenizer of a few words, one token each, for tiny language models made in tests."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<s>", "</s>", "<unk>"]
WORDS = [
    *(str(n) for n in range(20)),
    "plus",
    "is",
    "user",
    "assistant",
    "a",
    "photo",
    "of",
    "cat",
    "dog",
    "red",
    "blue",
    "26",
    "Jul",
    "2024",
]
IDS = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
BOS, EOS = 0, 1
TEMPLATE = (
    # writes the day, as Llama's does
    "{{ bos_token }}{{ strftime_now('%d %b %Y') }} {% for m in messages %}{{ m.role }} {{ m.content }} "
    "{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)


def save_tokenizer(folder: Path, *, chat: str | None = TEMPLATE, eos: bool = True, ends: bool = False) -> None:
    """One token a word; texts begin with <s>, and end with </s> if `ends`."""
    inner = Tokenizer(models.WordLevel(IDS, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    single = "<s> $A </s>" if ends else "<s> $A"
    inner.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", BOS), ("</s>", EOS)])
    names = {"bos_token": "<s>", "unk_token": "<unk>", **({"eos_token": "</s>"} if eos else {})}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=77, **names)
    tokenizer.chat_template = chat
    tokenizer.save_pretrained(folder)


def ids(text: str) -> list[int]:
    return [IDS[word] for word in text.split()]


def quiet(done: int, total: int) -> None:
    """Reports nothing."""
