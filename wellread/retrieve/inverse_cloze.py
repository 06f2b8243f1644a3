"""Three ways to practise search on documents without questions: ICT, BFS and WLP (Chang et al. 2020, arXiv 2002.03932).

Inverse cloze task: find the passage that a sentence was taken out of. Body first selection: find another passage of the page whose first passage a
sentence is from. Link prediction: find a passage that links to the page whose first passage a sentence is from. One encoder reads both sides.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn

from wellread.batches import Batches
from wellread.contrastive import gathered, in_batch, in_chunks
from wellread.data import Corpus
from wellread.documents import Passage, rows
from wellread.errors import BadInput
from wellread.inputs import TextInput
from wellread.method import method, sentence_input
from wellread.network import Network
from wellread.results import Report
from wellread.retrieve.spans import Score, can_judge, cautions, held_out, owner, whole, with_spans
from wellread.train import History, fit

Task = Literal["ict", "bfs", "wlp"]
Direction = Literal["in", "out", "both"]

# --- sentences

ABBREVIATIONS = "al approx cf ch dr e.g ed eds eq eqs et etc fig figs i.e inc jr mr mrs ms no nos p pp prof ref refs resp sec st vol vs"
SHORT = frozenset(re.findall(r"\S+", ABBREVIATIONS))
END = re.compile(r"(?:[.!?…]+[\"'”’)\]]*\s+|[。！？]+\s*|\n+)")
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|\w{4,}")


def sentences(text: str) -> list[str]:
    """The sentences of a text with the space after them: joined they are the text. No end is seen after an abbreviation (fig. 2) or an initial."""
    found, start = [], 0
    for end in END.finditer(text):
        last = text[start : end.start()].split()[-1:]
        short = end[0].startswith(".") and last and (last[0].lower().lstrip("([") in SHORT or re.fullmatch(r"[A-Z]", last[0]))
        if re.search(r"\w", text[start : end.start()]) and (not short or "\n" in end[0]):
            found.append(text[start : end.end()])
            start = end.end()
    if re.search(r"\w", text[start:]) or not found:
        found.append(text[start:])
    else:
        found[-1] += text[start:]
    return found


def can_ask(sentence: str) -> bool:
    """Whether it says enough to be looked for: at least four words of four letters or more (or signs of a script without spaces)."""
    return len(WORD.findall(sentence)) >= 4


def cloze(parts: list[str], number: int, keep: bool = False) -> tuple[str, str]:
    """A sentence of a passage, and the passage without it, or with it when `keep`."""
    return parts[number].strip(), "".join(each for place, each in enumerate(parts) if keep or place != number).strip()


# --- pages


class Pair(NamedTuple):
    """A query and its document, and where they are from: rows of the corpus, the number of the sentence in its passage, the pages of both."""

    task: Task
    query: str
    document: str
    query_row: int
    sentence: int
    document_row: int
    query_page: int
    document_page: int


class Pages:
    """A corpus as pages (passages "file#1", "file#2", ... are one page, the first of them its lead), and the pairs that each task finds in it.

    Memory holds a few numbers per passage. links: the column that names the pages a passage links to, by id or title: a list, or text between ";".
    """

    def __init__(self, corpus: Dataset, *, direction: Direction = "in") -> None:
        self.corpus, self.single = corpus, 0
        self.page = np.empty(len(corpus), np.int64)
        asks, splits = np.zeros(len(corpus), bool), np.zeros(len(corpus), bool)
        names: dict[str, int] = {}
        linked = "links" in corpus.column_names
        for row, passage in enumerate(rows(corpus)):
            parts = sentences(_body(passage))
            self.page[row] = owner(passage.id)
            asks[row] = any(map(can_ask, parts))
            splits[row] = asks[row] and len(parts) > 1
            self.single += len(parts) < 2
            if linked:
                names[(passage.id.rpartition("#")[0] or passage.id).casefold()] = names[passage.title.partition(" > ")[0].casefold()] = int(self.page[row])
        _, firsts, self.which = np.unique(self.page, return_index=True, return_inverse=True)
        self.order = np.argsort(self.which, kind="stable")  # passages page by page, in their order
        self.starts = np.append(np.searchsorted(self.which[self.order], np.arange(len(firsts))), len(corpus))
        self.leads = firsts
        self.can_lead = asks[firsts]
        several = np.diff(self.starts) > 1
        self.pairs: dict[Task, np.ndarray] = {
            "ict": np.flatnonzero(splits)[:, None].repeat(2, 1),  # int64 [n, 2]: the passage of the query; of the document, or -1 - page for any of it
            "bfs": np.array([[firsts[page], -1 - page] for page in np.flatnonzero(several & self.can_lead)], np.int64).reshape(-1, 2),
            "wlp": self._links(names, direction) if linked else np.empty((0, 2), np.int64),
        }

    def __len__(self) -> int:
        return len(self.leads)

    def _links(self, names: dict[str, int], direction: Direction) -> np.ndarray:
        place = {int(self.page[lead]): number for number, lead in enumerate(self.leads)}
        found = []
        self.targets, self.unresolved = 0, list[str]()
        for row, given in enumerate(self.corpus["links"]):
            for target in (given.split(";") if isinstance(given, str) else given) or ():
                target = target.strip()
                page = place.get(names.get(target.casefold(), 0))
                if target and page is None:
                    self.unresolved.append(target)
                elif target and page != self.which[row]:
                    found.append((row, page))
                self.targets += bool(target)
        links = np.unique(np.array(found, np.int64).reshape(-1, 2), axis=0)
        degree = np.bincount(links[:, 1], minlength=len(self))
        links = links[degree[links[:, 1]] <= np.quantile(degree[degree > 0], 0.99, method="higher")] if len(links) else links  # a hub says nothing
        into = np.column_stack([self.leads[links[:, 1]], links[:, 0]])[self.can_lead[links[:, 1]]]
        source = self.which[links[:, 0]]
        out = np.column_stack([self.leads[source], -1 - links[:, 1]])[self.can_lead[source]]
        return {"in": into, "out": out, "both": np.concatenate([into, out])}[direction]

    def _passage(self, row: int) -> Passage:
        return next(rows([self.corpus[row]]))

    def draw(self, task: Task, number: int, random: np.random.Generator, keep_sentence: float = 0.1) -> Pair:
        """Pair `number` of a task: its sentence, and where several passages would do its document, drawn at random."""
        first, second = (int(each) for each in self.pairs[task][number])
        asking = self._passage(first)
        parts = sentences(_body(asking))
        chosen = int(random.choice([place for place, each in enumerate(parts) if can_ask(each)]))
        query, rest = cloze(parts, chosen, keep=random.random() < keep_sentence)
        if task == "ict":
            return Pair(task, query, whole(asking._replace(text=rest)), first, chosen, first, int(self.page[first]), int(self.page[first]))
        if second < 0:  # any passage of the page; of the asking page, any but its lead
            its = self.order[self.starts[-1 - second] : self.starts[-second]]
            second = int(random.choice(its[its != first]))
        found = self._passage(second)
        return Pair(task, query, whole(found._replace(text=_body(found))), first, chosen, second, int(self.page[first]), int(self.page[second]))


def _body(passage: Passage) -> str:
    """The text without the title that it may begin with: a title on both sides would be copied instead of understood."""
    return passage.text.removeprefix(passage.title).strip() if passage.title else passage.text


def pair_batches(
    source: TextInput,
    pages: Pages,
    tasks: list[Task],
    *,
    steps: int,
    batch_size: int = 64,
    keep_sentence: float = 0.1,
    query_tokens: int = 48,
    passage_tokens: int = 128,
    seed: int = 0,
) -> Batches:
    """One epoch of `steps` batches {"queries", "documents": token tensors [B, T], "pages": int64 [B, 2], of query and document}.

    Each batch is of one task, in turn: mixed, the length of a text would tell the tasks apart. Pairs come in a new random order when all were seen.
    """
    queries, documents = (replace(source, max_length=min(each, source.max_length)) for each in (query_tokens, passage_tokens))
    order = lru_cache(maxsize=4)(lambda task, turn: np.random.default_rng((seed, turn)).permutation(len(pages.pairs[task])))

    def get(numbers: np.ndarray) -> dict[str, Any]:
        random, drawn = np.random.default_rng(int(torch.randint(2**62, ()))), []
        for number in numbers.tolist():
            turn, place = divmod(number // batch_size, len(tasks))  # the turn-th batch of this task
            task, at = tasks[place], turn * batch_size + number % batch_size
            total = len(pages.pairs[task])
            drawn.append(pages.draw(task, int(order(task, at // total)[at % total]), random, keep_sentence))
        return {
            "queries": queries([each.query for each in drawn]),
            "documents": documents([each.document for each in drawn]),
            "pages": torch.tensor([[each.query_page, each.document_page] for each in drawn]),
        }

    return Batches(steps * batch_size, get, batch_size=batch_size, seed=seed)


def learn(
    encoder: Network, batches: Batches, *, temperature: float = 0.05, score: Score = "cosine", learning_rate: float = 3e-5, seed: int = 0
) -> tuple[Network, History]:
    """A copy of a sentence encoder after one epoch of such batches as `pair_batches` gives, and what happened.

    The negatives of a query are the documents of the other pairs that are of neither of its pages.
    """
    result = encoder.copy()

    def step(module: nn.Module, batch: dict[str, Any]) -> Tensor:
        queries, documents = (in_chunks(lambda tokens: module(**tokens), batch[side]) for side in ("queries", "documents"))
        documents, first = gathered(documents)
        theirs = gathered(batch["pages"])[0][:, 1]
        same = (batch["pages"][:, :, None] == theirs).any(1)
        return in_batch(queries, documents, temperature=temperature, cosine=score == "cosine", same=same, first=first)

    history = fit(result.module, batches, step, epochs=1, learning_rate=learning_rate, weight_decay=0.01, warmup=0.1, seed=seed, name="inverse cloze")
    return result, history


@method
def inverse_cloze(
    encoder: Network,
    corpus: Corpus,
    *,
    tasks: list[Literal["ict", "bfs", "wlp"]] | None = None,
    steps: int = 500,
    batch_size: int = 64,
    keep_sentence: float = 0.1,
    direction: Literal["in", "out", "both"] = "in",
    temperature: float = 0.05,
    score: Literal["cosine", "dot"] = "cosine",
    learning_rate: float = 3e-5,
    query_tokens: int = 48,
    passage_tokens: int = 128,
    queries: int = 100,
    language: str | None = "en",
    seed: int = 0,
) -> Network:
    """A search encoder for documents that have sentences, sections and links but no questions, trained to find passages from sentences.

    encoder: a sentence encoder; the same one then reads questions and passages. It is not changed.
    corpus: passages with id and text, if you like title and links. Passages "file#1", "file#2", ... are one page, the first of them its lead.
    tasks: ict (which passage is this sentence from), bfs (another passage of the page whose lead it is from), wlp (a passage that links to that page;
        needs a column links of page ids or titles). By default all that the corpus allows; each batch is of one, in turn.
    steps: optimiser steps; AdamW, a tenth of them warm-up, cosine.
    batch_size: pairs in a step; the documents of the others are the wrong answers. More are better: they cost time, not memory.
    keep_sentence: how often a sentence of ict also stays in its passage, so that exact words are not unlearned. The paper: never; before it: 0.1.
    direction: of the links of wlp: the passage links to the page asked about (in), is on a page linked from it (out), or both.
    temperature: scores are divided by it.
    score: what two texts are compared by, in training and then in the search: cosine, or the plain dot product of the paper (with temperature 1).
    learning_rate: highest one.
    query_tokens, passage_tokens: longer texts are cut, in training.
    queries: so many documents, at most a tenth, are kept out of the training to measure on (0 measures nothing).
    language: of the stop words and stemming of BM25 in that measurement.
    seed: of pairs, order and dropout.

    The report "inverse_cloze" lists the pairs that each task found, some of them, and how words (BM25), the encoder before and after, and words and
    encoder fused find documents that were not trained on from a span cut out of them.
    Raises BadInput for a network that is no sentence encoder, a task that finds nothing in the corpus, and batches larger than the corpus has pages.
    Source: Chang et al. 2020, arXiv 2002.03932; there is no official code.
    """
    source = sentence_input(encoder)
    for right, sentence in (
        (steps >= 1, f"steps is {steps}: give at least 1"),
        (batch_size >= 2, f"batch_size is {batch_size}: give at least 2, a pair is told apart from others"),
        (0 <= keep_sentence <= 1, f"keep_sentence is {keep_sentence}: give a share from 0 to 1"),
        (0 < temperature < float("inf"), f"temperature is {temperature}: give a number above 0"),
        (min(query_tokens, passage_tokens) >= 8, f"query_tokens is {query_tokens} and passage_tokens {passage_tokens}: give at least 8"),
        (queries >= 0, f"queries is {queries}: give 0 or more"),
        (tasks is None or len(set(tasks)) == len(tasks) > 0, f"tasks is {tasks}: name each once, or leave it out"),
    ):
        if not right:
            raise BadInput(sentence)
    if queries:
        can_judge(language)
    training, asked, texts = held_out(corpus, count=queries, seed=seed)
    pages = Pages(training, direction=direction)
    for task in tasks or []:
        if not len(pages.pairs[task]):
            raise BadInput(_nothing(pages, task))
    chosen: list[Task] = list(tasks) if tasks else [task for task, found in pages.pairs.items() if len(found)]
    if not chosen:
        raise BadInput(_nothing(pages, "ict"))
    if len(pages) < batch_size:
        raise BadInput(f"batch_size is {batch_size} and the corpus has {len(pages)} documents to train on: give fewer than that, or more documents")
    warned = cautions(corpus)
    batches = pair_batches(
        source, pages, chosen, steps=steps, batch_size=batch_size, keep_sentence=keep_sentence, query_tokens=query_tokens,
        passage_tokens=passage_tokens, seed=seed,
    )  # fmt: skip
    result, history = learn(encoder, batches, temperature=temperature, score=score, learning_rate=learning_rate, seed=seed)

    figures: dict[str, Any] = {"documents": len(pages), "passages of one sentence, without ict": pages.single, "score": score}
    if "wlp" in chosen:
        figures |= {"links, direction": direction, "links that name no page": len(pages.unresolved)}
    random = np.random.default_rng(seed)
    losses = {task: np.array(history.loss[place :: len(chosen)]) for place, task in enumerate(chosen)}
    costs = [
        {"task": task, "pairs": len(pages.pairs[task]), "steps": len(each), "loss, last quarter": float(each[-max(1, len(each) // 4) :].mean())}
        for task, each in losses.items()
        if len(each)
    ]
    some = [pages.draw(task, int(random.integers(len(pages.pairs[task]))), random, 0.0) for task in chosen for _ in range(3)]
    shown = [{"task": each.task, "query": each.query[:160], "document": each.document[:160], "from row": each.query_row} for each in some]
    tables: dict[str, list[dict[str, Any]]] = {"tasks": costs, "some of the pairs": shown}
    text = "Run each task alone to see which of them earns its keep on this corpus."
    report = Report("an encoder for these documents", figures, tables=tables, text=text, warnings=warned)
    result.reports["inverse_cloze"] = with_spans(report, encoder, result, corpus, asked, texts, score=score, language=language)
    return result


def _nothing(pages: Pages, task: Task) -> str:
    if task == "ict":
        return f"no passage of the corpus has two sentences of which one says enough to be looked for ({pages.single} have one): give longer passages"
    if task == "bfs":
        return "no document of the corpus has several passages (ids file#1, file#2, ...): leave the task bfs out"
    if "links" not in pages.corpus.column_names:
        return "the corpus has no column 'links' (ids or titles of other pages): add it, or leave the task wlp out"
    first = f", the first that does not is {pages.unresolved[0]!r}" if pages.unresolved else ""
    return f"0 links lead to another page of the corpus: {pages.targets} targets were looked up{first}"
