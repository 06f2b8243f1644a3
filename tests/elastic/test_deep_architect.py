"""DeepArchitect: the language against counts by hand and real modules, the searchers against formulas and known spaces, whole searches on pictures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

import wellread
from wellread import runtime
from wellread.data import as_data
from wellread.elastic import deep_architect
from wellread.elastic.deep_architect import Mcts, Random, Smbo, ngrams, search, uct
from wellread.errors import BadInput
from wellread.spaces import (
    PLAIN,
    SPACES,
    Added,
    Affine,
    AvgPool,
    BatchNorm,
    Built,
    ChoiceBisection,
    Computed,
    Concat,
    Conv2d,
    Dropout,
    Empty,
    Flatten,
    GlobalPool,
    Hyper,
    Layer,
    MaxPool,
    MaybeSwap,
    Optional,
    Or,
    Program,
    ReLU,
    Repeat,
    RepeatTied,
    Residual,
    Sigmoid,
    Tanh,
    compute,
    every,
    parse,
    replay,
    walk,
)

COLORS = ("blue", "green", "red")
PART = Concat([Affine([8, 16, 32]), Or([ReLU(), Tanh()])])  # six ways


def photos(rows: int, seed: int = 0, side: int = 16) -> Dataset:
    """Noise with a tint."""
    random = np.random.default_rng(seed)
    pairs = []
    for row in range(rows):
        picture = random.integers(0, 160, (side, side, 3))
        picture[..., 2 - row % 3] += 60
        pairs.append((Image.fromarray(picture.astype(np.uint8)), COLORS[row % 3]))
    return as_data(pairs)


def example(folder: Path) -> dict[str, Any]:
    for row, photo in enumerate(photos(36)):
        place = folder / "photos" / COLORS[photo["label"]]
        place.mkdir(parents=True, exist_ok=True)
        photo["image"].save(place / f"{row}.png")
    return {"train": f"folder:{folder / 'photos'}", "evaluations": 2, "epochs": 1, "batch_size": 8, "size": 8, "pool": 3}


def words(space: Any, shape: tuple[int, ...] = (4,)) -> list[str]:
    return [" ".join(program.words) for program in every(space, shape)]


# --- the language


@pytest.mark.parametrize(
    "space, count",
    [
        (PART, 6),
        (Or([PART, Affine([1, 2])]), 6 + 2),
        (Optional(PART), 1 + 6),
        (Concat([PART, PART]), 36),
        (Repeat(PART, [1, 2]), 6 + 36),
        (RepeatTied(PART, [1, 2, 4]), 6 + 6 + 6),
        (RepeatTied(Repeat(PART, [1, 2]), 2), 42),
        (Repeat(RepeatTied(PART, [1, 2]), 2), 144),
        (MaybeSwap(PART, Sigmoid()), 12),
        (Residual(PART), 6),
        (Empty(), 1),
        (Concat([Hyper("width", [8, 16]), Repeat(Affine(Hyper("width", [8, 16])), 3)]), 2),
        (Repeat(Affine(Hyper("width", [8, 16])), 3), 8),
        (RepeatTied(Affine(Hyper("width", [8, 16])), 3), 2),
    ],
)
def test_every_program_is_found_once(space: Any, count: int) -> None:
    programs = list(every(space, (4,)))
    assert len(programs) == len({program.choices for program in programs}) == count
    assert all(replay(space, (4,), program.choices) == program for program in programs)
    halved = list(every(ChoiceBisection(space), (4,)))
    assert sorted(str(program.layers) for program in halved) == sorted(str(program.layers) for program in programs)
    assert parse(repr(space)) == space


def test_choices_are_asked_from_left_to_right_and_only_where_there_is_one() -> None:
    asked: list[tuple[str, list[Any]]] = []
    walk(Concat([Affine(5), Repeat(PART, [1, 2])]), (4,), lambda name, values: len(asked.append((name, values)) or asked) % 2)
    assert [name for name, _ in asked] == ["times", "units", "Or", "units", "Or"][: len(asked)] and asked[0][1] == [1, 2]


def test_copies_share_nothing_unless_they_are_tied() -> None:
    assert "Affine(8) Affine(16)" in words(Repeat(Affine([8, 16]), 2))
    assert words(RepeatTied(Affine([8, 16]), 2)) == ["Affine(8) Affine(8)", "Affine(16) Affine(16)"]
    module = Built(next(every(RepeatTied(Affine(4), 2), (4,))).layers)
    assert module[0].weight is not module[1].weight


def test_dependent_hyperparameters_follow_from_named_ones() -> None:
    space = Concat([Hyper("width", [8, 16]), Affine([Computed("width // 2"), Computed("2 * width")]), Affine(Computed("max(10, width)"))])
    found = [[record[1]["out_features"] for record in program.layers] for program in every(space, (4,))]
    assert sorted(found) == [[4, 10], [8, 16], [16, 10], [32, 16]]
    assert next(every(space, (4,))).values == {"width": 8}
    assert compute("min(a, 3) + round(7 / 2) * b - 1", {"a": 5, "b": 2}) == 3 + 4 * 2 - 1


def test_bisection_halves_ordered_numbers() -> None:
    asked: list[list[Any]] = []
    program = walk(ChoiceBisection(Affine([64, 8, 32, 16, 128])), (4,), lambda name, values: len(asked.append(values) or asked) % 2)
    assert asked[0] == [[8, 16, 32], [64, 128]] and program.choices == (1, 0) and program.words == ("Affine(64)",)


@pytest.mark.parametrize(
    "space, shape",
    [
        (Conv2d([3, 5], [1, 3, 5], [1, 2, 3]), (2, 9, 7)),
        (Conv2d(4, [2, 3], [1, 2], "valid"), (2, 9, 7)),
        (Concat([Or([MaxPool([2, 3]), AvgPool([2, 3])]), BatchNorm(), ReLU(), Or([GlobalPool(), Flatten()]), Affine(3)]), (2, 9, 7)),
        (Concat([BatchNorm(), Sigmoid(), Dropout([0.1, 0.5]), Layer("torch.nn:LayerNorm", {"normalized_shape": 6})]), (6,)),
        (Residual(Concat([Conv2d([1, 5], 3, [1, 2]), Or([Empty(), MaxPool(), Concat([Flatten(), Affine(70)])])])), (2, 9, 7)),
        (SPACES["resnet"].parts[2], (1, 8, 8)),
    ],
)
def test_shapes_are_those_of_the_real_modules(space: Any, shape: tuple[int, ...]) -> None:
    for program in every(space, shape):
        module = Built(json.loads(json.dumps(program.layers))).eval()
        assert program.error is None and tuple(module(torch.rand(2, *shape)).shape[1:]) == program.shape


def test_a_convolution_with_the_same_padding_keeps_the_size_divided_by_the_stride() -> None:
    sizes = {program.shape[1:] for program in every(Conv2d(1, [1, 3, 5, 7], 2), (1, 9, 8))}
    assert sizes == {(5, 4)}


def test_a_residual_part_is_padded_at_the_end() -> None:
    wider, flat = Added([["torch.nn:Conv2d", {"in_channels": 1, "out_channels": 2, "kernel_size": 2}]]), Added([["torch.nn:Flatten", {}]])
    x = torch.rand(3, 1, 4, 4)
    out = wider(x)
    inner = wider.layers(x)
    assert out.shape == (3, 2, 4, 4)
    assert torch.equal(out[:, 0, :3, :3], inner[:, 0] + x[:, 0, :3, :3]) and torch.equal(out[:, 0, 3], x[:, 0, 3])
    assert torch.equal(out[:, 1, :3, :3], inner[:, 1]) and not out[:, 1, 3].any() and not out[:, 1, :, 3].any()
    assert torch.equal(flat(x), 2 * x.flatten(1))


def test_what_is_inside_residual_parts_is_printed() -> None:
    assert words(Residual(Concat([Affine([2, 3]), ReLU()]))) == ["Residual( Affine(2) ReLU() )", "Residual( Affine(3) ReLU() )"]


def test_maps_that_shrink_to_nothing_are_impossible_programs() -> None:
    programs = list(every(Concat([Repeat(MaxPool(), [1, 5]), Affine(2)]), (1, 8, 8)))
    assert sorted(bool(program.error) for program in programs) == [False, True] and "MaxPool2d" in next(p.error for p in programs if p.error)


@pytest.mark.parametrize("space", [*SPACES.values(), *PLAIN.values()])
def test_the_named_spaces_print_and_give_networks(space: Any) -> None:
    assert parse(repr(space)) == space
    shape = (5,) if space in (SPACES["head"], PLAIN["head"]) else (3, 8, 8)
    random = Random(space, shape)
    programs = [random.ask() for _ in range(8)]
    assert not any(program.error for program in programs)


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("Concat([Affine([32", "cannot be read"),
        ("Afine(32)", "'Afine.32.' is not known"),
        ("__import__('os').getcwd()", "is not known"),
        ("ReLU", "is not known"),
        ("[1, 2]", "is no space"),
        ("Affine(width=3)", "unexpected keyword"),
        ("Affine([])", "units has no values"),
        ("Repeat(ReLU(), [0])", "cannot be repeated 0 times"),
        ("Conv2d(4, [2])", "same with an odd size"),
        ("Layer('os:system')", "not an nn.Module"),
        ("Affine(Computed('2 * width'))", "names chosen before"),
        ("Affine(Computed('open(3)'))", "cannot be computed"),
    ],
)
def test_a_wrong_space_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(BadInput, match=complaint):
        list(every(parse(text), (2, 8, 8)))


def test_wrong_choices_are_refused() -> None:
    for choices, complaint in (((0,), "too few"), ((0, 0, 0), "too many"), ((3, 0), "has 3 values and not number 3")):
        with pytest.raises(BadInput, match=complaint):
            replay(PART, (4,), choices)


# --- searchers

SPACE = Repeat(Or([Layer("torch.nn:ReLU"), Layer("torch.nn:Tanh"), Layer("torch.nn:Sigmoid"), Layer("torch.nn:ELU")]), [4])


def additive(program: Program) -> float:
    """0.25 for each ReLU, 0.1 for each Tanh."""
    return 0.25 * program.words.count("ReLU()") + 0.1 * program.words.count("Tanh()")


def test_random_search_reaches_every_program_with_the_chances_of_the_tree() -> None:
    random = Random(Repeat(PART, [1, 2]), (4,), seed=1)
    drawn = [random.ask().choices for _ in range(600)]
    assert len(set(drawn)) == 42
    assert abs(np.mean([choices[0] == 0 for choices in drawn]) - 0.5) < 3 * 0.5 / 600**0.5


def test_uct_is_the_formula() -> None:
    assert uct(0.7, 3, 10, 0.5) == pytest.approx(0.7 + 0.5 * np.sqrt(2 * np.log(10) / 3))
    assert uct(0.7, 0, 10, 0.5) == np.inf and uct(0.7, 3, 10, 0.0) == 0.7


def test_a_tree_of_one_level_is_ucb1() -> None:
    rewards = [0.2, 0.5, 0.4]
    searcher = Mcts(Affine([0 + 1, 2, 3]), (4,), exploration=0.3)
    visits, totals = np.zeros(3), np.zeros(3)
    for turn in range(60):
        program = searcher.ask()
        arm = program.choices[0]
        if turn:  # the first only opens the root
            bound = [totals[i] / visits[i] + 0.3 * np.sqrt(2 * np.log(turn) / visits[i]) if visits[i] else np.inf for i in range(3)]
            assert bound[arm] == pytest.approx(max(bound))
            visits[arm] += 1
            totals[arm] += rewards[arm]
        searcher.tell(program, rewards[arm])
    assert searcher.nodes[()][0] == 60 and [searcher.nodes[(i,)][0] for i in range(3)] == visits.tolist()


def test_without_exploration_the_tree_search_is_greedy() -> None:
    searcher = Mcts(Affine([1, 2, 3]), (4,), exploration=0.0)
    for _ in range(20):
        program = searcher.ask()
        searcher.tell(program, [0.2, 0.5, 0.4][program.choices[0]])
    assert [searcher.nodes[(i,)][0] for i in range(3)][1] == 20 - 3


def test_only_the_part_in_the_tree_is_told() -> None:
    searcher = Mcts(Repeat(Affine([1, 2]), 5), (4,))
    depths = []
    for _ in range(6):
        searcher.tell(searcher.ask(), 1.0)
        depths.append(len(searcher.path))
    assert depths == [0, 1, 1, 2, 2, 2]
    assert searcher.nodes[()] == (6, 6.0) and sum(visits for path, (visits, _) in searcher.nodes.items() if len(path) == 1) == 5


def test_ngrams_are_counted_up_to_four_words() -> None:
    found = ngrams(["a", "b", "a", "b", "a"])
    assert found["a"] == 3 and found["a b"] == 2 and found["b a"] == 2 and found["a b a"] == 2 and found["a b a b"] == 1 and found["how many"] == 5
    assert max(len(gram.split()) for gram in found if gram != "how many") == 4


def test_the_surrogate_ranks_an_additive_score() -> None:
    from scipy.stats import spearmanr

    programs = list(every(SPACE, (4,)))
    searcher = Smbo(SPACE, (4,), penalty=1000.0)
    for i in np.random.default_rng(0).permutation(len(programs))[:60]:
        searcher.tell(programs[i], additive(programs[i]))
    predicted = searcher.predict(programs)
    assert spearmanr(predicted, [additive(each) for each in programs]).statistic > 0.9
    assert np.ptp(predicted) < 0.2 < np.ptp([additive(each) for each in programs])  # the authors' penalty shrinks towards the mean


@pytest.mark.parametrize("kind", [Mcts, Smbo])
def test_searchers_are_above_random_at_equal_budget(kind: Any) -> None:
    def late(searcher: Random) -> float:
        return float(np.mean([row["score"] for row in search(searcher, additive, 60)[-20:]]))

    gains = [late(kind(SPACE, (4,), seed=seed)) - late(Random(SPACE, (4,), seed=seed)) for seed in range(4)]
    assert np.mean(gains) > 0.1 and min(gains) > 0


def test_the_same_seed_gives_the_same_history() -> None:
    for kind in (Random, Mcts, Smbo):
        runs = [[row["choices"] for row in search(kind(SPACE, (4,), seed=seed), additive, 15)] for seed in (0, 0, 1)]
        assert runs[0] == runs[1] != runs[2]


def test_optuna_can_answer_too() -> None:
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)

    def objective(trial: Any) -> float:
        asked: list[str] = []

        def ask(name: str, values: list[Any]) -> int:
            asked.append(name)
            return trial.suggest_int(f"{len(asked)} {name} of {len(values)}", 0, len(values) - 1)

        return additive(walk(SPACE, (4,), ask))

    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(objective, n_trials=5)
    assert study.best_value > 0


# --- a search


def test_failures_count_and_repetitions_do_not() -> None:
    calls: list[tuple[int, ...]] = []

    def score(program: Program) -> float:
        calls.append(program.choices)
        if program.choices == (0,):
            raise RuntimeError("out of\nmemory")
        return float("nan") if program.choices == (1,) else 0.5

    rows = search(Random(Affine([1, 2, 3]), (4,)), score, 20)
    assert sorted(calls) == [(0,), (1,), (2,)] and len(rows) == 3  # the space is exhausted
    assert {row["choices"]: (row["score"], row["error"]) for row in rows} == {
        "[0]": (0.0, "RuntimeError: out of memory"),
        "[1]": (0.0, "ValueError: the score is nan"),
        "[2]": (0.5, ""),
    }
    assert [row["evaluation"] for row in rows] == [1, 2, 3] and rows[-1]["proposals"] >= 3 and rows[-1]["best"] == 0.5


def test_a_search_in_which_all_fails_ends() -> None:
    calls = 0

    def score(program: Program) -> float:
        nonlocal calls
        calls += 1
        raise RuntimeError("no memory")

    with pytest.raises(BadInput, match="first 10 architectures failed.*no memory"):
        search(Random(Repeat(PART, 3), (4,)), score, 50)
    assert calls == 10
    with pytest.raises(BadInput, match="first 2 architectures failed.*MaxPool2d"):
        search(Random(Concat([Layer("torch.nn:Dropout", {"p": [0.1, 0.2, 0.3]}), Repeat(MaxPool(), 4)]), (1, 4, 4)), lambda program: 1.0, 2)


TINY: dict[str, Any] = {"evaluations": 3, "epochs": 2, "batch_size": 8, "pool": 5}
LOADED = """
import sys, torch, wellread
network = wellread.load(sys.argv[1])
torch.save(network(torch.load(sys.argv[2])), sys.argv[3])
"""


def reloaded(network: wellread.Network, batch: torch.Tensor, folder: Path) -> torch.Tensor:
    """The output in another process."""
    network.save(folder / "network")
    torch.save(batch, folder / "batch.pt")
    subprocess.run([sys.executable, "-c", LOADED, folder / "network", folder / "batch.pt", folder / "out.pt"], check=True, timeout=500)
    return torch.load(folder / "out.pt")


def test_only_data_give_a_network_that_is_loaded_by_another_process(tmp_path: Path) -> None:
    space = "Concat([Residual(Conv2d([4, 8])), ReLU(), MaxPool(), Hyper('learning_rate', [0.01, 0.03])])"
    network = deep_architect(photos(48), photos(24, seed=1), space=space, searcher="mcts", **TINY)
    report = network.reports["deep-architect"]
    assert network.labels == COLORS and network.input.size == (16, 16) and network.input.channels == 3
    rows = report.tables["evaluations"]
    assert len(rows) == 3 and len({row["choices"] for row in rows}) == 3
    best = max([row["score"] for row in rows] + [report.figures["plain accuracy on validation"]])
    assert report.figures["best accuracy on validation"] == best == wellread.evaluate(network, photos(24, seed=1)).figures["accuracy"]
    batch = network.input([photo["image"] for photo in photos(6, seed=2)])
    assert torch.equal(reloaded(network, batch, tmp_path), network(batch))
    exported = torch.export.export(network.module, (batch,)).module()
    assert torch.allclose(exported(batch), network(batch), atol=1e-5)


@pytest.mark.parametrize("name", ["timm/test_efficientnet", "timm/test_vit"])
def test_heads_are_searched_on_a_pretrained_network_which_stays_as_it_is(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    given = wellread.load(name, pretrained=False)
    given.input = given.input.changed(size=given.input.size if "vit" in name else (32, 32))
    before = given.fingerprint
    network = deep_architect(photos(30), network=given, space="Concat([BatchNorm(), Affine([8, 16, 32]), ReLU()])", **TINY)
    assert given.fingerprint == before and network.labels == COLORS
    body = {key: value for key, value in network.module.state_dict().items() if not key.startswith(f"{network.head}.")}
    assert all(torch.equal(value, given.module.state_dict()[key]) for key, value in body.items()) and len(body) > 10
    report = network.reports["deep-architect"]
    assert network.lineage[-1]["method"] == "deep-architect" and network.measured[0]["metrics"]["accuracy"] == report.figures["best accuracy on validation"]
    network.save(tmp_path / "network")
    assert wellread.load(tmp_path / "network").fingerprint == network.fingerprint


def test_the_plain_network_comes_back_when_nothing_beats_it() -> None:
    space = "Concat([GlobalPool(), Hyper('learning_rate', [1e-12, 1e-11])])"  # learns nothing
    network = deep_architect(photos(60), photos(30, seed=1), space=space, evaluations=2, epochs=4, batch_size=8, learning_rate=0.01)
    report = network.reports["deep-architect"]
    assert report.figures["plain accuracy on validation"] > max(row["score"] for row in report.tables["evaluations"])
    assert "no architecture was better" in report.warnings[0] and network.architecture["arguments"]["layers"][0][0] == "torch.nn:Conv2d"


def test_an_interrupted_search_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["wellread.elastic.deep_architect"]
    fit, trained, limit = module.fit, 0, 3

    def interrupted(*args: Any, **settings: Any) -> Any:
        nonlocal trained
        if trained == limit:
            raise KeyboardInterrupt
        history = fit(*args, **settings)
        trained += history.resumed_at is None
        return history

    monkeypatch.setattr(module, "fit", interrupted)
    arguments = {"space": "Concat([GlobalPool(), Affine([4, 8, 16, 32]), ReLU()])", **TINY, "epochs": 1}
    with runtime.using(folder=tmp_path), pytest.raises(KeyboardInterrupt):
        deep_architect(photos(30), **arguments)
    trained, limit = 0, 99
    with runtime.using(folder=tmp_path):
        again = deep_architect(photos(30), **arguments)
    assert trained == 1  # the plain one and two of three were there
    whole = deep_architect(photos(30), **arguments)
    assert whole.fingerprint == again.fingerprint


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"evaluations": 0}, "at least 1"),
        ({"batch_size": 1}, "at least 2"),
        ({"explore": 1.5}, "a share"),
        ({"penalty": 0.0}, "more than 0"),
        ({"learning_rate": 0.0}, "more than 0"),
        ({"size": 2}, "4 pixels"),
        ({"space": "dense"}, "is not known in a space"),
        ({"space": "Affine([])"}, "has no values"),
        ({"space": "Concat([Dropout([0.1, 0.2]), Repeat(MaxPool(), 9)])"}, "first 2 architectures failed"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(BadInput, match=complaint):
        deep_architect(photos(12), **{"evaluations": 2, "epochs": 1, "batch_size": 8, "size": 8, **changes})


def test_text_without_a_network_is_refused() -> None:
    table = as_data([(text, label) for text, label in zip(["good film", "bad film", "fine", "awful"] * 5, ["yes", "no", "yes", "no"] * 5, strict=True)])
    with pytest.raises(BadInput, match="need a pre-trained network"):
        deep_architect(table)


def test_validation_of_other_classes_is_refused() -> None:
    other = as_data([(photo["image"], "cat" if photo["label"] else "dog") for photo in photos(12, seed=3)])
    with pytest.raises(BadInput, match="must be the same"):
        deep_architect(photos(12), other)
