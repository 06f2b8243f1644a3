"""Documents as sentences in their order: which sentences are neighbours, which pages are kept apart, and whether an encoder finds neighbours."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from datasets import Dataset

from wellread import runtime
from wellread.data import name_of
from wellread.documents import rows
from wellread.index import encode
from wellread.network import Network
from wellread.retrieve.inverse_cloze import sentences
from wellread.retrieve.spans import owner


@dataclass(frozen=True)
class Contexts:
    """The sentences of a corpus in the order of their languages and pages. A few numbers per sentence lie in memory, the texts stay in the table.

    row, number: int64 [N], the sentence is the `number`-th of that row of the corpus. page: int64 [N], passages "file#1", "file#2" of a language are one page.
    place: int64 [N], where in its page it stood. language: int64 [N], a place in `languages`. dropped: short ones and repetitions.
    """

    corpus: Dataset
    languages: list[str]
    row: np.ndarray
    number: np.ndarray
    page: np.ndarray
    place: np.ndarray
    language: np.ndarray
    dropped: int

    def __len__(self) -> int:
        return len(self.row)

    def text(self, which: int) -> str:
        """Sentence `which`."""
        passage = next(rows([self.corpus[int(self.row[which])]]))
        return sentences(passage.text)[int(self.number[which])].strip()

    def texts(self, which: Sequence[int] | np.ndarray) -> list[str]:
        """Sentences `which`, int64 [n]."""
        return [self.text(int(each)) for each in which]

    def neighbours(self, which: int, window: int) -> np.ndarray:
        """int64 [n]: the sentences at most `window` places before or after it in its page."""
        near = np.arange(max(which - window, 0), min(which + window + 1, len(self)))
        same = (self.page[near] == self.page[which]) & (self.language[near] == self.language[which])
        return near[same & (np.abs(self.place[near] - self.place[which]) <= window) & (near != which)]

    def centers(self, window: int) -> np.ndarray:
        """bool [N]: whether a sentence has a neighbour."""
        joined = (np.diff(self.page) == 0) & (np.diff(self.language) == 0) & (np.diff(self.place) <= window)
        return np.append(joined, False) | np.insert(joined, 0, False)

    def only(self, kept: np.ndarray) -> Contexts:
        """Those of a mask, bool [N]."""
        columns = {name: getattr(self, name)[kept] for name in ("row", "number", "page", "place", "language")}
        return replace(self, **columns)


def contexts(corpus: Dataset, tokenizer: Any, *, shortest: int = 5) -> Contexts:
    """The sentences of passages with id, text and group (their language), in the order of the table.

    Sentences of fewer than `shortest` tokens are left out, and of sentences that a language has more than once all but the first: headers and set phrases
    would be neighbours that need not be understood.
    """
    languages, codes = np.unique([str(each) for each in corpus["group"]], return_inverse=True)
    found: list[tuple[int, int, int, int, int, int]] = []
    last: dict[tuple[int, int], int] = {}
    dropped = 0
    for row, (passage, code) in enumerate(zip(runtime.track(rows(corpus), f"sentences of {name_of(corpus)}", len(corpus)), codes.tolist(), strict=True)):
        if not passage.text:
            continue
        parts, page = [each.strip() for each in sentences(passage.text)], owner(passage.id)
        place = last.get((code, page), 0)
        for number, ids in enumerate(tokenizer(parts, add_special_tokens=False, verbose=False)["input_ids"]):
            if len(ids) >= shortest:
                found.append((row, number, page, place + number, code, _hash(f"{code} {' '.join(parts[number].casefold().split())}")))
            else:
                dropped += 1
        last[code, page] = place + len(parts)
    table = np.array(found, np.int64).reshape(-1, 6)
    first = np.sort(np.unique(table[:, 5], return_index=True)[1])
    table = table[first]
    table = table[np.lexsort((table[:, 3], table[:, 2], table[:, 4]))]
    row, number, page, place, language, _ = table.T
    return Contexts(corpus, languages.tolist(), row, number, page, place, language, dropped + len(found) - len(first))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "little", signed=True)


def apart(parts: Contexts, count: int, seed: int = 0) -> tuple[Contexts, Contexts]:
    """Whole pages to train on and others to judge on: of each language about `count` sentences, at most a fifth of its pages."""
    random, away = np.random.default_rng(seed), np.zeros(len(parts), bool)
    for code in range(len(parts.languages)):
        mine = parts.language == code
        pages, sizes = np.unique(parts.page[mine], return_counts=True)
        order = random.permutation(len(pages))[: len(pages) // 5]
        enough = int(np.searchsorted(np.cumsum(sizes[order]), count)) + 1 if count else 0
        away |= mine & np.isin(parts.page, pages[order[:enough]])
    return parts.only(~away), parts.only(away)


def found_neighbours(network: Network, parts: Contexts, window: int = 4) -> list[float]:
    """Of each language the share, in %, of sentences that find a neighbour among the first ten of its other sentences by cosine; nan without sentences."""
    shares = []
    for code in range(len(parts.languages)):
        mine = parts.only(parts.language == code)
        able = np.flatnonzero(mine.centers(window)) if len(mine) > 10 else np.empty(0, np.int64)
        if not len(able):
            shares.append(float("nan"))
            continue
        x = encode(network, mine.texts(range(len(mine))))
        x = x / np.linalg.norm(x, axis=1, keepdims=True).clip(1e-12)
        scores = x[able] @ x.T
        scores[np.arange(len(able)), able] = -np.inf
        ten = np.argpartition(-scores, 10, axis=1)[:, :10]
        hits = [np.isin(first, mine.neighbours(int(each), window)).any() for each, first in zip(able, ten, strict=True)]
        shares.append(100 * float(np.mean(hits)))
    return shares
