"""Pruning while training, on bytes of Wikipedia text: does the average number of weights tell the loss?

    WELLREAD_DATA=... python -m bench.sparse_scaling [--quick]

Arms, over the same bytes in the same order, with s = 0.6: dense; pruned between 25 and 75 % of the compute; a dense network with the average size of that
one, and one with its final size; pruned in the first quarter, and in the last. Then dense runs of other sizes and lengths, to which the law is
fitted; it has to tell the losses of the sparse runs, and of dense runs left out of the fit. The learning rate is chosen by dense runs of two other seeds,
judged on a tenth of the text that is otherwise learnt from. --quick tries it out on little text and records nothing.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from bench.harness import Expect, Noted, record
from wellread import Network
from wellread import sparsity as sp
from wellread.compress.sparse_scaling import Plan, plan, train_sparse
from wellread.compress.spdf import train
from wellread.data import rename
from wellread.scaling_law import average_parameters, fit_law, left_out

QUICK = "--quick" in sys.argv
SEEDS = [0] if QUICK else [0, 1, 2]
BYTES, TEST = (24_000, 3_000) if QUICK else (450_000, 60_000)
WIDTH, DEPTH, CONTEXT, SPARSITY, BATCH = 64, 3, 64, 0.6, 16
RATES = (3e-3,) if QUICK else (1e-3, 2e-3, 4e-3)
CLAIM = "pruning between 25 and 75 % of the compute is near the best; the average number of weights tells the loss of sparse and dense runs alike"

EXPECTS = [
    Expect("the sizes differ enough: dense beats the small one by three standard deviations, or the test is void", "dense_beats_small_in_deviations", 3.0),
    Expect("the pruned network's loss is nearer to that of its average size than to that of its final size", "gap_to_final_size - gap_to_average_size", 0.0),
    Expect("it beats the dense network of its final size in the mean", "dense_final_size - gradual", 0.0),
    Expect("and in at least two of three seeds", "seeds_that_beat_the_final_size", 2.0),
    Expect("it is within a standard deviation of the better of pruning early and late", "gradual_minus_best_other_minus_deviation", 0.0, at_least=False),
    Expect("a law fitted to dense runs tells the losses of gradually pruned ones within 2 %", "law_error_percent", 2.0, at_least=False),
    Expect("and that of dense runs of a size and length it has not seen", "law_error_on_dense_runs_left_out_percent", 2.0, at_least=False),
]


def texts() -> tuple[str, str]:
    """What is learnt from, and the last tenth of the text."""
    whole = "".join((Path(os.environ["WELLREAD_DATA"]) / "wikitext2" / f"{part}.txt").read_text("utf-8") for part in ("valid", "test")).encode()
    cut = len(whole) * 9 // 10
    return whole[:BYTES].decode(errors="ignore"), whole[cut : cut + TEST].decode(errors="ignore")


def table(text: str, name: str) -> Dataset:
    return rename(Dataset.from_dict({"text": [text]}), name)


def equal_width(weights: float) -> int:
    """Even width of the dense GPT nearest to so many linear weights."""
    return min(range(8, WIDTH + 1, 2), key=lambda width: abs(12 * DEPTH * width**2 - weights))


def main() -> None:
    figures = Noted()
    dense_runs: list[dict[str, float]] = []
    sparse_runs: list[dict[str, float]] = []
    text, other = texts()

    def rated(rate: float) -> float:
        """Loss of dense networks on the last tenth of the text learnt from, after one pass over the rest; two seeds that are not used again."""
        cut, losses = len(text) * 9 // 10, []
        for seed in (98, 99):
            network = sp.language_model(WIDTH, DEPTH, context=CONTEXT, seed=seed)
            options: dict[str, Any] = {"length": CONTEXT, "batch_size": BATCH, "seed": seed}
            train(network, sp.stream_batches(network, table(text[:cut], "WikiText-2"), **options), epochs=1, seed=seed, name="rate", learning_rate=rate)
            losses.append(sp.language_loss(network, sp.stream_batches(network, table(text[cut:], "held back"), shuffle=False, **options)))
        return float(np.mean(losses))

    rates = {rate: rated(rate) for rate in RATES}
    rate: dict[str, Any] = {"learning_rate": min(rates, key=rates.__getitem__)}
    print(f"loss by learning rate: {rates}", flush=True)

    def run(width: int, seed: int, schedule: Plan | None = None, share: float = 1.0) -> tuple[float, dict[str, float]]:
        """Held-out loss after one pass over a share of the text, and the run as a row for the law."""
        network: Network = sp.language_model(width, DEPTH, context=CONTEXT, seed=seed)
        batches = sp.stream_batches(network, table(text[: int(share * len(text))], "WikiText-2"), length=CONTEXT, batch_size=BATCH, seed=seed)
        average = float(sp.active(network))
        if schedule is None:
            train(network, batches, epochs=1, seed=seed, name=f"dense {width}", **rate)
        else:
            network = sp.sparse(network, 0.0)
            average = average_parameters(train_sparse(network, batches, schedule, seed=seed, **rate).logs["live weights"])
        judged = sp.stream_batches(network, table(other, "held out"), length=CONTEXT, batch_size=64, shuffle=False)
        loss = sp.language_loss(network, judged)
        row = {"parameters": average, "tokens": float(batches.rows * CONTEXT), "loss": loss, "final": float(sp.active(network))}
        print(f"    {row}", flush=True)
        return loss, row

    probe = sp.language_model(WIDTH, DEPTH, context=CONTEXT)
    steps = len(sp.stream_batches(probe, table(text, "WikiText-2"), length=CONTEXT, batch_size=BATCH))
    schedules = {"gradual": plan(SPARSITY, steps=steps), "early": plan(SPARSITY, steps=steps, start=0.0, end=0.25), "late": plan(SPARSITY, steps=steps, start=0.75, end=1.0)}
    whole = sp.active(probe)
    average_width, final_width = equal_width(schedules["gradual"].average * whole), equal_width((1 - SPARSITY) * whole)
    print(f"{steps} steps, widths {WIDTH}, {average_width}, {final_width}", {name: round(each.average, 3) for name, each in schedules.items()}, flush=True)
    for seed in SEEDS:
        print(f"seed {seed}", flush=True)
        for name, width in (("dense", WIDTH), ("dense_average_size", average_width), ("dense_final_size", final_width)):
            loss, row = run(width, seed)
            figures(**{name: loss})
            dense_runs.append(row)
        for name, schedule in schedules.items():
            loss, row = run(WIDTH, seed, schedule)
            figures(**{name: loss})
            sparse_runs.append({**row, "gradual": name == "gradual"})
    for width in (WIDTH, average_width, final_width):
        for share in (0.25, 0.5):
            dense_runs.append(run(width, SEEDS[0], share=share)[1])
    fitted = fit_law(dense_runs)
    alone = left_out(dense_runs)

    def error(rows: list[dict[str, float]]) -> float:
        return 100 * float(np.mean([abs(fitted.law.loss(row["parameters"], row["tokens"]) / row["loss"] - 1) for row in rows]))

    found = {name: np.asarray(values) for name, values in figures.items()}
    spread = {name: float(values.std(ddof=1)) if len(values) > 1 else float("nan") for name, values in found.items()}
    best = min(("early", "late"), key=lambda name: float(found[name].mean()))
    derived = {
        "gap_to_average_size": abs(float((found["gradual"] - found["dense_average_size"]).mean())),
        "gap_to_final_size": abs(float((found["gradual"] - found["dense_final_size"]).mean())),
        "seeds_that_beat_the_final_size": float((found["gradual"] < found["dense_final_size"]).sum()),
        "gradual_minus_best_other_minus_deviation": float((found["gradual"] - found[best]).mean()) - spread["gradual"],
        "dense_beats_small_in_deviations": float((found["dense_final_size"] - found["dense"]).mean()) / max(spread["dense"], spread["dense_final_size"]),
        "law_error_percent": error([row for row in sparse_runs if row["gradual"]]),
        "law_error_early_late_percent": error([row for row in sparse_runs if not row["gradual"]]),
        "law_error_on_its_own_runs_percent": error(dense_runs),
        "law_error_on_dense_runs_left_out_percent": 100 * float(np.mean(np.abs(alone))),
        "law_error_if_final_size_counted_percent": error([{**row, "parameters": row["final"]} for row in sparse_runs if row["gradual"]]),
        "law_condition": fitted.condition,
        **{f"law_{name}": getattr(fitted.law, name) for name in ("E", "A", "B", "alpha", "beta")},
    }
    if QUICK:
        print({name: round(value, 4) for name, value in derived.items()})
        return
    record(
        "sparse_scaling",
        figures={"gradual": figures["gradual"], **derived},
        baselines={name: values for name, values in figures.items() if name != "gradual"},
        expects=EXPECTS,
        claims_tested=[CLAIM],
        sizes={"bytes": BYTES, "held_out_bytes": TEST, "layers": DEPTH, "widths": f"{WIDTH}, {average_width}, {final_width}", "context": CONTEXT, "steps": steps, "sparsity": SPARSITY, "runs_for_the_law": len(dense_runs)},
        seeds=SEEDS,
        notes=[
            "losses in nats per byte of held-out text; weights counted are those of the linear layers, without embeddings and head",
            "90 % intervals of the law's constants, by profile likelihood: " + ", ".join(f"{name} {low:.3g} to {high:.3g}" for name, (low, high) in fitted.intervals.items()),
            "learning rate "
            + f"{rate['learning_rate']:g}, chosen by the loss of dense runs on held-back training text: "
            + ", ".join(f"{loss:.3f} at {each:g}" for each, loss in rates.items()),
            "the paper's networks have 58 to 468 million weights and see 20 or more tokens for each; here it is 0.06 to 0.15 million, and 3 to 8 tokens at full length",
        ],
    )


if __name__ == "__main__":
    main()
