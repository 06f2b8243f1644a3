"""The index: building, killing, changing, searching, and what it refuses."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

import wellread
from wellread import index as module
from wellread.errors import BadInput
from wellread.families import Transformer
from wellread.index import Index, encode
from wellread.inputs import TextInput
from wellread.network import Network
from wellread.remote import QdrantIndex, encode_with_ray
from wellread.words import excerpt, words

SUBJECTS = ("bread", "turbine", "harbour", "violin", "glacier", "comet", "granite", "orchid", "ledger", "falcon")


def tiny(seed: int = 0) -> Network:
    """A transformer of one layer with random weights: texts that share words are near each other, and that is all it knows."""
    config = {
        "model_type": "bert", "vocab_size": 30522, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
        "max_position_embeddings": 64,
    }  # fmt: skip
    torch.manual_seed(seed)
    architecture = {"family": "transformers", "auto": "AutoModel", "config": config, "pooling": "mean", "normalize": False}
    found = Transformer("AutoModel", config)
    return Network(found, TextInput(wellread.load("minilm-l6").input.tokenizer, 64), "head", None, "embedding", architecture)


@pytest.fixture(scope="module")
def encoder() -> Network:
    return tiny()


def passages(count: int, start: int = 0) -> Dataset:
    ids = range(start, start + count)
    texts = [f"The {SUBJECTS[n % 10]} number {n} of the {SUBJECTS[n // 10 % 10]}." for n in ids]
    return Dataset.from_dict({"id": [f"p{n}" for n in ids], "title": [SUBJECTS[n % 10] for n in ids], "text": texts})


def exact(network: Network, data: Dataset, queries: list[str], k: int) -> list[list[str]]:
    texts = [f"{row['title']}\n{row['text']}" for row in data]
    vectors, wanted = encode(network, texts), encode(network, queries)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return [[data["id"][row] for row in np.argsort(-(vectors @ q), kind="stable")[:k]] for q in wanted]


def ids(hits: list[Any]) -> list[str]:
    return [hit.id for hit in hits]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of 64 rows, commits after 16."""
    monkeypatch.setattr(module, "SEGMENT", 64)
    monkeypatch.setattr(module, "CHUNK", 16)


# --- building and searching


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_dense_search_over_segments_is_exact_search(encoder: Network, tmp_path: Path, small: None, kind: Any) -> None:
    data = passages(150)
    made = Index.build(encoder, data, tmp_path / "idx", kind=kind)
    assert len(made) == 150 and len(list((tmp_path / "idx" / "segments").iterdir())) == 3
    queries = ["bread of the comet", "granite number 77"]
    for index in (made, Index.open(tmp_path / "idx", encoder)):
        assert [ids(each) for each in index.search(queries, 7, "dense")] == exact(encoder, data, queries, 7)
    best = made.search(data[77]["title"] + "\n" + data[77]["text"], 1, "dense")[0]
    assert (best.id, best.title, best.text, best.ranks) == ("p77", data[77]["title"], data[77]["text"], {"dense": 1})
    assert best.score == pytest.approx(1, abs=1e-5)


def test_scores_are_dot_products_when_asked(encoder: Network, tmp_path: Path) -> None:
    data = passages(5)
    made = Index.build(encoder, data, tmp_path / "idx", score="dot", lexical=False)
    q = encode(encoder, ["bread"])[0]
    vectors = encode(encoder, [f"{row['title']}\n{row['text']}" for row in data])
    assert [hit.score for hit in made.search("bread", 5, "dense")] == pytest.approx(sorted((vectors @ q).tolist(), reverse=True), rel=1e-5)


