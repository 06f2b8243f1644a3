"""Sentence encoders of a few thousand weights whose tokenizer knows some words, for the tests of what is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from wellread import Network, TextInput, families

SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}


def two_families(vocabulary: int) -> dict[str, dict[str, Any]]:
    """Configurations of one layer, for a tokenizer of so many words and special tokens."""
    small = {"vocab_size": vocabulary, "hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 1, "pad_token_id": 0}
    return {
        "bert": {"model_type": "bert", "max_position_embeddings": 48, **small},
        "roberta": {"model_type": "roberta", "max_position_embeddings": 64, **small},
    }


def tokenizer_of(words: Sequence[str], special: int = 4, pair: str | None = None, **settings: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of these words behind the first `special` of SPECIAL; with [SEP] among them texts are framed.

    pair: the frame of two texts, as TemplateProcessing has it. settings: of PreTrainedTokenizerFast.
    """
    tokens = dict(list(SPECIAL.items())[:special])
    numbers = {word: number for number, word in enumerate([*tokens.values(), *words])}
    inner = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if special >= 4:
        inner.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair=pair, special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, **tokens, **settings)


def small_encoder(tokenizer: PreTrainedTokenizerFast, config: dict[str, Any], *, length: int = 64, normalize: bool = True, shaken: bool = True) -> Network:
    """An encoder with fresh weights and mean pooling. shaken: noise on all of them, since fresh biases are 0 and fresh norms 1."""
    architecture = {"family": "transformers", "auto": "AutoModel", "config": config, "pooling": "mean", "normalize": normalize}
    torch.manual_seed(0)
    network = Network(families.build(architecture), TextInput(tokenizer, length), "head", None, "embedding", architecture)
    with torch.no_grad():
        for parameter in network.module.parameters() if shaken else ():
            parameter += 0.05 * torch.randn_like(parameter)
    return network
