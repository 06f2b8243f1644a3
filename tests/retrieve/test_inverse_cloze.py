"""ICT, BFS and WLP: the pairs by their definitions, the loss by its closed forms, the method on two families."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

import wellread
from tests.small_encoders import small_encoder, tokenizer_of
from wellread import Network
from wellread.batches import Batches
from wellread.cli import main
from wellread.errors import BadInput
from wellread.evaluate import predict
from wellread.retrieve import inverse_cloze
from wellread.retrieve.inverse_cloze import Pages, can_ask, cloze, learn, pair_batches, sentences
from wellread.retrieve.spans import owner

WORDS = [f"word{number}" for number in range(96)]
SMALL = {"vocab_size": 101, "hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 128, "pad_token_id": 0}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {"model_type": "bert", "num_hidden_layers": 2, **SMALL},
    "distilbert": {"model_type": "distilbert", "n_layers": 2, "dim": 24, "n_heads": 2, "hidden_dim": 32, "vocab_size": 101, "max_position_embeddings": 128},
}


def made(kind: str = "bert") -> Network:
    return small_encoder(tokenizer_of(WORDS, special=2), FAMILIES[kind], normalize=False)


def corpus(pages: int = 20, passages: int = 3, seed: int = 0, links: bool = False) -> Dataset:
    """Pages of passages of four sentences; half of the words are those of the page."""
    random = np.random.default_rng(seed)
    table: dict[str, list[Any]] = {"id": [], "title": [], "text": [], "links": []}
    for page in range(pages):
        own = random.choice(WORDS[24:], 8, replace=False)
        for number in range(passages):
            said = [" ".join(random.choice(own if random.random() < 0.5 else WORDS[:24]) for _ in range(8)) + "." for _ in range(4)]
            table["id"].append(f"page{page}.md#{number + 1}")
            table["title"].append(f"Title {page} > Part {number}")
            table["text"].append(" ".join(said))
            table["links"].append([f"title {(page + 1) % pages}", "nowhere"] if number == 1 else [f"page{page}.md"])
    if not links:
        del table["links"]
    return Dataset.from_dict(table)


def example(folder: Path) -> dict[str, Any]:
    made().save(folder / "encoder")
    corpus().to_csv(folder / "texts.csv")
    return {"encoder": str(folder / "encoder"), "corpus": f"csv:{folder / 'texts.csv'}", "steps": 2, "batch_size": 4}


@pytest.fixture(scope="module")
def network() -> Network:
    return made()


# --- sentences and pairs


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("One two. Three four!  Five?", ["One two. ", "Three four!  ", "Five?"]),
        ("as in fig. 2 and by J. Smith et al. it was shown . so it is .", ["as in fig. 2 and by J. Smith et al. it was shown . ", "so it is ."]),
        ("It is 2.5 m long.\nNext line", ["It is 2.5 m long.\n", "Next line"]),
        ("(see ref. 3) He said “no.” Then he left.  ", ["(see ref. 3) He said “no.” ", "Then he left.  "]),
        ("これは文です。次の文です。", ["これは文です。", "次の文です。"]),
        ("", [""]),
        (". . .", [". . ."]),
        ("It ends here . . .", ["It ends here . . ."]),
    ],
)
def test_sentences(text: str, parts: list[str]) -> None:
    assert sentences(text) == parts and "".join(sentences(text)) == text


def test_a_query_says_something() -> None:
    assert can_ask("wings with large flaps") and not can_ask("it is so. fig of an old man")
    assert can_ask("これは文です")


def test_the_sentence_at_its_place_restores_the_passage() -> None:
    parts = sentences("One is here. Two is there. Three is nowhere.")
    for number in range(3):
        query, rest = cloze(parts, number)
        assert query == parts[number].strip() and query not in rest
        assert "".join([*parts[:number], parts[number], *parts[number + 1 :]]) == "One is here. Two is there. Three is nowhere."
        assert sentences(rest) != parts and len(sentences(rest)) == 2
        assert cloze(parts, number, keep=True) == (query, "".join(parts))


def test_pairs_are_what_their_tasks_say() -> None:
    table = corpus(6, 3, links=True)
    pages, random = Pages(table), np.random.default_rng(0)
    assert len(pages) == 6 and {task: len(found) for task, found in pages.pairs.items()} == {"ict": 18, "bfs": 6, "wlp": 6}
    page_of = [owner(name) for name in table["id"]]
    for task in ("ict", "bfs", "wlp"):
        for number in range(len(pages.pairs[task])):
            for _ in range(3):
                pair = pages.draw(task, number, random, keep_sentence=0.0)
                asking, found = table[pair.query_row], table[pair.document_row]
                assert pair.query == sentences(asking["text"])[pair.sentence].strip()
                assert (pair.query_page, pair.document_page) == (page_of[pair.query_row], page_of[pair.document_row])
                assert pair.document.startswith(found["title"] + "\n")
                if task == "ict":
                    assert pair.query_row == pair.document_row and pair.query not in pair.document
                    assert sorted([pair.query, *(each.strip() for each in sentences(pair.document.partition("\n")[2]))]) == sorted(
                        each.strip() for each in sentences(asking["text"])
                    )
                elif task == "bfs":
                    assert asking["id"].endswith("#1") and not found["id"].endswith("#1") and pair.query_page == pair.document_page
                else:
                    assert asking["id"].endswith("#1") and pair.query_page != pair.document_page
                    assert asking["title"].partition(" > ")[0].lower() in found["links"], "the passage names the page that is asked about"
    kept = [pages.draw("ict", 0, random, keep_sentence=1.0) for _ in range(4)]
    assert all(each.document == f"{table['title'][0]}\n{table['text'][0]}" for each in kept)
    drawn = [pages.draw("ict", 0, random, keep_sentence=0.1) for _ in range(600)]
    share = np.mean([each.query in each.document for each in drawn])
    assert abs(share - 0.1) < 3 * math.sqrt(0.09 / 600) and {each.sentence for each in drawn} == {0, 1, 2, 3}
    both = [pages.draw("bfs", 0, random) for _ in range(40)]
    assert {each.document_row - each.query_row for each in both} == {1, 2}, "any passage but the lead"


def test_links_in_out_and_both() -> None:
    table = corpus(6, 2, links=True)
    for direction in ("in", "out", "both"):
        pages = Pages(table, direction=direction)
        assert pages.targets == 18 and pages.unresolved == ["nowhere"] * 6, "links to oneself resolve and are no pairs"
        assert len(pages.pairs["wlp"]) == (12 if direction == "both" else 6)
    out = Pages(table, direction="out")
    pair = out.draw("wlp", 0, np.random.default_rng(0))
    asking = out.page.tolist().index(pair.query_page)
    assert table["id"][pair.document_row].startswith(f"page{(asking // 2 + 1) % 6}.")
    text = table.to_dict()
    text["links"] = [";".join(each) for each in text["links"]]
    assert np.array_equal(Pages(Dataset.from_dict(text)).pairs["wlp"], Pages(table).pairs["wlp"]), "links may be text, as a CSV has them"


def test_hubs_are_left_out() -> None:
    ids = [f"p{number}" for number in range(210)]
    links = [["p0"] if number > 4 else [f"p{number + 5}", f"p{number + 6}"] for number in range(210)]
    table = Dataset.from_dict({"id": ids, "text": ["some words that are long enough. and another sentence here."] * 210, "links": links})
    pages = Pages(table)
    assert len(pages.pairs["wlp"]) == 215, "of 7 targets none is in the highest hundredth"
    more = [each if number != 100 else [f"p{other}" for other in range(20, 140)] for number, each in enumerate(links)]
    pages = Pages(table.remove_columns("links").add_column("links", more))
    assert not any(table["id"][row] == "p0" for row in pages.pairs["wlp"][:, 0]) and len(pages.pairs["wlp"]) > 100


def test_one_sentence_is_no_cloze_and_a_title_is_taken_out() -> None:
    table = Dataset.from_dict(
        {
            "id": ["a", "b", "c"],
            "title": ["Flow past plates", "", ""],
            "text": ["Flow past plates measured here often. Another sentence follows here again. It is.", "Only one sentence stands here alone", ""],
        }
    )
    pages = Pages(table)
    assert pages.pairs["ict"].tolist() == [[0, 0]] and pages.single == 2 and len(pages.pairs["bfs"]) == 0
    for _ in range(5):
        pair = pages.draw("ict", 0, np.random.default_rng(1), 0.0)
        assert "Flow past plates" not in pair.query and pair.document.startswith("Flow past plates\n") and pair.document.count("Flow") == 1


# --- batches and the loss


def test_batches_are_of_one_task_in_turn(network: Network) -> None:
    pages = Pages(corpus(8, 3))
    batches = pair_batches(network.input, pages, ["ict", "bfs"], steps=6, batch_size=8, query_tokens=8, passage_tokens=16, seed=1)
    found, again = list(batches.epoch(0)), list(batches.epoch(0))
    for number, (one, two) in enumerate(zip(found, again, strict=True)):
        assert torch.equal(one["queries"]["input_ids"], two["queries"]["input_ids"]) and torch.equal(one["pages"], two["pages"])
        assert one["queries"]["input_ids"].shape[1] <= 8 and one["documents"]["input_ids"].shape[1] <= 16
        if number % 2:
            assert len(set(one["pages"][:, 0].tolist())) == 8, "each page once before any comes again"
    first = torch.cat([each["pages"] for each in found[::2]])[:, 0].tolist()
    assert all(first.count(page) == 3 for page in set(first)), "24 pairs of ict, each once"


def fixed(queries: torch.Tensor, documents: torch.Tensor, pages: torch.Tensor) -> Batches:
    return Batches(len(queries), lambda rows: {"queries": {"x": queries[rows]}, "documents": {"x": documents[rows]}, "pages": pages[rows]}, batch_size=len(queries))


class Same(torch.nn.Module):
    """Gives back what it gets, times one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x


