"""What every method must be, checked for all that the catalogue finds: one test, never edited when a method comes.

A method whose signature says too little to make up an example (graphs, pairs, a setting without which it is slow) says it itself, in its
tests/<chapter>/test_<method>.py: `def example(folder: Path) -> dict`, arguments that are small, valid, and can be typed (names, numbers).
Drafts are left out. The second half of the file makes a method, passes it through the test, and sees each check fail when it should.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import wellread
from wellread import catalog
from wellread.cli import RESERVED, main
from wellread.errors import BadInput

METHODS = catalog.methods()
GIVES = {"Network", "Scores", "Ranking", "Front", "Heatmaps", "Report"}
FAST = {"epochs": 1, "steps": 4, "iterations": 4, "trials": 2, "runs": 1, "rounds": 1, "folds": 2, "samples": 8, "batch_size": 8}
MINUTES = 12  # a bench may take, on two cores


# --- what the checks work with


@dataclass
class Tools:
    networks: list[str]  # folders of three fine-tunings of one small network with three classes
    photos: list[str]  # folders of thirty pictures of these classes, different ones in each
    loads: Callable[[Path], dict[str, Any]]  # what another process finds in a saved folder
    folder: Path  # empty
    capsys: pytest.CaptureFixture[str]

    def run(self, words: list[str]) -> tuple[int, str, str]:
        self.capsys.readouterr()
        code = main(words)
        return code, *self.capsys.readouterr()


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> list[str]:
    import torch

    folder = tmp_path_factory.mktemp("networks")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = wellread.load("timm/test_resnet", pretrained=False, num_classes=3)
        network.input = network.input.changed(size=(64, 64))
        network.labels = ("blue", "green", "red")
        for name in "abc":
            weights = network.module.state_dict()
            near = {
                key: value + 0.01 * value.abs() * torch.rand_like(value) if value.is_floating_point() else value for key, value in weights.items()
            }
            network.with_weights(near).save(folder / name)
    return [str(folder / name) for name in "abc"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for part in range(4):
        for channel, name in enumerate(("red", "green", "blue")):
            place = folder / str(part) / name
            place.mkdir(parents=True)
            for number in range(10):
                pixels = random.integers(0, 160, (32, 32, 3))
                pixels[..., channel] += 60
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"{number}.png")
    return [f"folder:{folder / str(part)}" for part in range(4)]


LOADER = """
import json, pathlib, sys
import wellread
for line in sys.stdin:
    folder = pathlib.Path(line.strip())
    try:
        if (folder / "wellread.json").exists():
            network = wellread.load(folder)
            found = {"fingerprint": network.fingerprint, "method": network.lineage[-1]["method"]}
        else:
            result = wellread.load_result(folder)
            found = {"content": result.to_dict(), "method": (result.made_by or {}).get("method")}
    except Exception as error:
        found = {"error": repr(error)}
    print(json.dumps(found), flush=True)
