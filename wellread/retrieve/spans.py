"""A search task made of an unlabelled corpus: which document was this span cut out of? And what to know about a corpus before learning from it.

Such a span shares its rare words with its document, which is kinder to keyword search than people's questions are.
"""

from __future__ import annotations

import hashlib
import tempfile
import unicodedata
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from datasets import Dataset

from wellread import runtime
from wellread.data import name_of, subset
from wellread.documents import Passage, rows
from wellread.errors import optional
from wellread.index import Index
from wellread.network import Network
from wellread.ranking import Run, measure
from wellread.results import Report
from wellread.words import check_language

Score = Literal["cosine", "dot"]


def whole(passage: Passage) -> str:
    """Title and text as one; a title that the text begins with is not said twice."""
    return passage.text if passage.text.startswith(passage.title) else f"{passage.title}\n{passage.text}".strip()


def owner(name: str) -> int:
    """A number for the document that a passage is part of: ids "notes.md#3" and "notes.md#4" give the same."""
    return int.from_bytes(hashlib.blake2b((name.rpartition("#")[0] or name).encode(), digest_size=8).digest(), "little", signed=True)


def held_out(corpus: Dataset, *, count: int = 100, pool: int = 1000, seed: int = 0) -> tuple[Dataset, Dataset, Dataset]:
    """A search task made of the corpus itself: the documents to train on, queries, and the texts to search.

    Queries (id, text) are spans of an eighth of the words of at most a tenth of the documents. The texts (id, title, text) are what is left of these
    documents without their spans, and other documents; the right text of a query has its id. Nothing of a document that gave a query is in what is trained on.
    """
    if "id" not in corpus.column_names:
        corpus = corpus.add_column("id", [str(row) for row in range(len(corpus))])  # type: ignore[call-arg]
    random = np.random.default_rng(seed)
    owners = np.fromiter((owner(passage.id) for passage in rows(corpus)), np.int64, len(corpus))
    shuffled = random.permutation(len(corpus))
    _, firsts = np.unique(owners[shuffled], return_index=True)  # one passage of each document
    candidates = shuffled[np.sort(firsts)]
    tried = subset(corpus, candidates[: 10 * count])
    long = [row for row, passage in zip(candidates, rows(tried), strict=False) if len(passage.text.split()) >= 24]
    chosen = long[: min(count, len(candidates) // 10)]
    away = np.isin(owners, owners[chosen])
    queries, texts = [], []
    for passage in rows(subset(corpus, chosen)):
        words = passage.text.split()
        length = len(words) // 8
        start = int(random.integers(len(words) - length + 1))
        queries.append({"id": passage.id, "text": " ".join(words[start : start + length])})
        texts.append(passage._asdict() | {"text": " ".join(words[:start] + words[start + length :])})
    others = random.permutation(np.flatnonzero(~away))[: max(pool - len(chosen), 0)]
    texts += [passage._asdict() for passage in rows(subset(corpus, others)) if passage.text]
    return subset(corpus, np.flatnonzero(~away)), Dataset.from_list(queries), Dataset.from_list(texts)


def can_judge(language: str | None) -> None:
    """Raises `BadInput` when `judged` would, so that it is known before a training."""
    for module in ("faiss", "bm25s", "ir_measures"):
        optional(module, "retrieve")
    check_language(language)


def judged(before: Network, after: Network, queries: Dataset, texts: Dataset, *, score: Score = "cosine", language: str | None = "en") -> list[dict[str, Any]]:
    """A table row each for words (BM25), the encoder before and after, and words and the trained encoder fused: how early the right text comes.

    queries, texts: as `held_out` gives them. score: what the encoders are compared by. language: of stop words and stemming.
    """
    runs: dict[str, Run] = {}
    with tempfile.TemporaryDirectory() as folder, runtime.using(progress=False):
        for name, encoder in (("before", before), ("after", after)):
            index = Index.build(encoder, texts, f"{folder}/{name}", score=score, lexical=name == "after", language=language)
            runs[f"encoder {name}"] = index.run(queries, mode="dense")
        runs = {"words (BM25)": index.run(queries, mode="lexical")} | runs | {"words and encoder after, fused": index.run(queries)}
        index.close()
    right = {query: {query: 1} for query in queries["id"]}
    return [{"search by": name} | measure(run, right, ["nDCG@10", "R@10"]).mean for name, run in runs.items()]


def with_spans(
    report: Report, before: Network, after: Network, corpus: Dataset, queries: Dataset, texts: Dataset, *, score: Score = "cosine", language: str | None = "en"
) -> Report:
    """How a report on a trained encoder ends: with the score to search by, and with the table of `judged`, if there are queries, and how to read it.

    The trained encoder's figure in it also goes into `after.measured`.
    """
    report.text = f"{report.text} The encoder was trained for the {score} score: build the index with that.".strip()
    if len(queries):
        table = judged(before, after, queries, texts, score=score, language=language)
        after.measured = [{"data": f"spans of {name_of(corpus)}", "rows": len(queries), "metrics": {"nDCG@10": table[2]["nDCG@10"]}}]
        report.tables |= {"finding held-out documents from a span of them": table}
        report.text += (
            f" The last table: {len(queries)} spans looked for among {len(texts)} texts. A span shares its rare words with its document, which is kinder to "
            "BM25 than people's questions are."
        )
    else:
        report.text += " No document was kept out, so how well it finds was not measured: at least ten of 24 words or more are needed for that."
    return report


def scripts(texts: Sequence[str]) -> Counter[str]:
    """How many of the texts are mainly in which script (LATIN, CYRILLIC, CJK, ...)."""
    counts = (Counter(unicodedata.name(letter, "?").partition(" ")[0] for letter in text[:300] if letter.isalpha()) for text in texts)
    return Counter(count.most_common(1)[0][0] for count in counts if count)


def cautions(corpus: Dataset, unknown: float = 0.0, groups: bool = False) -> list[str]:
    """What speaks against learning from this corpus, one sentence each; also given as warnings.

    unknown: share of its tokens that the tokenizer has no word for. groups: whether the method would draw languages evenly.
    """
    found = []
    if unknown > 0.2:
        found.append(f"{unknown:.0%} of the corpus are words or signs that the tokenizer does not know: take an encoder made for this language")
    sample = np.random.default_rng(0).permutation(len(corpus))[:200]
    kinds = scripts([passage.text for passage in rows(subset(corpus, sample))])
    many = [name.title() for name, count in kinds.items() if count >= 0.1 * sum(kinds.values())]
    if len(many) > 1 and not (groups and "group" in corpus.column_names):
        advice = "give a column 'group' with the language, so that each is drawn evenly" if groups else "train on one language at a time"
        found.append(f"the corpus mixes the scripts {', '.join(sorted(many))}: {advice}")
    for each in found:
        warnings.warn(each, stacklevel=4)
    return found
