from __future__ import annotations

import csv
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

import wellread
from wellread import Network
from wellread.errors import BadInput
from wellread.families import Transformer
from wellread.inputs import TextInput
from wellread.rerankers import MODELS, best_first, build, rerank
from wellread.retrieve import neural_ranking
from wellread.retrieve.neural_ranking import (
    RATES,
    best_share,
    candidates,
    learn,
    list_batches,
    listwise,
    ordered,
    pairwise,
    pointwise,
    read,
    scored,
    take,
    value,
)

WORDS = ["wing", "flow", "heat", "shock", "wave", "plate", "jet", "body", "layer", "drag", "lift", "mach", "air", "cone", "tube", "gas", "panel", "load", "beam", "edge"]
COLUMNS = ("sentence1", "sentence2", "score", "first")


def encoder(kind: str = "bert", width: int = 32) -> Network:
    """A small transformer that has learned nothing, so that words are as good as random vectors, with a real tokenizer."""
    torch.manual_seed(0)
    tokenizer = wellread.load("minilm-l6").input.tokenizer
    config = {"model_type": kind, "vocab_size": 30522, "hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 2,
              "intermediate_size": 32, "max_position_embeddings": 64, "embedding_size": width}  # fmt: skip
    module = Transformer("AutoModel", config, normalize=True)
    architecture = {"family": "transformers", "auto": "AutoModel", "config": config, "pooling": "mean", "normalize": True}
    return Network(module, TextInput(tokenizer, 64), "head", None, "embedding", architecture)


def rows(queries: int = 16, documents: int = 8, seed: int = 0) -> list[dict]:
    """Relevant is what holds a word of the query; the first search knows nothing."""
    random = np.random.default_rng(seed)
    table = []
    for number in range(queries):
        asked = random.choice(WORDS, 2, replace=False)
        others = [word for word in WORDS if word not in asked]
        for place in range(documents):
            text = list(random.choice(others, 6))
            if place % 4 == seed % 4:
                text[int(random.integers(6))] = str(asked[int(random.integers(2))])
            values = (f"{' '.join(asked)} number {number + 100 * seed}", " ".join(text), float(place % 4 == seed % 4), float(random.random()))
            table.append(dict(zip(COLUMNS, values, strict=True)))
    return table


def table(**options: int) -> Dataset:
    return Dataset.from_list(rows(**options))


