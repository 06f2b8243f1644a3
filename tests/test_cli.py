"""The command line, with methods made for the test: options from a signature, one line for every mistake, outputs, interruption."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import BashComplete
from PIL import Image

import wellread
from wellread import catalog
from wellread.cli import app, main

CARD = """---
title: "Counting heads"
paper: {authors: "Somebody et al.", year: 2022, arxiv: "2203.05482", code: "somebody/heads"}
wish: Tell me how many there are | and nothing else.
brings: labelled pictures
gets: a report
claims:
  - {on: "ImageNet", metric: "top-1 %", baseline: 80.38, method: 81.03, source: "paper, table 3"}
---
It counts.

When not to use it: never.
"""

COUNT = '''"""Counting (arXiv 2203.05482)."""

import warnings
from collections.abc import Callable
from typing import Literal

from wellread import runtime
from wellread.data import Labelled
from wellread.errors import BadInput, Diverged
from wellread.method import method
from wellread.results import Report


@method
def head_count(
    data: Labelled,
    more: Labelled | None = None,
    *,
    rule: Literal["all", "first"] = "all",
    weight: float = 1.5,
    bonus: int | None = 3,
    sizes: list[int] | None = None,
    fast: bool = False,
    measure: Callable[[int], int] | None = None,
    ending: Literal["well", "refused", "crashed", "stopped", "stopped early", "diverged", "warned"] = "well",
) -> Report:
    """Count.

    data: what is counted.
    weight: of one head,
        in kilograms.
    measure: how a head is measured.
    Raises `BadInput` when asked to.
    """
    if ending == "refused":
        raise BadInput("these heads\\ncannot be counted: bring others")
    if ending == "warned":
        warnings.warn("some heads\\nare twice there", stacklevel=2)
    if ending == "crashed":
        raise KeyError("head")
    if ending == "diverged":
        raise Diverged("loss became nan at step 12")
    folder = runtime.current().folder
    before = (folder / "checkpoint").exists()
    if ending == "stopped":
        (folder / "checkpoint").write_text("1")
    if ending.startswith("stopped"):
        raise KeyboardInterrupt
    figures = {"rows": len(data), "rule": rule, "weight": weight, "bonus": str(bonus), "sizes": str(sizes), "fast": str(fast), "resumed": str(before)}
    return Report("Heads", figures | {"precision": runtime.current().precision, "progress": str(runtime.current().progress)})
'''

PASS = '''"""Passing on (arXiv 2203.05482)."""

from wellread.method import method
from wellread.network import Network
from wellread.results import Report


@method
def pass_on(networks: list[Network]) -> Network:
    """The first of them.

    networks: some networks.
    """
    network = networks[0].copy()
    network.reports = {"count": Report("Networks", {"networks": len(networks)})}
    return network
'''


@pytest.fixture
def methods(tmp_path, monkeypatch):
    """Two methods in a chapter of their own, beside the real ones; gives the folder that holds them."""
    chapter = tmp_path / "extra" / "wellread" / "fakes"
    chapter.mkdir(parents=True)
    (chapter / "__init__.py").write_text('"""Only for tests."""\n\nfrom wellread import catalog\n\ncatalog.chapter(__name__)\n')
    for stem, code in (("head_count", COUNT), ("pass_on", PASS)):
        (chapter / f"{stem}.py").write_text(code)
        (chapter / f"{stem}.md").write_text(CARD)
    monkeypatch.setattr(wellread, "__path__", [*wellread.__path__, str(chapter.parent)])
    monkeypatch.chdir(tmp_path)
    yield chapter
    for name in [name for name in sys.modules if name.startswith("wellread.fakes")]:
        del sys.modules[name]
    vars(wellread).pop("fakes", None)


@pytest.fixture
def photos(tmp_path):
    """Twelve pictures of two classes, as the command line names them."""
    for name, grey in (("dark", 10), ("light", 200)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(6):
            Image.new("L", (8, 8), grey + number).save(tmp_path / "photos" / name / f"{number}.png")
    return f"folder:{tmp_path / 'photos'}"


@pytest.fixture
def measured(methods):
    """The measurement of head-count, of which one of two expectations held."""
    results = methods.parent.parent / "bench" / "results"
    results.mkdir(parents=True)
    content = {
        "code_sha256": catalog.code_sha256("head-count"),
        "date": "2026-01-02",
        "machine": {"cpu": "A CPU", "cores": 2, "gpu": None},
        "seeds": [0, 1, 2],
        "seconds": 61.2,
        "expects": [
            {"sentence": "it counts", "metric": "count", "threshold": 1.0, "at_least": True, "value": 2.0, "passed": True},
            {"sentence": "it is quick", "metric": "time", "threshold": 1.0, "at_least": False, "value": None, "passed": False},
        ],
        "figures": {"count": {"per_seed": [1.0, 2.0, 3.0], "mean": 2.0, "sd": 1.0}},
        "baselines": {"guess": {"per_seed": [1.0], "mean": 1.0, "sd": None}},
        "notes": ["the paper counted more"],
    }
    (results / "head_count.json").write_text(json.dumps(content))


def one_line(capsys) -> str:
    """The one line on stderr, when there is nothing else anywhere."""
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("wellread: ") and "Traceback" not in err
    return err[len("wellread: ") : -1]


# --- list, show, measured


def test_list(methods, capsys):
    assert main(["list", "--chapter", "fakes"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "head-count  fakes  Tell me how many there are | and nothing else.",
        "pass-on     fakes  Tell me how many there are | and nothing else.",
    ]
    assert main(["list", "HEAD-count", "many"]) == 0
    assert capsys.readouterr().out.startswith("head-count  fakes")
    assert main(["list", "head-count", "zeppelin"]) == 0
    assert "wellread list shows all" in capsys.readouterr().out
    assert main(["list", "--chapter", "fakes", "--json"]) == 0
    assert [card["name"] for card in json.loads(capsys.readouterr().out)] == ["head-count", "pass-on"]
    assert main(["list", "--chapter", "fake"]) == 2
    assert "there is no chapter 'fake': choose" in one_line(capsys)


def test_list_as_the_table_of_the_readme(measured, capsys):
    assert main(["list", "--chapter", "fakes", "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all(len(re.findall(r"(?<!\\)\|", line)) == 6 for line in lines)
    assert lines[2].startswith(
        "| [head-count](wellread/fakes/head_count.md) | Tell me how many there are \\| and nothing else. | labelled pictures |"
    )
    assert "81.03 against 80.38, top-1 %, ImageNet (paper, table 3) | it counts: 2; 1 of 2 expectations held |" in lines[2]
    assert lines[3].endswith("| not measured |")


def test_show(measured, methods, capsys):
    assert main(["show", "head-count"]) == 0
    text = capsys.readouterr().out
    for part in (
        "Counting heads",
        "arXiv 2203.05482",
        "It counts.",
        "81.03 against 80.38",
        "held    it counts: 2 (at least 1)",
        "weight: float = 1.5,",
    ):
        assert part in text
    assert "failed  it is quick: nothing (at most 1)" in text and "count 2 ± 1" in text and "guess 1\n" in text and "stale" not in text
    (methods / "head_count.py").write_text(COUNT + "\n")
    assert main(["show", "head_count", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["stale"] and record["measured"]["seconds"] == 61.2 and record["signature"].startswith("head_count(")
    assert main(["show", "head-cuont"]) == 2
    assert one_line(capsys) == "there is no method 'head-cuont': did you mean head-count?"


def test_measured(measured, methods, capsys):
    assert main(["measured"]) == 0
    text = capsys.readouterr().out
    assert "3 seeds, 61 s on 2 x A CPU, 2026-01-02" in text and "note    the paper counted more" in text
    assert "not measured: make bench NAME=pass_on" in text
    assert re.search(r"\d+ methods, \d+ expectations stated before measuring, \d+ held", text.splitlines()[-1])
    (methods / "head_count.py").write_text(COUNT + "\n")
    assert main(["measured"]) == 0
    assert "stale   the method's file has changed since: make bench NAME=head_count" in capsys.readouterr().out
    assert main(["measured", "--json"]) == 0
    (mine,) = [record for record in json.loads(capsys.readouterr().out) if record["method"] == "head-count"]
    assert mine["stale"] and mine["claims"][0]["source"] == "paper, table 3" and not mine["measured"]["expects"][1]["passed"]


# --- run


def test_help_shows_what_a_method_takes(methods, capsys):
    assert main(["run", "head-count", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "Tell me how many there are",
        "Brings (labelled pictures): --data DATA what is counted. [required]",
        "--more DATA [default: none]",
        "--rule all|first [default: all]",
        "--weight number of one head, in kilograms. [default: 1.5]",
        "--bonus integer|none [default: 3]",
        "--sizes integer|none [default: none; repeat the option for each]",
        "--fast / --no-fast [default: no]",
        "--out FOLDER",
        "--device NAME",
        "Gets (Report): a report",
    ):
        assert part in text, part
    assert "--measure" not in text  # a function cannot be typed
    assert main(["run", "pass-on", "-h"]) == 0
    assert "--networks NETWORK some networks. [repeat the option for each] [required]" in " ".join(capsys.readouterr().out.split())


def run_count(photos: str, *words: str) -> int:
    return main(["run", "head-count", "--data", photos, "--out", "out", *words])


def test_values_reach_the_method(methods, photos, capsys):
    assert (
        run_count(photos, "--rule", "first", "--weight", "2", "--bonus", "none", "--sizes", "4", "--sizes", "5", "--fast", "--json", "--quiet") == 0
    )
    record = json.loads(capsys.readouterr().out)
    assert record["out"] == "out" and record["kind"] == "Report"
    figures = record["figures"]
    assert figures == {
        "rows": 12, "rule": "first", "weight": 2.0, "bonus": "None", "sizes": "[4, 5]", "fast": "True", "resumed": "False",
        "precision": "float32", "progress": "False",
    }  # fmt: skip
    assert wellread.load_result("out").figures == figures


def test_defaults_are_the_methods_own(methods, photos, capsys):
    assert run_count(photos, "--json", "--precision", "bfloat16", "--device", "cpu") == 0
    figures = json.loads(capsys.readouterr().out)["figures"]
    assert (figures["rule"], figures["weight"], figures["bonus"], figures["sizes"], figures["fast"]) == ("all", 1.5, "3", "None", "False")
    assert (figures["precision"], figures["progress"]) == ("bfloat16", "True")


def test_a_result_is_shown_saved_and_not_overwritten(methods, photos, capsys):
    assert run_count(photos) == 0
    text = capsys.readouterr().out
    assert "Heads" in text and "saved in out" in text and "next:" in text
    assert sorted(path.name for path in Path().iterdir()) == ["extra", "out", "photos"]  # no checkpoints are left
    before = (Path("out") / "result.json").read_bytes()
    assert run_count(photos, "--weight", "7") == 2
    assert "exists" in one_line(capsys) and (Path("out") / "result.json").read_bytes() == before
    assert run_count(photos, "--weight", "7", "--force", "--json") == 0
    assert json.loads(capsys.readouterr().out)["figures"]["weight"] == 7.0


def test_a_warning_is_one_line(methods, photos, capsys):
    assert run_count(photos, "--ending", "warned", "--quiet") == 0
    assert capsys.readouterr().err == "note: some heads are twice there\n"


def test_a_network_goes_in_and_comes_out(methods, capsys):
    network = wellread.load("timm/test_resnet", pretrained=False, num_classes=10)
    network.labels = tuple(str(digit) for digit in range(10))
    network.save("a")
    assert main(["run", "pass-on", "--networks", "a", "--networks", "a", "--out", "b", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["kind"] == "Network" and record["fingerprint"] == network.fingerprint and record["reports"]["count"]["figures"] == {"networks": 2}
    assert [step["method"] for step in record["lineage"]] == ["load", "pass-on"]
    assert main(["run", "pass-on", "--networks", "b", "--out", "c"]) == 0
    assert "next:  wellread eval c DATA" in capsys.readouterr().out
    assert main(["eval", "c", "digits:test[:40]", "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["figures"]
    assert main(["eval", "c", "digits:test[:40]", "--quiet"]) == 0
    assert "accuracy" in capsys.readouterr().out
    assert main(["eval", "nowhere", "digits:test"]) == 2
    assert "nowhere" in one_line(capsys)
    assert main(["eval", "c", "no-data"]) == 2
    assert "no-data" in one_line(capsys)


@pytest.mark.parametrize(
    "words, complaint",
    [
        ("run", "name the method to run"),
        ("run head-cuont --data PHOTOS --out out", "did you mean head-count?"),
        ("run head-count --out out", "Missing option '--data'"),
        ("run head-count --data PHOTOS", "Missing option '--out'"),
        ("run head-count --data PHOTOS --out out --wieght 3", "--weight"),
        ("run head-count --data PHOTOS --out out --rule frist", "'frist' is not all|first: did you mean first?"),
        ("run head-count --data PHOTOS --out out --weight heavy", "'heavy' is not number"),
        ("run head-count --data PHOTOS --out out --bonus 1.5", "'1.5' is not integer|none"),
        ("run head-count --data PHOTOS --out out --sizes 3 --sizes x", "'x' is not integer|none"),
        ("run head-count --data PHOTOS --out out surplus", "surplus"),
        ("run head-count --data nothing --out out", "nothing"),
        ("run head-count --data PHOTOS --out out --device toaster", "toaster"),
        ("run head-count --data PHOTOS --out out --precision float8", "float8"),
        ("run head-count --data PHOTOS --out photos", "exists"),
        ("run head-count --data PHOTOS --out photos/dark/0.png/out", "cannot write"),
        ("run head-count --data PHOTOS --out out --ending refused", "these heads cannot be counted: bring others"),
        ("run pass-on --networks nowhere --out out", "nowhere"),
        ("lst", "lst"),
        ("list --colour", "--colour"),
        ("show", "METHOD"),
        ("eval", "NETWORK"),
    ],
)
def test_a_mistake_gets_one_line_and_exit_2(methods, photos, capsys, words, complaint):
    assert main([photos if word == "PHOTOS" else word for word in words.split()]) == 2
    assert complaint in one_line(capsys)
    assert sorted(path.name for path in Path().iterdir()) == ["extra", "photos"]


def test_what_nobody_foresaw_gets_one_line_and_exit_1(methods, photos, capsys, monkeypatch):
    assert run_count(photos, "--ending", "crashed") == 1
    assert one_line(capsys) == "KeyError: 'head' (--debug shows the traceback)"
    assert run_count(photos, "--ending", "diverged") == 1
    assert one_line(capsys) == "loss became nan at step 12"
    assert run_count(photos, "--ending", "crashed", "--debug") == 1
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("WELLREAD_DEBUG", "1")
    assert run_count(photos, "--ending", "refused") == 2
    assert "Traceback" in capsys.readouterr().err


def test_stopped_and_gone_on(methods, photos, capsys):
    assert run_count(photos, "--ending", "stopped early") == 130
    assert one_line(capsys) == "stopped: nothing was written"
    assert not Path("out.partial").exists()
    assert run_count(photos, "--ending", "stopped") == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert run_count(photos, "--weight", "9") == 2  # those checkpoints are of another run
    assert "unfinished run" in one_line(capsys)
    note = Path("out.partial") / "command.json"
    command = json.loads(note.read_text())
    del command["given"]["ending"]
    note.write_text(json.dumps(command, sort_keys=True))  # as if the same command had been stopped from outside
    assert run_count(photos, "--json") == 0
    assert json.loads(capsys.readouterr().out)["figures"]["resumed"] == "True"
    assert not Path("out.partial").exists()


def test_checkpoints_of_another_run_are_discarded_only_when_told(methods, photos, capsys):
    assert run_count(photos, "--ending", "stopped") == 130
    assert run_count(photos, "--force", "--json") == 0
    assert json.loads(capsys.readouterr().out)["figures"]["resumed"] == "False"
    Path("out2.partial").mkdir()
    (Path("out2.partial") / "mine").write_text("precious")
    assert main(["run", "head-count", "--data", photos, "--out", "out2", "--force"]) == 2
    assert "wellread did not write it" in capsys.readouterr().err and (Path("out2.partial") / "mine").exists()


def test_only_the_first_of_several_processes_writes(methods, photos, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert run_count(photos) == 0
    assert capsys.readouterr().out == "" and not Path("out").exists()


def test_ctrl_c_in_a_real_process(methods, photos):
    (methods / "head_count.py").write_text(
        COUNT.replace("        raise KeyboardInterrupt\n", "        print('ready', flush=True)\n        __import__('time').sleep(60)\n")
    )
    code = f"import wellread, sys; wellread.__path__.append({str(methods.parent)!r}); from wellread.cli import main; sys.exit(main())"
    words = ["run", "head-count", "--data", photos, "--out", "out", "--ending", "stopped", "--quiet"]
    repository = str(Path(__file__).parent.parent)
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words],
        env={**os.environ, "PYTHONPATH": repository},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what a shell starts with & ignores it
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.strip().startswith("wellread: stopped: the same command goes on from the checkpoints in") and err.strip().count("\n") == 0


# --- help, completion


def test_no_command_is_help(capsys):
    assert main([]) == 0
    assert "measured" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"wellread {wellread.__version__}\n"
    assert main(["run", "--help"]) == 0
    assert "METHOD --ARG VALUE" in capsys.readouterr().out


def complete(*words: str, path: Path) -> tuple[list[str], bool]:
    """What bash would offer after `words` (the last one unfinished), and whether torch was imported for it."""
    code = f"""import sys, wellread
