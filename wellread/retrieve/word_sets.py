"""Pairs of word sets of which one speaks better for a document than the other, drawn from its unigram language model: what PROP learns from.

All words of a document are drawn in one call, and from a generator of its own.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from datasets import Dataset

from wellread.documents import rows
from wellread.inputs import TextInput
from wellread.unigram import Unigram, dirichlet, kept

TIE = 1e-9  # log-likelihoods that differ by less are equal: which set is better would be a coin


@dataclass(frozen=True)
class WordPairs:
    """n pairs of sets of equally many words, the likelier set first. A word is a form, by its number in `forms`.

    document: int64 [n], rows of the corpus. sizes: int64 [n], words of a set. words: int64 [2, sum of sizes], the sets one after the other, the better
    ones above the worse ones. inside: bool, of the same shape, which words occur in their document. gap: [n], by how much the better set is likelier,
    in nats. ties: so many were dropped because both were equally likely. skipped: [(row, reason)], documents without pairs.
    """

    forms: list[str]
    document: np.ndarray
    sizes: np.ndarray
    words: np.ndarray
    inside: np.ndarray
    gap: np.ndarray
    ties: int
    skipped: list[tuple[int, str]]

    def __len__(self) -> int:
        return len(self.document)

    @cached_property
    def start(self) -> np.ndarray:
        return np.cumsum(self.sizes) - self.sizes

    def texts(self, pair: int) -> list[str]:
        """The better and the worse set, as they are read."""
        return [" ".join(self.forms[form] for form in side) for side in self.words[:, self.start[pair] : self.start[pair] + self.sizes[pair]]]

    @property
    def sha256(self) -> str:
        """The same for the same pairs."""
        found = hashlib.sha256("\n".join(self.forms).encode())
        for each in (self.document, self.sizes, self.words):
            found.update(np.ascontiguousarray(each, "<i8").tobytes())
        return found.hexdigest()

    def of(self, chosen: np.ndarray) -> WordPairs:
        """Some of the pairs, bool [n]."""
        which = np.repeat(chosen, self.sizes)
        parts = {name: getattr(self, name)[chosen] for name in ("document", "sizes", "gap")}
        return replace(self, words=self.words[:, which], inside=self.inside[:, which], **parts)

    def table(self, corpus: Dataset) -> Dataset:
        """All pairs to look at or to save (`to_json`): id of the document, better, worse, gap."""
        names, sets = [passage.id for passage in rows(corpus)], [self.texts(pair) for pair in range(len(self))]
        columns = {"id": [names[row] for row in self.document], "better": [a for a, _ in sets], "worse": [b for _, b in sets]}
        return Dataset.from_dict({**columns, "gap": self.gap.tolist()})


def set_sizes(mean: float, count: int, random: np.random.Generator) -> np.ndarray:
    """int64 [count]: Poisson numbers of this mean of which every 0 is drawn again: one event before the time `mean`, and those after it."""
    first = -np.log1p(random.random(count) * np.expm1(-mean))
    return 1 + random.poisson(np.maximum(mean - first, 0))


def draw(
    model: Unigram, stems: np.ndarray, times: np.ndarray, count: int, random: np.random.Generator, *,
    keep: np.ndarray, vocabulary: int = 500, sums: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Stems drawn for one document, int64 [count]; their log P(word | document), [count]; and whether they occur in it, bool [count].

    stems, times: int [n], the document. keep: [V], the chance that a drawn word is kept, and not drawn again. vocabulary: how many words are drawn from,
    those of the document and others by P(word | collection), some of them twice (for a longer document, its length and 100 others); 0 for all words.
    The likelihood is that among all words in any case. sums: running sums of the model's background, to save time.
    """
    if vocabulary:
        count_others = vocabulary - len(stems) if len(stems) < vocabulary else len(stems) + 100
        sums = np.cumsum(model.background) if sums is None else sums
        others = np.searchsorted(sums, random.random(count_others) * sums[-1], side="right").clip(max=len(sums) - 1)
    else:
        others = np.arange(len(model.stems))
    choice = np.concatenate([stems, np.setdiff1d(others, stems)])
    counted = np.concatenate([times, np.zeros(len(choice) - len(stems), times.dtype)])
    likely = dirichlet(counted, times.sum(), model.background[choice], model.mu)
    odds = np.cumsum(likely * keep[choice])  # drawing again what is not kept: in proportion to both
    places = np.searchsorted(odds, random.random(count) * odds[-1], side="right").clip(max=len(choice) - 1)
    return choice[places], np.log(likely[places]), places < len(stems)


def word_pairs(
    model: Unigram, counts: Any, lengths: np.ndarray, *, pairs: int = 5, words_per_set: float = 3.0, vocabulary: int = 500, subsample: float = 1e-4,
    shortest: int = 100, skip_short: float = 0.8, seed: int = 0,
) -> WordPairs:  # fmt: skip
    """`pairs` for each document; those of one depend on (seed, its row, its words) alone, whatever else is drawn and where.

    counts: sparse [N, V], the documents (`model.counts`, or of other texts `model.counted`). lengths: int [N], all their words; below `shortest` a document
    is skipped with the chance `skip_short`.
    """
    keep, sums = kept(model.frequency, subsample), np.cumsum(model.background)
    skipped, found = list[tuple[int, str]](), [(np.empty(0, int), np.empty(0, int), np.empty((2, 0), int), np.empty((2, 0), bool), np.empty(0))]
    for row in range(counts.shape[0]):
        random = np.random.default_rng((seed, row))
        stems, times = model.document(row, counts)
        if not len(stems):
            skipped.append((row, "no word of the vocabulary"))
        elif lengths[row] < shortest and random.random() < skip_short:
            skipped.append((row, f"fewer than {shortest} words"))
        else:
            sizes = set_sizes(words_per_set, pairs, random)
            total = int(sizes.sum())
            flat = draw(model, stems, times, 2 * total, random, keep=keep, vocabulary=vocabulary, sums=sums)
            drawn, likely, inside = (each.reshape(2, total) for each in flat)
            above = np.subtract(*np.add.reduceat(likely, np.cumsum(sizes) - sizes, axis=1))
            turn = np.repeat(above < 0, sizes)
            said = model.spoken(drawn.ravel(), random).reshape(2, total)
            found.append((np.full(pairs, row), sizes, np.where(turn, said[::-1], said), np.where(turn, inside[::-1], inside), np.abs(above)))
    document, sizes, said, inside, gap = (np.concatenate(parts, axis=-1) for parts in zip(*found, strict=True))
    fair = gap > TIE
    return WordPairs(model.forms, document, sizes, said, inside, gap, int((~fair).sum()), skipped).of(fair)


def fitting(pairs: WordPairs, source: TextInput, length: int) -> WordPairs:
    """Without the pairs of which a set takes more than half of `length` tokens."""
    if not len(pairs):
        return pairs
    pieces: Any = source.tokenizer([f" {form}" for form in pairs.forms], add_special_tokens=False)["input_ids"]
    tokens = np.array([len(ids) for ids in pieces])
    return pairs.of(np.add.reduceat(tokens[pairs.words], pairs.start, axis=1).max(0) <= length // 2)