@pytest.mark.parametrize(("score", "temperature"), [("dot", 1.0), ("cosine", 0.05)])
def test_the_loss(score: Any, temperature: float) -> None:
    def first(queries: torch.Tensor, documents: torch.Tensor, pages: list[list[int]]) -> float:
        network = Network(Same(), head="")
        return learn(network, fixed(queries, documents, torch.tensor(pages)), score=score, temperature=temperature)[1].loss[0]

    torch.manual_seed(0)
    queries, documents = torch.randn(4, 6), torch.randn(4, 6)
    apart = [[number, number] for number in range(4)]
    assert first(queries[:1], documents[:1], apart[:1]) == 0
    assert first(torch.ones(4, 6), torch.ones(4, 6), apart) == pytest.approx(math.log(4), rel=1e-6)
    a, b = (torch.nn.functional.normalize(each, dim=-1) if score == "cosine" else each for each in (queries, documents))
    direct = torch.nn.functional.cross_entropy(a @ b.T / temperature, torch.arange(4)).item()
    assert first(queries, documents, apart) == pytest.approx(direct, rel=1e-5)
    swapped = [2, 0, 3, 1]
    assert first(queries[swapped], documents[swapped], apart) == pytest.approx(direct, rel=1e-5)
    # a document counts against a query when it is of neither of its pages
    scores, pages, rivals = a @ b.T / temperature, [[0, 0], [1, 0], [0, 0], [0, 1]], [[0, 3], [1], [2, 3], [3]]
    terms = [scores[query, each].logsumexp(0) - scores[query, query] for query, each in enumerate(rivals)]
    assert first(queries, documents, pages) == pytest.approx(float(torch.stack(terms).mean()), rel=1e-5)


