"""The catalogue: cards, measurements, chapters, and that it is quick and light."""

from __future__ import annotations

import importlib
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import wellread
from wellread import catalog
from wellread.errors import BadInput

CARD = (
    """---
title: "Averaging the weights of many fine-tuned networks makes one accurate and fast network"
paper: {authors: "Somebody et al.", year: 2022, arxiv: "2203.05482", code: "somebody/soups"}
wish: I fine-tuned one network several times; give me one better than the best of them.
brings: several fine-tunings of one network
gets: one network
claims:
  - {on: "ImageNet", metric: "top-1 %", baseline: 80.38, method: 81.03, source: "paper, table 3"}
---
"""
    + ("It walks from the best network to the worst and keeps those that help. " * 8)
    + "\n\nWhen not to use it: the networks began at different weights.\n"
)

CODE = '''"""A method (arXiv 2203.05482)."""


def helper(x: int) -> int:
    """One more."""
    return x + 1


def NAME(a: int, *, rule: str = "greedy", times: int = 3) -> int:
    """What it does.

    a: a number.
    """
    return helper(a)
'''


def write_method(root: Path, chapter: str, stem: str, card: str = CARD) -> Path:
    folder = root / chapter
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "__init__.py").write_text(
        '"""Several networks into one.\n\nMore words.\n"""\n\nfrom wellread import catalog\n\ncatalog.chapter(__name__)\n'
    )
    (folder / f"{stem}.py").write_text(CODE.replace("NAME", stem))
    (folder / f"{stem}.md").write_text(card)
    return folder / f"{stem}.md"


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A second place in which the package's chapters are looked for; empty, and the first one hidden."""
    place = tmp_path / "wellread"
    place.mkdir()
    monkeypatch.setattr(wellread, "__path__", [str(place)])
    before = set(sys.modules)
    yield place
    for name in set(sys.modules) - before:
        if name.startswith("wellread."):
            del sys.modules[name]
    for chapter in [path.name for path in place.iterdir()]:
        vars(wellread).pop(chapter, None)


def test_a_card_is_read(root):
    write_method(root, "merging", "stone_soup")
    (card,) = catalog.methods()
    assert (card.name, card.module, card.chapter) == ("stone-soup", "wellread.merging.stone_soup", "merging")
    assert card.paper["arxiv"] == "2203.05482" and card.claims[0]["method"] == 81.03 and card.claims[0]["on"] == "ImageNet"
    assert card.body.startswith("It walks") and not card.draft
    assert catalog.card("stone-soup") == catalog.card("stone_soup") == card
    assert catalog.chapters() == {"merging": "Several networks into one."}


def test_drafts_and_loose_files_are_left_out(root):
    write_method(root, "merging", "stone_soup", CARD.replace("gets:", "draft: true\ngets:"))
    (root / "merging" / "README.md").write_text("no code beside it")
    (root / "merging" / "shared.py").write_text("")
    assert catalog.methods() == []
    assert [card.name for card in catalog.methods(include_drafts=True)] == ["stone-soup"]
    assert catalog.card("stone-soup").draft


def test_an_edited_card_is_read_again(root):
    path = write_method(root, "merging", "stone_soup")
    assert catalog.card("stone-soup").gets == "one network"
    time.sleep(0.01)
    path.write_text(CARD.replace("one network\n", "a better network\n"))
    assert catalog.card("stone-soup").gets == "a better network"


def test_unknown_names_get_the_nearest(root):
    write_method(root, "merging", "stone_soup")
    with pytest.raises(BadInput, match="did you mean stone-soup"):
        catalog.card("stone-soop")
    with pytest.raises(BadInput, match="wellread list"):
        catalog.card("quantum")
    for name in ("", "../merging/stone_soup", "*", "stone soup"):
        with pytest.raises(BadInput, match="no method"):
            catalog.card(name)


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("no front matter", "no front matter"),
        ("---\ntitle: a\n", "no front matter"),
        ("---\ntitle: [\n---\nbody", "not YAML"),
        ("---\n- a\n---\nbody", "no keys"),
        ("---\npaper: text\n---\nbody", "mapping"),
        ("---\nclaims: [text]\n---\nbody", "mapping"),
        ("---\ntitle: !!python/object/apply:os.getcwd []\n---\nbody", "not YAML"),
    ],
)
def test_damaged_cards_are_named(root, text, complaint):
    write_method(root, "merging", "stone_soup", text)
    with pytest.raises(BadInput, match=complaint) as error:
        catalog.methods()
    assert "merging/stone_soup.md" in str(error.value) and "\n" not in str(error.value)


def test_a_finished_card_has_no_problems(root):
    write_method(root, "merging", "stone_soup")
    assert catalog.check_card(catalog.card("stone-soup")) == []


