"""What a ranking is worth: the field's measures, paired tests between rankings, and their fusion.

A `Run` is what a search gave: for each query the documents it found with their scores. Judgements are what people said: for each query the
documents they looked at with a grade (0: not relevant). Both are plain dicts, and both have had a file format since the first TREC conferences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from wellread.errors import BadInput, optional
from wellread.results import Report

Run = dict[str, dict[str, float]]  # query id -> document id -> score, higher is better
Judgements = dict[str, dict[str, int]]  # query id -> document id -> grade
MEASURES = ("nDCG@10", "R@100", "RR", "AP")


@dataclass(frozen=True)
class Measured:
    mean: dict[str, float]  # by measure, over all judged queries
    per_query: dict[str, dict[str, float]]  # by measure and query id, in the order of the judgements
    warnings: list[str] = field(default_factory=list)  # what the figures do not show


def ranked(scores: Mapping[str, float]) -> list[str]:
    """Document ids from best to worst as trec_eval orders them: by score in float32; of equal scores the later id comes first."""
    with np.errstate(over="ignore"):
        values = np.fromiter(scores.values(), np.float32, len(scores))
    if np.isnan(values).any():
        raise BadInput(f"the score of document {list(scores)[int(np.isnan(values).argmax())]!r} is not a number: correct the run")
    return [document for _, document in sorted(zip(values.tolist(), scores, strict=True), reverse=True)]


def measure(run: Run, judgements: Judgements, measures: Sequence[str] = MEASURES) -> Measured:
    """The value of each measure for each judged query, and the mean, by ir_measures (the figures of trec_eval).

    measures: names of ir_measures: "nDCG@10", "R@100", "P@5", "RR", "RR@10", "AP", "AP(rel=2)", ... Gains of nDCG are the grades, linear.
    A judged query that the run does not answer counts 0, and so does one without a relevant document; both are in `warnings`. Queries without
    judgements are not counted. Raises `BadInput` for unknown measures, scores that are not numbers, and judgements that judge nothing.
    """
    ir = optional("ir_measures", "retrieve")
    if not any(judgements.values()):
        raise BadInput("the judgements are empty: give for each query at least one document and its grade")
    for query, grades in judgements.items():
        if wrong := next((document for document, grade in grades.items() if grade != int(grade)), None):
            raise BadInput(f"the grade of document {wrong!r} for query {query!r} is {grades[wrong]!r}: give whole numbers")
    judged = {query: {document: int(grade) for document, grade in grades.items()} for query, grades in judgements.items() if grades}
    # places instead of scores: every measure of ir_measures then sees the same order, whatever it does with equal scores
    places = {query: {document: -float(place) for place, document in enumerate(ranked(run[query]))} for query in judged if run.get(query)}
    names = _parsed(ir, measures)
    per_query: dict[str, dict[str, float]] = {name: dict.fromkeys(judged, 0.0) for name in measures}
    try:
        for each in ir.iter_calc(list(names), judged, places) if places else []:
            per_query[names[each.measure]][each.query_id] = float(each.value)
    except ValueError as failed:
        raise BadInput(f"ir_measures cannot compute this here: {failed}") from None
    return Measured({name: float(np.mean(list(each.values()))) for name, each in per_query.items()}, per_query, _unusual(run, judged, places))


def _parsed(ir: Any, measures: Sequence[str]) -> dict[Any, str]:
    names: dict[Any, str] = {}
    if isinstance(measures, str) or not measures:
        raise BadInput('the measures are a list of names, for instance ["nDCG@10", "RR"]')
    for name in measures:
        try:
            names[ir.parse_measure(name)] = name
        except Exception:  # from a NameError to what a measure's own arguments raise
            raise BadInput(f"the measure {name!r} is not known: give a name of ir_measures, such as {', '.join(MEASURES)}") from None
    return names


def _unusual(run: Run, judged: Judgements, answered: Mapping[str, Any]) -> list[str]:
    silent = [query for query in judged if query not in answered]
    hopeless = [query for query, grades in judged.items() if max(grades.values()) < 1]
    unjudged = [query for query in run if query not in judged]
    return [
        f"{len(queries)} of {total} {what} (first: {queries[0]!r})"
        for queries, total, what in (
            (silent, len(judged), "judged queries have no results in the run and count 0"),
            (hopeless, len(judged), "judged queries have no relevant document and count 0 for every run"),
            (unjudged, len(run), "queries of the run have no judgements and are not counted"),
        )
        if queries
    ]


def compare(
    runs: Mapping[str, Run],
    judgements: Judgements,
    baseline: str,
    measures: Sequence[str] = ("nDCG@10",),
    *,
    test: Literal["randomisation", "t"] = "randomisation",
    resamples: int = 9999,
    seed: int = 0,
) -> Report:
    """Is a run better than the baseline, or were these queries kind to it? One row per run and measure.

    baseline: the name in `runs` that the others are compared with, query by query.
    test: two-sided and paired: signs of the differences flipped at random (all ways when there are at most `resamples`), or Student's t test.
    "p" is that of one comparison alone; "p_holm" is corrected by Holm's step-down over all rows of the table, and is the one to quote.
    """
    if baseline not in runs or len(runs) < 2:
        raise BadInput(f"the baseline {baseline!r} and at least one other run are needed: there are {', '.join(map(repr, runs)) or 'none'}")
    measured = {name: measure(run, judgements, measures) for name, run in runs.items()}
    if len(next(iter(measured[baseline].per_query.values()))) < 2:
        raise BadInput("a paired test needs at least two judged queries")
    rows: list[dict[str, Any]] = []
    for name in measures:
        base = np.array(list(measured[baseline].per_query[name].values()))
        rows.append({"run": baseline, "measure": name, "mean": measured[baseline].mean[name]})
        for other in (each for each in runs if each != baseline):
            gain = np.array(list(measured[other].per_query[name].values())) - base
            row = {"run": other, "measure": name, "mean": measured[other].mean[name], "difference": float(gain.mean())}
            rows.append(row | {"better": int((gain > 0).sum()), "worse": int((gain < 0).sum()), "p": paired_p(gain, test, resamples, seed)})
    tested = [row for row in rows if "p" in row]
    for row, corrected in zip(tested, holm([row["p"] for row in tested]), strict=True):
        row["p_holm"] = corrected
    figures = {"queries": len(base), "comparisons": len(tested), "baseline": baseline, "test": f"paired {test} test, two-sided, Holm"}
    said = [f"{name}: {warning}" for name, each in measured.items() for warning in each.warnings]
    return Report(f"{len(tested)} comparisons with {baseline}", figures, tables={"comparisons": rows}, warnings=said)


def paired_p(differences: np.ndarray, test: Literal["randomisation", "t"] = "randomisation", resamples: int = 9999, seed: int = 0) -> float:
    """Two-sided p-value of "these paired differences [N] are as likely to have the other sign"; 1 when there is no difference at all."""
    if test not in ("randomisation", "t"):
        raise BadInput(f"test is {test!r}: choose 'randomisation' or 't'")
    if not differences.any():
        return 1.0
    if test == "t":
        from scipy.stats import ttest_1samp

        with np.errstate(divide="ignore"):  # the same difference in every query: p is 0
            return float(ttest_1samp(differences, 0.0).pvalue)
    changed = differences[differences != 0]  # the sign of a zero changes nothing
    least = abs(changed.sum()) - 1e-9 * np.abs(changed).sum()  # sums that differ by rounding only are equal
    if 2 ** len(changed) <= resamples:
        every = 1 - 2 * (np.arange(2 ** len(changed))[:, None] >> np.arange(len(changed)) & 1)
        return float(np.mean(np.abs(every @ changed) >= least))
    rng, beyond, rows = np.random.default_rng(seed), 1, 1 + 2**20 // len(changed)  # 1: the differences as they came are one of the ways
    for start in range(0, resamples, rows):
        signs = 2.0 * rng.integers(0, 2, (min(rows, resamples - start), len(changed)), np.int8) - 1
        beyond += int((np.abs(signs @ changed) >= least).sum())
    return beyond / (resamples + 1)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979): the smallest of m p-values times m, the next times m - 1, ..., never falling, at most 1."""
    order = np.argsort(p, kind="stable")
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(np.maximum.accumulate(np.asarray(p, dtype=float)[order] * np.arange(len(p), 0, -1)), 1.0)
    return corrected.tolist()