def test_lexical_search_is_bm25(encoder: Network, tmp_path: Path) -> None:
    """Against Robertson's formula in the form of Lucene, by hand."""
    texts = ["running dogs run", "a dog sleeps", "the cat and the dog and the bird sing songs", "nothing"]
    made = Index.build(encoder, texts, tmp_path / "idx")
    split = [["run", "dog", "run"], ["dog", "sleep"], ["cat", "dog", "bird", "sing", "song"], ["noth"]]
    assert [words("en")(text) for text in texts] == split
    mean = np.mean([len(each) for each in split])

    def bm25(query: list[str], document: list[str]) -> float:
        total = 0.0
        for word in query:
            df, tf = sum(word in each for each in split), document.count(word)
            total += np.log(1 + (4 - df + 0.5) / (df + 0.5)) * tf / (tf + 1.2 * (1 - 0.75 + 0.75 * len(document) / mean))
        return total

    expected = {str(n): bm25(["run", "dog"], each) for n, each in enumerate(split)}
    found = {hit.id: hit.score for hit in made.search("The runs of a DOG", 10, "lexical")}
    assert found == pytest.approx({name: score for name, score in expected.items() if score > 0}, rel=1e-5)
    assert made.search("zebra", mode="lexical") == []


def test_hybrid_is_reciprocal_rank_fusion(encoder: Network, tmp_path: Path) -> None:
    made = Index.build(encoder, passages(60), tmp_path / "idx")
    query = "the orchid number 17"
    dense, lexical = (ids(made.search(query, 60, mode)) for mode in ("dense", "lexical"))  # type: ignore[arg-type]
    for hit in made.search(query, 60):
        ranks = {name: places.index(hit.id) + 1 for name, places in (("dense", dense), ("lexical", lexical)) if hit.id in places}
        assert hit.ranks == ranks
        assert hit.score == pytest.approx(sum(1 / (60 + rank) for rank in ranks.values()))


def test_a_run_is_what_ranking_measures(encoder: Network, tmp_path: Path) -> None:
    from wellread import ranking

    made = Index.build(encoder, passages(30), tmp_path / "idx")
    run = made.run(Dataset.from_dict({"id": ["q1", "q2"], "text": ["number 7", "number 23"]}), k=5, mode="lexical")
    assert set(run) == {"q1", "q2"} and max(run["q1"], key=run["q1"].get) == "p7" and max(run["q2"], key=run["q2"].get) == "p23"  # type: ignore[arg-type]
    ranking.fuse([run, run])


def test_a_saved_index_is_searched_in_a_new_process_by_name(tmp_path: Path) -> None:
    encoder = tiny(1)
    encoder.save(tmp_path / "enc")
    made = Index.build(tmp_path / "enc", passages(20), tmp_path / "idx")
    code = f"from wellread.index import Index; print([h.id for h in Index.open({str(tmp_path / 'idx')!r}).search('falcon', 5)])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == str(ids(made.search("falcon", 5))), done.stderr


def test_minilm_finds_by_meaning(tmp_path: Path) -> None:
    texts = ["Cats are small felines kept as pets.", "The stock market fell sharply.", "Bread is baked from flour and water."]
    made = Index.build("minilm-l6", texts, tmp_path / "idx")
    assert made.search("how is a loaf made", 1, "dense")[0].id == "2"
    assert made.search("kitten", 1)[0].id == "0"


# --- memory


def test_segments_are_mapped_and_not_read(encoder: Network, tmp_path: Path) -> None:
    made = Index.build(encoder, passages(50), tmp_path / "idx")
    made.search("comet")
    with open("/proc/self/maps") as maps:
        mapped = maps.read()
    file = next((tmp_path / "idx" / "segments").iterdir())
    assert str(file) in mapped
    assert isinstance(made._words().scores["data"], np.memmap)


