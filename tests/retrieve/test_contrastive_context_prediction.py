"""Contrastive context prediction: neighbours, banks, norm and loss by their closed forms, the method on two families and by command."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F

import wellread
from tests.small_encoders import small_encoder, tokenizer_of, two_families
from wellread import Network
from wellread.calibration import uncalibrated
from wellread.cli import main
from wellread.contrastive import against_queue
from wellread.errors import BadInput, Diverged
from wellread.retrieve import contrastive_context_prediction
from wellread.retrieve.contexts import apart, contexts, found_neighbours
from wellread.retrieve.contrastive_context_prediction import ContextContrast, LanguageNorm, Projected, effective_rank, learn, pair_batches

WORDS = [f"{language}{number}" for language in "ab" for number in range(60)]
CONFIGS = two_families(124)


def made(kind: str = "bert") -> Network:
    """A small encoder with fresh weights that knows the words of two languages."""
    network = small_encoder(tokenizer_of(WORDS, model_input_names=["input_ids", "attention_mask"]), CONFIGS[kind], length=32, shaken=False)
    with torch.no_grad():
        network.module.get_submodule("model.embeddings.word_embeddings").weight[4:] = torch.randn(120, 24)  # type: ignore[union-attr]
    return network


def corpus(pages: int = 24, lines: int = 6, seed: int = 0) -> Dataset:
    """Pages of six words of their own each, in sentences of five words with an end of its own line."""
    random = np.random.default_rng(seed)
    columns: dict[str, list[str]] = {"id": [], "text": [], "group": []}
    for language in "ab":
        for page in range(pages):
            own = random.choice(60, 6, replace=False)
            said = ["\n".join(" ".join(f"{language}{word}" for word in random.choice(own, 5)) for _ in range(lines // 2)) for _ in range(2)]
            for number, text in enumerate(said):
                columns["id"].append(f"{language}{page}#{number}")
                columns["text"].append(text)
                columns["group"].append(language * 2)
    return Dataset.from_dict(columns)


def write(table: Dataset, file: Path) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in table))


def example(folder: Path) -> dict[str, Any]:
    made().save(folder / "encoder")
    write(corpus(), folder / "pages.jsonl")
    return {"encoder": str(folder / "encoder"), "corpus": f"jsonl:{folder / 'pages.jsonl'}", "steps": 2, "batch_size": 8, "queue": 32, "held_out": 20}


@pytest.fixture(scope="module")
def network() -> Network:
    return made()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- sentences and their neighbours


def small_table() -> Dataset:
    rows = [
        ("q#1", "bb", "b1 b2 b3 b4 b5."),
        ("p#1", "aa", "a1 a2 a3 a4 a5\na6 a7 a8 a9 a9\na1 a2"),
        ("p#2", "aa", "a11 a12 a13 a14 a15\nA1 a2  a3 a4 a5\na21 a22 a23 a24 a25"),
        ("p#1", "bb", "b6 b7 b8 b9 b10\na1 a2 a3 a4 a5"),
        ("q#1", "aa", "a31 a32 a33 a34 a35"),
        ("q#2", "aa", ""),
    ]
    return Dataset.from_dict({name: list(column) for name, column in zip(("id", "group", "text"), zip(*rows, strict=True), strict=True)})


def test_sentences_keep_their_places(network: Network) -> None:
    found = contexts(small_table(), network.input.tokenizer)
    said = found.texts(range(len(found)))
    assert found.languages == ["aa", "bb"] and found.language.tolist() == [0] * 5 + [1] * 3
    assert found.dropped == 2, "one of two tokens, one that its language has already; the other language may have it too"
    page = [each for each in said if each.startswith(("a1 ", "a6", "a11", "a21"))]
    assert page == ["a1 a2 a3 a4 a5", "a6 a7 a8 a9 a9", "a11 a12 a13 a14 a15", "a21 a22 a23 a24 a25", "a1 a2 a3 a4 a5"], "pages in order, then the other language"
    first = said.index("a1 a2 a3 a4 a5")
    assert found.place[first : first + 4].tolist() == [0, 1, 3, 5], "what was left out keeps its place"
    assert [said[each] for each in found.neighbours(first, 3)] == ["a6 a7 a8 a9 a9", "a11 a12 a13 a14 a15"]
    assert [said[each] for each in found.neighbours(first + 3, 2)] == ["a11 a12 a13 a14 a15"]
    assert [said[each] for each in found.neighbours(first + 3, 1)] == []
    assert [said[each] for each in found.neighbours(said.index("b6 b7 b8 b9 b10"), 4)] == ["a1 a2 a3 a4 a5"], "of the same language's page p only"
    for window in (1, 2, 4):
        assert found.centers(window).tolist() == [len(found.neighbours(each, window)) > 0 for each in range(len(found))]
    assert len(found.neighbours(said.index("a31 a32 a33 a34 a35"), 9)) == 0


def test_only_repetitions_are_dropped(network: Network) -> None:
    texts = ["b1 # b2 b3 b4", "b1 # b5 b6 b7", "b1 # b2 b3 b4", "b1 # B2  b3 b4"]
    found = contexts(Dataset.from_dict({"id": list("pqrs"), "text": texts, "group": ["bb"] * 4}), network.input.tokenizer)
    assert found.texts(range(len(found))) in (texts[:2], texts[1::-1]) and found.dropped == 2


def test_a_centre_is_no_context_of_its_own(network: Network) -> None:
    parts = contexts(corpus(), network.input.tokenizer)
    for which in range(0, len(parts), 7):
        near = parts.neighbours(which, 2)
        assert which not in near and np.abs(parts.place[near] - parts.place[which]).max() <= 2
        assert set(parts.page[near]) == {parts.page[which]}


def test_pages_are_kept_apart(network: Network) -> None:
    parts = contexts(corpus(), network.input.tokenizer)
    training, judging = apart(parts, 12)
    assert not set(zip(training.language, training.page, strict=True)) & set(zip(judging.language, judging.page, strict=True))
    assert len(training) + len(judging) == len(parts) and [int((judging.language == code).sum()) >= 12 for code in (0, 1)] == [True, True]
    assert len(np.unique(judging.page)) <= 2 * 24 // 5 and len(apart(parts, 0)[1]) == 0


def test_a_batch_is_of_one_language_and_its_sentences_are_all_seen(network: Network) -> None:
    parts = contexts(corpus(6), network.input.tokenizer)
    batches = pair_batches(network.input, parts, steps=40, batch_size=9, seed=3)
    seen: dict[int, list[str]] = {0: [], 1: []}
    decode = network.input.tokenizer.batch_decode
    for batch in batches.epoch(0):
        assert len(set(batch["language"].tolist())) == 1
        code = int(batch["language"][0])
        sides = [decode(batch[side]["input_ids"], skip_special_tokens=True) for side in ("centers", "contexts")]
        assert all(text.startswith("ab"[code]) for side in sides for text in side) and all(one != two for one, two in zip(*sides, strict=True))
        seen[code] += sides[0]
        texts = parts.texts(range(len(parts)))
        for one, two, page in zip(*sides, batch["page"].tolist(), strict=True):
            assert page == parts.page[texts.index(one)] == parts.page[texts.index(two)]
    able = parts.centers(4)
    for code, found in seen.items():
        pool = int((able & (parts.language == code)).sum())
        turns = [found[at : at + pool] for at in range(0, len(found) - pool + 1, pool)]
        assert turns and all(len(set(turn)) == pool for turn in turns), "each once before any comes again"
    again = [batch["contexts"]["input_ids"] for batch in batches.epoch(0)]
    assert all(torch.equal(one, batch["contexts"]["input_ids"]) for one, batch in zip(again, batches.epoch(0), strict=True))


def test_languages_are_drawn_by_their_size(network: Network) -> None:
    uneven = corpus(40).filter(lambda row: row["group"] == "aa" or int(row["id"][1:].partition("#")[0]) < 4)
    parts = contexts(uneven, network.input.tokenizer)
    for power, odds in ((0.0, 0.5), (1.0, None), (0.3, None)):
        sizes = np.array([float((parts.centers(4) & (parts.language == code)).sum()) for code in (0, 1)]) ** power
        expected = odds or sizes[0] / sizes.sum()
        batches = pair_batches(network.input, parts, steps=600, batch_size=1, language_power=power)
        share = np.mean([int(batches.get(np.array([step]))["language"][0]) == 0 for step in range(600)])
        assert abs(share - expected) < 4 * (expected * (1 - expected) / 600) ** 0.5


# --- norm


def test_running_statistics_do_not_look_at_the_batch() -> None:
    norm, x = LanguageNorm(5, 2), random(8, 5) * 3 + 1
    norm(random(8, 5, seed=1), 0, True)
    changed = x.clone()
    changed[3] += 10
    before, after = norm(x, 0, False), norm(changed, 0, False)
    rest = [row for row in range(8) if row != 3]
    assert torch.equal(before[rest], after[rest]) and not torch.equal(before[3], after[3])
    before, after = norm(x, 0, True), norm(changed, 0, True)
    assert bool((before[rest] != after[rest]).any(1).all())


def test_statistics_are_of_each_language_and_change_by_their_own_side_only() -> None:
    norm, x, y = LanguageNorm(4, 2, momentum=0.25), random(16, 4) + 5, random(16, 4, seed=1) - 3
    norm(x, 1, True)
    assert torch.equal(norm.mean[0], torch.zeros(4)) and torch.equal(norm.variance[0], torch.ones(4))
    torch.testing.assert_close(norm.mean[1], x.mean(0))
    torch.testing.assert_close(norm.variance[1], x.var(0))
    held = norm.mean.clone()
    norm(y, 1, False)
    assert torch.equal(norm.mean, held)
    norm(y, 1, True)
    torch.testing.assert_close(norm.mean[1], (x.mean(0) + y.mean(0)) / 2, msg="the second is half of what is known")
    for _ in range(2):
        norm(y, 1, True)
    held = norm.mean[1].clone()
    norm(x, 1, True)
    torch.testing.assert_close(norm.mean[1], 0.75 * held + 0.25 * x.mean(0))


def test_it_is_torchs_batch_norm() -> None:
    ours, theirs, x = LanguageNorm(6, 1), nn.BatchNorm1d(6), random(9, 6) * 2 - 1
    torch.testing.assert_close(ours(x, 0, True), theirs(x))
    theirs.running_mean, theirs.running_var = ours.mean[0].clone(), ours.variance[0].clone()
    torch.testing.assert_close(ours(x, 0, False), theirs.eval()(x))


# --- loss and banks


class Table(nn.Module):
    """Encodes a text as the row of its first token."""

    def __init__(self, rows: int = 64, width: int = 6) -> None:
        super().__init__()
        self.weight = nn.Parameter(random(rows, width))

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.weight[input_ids[:, 0]]


def ids(*numbers: int) -> dict[str, Tensor]:
    return {"input_ids": torch.tensor(numbers)[:, None]}


def test_the_loss_of_both_directions() -> None:
    contrast = ContextContrast(Table(), 6, 2, queue=8, temperature=0.3)
    z, s, held, pages = random(3, 6), random(3, 6, seed=1), F.normalize(random(5, 6, seed=2), dim=1), torch.tensor([1, 2, 3])
    contrast.bank(1).put(held, torch.tensor([7, 8, 2, 9, 10]))
    expected = torch.tensor(0.0)
    for one, two in ((z, s), (s, z)):
        one, two = F.normalize(one, dim=1), F.normalize(two, dim=1)
        for row in range(3):
            negatives = [held[place] @ one[row] for place in range(5) if not (place == 2 and row == 1)]
            expected += F.cross_entropy(torch.stack([one[row] @ two[row], *negatives])[None] / 0.3, torch.tensor([0])) / 3
    torch.testing.assert_close(contrast.loss(z, s, pages, 1), expected)
    assert torch.equal(contrast.loss(z, s, pages, 1), contrast.loss(s, z, pages, 1)), "symmetric"
    assert contrast.loss(z, s, pages, 0).item() == 0, "the other language's bank is empty"


def test_with_the_same_norm_on_both_sides_it_is_symmetric() -> None:
    for norm in ("alternating", "none"):
        contrast = ContextContrast(Table(), 6, 1, queue=8, norm=norm).eval()  # in evaluation both sides have running statistics
        contrast.bank(0).put(random(5, 6, seed=4), torch.arange(50, 55))
        forth, back = (contrast(*sides, torch.tensor([1, 2]), 0) for sides in ((ids(0, 1), ids(2, 3)), (ids(2, 3), ids(0, 1))))
        torch.testing.assert_close(forth, back)
        assert forth.item() > 0


def test_with_one_language_it_is_momentum_contrast() -> None:
    from wellread.retrieve.contriever import Contrast

    encoder, pages, held = Table(), torch.tensor([1, 2, 3]), random(4, 6, seed=5)
    contrast = ContextContrast(encoder, 6, 1, queue=4, temperature=0.2, norm="none").eval()
    for layer in (contrast.projected.enter, contrast.projected.leave):
        nn.init.eye_(layer.weight)
        nn.init.zeros_(layer.bias)
    with torch.no_grad():
        encoder.weight.abs_()  # what a ReLU leaves as it is
    contrast.bank(0).put(held, torch.arange(90, 94))
    theirs = [Contrast(encoder, 6, queue=4, temperature=0.2).eval() for _ in range(2)]
    for each in theirs:
        each.queue.put(held, torch.arange(90, 94))
    one, two = ids(0, 1, 2), ids(10, 11, 12)
    torch.testing.assert_close(contrast(one, two, pages, 0), theirs[0](one, two, pages) + theirs[1](two, one, pages))


def test_banks_never_mix_languages_and_forget_the_oldest() -> None:
    contrast = ContextContrast(Table(), 6, 2, queue=[5, 3])
    for step in range(6):
        language = step % 2
        pages = torch.tensor([1000 * language + 2 * step, 1000 * language + 2 * step + 1])
        contrast(ids(2 * step, 2 * step + 1), ids(30 + step, 40 + step), pages, language)
    owners = [contrast.bank(language).held()[1] for language in (0, 1)]
    assert sorted(owners[0].tolist()) == [1, 4, 5, 8, 9] and sorted(owners[1].tolist()) == [1007, 1010, 1011]
    assert torch.allclose(contrast.bank(0).held()[0].norm(dim=1), torch.ones(5))
    shared = ContextContrast(Table(), 6, 2, queue=[5, 3], shared=True)
    assert shared.bank(0) is shared.bank(1) and len(shared.bank(0).vectors) == 8


def test_sides_alternate_and_only_one_changes_the_statistics() -> None:
    contrast = ContextContrast(Table(), 6, 1, queue=8)
    made_of, norm = contrast.projected, contrast.projected.norm
    centers, near, pages = ids(0, 1, 2), ids(10, 11, 12), torch.tensor([1, 2, 3])
    for step in range(4):
        own = (centers, near)[step % 2]
        mean, seen = norm.mean[0].clone(), int(norm.seen[0])
        contrast(centers, near, pages, 0)
        pace = max(0.1, 1 / (seen + 1))
        expected = (1 - pace) * mean + pace * made_of.enter(made_of.embedded(own)).mean(0)
        torch.testing.assert_close(norm.mean[0], expected.detach())
        assert int(norm.seen[0]) == step + 1
    both = ContextContrast(Table(), 6, 1, queue=8, norm="batch")
    both(centers, near, pages, 0)
    assert int(both.projected.norm.seen[0]) == 2


def test_gradients_reach_both_sides_and_not_the_bank() -> None:
    contrast = ContextContrast(Table(), 6, 1, queue=8, temperature=1.0)
    contrast(ids(4, 5), ids(6, 7), torch.tensor([1, 2]), 0)
    loss = contrast(ids(0, 1), ids(2, 3), torch.tensor([3, 4]), 0)
    loss.backward()
    assert set(contrast.projected.encoder.weight.grad.abs().sum(1).nonzero()[:, 0].tolist()) == {0, 1, 2, 3}


def test_a_slow_copy_fills_the_bank() -> None:
    contrast = ContextContrast(Table(), 6, 1, queue=8, momentum=0.999)
    start = Projected(Table(), 6, 1)
    start.load_state_dict(contrast.projected.state_dict())
    contrast(ids(4, 5), ids(6, 7), torch.tensor([1, 2]), 0)
    with torch.no_grad():
        for parameter in contrast.projected.parameters():
            parameter += 1.0
    contrast(ids(0, 1), ids(2, 3), torch.tensor([3, 4]), 0)
    held = contrast.bank(0).held()[0][2:]
    quick = F.normalize(contrast.projected(ids(2, 3), 0), dim=1)
    slow = F.normalize(contrast.slow(ids(2, 3), 0), dim=1)
    torch.testing.assert_close(held, slow.detach())
    assert not torch.allclose(held, quick, atol=0.1) and not any(parameter.requires_grad for parameter in contrast.slow.parameters())


def test_effective_rank() -> None:
    assert effective_rank(random(40, 1) @ random(1, 9, seed=1)) == pytest.approx(1, abs=1e-3)
    square = torch.cat([torch.eye(6), -torch.eye(6)])
    assert effective_rank(square) == pytest.approx(6, rel=1e-5) == effective_rank(3 * square + 8)


def test_a_collapse_stops_the_training(network: Network) -> None:
    contrast = ContextContrast(Table(64, 40), 40, 1, queue=128)
    for vectors, wrong in ((random(128, 40), False), (random(128, 1) @ random(1, 40, seed=1), True)):
        for bank in (contrast.bank(0), contrast.recent):
            bank.put(vectors, torch.arange(128))
            bank.put(vectors, torch.arange(128))
            bank.put(vectors.repeat(4, 1), torch.arange(512))
        if wrong:
            with pytest.raises(Diverged, match="collapsed at step 0: its vectors lie in 1.0 of 40 dimensions"):
                contrast.watch()
        else:
            assert contrast.watch() > 20


# --- the method


@pytest.mark.parametrize("kind", CONFIGS)
def test_it_learns_which_sentences_are_neighbours(kind: str) -> None:
    network, table = made(kind), corpus(40)
    parts = contexts(table, network.input.tokenizer)
    training, judging = apart(parts, 60)
    before = network.fingerprint
    batches = pair_batches(network.input, training, steps=80, batch_size=16)
    settings: dict[str, Any] = {"queue": 64, "temperature": 0.1, "learning_rate": 3e-3}
    better, history = learn(network, batches, 2, **settings)
    assert network.fingerprint == before != better.fingerprint and better.structure == network.structure
    chance = 2 * np.log(1 + 64)
    assert np.mean(history.loss[-10:]) < chance - 0.7
    assert min(history.logs["effective rank"]) > 1.2 and min(found_neighbours(better, judging)) > 90
    right = batches.get

    def wrong(numbers: np.ndarray) -> dict[str, Any]:
        batch = right(numbers)
        return batch | {"contexts": {name: each.roll(1, 0) for name, each in batch["contexts"].items()}}

    batches.get = wrong  # type: ignore[method-assign]
    placebo = learn(network, batches, 2, **settings)[1].loss
    assert np.mean(placebo[-10:]) > chance - 0.2, "neighbours of other sentences cannot be told"


def test_neighbours_found_by_hand() -> None:
    network = made()
    parts = contexts(corpus(6), network.input.tokenizer)
    found = found_neighbours(network, parts)
    texts = parts.texts(range(len(parts)))
    with torch.no_grad():
        x = F.normalize(network(network.input(texts)), dim=1).numpy()
    mine = np.flatnonzero(parts.language == 1)
    hits = []
    for which in mine:
        others = [other for other in mine if other != which]
        ten = sorted(others, key=lambda other: -float(x[which] @ x[other]))[:10]
        hits.append(bool(set(ten) & set(parts.neighbours(int(which), 4))))
    assert found[1] == pytest.approx(100 * np.mean(hits))


def test_calibration_alone_trains_nothing(network: Network) -> None:
    table = corpus()
    better = contrastive_context_prediction(network, table, steps=0)
    assert uncalibrated(better).module.state_dict().keys() == network.module.state_dict().keys()
    for name, weight in network.module.state_dict().items():
        assert torch.equal(better.module.state_dict()[name], weight)
    report = better.reports["contrastive_context_prediction"]
    assert report.figures["pairs seen"] == 0 and [row["language"] for row in report.tables["languages"]] == ["aa", "bb"]
    assert "neighbour found after training, %" not in report.tables["languages"][0] and len(report.tables["calibration"]) == 2


def test_training_without_calibration_keeps_the_structure(network: Network) -> None:
    better = contrastive_context_prediction(network, corpus(), steps=3, batch_size=8, queue=32, calibration="none")
    assert better.structure == network.structure and better.fingerprint != network.fingerprint
    assert better.lineage[-1]["method"] == "contrastive-context-prediction"
    again = contrastive_context_prediction(better, corpus(), steps=2, batch_size=8, queue=32, momentum=0.9, calibration="shift")
    assert contrastive_context_prediction(again, corpus(), steps=2, batch_size=8, queue=32).edits[-1]["arguments"]["languages"] == ["aa", "bb"]


def test_the_same_seed_gives_the_same_encoder(network: Network) -> None:
    found = [contrastive_context_prediction(network, corpus(), steps=3, batch_size=8, queue=32, seed=seed).fingerprint for seed in (1, 1, 2)]
    assert found[0] == found[1] != found[2]


def test_the_command_and_another_process(tmp_path: Path, same_in_another_process: Callable[..., None]) -> None:
    words = [word for name, value in example(tmp_path).items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert main(["run", "contrastive-context-prediction", *words, "--out", str(tmp_path / "out"), "--quiet"]) == 0
    same_in_another_process(["a1 a2", "b3"], "contrastive_context_prediction", "languages", 2)


def test_a_csv_with_a_group_will_do(tmp_path: Path, network: Network) -> None:
    with (tmp_path / "pages.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "text", "group"])
        writer.writeheader()
        writer.writerows(corpus())
    better = contrastive_context_prediction(network, f"csv:{tmp_path / 'pages.csv'}", steps=0)
    assert better.edits[-1]["arguments"]["languages"] == ["aa", "bb"]


# --- bad input


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": -1}, "steps is -1"),
        ({"steps": 0, "calibration": "none"}, "nothing would be done"),
        ({"batch_size": 1}, "batch_size is 1"),
        ({"window": 0}, "window is 0"),
        ({"queue": 8}, "queue is 8 and a batch has 48"),
        ({"momentum": 1.0}, "momentum is 1"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"tokens": 4}, "tokens 4"),
        ({"sentences_to_fit": 5}, "sentences_to_fit is 5"),
        ({"shrink": -1.0}, "shrink is -1"),
        ({"held_out": -1}, "held_out is -1"),
        ({"pivot": "cc"}, "pivot is 'cc'"),
        ({"batch_size": 200}, "sentences of 5 tokens or more with another one near them, and a batch takes 200"),
    ],
)
def test_settings_that_cannot_be(network: Network, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        contrastive_context_prediction(network, corpus(), **settings)


def test_a_corpus_that_cannot_be_used(network: Network) -> None:
    table = corpus()
    one = table.filter(lambda row: row["group"] == "aa")
    single = table.map(lambda row, place: {"text": row["text"].split("\n")[0], "id": str(place)}, with_indices=True)
    strange = table.map(lambda row: {"text": row["text"].replace("b", "я")})
    hole = Dataset.from_dict({**table.to_dict(), "group": [None, *table["group"][1:]]})
    for wrong, words in (
        (table.remove_columns("group"), "no column 'group'"),
        (hole, "row 0 of the corpus has no group"),
        (one, "the one language 'aa'"),
        (single, "'aa' has 0 sentences of 5 tokens or more with another one near"),
        (strange, "does not know 100% of the tokens of 'bb'"),
    ):
        with pytest.raises(BadInput, match=words):
            contrastive_context_prediction(network, wrong, steps=2, batch_size=8, queue=32)
    with pytest.raises(BadInput, match="a sentence encoder is needed"):
        contrastive_context_prediction(wellread.load("timm/test_vit", pretrained=False), table)
    for steps in (0, 10**9):  # before any training
        with pytest.raises(BadInput, match="there are 12 different sentences of 'bb': give at least 20"):
            contrastive_context_prediction(network, table.select(range(52)), steps=steps, batch_size=4, queue=32)


def test_against_queue_carries_the_gradient_of_the_keys() -> None:
    """Both directions have one; the core's docstring speaks of keys without."""
    x, y = random(2, 6).requires_grad_(), random(2, 6, seed=1).requires_grad_()
    contrast = ContextContrast(Table(), 6, 1, queue=4)
    contrast.bank(0).put(random(3, 6, seed=2), torch.arange(3))
    against_queue(x, y, contrast.bank(0), torch.tensor([8, 9])).backward()
    assert bool((y.grad != 0).any())
