"""Passages from folders and files, and what becomes of files that are not as they should be."""

from __future__ import annotations

import json
import time
import tracemalloc
import warnings
from pathlib import Path

import pytest
from datasets import Dataset

from wellread.data import Corpus, as_data, check, load_data, name_of
from wellread.documents import WORD, corpus, pieces, rows
from wellread.errors import BadInput


def notes(root: Path, **files: str | bytes) -> Path:
    for name, content in files.items():
        file = root / name.replace("__", "/").replace("_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def read(root: Path, **settings: int) -> dict[str, tuple[str, str]]:
    return {row["id"]: (row["title"], row["text"]) for row in corpus(f"folder:{root}", **settings)}


def test_markdown_is_cut_at_its_headings(tmp_path: Path) -> None:
    text = "---\ntags: x\n---\n# Guide\nFirst *word*.\n\nSecond.\n\n## Setup\nRun `make`\nnow.\n\n```\ncode here\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n## Use\nDo it.\n"
    found = read(notes(tmp_path, sub__guide_md=text))
    assert found == {
        "sub/guide.md#1": ("Guide", "First word.\nSecond."),
        "sub/guide.md#2": ("Guide > Setup", "Run make now.\ncode here\na | b\n1 | 2"),
        "sub/guide.md#3": ("Guide > Use", "Do it."),
    }


def test_html_keeps_what_is_read_and_nothing_else(tmp_path: Path) -> None:
    text = (
        "<html><head><title>Bread</title><style>p {}</style></head><body><nav>Menu</nav><script>x()</script>"
        "<h2>How to <b>knead</b></h2><p>Fold the\n\ndough.<div>Wait &amp; see.</div><ul><li>flour<li>water</ul></body></html>"
    )
    found = read(notes(tmp_path, bread_html=text))
    assert set(found) == {"bread.html#1"}
    title, body = found["bread.html#1"]
    assert title == "Bread > How to knead"
    assert " ".join(body.split()) == "Fold the dough. Wait & see. flour water"


def test_links_to_other_documents_belong_to_the_passage_that_holds_them(tmp_path: Path) -> None:
    guide = (
        "# Guide\nSee [the oven](../oven.html#heat) first.\n\n## More\nOr [elsewhere](https://example.org/oven.html), [here](#top), [gone](no.md).\n\n"
        "Then **[knead *well*](dough)**, [mail](mailto:a@b.c) and [the oven](../oven.html) again.\n"
    )
    oven = "<h1><a href='sub/guide.md'>Oven</a></h1><p>Heat it.<h2>Door</h2><p>Open <a href='/sub/dough.rst'>it\nslowly</a>.<p>Bad <a href='http://[x'>one</a>"
    data = corpus(f"folder:{notes(tmp_path, sub__guide_md=guide, oven_html=oven, sub__dough_rst='Fold.')}")
    assert dict(zip(data["id"], data["links"], strict=True)) == {
        "oven.html#1": [],  # the heading is in the title
        "oven.html#2": ["sub/dough.rst"],
        "sub/dough.rst#1": [],
        "sub/guide.md#1": ["oven.html"],
        "sub/guide.md#2": ["sub/dough.rst", "oven.html"],
    }
    assert data["text"][1] == "Open it slowly.\nBad one" and "\1" not in "".join(data["title"])
    assert corpus(f"folder:{notes(tmp_path / 'plain', a_md='No [link](b.md).')}").column_names == ["id", "title", "text"]


def test_html_of_documentation_tools(tmp_path: Path) -> None:
    page = (
        "<title>Kneading &#8212; Bread 1.2 documentation</title><div role='navigation'>next | previous</div><div>Bread 1.2</div>"
        "<div role='main'><h1>Kneading<a href='#k'>¶</a></h1><p>Fold it.</p><h2>Rest<a href='#r'>#</a></h2><p>Wait.</div><footer>Made by us</footer>"
    )
    assert read(notes(tmp_path, a_html=page)) == {"a.html#1": ("Kneading", "Fold it."), "a.html#2": ("Kneading > Rest", "Wait.")}
    empty = "<title>T</title><main> </main><p>Here it is."
    assert read(notes(tmp_path / "other", a_html=empty)) == {"a.html#1": ("T", "Here it is.")}


def test_html_says_its_encoding(tmp_path: Path) -> None:
    page = '<meta charset="iso-8859-2"><p>Łódź'.encode("iso-8859-2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(notes(tmp_path, a_html=page))["a.html#1"][1] == "Łódź"


def test_pdf_is_read_page_by_page(tmp_path: Path) -> None:
    import matplotlib.pyplot as plt
    from matplotlib.backends.backend_pdf import PdfPages

    with PdfPages(tmp_path / "report.pdf", metadata={"Title": "Yearly report"}) as pages:
        for line in ("The turbine ran well.", "Costs fell by a third."):
            figure = plt.figure()
            figure.text(0.1, 0.5, line)
            pages.savefig(figure)
            plt.close(figure)
    assert read(tmp_path) == {
        "report.pdf#1": ("Yearly report > page 1", "The turbine ran well."),
        "report.pdf#2": ("Yearly report > page 2", "Costs fell by a third."),
    }


def test_wrong_encodings_empty_and_damaged_files_are_counted_and_named(tmp_path: Path) -> None:
    notes(tmp_path, old_txt="Köln grüßt".encode("latin-1"), blank_txt=" \n\n", broken_pdf=b"%PDF-1.4 nothing", core_txt=b"\x00\x01\x02", a_docx=b"PK")
    notes(tmp_path, wide_txt="weit".encode("utf-16"), good_txt="fine")
    (tmp_path / ".hidden.txt").write_text("secret")
    for _ in range(2):  # the second time from the cache: it is said again
        with pytest.warns(UserWarning) as said:
            found = read(tmp_path)
        assert {name: text for name, (_, text) in found.items()} == {"good.txt#1": "fine", "old.txt#1": "Köln grüßt", "wide.txt#1": "weit"}
        text = " | ".join(str(each.message) for each in said)
        for part in (
            "2 documents could not be read",
            "broken.pdf",
            "core.txt",
            "1 documents are not UTF-8",
            "old.txt",
            "1 documents hold no text",
            "1 .docx",
        ):
            assert part in text, part


def test_the_encoding_of_a_longer_text_is_guessed_by_its_letters(tmp_path: Path) -> None:
    text = "Широкая электрификация южных губерний даст мощный толчок подъёму сельского хозяйства."
    with pytest.warns(UserWarning, match="not UTF-8"):
        assert read(notes(tmp_path, a_txt=text.encode("cp1251")))["a.txt#1"][1] == text


def test_a_folder_is_read_again_when_a_file_changes(tmp_path: Path) -> None:
    notes(tmp_path, a_txt="one")
    assert read(tmp_path)["a.txt#1"][1] == "one"
    notes(tmp_path, a_txt="two three")
    assert read(tmp_path)["a.txt#1"][1] == "two three"


def test_pieces_end_with_sentences_and_lose_no_word() -> None:
    sentences = [f"Sentence {n} has {'very ' * (n % 7)}many words." for n in range(50)]
    found = list(pieces([" ".join(sentences), "Short."], 20))
    assert " ".join(found).split() == (" ".join(sentences) + " Short.").split()
    assert all(len(piece.split()) <= 20 and piece.endswith(".") for piece in found)
    assert max(len(piece.split()) for piece in found) > 14
    assert list(pieces(["a b c d e f g h i j"], 4)) == ["a b c d", "e f g h", "i j"]
    assert list(pieces(["", "  "], 10)) == []
    chinese = "今天天气很好。" * 20
    found = list(pieces([chinese], 21))
    assert "".join(found) == chinese and all(piece.endswith("。") and len(piece) <= 21 for piece in found)


@pytest.mark.parametrize("unit", ["word ", "x", "Go on. ", "...", "。"])
def test_a_line_of_ten_megabytes_is_cut_in_time(tmp_path: Path, unit: str) -> None:
    line = unit * (10_000_000 // len(unit.encode()))
    start = time.monotonic()
    data = (
        corpus(f"folder:{notes(tmp_path, long_txt=line)}") if unit not in (".", "。") else corpus(f"folder:{notes(tmp_path, long_txt=line + ' end')}")
    )
    assert time.monotonic() - start < 60
    longest = max(len(WORD.findall(text)) for text in data["text"])
    assert longest <= 160
    assert sum(len(text.replace(" ", "").replace("\n", "")) for text in data["text"]) >= len(line.replace(" ", ""))


def test_jsonl_keeps_links_and_groups(tmp_path: Path) -> None:
    file = tmp_path / "corpus.jsonl"
    lines = [{"_id": "a", "text": "x", "links": ["b", "c"], "group": "de"}, {"_id": "b", "text": "y", "links": "a; c"}, {"_id": "c", "text": "z"}]
    file.write_text("\n".join(map(json.dumps, lines)))
    data = corpus(f"jsonl:{file}")
    assert data["links"] == [["b", "c"], ["a", "c"], []] and data["group"] == ["de", None, None]


def test_jsonl_is_the_form_of_beir(tmp_path: Path) -> None:
    lines = [{"_id": "d1", "title": "T", "text": "one"}, {"_id": 2, "text": "two"}, {"text": "three"}, {"_id": "d4", "title": "", "text": " "}]
    file = tmp_path / "corpus.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    with pytest.warns(UserWarning, match="hold no text and were skipped: d4"):
        data = corpus(f"jsonl:{file}")
    assert list(rows(data)) == [("d1", "T", "one"), ("2", "", "two"), ("corpus.jsonl#3", "", "three")]
    assert name_of(data) == f"jsonl:{file}" and data.cache_files  # memory-mapped
    file.write_text('{"_id": "a", "text": "x"}\n{"_id": "b"}\n')
    with pytest.raises(BadInput, match="line 2: not a JSON object with a text"):
        corpus(f"jsonl:{file}")
    file.write_text('{"_id": "a", "text": "x"}\n{"_id": "a", "text": "y"}\n')
    with pytest.raises(BadInput, match="the id 'a' more than once"):
        corpus(f"jsonl:{file}")


def test_a_row_of_ten_megabytes_becomes_passages(tmp_path: Path) -> None:
    file = tmp_path / "c.jsonl"
    file.write_text(json.dumps({"_id": "big", "text": "word " * 2_000_000}) + '\n{"_id": "small", "text": "x"}\n')
    with pytest.warns(UserWarning, match="were cut into passages: big"):
        data = corpus(f"jsonl:{file}")
    assert data[0]["id"] == "big#1" and len(data) == 12_501 and data[12_500]["id"] == "small"


def test_other_tables_are_corpora_too(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("body,id\nhello,a\nworld,b\n")
    assert list(rows(corpus(f"csv:{tmp_path / 't.csv'}?text=body"))) == [("a", "", "hello"), ("b", "", "world")]
    assert list(rows(corpus(["x", "y"]))) == [("0", "", "x"), ("1", "", "y")]
    with pytest.raises(BadInput, match="no column 'text'"):
        corpus(Dataset.from_dict({"body": ["x"]}))
    for bad, why in (
        (f"folder:{tmp_path / 'none'}", "no folder"),
        (7, "a corpus is needed, not a int"),
        (f"jsonl:{tmp_path / 'no.jsonl'}", "no .jsonl file"),
    ):
        with pytest.raises(BadInput, match=why):
            corpus(bad)
    with pytest.raises(BadInput, match="holds no documents"):
        corpus(f"folder:{tmp_path}")


def test_load_data_gives_passages_of_a_folder_without_pictures(tmp_path: Path) -> None:
    notes(tmp_path, a_txt="one", sub__b_md="# Two\nthree")
    data = load_data(f"folder:{tmp_path}")
    assert data["id"] == ["a.txt#1", "sub/b.md#1"] and data["title"] == ["a", "Two"]
    needs = Corpus.__metadata__[0]  # type: ignore[attr-defined]
    check(as_data(f"folder:{tmp_path}"), needs, None, "corpus")
    (tmp_path / "c.jsonl").write_text('{"_id": "q", "text": "x"}\n')
    assert load_data(f"jsonl:{tmp_path / 'c.jsonl'}")["id"] == ["q"]


def test_reading_a_corpus_does_not_hold_it(tmp_path: Path) -> None:
    with open(tmp_path / "c.jsonl", "w") as file:
        for number in range(20_000):
            file.write(json.dumps({"_id": str(number), "text": f"{number} " * 150}) + "\n")  # about 18 MB
    tracemalloc.start()
    data = corpus(f"jsonl:{tmp_path / 'c.jsonl'}")
    count = sum(1 for _ in rows(data))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_000 and peak < 8e6
