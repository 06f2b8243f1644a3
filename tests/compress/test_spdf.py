"""SPDF: the paper's ratios, the two phases, a result that saves as an ordinary network."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

import wellread
from wellread import Network
from wellread import sparsity as sp
from wellread.compress.spdf import gpt_flops, spdf, train, zero_counts
from wellread.errors import BadInput
from wellread.structure import masks

TEXT = Dataset.from_dict({"text": ["the sun is red and far away " * 4, "the moon is blue and near to us " * 4] * 8})
TASK = Dataset.from_dict({"prompt": ["sun>", "moon>"] * 8, "text": ["red and far", "blue and near"] * 8})
UNSEEN = Dataset.from_dict({"prompt": ["sun>", "moon>"], "text": ["far and red", "near and blue"]})
SMALL: dict[str, Any] = {"context": 32, "batch_size": 8}


def example(folder: Path) -> dict[str, Any]:
    """Arguments that can be typed, for the conformance test: a language model and texts."""
    files = {}
    for name, table in {"pretraining": TEXT, "finetuning": TASK}.items():
        table.to_csv(str(folder / f"{name}.csv"))
        files[name] = f"csv:{folder / name}.csv"
    return {"network": str(sp.language_model(16, 2, context=32).save(folder / "network", force=True)), **files, **SMALL}


@pytest.fixture(scope="module")
def gpt() -> Network:
    return sp.language_model(16, 2, context=32)


@pytest.mark.parametrize(
    ("layers", "width", "context", "sparsity", "ratio"),
    [(24, 2048, 2048, 0.5, 1.67), (24, 2048, 2048, 0.75, 2.49), (12, 768, 1024, 0.5, 1.42), (12, 768, 1024, 0.75, 1.81)],
)
def test_the_operations_saved_are_those_of_the_paper(layers: int, width: int, context: int, sparsity: float, ratio: float) -> None:
    shape = {"layers": layers, "width": width, "context": context, "vocabulary": 50257}
    assert gpt_flops(0.0, **shape) / gpt_flops(sparsity, **shape) == pytest.approx(ratio, abs=0.005)


def test_the_formula_is_that_of_the_network(gpt: Network) -> None:
    for sparsity in (0.0, 0.5):
        counted = sp.training_flops(sp.sparse(gpt, sparsity), 32)
        assert counted == gpt_flops(sparsity, layers=2, width=16, context=32, vocabulary=257)


def test_the_zeros_stay_through_training(gpt: Network) -> None:
    thin = sp.sparse(gpt, 0.75)
    before = zero_counts(thin.module)
    keeps = {path: mask.keep.clone() for path, mask in masks(thin.module).items()}
    train(thin, sp.stream_batches(thin, TEXT, length=32), epochs=1, learning_rate=1e-2, seed=0, name="test")
    assert zero_counts(thin.module) == before and sum(before.values()) == 0.75 * sp.active(gpt)
    assert all(torch.equal(keeps[path], mask.keep) for path, mask in masks(thin.module).items())


LOAD = """
import json, sys, torch, wellread
network = wellread.load(sys.argv[1])
out = network({"input_ids": torch.arange(20)[None]})
print(json.dumps([out.double().sum().item(), network.lineage[-1]["method"], list(network.reports), [type(m).__name__ for m in network.module.modules()]]))
"""


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_result_is_an_ordinary_network(kind: Any, tmp_path: Path) -> None:
    network = sp.language_model(16, 2, context=32, kind=kind)
    start = {name: tensor.clone() for name, tensor in network.module.state_dict().items()}
    made = spdf(network, TEXT, TASK, UNSEEN, sparsity=0.75, pretrain_epochs=2, finetune_epochs=10, finetune_learning_rate=1e-2, **SMALL)
    report = made.reports["spdf"]
    assert not masks(made.module) and all(torch.equal(start[name], tensor) for name, tensor in network.module.state_dict().items())
    assert report.figures["nats per token after fine-tuning"] < report.figures["nats per token before fine-tuning"] - 0.2
    first, second = report.tables["ledger"]
    assert first["live linear weights"] == round(0.25 * sp.active(network)) and second["live linear weights"] == sp.active(network)
    assert first["fewer by"] > 1.2 and second["fewer by"] == 1.0
    assert first["dense training FLOPs"] == sp.training_flops(network, 32) * first["tokens"]
    assert "not measured" in report.text
    made.save(tmp_path / "made")
    done = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path / "made")], capture_output=True, text=True, check=True)
    value, made_by, reports, kinds = json.loads(done.stdout)
    with torch.no_grad():
        assert value == made({"input_ids": torch.arange(20)[None]}).double().sum().item()
    assert (made_by, reports) == ("spdf", ["spdf"])
    assert not any("Parametrized" in each for each in kinds)
    assert kinds == [type(module).__name__ for module in network.module.modules()]


def test_masks_are_saved_between_the_phases(gpt: Network, tmp_path: Path) -> None:
    thin = sp.sparse(gpt, 0.6)
    thin.save(tmp_path / "thin")
    back = wellread.load(tmp_path / "thin")
    assert {path: mask.keep.tolist() for path, mask in masks(back.module).items()} == {p: m.keep.tolist() for p, m in masks(thin.module).items()}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"sparsity": 1.0}, "below 1"),
        ({"layers": ["nothing"]}, "no linear layer is called"),
        ({"context": 64}, "reads 2 to 32 tokens"),
        ({"pretrain_epochs": -1}, "at least 0"),
        ({"finetune_learning_rate": 0.0}, "must be above 0"),
        ({"seed": -1}, "give at least 0"),
    ],
)
def test_bad_input(gpt: Network, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        spdf(gpt, TEXT, TASK, **{**SMALL, **settings})


def test_a_network_that_has_masks_is_refused(gpt: Network) -> None:
    with pytest.raises(BadInput, match="has a mask already"):
        spdf(sp.sparse(gpt, 0.5), TEXT, TASK, **SMALL)


def test_layers_that_starve_are_named(gpt: Network) -> None:
    made = spdf(gpt, TEXT, TASK, sparsity=0.95, pretrain_epochs=0, finetune_epochs=0, **SMALL)
    assert "fewer live weights than outputs" in made.reports["spdf"].warnings[0]