# --- the method


@pytest.mark.parametrize(("kind", "tasks", "score"), [("bert", ["ict"], "cosine"), ("distilbert", ["bfs"], "cosine"), ("bert", ["wlp", "ict"], "dot")])
def test_it_learns_to_find_passages(kind: str, tasks: list[str], score: Any) -> None:
    network, table = made(kind), corpus(40, 3, links=True)
    before = network.fingerprint
    better = inverse_cloze(
        network, table, tasks=tasks, steps=60, batch_size=16, learning_rate=1e-2, temperature=0.1 if score == "cosine" else 1.0, score=score
    )
    assert network.fingerprint == before != better.fingerprint and better.lineage[-1]["method"] == "inverse-cloze"
    sides = [Dataset.from_dict({"text": table["text"][side::3]}) for side in (0, 2)]

    def found(each: Network) -> float:
        first, second = (predict(each, side) for side in sides)
        if score == "cosine":
            first, second = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in (first, second))
        return float(((first @ second.T).argmax(1) == np.arange(40)).mean())

    assert found(better) > found(network) + 0.15
    tables = better.reports["inverse_cloze"].tables
    assert [row["task"] for row in tables["tasks"]] == tasks and sum(row["steps"] for row in tables["tasks"]) == 60
    assert len(tables["some of the pairs"]) == 3 * len(tasks)
    assert tables["finding held-out documents from a span of them"][0]["search by"] == "words (BM25)"


