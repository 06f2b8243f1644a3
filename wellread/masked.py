"""Masked language modelling on any encoder: which words are hidden, and a head that guesses them (Devlin et al. 2019, arXiv 1810.04805).

Tokens are what `TextInput` gives: {"input_ids", "attention_mask", ...}, int64 [B, T]. Random numbers are torch's own.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from wellread.errors import BadInput

NOTHING = -100  # the label where nothing is to be guessed, as cross-entropy has it


def word_numbers(ids: Tensor, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """int64 [B, T]: which word of its text each token [B, T] is part of, from 1 on; 0 for special tokens and padding."""
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids, device=ids.device))
    after_special = torch.cat([torch.ones_like(special[:, :1]), special[:, :-1]], 1)
    starts = ~special & (~_goes_on(tokenizer).to(ids.device)[ids] | after_special)
    return starts.cumsum(1).masked_fill(special, 0)


@lru_cache(maxsize=4)
def _goes_on(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """bool [V]: the tokens that go on with the word before them. WordPiece marks these (##), the others mark the first one (a sign for the space)."""
    tokens: list[str] = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))  # type: ignore[assignment]
    if any(token.startswith("##") for token in tokens):
        return torch.tensor([token.startswith("##") for token in tokens])
    firsts = torch.tensor([token.startswith(("Ġ", "▁", "Ċ")) for token in tokens])
    return ~firsts if firsts.any() else torch.zeros_like(firsts)  # no sign known: every token is a word


def masked(
    tokens: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase, share: float = 0.15, *, whole_words: bool = True, among: Tensor | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """The tokens with some of them hidden, and what was there: labels, int64 [B, T], -100 elsewhere. The given tensors are not changed.

    Each word (or token) is chosen with probability `share`, but one of each text always is. Of the chosen tokens 80 % become the mask token, 10 % a
    random one, 10 % stay. Special tokens and padding are never chosen; with `among`, bool [B, T], nothing outside it is.
    Raises `BadInput` for a tokenizer without a mask token.
    """
    mask = mask_token(tokenizer)
    ids = tokens["input_ids"]
    words = word_numbers(ids, tokenizer)
    allowed = (words > 0) if among is None else (words > 0) & among
    places = words if whole_words else torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    drawn = torch.rand(len(ids), ids.shape[1] + 1, device=ids.device).gather(1, places)
    drawn = drawn.masked_fill(~allowed, 2.0)
    chosen = allowed & ((drawn < share) | (drawn == drawn.amin(1, keepdim=True)))
    how = torch.rand(ids.shape, device=ids.device)
    found = torch.where(chosen & (how < 0.8), mask, ids)
    anything = torch.randint(len(tokenizer), ids.shape, device=ids.device)
    found = torch.where(chosen & (how >= 0.8) & (how < 0.9), anything, found)
    return {**tokens, "input_ids": found}, ids.masked_fill(~chosen, NOTHING)


def mask_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Raises `BadInput` when there is none, as for networks that only read from left to right."""
    found = tokenizer.mask_token_id
    if found is None:
        raise BadInput("this tokenizer has no mask token, so words cannot be hidden: give an encoder of the BERT or RoBERTa kind")
    return int(found)  # type: ignore[arg-type]


class TiedHead(nn.Module):
    """From hidden states to the vocabulary, by the inner product with the word table: BERT's head, its weights new.

    width: of the hidden states. vocabulary: rows of the table. table_width: of its vectors, when it is another.
    """

    def __init__(self, width: int, vocabulary: int, table_width: int | None = None) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(width, table_width or width), nn.LayerNorm(table_width or width, eps=1e-12)
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        nn.init.normal_(self.dense.weight, std=0.02)
        nn.init.zeros_(self.dense.bias)

    @classmethod
    def of(cls, module: nn.Module) -> TiedHead:
        """A new one for this encoder."""
        table = word_table(module)
        return cls(transformer_of(module).config.hidden_size, len(table), table.shape[1])

    def forward(self, states: Tensor, table: Tensor) -> Tensor:
        """Logits [..., V] of states [..., C] and the table [V, E]."""
        return F.linear(self.beside(states), table, self.bias)

    def beside(self, states: Tensor) -> Tensor:
        """[..., E], what is compared with the table, from states [..., C]."""
        return self.norm(F.gelu(self.dense(states)))


def transformer_of(module: nn.Module) -> Any:
    """The transformers model inside a network's module. Raises `BadInput` when there is none, or it is a pair of encoder and decoder."""
    found = next((part for part in module.modules() if isinstance(part, PreTrainedModel)), None)
    if found is None or found.get_input_embeddings() is None:
        raise BadInput("this network has no transformer with a table of words inside: give an encoder of the BERT or RoBERTa kind, such as minilm-l6")
    if found.config.is_encoder_decoder:
        raise BadInput(f"this network is a {type(found).__name__}, an encoder with a decoder: give an encoder of the BERT or RoBERTa kind")
    return found


def word_table(module: nn.Module) -> Tensor:
    """The trained table [V, E] from which the encoder takes its words."""
    return transformer_of(module).get_input_embeddings().weight


def hidden_states(module: nn.Module, tokens: dict[str, Tensor]) -> Tensor:
    """Last hidden states [B, T, C]."""
    return transformer_of(module)(**tokens).last_hidden_state


def guessing_loss(module: nn.Module, head: TiedHead, tokens: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Mean cross-entropy in nats of the hidden words; a scalar. tokens and labels as `masked` gives them; 0 when nothing is hidden."""
    places = labels != NOTHING
    logits = head(hidden_states(module, tokens)[places], word_table(module))
    return F.cross_entropy(logits, labels[places], reduction="sum") / places.sum().clamp(min=1)