def example(folder: Path) -> dict:
    encoder().save(folder / "encoder")
    given = {"encoder": str(folder / "encoder")}
    for name, seed in (("train", 0), ("held_out", 1)):
        with open(folder / f"{name}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows(8, 4, seed))
        given[name] = f"csv:{folder / f'{name}.csv'}"
    return {**given, "epochs": 1, "batch_size": 8, "length": 32}


def unit_words(network: Network) -> torch.Tensor:
    return torch.nn.functional.normalize(network.module.model.embeddings.word_embeddings.weight.detach(), dim=1)


@pytest.fixture(scope="module")
def small() -> Network:
    return encoder()


# --- losses


def test_losses_in_closed_form():
    scores, grades = torch.tensor([[2.0, 1.5, -1.0], [0.0, 3.0, 3.0]]), torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    assert float(pairwise(scores, grades)) == pytest.approx((0.5 + 0 + 0 + 0) / 4)
    assert float(pairwise(-scores, grades)) == pytest.approx((1.5 + 4 + 4 + 4) / 4)
    assert float(pairwise(scores, torch.ones(2, 3))) == 0
    by_hand = [math.log1p(math.exp(-s if g else s)) for s, g in zip(scores.flatten().tolist(), grades.flatten().tolist(), strict=True)]
    assert float(pointwise(scores, grades)) == pytest.approx(np.mean(by_hand))
    first = math.log(math.exp(2) + math.exp(1.5) + math.exp(-1)) - 2
    second = math.log(1 + 2 * math.exp(3)) - 3
    assert float(listwise(scores, grades)) == pytest.approx((first + second) / 2, rel=1e-5)
    assert float(listwise(torch.zeros(1, 4), torch.tensor([[0.0, 2.0, 1.0, 0.0]]))) == pytest.approx(math.log(4))


# --- candidates


def test_candidates_are_what_the_first_search_found():
    corpus = Dataset.from_list([{"id": str(i), "title": "" if i else "T", "text": f"text {i}"} for i in range(5)])
    queries = Dataset.from_list([{"id": "q", "text": "one"}, {"id": "r", "text": "two"}])
    run = {"q": {"0": 1.0, "3": 3.0, "4": 2.0}, "r": {"2": 0.5}}
    found = candidates(queries, corpus, run, {"q": {"0": 2, "1": 1}, "r": {"2": 1}}, depth=2)
    assert list(found["document"]) == ["3", "4", "2"] and list(found["score"]) == [0, 0, 1] and list(found["first"]) == [3, 2, 0.5]
    assert list(found["sentence1"]) == ["one", "one", "two"] and found["sentence2"][0] == "text 3"
    assert candidates(queries, corpus, run, {}, depth=3)["sentence2"][2] == "T\ntext 0"
    with pytest.raises(BadInput, match="not in the corpus"):
        candidates(queries, corpus, {"q": {"9": 1.0}}, {})


def test_batches_hold_a_relevant_candidate_and_worse_ones_of_its_query(small):
    data = Dataset.from_list([dict(zip(COLUMNS, (q, f"wing {n}", g, 1.0), strict=True)) for n, (q, g) in enumerate(
        [("flow", 2), ("flow", 0), ("flow", 1), ("flow", 0), ("heat", 1), ("heat", 1), ("drag", 0), ("drag", 2), ("jet", 0)])])  # fmt: skip
    lists = read(data, small.input)
    assert [lists.queries[i] for i in lists.usable] == ["drag", "flow"]
    batches = list_batches(lists, negatives=3, batch_size=8, seed=1)
    assert batches.rows == 3
    batch = next(batches.epoch(0))
    grades = batch["grades"]
    assert grades.shape == (3, 4) and batch["inputs"]["input_ids"].shape[0] == 12
    assert sorted(grades[:, 0].tolist()) == [0.5, 1, 1] and (grades[:, :1] > grades[:, 1:]).all()
    again = next(list_batches(lists, negatives=3, batch_size=8, seed=1).epoch(0))
    assert torch.equal(batch["inputs"]["input_ids"], again["inputs"]["input_ids"])


def test_scores_come_back_to_their_rows(small):
    network = build(small, "conv-knrm", 32, ["wing flow"])
    data = table(queries=3, documents=4)
    lists = read(data, network.input)
    with torch.no_grad():
        wanted = torch.cat([network(network.input([pair])) for pair in zip(data["sentence1"], data["sentence2"], strict=True)])
    assert np.allclose(scored(network, lists, batch_size=5), wanted.numpy(), atol=1e-6)
    assert take(lists.tokens, [0])["input_ids"].shape[1] == int(lists.tokens["attention_mask"][0].sum())


def test_orders_and_shares(small):
    lists = read(table(queries=4, documents=8), small.input)
    right, wrong = lists.grades.copy(), -lists.grades
    run, judgements = ordered(lists, right, 0.0)
    for number, chosen in enumerate(lists.lists):
        assert [int(each) for each in run[str(number)]] == chosen[best_first(lists.first[chosen])].tolist()
        assert judgements[str(number)] == {str(row): int(lists.grades[row]) for row in chosen}
    assert best_share(lists, wrong)[0] == 0.0  # a reranker that is always wrong gets no say
    share, found = best_share(lists, right)
    assert share > 0 and found[1.0] == 1.0 and found[share] == max(found.values()) and len(found) == 11


# --- learning


@pytest.mark.parametrize("model", ["knrm", "drmm"])
def test_it_learns_that_shared_words_matter(small, model):
    options = {"model": model, "epochs": 120, "patience": None, "learning_rate": 0.03, "length": 32}
    found = neural_ranking(small, table(queries=24), table(queries=8, seed=1), **options)
    figures = found.reports["neural-ranking"].figures
    assert figures["nDCG@10 of the reranker alone"] > 0.99 and figures["nDCG@10 of the first search"] < 0.8
    assert figures["weight of the reranker"] > 0.3 and float(found.module.share) == pytest.approx(figures["weight of the reranker"])
    texts = ["gas tube cone", "air jet", "a wing in the flow", "cone"]
    assert rerank(found, "wing flow", texts)[0][0] == 2
    assert torch.equal(found.module.words.weight, unit_words(small))


@pytest.mark.parametrize("start", [0, 1, 2])
@pytest.mark.parametrize("model", MODELS)
def test_from_every_start_every_model_leaves_random_order(small, model, start):
    """What is planted can be seen with and without the query, so that models that encode apart have a chance; the test queries are others."""
    data = []
    for seed, queries in ((0, 24), (1, 8)):
        found = [each | {"sentence2": each["sentence2"].replace("edge", "gas") + (" edge" if each["score"] else " beam")} for each in rows(queries, 8, seed)]
        data.append(Dataset.from_list(found))
    torch.manual_seed(start)
    network = build(small, model, 32, ["wing"])
    train, judged = (read(each, network.input) for each in data)
    learn(network, train, judged, learning_rate=RATES.get(model, 1e-3), seed=start)
    random = np.mean([value(judged, np.random.default_rng(seed).random(len(judged.grades)), 1.0, "nDCG@10") for seed in range(20)])
    assert value(judged, scored(network, judged), 1.0, "nDCG@10") > random + 0.1


def test_it_does_not_learn_from_shuffled_grades(small):
    data, random = rows(queries=24), np.random.default_rng(0)
    for start in range(0, len(data), 8):
        for row, grade in zip(data[start : start + 8], random.permutation([each["score"] for each in data[start : start + 8]]), strict=True):
            row["score"] = float(grade)
    found = neural_ranking(small, Dataset.from_list(data), table(queries=8, seed=1), epochs=6, learning_rate=0.03, length=32, patience=None)
    network = build(small, "knrm", 32, ["wing"])
    train, judged = (read(each, network.input) for each in (Dataset.from_list(data), table(queries=8, seed=1)))
    history = learn(network, train, judged, epochs=6, learning_rate=0.03)
    assert found.output == "score" and history.loss[-1] > 0.6  # a hinge of 1 is what knowing nothing costs


@pytest.mark.parametrize("loss", ["pairwise", "pointwise", "listwise"])
def test_every_loss_trains_every_model(small, loss):
    models = {"pairwise": ("conv-knrm", "arc-i"), "pointwise": ("match-pyramid",), "listwise": ("dssm",)}[loss]
    for model in models:
        found = neural_ranking(small, table(), model=model, loss=loss, epochs=1, length=32)
        report = found.reports["neural-ranking"]
        assert len(report.tables["queries"]) == 4 and len(report.tables["weights"]) == 11  # a fifth of 16, rounded up
        assert {row["run"] for row in report.tables["comparisons"]} == {"first search", "reranker alone", "both"}


@pytest.mark.parametrize("kind", ["bert", "electra"])
def test_a_cross_encoder_is_trained_as_a_whole(kind):
    start = encoder(kind)
    before = {name: each.clone() for name, each in start.module.state_dict().items()}
    found = neural_ranking(start, table(queries=10), model="cross-encoder", epochs=1, length=32)
    assert found.structure["architecture"]["arguments"]["encoder"]["architecture"]["normalize"] is False
    moved = [name for name, each in found.module.encoder.named_parameters() if not torch.equal(each, before[name])]
    assert any("layer.0" in name for name in moved)
    assert all(torch.equal(each, before[name]) for name, each in start.module.state_dict().items())
    further = neural_ranking(found, table(queries=10), model="cross-encoder", epochs=1, length=32, learning_rate=1e-9)
    for name, each in further.module.state_dict().items():
        torch.testing.assert_close(each, found.module.state_dict()[name], atol=1e-5, rtol=0)
    with pytest.raises(BadInput, match="model=cross-encoder"):
        neural_ranking(found, table(queries=10), epochs=1, length=32)


def test_words_move_only_when_asked(small):
    assert torch.equal(neural_ranking(small, table(), epochs=1, length=32).module.words.weight, unit_words(small))
    moved = neural_ranking(small, table(), epochs=1, length=32, train_words=True).module.words.weight
    assert not torch.equal(moved, unit_words(small)) and torch.allclose(moved[1:].norm(dim=1), torch.ones(len(moved) - 1)) and not moved.requires_grad


LOADER = """
import sys, wellread
from wellread.rerankers import rerank
for folder in sys.argv[1:3]:
    network = wellread.load(folder)
    print(network.fingerprint, network.reports["neural-ranking"].figures["epochs"], [(p, s.hex()) for p, s in rerank(network, "wing flow", sys.argv[3:], [3, 2, 1])])
"""


def test_saved_and_loaded_elsewhere_they_score_the_same(small, tmp_path):
    texts, wanted = ["gas tube cone", "air jet", "a wing in the flow"], []
    for model in ("conv-knrm", "cross-encoder"):
        found = neural_ranking(small, table(queries=10), model=model, epochs=1, length=32)
        found.save(tmp_path / model)
        wanted.append(f"{found.fingerprint} 1 {[(place, score.hex()) for place, score in rerank(found, 'wing flow', texts, [3, 2, 1])]}")
    command = [sys.executable, "-c", LOADER, str(tmp_path / "conv-knrm"), str(tmp_path / "cross-encoder"), *texts]
    told = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]).stdout
    assert told.splitlines() == wanted


