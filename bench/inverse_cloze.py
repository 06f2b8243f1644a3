"""ICT, BFS and WLP: the first two layers of all-MiniLM-L6-v2, trained on documents alone.

    WELLREAD_DATA=... python -m bench.inverse_cloze [--quick]

Cranfield's abstracts have sentences and no sections: ICT against no training, masked language modelling and a placebo (sentences of other documents), judged
by the queries and judgements of people, with BM25 and BM25 fused with ICT beside them. The library reference of Python has sections and links: each
task and all three, judged on pairs of each task from pages that nothing was trained on. Its HTML pages come with Debian's python3.11-doc; WELLREAD_DOCS
names their folder where it is another.
--quick tries it out in a few steps and records nothing.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn

from bench.contriever import found, shallow
from bench.harness import Expect, Noted, record
from wellread import Network, load, runtime
from wellread.batches import Batches, network_batches
from wellread.data import subset
from wellread.documents import from_folder, rows
from wellread.judged import Collection, load_collection
from wellread.masked import TiedHead, guessing_loss, masked
from wellread.ranking import Run, fuse, measure
from wellread.retrieve.inverse_cloze import Pages, Task, can_ask, cloze, learn, pair_batches, sentences
from wellread.retrieve.spans import whole
from wellread.train import fit

QUICK = "--quick" in sys.argv
SEEDS = [0] if QUICK else [0, 1, 2]
STEPS, LINKED_STEPS, TOKENS = (2, 2, 32) if QUICK else (80, 32, 128)
BATCH, RATE = 32, 3e-4
SEARCHED, ASKED = (60, 20) if QUICK else (400, 100)
LENGTHS: dict[str, Any] = {"query_tokens": 32, "passage_tokens": 64}
TASKS: dict[str, list[Task]] = {"ict": ["ict"], "bfs": ["bfs"], "wlp": ["wlp"], "all": ["ict", "bfs", "wlp"]}
CLAIM = "tasks made of paragraphs teach a two-tower encoder to search, where masked language modelling does not; several tasks together are the better choice"

EXPECTS = [
    Expect("on Cranfield ICT is at least 0.05 nDCG@10 above no training in every seed", "min(ict) - start", 0.05),
    Expect("ICT is at least 0.05 above as many steps of masked language modelling in every seed", "min(ict - mlm)", 0.05),
    Expect("sentences paired with other documents do not gain 0.05", "placebo - start", 0.05, at_least=False),
    *(
        Expect(f"linked pages: all tasks together are within 0.02 of the best single one on held-out {task.upper()} pairs",
               f"docs_all_on_{task} - max((mean_ict_on_{task}, mean_bfs_on_{task}, mean_wlp_on_{task}))", -0.02)
        for task in ("ict", "bfs", "wlp")
    ),
    *(Expect(f"linked pages: {task.upper()} alone is above no training on its own held-out pairs in every seed", f"min(docs_{task}_on_{task} - docs_start_on_{task})", 0.0)
      for task in ("ict", "bfs", "wlp")),
    Expect("linked pages: ICT is the strongest single task, mean over the three kinds of pairs", "mean_ict - max((mean_bfs, mean_wlp))", 0.0),
]


def mismatched(batches: Batches) -> Batches:
    """The same queries, each beside the document of the next one."""

    def get(rows: np.ndarray) -> dict[str, Any]:
        batch = batches.get(rows)
        shifted = {"documents": {name: each.roll(1, 0) for name, each in batch["documents"].items()}}
        return batch | shifted | {"pages": torch.stack([batch["pages"][:, 0], batch["pages"][:, 1].roll(1)], 1)}

    return Batches(batches.rows, get, batch_size=batches.batch_size, seed=batches.seed)


def masked_language_model(start: Network, corpus: Dataset, seed: int) -> Network:
    """A copy after as many steps of guessing hidden words, with a new head."""
    made = start.copy()
    texts = Dataset.from_dict({"text": [whole(passage) for passage in rows(corpus)]})
    chosen = np.random.default_rng(seed).choice(len(texts), STEPS * BATCH)
    torch.manual_seed(seed)
    both = nn.ModuleDict({"encoder": made.module, "head": TiedHead.of(made.module)})

    def step(module: nn.Module, batch: dict[str, Any]) -> Tensor:
        return guessing_loss(module["encoder"], module["head"], *masked(batch["inputs"], made.input.tokenizer))  # type: ignore[index, union-attr]

    batches = network_batches(made, texts.select(chosen), batch_size=BATCH, label=False)
    with runtime.using(precision="bfloat16"):
        fit(both, batches, step, epochs=1, learning_rate=RATE, weight_decay=0.01, warmup=0.1, seed=seed)
    return made


def reference() -> tuple[Dataset, Dataset]:
    """The passages of three quarters of the pages, and of the others."""
    folder = Path(os.environ.get("WELLREAD_DOCS", "/usr/share/doc/python3.11/html/library"))
    if not folder.is_dir():
        raise SystemExit(f"{folder} is not there: install Debian's python3.11-doc, or let WELLREAD_DOCS name the folder of linked HTML pages")
    pages = from_folder(folder)
    names = np.array([name.rpartition("#")[0] for name in pages["id"]])
    chosen = np.random.default_rng(0).permutation(np.unique(names))
    away = np.isin(names, chosen[: len(chosen) // 4])
    return subset(pages, np.flatnonzero(~away)), subset(pages, np.flatnonzero(away))


def held_out_pairs(corpus: Dataset, seed: int = 0) -> dict[Task, Collection]:
    """Sentences as queries, searched among some of the passages, titles left out. ICT: right is the passage that the sentence was taken out of.
    BFS: the other passages of the page whose first passage it is from. WLP: passages of other pages that link to that page."""
    pages, random = Pages(corpus), np.random.default_rng(seed)
    follow = np.setdiff1d(np.arange(len(corpus)), pages.leads)
    kept = {int(row) for row in random.permutation(follow)[:SEARCHED]}
    ict = [number for number, (row, _) in enumerate(pages.pairs["ict"]) if int(row) in kept]
    pairs = [pages.draw("ict", int(number), random, 0.0) for number in random.permutation(ict)[:ASKED]]
    texts = {row: str(text).removeprefix(str(title)).strip() for row, title, text in zip(range(len(corpus)), corpus["title"], corpus["text"], strict=True)}
    without = {pair.document_row: cloze(sentences(texts[pair.document_row]), pair.sentence)[1] for pair in pairs}
    asked: dict[Task, list[tuple[str, set[int]]]] = {"ict": [(pair.query, {pair.document_row}) for pair in pairs], "bfs": [], "wlp": []}
    for page, lead in enumerate(pages.leads.tolist()):
        right: dict[Task, set[int]] = {"bfs": set(pages.order[pages.starts[page] : pages.starts[page + 1]].tolist())}
        right["wlp"] = set(pages.pairs["wlp"][pages.pairs["wlp"][:, 0] == lead, 1].tolist())
        able = [sentence.strip() for sentence in sentences(texts[lead]) if can_ask(sentence)]
        for task in ("bfs", "wlp"):
            if able and right[task] & kept:
                asked[task] += [(str(sentence), right[task] & kept) for sentence in random.permutation(able)[:3]]
    found = {}
    for task, queries in asked.items():
        chosen = [queries[number] for number in random.permutation(len(queries))[:ASKED]]
        table = [{"id": str(row), "text": without.get(row, texts[row]) if task == "ict" else texts[row]} for row in sorted(kept)]
        named = [{"id": f"q{number}", "text": text} for number, (text, _) in enumerate(chosen)]
        judged = {f"q{number}": {str(row): 1 for row in right} for number, (_, right) in enumerate(chosen)}
        found[task] = Collection(task, Dataset.from_list(table), Dataset.from_list(named), judged)
    return found


def main() -> None:
    note = figures = Noted()
    start = load("minilm-l6")
    start.input = replace(start.input, max_length=TOKENS)  # type: ignore[type-var]
    start = shallow(start)
    asked = load_collection("cranfield")

    def value(run: Run, of: Collection = asked) -> float:
        return measure(run, of.judgements, ["nDCG@10"]).mean["nDCG@10"]

    words, first = found(start, asked, "lexical", "dense")
    note(bm25=value(words), start=value(first))
    pages = Pages(asked.corpus)
    for seed in SEEDS:
        print(f"seed {seed}, Cranfield", flush=True)
        batches = pair_batches(start.input, pages, ["ict"], steps=STEPS, batch_size=BATCH, seed=seed, **LENGTHS)  # type: ignore[arg-type]
        for arm, given in (("ict", batches), *([("placebo", mismatched(batches))] if seed == SEEDS[0] else [])):
            with runtime.using(precision="bfloat16"):
                trained, history = learn(start, given, learning_rate=RATE, seed=seed)
            (run,) = found(trained, asked, "dense")
            note(**{arm: value(run), f"{arm}_seconds": history.seconds})
            if arm == "ict":
                note(ict_fused=value(fuse([words, run])))
        if seed == SEEDS[0]:
            note(mlm=value(found(masked_language_model(start, asked.corpus, seed), asked, "dense")[0]))

    training, away = reference()
    tests, pages = held_out_pairs(away), Pages(training)
    print({task: len(each) for task, each in pages.pairs.items()}, len(pages), "pages", {task: len(each.queries) for task, each in tests.items()}, flush=True)
    for task, test in tests.items():
        words, first = found(start, test, "lexical", "dense")
        note(**{f"docs_bm25_on_{task}": value(words, test), f"docs_start_on_{task}": value(first, test)})
    for seed in SEEDS:
        print(f"seed {seed}, linked pages", flush=True)
        for arm, tasks in TASKS.items():
            batches = pair_batches(start.input, pages, tasks, steps=LINKED_STEPS, batch_size=BATCH, seed=seed, **LENGTHS)  # type: ignore[arg-type]
            with runtime.using(precision="bfloat16"):
                trained, _ = learn(start, batches, learning_rate=RATE, seed=seed)
            note(**{f"docs_{arm}_on_{task}": value(found(trained, test, "dense")[0], test) for task, test in tests.items()})
    for arm in TASKS:
        means = {f"mean_{arm}_on_{task}": float(np.mean(figures[f"docs_{arm}_on_{task}"])) for task in tests}
        note(**means, **{f"mean_{arm}": float(np.mean(list(means.values())))})
    if QUICK:
        return
    ours = ("ict", *(f"docs_{arm}_" for arm in TASKS), "mean_")
    record(
        "inverse-cloze",
        figures={name: values for name, values in figures.items() if name.startswith(ours)},
        baselines={name: values for name, values in figures.items() if not name.startswith(ours)},
        expects=EXPECTS,
        claims_tested=[CLAIM],
        sizes={
            "documents": len(asked.corpus), "queries": len(asked.judgements), "tokens_of_a_document": TOKENS, "steps": STEPS, "batch": BATCH,
            "linked_pages": len(pages), "their_passages": len(training), "steps_on_them": LINKED_STEPS, "searched": SEARCHED, "asked": ASKED, "network": "all-MiniLM-L6-v2, its first two layers",
        },
        seeds=SEEDS,
        notes=[
            "nDCG@10; Cranfield's queries and the pages of the held-out pairs were in no training; all codes of the judgements count as relevant",
            "documents are read to 128 tokens by every encoder and whole by BM25, which is kind to BM25",
            "the start's two layers come from a model that was trained on labelled pairs; all six layers of it are in the result of contriever",
            "masked language modelling and the placebo, which are controls, were run with the first seed only",
            "in training, queries have at most 32 tokens and passages 64, and the arithmetic is bfloat16",
            "learning rate and steps are those of bench/contriever.py, chosen without the judged queries; with all tasks each gets a third of the steps",
            "linked pages: the library reference of Python 3.11; texts are searched without their titles; a passage counts as linking when it holds the words of the link",
            "mean_ict_on_bfs: the encoder trained by ICT, judged on BFS pairs, mean over the seeds; mean_ict: over the three kinds of pairs",
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