def test_all_tasks_the_corpus_allows(network: Network) -> None:
    settings: dict[str, Any] = {"steps": 3, "batch_size": 4, "queries": 0}
    for table, tasks in ((corpus(8, 2, links=True), ["ict", "bfs", "wlp"]), (corpus(8, 2), ["ict", "bfs"]), (corpus(8, 1), ["ict"])):
        assert [row["task"] for row in inverse_cloze(network, table, **settings).reports["inverse_cloze"].tables["tasks"]] == tasks


def test_the_same_seed_gives_the_same_encoder(network: Network) -> None:
    first, second, other = (inverse_cloze(network, corpus(), steps=2, batch_size=4, queries=0, seed=seed).fingerprint for seed in (1, 1, 2))
    assert first == second != other


def test_the_command_and_another_process(tmp_path: Path, same_in_another_process: Callable[..., None]) -> None:
    words = [word for name, value in example(tmp_path).items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert main(["run", "inverse-cloze", *words, "--tasks", "ict", "--out", str(tmp_path / "out"), "--quiet"]) == 0
    same_in_another_process(["word1 word2", "word3"], "inverse_cloze", "documents", 18)


# --- bad input


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": 1}, "batch_size is 1"),
        ({"batch_size": 21}, "batch_size is 21 and the corpus has 20 documents"),
        ({"keep_sentence": -0.1}, "keep_sentence is -0.1"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"query_tokens": 2}, "query_tokens is 2"),
        ({"tasks": []}, "name each once"),
        ({"tasks": ["ict", "ict"]}, "name each once"),
        ({"tasks": ["mlm"]}, "'ict', 'bfs', 'wlp'"),
        ({"tasks": ["wlp"]}, "no column 'links'"),
    ],
)
def test_settings_that_cannot_be(network: Network, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        inverse_cloze(network, corpus(), **{"queries": 0, "batch_size": 4, **settings})


def test_a_corpus_or_network_that_cannot_be_used(network: Network) -> None:
    lonely = corpus(8, 1)
    settings: dict[str, Any] = {"queries": 0, "batch_size": 4}
    with pytest.raises(BadInput, match="no document of the corpus has several passages"):
        inverse_cloze(network, lonely, tasks=["bfs"], **settings)
    with pytest.raises(BadInput, match="0 links lead .* 16 targets were looked up, the first that does not is 'nowhere'"):
        inverse_cloze(network, lonely.add_column("links", [["nowhere", f"page{row}.md"] for row in range(8)]), tasks=["wlp"], **settings)
    with pytest.raises(BadInput, match="no passage of the corpus has two sentences"):
        inverse_cloze(network, Dataset.from_dict({"text": ["one sentence only stands here"] * 5}), **settings)
    with pytest.raises(BadInput, match="the corpus has 1 documents"):
        inverse_cloze(network, corpus(1, 4), **settings)
    for wrong in (wellread.load("timm/test_vit", pretrained=False), Network(network.module, None, "head", None, "embedding", network.architecture)):
        with pytest.raises(BadInput, match="a sentence encoder is needed"):
            inverse_cloze(wrong, corpus())