"""


@pytest.fixture(scope="module")
def loads():
    """A second process, started once: importing torch again for every method would take minutes."""
    process = subprocess.Popen(
        [sys.executable, "-c", LOADER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent
    )
    assert process.stdin is not None and process.stdout is not None

    def ask(folder: Path) -> dict[str, Any]:
        process.stdin.write(f"{folder}\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
        return json.loads(process.stdout.readline())  # type: ignore[union-attr]

    yield ask
    process.kill()  # it holds nothing, and an orderly end takes seconds
    process.communicate()


@pytest.fixture
def tools(networks, photos, loads, tmp_path, capsys) -> Tools:
    return Tools(networks, photos, loads, tmp_path, capsys)


def repository(card: catalog.Card) -> Path:
    return card.path.parents[2]


def its_tests(card: catalog.Card) -> Path:
    return repository(card) / "tests" / card.chapter / f"test_{card.path.stem}.py"


def example(card: catalog.Card, tools: Tools) -> dict[str, Any]:
    """Small valid arguments: the method's own, else made up from its signature. All can be typed into a shell."""
    from wellread.method import parameters
    from wellread.network import Network

    path = its_tests(card)
    if path.exists() and "\ndef example(" in path.read_text("utf-8"):
        spec = importlib.util.spec_from_file_location(f"example_of_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        folder = tools.folder / "example"
        folder.mkdir(exist_ok=True)
        return module.example(folder)
    given: dict[str, Any] = {}
    photos = iter(tools.photos)
    for parameter in parameters(catalog.function(card.name)):
        if parameter.type is Network and parameter.required:
            given[parameter.name] = tools.networks[:2] if parameter.many else tools.networks[0]
        elif parameter.needs is not None and parameter.required:
            given[parameter.name] = [next(photos)] if parameter.many else next(photos)
        elif parameter.name in FAST and isinstance(parameter.default, int) and parameter.default > FAST[parameter.name]:
            given[parameter.name] = FAST[parameter.name]
    return given


def typed(card: catalog.Card, given: dict[str, Any], out: Path) -> list[str]:
    """The command with these arguments."""
    words = ["run", card.name]
    for name, value in given.items():
        flag = name.replace("_", "-")
        for each in value if isinstance(value, list) else [value]:
            words += [f"--{flag}" if each else f"--no-{flag}"] if isinstance(each, bool) else [f"--{flag}", str(each)]
    return [*words, "--out", str(out), "--quiet"]


# --- the checks


def the_card_is_complete(card: catalog.Card, tools: Tools) -> None:
    assert catalog.check_card(card) == []
    assert [other.chapter for other in catalog.methods() if other.name == card.name] == [card.chapter], "two methods have this name"


def the_signature_says_all(card: catalog.Card, tools: Tools) -> None:
    from wellread.method import parameters, returns

    function = catalog.function(card.name)
    assert hasattr(function, "__wrapped__"), "the function lacks @method"
    plain = inspect.unwrap(function)
    for parameter in inspect.signature(plain).parameters.values():
        assert parameter.annotation is not parameter.empty, f"{parameter.name} has no type"
        assert parameter.name not in RESERVED, f"the command line needs the name {parameter.name} for itself"
        assert parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY), f"{parameter.name} cannot be typed into a shell"
        assert parameter.kind is not parameter.KEYWORD_ONLY or parameter.default is not parameter.empty, (
            f"{parameter.name} is a setting without a default"
        )
    assert any(parameter.kind == "brings" for parameter in parameters(function)), "it brings nothing"
    for parameter in parameters(function):
        assert parameter.kind == "setting" or parameter.needs or parameter.type.__name__ == "Network", (
            f"{parameter.name} is brought and neither network nor data"
        )
    assert returns(function) in GIVES


def the_docstrings_say_how(card: catalog.Card, tools: Tools) -> None:
    from wellread.method import parameters

    function = catalog.function(card.name)
    for parameter in parameters(function):
        assert parameter.help, f"the docstring has no line '{parameter.name}: ...'"
    assert "Raises" in (function.__doc__ or ""), "the docstring does not say which errors there are"
    tree = ast.parse(card.code.read_text("utf-8"))
    top = ast.get_docstring(tree) or ""
    source = [str(card.paper[key]) for key in ("arxiv", "doi", "url") if card.paper.get(key)]
    assert any(each in top or each in (function.__doc__ or "") for each in source), f"neither docstring names the source ({source[0]})"
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        words = ast.get_docstring(node) or ""
        assert words, f"{node.name} has no docstring"
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            assert node.returns and all(each.annotation for each in arguments), f"{node.name} is not fully typed"
            types = " ".join(ast.unparse(each.annotation) for each in arguments if each.annotation) + ast.unparse(node.returns)
            shapes = re.search(r"\[[^\]]*\]|shape|scalar|dimension", words)
            assert not re.search(r"\b(Tensor|ndarray|Array)\b", types) or shapes, f"the docstring of {node.name} gives no shapes"


