"""Pairs of word sets: sizes, draws and scores by their closed forms, and what they depend on."""

from __future__ import annotations

import math

import numpy as np
import pytest
from datasets import Dataset
from scipy.stats import chisquare, poisson

import wellread
from wellread.retrieve.word_sets import WordPairs, draw, fitting, set_sizes, word_pairs
from wellread.unigram import Unigram, dirichlet, kept, unigram

WORDS = [a + b + c for a in "bdkmr" for b in "aeiou" for c in "lnst"]


def texts(rows: int = 30, length: int = 40, seed: int = 0) -> list[str]:
    """Words with Zipf's frequencies, and six words of each text's own in half of its places."""
    random = np.random.default_rng(seed)
    odds = 1 / np.arange(1, len(WORDS) + 1)
    found = []
    for _ in range(rows):
        own = random.choice(WORDS, 6, replace=False)
        found.append(" ".join(str(random.choice(own) if random.random() < 0.5 else random.choice(WORDS, p=odds / odds.sum())) for _ in range(length)))
    return found


@pytest.fixture(scope="module")
def model() -> Unigram:
    return unigram(texts(), language=None)


def pairs_of(model: Unigram, **options: object) -> WordPairs:
    return word_pairs(model, model.counts, np.full(30, 40), **{"shortest": 0, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("mean", [0.01, 0.7, 3.0, 12.0])
def test_sizes_are_poisson_numbers_without_zero(mean: float) -> None:
    found = set_sizes(mean, 20_000, np.random.default_rng(1))
    assert found.min() >= 1
    values = np.arange(1, 40)
    odds = poisson.pmf(values, mean) / -np.expm1(-mean)
    enough = 20_000 * odds >= 5
    counts = np.array([(found == value).sum() for value in values[enough]])
    expected = 20_000 * odds[enough]
    rest = 20_000 - counts.sum()
    if 20_000 - expected.sum() >= 5:
        counts, expected = np.append(counts, rest), np.append(expected, 20_000 - expected.sum())
    if len(counts) > 1:
        assert chisquare(counts, expected * counts.sum() / expected.sum()).pvalue > 0.01


@pytest.mark.parametrize("threshold", [math.inf, 0.01])
def test_words_are_drawn_by_their_likelihood(model: Unigram, threshold: float) -> None:
    stems, times = model.document(4)
    keep = kept(model.frequency, threshold)
    full = np.zeros(len(model.stems))
    full[stems] = times
    likely = dirichlet(full, times.sum(), model.background, model.mu)
    chosen, scores, inside = draw(model, stems, times, 20_000, np.random.default_rng(0), keep=keep, vocabulary=0)
    np.testing.assert_allclose(scores, np.log(likely[chosen]), rtol=1e-12)
    assert np.array_equal(inside, np.isin(chosen, stems))
    odds = likely * keep
    assert chisquare(np.bincount(chosen, minlength=len(likely)), 20_000 * odds / odds.sum()).pvalue > 0.01
    if threshold != math.inf:
        assert (keep < 1).any(), "the threshold does something"


def test_a_small_vocabulary_holds_the_document_and_keeps_its_likelihoods(model: Unigram) -> None:
    stems, times = model.document(4)
    keep = np.ones(len(model.stems))
    chosen, scores, inside = draw(model, stems, times, 20_000, np.random.default_rng(0), keep=keep, vocabulary=len(stems) + 5)
    assert set(stems) <= set(chosen) and len(set(chosen)) <= len(stems) + 5 and not inside.all()
    everything = dict(zip(*draw(model, stems, times, 20_000, np.random.default_rng(1), keep=keep, vocabulary=0)[:2], strict=True))
    assert all(everything[stem] == pytest.approx(score) for stem, score in zip(chosen, scores, strict=True) if stem in everything)
    longer = draw(model, stems, times, 20_000, np.random.default_rng(0), keep=keep, vocabulary=2)[0]
    assert len(set(longer)) > len(stems), "a longer document gets others too"


def test_the_better_set_is_the_likelier_one_and_of_the_same_size(model: Unigram) -> None:
    found = pairs_of(model, pairs=8, subsample=math.inf)
    stem_of = np.repeat(np.arange(len(model.stems)), np.diff(model.first))
    scaled = []
    for pair in range(len(found)):
        row, (better, worse) = int(found.document[pair]), found.texts(pair)
        assert len(better.split()) == len(worse.split()) == found.sizes[pair]
        place = slice(found.start[pair], found.start[pair] + found.sizes[pair])
        a, b = (model.likelihood(stem_of[side], row) for side in found.words[:, place])
        assert a - b == pytest.approx(found.gap[pair]) and a > b
        assert np.array_equal(found.inside[:, place], np.isin(stem_of[found.words[:, place]], model.document(row)[0]))
        stems, times = model.document(row)
        full = np.zeros(len(model.stems))
        full[stems] = times
        likely = 7.0 * dirichlet(full, times.sum(), model.background, model.mu)  # the same constant for every word
        scaled.append(np.log(likely[stem_of[found.words[0, place]]]).sum() - np.log(likely[stem_of[found.words[1, place]]]).sum())
    np.testing.assert_allclose(scaled, found.gap, rtol=1e-9)
    assert len(found) + found.ties == 8 * 30 and found.inside[0].mean() > found.inside[1].mean() + 0.1


def test_equal_sets_are_dropped_and_counted() -> None:
    model = unigram(["wing wing wing", "wing wing"], language=None)
    found = word_pairs(model, model.counts, np.array([3, 2]), pairs=4, shortest=0)
    assert len(found) == 0 and found.ties == 8 and found.texts is not None


def test_pairs_depend_on_the_seed_and_their_document_alone(model: Unigram) -> None:
    found, again, other = pairs_of(model, seed=3), pairs_of(model, seed=3), pairs_of(model, seed=4)
    assert found.sha256 == again.sha256 != other.sha256
    first = word_pairs(model, model.counts[:10], np.full(10, 40), shortest=0, seed=3)  # what a worker with a third of the documents draws
    assert first.sha256 == found.of(found.document < 10).sha256
    table = found.table(Dataset.from_dict({"id": [f"d{row}" for row in range(30)], "text": texts()}))
    assert table[7] == dict(zip(("id", "better", "worse", "gap"), (f"d{found.document[7]}", *found.texts(7), found.gap[7]), strict=True))


def test_short_and_empty_documents_are_skipped(model: Unigram) -> None:
    many = unigram(texts(200), language=None)
    found = word_pairs(many, many.counts, np.where(np.arange(200) < 100, 40, 20), shortest=30, skip_short=0.8)
    assert {why for _, why in found.skipped} == {"fewer than 30 words"} and 65 <= len(found.skipped) <= 95 and min(row for row, _ in found.skipped) >= 100
    assert set(found.document) | {row for row, _ in found.skipped} == set(range(200))
    none = word_pairs(model, model.counted(["unheard of", WORDS[0]]), np.array([2, 1]), shortest=0)
    assert none.skipped == [(0, "no word of the vocabulary")]


def test_sets_that_take_half_the_room_are_left_out(model: Unigram) -> None:
    source = wellread.load("minilm-l6").input
    found = pairs_of(model, words_per_set=6.0)
    room = [max(len(source.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in found.texts(pair)) for pair in range(len(found))]
    kept_ = fitting(found, source, 24)
    assert 0 < len(kept_) < len(found) and kept_.sha256 == found.of(np.array(room) <= 12).sha256
