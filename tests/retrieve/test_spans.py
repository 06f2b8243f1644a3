"""The search task made of a corpus: what is held out, what is said about a corpus, how a report ends."""

from __future__ import annotations

import pytest
from datasets import Dataset

from wellread.documents import Passage
from wellread.errors import BadInput
from wellread.retrieve.spans import can_judge, cautions, held_out, owner, scripts, whole


def corpus(rows: int = 40, words: int = 40) -> Dataset:
    """Documents of numbered words, no two of which share one."""
    return Dataset.from_dict({"id": [str(row) for row in range(rows)], "text": [" ".join(f"w{row}.{n}" for n in range(words)) for row in range(rows)]})


def test_held_out_documents_are_not_trained_on() -> None:
    table = corpus()
    training, queries, texts = held_out(table, pool=30)
    assert (len(training), len(queries), len(texts)) == (36, 4, 30)
    away = dict(zip(table["id"], table["text"], strict=True))
    for text in training["text"]:
        away = {name: each for name, each in away.items() if each != text}
    assert queries["id"] == texts["id"][:4] and set(queries["id"]) == set(away)
    for name, query, rest in zip(queries["id"], queries["text"], texts["text"], strict=False):
        assert len(query.split()) == 5, "an eighth of the words"
        start = away[name].index(query)
        assert (away[name][:start] + away[name][start + len(query) :]).split() == rest.split()
    assert set(texts["text"][4:]) <= set(training["text"])
    assert held_out(table)[1].to_dict() == queries.to_dict() != held_out(table, seed=1)[1].to_dict()


def test_small_corpora_short_texts_and_files() -> None:
    assert len(held_out(corpus(9))[1]) == 0 and len(held_out(corpus(), count=0)[0]) == 40 and len(held_out(corpus(), count=2)[1]) == 2
    assert len(held_out(corpus(words=23))[1]) == 0, "too short to cut an eighth out of"
    files = corpus().remove_columns("id").add_column("id", [f"{row // 2}.md#{row % 2}" for row in range(40)])
    training, queries, _ = held_out(files)
    assert len(queries) == 2 and len(training) == 36, "the other passage of the file goes too"
    assert not {owner(name) for name in queries["id"]} & {owner(name) for name in training["id"]}
    assert held_out(corpus().remove_columns("id"))[1]["id"] == held_out(corpus())[1]["id"], "without ids the rows are numbered"


def test_whole_says_a_title_once() -> None:
    assert whole(Passage("1", "A title", "A title and more")) == "A title and more"
    assert whole(Passage("1", "A title", "More")) == "A title\nMore" and whole(Passage("1", "", "More")) == "More"


def test_owner_is_the_file() -> None:
    assert owner("notes.md#3") == owner("notes.md#4") == owner("notes.md") != owner("other.md#3")
    assert -(2**63) <= owner("a") < 2**63 and len({owner(str(number)) for number in range(1000)}) == 1000


def test_scripts_and_cautions() -> None:
    assert scripts(["some words", "несколько слов", "des mots", "12 34"]) == {"LATIN": 2, "CYRILLIC": 1}
    mixed = Dataset.from_dict({"text": ["some words"] * 3 + ["несколько слов"] * 3})
    with pytest.warns(UserWarning, match="mixes the scripts Cyrillic, Latin: train on one"):
        assert len(cautions(mixed)) == 1
    with pytest.warns(UserWarning, match="give a column 'group'"):
        cautions(mixed, groups=True)
    with pytest.warns(UserWarning, match="25% of the corpus are words or signs that the tokenizer does not know"):
        cautions(corpus(), unknown=0.25)
    assert cautions(mixed.add_column("group", list("aaabbb")), groups=True) == [] == cautions(corpus(), unknown=0.1)


def test_a_language_is_checked_before_a_training() -> None:
    can_judge("en"), can_judge(None)
    with pytest.raises(BadInput, match="the language 'tlh' is not known"):
        can_judge("tlh")