def test_memory_does_not_grow_with_the_corpus(encoder: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SEGMENT", 1024)
    monkeypatch.setattr(
        module, "encode", lambda network, texts, batch_size=64: np.ones((len(texts), 16), np.float32)
    )  # the network is not the question
    monkeypatch.setattr(module, "_warn_unknown", lambda *_: None)

    def stream(count: int) -> Iterator[dict[str, str]]:
        for number in range(count):
            yield {"id": str(number), "title": "", "text": f"passage {number} " + "words and more words " * 40}

    def peak(count: int) -> int:
        gc.collect()
        tracemalloc.start()
        Index.build(encoder, stream(count), tmp_path / f"idx{count}", lexical=False).close()
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(600)
    few, many = peak(2_000), peak(20_000)  # 18 MB of text
    assert many < 1.2 * few + 1e6


# --- interruption


KILLED = """
import sys, time
from wellread import index
index.CHUNK, index.SEGMENT = 8, 64
real = index.encode
index.encode = lambda *given: (time.sleep(0.05), real(*given))[1]
import test_index
index.Index.build(sys.argv[1], test_index.passages(400), sys.argv[2])
"""


def test_a_killed_build_goes_on_and_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = tiny()
    encoder.save(tmp_path / "enc")
    place = tmp_path / "idx"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])}
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "enc"), str(place)], env=environment, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None and len(list(place.glob("segments/*.faiss"))) < 2:
        time.sleep(0.02)
    assert process.poll() is None, "it ended before it could be killed"
    with pytest.raises(BadInput, match="another process is writing"):
        Index.build(encoder, passages(400), place)
    process.send_signal(signal.SIGKILL)
    process.wait()

    half = Index.open(place, encoder)
    with pytest.warns(UserWarning, match=r"not finished: dense search sees \d+ of 400 passages"):
        assert half.search("comet", 3)[0].ranks
    half.close()
    with open(place / "segments" / "pending.f32", "ab") as torn:
        torn.write(b"torn")
    encoded: list[int] = []
    monkeypatch.setattr(module, "CHUNK", 8)
    monkeypatch.setattr(module, "SEGMENT", 64)
    monkeypatch.setattr(module, "encode", lambda network, texts, batch_size=64: (encoded.append(len(texts)), encode(network, texts, batch_size))[1])
    made = Index.build(tmp_path / "enc", passages(400), place)
    assert 0 < sum(encoded) <= 400 - 128
    whole = Index.build(encoder, passages(400), tmp_path / "whole")
    queries = ["bread of the comet", "granite number 77"]
    assert [[h.to_dict() for h in each] for each in made.search(queries, 9)] == [[h.to_dict() for h in each] for each in whole.search(queries, 9)]
    encoded.clear()
    Index.build(encoder, passages(400), place)
    assert not encoded  # a finished one is left as it is


# --- changing


def test_add_delete_update_and_compact(encoder: Network, tmp_path: Path, small: None) -> None:
    made = Index.build(encoder, passages(100), tmp_path / "idx")
    made.add(passages(30, start=100))
    both = passages(130)
    queries = ["violin of the glacier", "ledger number 111"]
    assert [ids(each) for each in made.search(queries, 9, "dense")] == exact(encoder, both, queries, 9)
    assert made.search("ledger number 111", 1, "lexical")[0].text.startswith("The turbine number 111")

    gone = [f"p{n}" for n in (3, 70, 111)]
    made.delete(gone)
    stays = both.filter(lambda row: row["id"] not in gone)
    for mode in ("dense", "lexical", "hybrid"):
        assert not set(gone) & {hit.id for each in made.search([*queries, "number 3", "number 70"], 130, mode) for hit in each}  # type: ignore[arg-type]
    assert [ids(each) for each in made.search(queries, 9, "dense")] == exact(encoder, stays, queries, 9)
    assert len(made) == 127 and made._total() == 130

    made.compact()
    assert len(made) == made._total() == 127
    assert [ids(each) for each in made.search(queries, 9, "dense")] == exact(encoder, stays, queries, 9)
    again = Index.open(tmp_path / "idx", encoder)
    assert [ids(each) for each in again.search(queries, 9)] == [ids(each) for each in made.search(queries, 9)]
    files = {file.name for file in (tmp_path / "idx" / "segments").iterdir()}
    assert files == {file for (file,) in made.database.execute("SELECT file FROM segments")}

    made.add(passages(1, start=3))  # a deleted id is free again
    assert made.search("number 3", 1, "lexical")[0].id == "p3"


def test_many_deletions_and_many_small_additions_are_tidied_up(encoder: Network, tmp_path: Path, small: None) -> None:
    made = Index.build(encoder, passages(100), tmp_path / "idx")
    made.delete([f"p{n}" for n in range(40)])
    assert made._total() == 60
    for n in range(15):
        made.add(passages(1, start=200 + n))
    assert len(made) == 75 and made._one("SELECT count(*) FROM segments") <= module.SMALL + 3
    data = Dataset.from_list([*passages(100).select(range(40, 100)), *passages(15, start=200)])
    assert ids(made.search("harbour number 207", 9, "dense")) == exact(encoder, data, ["harbour number 207"], 9)[0]
    made.delete(list(data["id"]))
    assert len(made) == 0
    with pytest.raises(BadInput, match="holds no passages"):
        made.search("anything")
    made.add(passages(3))
    assert len(made.search("bread", 5)) == 3


