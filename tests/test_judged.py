"""Test collections read from BEIR folders and from Cranfield's files, with their traps."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import pytest
from datasets import Dataset

from wellread.errors import BadInput
from wellread.judged import Collection, load_collection, read_judgements

DOCUMENTS = [{"_id": f"d{n}", "title": f"title {n}", "text": f"text {n}"} for n in range(4)]
QUERIES = [{"_id": f"q{n}", "text": f"question {n}"} for n in range(3)]
HEADER = "query-id\tcorpus-id\tscore\n"


@pytest.fixture
def beir(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    (folder / "qrels").mkdir(parents=True)
    for name, rows in (("corpus", DOCUMENTS), ("queries", QUERIES)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "qrels" / "test.tsv").write_text(HEADER + "q0\td1\t2\nq0\td2\t0\nq2\td3\t1\n")
    (folder / "qrels" / "dev.tsv").write_text(HEADER + "q1\td0\t1\n")
    return folder


def test_a_beir_folder(beir: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = load_collection(f"beir:{beir}")
    assert found.judgements == {"q0": {"d1": 2, "d2": 0}, "q2": {"d3": 1}}
    assert found.corpus["id"][:] == ["d0", "d1", "d2", "d3"] and found.corpus[1]["title"] == "title 1" and found.corpus[1]["text"] == "text 1"
    assert list(found.queries["id"]) == ["q0", "q2"] and list(found.queries["text"]) == ["question 0", "question 2"]  # q1 is judged in dev
    assert found.warnings == [] and found.name == "tiny:test"
    assert load_collection(f"beir:{beir}:dev").judgements == {"q1": {"d0": 1}}


def test_a_changed_file_is_read_again(beir: Path) -> None:
    load_collection(f"beir:{beir}")
    with open(beir / "corpus.jsonl", "a") as lines:
        lines.write(json.dumps({"_id": "new", "text": "new"}) + "\n")
    found = load_collection(f"beir:{beir}").corpus
    assert len(found) == 5 and found[4]["id"] == "new"


def test_a_folder_by_name(beir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WELLREAD_DATA", str(beir.parent))
    assert load_collection("tiny").judgements == load_collection(f"beir:{beir}").judgements
    assert load_collection("tiny:dev").name == "tiny:dev"
    with pytest.raises(BadInput, match="no judgements 'train'.*dev, test"):
        load_collection("tiny:train")
    with pytest.raises(BadInput, match="no test collection 'tinny'"):
        load_collection("tinny")
    monkeypatch.delenv("WELLREAD_DATA")
    with pytest.raises(BadInput, match="set WELLREAD_DATA"):
        load_collection("tiny")


def test_the_only_split_needs_no_name(beir: Path) -> None:
    (beir / "qrels" / "test.tsv").unlink()
    assert load_collection(f"beir:{beir}").name == "tiny:dev"
    (beir / "qrels" / "train.tsv").write_text(HEADER + "q1\td0\t1\n")
    with pytest.raises(BadInput, match="dev, train; name one"):
        load_collection(f"beir:{beir}")


def test_judgements_of_unknown_ids_are_counted_and_said(beir: Path) -> None:
    (beir / "qrels" / "test.tsv").write_text(HEADER + "q0\td1\t1\nq0\tgone\t1\nq2\tgone\t1\nq2\tlost\t0\nq9\td1\t1\nq9\td2\t1\n")
    with pytest.warns(UserWarning) as said:
        found = load_collection(f"beir:{beir}")
    documents, queries = found.warnings
    assert "unknown documents" in documents and "3 of 6" in documents and "'gone'" in documents
    assert "unknown queries" in queries and "2 of 6" in queries and "'q9'" in queries
    assert [str(each.message) for each in said] == [f"tiny:test: {each}" for each in found.warnings]
    assert found.judgements == {"q0": {"d1": 1, "gone": 1}, "q2": {"gone": 1, "lost": 0}}  # not found, as for trec_eval


def test_what_does_not_belong_together_is_refused() -> None:
    corpus, queries = Dataset.from_dict({"id": ["d"], "text": ["t"]}), Dataset.from_dict({"id": ["q"], "text": ["t"]})
    assert Collection("mine", corpus, queries, {"q": {"d": 1}}).queries["id"][:] == ["q"]
    with pytest.raises(BadInput, match="do not belong together"):
        Collection("mine", corpus, queries, {"other": {"d": 1}})
    with pytest.raises(BadInput, match="queries of mine has no column 'text'"):
        Collection("mine", corpus, queries.remove_columns("text"), {"q": {"d": 1}})
    with pytest.raises(BadInput, match="1 queries with the id of another"):
        Collection("mine", corpus, Dataset.from_dict({"id": ["q", "q"], "text": ["t", "u"]}), {"q": {"d": 1}})


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("corpus.jsonl", '{"_id": "a", "text": "b"}\n{"_id": "c"\n', "line 2"),
        ("corpus.jsonl", '{"_id": "a", "text": "b"}\n{"_id": "a", "text": "c"}\n', "'a' more than once"),
        ("qrels/test.tsv", HEADER + "q0\td1\t1\nq0\td2\thigh\n", "line 3"),
        ("qrels/test.tsv", HEADER + "q0\t1\n", "line 2"),
        ("qrels/test.tsv", HEADER + "q0\td1\t1\nq0\td1\t2\n", "line 3.*another grade"),
    ],
)
def test_broken_files_are_refused_by_line(beir: Path, file: str, content: str, words: str) -> None:
    (beir / file).write_text(content)
    with pytest.raises(BadInput, match=words):
        load_collection(f"beir:{beir}")


@pytest.mark.parametrize(("missing", "words"), [("corpus.jsonl", "corpus.jsonl"), ("queries.jsonl", "queries.jsonl"), ("qrels/test.tsv", "qrels.*none")])
def test_missing_files_are_named(beir: Path, missing: str, words: str) -> None:
    (beir / missing).unlink()
    (beir / "qrels" / "dev.tsv").unlink()
    with pytest.raises(BadInput, match=words):
        load_collection(f"beir:{beir}")


def test_both_forms_of_judgements(tmp_path: Path) -> None:
    (tmp_path / "trec").write_text("1 0 d1 2\n1 0 d2 0\n\n2 0 d1 1\n")
    (tmp_path / "beir").write_text("\ufeff" + HEADER + "1\td1\t2\n1\td2\t0\n2\td1\t1\n")
    assert read_judgements(tmp_path / "trec") == read_judgements(tmp_path / "beir") == {"1": {"d1": 2, "d2": 0}, "2": {"d1": 1}}
    (tmp_path / "spaces").write_text("1\tmy notes.md#1\t1\n")
    assert read_judgements(tmp_path / "spaces") == {"1": {"my notes.md#1": 1}}


def write_cranfield(folder: Path) -> None:
    """Its traps in small: numbers of queries that jump, titles repeated in texts, an empty document, a text of its own, a last line ".I"."""
    folder.mkdir()
    documents = [
        "1\n.T\nthe flow past\na wing .\n.A\nsomebody\n.B\nj. 1958\n.W\nthe flow past\na wing .\n  it was measured .\n",
        "2\n.T\n.A\n.B\n.W\n",
        "3\n.T\nheat .\n.A\n.B\n.W\nanother text\n.in three lines\n.I am not a record\n",
    ]
    (folder / "cran.all.1400").write_text("".join(f".I {each}" for each in documents) + ".I\n")
    (folder / "cran.qry").write_text(".I 001\n.W\nwhat about\nwings .\n.I 004\n.W\nand heat .\n")
    (folder / "cranqrel").write_text("1 1 2\n1 3 4\n2 3 1\n2 2 3\n")


def test_the_traps_of_cranfield(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cranfield(tmp_path / "cranfield")
    monkeypatch.setenv("WELLREAD_DATA", str(tmp_path))
    with pytest.warns(UserWarning, match="1 of 4 .first: '2'"):
        found = load_collection("cranfield")
    assert list(found.corpus) == [
        {"id": "1", "title": "the flow past a wing .", "text": "it was measured ."},
        {"id": "3", "title": "heat .", "text": "another text .in three lines .I am not a record"},
    ]
    assert list(found.queries) == [{"id": "1", "text": "what about wings ."}, {"id": "2", "text": "and heat ."}]
    assert found.judgements == {"1": {"1": 1, "3": 1}, "2": {"3": 1, "2": 1}}


@pytest.mark.skipif(not (Path(os.environ.get("WELLREAD_DATA", "")) / "cranfield").is_dir(), reason="WELLREAD_DATA has no cranfield")
def test_cranfield_itself() -> None:
    with pytest.warns(UserWarning, match="1 of 1837 .first: '995'"):
        found = load_collection("cranfield")
    assert len(found.corpus) == 1398 and len(found.queries) == 225 and sum(map(len, found.judgements.values())) == 1837
    assert found.corpus[-1]["id"] == "1400" and found.queries[2]["text"].startswith("what problems of heat conduction")
    assert sum(title in text for title, text in zip(found.corpus["title"], found.corpus["text"], strict=True)) < 10
