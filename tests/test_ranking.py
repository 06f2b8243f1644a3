"""Measures against pytrec_eval, paired tests against scipy and theory, fusion against its closed form, run files there and back."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import kstest, permutation_test, ttest_rel

from wellread.errors import BadInput
from wellread.ranking import Judgements, Run, compare, fuse, holm, measure, paired_p, ranked, read_run, write_run
from wellread.results import Report

pytrec_eval = pytest.importorskip("pytrec_eval")
TREC = {"nDCG@10": "ndcg_cut_10", "nDCG": "ndcg", "R@100": "recall_100", "R@5": "recall_5", "P@5": "P_5", "RR": "recip_rank", "AP": "map"}


def random_case(seed: int, queries: int = 30, documents: int = 150) -> tuple[Run, Judgements]:
    """Graded labels 0...3, a fifth of the judged documents not found, scores of few values: most documents are tied."""
    rng = np.random.default_rng(seed)
    run, judgements = {}, {}
    for query in range(queries):
        judged = rng.choice(documents, 40, replace=False)
        judgements[f"q{query}"] = {f"d{each}": int(rng.choice(4, p=[0.6, 0.2, 0.1, 0.1])) for each in judged}
        found = rng.choice(documents, 120, replace=False)
        run[f"q{query}"] = {f"d{each}": float(rng.integers(0, 12)) / 3 for each in found}
    return run, judgements


@pytest.mark.parametrize("seed", range(5))
def test_measures_are_those_of_pytrec_eval_with_ties_and_grades(seed: int) -> None:
    run, judgements = random_case(seed)
    truth = pytrec_eval.RelevanceEvaluator(judgements, set(TREC.values())).evaluate(run)
    found = measure(run, judgements, list(TREC))
    for name, theirs in TREC.items():
        values = [truth[query][theirs] for query in judgements]
        assert list(found.per_query[name]) == list(judgements)
        np.testing.assert_allclose(list(found.per_query[name].values()), values, atol=1e-9, rtol=0)
        assert found.mean[name] == pytest.approx(np.mean(values), abs=1e-9)
    assert found.warnings == []
    assert 0.05 < found.mean["nDCG@10"] < 0.95


def test_of_equal_scores_the_later_id_comes_first_as_in_trec_eval() -> None:
    assert ranked({"a": 1.0, "c": 1.0, "b": 1.0, "z": 0.5, "é": 1.0, "10": 2.0, "9": 2.0}) == ["9", "10", "é", "c", "b", "a", "z"]
    assert ranked({"a": 1 + 1e-9, "b": 1.0}) == ["b", "a"]  # equal in float32, in which trec_eval compares
    assert ranked({"a": 1 + 1e-6, "b": 1.0}) == ["a", "b"]
    for relevant, place in (("c", 1), ("b", 2), ("a", 3)):
        found = measure({"q": {"a": 1.0, "b": 1.0, "c": 1.0}}, {"q": {relevant: 1}}, ["RR", "RR@10"])
        assert found.mean == {"RR": pytest.approx(1 / place), "RR@10": pytest.approx(1 / place)}  # two providers, one order


def test_a_worked_example() -> None:
    found = measure({"q": {"a": 3.0, "b": 2.0, "c": 1.0}}, {"q": {"a": 1, "c": 3, "d": 2}}, ["nDCG@10", "R@2", "AP", "RR"])
    ideal = 3 + 2 / np.log2(3) + 1 / 2
    assert found.mean == pytest.approx({"nDCG@10": (1 + 3 / 2) / ideal, "R@2": 1 / 3, "AP": (1 + 2 / 3) / 3, "RR": 1.0})


def test_queries_without_results_relevant_documents_or_judgements_are_counted_and_said() -> None:
    run = {"good": {"a": 1.0}, "hopeless": {"a": 1.0}, "extra": {"a": 1.0}, "nothing": {}}
    judgements = {"good": {"a": 1}, "hopeless": {"a": 0, "b": -1}, "silent": {"a": 2}, "nothing": {"a": 1}, "unjudged": {}}
    found = measure(run, judgements, ["nDCG@10", "RR@10"])
    assert found.per_query["nDCG@10"] == {"good": 1.0, "hopeless": 0.0, "silent": 0.0, "nothing": 0.0} == found.per_query["RR@10"]
    assert found.mean["nDCG@10"] == 0.25
    silent, hopeless, extra = found.warnings
    assert "2 of 4" in silent and "'silent'" in silent
    assert "1 of 4" in hopeless and "'hopeless'" in hopeless and "no relevant" in hopeless
    assert "1 of 4" in extra and "'extra'" in extra
    assert measure({}, judgements, ["AP"]).mean == {"AP": 0.0}


@pytest.mark.parametrize(
    ("run", "judgements", "measures", "words"),
    [
        ({"q": {"a": 1.0}}, {"q": {"a": 1}}, ["nDGC@10"], "'nDGC@10' is not known"),
        ({"q": {"a": 1.0}}, {"q": {"a": 1}}, ["nDCG@"], "is not known"),
        ({"q": {"a": 1.0}}, {"q": {"a": 1}}, "nDCG@10", "list of names"),
        ({"q": {"a": 1.0}}, {"q": {"a": 1}}, [], "list of names"),
        ({"q": {"a": 1.0}}, {}, ["AP"], "are empty"),
        ({"q": {"a": 1.0}}, {"q": {}}, ["AP"], "are empty"),
        ({"q": {"a": 1.0}}, {"q": {"a": 0.5}}, ["AP"], "whole numbers"),
        ({"q": {"a": 1.0, "b": float("nan")}}, {"q": {"a": 1}}, ["AP"], "'b' is not a number"),
    ],
)
def test_bad_input_is_refused(run: Run, judgements: Judgements, measures: list[str], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        measure(run, judgements, measures)


# --- tests between runs


def test_few_queries_are_tested_exactly_as_by_scipy() -> None:
    for seed in range(5):
        gain = np.random.default_rng(seed).normal(0.3, 1, 9).round(1)
        every = [abs(gain @ signs) >= abs(gain.sum()) - 1e-9 for signs in itertools.product([1, -1], repeat=9)]
        scipys = permutation_test((gain,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue
        assert paired_p(gain) == pytest.approx(np.mean(every)) == pytest.approx(scipys)
        assert paired_p(np.append(gain, np.zeros(200))) == paired_p(gain)  # a query without a difference says nothing
        assert paired_p(gain, resamples=500, seed=seed) == pytest.approx(paired_p(gain), abs=4 * np.sqrt(0.25 / 500))  # drawn: 2**9 > 500


@pytest.mark.parametrize("test", ["randomisation", "t"])
def test_p_values_are_uniform_under_the_null_and_small_under_a_planted_difference(test: str) -> None:
    rng = np.random.default_rng(0)
    null = [paired_p(rng.standard_t(5, 40), test, resamples=999, seed=seed) for seed in range(500)]  # type: ignore[arg-type]
    assert kstest(null, "uniform").pvalue > 0.01
    planted = [paired_p(rng.standard_t(5, 40) + 1.2, test, resamples=999, seed=seed) for seed in range(50)]  # type: ignore[arg-type]
    assert np.quantile(planted, 0.9) < 0.002


def test_a_drawn_p_value_is_never_zero() -> None:
    assert paired_p(np.ones(40), resamples=99) == pytest.approx(0.01)  # the differences as they came are one of 100


def test_the_t_test_is_scipys_paired_one() -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 50))
    assert paired_p(a - b, "t") == pytest.approx(ttest_rel(a, b).pvalue)
    assert paired_p(np.zeros(5), "t") == paired_p(np.zeros(5)) == 1.0
    assert paired_p(np.full(5, 0.1), "t") == pytest.approx(0.0, abs=1e-12)


def test_holm_by_hand() -> None:
    # sorted: 0.005 x 4 = 0.02; 0.01 x 3 = 0.03; 0.03 x 2 = 0.06; 0.04 x 1 = 0.04, which may not fall below 0.06
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]


def test_compare_tells_the_better_run_and_counts_its_comparisons() -> None:
    rng = np.random.default_rng(0)
    judgements = {f"q{q}": {"right": 1} for q in range(60)}

    def run(lift: float) -> Run:
        return {query: {f"d{each}": rng.normal() for each in range(20)} | {"right": rng.normal(lift)} for query in judgements}

    runs = {"old": run(0.5), "same": run(0.5), "better": run(2.5)}
    report = compare(runs, judgements, "old", ["RR", "R@5"])
    rows = {(row["run"], row["measure"]): row for row in report.tables["comparisons"]}
    assert isinstance(report, Report) and report.figures["comparisons"] == 4 and report.figures["queries"] == 60
    for name in ("RR", "R@5"):
        assert "p" not in rows["old", name]
        better, same = rows["better", name], rows["same", name]
        assert better["difference"] == pytest.approx(better["mean"] - rows["old", name]["mean"]) and better["difference"] > 0.2
        assert better["p_holm"] < 0.01 and better["better"] > better["worse"]
        assert same["p"] > 0.05 and same["p_holm"] == min(1, max(same["p"] * 2, same["p_holm"]))
    tested = [row for row in report.tables["comparisons"] if "p" in row]
    assert [row["p_holm"] for row in tested] == pytest.approx(holm([row["p"] for row in tested]))
    assert compare(runs, judgements, "old").tables == compare(runs, judgements, "old").tables  # the same seed
    del runs["same"]["q0"]
    assert compare(runs, judgements, "old", test="t").warnings == ["same: 1 of 60 judged queries have no results in the run and count 0 (first: 'q0')"]


def test_compare_refuses_what_cannot_be_compared() -> None:
    one = {"q": {"a": 1.0}}
    for runs, baseline, words in (({"a": one}, "b", "baseline 'b'"), ({"a": one}, "a", "at least one other"), ({"a": one, "b": one}, "a", "two judged")):
        with pytest.raises(BadInput, match=words):
            compare(runs, {"q": {"a": 1}}, baseline)
    two = {"q": {"a": 1.0}, "r": {"b": 1.0}}
    with pytest.raises(BadInput, match="'randomisation' or 't'"):
        compare({"a": two, "b": one}, {"q": {"a": 1}, "r": {"b": 1}}, "a", test="wilcoxon")  # type: ignore[arg-type]


# --- fusion


@pytest.mark.parametrize("seed", range(3))
def test_fusing_one_run_keeps_its_order(seed: int) -> None:
    run, _ = random_case(seed)
    fused = fuse([run])
    assert {query: ranked(scores) for query, scores in fused.items()} == {query: ranked(scores) for query, scores in run.items()}
    assert fuse([fused, fused]).keys() == run.keys()


def test_fusion_in_closed_form() -> None:
    a, b = {"q": {"x": 9.0, "y": 5.0, "z": 1.0}, "only a": {"x": 1.0}}, {"q": {"z": 0.3, "w": 0.2, "x": 0.1}}
    fused = fuse([a, b])
    assert fused["q"] == pytest.approx({"x": 1 / 61 + 1 / 63, "y": 1 / 62, "z": 1 / 63 + 1 / 61, "w": 1 / 62})
    assert fused["only a"] == pytest.approx({"x": 1 / 61})
    assert ranked(fused["q"]) == ["z", "x", "y", "w"]
    assert fuse([a, b], k=0)["q"]["x"] == pytest.approx(1 + 1 / 3)
    scaled = {query: {document: 1000 * score - 3 for document, score in scores.items()} for query, scores in b.items()}
    assert fuse([a, scaled]) == fused  # ranks alone count


def test_the_order_of_the_runs_does_not_matter_and_equal_ranks_tie() -> None:
    runs = [random_case(seed, queries=5)[0] for seed in range(4)]
    for order in itertools.permutations(runs):
        assert fuse(order) == fuse(runs)
    ranks = itertools.permutations("abc")
    rounds = fuse([{"q": {each: -place for place, each in enumerate(order)}} for order in ranks])["q"]
    assert len(set(rounds.values())) == 1


def test_fusion_of_nothing_is_refused() -> None:
    with pytest.raises(BadInput):
        fuse([])
    with pytest.raises(BadInput):
        fuse([{"q": {"a": 1.0}}], k=-1)


# --- files


def test_a_run_file_comes_back_as_it_was_and_pytrec_eval_reads_it(tmp_path: Path) -> None:
    run, judgements = random_case(0)
    run["q0"]["d1"] = 0.1 + 0.2  # not a short decimal
    write_run(run, tmp_path / "a.run", "mine")
    assert read_run(tmp_path / "a.run") == run
    with open(tmp_path / "a.run") as lines:
        assert pytrec_eval.parse_run(lines) == run
    first = (tmp_path / "a.run").read_text().splitlines()[0].split()
    assert first == ["q0", "Q0", ranked(run["q0"])[0], "1", repr(max(run["q0"].values())), "mine"]
    assert measure(read_run(tmp_path / "a.run"), judgements) == measure(run, judgements)


@pytest.mark.parametrize(
    ("content", "words"),
    [("q Q0 a 1 0.5\n", "line 1"), ("q Q0 a 1 0.5 x\nq Q0 b 2 high x\n", "line 2"), ("q Q0 a 1 2 x\nq Q0 a 2 2 x\n", "line 2: document 'a' stands twice")],
)
def test_a_broken_run_file_is_refused_by_line(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "a.run").write_text(content)
    with pytest.raises(BadInput, match=words):
        read_run(tmp_path / "a.run")


def test_ids_with_spaces_do_not_go_into_a_run_file(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="'my notes.md#1'"):
        write_run({"q": {"a": 1.0, "my notes.md#1": 0.5}}, tmp_path / "a.run")
    assert not (tmp_path / "a.run").exists()