wellread.__path__.append({str(path)!r})
from wellread.cli import main
try:
    main()
finally:
    print('torch' in sys.modules)"""
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parent.parent),
        "_WELLREAD_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(["wellread", *words]),
        "COMP_CWORD": str(len(words)),
    }
    lines = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    return [line.partition(",")[2] for line in lines[:-1]], lines[-1] == "True"


def test_the_shell_completes_names_without_torch(methods):
    assert complete("me", path=methods.parent) == (["measured"], False)
    assert complete("run", "head-c", path=methods.parent) == (["head-count"], False)
    assert complete("show", "pass", path=methods.parent) == (["pass-on"], False)
    assert complete("list", "--chapter", "fak", path=methods.parent) == (["fakes"], False)


def test_the_shell_completes_settings(methods):
    shell = BashComplete(app, {}, "wellread", "_WELLREAD_COMPLETE")
    assert [found.value for found in shell.get_completions(["run", "head-count"], "--we")] == ["--weight"]
    assert [found.value for found in shell.get_completions(["run", "head-count", "--rule"], "f")] == ["first"]
    assert [found.value for found in shell.get_completions(["run", "head-count", "--bonus"], "n")] == ["none"]
    assert [found.type for found in shell.get_completions(["run", "pass-on", "--networks"], "")] == ["file"]
    assert shell.get_completions(["run", "no-such-method"], "--we") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell, capsys):
    assert main(["--completion", shell]) == 0
    assert "_WELLREAD_COMPLETE" in capsys.readouterr().out


# --- index, search


def test_three_lines_to_a_result(tmp_path, monkeypatch, capsys):
    import torch

    from wellread import load
    from wellread.rerankers import build

    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "bread.md").write_text("# Baking\n\n## Oven\nBake the loaf at 230 degrees.\n\n## Flour\nRye flour is darker than wheat.\n")
    (tmp_path / "notes" / "boat.txt").write_text("The sail is hoisted before leaving the harbour.")
    assert main(["index", "--encoder", "minilm-l6", "--corpus", "folder:notes", "--out", "idx", "--quiet"]) == 0
    assert capsys.readouterr().out == '3 passages in idx\nnext:  wellread search idx "what you want to know"\n'
    assert main(["search", "idx", "how", "hot", "is", "the", "oven", "-k", "2"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(" 1  bread.md#1  0.03279  (dense 1, lexical 1)\n    Baking > Oven\n    Bake the loaf at 230 degrees.\n\n 2  ")
    assert main(["search", "idx", "harbour", "--mode", "dense", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found[0]["id"] == "boat.txt#1" and set(found[0]) == {"id", "score", "title", "text", "ranks"} and len(found) == 3
    assert main(["search", "idx", "zebra", "--mode", "lexical"]) == 0
    assert "nothing found" in capsys.readouterr().out
    assert main(["search", "idx", "how", "hot", "--rerank", "minilm-l6"]) == 2
    assert "neural-ranking" in capsys.readouterr().err
    reranker = build(load("minilm-l6"), "knrm", 32, ["The sail is hoisted."])
    torch.nn.init.constant_(reranker.module.match.layer.weight, 1.0)
    reranker.save(tmp_path / "order")
    assert main(["search", "idx", "dark wheat flour", "-k", "1", "--rerank", "order", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["id"] == "bread.md#2" and "first search" in found["ranks"]
    (tmp_path / "notes" / "boat.txt").write_text("The anchor holds.")
    again = ["index", "--encoder", "minilm-l6", "--corpus", "folder:notes", "--out", "idx", "--quiet"]
    assert main(again) == 2
    assert "--update" in capsys.readouterr().err
    assert main([*again, "--update", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["passages"] == 3
    assert main(["search", "idx", "anchor", "-k", "1", "--mode", "lexical"]) == 0
    assert "boat.txt#1" in capsys.readouterr().out


def test_found_words_are_marked_in_a_terminal(tmp_path, monkeypatch):
    from click.testing import CliRunner

    from wellread.index import Index

    Index.build("minilm-l6", ["The runner was running."], tmp_path / "idx")
    shown = CliRunner().invoke(app, ["search", str(tmp_path / "idx"), "run", "--mode", "lexical"], color=True).output
    assert "\x1b[33m\x1b[1mrunning\x1b[0m." in shown and "runner was" in shown


@pytest.mark.parametrize(
    "line, why",
    [
        (["search", "nowhere", "x"], "holds no index"),
        (["index", "--encoder", "minilm-l6", "--corpus", "folder:nowhere", "--out", "idx"], "no folder 'nowhere'"),
        (["index", "--encoder", "timm/test_vit", "--corpus", "folder:notes", "--out", "idx", "--language", "none"], "could not be opened"),
        (["index", "--encoder", "minilm-l6", "--corpus", "folder:notes", "--out", "idx", "--language", "xx"], "language 'xx' is not known"),
    ],
)
def test_index_and_search_refuse_in_one_line(tmp_path, monkeypatch, capsys, line, why):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("words")
    assert main(line) == 2
    err = [each for each in capsys.readouterr().err.splitlines() if each.startswith("wellread: ")]
    assert len(err) == 1 and why in err[0]
    assert not (tmp_path / "idx").exists()


# --- cut


def test_a_size_is_cut_out_of_a_network_of_many(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from wellread.data import as_data
    from wellread.elastic.sortednet import sortednet, sub_network

    pictures = [(Image.new("RGB", (16, 16), color), name) for name, color in {"dark": "black", "light": "white"}.items() for _ in range(4)]
    start = wellread.load("timm/test_vit", pretrained=False, img_size=16).with_head(("dark", "light"))
    many = sortednet(start, as_data(pictures), epochs=1, batch_size=4)
    many.save(tmp_path / "many")
    assert main(["cut", str(tmp_path / "many"), "--json"]) == 0
    sizes = [row["size"] for row in json.loads(capsys.readouterr().out)]
    assert sizes == [row["size"] for row in many.reports["sortednet"].tables["sizes"]] and len(sizes) > 1  # type: ignore[union-attr]
    assert main(["cut", str(tmp_path / "many")]) == 0 and f"{len(sizes)} sizes" in capsys.readouterr().out
    assert main(["cut", str(tmp_path / "many"), sizes[0], "--out", str(tmp_path / "one")]) == 0
    assert wellread.load(str(tmp_path / "one")).fingerprint == sub_network(many, sizes[0]).fingerprint
    capsys.readouterr()
    for words, said in ((["9-9-9", "--out", str(tmp_path / "two")], "has no size '9-9-9'"), ([sizes[0]], "add --out FOLDER")):
        assert main(["cut", str(tmp_path / "many"), *words]) == 2 and said in capsys.readouterr().err
    start.save(tmp_path / "plain")
    assert main(["cut", str(tmp_path / "plain")]) == 2 and "lists no sizes" in capsys.readouterr().err