def a_test_and_a_bench_are_there(card: catalog.Card, tools: Tools) -> None:
    path = its_tests(card)
    assert path.exists(), f"there is no {path.relative_to(repository(card))}"
    assert "\ndef test_" in path.read_text("utf-8")
    assert (repository(card) / "bench" / card.code.name).exists(), f"there is no bench/{card.code.name}"


def it_was_measured(card: catalog.Card, tools: Tools) -> None:
    measured = catalog.measurements(card.name)
    assert measured is not None, f"there is no bench/results/{card.path.stem}.json"
    assert measured["method"] == card.name and measured["chapter"] == card.chapter
    assert re.fullmatch("[0-9a-f]{64}", measured["code_sha256"] or ""), "the hash of the file that was measured is missing"
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", measured["date"]) and measured["machine"] and measured["sizes"] and measured["claims_tested"]
    assert {"python", "torch", "numpy"} <= set(measured["versions"])
    assert 0 < measured["seconds"] <= 60 * MINUTES
    assert measured["seeds"], "no seeds are named"
    assert measured["expects"], "nothing was expected"
    for expect in measured["expects"]:
        assert expect["sentence"] and expect["metric"] and isinstance(expect["threshold"], int | float) and isinstance(expect["passed"], bool)
        assert "error" not in expect, f"the expectation {expect['sentence']!r} could not be computed"
    assert measured["figures"] and measured["baselines"], "there are no figures, or nothing to compare them with"
    for name, figure in {**measured["figures"], **measured["baselines"]}.items():
        values = figure["per_seed"]
        assert values, f"{name} is empty"
        if None not in values:
            assert np.isclose(np.mean(values), figure["mean"], rtol=1e-9), f"the mean of {name} is not that of its values"


def bad_input_gets_one_line(card: catalog.Card, tools: Tools) -> None:
    from wellread.method import parameters

    function, good = catalog.function(card.name), example(card, tools)
    taken = tools.folder / "taken"
    taken.mkdir()
    (tools.folder / "file").write_text("")
    for what, name, python, shell in bad_arguments(card, good, tools):
        try:
            function(**{**good, name: python})
        except BadInput as refused:
            assert "\n" not in str(refused) and len(str(refused)) >= 20, f"{what} in {name}: {refused!r}"
        except Exception as error:
            raise AssertionError(f"{what} in {name} raises {error!r}") from error
        else:
            raise AssertionError(f"{what} in {name} is accepted")
        one_line(tools, typed(card, {**good, name: shell}, tools.folder / "out"), f"{what} in {name}")
    one_line(tools, typed(card, good, taken), "an output that exists")
    assert taken.is_dir() and not any(taken.iterdir())
    one_line(tools, typed(card, good, tools.folder / "file" / "out"), "an output that cannot be written")
    one_line(tools, [*typed(card, good, tools.folder / "out"), "--no-such-setting", "1"], "an unknown setting")
    needed = next(parameter.name for parameter in parameters(function) if parameter.required)
    one_line(tools, typed(card, {name: value for name, value in good.items() if name != needed}, tools.folder / "out"), f"no {needed}")


def one_line(tools: Tools, words: list[str], what: str) -> None:
    code, out, err = tools.run(words)
    assert (code, out) == (2, ""), f"{what}: exit {code}, {err}"
    assert err.count("\n") == 1 and "Traceback" not in err and len(err) >= 30, f"{what}: {err}"
    left = [path.name for path in tools.folder.iterdir() if path.name.startswith("out")]
    assert not left, f"{what} leaves {left}"


