"""Contriever: crops and chunks by their closed forms, the contrast against pretense and its limits, the method on two families."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy.stats import chisquare
from torch import Tensor, nn

import wellread
from tests.small_encoders import small_encoder, tokenizer_of
from wellread import Network, TextInput
from wellread.cli import main
from wellread.contrastive import in_batch
from wellread.errors import BadInput
from wellread.evaluate import predict
from wellread.retrieve import contriever
from wellread.retrieve.contriever import Chunks, Contrast, Frame, chunks, crop, learn, thinned, view_batches
from wellread.retrieve.spans import held_out, judged, owner

WORDS = [f"w{number}" for number in range(96)]
SMALL = {"vocab_size": 101, "hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64, "pad_token_id": 0}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {"model_type": "bert", "num_hidden_layers": 2, **SMALL},
    "distilbert": {"model_type": "distilbert", "n_layers": 2, "dim": 24, "n_heads": 2, "hidden_dim": 32, "vocab_size": 101, "max_position_embeddings": 64},
}


def made(kind: str = "bert", normalize: bool = True) -> Network:
    return small_encoder(tokenizer_of(WORDS), FAMILIES[kind], normalize=normalize)


def corpus(rows: int = 40, length: int = 40, seed: int = 0) -> Dataset:
    """Documents of eight words of their own, half of the text, among words that all share."""
    random = np.random.default_rng(seed)
    own = [random.choice(WORDS[24:], 8, replace=False) for _ in range(rows)]
    texts = [" ".join(random.choice(each if random.random() < 0.5 else WORDS[:24]) for _ in range(length)) for each in own]
    return Dataset.from_dict({"id": [f"{row}" for row in range(rows)], "text": texts})


def example(folder: Path) -> dict[str, Any]:
    made().save(folder / "encoder")
    corpus().to_csv(folder / "texts.csv")
    return {"encoder": str(folder / "encoder"), "corpus": f"csv:{folder / 'texts.csv'}", "steps": 2, "batch_size": 4}


@pytest.fixture(scope="module")
def network() -> Network:
    return made()


# --- views


def test_crops_have_the_stated_lengths_and_uniform_starts() -> None:
    torch.manual_seed(0)
    tokens = torch.arange(100)
    found = [crop(tokens, 0.05, 0.5) for _ in range(3000)]
    lengths = np.array([len(each) for each in found])
    assert lengths.min() == 5 and lengths.max() == 49, "int(100 * share) with a share below 0.5"
    assert chisquare(np.bincount(lengths, minlength=50)[5:50]).pvalue > 1e-3
    assert all(torch.equal(each, tokens[int(each[0]) : int(each[0]) + len(each)]) for each in found)
    starts = np.array([int(crop(tokens, 0.4, 0.4)[0]) for _ in range(3000)])
    assert chisquare(np.bincount(starts, minlength=61)).pvalue > 1e-3 and starts.max() == 60
    assert len(crop(tokens[:10], 0.05, 0.05)) == 2 and len(crop(tokens[:1], 0.05, 0.05)) == 1 and len(crop(tokens, 1, 1)) == 100


def test_tokens_are_deleted_one_by_one() -> None:
    torch.manual_seed(0)
    kept = np.array([len(thinned(torch.arange(50), 0.1)) for _ in range(400)])
    assert abs(1 - kept.mean() / 50 - 0.1) < 3 * math.sqrt(0.09 / (50 * 400))
    assert kept.std() == pytest.approx(math.sqrt(50 * 0.09), rel=0.15), "each by itself: the number left is binomial"
    assert torch.equal(thinned(torch.arange(5), 0.0), torch.arange(5)) and len(thinned(torch.arange(3), 0.9999)) >= 1
    assert bool((thinned(torch.arange(50), 0.3).diff() > 0).all()), "the order stays"


def test_special_tokens_frame_a_view_after_deletion(network: Network) -> None:
    frame = Frame.of(network.input)
    assert (frame.before, frame.after, frame.padding, frame.longest) == ([2], [3], 0, 64)
    batch = frame.batch([torch.tensor([7, 8, 9]), torch.tensor([5])])
    assert batch["input_ids"].tolist() == [[2, 7, 8, 9, 3], [2, 5, 3, 0, 0]] and batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    assert frame.batch([torch.arange(200) % 90 + 4])["input_ids"].shape == (1, 64)
    words = network.input(["w1 w2 w3", "w4"])
    ours = frame.batch([torch.tensor([5, 6, 7]), torch.tensor([8])])
    assert torch.equal(words["input_ids"], ours["input_ids"]) and torch.equal(words["attention_mask"], ours["attention_mask"])


def test_padding_and_company_do_not_change_an_embedding(network: Network) -> None:
    frame, row = Frame.of(network.input), torch.tensor([7, 8, 9])
    with torch.no_grad():
        alone = network(frame.batch([row]))
        together = network(frame.batch([torch.arange(4, 40), row]))
    torch.testing.assert_close(together[1:], alone, rtol=0, atol=1e-5)


# --- chunks


def test_chunks_hold_the_documents(network: Network) -> None:
    texts = [" ".join(WORDS[:n]) for n in (30, 70, 5, 20, 0)]
    table = Dataset.from_dict({"id": ["a.md#1", "a.md#2", "b.md#1", "c", "d"], "text": texts, "title": ["w0 w1", "", None, "w90 w91", ""]})
    found = chunks(table, network.input.tokenizer, length=32, shortest=10, seed=3)
    pieces = [found[row].tolist() for row in range(len(found))]
    assert pieces[0] == list(range(4, 34)), "its title is how it begins already"
    assert pieces[-1] == [94, 95, *range(4, 24)], "title, then text"
    assert found.skipped == 2 and found.unknown == 0
    assert found.owner.tolist() == [owner("a.md")] * (len(found) - 1) + [owner("c")]
    middle = pieces[1:-1]
    assert list(itertools.chain(*middle)) in [list(range(4, 74))[a:b] for a in range(10) for b in range(60, 71)] and all(10 <= len(each) <= 32 for each in middle)
    borders = {tuple(chunks(table, network.input.tokenizer, length=32, shortest=10, seed=seed).start.tolist()) for seed in range(8)}
    assert len(borders) > 3, "the borders are shifted at random"
    strange = chunks(Dataset.from_dict({"id": ["1"], "text": ["w1 ? ! w2"]}), network.input.tokenizer, shortest=2)
    assert strange.unknown == 0.5


def test_batches_are_views_of_every_chunk_once_a_turn(network: Network) -> None:
    parts = chunks(corpus(12), network.input.tokenizer)
    batches = view_batches(network.input, parts, steps=6, batch_size=4, seed=1)
    first, again = list(batches.epoch(0)), list(batches.epoch(0))
    assert len(first) == 6
    owners = torch.cat([batch["owner"] for batch in first]).tolist()
    assert sorted(owners[:12]) == sorted(owners[12:]) == sorted(parts.owner) and owners[:12] != owners[12:]
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one["queries"]["input_ids"], two["queries"]["input_ids"]) and torch.equal(one["keys"]["input_ids"], two["keys"]["input_ids"])
        assert one["queries"]["input_ids"].tolist() != one["keys"]["input_ids"].tolist()
        for side in ("queries", "keys"):
            for ids, whose in zip(one[side]["input_ids"], one["owner"], strict=True):
                assert set(ids.tolist()) - {0, 2, 3} <= set(parts[parts.owner.tolist().index(whose)].tolist())
    assert [b["owner"].tolist() for b in view_batches(network.input, parts, steps=6, batch_size=4, seed=2).epoch(0)] != [b["owner"].tolist() for b in first]


def test_groups_are_drawn_evenly_or_as_they_are(network: Network) -> None:
    table = corpus(40, 24).add_column("group", ["large"] * 36 + ["small"] * 4)
    parts = chunks(table, network.input.tokenizer)
    small = set(parts.owner[parts.group == 1].tolist())
    assert len(small) == 4
    for power, share in ((0.0, 0.5), (1.0, 0.1)):
        batches = view_batches(network.input, parts, steps=10, batch_size=80, group_power=power, longest_crop=0.1)
        drawn = [each in small for batch in batches.epoch(0) for each in batch["owner"].tolist()]
        assert abs(np.mean(drawn) - share) < 3 * math.sqrt(share * (1 - share) / len(drawn))
        assert min(map(sum, np.array_split(np.array(drawn), 10))) > 0, "every batch mixes them"


# --- the contrast


class Table(nn.Module):
    """An encoder that looks its vectors up: {"input_ids": [B, 1]} to [B, 5]."""

    def __init__(self, rows: int = 40) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, 5, generator=torch.Generator().manual_seed(0)))

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.weight[input_ids[:, 0]]


def ids(*numbers: int) -> dict[str, Tensor]:
    return {"input_ids": torch.tensor(numbers)[:, None]}


def test_the_loss_is_that_of_pretense() -> None:
    pretense = pytest.importorskip("pretense")
    from transformers import BertConfig, BertForMaskedLM

    network = made(normalize=False)
    model = BertForMaskedLM(BertConfig(**{key: value for key, value in FAMILIES["bert"].items() if key != "model_type"}))
    model.bert.load_state_dict(network.module.model.state_dict(), strict=False)
    theirs = pretense.create_pretraining_model(pretense.MethodConfig(name="contriever", queue_size=6, momentum=0.9, contrastive_temperature=0.5), model).eval()
    contrast = Contrast(network.module, 24, queue=6, momentum=0.9, temperature=0.5, score="dot").eval()
    torch.manual_seed(1)
    queue = torch.randn(6, 24)
    contrast.queue.put(queue, torch.arange(100, 106))
    theirs.queue.copy_(queue.T)
    frame = Frame.of(network.input)
    queries, keys = frame.batch([torch.tensor([7, 8, 9]), torch.tensor([20])]), frame.batch([torch.tensor([8, 9]), torch.tensor([20, 21, 22, 23])])
    normal = theirs.method_config.normalize_embeddings
    assert not normal
    with torch.no_grad():
        ours = contrast(queries, keys, torch.tensor([0, 1]))
        found = theirs(queries["input_ids"], queries["attention_mask"], keys["input_ids"], keys["attention_mask"])
    torch.testing.assert_close(ours, found.loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("score", ["cosine", "dot"])
def test_a_queue_of_the_batch_is_the_loss_in_the_batch(score: Any) -> None:
    encoder, owners = Table(), torch.tensor([1, 2, 3])
    contrast = Contrast(encoder, 5, queue=3, temperature=0.7, score=score).eval()
    contrast.queue.put(encoder(**ids(10, 11, 12)), owners)  # the keys of this batch; each is masked for its own query, where it is the positive
    found = contrast(ids(0, 1, 2), ids(10, 11, 12), owners)
    plain = Contrast(encoder, 5, queue=0, temperature=0.7, score=score).eval()(ids(0, 1, 2), ids(10, 11, 12), owners)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-6)
    torch.testing.assert_close(plain, in_batch(encoder(**ids(0, 1, 2)), encoder(**ids(10, 11, 12)), temperature=0.7, cosine=score == "cosine"), rtol=0, atol=1e-6)


def test_equal_scores_cost_the_logarithm() -> None:
    encoder = Table()
    nn.init.ones_(encoder.weight)
    contrast = Contrast(encoder, 5, queue=9).eval()
    contrast.queue.put(torch.ones(9, 5), torch.arange(9))
    assert contrast(ids(0), ids(1), torch.tensor([50])).item() == pytest.approx(math.log(1 + 9), rel=1e-6)
    assert contrast(ids(0), ids(1), torch.tensor([4])).item() == pytest.approx(math.log(1 + 8), rel=1e-6), "a key of the same document is no negative"


def test_the_batch_leaves_out_what_is_of_the_same_document() -> None:
    encoder = Table()
    contrast = Contrast(encoder, 5, queue=0).eval()
    assert contrast(ids(0, 1), ids(2, 3), torch.tensor([7, 7])).item() == 0
    assert contrast(ids(0, 1), ids(2, 3), torch.tensor([7, 8])).item() > 0


def test_keys_of_the_batch_enter_the_queue_after_the_loss() -> None:
    encoder = Table()
    contrast = Contrast(encoder, 5, queue=5, momentum=1.0)
    first = contrast(ids(0, 1), ids(2, 3), torch.tensor([1, 2]))
    assert first.item() == 0 and first.requires_grad, "nothing to tell apart from yet"
    for start in range(4, 16, 2):
        contrast(ids(0, 1), ids(start, start + 1), torch.tensor([start, start + 1]))
    held, owners = contrast.queue.held()
    assert sorted(owners.tolist()) == [11, 12, 13, 14, 15], "the last five, also across the end of the ring"
    torch.testing.assert_close(held[owners.argsort()], encoder.weight.detach()[11:16])


@pytest.mark.parametrize("momentum", [0.0, 0.5, 1.0])
def test_the_slow_copy(momentum: float) -> None:
    encoder = Table()
    start = encoder.weight.detach().clone()
    contrast = Contrast(encoder, 5, queue=4, momentum=momentum)
    expected = start.clone()
    for number in range(3):
        with torch.no_grad():
            encoder.weight += number + 1
        contrast(ids(0, 1), ids(2, 3), torch.tensor([1, 2]))
        expected = momentum * expected + (1 - momentum) * encoder.weight.detach()
        slow = next(contrast.slow.parameters())
        torch.testing.assert_close(slow.detach(), expected)
        assert not slow.requires_grad
    if momentum in (0, 1):
        assert torch.equal(slow, start if momentum else encoder.weight)


def test_gradients_reach_queries_only_or_both_views() -> None:
    for queue, rows in ((8, {0, 1}), (0, {0, 1, 2, 3})):
        encoder = Table()
        contrast = Contrast(encoder, 5, queue=queue, temperature=5.0)
        for _ in range(2):
            loss = contrast(ids(0, 1), ids(2, 3), torch.tensor([1, 2]) if queue == 0 else torch.randint(9999, (2,)))
        loss.backward()
        assert set(encoder.weight.grad.abs().sum(1).nonzero()[:, 0].tolist()) == rows


def test_large_batches_in_parts_are_the_same_batch(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = chunks(corpus(12), network.input.tokenizer)
    batch = next(view_batches(network.input, parts, steps=1, batch_size=8).epoch(0))
    gradients = []
    for at_once in (64, 3):
        monkeypatch.setattr("wellread.contrastive.AT_ONCE", at_once)
        copy = network.copy()
        loss = Contrast(copy.module, 24, queue=0).eval()(batch["queries"], batch["keys"], batch["owner"])
        loss.backward()
        gradients.append([p.grad for p in copy.module.parameters() if p.grad is not None])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-6)


# --- the method


@pytest.mark.parametrize(("kind", "queue", "score"), [("bert", 64, "cosine"), ("distilbert", 0, "cosine"), ("bert", 0, "dot")])
def test_it_learns_to_find_documents(kind: str, queue: int, score: Any) -> None:
    network, table = made(kind, normalize=False), corpus(60)
    before = network.fingerprint
    better = contriever(network, table, steps=100, batch_size=16, queue=queue, momentum=0.9, learning_rate=1e-2, temperature=0.1 if score == "cosine" else 1.0, score=score)
    assert network.fingerprint == before != better.fingerprint and better.lineage[-1]["method"] == "contriever"
    halves = [Dataset.from_dict({"text": [" ".join(text.split()[side * 20 : side * 20 + 20]) for text in table["text"]]}) for side in (0, 1)]

    def scores(each: Network, queries: Dataset, texts: Dataset) -> np.ndarray:
        first, second = predict(each, queries), predict(each, texts)
        if score == "cosine":
            first, second = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in (first, second))
        return first @ second.T

    def found(each: Network) -> float:
        return float((scores(each, *halves).argmax(1) == np.arange(60)).mean())

    assert found(better) > found(network) + 0.15
    report = better.reports["contriever"]
    assert (report.figures["score"], report.figures["chunks"]) == (score, 54)
    assert report.figures["negatives of a query, at most"] == (54 if queue else 15)
    assert f"trained for the {score} score" in report.text and "6 spans looked for among 60 texts" in report.text
    (rows,) = report.tables.values()
    assert [row["search by"] for row in rows] == ["words (BM25)", "encoder before", "encoder after", "words and encoder after, fused"]
    _, queries, texts = held_out(table)
    assert judged(network, better, queries, texts, score=score) == rows
    found_scores = scores(better, queries, texts)
    places = (found_scores >= found_scores[np.arange(6), np.arange(6), None]).sum(1)
    assert rows[2]["R@10"] == pytest.approx(np.mean(places <= 10))
    assert rows[2]["nDCG@10"] == pytest.approx(np.mean(np.where(places <= 10, 1 / np.log2(1 + places), 0)))


def test_pairs_of_different_documents_teach_nothing() -> None:
    network, table = made(), corpus(60)
    parts = chunks(table, network.input.tokenizer)
    batches = view_batches(network.input, parts, steps=60, batch_size=16)
    right = batches.get

    def wrong(rows: np.ndarray) -> dict[str, Any]:
        batch = right(rows)
        return batch | {"keys": {name: each.roll(1, 0) for name, each in batch["keys"].items()}}

    settings: dict[str, Any] = {"queue": 0, "momentum": 0.9, "temperature": 0.1, "score": "cosine", "learning_rate": 1e-2, "seed": 0}
    good = learn(network, batches, **settings)[1].loss
    batches.get = wrong
    placebo = learn(network, batches, **settings)[1].loss
    assert np.mean(good[-10:]) + 0.5 < np.mean(placebo[-10:])


def test_the_same_seed_gives_the_same_encoder(network: Network) -> None:
    first, second, other = (contriever(network, corpus(), steps=2, batch_size=4, queries=0, seed=seed).fingerprint for seed in (1, 1, 2))
    assert first == second != other


def test_the_command_and_another_process(tmp_path: Path, same_in_another_process: Callable[..., None]) -> None:
    words = [word for name, value in example(tmp_path).items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert main(["run", "contriever", *words, "--out", str(tmp_path / "out"), "--quiet"]) == 0
    same_in_another_process(["w1 w2", "w3"], "contriever", "chunks", 36)


def test_a_loss_that_is_not_finite_stops_the_run(network: Network) -> None:
    with pytest.raises(wellread.errors.Diverged, match="the .*weights.* were kept"):
        contriever(network, corpus(), steps=30, batch_size=4, queue=0, queries=0, learning_rate=1e30)


# --- bad input


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"queue": 8}, "queue is 8 and a batch has 64 keys"),
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": 1}, "batch_size is 1"),
        ({"momentum": 1.5}, "momentum is 1.5"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"shortest_crop": 0.7}, "shares of 1, in order"),
        ({"delete": 1.0}, "delete is 1"),
        ({"shortest": 1}, "shortest is 1"),
        ({"shortest": 300}, "shortest is 300"),
        ({"queries": -1}, "queries is -1"),
        ({"queries": 9, "language": "tlh"}, "the language 'tlh' is not known"),
        ({"shortest": 100}, "no text of 100 tokens or more .40 are shorter.: documents are told|no text of 100 tokens or more"),
    ],
)
def test_settings_that_cannot_be(network: Network, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        contriever(network, corpus(), **{"queries": 0, **settings})


def test_a_corpus_or_network_that_cannot_be_used(network: Network) -> None:
    with pytest.raises(BadInput, match="one document"):
        contriever(network, corpus(1))
    with pytest.raises(BadInput, match="one document"):
        contriever(network, Dataset.from_dict({"id": ["a#1", "a#2"], "text": corpus(2)["text"]}))
    for wrong in (wellread.load("timm/test_vit", pretrained=False), Network(network.module, None, "head", None, "embedding", network.architecture)):
        with pytest.raises(BadInput, match="a sentence encoder is needed"):
            contriever(wrong, corpus())


def test_a_mixed_or_unreadable_corpus_is_said(network: Network) -> None:
    table = corpus(30)
    mixed = table.to_dict()
    mixed["text"] = [text if row % 2 else " ".join("слово" for _ in range(30)) for row, text in enumerate(mixed["text"])]
    with pytest.warns(UserWarning) as caught:
        made_of = contriever(network, Dataset.from_dict(mixed), steps=1, batch_size=4, queries=0)
    said = [str(each.message) for each in caught]
    assert any("mixes the scripts Cyrillic, Latin" in each for each in said) and any("tokenizer does not know" in each for each in said)
    assert len(made_of.reports["contriever"].warnings) == 2


def test_views_stay_within_a_short_input() -> None:
    network = made()
    short = TextInput(network.input.tokenizer, 16)
    parts: Chunks = chunks(corpus(4), network.input.tokenizer)
    batch = next(view_batches(short, parts, steps=1, batch_size=4, shortest_crop=0.9, longest_crop=1.0, delete=0.0).epoch(0))
    assert batch["queries"]["input_ids"].shape == (4, 16) and bool((batch["queries"]["input_ids"][:, -1] == 3).all())