def fuse(runs: Sequence[Run], k: float = 60) -> Run:
    """Reciprocal rank fusion (Cormack et al. 2009): a document's score is the sum over runs of 1 / (k + its rank there), the first rank being 1."""
    if not runs or k < 0:
        raise BadInput("fusion needs at least one run and a k that is not negative")
    parts: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        for query, scores in run.items():
            fused = parts.setdefault(query, {})
            for rank, document in enumerate(ranked(scores), 1):
                fused.setdefault(document, []).append(1 / (k + rank))
    # fsum: the same ranks in another order of runs must be a tie
    return {query: {document: math.fsum(values) for document, values in fused.items()} for query, fused in parts.items()}


def write_run(run: Run, file: str | Path, name: str = "wellread") -> None:
    """Write a TREC run file: lines "query Q0 document rank score name", best first. Raises `BadInput` for ids with spaces, which it cannot hold."""
    if wrong := next((each for query in run for each in (name, query, *run[query]) if len(each.split()) != 1), None):
        raise BadInput(f"a TREC run file cannot hold the id {wrong!r}: use ids without spaces")
    with open(file, "w", encoding="utf-8") as out:
        for query, scores in run.items():
            out.writelines(f"{query} Q0 {each} {rank} {scores[each]!r} {name}\n" for rank, each in enumerate(ranked(scores), 1))


def read_run(file: str | Path) -> Run:
    """The run of a TREC run file; its scores count, its ranks do not. Raises `BadInput` naming the line that is wrong."""
    run: Run = {}
    with open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                query, _, document, _, score, _ = line.split()
                value = float(score)
            except ValueError:
                raise BadInput(f"{file}, line {number} is not 'query Q0 document rank score name': {line.strip()[:80]!r}") from None
            scores = run.setdefault(query, {})
            if document in scores:
                raise BadInput(f"{file}, line {number}: document {document!r} stands twice for query {query!r}")
            scores[document] = value
    return run
