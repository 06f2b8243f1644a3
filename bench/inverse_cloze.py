"""ICT and BFS: the first two layers of all-MiniLM-L6-v2, trained on documents alone.

    WELLREAD_DATA=... python -m bench.inverse_cloze [--quick]

Cranfield's abstracts have sentences and no sections: ICT against no training, masked language modelling and a placebo (sentences of other documents), judged
by the queries and judgements of people, with BM25, all six layers of the untouched all-MiniLM and BM25 fused with ICT beside them. The articles of
wikitext-2 have sections: ICT, BFS and both, each judged on held-out pairs of both tasks.
--quick tries it out in a few steps and records nothing.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F

from bench.contriever import found, shallow
from bench.harness import Expect, Noted, record
from wellread import Network, load
from wellread.batches import Batches, network_batches
from wellread.documents import pieces
from wellread.judged import Collection, load_collection
from wellread.ranking import Run, fuse, measure
from wellread.retrieve.inverse_cloze import Pages, Task, can_ask, learn, pair_batches, sentences
from wellread.train import fit

QUICK = "--quick" in sys.argv
SEEDS = [0] if QUICK else [0, 1, 2]
STEPS, WIKI_STEPS, TOKENS = (2, 2, 32) if QUICK else (45, 16, 64)
BATCH, SEARCHED, RATE = 32, 60 if QUICK else 500, 1e-4
TASKS: dict[str, list[Task]] = {"ict": ["ict"], "bfs": ["bfs"], "both": ["ict", "bfs"]}
CLAIM = "tasks made of paragraphs teach a two-tower encoder to search, where masked language modelling does not; several tasks together are the better choice"

EXPECTS = [
    Expect("on Cranfield ICT is at least 0.05 nDCG@10 above no training in every seed", "min(ict) - start", 0.05),
    Expect("ICT is at least 0.05 above as many steps of masked language modelling in every seed", "min(ict - mlm)", 0.05),
    Expect("sentences paired with other documents do not gain 0.05", "placebo - start", 0.05, at_least=False),
    Expect("on wikitext-2 both tasks together are within 0.02 of the better one on held-out ICT pairs", "wiki_both_on_ict - max((mean_ict_on_ict, mean_bfs_on_ict))", -0.02),
    Expect("and on held-out BFS pairs", "wiki_both_on_bfs - max((mean_ict_on_bfs, mean_bfs_on_bfs))", -0.02),
]


def mismatched(batches: Batches) -> Batches:
    """The same queries, each beside the document of the next one."""

    def get(rows: np.ndarray) -> dict[str, Any]:
        batch = batches.get(rows)
        shifted = {"documents": {name: each.roll(1, 0) for name, each in batch["documents"].items()}}
        return batch | shifted | {"pages": torch.stack([batch["pages"][:, 0], batch["pages"][:, 1].roll(1)], 1)}

    return Batches(batches.rows, get, batch_size=batches.batch_size, seed=batches.seed)


def masked_language_model(start: Network, corpus: Dataset, steps: int, seed: int) -> Network:
    """A copy after as many steps of guessing 15 % of the tokens (all of them masked), by the inner product with the word embeddings."""
    made = start.copy()
    texts = Dataset.from_dict({"text": [f"{row['title']}\n{row['text']}" for row in corpus]})  # type: ignore[index, call-overload]
    chosen = np.random.default_rng(seed).choice(len(texts), steps * BATCH)
    mask = made.input.tokenizer.mask_token_id  # type: ignore[union-attr]

    def step(module: nn.Module, batch: dict[str, Any]) -> Tensor:
        tokens = batch["inputs"]
        guessed = (torch.rand(tokens["input_ids"].shape) < 0.15) & (tokens["input_ids"] > 103)  # 0 to 103 are special in BERT's vocabulary
        inner: Any = module.model
        states = inner(**{**tokens, "input_ids": tokens["input_ids"].masked_fill(guessed, mask)}).last_hidden_state[guessed]
        return F.cross_entropy(states @ inner.embeddings.word_embeddings.weight.T, tokens["input_ids"][guessed])

    batches = network_batches(made, texts.select(chosen), batch_size=BATCH, label=False)
    fit(made.module, batches, step, epochs=1, learning_rate=RATE, weight_decay=0.01, warmup=0.1, seed=seed)
    return made


def articles(file: str) -> Dataset:
    """Passages "title#1", ... of the articles of a part of wikitext-2; headings are left out."""
    table: dict[str, list[str]] = {"id": [], "title": [], "text": []}
    text = (Path(os.environ["WELLREAD_DATA"]) / "wikitext2" / file).read_text("utf-8")
    parts = re.split(r"^ = ([^=\n]+) = *$", text, flags=re.M)
    for title, body in zip(parts[1::2], parts[2::2], strict=True):
        lines = [line.replace(" @-@ ", "-").replace(" @,@ ", ",").strip() for line in body.splitlines() if line.strip() and not line.startswith(" =")]
        for number, passage in enumerate(pieces(lines, 80), 1):
            table["id"].append(f"{title.strip()}#{number}")
            table["title"].append("")
            table["text"].append(passage)
    return Dataset.from_dict(table)


def held_out_pairs(corpus: Dataset, seed: int = 0) -> dict[Task, Collection]:
    """Of articles that nothing was trained on: sentences as queries, searched among the same passages. ICT: the passage without the sentence is right.
    BFS: sentences of the first passage; all other passages of the article are right."""
    pages, random = Pages(corpus), np.random.default_rng(seed)
    kept = np.sort(random.permutation(len(corpus))[:SEARCHED]).tolist()
    asked = random.permutation([row for row in kept if row in set(pages.pairs["ict"][:, 0].tolist())])[:150].tolist()
    pairs = {row: pages.draw("ict", int(np.flatnonzero(pages.pairs["ict"][:, 0] == row)[0]), random, 0.0) for row in asked}
    texts = [{"id": str(row), "text": pairs[row].document if row in pairs else corpus[row]["text"]} for row in kept]
    queries = [{"id": f"q{row}", "text": pair.query} for row, pair in pairs.items()]
    ict = Collection("ict", Dataset.from_list(texts), Dataset.from_list(queries), {f"q{row}": {str(row): 1} for row in pairs})
    leads = {int(page): int(row) for page, row in zip(range(len(pages)), pages.leads, strict=True)}
    queries, right = [], {}
    for page, lead in leads.items():
        others = {str(row): 1 for row in kept if pages.which[row] == page and row != lead}
        for number, sentence in enumerate(each for each in sentences(corpus[lead]["text"]) if can_ask(each)):
            if others:
                queries.append({"id": f"q{lead}.{number}", "text": sentence.strip()})
                right[f"q{lead}.{number}"] = others
    rest = [{"id": str(row), "text": corpus[row]["text"]} for row in kept if row not in leads.values()]
    return {"ict": ict, "bfs": Collection("bfs", Dataset.from_list(rest), Dataset.from_list(queries), right)}


def main() -> None:
    note = figures = Noted()
    whole = load("minilm-l6")
    whole.input = replace(whole.input, max_length=TOKENS)  # type: ignore[type-var]
    start = shallow(whole)
    settings: dict[str, Any] = {"batch_size": BATCH, "query_tokens": 32, "passage_tokens": 48}
    asked = load_collection("cranfield")

    def value(run: Run, of: Collection = asked) -> float:
        return measure(run, of.judgements, ["nDCG@10"]).mean["nDCG@10"]

    words, first = found(start, asked, "lexical", "dense")
    note(bm25=value(words), start=value(first), all_minilm=value(*found(whole, asked, "dense")))
    pages = Pages(asked.corpus)
    for seed in SEEDS:
        print(f"seed {seed}, Cranfield", flush=True)
        batches = pair_batches(start.input, pages, ["ict"], steps=STEPS, seed=seed, **settings)  # type: ignore[arg-type]
        for arm, given in (("ict", batches), *([("placebo", mismatched(batches))] if seed == SEEDS[0] else [])):
            trained, history = learn(start, given, learning_rate=RATE, seed=seed)
            (run,) = found(trained, asked, "dense")
            note(**{arm: value(run), f"{arm}_seconds": history.seconds})
            if arm == "ict":
                note(ict_fused=value(fuse([words, run])))
        if seed == SEEDS[0]:
            note(mlm=value(*found(masked_language_model(start, asked.corpus, STEPS, seed), asked, "dense")))

    tests = held_out_pairs(articles("test.txt"))
    pages = Pages(articles("valid.txt"))
    print({task: len(each) for task, each in pages.pairs.items()}, len(pages), "articles", flush=True)
    for task, test in tests.items():
        words, first = found(start, test, "lexical", "dense")
        note(**{f"wiki_bm25_on_{task}": value(words, test), f"wiki_start_on_{task}": value(first, test)})
    for seed in SEEDS:
        print(f"seed {seed}, wikitext-2", flush=True)
        for arm, tasks in TASKS.items():
            trained, _ = learn(
                start, pair_batches(start.input, pages, tasks, steps=WIKI_STEPS, seed=seed, **settings), learning_rate=RATE, seed=seed  # type: ignore[arg-type]
            )  # fmt: skip
            note(**{f"wiki_{arm}_on_{task}": value(found(trained, test, "dense")[0], test) for task, test in tests.items()})
    for arm in ("ict", "bfs"):
        for task in tests:
            note(**{f"mean_{arm}_on_{task}": float(np.mean(figures[f"wiki_{arm}_on_{task}"]))})
    if QUICK:
        return
    ours = ("ict", "wiki_ict", "wiki_bfs", "wiki_both", "mean_")
    record(
        "inverse-cloze",
        figures={name: values for name, values in figures.items() if name.startswith(ours)},
        baselines={name: values for name, values in figures.items() if not name.startswith(ours)},
        expects=EXPECTS,
        claims_tested=[CLAIM],
        sizes={
            "documents": len(asked.corpus), "queries": len(asked.judgements), "tokens_of_a_document": TOKENS, "steps": STEPS, "batch": BATCH,
            "articles": len(pages), "steps_on_articles": WIKI_STEPS, "network": "all-MiniLM-L6-v2, its first two layers",
        },
        seeds=SEEDS,
        notes=[
            "nDCG@10; Cranfield's queries and the articles of the held-out pairs were in no training; all codes of the judgements count as relevant",
            "documents are read to 64 tokens by every encoder and whole by BM25, which is kind to BM25",
            "the start's two layers come from a model that was trained on labelled pairs; all_minilm is that model",
            "masked language modelling and the placebo, which are controls, were run with the first seed only",
            "in training, queries have at most 32 tokens and passages 48",
            "link prediction is not measured: no linked documents were at hand; learning rate and steps are those of bench/contriever.py",
            "mean_ict_on_bfs: the encoder trained by ICT, judged on BFS pairs, mean over the seeds",
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