def bad_arguments(card: catalog.Card, good: dict[str, Any], tools: Tools) -> list[tuple[str, str, Any, Any]]:
    """(what is bad, argument, as Python gives it, as the shell gives it)."""
    import torch

    from wellread.data import as_data
    from wellread.method import parameters
    from wellread.network import Network, load

    cases: list[tuple[str, str, Any, Any]] = []

    def add(what: str, name: str, python: Any, shell: Any) -> None:
        many = isinstance(good[name], list)
        cases.append((what, name, [*good[name][1:], python] if many else python, [*good[name][1:], shell] if many else shell))

    numeric = True
    for parameter in parameters(catalog.function(card.name)):
        name = parameter.name
        if parameter.type is Network and name in good:
            add("a wrong type", name, 3.5, "no-such-network")
            first = good[name][0] if isinstance(good[name], list) else good[name]
            network = load(first).copy()
            with torch.no_grad():
                next(network.module.parameters()).view(-1)[0] = float("nan")
            damaged = str(network.save(tools.folder / f"damaged-{name}"))
            add("a weight that is not a number", name, network, damaged)
            add("a saved weight that is not a number", name, damaged, damaged)
        elif parameter.needs is not None and name in good:
            spec = good[name][0] if isinstance(good[name], list) else good[name]
            add("a wrong type", name, 3.5, "no-such-data")
            table = as_data(spec, split=name)
            add("no rows", name, table.select([]), f"{spec}[:0]")
            if "label" in parameter.needs.columns:
                labels = np.asarray(table["label"])
                outside = table.remove_columns("label").add_column("label", [-1, *labels[1:].tolist()])  # type: ignore[call-arg]
                for what, bad in (
                    ("one class", table.select(np.flatnonzero(labels == labels[0]))),
                    ("a label out of range", outside.cast_column("label", table.features["label"])),
                    ("no labels", table.remove_columns("label")),
                ):
                    if what == "one class" and parameter.needs.min_classes < 2:
                        continue
                    file = tools.folder / f"{name}-{what.replace(' ', '-')}.parquet"
                    bad.to_parquet(str(file))
                    add(what, name, bad, f"parquet:{file}")
        elif parameter.type in (int, float) and not parameter.many and parameter.kind == "setting" and numeric:
            numeric = False  # one of its numbers stands for all: the check is the decorator's
            cases.append(("a word for a number", name, "many", "many"))
        elif parameter.choices and not parameter.many:
            cases.append(("an unknown choice", name, "no-such-choice", "no-such-choice"))
    return cases


def a_saved_result_loads_in_another_process(card: catalog.Card, tools: Tools) -> None:
    out = tools.folder / "out"
    code, printed, err = tools.run([*typed(card, example(card, tools), out), "--json"])
    assert code == 0, err
    record = json.loads(printed)
    found = tools.loads(out)
    assert "error" not in found, found["error"]
    assert found["method"] == card.name, "the result does not say what made it"
    if record["kind"] == "Network":
        assert found["fingerprint"] == record["fingerprint"]
    else:
        content = {key: value for key, value in record.items() if key not in ("out", "kind")}
        assert json.dumps(found["content"], sort_keys=True) == json.dumps({**found["content"], **content}, sort_keys=True)
    assert not out.with_name("out.partial").exists(), "checkpoints are left after the end"


