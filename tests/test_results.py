"""Results come back as they were, appear whole or not at all, and can be looked at."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wellread import folders
from wellread import results as made
from wellread.charts import bar_chart, line_chart, roc_chart
from wellread.errors import BadInput
from wellread.folders import new_folder, writable
from wellread.pages import page, table_html
from wellread.results import (
    Front,
    Heatmaps,
    Ranking,
    Report,
    Scores,
    load_result,
)
from wellread.tables import number

EVIL = '<script>alert("x")</script> & $\\foo$ _[red]\x1b[31m'
PNG = line_chart({"a": [1.0, 2.0, math.nan, 1.5]}, x="step", y="loss", log_y=True)


def digest(result: Any) -> str:
    """Of every bit of a result: types, shapes, values."""
    found = hashlib.sha256(type(result).__name__.encode())
    for each in fields(result):
        value = getattr(result, each.name)
        found.update(f"{each.name} {value.dtype} {value.shape}".encode() + value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
    return found.hexdigest()


def every_kind() -> dict[str, Any]:
    random = np.random.default_rng(0)
    step = {
        "method": "data-diet",
        "settings": {"score": "el2n", "path": Path("a")},
        "parents": ["12ab"],
        "data": [],
        "when": None,
        "result": None,
    }
    columns = {
        "loss": random.normal(size=150).tolist(),
        "wrong": (random.random(150) < 0.5).tolist(),
        "big": [2**70, *range(149)],
        "gaps": [None, math.nan, math.inf, 0.1, "text"] * 30,
    }
    scores = random.normal(size=150).astype(np.float32)
    scores[3] = np.inf
    maps = random.random((3, 20, 30)).astype(np.float32)
    images = random.integers(0, 256, (3, 20, 30, 3), dtype=np.uint8)
    points = [{"ms": 3.5, "accuracy": 0.9, "edits": [{"rank": 4}], "$array": "x"}, {"ms": 1, "accuracy": 0.7}, {"ms": 4, "accuracy": 0.8}]
    return {
        "scores": Scores(
            scores,
            "el2n",
            "high is hard",
            [f"{EVIL} \udcff é {i}" for i in range(150)],
            columns,
            step,
            {"agreement": 0.9, EVIL: math.nan},
            {EVIL: [{EVIL: EVIL, "kept": 0.5}, {"kept": None}]},
            [EVIL],
        ),
        "ranking": Ranking([EVIL, "b", "c"], np.array([0.1, 0.3, 0.2]), "loss", higher_is_better=False, made_by=step),
        "front": Front(points, "ms", "accuracy"),
        "heatmaps": Heatmaps(maps, images, [EVIL, "b", "c"], np.array([2.0, 0.0, -1.0]), None, step),
        "report": Report(EVIL, {"auroc": math.nan, EVIL: EVIL}, {EVIL: [{EVIL: EVIL, "n": 3}, {"n": None}]}, EVIL, {EVIL: PNG}, [EVIL]),
    }


KINDS = ("scores", "ranking", "front", "heatmaps", "report")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("saved")
    for name, result in every_kind().items():
        result.save(root / name)
    return root


def test_every_kind_comes_back_bit_for_bit_in_a_new_process(saved: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_results import digest, load_result\n"
        "for folder in sys.argv[1:]: print(digest(load_result(folder)))\n"
    )
    run = subprocess.run([sys.executable, "-c", code, *(str(saved / name) for name in KINDS)], capture_output=True, text=True, check=True)
    results = every_kind()
    for result in results.values():
        if result.made_by:
            result.made_by["settings"]["path"] = "a"
    assert run.stdout.split() == [digest(results[name]) for name in KINDS]


def test_files(saved: Path) -> None:
    for name in KINDS:
        kept = {file.name for file in (saved / name).iterdir()}
        assert kept >= {"result.json", "report.html"}
        assert ("scores.csv" in kept) == (name in ("scores", "ranking", "front"))
        json.loads((saved / name / "result.json").read_text(), parse_constant=lambda x: pytest.fail(f"{x} is not JSON"))
        assert all(file.stat().st_mode & 0o777 == (saved / name).stat().st_mode & 0o666 for file in (saved / name).glob("*.*"))
    assert len(list((saved / "heatmaps" / "pictures").glob("*.png"))) == 3
    with (saved / "scores" / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    values = every_kind()["scores"].values
    assert np.array_equal(np.array([row["el2n"] for row in rows], np.float32), values)
    assert [row["index"] for row in rows] == [str(i) for i in range(150)]


def test_results_do_not_import_the_heavy_packages() -> None:
    code = "import sys, wellread.results; print([m for m in ('torch', 'matplotlib', 'rich', 'PIL', 'sklearn') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("file", ["result.json", "arrays.safetensors"])
def test_a_flipped_bit_is_refused(saved: Path, tmp_path: Path, name: str, file: str) -> None:
    import shutil

    folder = shutil.copytree(saved / name, tmp_path / "copy")
    if not (folder / file).exists():
        pytest.skip("this kind has no arrays")
    whole = (folder / file).read_bytes()
    # in the JSON only the content counts: the white space and the version may change
    places = range(0, len(whole), max(1, len(whole) // 40)) if file != "result.json" else [whole.rindex(b'"fields"') + 30, whole.rindex(b'"') - 3]
    for place in places:
        (folder / file).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(BadInput, match=r"damaged|not known|needs"):
            load_result(folder)
    (folder / file).write_bytes(whole)
    assert digest(load_result(folder)) == digest(load_result(saved / name))


def test_what_is_no_result_is_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="holds no result"):
        load_result(tmp_path)
    (tmp_path / "result.json").write_text("[1]")
    with pytest.raises(BadInput, match="damaged"):
        load_result(tmp_path)
    record = json.loads((saved / "front" / "result.json").read_text())
    (tmp_path / "result.json").write_text(json.dumps(record | {"format": 99}))
    with pytest.raises(BadInput, match="or later"):
        load_result(tmp_path)
    (tmp_path / "result.json").write_bytes((saved / "scores" / "result.json").read_bytes())
    with pytest.raises(BadInput, match="damaged"):
        load_result(tmp_path)  # its arrays are gone


# ---- folders -------------------------------------------------------------------------------------------------------------------------


def test_an_existing_output_is_refused_or_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b" / "out"
    Ranking(["x"], [1.0]).save(folder)
    with pytest.raises(BadInput, match="exists: choose another folder, or use force"):
        Ranking(["y"], [1.0]).save(folder)
    (folder / "old").touch()
    Report("second").save(folder, force=True)
    assert load_result(folder).title == "second"
    assert not (folder / "old").exists()
    assert [each.name for each in folder.parent.iterdir()] == ["out"]


def test_force_spares_what_wellread_did_not_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photos").mkdir()
    Report("empty folders may go").save(tmp_path / "photos", force=True)
    (tmp_path / "photos" / "result.json").unlink()
    (tmp_path / "photos" / "report.html").rename(tmp_path / "photos" / "mine.html")
    (tmp_path / "file").write_text("text")
    monkeypatch.chdir(tmp_path / "photos")
    for place, words in (("photos", "is the folder you work in"), ("file", "is a file"), ("", "is the folder you work in")):
        with pytest.raises(BadInput, match=words):
            writable(tmp_path / place, force=True)
    monkeypatch.chdir("/")
    with pytest.raises(BadInput, match="was not written by wellread"):
        writable(tmp_path / "photos", force=True)


@pytest.mark.parametrize("path", ["", " ", "/", "a\0b", None, 3, "/proc/nothing/here", "x" * 300, "~nobody-of-that-name/x"])
def test_unwritable_places_are_refused_at_once(path: Any) -> None:
    with pytest.raises(BadInput):
        writable(path)


def test_below_a_file_is_unwritable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="cannot write"):
        writable(tmp_path / "file" / "out")


def test_a_failed_save_leaves_nothing(tmp_path: Path) -> None:
    for force in (False, True):
        with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out", force) as place:
            (place / "half").touch()
            raise KeyboardInterrupt
        assert list(tmp_path.iterdir()) == []
    Report("old").save(tmp_path / "out")
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "out", force=True) as place:
        assert load_result(tmp_path / "out").title == "old"
        raise ZeroDivisionError
    assert load_result(tmp_path / "out").title == "old"
    with pytest.raises(BadInput, match="disk is full"), new_folder(tmp_path / "other"):
        raise OSError(28, "No space left on device")
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def killed(code: str, *arguments: object) -> None:
    """Run `code` until it prints a line, then kill it."""
    child = subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"now\n"
    child.send_signal(signal.SIGKILL)
    child.wait()


STOP = "import sys, time, os\ndef stop(*a, **k):\n    print('now', flush=True)\n    time.sleep(60)\n"


@pytest.mark.skipif(os.name == "nt", reason="kill -9")
def test_a_killed_save_leaves_nothing_at_the_path(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    killed(STOP + "import wellread.results as r\nr.page = stop\nr.Scores([1.0, 2.0]).save(sys.argv[1])", folder)
    [left] = tmp_path.iterdir()
    assert re.fullmatch(r"\.out\.partial-\d+-.*", left.name)
    assert (left / "arrays.safetensors").exists()  # it was in the middle
    Scores([3.0]).save(folder)
    assert [each.name for each in tmp_path.iterdir()] == ["out"]
    assert load_result(folder).values.tolist() == [3.0]


@pytest.mark.skipif(os.name == "nt", reason="kill -9")
def test_a_kill_between_old_and_new_brings_the_old_one_back(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    Scores([1.0]).save(folder)
    second = "real = os.rename\nos.rename = lambda a, b: stop() if str(b) == sys.argv[1] else real(a, b)\n"
    killed(STOP + second + "import wellread.results as r\nr.Report('new').save(sys.argv[1], force=True)", folder)
    assert not folder.exists()
    with pytest.raises(BadInput, match="exists"):
        writable(folder)
    assert load_result(folder).values.tolist() == [1.0]
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_leftovers_of_the_living_and_of_other_machines_stay(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out") as mine:
        alive = tmp_path / f".out.partial-{os.getppid()}-0.{folders._HOST}"
        reused = tmp_path / f".out.partial-{os.getpid()}-999999.{folders._HOST}"  # in a container every run has the same number
        elsewhere, old = tmp_path / ".out.partial-1-0.elsewhere", tmp_path / ".out.partial-2-0.elsewhere"
        other = tmp_path / ".outer.partial-999999999-0.elsewhere"
        for each in (alive, reused, elsewhere, old, other):
            each.mkdir()
        os.utime(old, (0, 0))
        writable(tmp_path / "out")
        assert {each.name for each in tmp_path.iterdir()} == {mine.name, alive.name, elsewhere.name, other.name}


@pytest.mark.skipif(sys.platform != "linux", reason="zombies")
def test_a_dead_run_that_nobody_has_buried_counts_as_dead(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "print()"], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.read()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        (tmp_path / f".out.partial-{child.pid}-0.{folders._HOST}").mkdir()
        writable(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_two_savers_do_not_meet(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="exists"), new_folder(tmp_path / "out") as first, new_folder(tmp_path / "out") as second:
        (first / "one").touch()
        (second / "two").touch()
    assert [each.name for each in tmp_path.rglob("*")] == ["out", "two"]


# ---- what they can do ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 5, 10, 37, 100])
@pytest.mark.parametrize("ties", [False, True])
def test_keep(size: int, ties: bool) -> None:
    random = np.random.default_rng(size)
    values = random.integers(0, 3, size).astype(float) if ties else random.normal(size=size)
    scores = Scores(values)
    order = np.argsort(values, kind="stable")
    for m in range(1, size + 1):
        fraction = m / size
        hardest, easiest = scores.keep(fraction), scores.keep(fraction, "easiest")
        assert hardest.dtype == np.int64
        assert hardest.tolist() == sorted(order[size - m :].tolist())
        assert easiest.tolist() == sorted(order[:m].tolist())
        assert 2 * m > size or not set(hardest) & set(easiest)
        assert np.array_equal(scores.keep(fraction, "offset", offset=1 - fraction), hardest)
        assert np.array_equal(scores.keep(fraction, "offset", offset=0), easiest)
        chosen = scores.keep(fraction, "random", seed=3)
        assert len(set(chosen.tolist())) == m
        assert np.array_equal(chosen, np.sort(chosen))
        assert np.array_equal(chosen, scores.keep(fraction, "random", seed=3))
        for dropped in range(size - m + 1):
            assert scores.keep(fraction, "offset", offset=dropped / size).tolist() == sorted(order[dropped : dropped + m].tolist())
    for rule in ("hardest", "easiest", "random"):
        assert scores.keep(1.0, rule).tolist() == list(range(size))  # type: ignore[arg-type]
        assert len(scores.keep(1e-9, rule)) == 1  # type: ignore[arg-type]


def test_offset_meets_hardest_for_any_fraction() -> None:
    for size in (3, 5, 10, 101):
        scores = Scores(np.random.default_rng(0).normal(size=size))
        assert len(scores.keep(1e-6, "offset", offset=1 - 1e-5)) == 1
        for fraction in np.linspace(0.01, 1, 100):
            assert np.array_equal(scores.keep(float(fraction), "offset", offset=1 - float(fraction)), scores.keep(float(fraction)))


def test_random_differs_by_seed_and_not_by_score() -> None:
    scores, reverse = Scores(np.arange(100.0)), Scores(-np.arange(100.0))
    assert not np.array_equal(scores.keep(0.5, "random", seed=0), scores.keep(0.5, "random", seed=1))
    assert np.array_equal(scores.keep(0.5, "random", seed=0), reverse.keep(0.5, "random", seed=0))


def test_keep_in_each_class() -> None:
    values = np.array([0.0, 9, 1, 8, 2, 7, 100, 101])  # class 7 has the highest scores and would take every place
    labels = [5, 5, 5, 5, 5, 5, 7, 7]
    assert Scores(values).keep(0.25).tolist() == [6, 7]
    assert Scores(values).keep(0.5, labels=labels).tolist() == [1, 3, 5, 7]
    assert Scores(values).keep(0.5, "easiest", labels=labels).tolist() == [0, 2, 4, 6]
    assert Scores(values).keep(0.5, "offset", offset=1 / 3, labels=labels).tolist() == [3, 4, 5, 7]
    assert set(np.asarray(labels)[Scores(values).keep(0.01, "random", labels=labels)]) == {5, 7}
    assert Scores(values).keep(1.0, labels=labels).tolist() == list(range(8))


def test_highest_and_lowest_break_ties_by_index() -> None:
    scores = Scores([2.0, 5.0, 5.0, -np.inf, np.inf, 2.0])
    assert scores.highest(4).tolist() == [4, 1, 2, 0]
    assert scores.lowest(99).tolist() == [3, 0, 5, 1, 2, 4]


def test_front() -> None:
    front = Front([{"ms": ms, "top1": top1} for ms, top1 in [(3, 0.8), (1, 0.5), (2, 0.8), (2, 0.7), (9, 0.79), (9, 0.95), (1, 0.4)]], "ms", "top1")
    assert front.efficient() == [1, 2, 5]
    assert front.best() == {"ms": 9, "top1": 0.95}
    assert front.best(cost_at_most=8.9) == {"ms": 2, "top1": 0.8}
    with pytest.raises(BadInput, match="the cheapest has 1"):
        front.best(cost_at_most=0.5)


def test_ranking() -> None:
    assert Ranking(["a", "b", "c"], [1.0, 2.0, 2.0]).order().tolist() == [1, 2, 0]
    assert Ranking(["a", "b", "c"], [2.0, 1.0, 1.0], higher_is_better=False).best == "b"


def test_overlay() -> None:
    image = np.random.default_rng(0).integers(0, 256, (1, 8, 9, 3), dtype=np.uint8)
    zero = Heatmaps(np.zeros((1, 8, 9)), image, ["a"], [0.0])
    assert np.array_equal(zero.overlay(0), image[0])
    half = np.zeros((1, 8, 9), np.float32)
    half[0, :, 5:] = 1
    heat = Heatmaps(half, image, ["a"], [1.0])
    assert np.array_equal(heat.overlay(0)[:, :5], image[0, :, :5])
    assert np.abs(heat.overlay(0, strength=1)[:, 5:].astype(int) - [252, 255, 164]).max() <= 1  # the bright end of inferno
    grey = Heatmaps(half, image[..., 0], ["a"], [1.0])
    assert grey.images.shape == (1, 8, 9, 3)
    assert "no positive evidence" in zero.html()
    assert "no positive evidence" not in heat.html()


def test_torch_tensors_are_welcome() -> None:
    torch = pytest.importorskip("torch")
    values = torch.tensor([1.0, 2.0], requires_grad=True)
    assert Scores(values).values.dtype == np.float32
    assert Scores(values.detach().bfloat16(), columns={"n": torch.tensor([1, 2])}).columns == {"n": [1, 2]}


BAD: list[tuple[str, Callable[[], Any]]] = [
    (r"values\[2\] is nan", lambda: Scores([1.0, 2.0, math.nan, math.nan])),
    ("not empty", lambda: Scores([])),
    (r"numbers \[N\]", lambda: Scores([[1.0]])),
    (r"numbers \[N\]", lambda: Scores(["a"])),
    ("do not form an array", lambda: Scores([[1.0], [1.0, 2.0]])),
    ("items must hold one entry", lambda: Scores([1.0], items=["a", "b"])),
    ("items must hold one entry", lambda: Scores([1.0, 2.0], items="ab")),  # type: ignore[arg-type]
    (r"columns\['n'\] must hold", lambda: Scores([1.0], columns={"n": [1, 2]})),
    ("cannot be saved", lambda: Scores([1.0], columns={"n": [object()]})),
    (r"fraction 0 must lie in \(0, 1\]", lambda: Scores([1.0]).keep(0)),
    ("fraction 1.1", lambda: Scores([1.0]).keep(1.1)),
    ("fraction nan", lambda: Scores([1.0]).keep(math.nan)),
    ("fraction True", lambda: Scores([1.0]).keep(True)),
    ("rule 'best' is not known", lambda: Scores([1.0]).keep(0.5, "best")),  # type: ignore[arg-type]
    ("belong together", lambda: Scores([1.0]).keep(0.5, "offset")),
    ("belong together", lambda: Scores([1.0]).keep(0.5, offset=0.1)),
    ("more than all", lambda: Scores([1.0]).keep(0.5, "offset", offset=0.6)),
    ("labels must hold", lambda: Scores([1.0]).keep(0.5, labels=[1, 2])),
    ("give 1 or more", lambda: Scores([1.0]).highest(0)),
    (r"scores\[0\] is nan", lambda: Ranking(["a"], [math.nan])),
    ("items must hold", lambda: Ranking([], [1.0])),
    ("at least one point", lambda: Front([], "ms", "top1")),
    (r"points\[1\]\['top1'\] is None", lambda: Front([{"ms": 1, "top1": 2}, {"ms": 1}], "ms", "top1")),
    (r"points\[0\]\['ms'\] is nan", lambda: Front([{"ms": math.nan, "top1": 2}], "ms", "top1")),
    ("cannot be saved", lambda: Front([{"ms": 1, "top1": 2, "network": object()}], "ms", "top1")),
    (r"maps\[0, 1, 1\] is inf", lambda: Heatmaps(np.array([[[0, 0], [0, np.inf]]]), np.zeros((1, 2, 2, 3), np.uint8), ["a"], [1.0])),
    ("images must be uint8", lambda: Heatmaps(np.zeros((1, 2, 2)), np.zeros((1, 2, 2, 3)), ["a"], [1.0])),
    ("images must be uint8", lambda: Heatmaps(np.zeros((1, 2, 2)), np.zeros((1, 4, 4, 3), np.uint8), ["a"], [1.0])),
    ("targets must hold", lambda: Heatmaps(np.zeros((1, 2, 2)), np.zeros((1, 2, 2, 3), np.uint8), ["a", "b"], [1.0])),
    ("there is no heatmap 1", lambda: Heatmaps(np.zeros((1, 2, 2)), np.zeros((1, 2, 2, 3), np.uint8), ["a"], [1.0]).overlay(1)),
    (
        "colormap 'x' is not known",
        lambda: Heatmaps(np.zeros((1, 2, 2)), np.zeros((1, 2, 2), np.uint8), ["a"], [1.0]).overlay(0, colors="x"),
    ),
    ("not a PNG", lambda: Report("a", pictures={"b": b"GIF"})),
    ("every row must be a dict", lambda: Report("a", tables={"b": [[1, 2]]})),  # type: ignore[list-item]
    ("at least one thing", lambda: bar_chart({}, x="accuracy")),
]


@pytest.mark.parametrize(("words", "call"), BAD)
def test_bad_input_gets_one_sentence(words: str, call: Callable[[], Any]) -> None:
    with pytest.raises(BadInput, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


# ---- to look at ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_the_page_needs_nothing_else_and_runs_nothing(saved: Path, name: str) -> None:
    text = (saved / name / "report.html").read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert "<script" not in text.lower()
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"base64,[A-Za-z0-9+/=]+", "", text))
    assert all(source.startswith("data:image/png;base64,") for source in re.findall(r'\bsrc="([^"]*)', text))
    assert all(link.startswith("#") for link in re.findall(r'\bhref="([^"]*)', text))
    if name != "front":
        assert "&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;" in text
    from html.parser import HTMLParser

    class Balance(HTMLParser):
        stack: list[str] = []  # noqa: RUF012

        def handle_starttag(self, tag: str, attrs: Any) -> None:
            if tag not in ("meta", "img", "br"):
                self.stack.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.stack.pop() == tag

    parser = Balance()
    parser.feed(text)
    assert parser.stack == []


@pytest.mark.parametrize("width", [20, 60, 80, 200])
@pytest.mark.parametrize("name", KINDS)
def test_show_fits_the_terminal(name: str, width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    every_kind()[name].show()
    shown = capsys.readouterr().out
    assert shown.strip()
    assert max(map(len, shown.splitlines())) <= width
    assert len(shown.splitlines()) < 60 or width == 20
    assert "\x1b" not in shown  # neither colors without a terminal nor commands from a file name
    if width >= 60:
        assert "[red]" in shown or name == "front"  # text is not markup


def test_show_in_a_terminal_without_unicode(saved: Path) -> None:
    code = "import sys, wellread.results as r\nfor f in sys.argv[1:]: r.load_result(f).show()"
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "COLUMNS": "60"}
    run = subprocess.run([sys.executable, "-c", code, *(str(saved / n) for n in KINDS)], capture_output=True, env=environment, check=True)
    assert b"heatmaps" in run.stdout
    assert run.stdout.isascii()


@pytest.mark.parametrize("name", KINDS)
def test_to_dict_is_json(name: str) -> None:
    found = json.loads(json.dumps(every_kind()[name].to_dict(), allow_nan=False))
    assert found["kind"] == type(every_kind()[name]).__name__
    if name == "scores":
        assert found["values"][3] is None
        assert found["values"][0] == every_kind()["scores"].values[0].item()
    if name == "heatmaps":
        assert found["maps"] == {"shape": [3, 20, 30], "dtype": "float32"}


def test_numbers_are_readable() -> None:
    shown = {0: "0", 12345: "12,345", 0.98134567: "0.9813", 98.7654: "98.77", 1234.5: "1,234", 0.1: "0.1", 1.23e-7: "1.23e-07"}
    assert {value: number(value) for value in shown} == shown
    assert number(np.float32(0.5)) == "0.5"
    assert number(math.inf) == "inf"
    rows = [{"a": 0.7708, "n": 1, "flag": True}, {"a": 0.777, "n": None, "flag": False}, {"a": None}]
    assert re.findall(r"<td[^>]*>(.*?)</td>", table_html(rows)) == ["0.7708", "1", "yes", "0.7770", "-", "no", "-", "-", "-"]
    assert "The first 1 of 3 rows." in table_html(rows, limit=1)


def test_a_page_of_ones_own() -> None:
    whole = page("T & t", [(f"part {i}", "<p>x</p>") for i in range(5)], lead="<lead>", footer="<foot>")
    assert "T &amp; t" in whole
    assert "&lt;lead&gt;" in whole
    assert "&lt;foot&gt;" in whole
    assert whole.count("<a href=") == 5


def test_charts_are_pictures_with_room_for_their_words() -> None:
    import io

    from PIL import Image

    long = "a network with a name that goes on and on and then for some more words $x$"
    charts = [
        line_chart({EVIL: [1.0], long: [1.0, 2.0, 3.0]}, x="step", y="loss", spread={long: [0.1, 0.1, 0.1]}, smooth=2),
        line_chart({"a": [1.0, 2.0]}, x="kept", y="accuracy (%)", at=[0.1, 0.5], title=EVIL),
        roc_chart({EVIL: ([0, 1], [0, 1], 0.5), long: ([0, 0, 1], [0, 1, 1], 1.0)}, positive="defects"),
        bar_chart({EVIL: -1.0, long: 2.0}, x="gain", intervals={long: (1.0, 3.0)}),
        bar_chart({"a": 0.95, "b": 0.96}, x="accuracy", from_zero=False),
        made.histogram_chart([1.0, 1.0], x="score", y="examples"),
        made.histogram_chart([math.inf], x="score", y="examples"),
    ]
    for chart in charts:
        picture = np.asarray(Image.open(io.BytesIO(chart)).convert("L"))
        assert picture.shape[1] == 1800
        edges = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
        assert (edges == 255).all()  # nothing is cut off
        assert (picture < 128).sum() > 500