def test_update_encodes_only_what_changed(encoder: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Index.build(encoder, passages(50), tmp_path / "idx")
    rows = list(passages(52).select(range(2, 52)))  # p0 and p1 vanish, p50 and p51 are new
    rows[10]["text"] = "A marmalade recipe."
    encoded: list[str] = []
    monkeypatch.setattr(module, "encode", lambda network, texts, batch_size=64: (encoded.extend(texts), encode(network, texts, batch_size))[1])
    with pytest.raises(BadInput, match="--update"):
        Index.build(encoder, rows, tmp_path / "idx")
    updated = Index.build(encoder, rows, tmp_path / "idx", update=True)
    assert len(encoded) == 3 and len(updated) == 50
    assert updated.search("marmalade", 1, "lexical")[0].id == "p12"
    assert not {"p0", "p1"} & set(ids(updated.search("bread turbine", 50, "dense")))
    assert len(made) == 50


# --- refusals


def test_another_encoder_is_refused(encoder: Network, tmp_path: Path) -> None:
    Index.build(encoder, passages(5), tmp_path / "idx")
    for act in (
        lambda: Index.open(tmp_path / "idx", tiny(7)),
        lambda: Index.build(tiny(7), passages(5), tmp_path / "idx"),
    ):
        with pytest.raises(BadInput, match="whose vectors cannot be compared"):
            act()
    with pytest.raises(BadInput, match="has no name"):
        Index.open(tmp_path / "idx").search("bread")
    assert Index.open(tmp_path / "idx").search("bread", mode="lexical")  # words need no encoder


def test_an_encoder_that_changed_in_its_place_is_refused(tmp_path: Path) -> None:
    tiny(1).save(tmp_path / "enc")
    Index.build(tmp_path / "enc", passages(5), tmp_path / "idx")
    tiny(2).save(tmp_path / "enc", force=True)
    with pytest.raises(BadInput, match="whose vectors cannot be compared"):
        Index.open(tmp_path / "idx").search("bread")


def test_bad_input_is_refused_and_leaves_nothing(encoder: Network, tmp_path: Path) -> None:
    place = tmp_path / "idx"
    twice = [{"id": "a", "text": "x"}, {"id": "a", "text": "y"}]
    for corpus, settings, why in (
        (twice, {}, "the id 'a' more than once"),
        ([{"id": "a", "text": " "}], {}, "holds no text"),
        (passages(3), {"kind": "tree"}, "choose flat or hnsw"),
        (passages(3), {"language": "xx"}, "the language 'xx' is not known"),
        ("folder:nowhere", {}, "no folder"),
    ):
        with pytest.raises(BadInput, match=why):
            Index.build(encoder, corpus, place, **settings)
        assert not place.exists()
    with pytest.raises(BadInput, match="this network gives"):
        Index.build(wellread.load("timm/test_vit", pretrained=False), passages(3), place)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(BadInput, match="not empty and holds no index"):
        Index.build(encoder, passages(3), tmp_path / "mine")
    with pytest.raises(BadInput, match="holds no index"):
        Index.open(tmp_path / "mine")

    made = Index.build(encoder, passages(3), place, lexical=False)
    for call, why in (
        (lambda: made.search(" "), "query is empty"),
        (lambda: made.search("x", 0), "at least 1"),
        (lambda: made.search("x", mode="other"), "choose hybrid"),
        (lambda: made.search("x", mode="lexical"), "built without words"),
        (lambda: made.add(passages(3)), "holds a passage 'p0' already"),
        (lambda: made.delete(["p1", "p9"]), "holds no passage 'p9'"),
        (lambda: Index.build(encoder, passages(3), place), "with lexical False, not True"),
        (lambda: Index.build(encoder, passages(3), place, lexical=False, kind="hnsw"), "with kind flat, not hnsw"),
    ):
        with pytest.raises(BadInput, match=why):
            call()
    assert len(made) == 3
    next((place / "segments").iterdir()).write_bytes(b"damaged")
    with pytest.raises(BadInput, match="missing or damaged"):
        Index.open(place, encoder).search("x")
    (place / "index.json").write_text(json.dumps({**made.settings, "format": 2}))
    with pytest.raises(BadInput, match="newer wellread"):
        Index.open(place)


def test_empty_documents_are_counted(encoder: Network, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="2 of the documents hold no text"):
        assert len(Index.build(encoder, [{"id": "a", "text": "x"}, {"id": "b", "text": None}, {"id": "c", "text": " \n"}], tmp_path / "idx")) == 1


def test_an_unseen_script_is_said(encoder: Network, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="of the tokens of the passages"):
        made = Index.build(encoder, ["ሰላም ለዓለም ይሁን", "ጤና ይስጥልኝ ወዳጄ"], tmp_path / "idx")
    with pytest.warns(UserWarning, match="of the tokens of the queries"):
        assert made.search("ሰላም", 2, "dense")
    assert made.search("ሰላም", mode="lexical")[0].id == "0"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.search("plain English", mode="dense")


# --- words


def test_words_of_other_languages() -> None:
    assert words("de")("Die Häuser und das Haus") == ["haus", "haus"]
    assert words(None)("Die Häuser_und 3 Hunde!") == ["die", "häuser", "und", "3", "hunde"]
    assert words(None)("東京タワー is 高い") == [*"東京タワー", "is", *"高い"]
    assert words("fi")("talossa") == words("fi")("talo")


def test_excerpt_shows_the_words_where_they_are() -> None:
    text = "filler " * 100 + "the Runner was running home" + " filler" * 100
    found = excerpt(text, "run home", "en", lambda word: f"[{word}]", length=12)
    assert "[running] [home]" in found and "[Runner]" not in found.replace("[Runner]", "") and found.startswith("… ") and found.endswith(" …")
    assert len(found.split()) <= 14
    assert excerpt("short text.", "zebra", "en", str.upper) == "short text."
    assert excerpt("—", "zebra", "en", str.upper) == "—"


# --- past one machine


def test_qdrant_gives_what_the_index_gives(encoder: Network, tmp_path: Path) -> None:
    data = passages(40)
    near = Index.build(encoder, data, tmp_path / "idx", lexical=False)
    far = QdrantIndex(encoder, str(tmp_path / "qdrant"))
    far.add(data)
    queries = ["violin of the glacier", "ledger"]
    assert len(far) == 40
    assert [ids(each) for each in far.search(queries, 6)] == [ids(each) for each in near.search(queries, 6, "dense")]
    here, there = near.search("ledger", 1)[0], far.search("ledger", 1)[0]
    assert (there.title, there.text, there.ranks) == (here.title, here.text, here.ranks) and there.score == pytest.approx(here.score, rel=1e-5)
    best = far.search("ledger", 1)[0].id
    far.delete([best])
    assert best not in ids(far.search("ledger", 40)) and len(far) == 39
    far.client.close()
    with pytest.raises(BadInput, match="another encoder"):
        QdrantIndex(tiny(7), str(tmp_path / "qdrant"))


def test_ids_that_no_database_takes_are_taken(encoder: Network) -> None:
    far = QdrantIndex(encoder)
    far.add([{"id": "a/b.md#1", "title": "", "text": "bread"}, {"id": "a/b.md#1", "title": "", "text": "comet"}])
    assert [(hit.id, hit.text) for hit in far.search("x", 5)] == [("a/b.md#1", "comet")]
    far.client.close()


@pytest.mark.slow
def test_ray_encodes_what_the_index_encodes(tmp_path: Path) -> None:
    import ray

    encoder = tiny()
    encoder.save(tmp_path / "enc")
    data = passages(30)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        rows = sorted(encode_with_ray(tmp_path / "enc", data, tmp_path / "parts").take_all(), key=lambda row: int(row["id"][1:]))
    finally:
        ray.shutdown()
    expected = encode(encoder, [f"{row['title']}\n{row['text']}" for row in data])
    np.testing.assert_allclose(np.stack([row["vector"] for row in rows]), expected, atol=1e-5)
    far = QdrantIndex(encoder)
    far.add(rows)
    assert len(far) == 30 and ids(far.search("ledger", 5)) == exact(encoder, data, ["ledger"], 5)[0]
    far.client.close()
