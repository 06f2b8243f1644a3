"""What @method does around every paper's function."""

from __future__ import annotations

import warnings
from typing import Literal

import pytest
import torch
from torch import nn

import wellread
from wellread import Network
from wellread.data import Labelled, Unlabelled, load_data
from wellread.errors import BadInput
from wellread.inputs import ImageInput
from wellread.method import method, parameters, returns
from wellread.network import Networks


@method
def scale_head(
    network: Network,
    train: Labelled,
    validation: Labelled | None = None,
    *,
    by: float = 2.0,
    steps: int = 1,
    rule: Literal["all", "bias"] = "all",
    names: list[str] | None = None,
    seed: int = 0,
) -> Network:
    """Multiply the head.

    network: the classifier.
    train: labelled data, one row
        per example.
    by: the factor.
    """
    state = {name: tensor.clone() for name, tensor in network.module.state_dict().items()}
    state["1.weight"] *= by
    return network.with_weights(state)


@method
def mean_of(networks: list[Network], data: Unlabelled) -> Network:
    """The last of several."""
    return networks[-1].copy()


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    return Network(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), input=ImageInput((8, 8), 1))


def test_the_signature_is_the_interface() -> None:
    found = {each.name: each for each in parameters(scale_head)}
    assert list(found) == ["network", "train", "validation", "by", "steps", "rule", "names", "seed"]
    assert found["network"].kind == "brings" and found["network"].type is Network and found["network"].required
    assert found["train"].needs.columns == ("input", "label") and found["train"].help == "labelled data, one row per example."
    assert found["validation"].optional and not found["validation"].required
    assert found["rule"].choices == ("all", "bias") and found["names"].many and found["by"].default == 2.0
    assert returns(scale_head) == "Network" and parameters(mean_of)[0].many


def test_the_result_knows_where_it_comes_from(network: Network) -> None:
    before = network.fingerprint
    result = scale_head(network, "digits", "digits:validation", by=3)
    made = result.lineage[-1]
    assert made["method"] == "scale-head" and made["settings"] == {"by": 3.0, "steps": 1, "rule": "all", "names": None, "seed": 0}
    assert made["parents"] == [before] and made["result"] == result.fingerprint and network.fingerprint == before
    assert [(d["argument"], d["name"], d["rows"]) for d in made["data"]] == [
        ("train", "digits:train", 1078),
        ("validation", "digits:validation", 359),
    ]
    again = scale_head(result, "digits")
    assert [step["method"] for step in again.lineage] == ["scale-head", "scale-head"] and again.lineage[1]["parents"] == [result.fingerprint]


def test_lineages_of_several_parents_are_joined(network: Network, tmp_path) -> None:
    torch.manual_seed(0)
    a, b = (wellread.load("timm/test_vit", pretrained=False) for _ in range(2))
    a.save(tmp_path / "a")
    result = mean_of([tmp_path / "a", b], "elpv:test[:4]")
    assert [step["method"] for step in result.lineage] == ["load", "load", "mean-of"] and len(result.lineage[-1]["parents"]) == 2
    assert isinstance(Networks([tmp_path / "a"]), Networks)


def test_a_bare_module_is_welcome() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    assert isinstance(scale_head(module, load_data("digits:train[:40]")), Network)


@pytest.mark.parametrize(
    "change,words",
    [
        ({"rule": "some"}, "rule is 'some': choose one of 'all', 'bias'"),
        ({"by": "much"}, "by is 'much': give a number"),
        ({"by": float("nan")}, "by is nan"),
        ({"steps": 1.5}, "steps is 1.5: give a whole number"),
        ({"steps": True}, "steps is True"),
        ({"colour": 1}, "unexpected keyword argument 'colour'"),
        ({"network": 3}, "a network is needed, not a int"),
        ({"train": 3}, "data are needed, not a int"),
        ({"train": []}, "no rows"),
        ({"train": [("text", 0), ("more", 1)]}, "train has no column 'image'"),
        ({"validation": "digits:train"}, "train and validation share 1078 of 1078 rows"),
    ],
)
def test_bad_input_is_refused_before_the_function_runs(network: Network, change, words) -> None:
    arguments = {"network": network, "train": "digits:train", **change}
    arguments["network"] = Network(network.module, input=ImageInput((8, 8), 1)) if arguments["network"] is network else arguments["network"]
    with pytest.raises(BadInput, match=words) as refused:
        scale_head(**arguments)
    assert "\n" not in str(refused.value)


def test_damaged_weights_are_named(network: Network) -> None:
    with torch.no_grad():
        network.module[1].weight[0, 0] = float("inf")
    with pytest.raises(BadInput, match="'1.weight' holds values that are not finite"):
        scale_head(network, "digits:train[:20]")


def test_a_few_shared_rows_are_a_warning(network: Network) -> None:
    a, b = load_data("digits:train[:40]"), load_data("digits:train[38:90]")
    with pytest.warns(UserWarning, match="share 2 rows"):
        scale_head(network, a, b)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scale_head(network, a, load_data("digits:train[40:90]"))


def test_the_seed_makes_random_numbers_repeat(network: Network) -> None:
    @method
    def draw(network: Network, *, seed: int = 0) -> Network:
        """Noise."""
        return network.with_weights({name: torch.rand_like(t) for name, t in network.module.state_dict().items()})

    assert draw(network, seed=3).fingerprint == draw(network, seed=3).fingerprint != draw(network, seed=4).fingerprint
