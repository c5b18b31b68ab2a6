"""A tiny BERT whose tokenizer knows the words of some texts, for tests of text encoders."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def save_bert(
    folder: Path, texts: Iterable[str], *, positions: int = 40, pad: bool = True, words: int = 0, std: float = 0.2
) -> Path:
    """`words`: of the model's embeddings, if not as many as the tokenizer has."""
    known = sorted({word for text in texts for word in text.lower().split()})
    ids = {word: number for number, word in enumerate([*_SPECIAL, *known])}
    inner = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "unk_token": "[UNK]",
        **({"pad_token": "[PAD]"} if pad else {}),
    }
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, model_input_names=inputs, **names)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(vocab_size=words or len(ids), max_position_embeddings=positions, initializer_range=std, **sizes)
    BertModel(config).save_pretrained(folder)
    return folder