@pytest.mark.parametrize(
    "old, new, problem",
    [
        ("wish: I fine-tuned one network several times; give me one better than the best of them.", "wish:", "wish is missing"),
        ("brings: several fine-tunings of one network\n", "", "brings is missing"),
        ('authors: "Somebody et al.", ', "", "no authors"),
        ("year: 2022", 'year: "2022?"', "no year"),
        ('arxiv: "2203.05482", ', "", "none of arxiv, doi, url"),
        ('"2203.05482"', "2203.0548", "quote it"),
        ('source: "paper, table 3"', 'source: ""', "claim 1 has no 'source'"),
        ('source: "paper, table 3"', 'source: "memory"', "looked up"),
        ("method: 81.03, ", "", "claim 1 has no 'method'"),
        ("best network to the worst and ", "", "at least 80"),
        ("When not to use it:", "Remember:", "when not to use"),
        ("When not", '"The weights of all the networks lie in one and the same basin of the loss." When not', "quotation"),
        ("When not", "Averaging the weights of many fine-tuned networks makes one. When not", "repeats the paper's title"),
    ],
)
def test_what_a_card_lacks_is_named(root, old, new, problem):
    write_method(root, "merging", "stone_soup", CARD.replace(old, new))
    problems = catalog.check_card(catalog.card("stone-soup"))
    assert [problem in each for each in problems] == [True]


def test_words_find_cards(root):
    write_method(root, "merging", "stone_soup")
    write_method(root, "looking", "heat_map", CARD.replace("I fine-tuned one network several times", "WHY did it say that"))
    cards = catalog.methods()
    assert [card.name for card in cards] == ["heat-map", "stone-soup"]
    assert [card.name for card in catalog.find(cards, ["why", "say"])] == ["heat-map"]
    assert [card.name for card in catalog.find(cards, ["Merging"])] == ["stone-soup"]
    assert catalog.find(cards, ["why", "merging"]) == [] and catalog.find(cards, []) == cards


def test_measurements_are_found_and_age(root):
    path = write_method(root, "merging", "stone_soup")
    assert catalog.measurements("stone-soup") is None and not catalog.stale("stone-soup")
    results = root.parent / "bench" / "results"
    results.mkdir(parents=True)
    (results / "stone_soup.json").write_text(json.dumps({"code_sha256": catalog.code_sha256("stone-soup")}))
    assert not catalog.stale("stone-soup")
    path.with_suffix(".py").write_text(path.with_suffix(".py").read_text() + "# changed\n")
    assert catalog.stale("stone-soup")
    (root / "bench_results").mkdir()  # where a wheel holds them; comes first, so that a stranger's folder "bench" is not read
    (root / "bench_results" / "stone_soup.json").write_text(json.dumps({"code_sha256": catalog.code_sha256("stone-soup")}))
    assert not catalog.stale("stone-soup")


def test_the_signature_is_read_without_an_import(root):
    path = write_method(root, "merging", "stone_soup")
    assert catalog.signature("stone-soup").startswith(
        "stone_soup(\n    a: int,\n    *,\n    rule: str = 'greedy',\n    times: int = 3,\n) -> int\n\nWhat it"
    )
    path.with_suffix(".py").write_text("import nothing_of_this_name\n\n\ndef stone_soup(a, b=2): ...\n")
    assert catalog.signature("stone-soup") == "stone_soup(\n    a,\n    b = 2,\n)"
    path.with_suffix(".py").write_text("def soup(): ...\n")
    with pytest.raises(BadInput, match="named like its file"):
        catalog.signature("stone-soup")


def test_a_method_is_a_function_of_its_chapter(root):
    write_method(root, "merging", "stone_soup")
    write_method(root, "merging", "half_done", CARD.replace("gets:", "draft: true\ngets:"))
    (root / "merging" / "shared.py").write_text("value = 1\n")
    import wellread.merging as merging  # type: ignore[import-not-found]

    assert "wellread.merging.stone_soup" not in sys.modules  # nothing is imported before it is used
    assert "stone_soup" in dir(merging) and "half_done" not in dir(merging) and "shared" not in dir(merging)
    assert merging.stone_soup(1) == 2
    from wellread.merging.stone_soup import helper  # type: ignore[import-not-found]

    assert helper(2) == 3
    assert merging.stone_soup is catalog.function("stone-soup") and wellread.merging.stone_soup(1) == 2
    importlib.import_module("wellread.merging.shared")
    assert merging.shared.value == 1  # a submodule without a function of its name stays a module
    with pytest.raises(AttributeError, match="stone_soop"):
        merging.stone_soop  # noqa: B018


def test_a_function_is_there_whichever_import_comes_first(root):
    write_method(root, "merging", "stone_soup")
    module = importlib.import_module("wellread.merging.stone_soup")
    import wellread.merging as merging

    assert merging.stone_soup is module.stone_soup


def test_eighty_five_methods_are_listed_at_once(tmp_path):
    """In a copy of the package, from the start of the interpreter to its end. Processor time, which on an idle machine is the time it takes."""
    package = tmp_path / "wellread"
    shutil.copytree(Path(catalog.__file__).parent, package, ignore=lambda folder, names: [name for name in names if not name.endswith(".py")])
    for number in range(85):
        write_method(package, f"chapter{number % 13}", f"method_{number}", CARD + "More words about it. " * 100)
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-m", "wellread", "list"], cwd=tmp_path, capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert len(done.stdout.splitlines()) == 85
    assert min(seconds) <= 0.3


@pytest.mark.parametrize(
    "command", ["['list']", "['list', '--markdown']", "['measured']", "['--help']", "['run', '--help']", "['show', 'no-such-method']"]
)
def test_no_command_that_only_reads_cards_imports_torch(command):
    code = f"""import sys
from wellread.cli import main
try:
    main({command})
finally:
    print(sorted({{'torch', 'numpy', 'datasets', 'rich'}} & set(sys.modules)))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
