"""Masked language modelling: words, shares, what is never hidden, and the head against transformers' own."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast, RobertaConfig, RobertaModel, T5Config, T5Model

from wellread import load
from wellread.errors import BadInput
from wellread.masked import TiedHead, guessing_loss, hidden_states, masked, transformer_of, word_numbers, word_table


@pytest.fixture(scope="module")
def minilm():
    return load("minilm-l6")


def byte_pairs() -> PreTrainedTokenizerFast:
    """RoBERTa's kind: the first token of a word carries the space."""
    vocabulary = {"<s>": 0, "</s>": 1, "<pad>": 2, "<mask>": 3, "Ġ": 4, "a": 5, "b": 6, "c": 7, "Ġa": 8, "ab": 9}
    inner = Tokenizer(models.BPE(vocabulary, [("Ġ", "a"), ("a", "b")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", mask_token="<mask>")


def test_words_of_word_pieces(minilm):
    tokens = minilm.input(["aerodynamically stable wings", "wings"])
    pieces = minilm.input.tokenizer.convert_ids_to_tokens(tokens["input_ids"][0].tolist())
    numbers = word_numbers(tokens["input_ids"], minilm.input.tokenizer)
    assert [int(number) for number, piece in zip(numbers[0], pieces, strict=True) if not piece.startswith("##")] == [0, 1, 2, 3, 0]
    assert (numbers[0] == 1).sum() > 1 and numbers[1].tolist() == [0, 1] + [0] * (len(pieces) - 2)


def test_words_of_byte_pairs():
    tokenizer = byte_pairs()
    ids = torch.tensor([tokenizer("abc a cab")["input_ids"]])
    pieces = tokenizer.convert_ids_to_tokens(ids[0].tolist())
    numbers = word_numbers(ids, tokenizer)[0].tolist()
    starts = [piece.startswith("Ġ") or before in ("<s>",) for before, piece in zip(["", *pieces[:-1]], pieces, strict=True)]
    assert numbers[0] == numbers[-1] == 0 and max(numbers) == 3
    assert all((now > before) == start for before, now, start in zip(numbers[:-2], numbers[1:-1], starts[1:-1], strict=True))


def test_shares_and_what_is_never_hidden(minilm):
    torch.manual_seed(0)
    tokens = minilm.input(["the boundary layer of a supersonic aerofoil separates near the trailing edge " * 4] * 200 + ["short"])
    tokenizer, before = minilm.input.tokenizer, tokens["input_ids"].clone()
    hidden, labels = masked(tokens, tokenizer, 0.15)
    assert torch.equal(tokens["input_ids"], before) and hidden["attention_mask"] is tokens["attention_mask"]
    chosen = labels != -100
    words = word_numbers(before, tokenizer)
    assert not chosen[words == 0].any() and torch.equal(labels[chosen], before[chosen])
    assert torch.equal(hidden["input_ids"][~chosen], before[~chosen])
    count, total = int(chosen[:200].sum()), int((words[:200] > 0).sum())
    assert abs(count / total - 0.15) < 0.01
    masks = hidden["input_ids"][chosen] == tokenizer.mask_token_id
    same = hidden["input_ids"][chosen] == before[chosen]
    assert abs(float(masks.float().mean()) - 0.8) < 0.04 and abs(float(same.float().mean()) - 0.1) < 0.03
    for row in range(20):  # a word is hidden as a whole
        for number in range(1, int(words[row].max()) + 1):
            assert len(chosen[row][words[row] == number].unique()) == 1
    assert chosen[-1].sum() > 0  # one word of each text at least


def test_only_one_side(minilm):
    pair = minilm.input([["which wing", "the wing of the aeroplane"], ["a b", "c"]])
    side = pair["token_type_ids"].bool()
    for _ in range(5):
        _, labels = masked(pair, minilm.input.tokenizer, 0.9, among=side)
        assert not (labels != -100)[~side].any() and (labels != -100).any(1).all()
    nothing = torch.zeros_like(side)
    hidden, labels = masked(pair, minilm.input.tokenizer, 0.9, among=nothing)
    assert (labels == -100).all() and torch.equal(hidden["input_ids"], pair["input_ids"])
    loss = guessing_loss(minilm.module, TiedHead.of(minilm.module), hidden, labels)
    assert loss.item() == 0.0


def test_the_head_is_that_of_transformers():
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, hidden_act="gelu")
    theirs = BertForMaskedLM(config).eval()
    head = TiedHead.of(theirs)
    transform, given = theirs.cls.predictions.transform, theirs.cls.predictions
    head.load_state_dict({
        "dense.weight": transform.dense.weight, "dense.bias": transform.dense.bias, "norm.weight": transform.LayerNorm.weight,
        "norm.bias": transform.LayerNorm.bias, "bias": given.bias,
    })  # fmt: skip
    tokens = {"input_ids": torch.randint(5, 50, (3, 7)), "attention_mask": torch.ones(3, 7, dtype=torch.int64)}
    labels = torch.full((3, 7), -100)
    labels[0, 2], labels[1, 5] = 7, 9
    torch.testing.assert_close(guessing_loss(theirs.bert, head, tokens, labels), theirs(**tokens, labels=labels).loss)
    torch.testing.assert_close(head(hidden_states(theirs.bert, tokens), word_table(theirs.bert)), theirs(**tokens).logits)


def test_other_families_and_refusals(minilm):
    roberta = nn.Sequential(RobertaModel(RobertaConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)))
    assert word_table(roberta).shape == (30, 8) and transformer_of(minilm.module).config.model_type == "bert"
    tokenizer = byte_pairs()
    tokenizer.mask_token = None
    with pytest.raises(BadInput, match="no mask token"):
        masked({"input_ids": torch.zeros(1, 3, dtype=torch.int64)}, tokenizer)
    with pytest.raises(BadInput, match="no transformer"):
        word_table(nn.Linear(2, 2))
    with pytest.raises(BadInput, match="with a decoder"):
        transformer_of(T5Model(T5Config(vocab_size=9, d_model=4, d_kv=4, d_ff=4, num_layers=1, num_heads=1, decoder_start_token_id=0)))
