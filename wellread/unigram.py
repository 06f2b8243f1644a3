"""Documents as bags of words, and how likely each word is in each of them: the unigram language model with Dirichlet smoothing.

What search engines call query likelihood (Ponte & Croft 1998; smoothing of Zhai & Lafferty 2004): a document answers a query when the query's words
are likely in it. Words are letters only, without stop words, stemmed; each stem keeps the forms in which the texts had it. In Chinese and Japanese each
sign is a word.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import CountVectorizer

from wellread.errors import BadInput
from wellread.words import WORD, check_language, words

Background = Literal["documents", "collection"]


def dirichlet(times: np.ndarray, length: float, background: np.ndarray, mu: float) -> np.ndarray:
    """P(word | document) [n] from how often each word is in the document [n], its length in words, and P(word | collection) [n].

    mu: so many words of the collection are added to each document.
    """
    return (times + mu * background) / (length + mu)


def kept(frequency: np.ndarray, threshold: float) -> np.ndarray:
    """The chance [V] that a drawn word is kept, from its share of all words [V]: word2vec's subsampling, min(1, sqrt(t/f) + t/f). All 1 for t = inf."""
    ratio = threshold / frequency
    return np.minimum(1.0, np.sqrt(ratio) + ratio)


def forms_of(text: str) -> list[str]:
    """The words of a text as they stand there, in lower case; those with a digit are left out."""
    return [word for word in WORD.findall(text.lower()) if word.isalpha()]


@dataclass(frozen=True)
class Unigram:
    """A collection of N documents over V stems, which have F forms in all.

    counts: [N, V], how often. lengths: int64 [N], words of each document (those of the vocabulary). background: [V], P(word | collection).
    frequency: [V], share of all words. mu: mean length. forms: [F], those of a stem side by side; first: int64 [V + 1], where they begin;
    weights: [F + 1], running sums of log(count + 1) of the forms.
    """

    counts: csr_matrix
    lengths: np.ndarray
    background: np.ndarray
    frequency: np.ndarray
    mu: float
    stems: list[str]
    forms: list[str]
    first: np.ndarray
    weights: np.ndarray

    def counted(self, texts: Iterable[str]) -> csr_matrix:
        """Other texts over the same stems, [N', V]; words that the collection lacks do not count."""
        return _by_stem(_vectorizer(self.forms).transform(texts), self.first)

    def document(self, number: int, counts: csr_matrix | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The stems of a document, int [n], and how often it has each, int [n]; a row of the collection, or of other `counts`."""
        of: Any = self.counts if counts is None else counts
        inside = slice(of.indptr[number], of.indptr[number + 1])
        return of.indices[inside], of.data[inside]

    def likelihood(self, chosen: np.ndarray, number: int) -> float:
        """Sum of log P(word | document) over the stems chosen, int [n]: the query likelihood of the document."""
        stems, times = self.document(number)
        full = np.zeros(len(self.stems))
        full[stems] = times
        with np.errstate(divide="ignore"):
            return float(np.log(dirichlet(full[chosen], self.lengths[number], self.background[chosen], self.mu)).sum())

    def spoken(self, chosen: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """A form, int [n], for each stem chosen, int [n], drawn in proportion to log(count + 1)."""
        low, high = self.weights[self.first[chosen]], self.weights[self.first[chosen + 1]]
        places = np.searchsorted(self.weights, low + random.random(len(chosen)) * (high - low), side="right") - 1
        return np.clip(places, self.first[chosen], self.first[chosen + 1] - 1)


def unigram(texts: Iterable[str], *, language: str | None = "en", background: Background = "documents", least: int = 2) -> Unigram:
    """The model of some texts, which are read once, one after the other.

    background: P(word | collection) in proportion to the documents that have the word, or to its count in the collection.
    least: words that the collection has less often are left out.
    Raises `BadInput` when no word is left.
    """
    check_language(language)
    stem = words(language)
    reader = _vectorizer()
    try:
        found = reader.fit_transform(texts)
    except ValueError:  # it saw no word at all
        raise BadInput("the texts hold no words of letters: give texts in a script with letters") from None
    stems = [stem(form) for form in reader.get_feature_names_out()]  # [] for a stop word, else one stem
    total = np.asarray(found.sum(0)).ravel()
    by_stem: dict[str, list[int]] = {}
    for number, each in enumerate(stems):
        if each:
            by_stem.setdefault(each[0], []).append(number)
    used = sorted(each for each, numbers in by_stem.items() if total[numbers].sum() >= least)
    if not used:
        raise BadInput(f"the texts hold no word {least} times that is no stop word: give more texts, or name their language")
    order = np.concatenate([by_stem[each] for each in used])
    first = np.cumsum([0, *(len(by_stem[each]) for each in used)])
    counts = _by_stem(found[:, order], first)
    collection = np.asarray(counts.sum(0), float).ravel()
    documents = np.bincount(counts.indices, minlength=len(used)).astype(float)
    chosen = {"documents": documents, "collection": collection}[background]
    lengths = np.asarray(counts.sum(1)).ravel()
    names = reader.get_feature_names_out()
    return Unigram(
        counts, lengths, chosen / chosen.sum(), collection / collection.sum(), float(lengths.mean()),
        used, [str(names[number]) for number in order], first, np.concatenate([[0.0], np.cumsum(np.log(total[order] + 1.0))]),
    )  # fmt: skip


def _vectorizer(forms: list[str] | None = None) -> CountVectorizer:
    return CountVectorizer(analyzer=forms_of, vocabulary=forms)


def _by_stem(counts: Any, first: np.ndarray) -> csr_matrix:
    """Counts of forms [N, F] added up over the forms of each stem: [N, V]."""
    which = np.repeat(np.arange(len(first) - 1), np.diff(first))
    found = csr_matrix(counts @ csr_matrix((np.ones(len(which), np.int64), (np.arange(len(which)), which)), shape=(len(which), len(first) - 1)))
    found.sort_indices()
    return found
