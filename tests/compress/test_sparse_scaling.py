"""Pruning while training: the published schedules, the law recovered from its own numbers, masks that only grow."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from wellread import Network, runtime
from wellread import sparsity as sp
from wellread.compress.sparse_scaling import Plan, mean_density, plan, sparse_scaling, train_sparse
from wellread.errors import BadInput
from wellread.scaling_law import NAMES, Law, average_parameters, fit_law, left_out, predict
from wellread.structure import masks
from wellread.train import fit

TEXT = Dataset.from_dict({"text": ["the sun is red and far away " * 4, "the moon is blue and near to us " * 4] * 16})
UNSEEN = Dataset.from_dict({"text": ["the moon is far away and the sun is near to us " * 4]})
SMALL: dict[str, Any] = {"context": 32, "batch_size": 4}
STREAM: dict[str, Any] = {"length": 32, "batch_size": 4}
PUBLISHED = [(0.2, 11200, 2500, 8100, 0.870, 0.895, 0.893), (0.4, 13050, 2500, 8875, 0.726, 0.774, 0.766), (0.6, 16375, 2500, 10100, 0.561, 0.631, 0.610)]
TRUTH = Law(1.7, 400.0, 410.0, 0.34, 0.28)


def example(folder: Path) -> dict[str, Any]:
    """Arguments that can be typed, for the conformance test: a language model and texts."""
    TEXT.to_csv(str(folder / "text.csv"))
    return {"network": str(sp.language_model(16, 2, context=32).save(folder / "network", force=True)), "data": f"csv:{folder / 'text.csv'}", **SMALL}


@pytest.fixture(scope="module")
def gpt() -> Network:
    return sp.language_model(16, 2, context=32)


# --- the schedule


@pytest.mark.parametrize(("sparsity", "steps", "start", "end", "cubic", "linear", "geometric"), PUBLISHED)
def test_average_densities_of_the_published_networks(
    sparsity: float, steps: int, start: int, end: int, cubic: float, linear: float, geometric: float
) -> None:
    for shape, expected in (("cubic", cubic), ("linear", linear), ("geometric", geometric)):
        assert Plan(steps, start, end, sparsity, shape).average == pytest.approx(expected, abs=0.0006)  # type: ignore[arg-type]
    densities = Plan(steps, start, end, sparsity).densities()
    assert densities[:start].sum() / densities.sum() == pytest.approx(0.25, abs=0.003)
    assert densities[:end].sum() / densities.sum() == pytest.approx(0.75, abs=0.005)


@pytest.mark.parametrize("shape", ["geometric", "linear", "cubic"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.8])
def test_a_plan_spends_what_was_asked_between_the_shares(shape: Any, sparsity: float) -> None:
    made = plan(sparsity, compute=9000, shape=shape)
    densities = made.densities()
    assert made.density(made.start) == made.density(0) == 1.0
    assert made.density(made.end) == densities[-1] == pytest.approx(1 - sparsity)
    assert (np.diff(densities) <= 0).all()
    event = made.every
    assert made.compute == pytest.approx(9000, abs=event)
    assert densities[: made.start].sum() == pytest.approx(0.25 * 9000, abs=event)
    assert densities[: made.end].sum() == pytest.approx(0.75 * 9000, abs=event)
    fine = plan(sparsity, compute=9000, shape=shape, events=10**6)
    window = fine.densities()[fine.start : fine.end]
    assert window.mean() == pytest.approx(mean_density(sparsity, shape), abs=1e-3)
    again = plan(sparsity, steps=made.steps, shape=shape)
    assert abs(again.start - made.start) <= 1 and abs(again.end - made.end) <= 1
    assert again.compute == pytest.approx(9000, abs=event)


def test_the_closed_form_places_the_published_steps() -> None:
    made = plan(0.2, compute=9989)
    assert (made.start, made.end - made.start, made.steps - made.end) == pytest.approx((2497, 5573, 3122), abs=1)


# --- the law


def runs(noise: float = 0.0, seed: int = 0, sizes: int = 6) -> list[dict[str, float]]:
    random = np.random.default_rng(seed)
    return [
        {"parameters": n, "tokens": d, "loss": TRUTH.loss(n, d) * float(np.exp(noise * random.standard_normal()))}
        for n in np.geomspace(3e6, 3e9, sizes) for d in np.geomspace(3e7, 3e11, sizes)
    ]  # fmt: skip


def test_the_law_is_recovered_without_noise() -> None:
    found = fit_law(runs())
    for name in NAMES:
        assert getattr(found.law, name) == pytest.approx(getattr(TRUTH, name), rel=1e-6), name
        low, high = found.intervals[name]
        assert low <= getattr(found.law, name) <= high and high / low < 1 + 1e-6
    assert found.error < 1e-9
    assert not found.law.extrapolates(1e8, 1e9) and found.law.extrapolates(1e8, 1e12) and found.law.extrapolates(1e6, 1e9)


def test_nothing_better_is_found_by_the_usual_search() -> None:
    """Hoffmann et al.: L-BFGS on the same sum, from a grid of starts."""
    from scipy.optimize import minimize
    from scipy.special import huber

    table = runs(0.02, seed=3, sizes=4)
    n, d, losses = (np.log([run[name] for run in table]) for name in ("parameters", "tokens", "loss"))

    def cost(x: np.ndarray) -> float:
        return float(huber(1e-3, np.logaddexp(np.logaddexp(x[0], x[1] - x[3] * n), x[2] - x[4] * d) - losses).sum())

    law = fit_law(table, delta=1e-3).law
    mine = cost(np.array([*np.log([law.E, law.A, law.B]), law.alpha, law.beta]))
    starts = [np.array([e, a, b, 0.5, 0.5]) for e in (-0.5, 0.5) for a in (5.0, 15.0) for b in (5.0, 15.0)]
    theirs = [minimize(cost, start, method="L-BFGS-B", options={"maxiter": 500}).fun for start in starts]
    assert mine <= min(theirs) * 1.001 and mine > 0
    assert max(theirs) > 1.5 * mine  # where several starts are needed


def test_the_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """Over 100 tables: of one, all five may miss together, for the constants move together."""
    fits = [fit_law(runs(0.01, seed=seed, sizes=5)) for seed in range(100)]
    covered = np.array([[low <= getattr(TRUTH, name) <= high for name, (low, high) in found.intervals.items()] for found in fits])
    assert covered.shape == (100, 5)
    assert 0.85 <= covered.mean() <= 0.95 and covered.mean(axis=0).min() >= 0.82, covered.mean(axis=0)


def test_an_end_of_an_interval_is_as_surprising_as_chance_allows() -> None:
    table = runs(0.01, sizes=4)
    found = fit_law(table, confidence=0.95)
    missed = [np.log(found.law.loss(run["parameters"], run["tokens"]) / run["loss"]) for run in table]
    assert found.error == pytest.approx(float(np.sqrt(np.mean(np.square(missed)))), rel=1e-9)
    for name, (low, high) in found.intervals.items():
        assert found.surprise(name, high) == pytest.approx(2.201, rel=0.02)  # Student's t with 16 - 5 degrees of freedom
        assert found.surprise(name, low) == pytest.approx(-2.201, rel=0.02)
        assert found.surprise(name, getattr(found.law, name)) == pytest.approx(0, abs=1e-3)


def test_constants_that_runs_do_not_determine_have_open_intervals() -> None:
    random = np.random.default_rng(0)
    near = [{"parameters": n, "tokens": d, "loss": TRUTH.loss(n, d) * float(np.exp(0.02 * random.standard_normal()))}
            for n in (1e8, 1.02e8, 1.04e8) for d in np.geomspace(3e7, 3e11, 4)]  # fmt: skip
    found = fit_law(near)
    assert found.condition > 1e3 > fit_law(runs(0.02, sizes=4)).condition
    assert found.intervals["E"][0] == 0.0 and 1.7 < found.intervals["E"][1] < 4.0 and found.intervals["alpha"][1] > 1 and found.intervals["A"][1] > 1e6
    assert found.law.loss(1.01e8, 1e9) == pytest.approx(TRUTH.loss(1.01e8, 1e9), rel=0.03)


def test_one_run_that_went_wrong_moves_little() -> None:
    table = runs(0.002)
    table[8] = {**table[8], "loss": 1.5 * table[8]["loss"]}
    found = fit_law(table)
    assert abs(found.law.alpha - 0.34) < 0.01 and abs(found.law.E - 1.7) < 0.03


def test_runs_left_out_are_predicted() -> None:
    assert np.abs(left_out(runs(sizes=3))).max() < 1e-6
    table = [*runs(sizes=3), {"parameters": 3e6, "tokens": 3e7, "loss": 90.0}]  # of a kind that is there, and far off
    errors = left_out(table)
    assert abs(errors[0]) < 1e-6 and errors[-1] == pytest.approx((1 + errors[0]) * table[0]["loss"] / 90.0 - 1)


def test_a_dense_run_is_the_ordinary_law_and_given_exponents_are_kept() -> None:
    assert predict(TRUTH, [1e8] * 7, 1e9) == (TRUTH.loss(1e8, 1e9), False)
    assert average_parameters([4, 2], [1, 3]) == 2.5 and average_parameters([4, 3, 2]) == 3
    few = [runs()[place] for place in (0, 5, 14, 30, 35)]
    found = fit_law(few, alpha=0.34, beta=0.28)
    assert (found.law.alpha, found.law.beta) == (0.34, 0.28) and set(found.intervals) == {"E", "A", "B"}
    assert abs(found.law.E - 1.7) < 1e-6
    assert fit_law(few[:3], alpha=0.34, beta=0.28).intervals == {}


# --- training


def test_masks_grow_by_the_schedule_and_counts_are_exact(gpt: Network) -> None:
    thin = sp.sparse(gpt, 0.0)
    batches = sp.stream_batches(thin, TEXT, length=32, batch_size=4)
    schedule = plan(0.7, steps=2 * len(batches), events=20)
    history = train_sparse(thin, batches, schedule, learning_rate=1e-2, seed=0)
    sizes = [weight.numel() for weight in sp.linear_layers(gpt).values()]
    expected = [sum(size - round((1 - density) * size) for size in sizes) for density in schedule.densities()]
    assert history.logs["live weights"] == expected and len(set(expected)) > 5
    assert "pruning_step" not in dict(thin.module.named_buffers())
    assert sp.active(thin) == expected[-1] == sum(size - round(0.7 * size) for size in sizes)
    for path in masks(thin.module):
        layer: Any = thin.module.get_submodule(path)
        assert not layer.weight[~masks(thin.module)[path].keep].any()


def test_no_sparsity_trains_bit_for_bit_as_dense(gpt: Network) -> None:
    plain, thin = gpt.copy(), sp.sparse(gpt, 0.0)
    options: dict[str, Any] = {"weight_decay": 0.1, "warmup": 0.05}
    batches = [sp.stream_batches(each, TEXT, length=32, batch_size=8) for each in (plain, thin)]
    theirs = fit(plain.module, batches[0], sp.language_step, epochs=1, learning_rate=1e-2, seed=0, **options)
    mine = train_sparse(thin, batches[1], plan(0.0, steps=len(batches[1])), learning_rate=1e-2, seed=0, clip=None)  # masks change the order in which a norm is added up
    assert mine.loss == theirs.loss


def test_a_run_that_was_cut_off_goes_on_at_the_same_step(gpt: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = plan(0.6, steps=2 * len(sp.stream_batches(gpt, TEXT, **STREAM)))

    def trained(killed_in: int | None = None) -> tuple[Any, list[list[bool]]]:
        thin, calls, step = sp.sparse(gpt, 0.0), iter(range(10**6)), sp.language_step
        with monkeypatch.context() as patched:
            if killed_in is not None:
                patched.setattr(sp, "language_step", lambda *given: step(*given) if next(calls) < killed_in else pytest.fail("killed"))
            history = train_sparse(thin, sp.stream_batches(thin, TEXT, **STREAM), schedule, learning_rate=1e-2, seed=0, checkpoint_minutes=0)
        return history, [mask.keep.flatten().tolist() for mask in masks(thin.module).values()]

    whole, kept = trained()
    with runtime.using(folder=tmp_path), pytest.raises(pytest.fail.Exception, match="killed"):
        trained(killed_in=schedule.start + 3)
    with runtime.using(folder=tmp_path):
        again, same = trained()
    assert again.resumed_at == schedule.start + 3 and schedule.start + 3 < schedule.end
    assert again.logs["live weights"] == whole.logs["live weights"] and again.loss == whole.loss and same == kept


LOAD = """
import json, sys, torch, wellread
from wellread import sparsity
network = wellread.load(sys.argv[1])
out = network({"input_ids": torch.arange(20)[None]})
print(json.dumps([out.double().sum().item(), network.lineage[-1]["method"], sparsity.active(network)]))
"""


@pytest.mark.parametrize(("kind", "across"), [("gpt2", False), ("llama", True)])
def test_a_sparse_network_with_its_run(kind: Any, across: bool, tmp_path: Path) -> None:
    network = sp.language_model(16, 2, context=32, kind=kind)
    made = sparse_scaling(network, TEXT, UNSEEN, sparsity=0.6, across=across, **SMALL)
    report = made.reports["sparse_scaling"]
    whole = sp.active(network)
    assert sp.active(made) == pytest.approx(0.4 * whole, abs=8) and not masks(network.module)
    assert sum(made.edits[-1]["layers"].values()) == whole - sp.active(made)
    assert report.figures["average live weights"] / whole == pytest.approx(report.tables["plan"][0]["average density"], abs=1e-3)
    assert report.figures["average live weights"] / whole == pytest.approx(0.61, abs=0.02)
    assert report.figures["held-out nats per token"] < 5.0
    made.save(tmp_path / "made")
    done = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path / "made")], capture_output=True, text=True, check=True)
    value, made_by, live = json.loads(done.stdout)
    with torch.no_grad():
        assert value == made({"input_ids": torch.arange(20)[None]}).double().sum().item()
    assert (made_by, live) == ("sparse-scaling", sp.active(made))


# --- bad input


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"sparsity": 1.0}, "below 1"),
        ({"start": 0.8}, "start below end"),
        ({"context": 64}, "reads 2 to 32"),
        ({"epochs": 0}, "at least 1"),
        ({"batch_size": 1000}, "too few for one pruning"),
    ],
)
def test_bad_input(gpt: Network, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        sparse_scaling(gpt, TEXT, **{**SMALL, **settings})


def test_bad_tables() -> None:
    with pytest.raises(BadInput, match="cannot determine 5 constants"):
        fit_law(runs()[:7])
    with pytest.raises(BadInput, match="same average parameters"):
        fit_law([{**run, "parameters": 1e6} for run in runs()])
    with pytest.raises(BadInput, match="no column 'tokens'"):
        fit_law([{"parameters": 1.0, "loss": 1.0}] * 9)
    with pytest.raises(BadInput, match="loss of run 0 is -1"):
        fit_law([{"parameters": 1.0, "tokens": 1.0, "loss": -1.0}] * 9)
    with pytest.raises(BadInput, match="numbers above 0"):
        fit_law(runs(), alpha=-1.0)
    with pytest.raises(BadInput, match="between 0 and 1"):
        fit_law(runs(), confidence=90)
    with pytest.raises(BadInput, match="grows at entry 2"):
        average_parameters([3, 2, 4])


def test_runs_that_say_nothing_of_an_exponent_leave_it_at_its_bound() -> None:
    cells = itertools.product((60_000.0, 90_000.0, 150_000.0), (1e5, 2e5, 4e5))  # larger is worse: no power of N above 0 does that
    noisy = [{"parameters": n, "tokens": d, "loss": 2 + 400 / d**0.6 + n / 1e6 + (i % 3) / 50} for i, (n, d) in enumerate(cells)]
    found = fit_law(noisy, confidence=None).law
    assert 1e-3 <= found.alpha <= 5 and 1e-3 <= found.beta <= 5
    assert np.isfinite(left_out(noisy)).all()
