"""PROP: losses by their closed forms, what is hidden, that it learns and that shuffled labels teach nothing, and the way on to judged queries."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

import wellread
from tests.small_encoders import small_encoder, tokenizer_of
from wellread import Network
from wellread.cli import main
from wellread.errors import BadInput
from wellread.masked import hidden_states
from wellread.rerankers import CrossEncoder, build, rerank
from wellread.retrieve import neural_ranking, prop
from wellread.retrieve.prop import LOSSES, hinge, learn, logistic, pair_accuracy, pair_batches, scores_and_states, second_text, softmax_hinge
from wellread.retrieve.word_sets import WordPairs, word_pairs
from wellread.unigram import unigram

WORDS = [a + b + c for a in "bdkmr" for b in "aeiou" for c in "lnst"]
SMALL = {"vocab_size": 105, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 72, "pad_token_id": 0}
FAMILIES: dict[str, dict[str, Any]] = {"bert": {"model_type": "bert", **SMALL}, "roberta": {"model_type": "roberta", "type_vocab_size": 1, **SMALL}}
OPTIONS: dict[str, Any] = {"pairs": 2, "length": 48, "shortest": 0, "queries": 10, "language": None, "batch_size": 8}


def made(kind: str = "bert") -> Network:
    """A small encoder with fresh weights, and a tokenizer that frames pairs as this family does."""
    between = "[SEP] [SEP] $B [SEP]" if kind == "roberta" else "[SEP] $B:1 [SEP]:1"
    names = ["input_ids", "attention_mask"] + (["token_type_ids"] if kind == "bert" else [])
    return small_encoder(tokenizer_of(WORDS, special=5, pair=f"[CLS] $A {between}", model_input_names=names), FAMILIES[kind])


def corpus(rows: int = 60, length: int = 40, seed: int = 0, own_share: float = 0.5) -> Dataset:
    """Words with Zipf's frequencies, and six words of each document's own in a share of its places."""
    random = np.random.default_rng(seed)
    odds = 1 / np.arange(1, len(WORDS) + 1)
    texts = []
    for _ in range(rows):
        own = random.choice(WORDS, 6, replace=False)
        texts.append(" ".join(str(random.choice(own) if random.random() < own_share else random.choice(WORDS, p=odds / odds.sum())) for _ in range(length)))
    return Dataset.from_dict({"id": [f"d{row}" for row in range(rows)], "text": texts})


def example(folder: Path) -> dict[str, Any]:
    made().save(folder / "encoder")
    corpus().to_csv(folder / "texts.csv")
    return {"encoder": str(folder / "encoder"), "corpus": f"csv:{folder / 'texts.csv'}", **{**OPTIONS, "language": "en"}}


@pytest.fixture(scope="module")
def network() -> Network:
    return made()


def material(rows: int = 140, pairs: int = 5) -> tuple[Dataset, WordPairs]:
    """Documents without words of their own: the likelier set is that of the more frequent words, which a small network learns quickly."""
    table = corpus(rows, own_share=0.0)
    model = unigram(table["text"], language=None, background="collection")
    return table, word_pairs(model, model.counts, np.full(rows, 40), pairs=pairs, shortest=0, subsample=math.inf)


# --- losses


def test_losses_in_closed_form() -> None:
    torch.manual_seed(0)
    better, worse = torch.randn(2, 64, dtype=torch.float64) * 3
    gap = better - worse
    torch.testing.assert_close(softmax_hinge(better, worse), 2 * (1 - torch.sigmoid(gap)).mean(), rtol=0, atol=1e-12)
    p = torch.stack([better, worse]).softmax(0)
    torch.testing.assert_close(softmax_hinge(better, worse), hinge(p[0], p[1]), rtol=0, atol=1e-12)
    torch.testing.assert_close(softmax_hinge(worse, better), 2 - softmax_hinge(better, worse), rtol=0, atol=1e-12)
    torch.testing.assert_close(hinge(better, worse), (1 - gap).clamp(min=0).mean(), rtol=0, atol=1e-12)
    torch.testing.assert_close(logistic(better, worse), -torch.nn.functional.logsigmoid(gap).mean(), rtol=0, atol=1e-12)
    assert softmax_hinge(torch.zeros(1), torch.zeros(1)).item() == 1 and logistic(torch.zeros(1), torch.zeros(1)).item() == pytest.approx(math.log(2))
    assert hinge(torch.tensor([2.0]), torch.tensor([1.0])).item() == 0


@pytest.mark.parametrize("name", list(LOSSES))
def test_the_gradient_is_about_the_difference_only(name: str) -> None:
    scores = torch.tensor([[0.3, -1.0, 4.0], [0.1, 1.5, -2.0]], requires_grad=True)
    LOSSES[name](*scores).backward()
    first, second = scores.grad
    torch.testing.assert_close(first + second, torch.zeros(3), rtol=0, atol=1e-7)
    assert (first <= 0).all() and first.abs().sum() > 0


# --- batches


@pytest.mark.parametrize("kind", list(FAMILIES))
def test_a_batch_holds_pairs_side_by_side_and_hides_words_of_the_document_only(kind: str) -> None:
    source = replace(made(kind).input, max_length=40)
    table, found = material(20)
    plain = next(pair_batches(source, table, found, batch_size=16, mask=0, shuffle=False).epoch(0))
    hidden = next(pair_batches(source, table, found, batch_size=16, mask=0.4, shuffle=False).epoch(0))
    assert plain["inputs"]["input_ids"].shape == (32, 40) and (plain["labels"] == -100).all()
    for row, ids in enumerate(plain["inputs"]["input_ids"]):
        pair = row // 2
        read = source.tokenizer.decode(ids).split("[SEP]")
        assert read[0].split()[1:] == found.texts(pair)[row % 2].split(), "better, worse, better, worse, ..."
        document = table["text"][int(found.document[pair])].split()
        assert document[: len(read[-2].split())] == read[-2].split(), "the document is cut at its end, each time from the whole"
    ids, labels = hidden["inputs"]["input_ids"], hidden["labels"]
    places = labels != -100
    second = second_text(plain["inputs"]["input_ids"], 3)
    assert places.any(1).all() and not (places & ~second).any() and not torch.isin(labels[places], torch.tensor([0, 2, 3, 4])).any()
    assert torch.equal(ids[~places], plain["inputs"]["input_ids"][~places]) and torch.equal(labels[places], plain["inputs"]["input_ids"][places])
    assert 0.3 < places.sum() / (second & (plain["inputs"]["input_ids"] > 4)).sum() < 0.5
    assert any(not torch.equal(places[row], places[row + 1]) for row in range(0, 32, 2))
    again = next(pair_batches(source, table, found, batch_size=16, mask=0.4, shuffle=False).epoch(0))
    assert torch.equal(ids, again["inputs"]["input_ids"])


def test_one_pass_gives_scores_and_states(network: Network) -> None:
    reranker = build(network, "cross-encoder", 40, [])
    tokens = reranker.input([["bal ban", "bal bas bat"], ["ban", "bas"]])
    with torch.no_grad():
        scores, states = scores_and_states(reranker.module, tokens)
        assert torch.equal(scores, reranker(tokens)) and torch.equal(states, hidden_states(reranker.module.encoder, tokens))
    assert not any(part._forward_hooks for part in reranker.module.modules())


# --- learning


@pytest.fixture(scope="module")
def written() -> tuple[Dataset, WordPairs]:
    return material()


def learned(kind: str, table: Dataset, pairs: WordPairs, *, loss: Any, epochs: int = 3) -> tuple[Network, Any]:
    """A cross-encoder after a short training on the pairs of all documents but the first 40, and its history."""
    torch.manual_seed(0)
    reranker = build(made(kind), "cross-encoder", 48, [])
    batches = pair_batches(reranker.input, table, pairs.of(pairs.document >= 40), batch_size=32)
    return reranker, learn(reranker, batches, loss=loss, epochs=epochs, learning_rate=1e-3)


@pytest.mark.parametrize(("kind", "loss"), [("bert", "softmax_hinge"), ("roberta", "logistic")])
def test_it_learns_which_set_is_likelier(written: tuple[Dataset, WordPairs], kind: str, loss: str) -> None:
    table, pairs = written
    reranker, _ = learned(kind, table, pairs, loss=loss)
    assert pair_accuracy(reranker, pair_batches(reranker.input, table, pairs.of(pairs.document < 40), batch_size=32, mask=0, shuffle=False)) > 0.7


def test_labels_thrown_by_a_coin_cannot_be_foreseen(written: tuple[Dataset, WordPairs]) -> None:
    """Each pair is judged before it is learned from, once: nothing but the order of likelihood tells which set is called the better one."""
    table, pairs = written
    turn = np.repeat(np.random.default_rng(1).random(len(pairs)) < 0.5, pairs.sizes)
    shuffled = replace(pairs, words=np.where(turn, pairs.words[::-1], pairs.words))
    _, history = learned("bert", table, shuffled, loss="softmax_hinge", epochs=1)
    assert abs(np.mean(history.logs["right"]) - 0.5) < 3 * 0.5 / math.sqrt((pairs.document >= 40).sum())


def test_hidden_words_alone_are_guessed_better_and_leave_the_score_to_itself(written: tuple[Dataset, WordPairs]) -> None:
    table, pairs = written
    torch.manual_seed(0)
    before = build(made(), "cross-encoder", 48, []).module.score.weight.detach()
    reranker, history = learned("bert", table, pairs, loss=None)
    torch.testing.assert_close(*(torch.nn.functional.normalize(each) for each in (before, reranker.module.score.weight.detach())), rtol=0, atol=1e-6)
    guessing = history.logs["hidden words"]
    assert np.mean(guessing[-8:]) < np.mean(guessing[:3]) - 0.2 and set(history.logs["choice"]) == {0.0}


# --- the method


LOADER = """
import sys, wellread
from wellread.rerankers import rerank
for folder in sys.argv[1:3]:
    network = wellread.load(folder)
    scores = [value.hex() for _, value in rerank(network, "bal ban", sys.argv[3:])]
    print(network.fingerprint, network.reports["prop"].figures["pairs"], scores)