def test_the_same_seed_gives_the_same_network(small):
    one, two, other = (neural_ranking(small, table(), epochs=1, length=32, seed=seed).fingerprint for seed in (1, 1, 2))
    assert one == two != other


def test_without_a_first_search_the_reranker_decides(small):
    report = neural_ranking(small, table().remove_columns("first"), epochs=1, length=32).reports["neural-ranking"]
    assert report.figures["weight of the reranker"] == 1.0 and any("no column 'first'" in warning for warning in report.warnings)


def test_what_cannot_be_learned_from_is_counted(small):
    data = rows(queries=12) + [dict(zip(COLUMNS, ("gas", text, 1.0, 1.0), strict=True)) for text in ("wing", "flow")]
    report = neural_ranking(small, Dataset.from_list(data), epochs=1, length=8).reports["neural-ranking"]
    assert any("1 of 13 queries" in warning for warning in report.warnings) and any("longer than 8 tokens" in warning for warning in report.warnings)


# --- what is refused


class Letters(torch.nn.Module):
    """A sentence encoder without a table of word vectors."""

    def forward(self, input_ids: torch.Tensor, **_: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(input_ids % 8, 8).float().mean(1)


def test_bad_input(small):
    good, letters = table(), Network(Letters(), small.input, output="embedding")

    def changed(column: str, value: object, row: int = 3) -> Dataset:
        return Dataset.from_list([{**each, column: value} if number == row else each for number, each in enumerate(rows())])

    cases = [
        ({"encoder": wellread.load("timm/test_vit", pretrained=False)}, "sentence encoder"),
        ({"encoder": letters}, "no table of word vectors"),
        ({"train": good.select([])}, "no rows|empty"),
        ({"train": changed("score", 0.5)}, "whole number"),
        ({"train": changed("score", -1.0)}, "whole number"),
        ({"train": changed("score", math.nan)}, "row 3"),
        ({"train": changed("first", math.inf)}, "first score in row 3"),
        ({"train": changed("sentence1", " ")}, "1 queries without a word"),
        ({"train": changed("sentence2", None)}, "without text"),
        ({"train": good.remove_columns("score")}, "score"),
        ({"train": table(queries=1)}, "at least 2"),
        ({"held_out": table(queries=1, seed=1)}, "held_out has 1 queries"),
        ({"held_out": Dataset.from_list(rows()[:8] + rows(queries=20, seed=1))}, "share 1 queries"),
        ({"negatives": 0}, "at least 1"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"length": 4}, "length"),
        ({"length": 65, "model": "cross-encoder"}, "64 tokens"),
        ({"train_words": True, "model": "drmm"}, "drmm"),
        ({"loss": "triplet"}, "choose one of"),
    ]
    for arguments, complaint in cases:
        with pytest.raises(BadInput, match=complaint):
            neural_ranking(**{"encoder": small, "train": good, "length": 32, **arguments})