CHECKS = [
    the_card_is_complete,
    the_signature_says_all,
    the_docstrings_say_how,
    a_test_and_a_bench_are_there,
    it_was_measured,
    bad_input_gets_one_line,
    a_saved_result_loads_in_another_process,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("card", METHODS, ids=lambda card: card.name)
def test_every_method(card, check, tools):
    check(card, tools)


def test_no_method_is_without_a_card():
    """A file with @method and no card beside it would be in no list and in no check."""
    folder = Path(catalog.__file__).parent
    methods = [path for path in folder.glob("*/*.py") if re.search(r"^@method\b", path.read_text("utf-8"), re.MULTILINE)]
    assert [str(path.relative_to(folder)) for path in methods if not path.with_suffix(".md").exists()] == []


# --- the checks themselves: a method that passes, and what each check must refuse

CARD = (
    """---
title: "Hotter heads give softer answers"
paper: {authors: "Somebody et al.", year: 2022, arxiv: "2203.05482", code: "somebody/heads"}
wish: My network is too sure of itself.
brings: a classifier; labelled pictures
gets: one network
claims:
  - {on: "ImageNet", metric: "top-1 %", baseline: 80.38, method: 81.03, source: "paper, table 3"}
---
"""
    + ("It divides the weights of the head by a temperature, and looks at the pictures before it does. " * 5)
    + "When not to use it: no head.\n"
)

CODE = '''"""A hotter head (arXiv 2203.05482)."""

from typing import Literal

from torch import Tensor

from wellread.data import Labelled
from wellread.method import method
from wellread.network import Network


def cooled(weight: Tensor, temperature: float) -> Tensor:
    """Weights [K, d] divided by the temperature."""
    return weight / temperature


@method
def hot_head(network: Network, train: Labelled, *, temperature: float = 2.0, rule: Literal["all", "none"] = "all", epochs: int = 9) -> Network:
    """One network that is less sure.

    network: a classifier. train: not needed.
    train: labelled pictures.
    temperature: above 1 is softer.
    rule: whether anything is done.
    epochs: not needed.
    Raises `BadInput` as all methods do.
    """
    state = network.module.state_dict()
    name = f"{network.head}.weight"
    return network.with_weights({**state, name: cooled(state[name], temperature)})
'''


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A finished method in a repository of its own. Call the result to change one of its files and get its card."""
    root = tmp_path / "repository"
    files = {
        "wellread/heads/__init__.py": '"""Only for tests."""\n\nfrom wellread import catalog\n\ncatalog.chapter(__name__)\n',
        "wellread/heads/hot_head.py": CODE,
        "wellread/heads/hot_head.md": CARD,
        "tests/heads/test_hot_head.py": '"""Its tests."""\n\n\ndef test_nothing():\n    assert True\n',
        "bench/hot_head.py": "",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.setattr(wellread, "__path__", [*wellread.__path__, str(root / "wellread")])
    from bench import harness

    monkeypatch.setattr(harness, "STARTED", harness.time.time() + 1)
    harness.record(
        "hot-head",
        figures={"hot": [0.5, 0.7, 0.9]},
        baselines={"cold": [0.4, 0.4, 0.4]},
        expects=[harness.Expect("hot is better than cold", "hot - cold", 0.1)],
        claims_tested=["softer answers"],
        sizes={"rows": 3},
        seeds=[0, 1, 2],
        seconds=2.0,
        results=root / "bench" / "results",
    )

    def change(name: str = "", old: str = "", new: str = "") -> catalog.Card:
        if name:
            path = root / name
            assert old in path.read_text()
            path.write_text(path.read_text().replace(old, new))
            if not path.read_text():
                path.unlink()
        return catalog.card("hot-head")

    yield change
    for name in [name for name in sys.modules if name.startswith("wellread.heads")]:
        del sys.modules[name]
    vars(wellread).pop("heads", None)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_finished_method_passes(made, tools, check):
    check(made(), tools)


CARELESS = """def careless(function):
    from functools import wraps

    from wellread.network import as_network

    return wraps(function)(lambda network, **others: function(as_network(network), **others))


@careless
"""
RETURN = "    return network.with_weights"
CODE_FILE, TEST_FILE, RESULT = "wellread/heads/hot_head.py", "tests/heads/test_hot_head.py", "bench/results/hot_head.json"


@pytest.mark.parametrize(
    "check, name, old, new, complaint",
    [
        (the_card_is_complete, "wellread/heads/hot_head.md", 'source: "paper, table 3"', 'source: ""', "source"),
        (the_signature_says_all, CODE_FILE, "@method\n", "", "lacks @method"),
        (the_signature_says_all, CODE_FILE, "temperature: float = 2.0", "temperature=2.0", "temperature has no type"),
        (the_signature_says_all, CODE_FILE, "temperature: float = 2.0", "temperature: float", "without a default"),
        (the_signature_says_all, CODE_FILE, "train: Labelled, *, ", "train: Labelled, device: str, *, ", "the name device"),
        (the_signature_says_all, CODE_FILE, "train: Labelled, *, ", "train: Labelled, other: int, *, ", "neither network nor data"),
        (the_signature_says_all, CODE_FILE, "epochs: int = 9) -> Network", "epochs: int = 9) -> int", "int"),
        (the_docstrings_say_how, CODE_FILE, "    epochs: not needed.\n", "", "no line 'epochs"),
        (the_docstrings_say_how, CODE_FILE, "    Raises `BadInput` as all methods do.\n", "", "which errors"),
        (the_docstrings_say_how, CODE_FILE, "2203.05482", "", "names the source"),
        (the_docstrings_say_how, CODE_FILE, '    """Weights [K, d] divided by the temperature."""\n', "", "cooled has no docstring"),
        (the_docstrings_say_how, CODE_FILE, "Weights [K, d] divided", "Weights divided", "no shapes"),
        (the_docstrings_say_how, CODE_FILE, "weight: Tensor, temperature: float", "weight: Tensor, temperature", "cooled is not fully typed"),
        (a_test_and_a_bench_are_there, TEST_FILE, "def test_nothing", "def nothing", "def test_"),
        (it_was_measured, RESULT, '"code_sha256": "', '"code_sha256": "x', "hash"),
        (it_was_measured, RESULT, '"seconds": 2.0', '"seconds": 721.0', "721"),
        (it_was_measured, RESULT, '"mean": 0.7', '"mean": 0.8', "mean of hot"),
        (it_was_measured, RESULT, '"numpy"', '"nmpy"', "numpy"),
        (bad_input_gets_one_line, CODE_FILE, "@method\n", "", "raises AttributeError"),
        (bad_input_gets_one_line, CODE_FILE, "@method\n", CARELESS, "a weight that is not a number in network is accepted"),
        (a_saved_result_loads_in_another_process, CODE_FILE, RETURN, "    network.module.extra = network.module.fc\n" + RETURN, "extra"),
        (a_saved_result_loads_in_another_process, CODE_FILE, RETURN, "    raise OSError('disk full')\n" + RETURN, "disk full"),
        (
            a_saved_result_loads_in_another_process,
            TEST_FILE,
            "def test",
            "def example(folder):\n    return {'network': 'mine'}\n\n\ndef test",
            "train",
        ),
    ],
)
def test_an_unfinished_method_does_not(made, tools, check, name, old, new, complaint):
    card = made(name, old, new)
    with pytest.raises(AssertionError, match=complaint):
        check(card, tools)


@pytest.mark.parametrize("name", [TEST_FILE, RESULT])
def test_a_missing_file_is_named(made, tools, name):
    card = made(name, made().path.parents[2].joinpath(name).read_text(), "")
    with pytest.raises(AssertionError, match="there is no " + name):
        (a_test_and_a_bench_are_there if name == TEST_FILE else it_was_measured)(card, tools)


# --- the bench's harness


def record(tmp_path, **changes):
    from bench import harness

    arguments = {
        "figures": {"hot": [1.0, 2.0, 3.0]},
        "baselines": {"cold": [0.5, 1.0, 3.0]},
        "expects": [harness.Expect("hot is better", "hot - cold", 0.5)],
        "claims_tested": ["softer"],
        "sizes": {"rows": np.int64(3)},
        "seeds": [0, 1, 2],
        "results": tmp_path / "results",
    }
    return harness.record("hot-head", **{**arguments, **changes})


def test_a_record_holds_what_was_measured(made, tmp_path, capsys):
    content = record(tmp_path)
    assert json.loads((tmp_path / "results" / "hot_head.json").read_text()) == content and content["sizes"] == {"rows": 3}
    assert content["figures"]["hot"] == {"per_seed": [1.0, 2.0, 3.0], "mean": 2.0, "sd": 1.0}
    assert content["baselines"]["cold"]["sd"] == pytest.approx(np.std([0.5, 1.0, 3.0], ddof=1))
    assert content["expects"][0]["value"] == 0.5 and content["expects"][0]["passed"]
    assert content["code_sha256"] == catalog.code_sha256("hot-head") and set(content["machine"]) == {"cpu", "cores", "memory_gb", "gpu", "system"}
    assert "held      hot is better: 0.5 >= 0.5" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["hot_head.json"]


def test_a_comparison_with_a_peer_is_written_beside_the_results(tmp_path, capsys):
    from bench import harness

    figures = harness.Noted()
    for value in (1.0, 3.0):
        figures(ours=value, theirs=4)
    assert figures == {"ours": [1.0, 3.0], "theirs": [4.0, 4.0]}
    expects = [harness.Expect("ours is smaller", "ours / theirs", 1.0, at_least=False)]
    content = harness.record_peer(
        "scales", "their scales", figures={**figures, "ratio": 0.5}, expects=expects, sizes={"rows": 2}, seconds=1.23, notes=["n"], results=tmp_path, seeds=[0, 1]
    )
    assert json.loads((tmp_path / "peers" / "scales.json").read_text()) == content
    assert content["figures"] == {**{name: harness.summary(figures[name]) for name in figures}, "ratio": 0.5}
    assert content["expects"][0]["value"] == 0.5 and content["seconds"] == 1.2 and content["seeds"] == [0, 1] and content["threads"] >= 1
    assert "held: ours is smaller: 0.5" in capsys.readouterr().out


@pytest.mark.parametrize(
    "metric, threshold, at_least, value, passed",
    [
        ("hot", 2.0, True, 2.0, True),
        ("hot", 2.1, True, 2.0, False),
        ("hot", 2.1, False, 2.0, True),
        ("min(hot - 1)", 0.0, True, 0.0, True),
        ("max(hot - 1)", 1.9, False, 2.0, False),
        ("hot / single", 1.0, True, 0.5, False),
        ("hot - warm", 0.0, True, None, False),
        ("hot - two", 0.0, True, None, False),
        ("hot - broken", 0.0, False, None, False),
    ],
)
def test_an_expectation(made, tmp_path, metric, threshold, at_least, value, passed):
    from bench.harness import Expect

    figures = {"hot": [1.0, 2.0, 3.0], "single": 4.0, "two": [1.0, 2.0], "broken": [1.0, float("nan"), 2.0]}
    content = record(tmp_path, figures=figures, expects=[Expect("so it is", metric, threshold, at_least)])
    (found,) = content["expects"]
    assert (found["value"], found["passed"]) == (value, passed)
    assert content["figures"]["broken"] == {"per_seed": [1.0, None, 2.0], "mean": None, "sd": None}
    assert content["figures"]["single"] == {"per_seed": [4.0], "mean": 4.0, "sd": None}
    assert ("error" in found) == ("warm" in metric or "two" in metric)  # a long run is not lost to a metric that cannot be computed


def test_a_file_changed_while_it_was_measured_is_not_the_one_measured(made, tmp_path, monkeypatch):
    from bench import harness

    monkeypatch.setattr(harness, "STARTED", 0.0)
    content = record(tmp_path)
    assert content["code_sha256"] is None and "was changed while" in content["notes"][-1]


def test_a_record_that_says_nothing_is_refused(made, tmp_path):
    changes: dict[str, Any]
    for changes, complaint in (
        ({"expects": []}, "expects nothing"),
        ({"baselines": {"hot": 1.0}}, "different names"),
        ({"figures": {"top-1": 1.0}}, "underscores"),
        ({"figures": {"hot": []}}, "one per seed"),
    ):
        with pytest.raises(BadInput, match=complaint):
            record(tmp_path, **changes)