"""


def test_what_comes_out(tmp_path: Path) -> None:
    table, wanted = corpus(110), []
    texts = table["text"][:3]
    for kind in FAMILIES:
        encoder = made(kind)
        before = encoder.fingerprint
        found = prop(encoder, table, **OPTIONS)
        assert encoder.fingerprint == before and isinstance(found.module, CrossEncoder) and found.output == "score"
        assert found.lineage[-1]["method"] == "prop"
        assert {name.partition(".")[0] for name in found.module.state_dict()} == {"encoder", "score", "share"}, "the head that guesses words is gone"
        report = found.reports["prop"]
        figures = report.figures
        assert figures["documents"] == 100 and figures["pairs"] + figures["ties dropped"] + figures["too long, dropped"] == 200
        assert figures["held-out pairs"] <= 20 and 0 <= figures["held-out pairs told apart"] <= 1 and figures["loss"] == "softmax_hinge"
        better, worse = (figures[f"words of {side} sets that {what}"] for side, what in (("better", "occur in the document"), ("worse", "do")))
        assert 1 >= better > worse > 0
        rows = report.tables["the first 20 of BM25 for spans of held-out documents"]
        assert [row["order by"] for row in rows] == ["BM25", "reranker before", "reranker after", "BM25 and reranker after"]
        assert rows[3]["nDCG@10"] >= max(rows[0]["nDCG@10"], rows[2]["nDCG@10"])
        assert float(found.module.share) == pytest.approx(figures["weight of the reranker"])
        found.save(tmp_path / kind)
        scores = [value.hex() for _, value in rerank(found, "bal ban", texts)]
        wanted.append(f"{found.fingerprint} {figures['pairs']} {scores}")
    command = [sys.executable, "-c", LOADER, *(str(tmp_path / kind) for kind in FAMILIES), *texts]
    told = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]).stdout
    assert told.splitlines() == wanted


def test_the_same_seed_gives_the_same_network_and_pairs(network: Network) -> None:
    one, two, other = (prop(network, corpus(), **OPTIONS, seed=seed) for seed in (1, 1, 2))
    assert one.fingerprint == two.fingerprint != other.fingerprint
    hashes = [each.reports["prop"].figures["pairs, sha256"] for each in (one, two, other)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_it_is_a_start_for_judged_queries(network: Network) -> None:
    table = corpus()
    start = prop(network, table, **{**OPTIONS, "queries": 0})
    assert "held-out pairs" not in start.reports["prop"].figures
    rows = [{"sentence1": " ".join(text.split()[:3]), "sentence2": other, "score": float(text == other), "first": 1.0}
            for text in table["text"][:12] for other in [*table["text"][:6], text]]  # fmt: skip
    further = neural_ranking(start, Dataset.from_list(rows), model="cross-encoder", epochs=1, length=48)
    assert [made_["method"] for made_ in further.lineage][-2:] == ["prop", "neural-ranking"] and further.fingerprint != start.fingerprint
    untouched = neural_ranking(start, Dataset.from_list(rows), model="cross-encoder", epochs=1, length=48, learning_rate=1e-12)
    for name, each in start.module.encoder.state_dict().items():
        torch.testing.assert_close(untouched.module.encoder.state_dict()[name], each, rtol=0, atol=1e-6)


def test_documents_without_pairs_are_named(network: Network) -> None:
    table = corpus()
    odd = Dataset.from_dict({"id": [*table["id"], "none", "bare"], "text": [*table["text"], "12 34 56", ""]})
    report = prop(network, odd, **{**OPTIONS, "queries": 0}).reports["prop"]
    assert report.figures["skipped: no word of the vocabulary"] == 2
    assert [row["id"] for row in report.tables["documents without pairs, the first thousand"]] == ["none", "bare"]


def test_what_is_not_read_is_said(network: Network) -> None:
    for length, cut in ((48, 0.0), (24, 1.0)):  # documents have 40 tokens
        report = prop(network, corpus(), **{**OPTIONS, "queries": 0, "length": length}).reports["prop"]
        assert report.figures["documents that are cut"] == cut and any("unread part" in warning for warning in report.warnings) == bool(cut)


def test_the_command_runs_on_a_saved_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = example(tmp_path)
    words = [each for name, value in given.items() for each in (f"--{name.replace('_', '-')}", str(value))]
    assert main(["run", "prop", *words, "--out", str(tmp_path / "out"), "--quiet", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["kind"] == "Network" and wellread.load(tmp_path / "out").fingerprint == record["fingerprint"]


def test_bad_input(network: Network) -> None:
    nowhere = made()
    nowhere.input.tokenizer.mask_token = None
    table = corpus()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"encoder": wellread.load("timm/test_vit", pretrained=False)}, "sentence encoder"),
        ({"encoder": nowhere}, "no mask token"),
        ({"corpus": Dataset.from_dict({"text": ["bal ban bal", "12"]})}, "fewer than two documents"),
        ({"corpus": Dataset.from_dict({"text": ["12", ""]})}, "no words of letters"),
        ({"corpus": Dataset.from_dict({"text": ["ภาษาไทย", "ภาษาไทยง่าย"]})}, "Thai"),
        ({"shortest": 100, "skip_short": 1.0}, "fewer than 100 words"),
        ({"length": 8, "words_per_set": 30.0}, "too long for length 8"),
        ({"words_per_set": 0.0}, "words_per_set is 0"),
        ({"words_per_set": -1.0}, "words_per_set"),
        ({"vocabulary": 1}, "vocabulary is 1"),
        ({"subsample": 0.0}, "subsample"),
        ({"mask": 1.0}, "mask is 1"),
        ({"pairs": 0}, "at least 1"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"length": 4}, "length is 4"),
        ({"length": 73}, "72 tokens at most"),
        ({"skip_short": 2.0}, "skip_short"),
        ({"queries": -1}, "queries"),
        ({"language": "xx"}, "not known"),
        ({"rop_loss": "triplet"}, "choose one of"),
    ]
    for arguments, complaint in cases:
        with pytest.raises(BadInput, match=complaint):
            prop(**{"encoder": network, "corpus": table, **OPTIONS, **arguments})
    assert prop(nowhere, table, **OPTIONS, mask=0.0).output == "score"


@pytest.mark.slow
def test_a_real_encoder_and_tokenizer() -> None:
    found = prop(wellread.load("minilm-l6"), corpus(30), **{**OPTIONS, "pairs": 1})
    assert "token_type_ids" in found.input([["bal", "ban"]]) and math.isfinite(found.reports["prop"].figures["hidden words, last tenth"])
