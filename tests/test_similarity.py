"""Similarities, stacking and agreement: closed forms, limits, and uncertainty that counts items."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset
from scipy.optimize import nnls
from scipy.stats import kstest

from wellread import similarity
from wellread.errors import BadInput
from wellread.similarity import (
    Judged,
    as_square,
    ask_next,
    bootstrap,
    by_item,
    choose_penalty,
    concatenated,
    correlation,
    cosine,
    counted,
    filled,
    fit_weights,
    held_out,
    mantel,
    nonnegative_ridge,
    resampling_units,
    split_half,
    spread,
    stacked,
    within,
)


def world(items: int = 24, sources: int = 3, seed: int = 0) -> tuple[list[np.ndarray], np.ndarray, np.ndarray, np.ndarray]:
    """Vectors [N, 5] of each source, the pairs of the items, and ratings that the first source explains."""
    random = np.random.default_rng(seed)
    parts = [random.normal(size=(items, 5)) for _ in range(sources)]
    first, second = np.triu_indices(items, 1)
    return parts, first, second, 3 + cosine(parts[0])[first, second]


def said(parts: list[np.ndarray], first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.column_stack([cosine(part)[first, second] for part in parts])


# --- similarities


def test_the_cosine_of_concatenated_parts_is_the_weighted_mean_of_their_cosines() -> None:
    parts, first, second, _ = world()
    parts[1] *= 1000  # must not decide
    weights = np.array([0.5, 2.0, 0.25])
    whole = cosine(concatenated(parts, weights))[first, second]
    assert np.abs(whole - stacked(said(parts, first, second), weights)).max() < 1e-12
    assert np.abs(whole - said(parts, first, second) @ weights / 2.75).max() < 1e-6


def test_nothing_to_compare_is_not_zero() -> None:
    square = cosine(np.array([[1.0, 0.0], [0.0, 0.0], [np.nan, 1.0], [2.0, 0.0]]))
    assert np.isnan(square[1]).all() and np.isnan(square[:, 2]).all() and square[0, 3] == 1
    known = np.array([[1.0, np.nan], [3.0, 0.5], [np.nan, np.nan]])
    assert np.array_equal(filled(known), [[1.0, 0.5], [3.0, 0.5], [np.nan, np.nan]], equal_nan=True)
    assert np.array_equal(filled(np.array([[np.nan, 0.5], [np.nan, 1.5]]))[:, 1], [0.5, 1.5])


def test_spaces() -> None:
    vectors = np.random.default_rng(0).normal(size=(50, 4)) * [1, 2, 3, 0] + [5, 0, 0, 7]
    vectors[3] = np.nan
    there = np.arange(50) != 3
    assert spread(vectors, "raw") is vectors
    assert np.abs(spread(vectors, "centred")[there].mean(0)).max() < 1e-12
    scaled = spread(vectors, "zscored")
    assert np.allclose(scaled[there].std(0), [1, 1, 1, 0]) and np.isnan(scaled[3]).all()


def test_counted_tags_are_those_of_scikit_learn() -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.metrics.pairwise import cosine_similarity

    bags = [{"cat": 3, "grey": 1}, {"cat": 1, "sleeping": 2}, {"car": 2}, {}, {"grey": 1, "car": 1}]
    texts = [" ".join(tag for tag, count in bag.items() for _ in range(count)) for bag in bags]
    theirs = cosine_similarity(TfidfVectorizer().fit_transform(texts))
    ours, full = counted(bags), [0, 1, 2, 4]
    assert np.abs(ours - theirs)[np.ix_(full, full)].max() < 1e-12
    assert np.isnan(ours[3]).all() and np.isnan(ours[:, 3]).all()


# --- weights


def test_the_ridge_is_nnls_without_a_penalty_and_the_closed_form_where_nothing_is_negative() -> None:
    random = np.random.default_rng(0)
    inputs = random.normal(size=(80, 4))
    target = inputs @ [1.0, 0.5, -1.0, 2.0] + random.normal(size=80)
    assert np.array_equal(nonnegative_ridge(inputs, target, 0.0), nnls(np.vstack([inputs, np.zeros((4, 4))]), np.append(target, np.zeros(4)))[0])
    assert np.abs(nonnegative_ridge(inputs, target, 0.0) - nnls(inputs, target)[0]).max() < 1e-10
    assert nonnegative_ridge(inputs, target, 0.0)[2] == 0
    target = inputs @ [1.0, 0.5, 1.0, 2.0]
    closed = np.linalg.solve(inputs.T @ inputs + 7 * np.eye(4), inputs.T @ target)
    assert closed.min() > 0 and np.abs(nonnegative_ridge(inputs, target, 7.0) - closed).max() < 1e-10


def test_a_constant_source_and_one_that_disagrees_get_nothing() -> None:
    parts, first, second, ratings = world()
    columns = said(parts, first, second)
    columns[:, 1], columns[:, 2] = 0.7, -columns[:, 0]
    for penalty in similarity.PENALTIES:
        assert np.array_equal(fit_weights(columns, ratings, penalty), [1, 0, 0])
    assert np.array_equal(fit_weights(columns[:, 1:], ratings, 0.1), [0.5, 0.5]), "nothing agrees: equal weights"


def test_weights_do_not_depend_on_the_scale_of_the_ratings() -> None:
    parts, first, second, ratings = world()
    ratings = ratings + np.random.default_rng(1).normal(size=len(ratings))
    columns = said(parts, first, second)
    assert np.allclose(fit_weights(columns, ratings, 0.1), fit_weights(columns, 5 * ratings - 100, 0.1))
    assert np.allclose(fit_weights(columns, ratings, 0.1), fit_weights(np.tile(columns, (3, 1)), np.tile(ratings, 3), 0.1))
    wider = fit_weights(columns * [1, 10, 1], ratings, 0.1) * [1, 10, 1]
    assert np.allclose(wider / wider.sum(), fit_weights(columns, ratings, 0.1))


@pytest.mark.parametrize("folds", [3, 5])
def test_folds_share_no_item_and_test_every_pair_once(folds: int) -> None:
    first, second = np.triu_indices(17, 1)
    tested = []
    for train, test in by_item(first, second, folds, seed=1):
        assert not {*first[train], *second[train]} & {*first[test], *second[test]}
        tested += test.tolist()
    assert sorted(tested) == list(range(len(first)))


def test_lone_pairs_are_dealt_whole() -> None:
    first, second = np.arange(0, 200, 2), np.arange(1, 200, 2)
    parts = list(by_item(first, second, 5))
    assert sorted(len(test) for _, test in parts) == [20] * 5 and all(len(train) == 80 for train, _ in parts)
    assert len(np.unique(resampling_units(first, second))) == 100
    assert np.array_equal(resampling_units(*np.triu_indices(9, 1)), np.arange(9))


def test_nothing_is_learned_from_chance_when_items_are_left_out() -> None:
    """Ratings that no source explains, but that are the same for all pairs of an item: weights fitted to them look good on their own items."""
    own, left_out = [], []
    for seed in range(8):
        parts, first, second, _ = world(items=16, sources=30, seed=seed)
        random = np.random.default_rng(100 + seed)
        effect = random.normal(size=16)
        ratings = effect[first] + effect[second]
        columns = said(parts, first, second)
        own.append(correlation(stacked(columns, fit_weights(columns, ratings, 0.001)), ratings))
        fitted, best = held_out(columns, ratings, first, second, seed=seed)
        left_out += [correlation(fitted, ratings), correlation(best, ratings)]
    assert np.mean(own) > 0.3 and abs(np.mean(left_out)) < 0.1


def test_what_is_informative_is_found_on_other_items() -> None:
    parts, first, second, ratings = world()
    columns = said(parts, first, second)
    fitted, best = held_out(columns, ratings, first, second)
    assert correlation(fitted, ratings) > 0.99 and correlation(best, ratings) == pytest.approx(1)
    assert choose_penalty(columns, ratings, first, second) == min(similarity.PENALTIES), "without noise the least penalty is best"


# --- agreement


def test_perfect_agreement_and_affine_ratings() -> None:
    parts, first, second, ratings = world()
    assert correlation(cosine(parts[0])[first, second], ratings) == pytest.approx(1, abs=1e-12)
    noisy = ratings + np.random.default_rng(0).normal(size=len(ratings))
    column = said(parts, first, second)[:, 1]
    assert correlation(column, noisy) == pytest.approx(correlation(column, 7 * noisy - 3), abs=1e-12)
    assert mantel(cosine(parts[0]), first, second, ratings, permutations=199) == 1 / 200
    assert np.isnan(correlation(np.ones(9), np.arange(9.0))) and np.isnan(correlation(np.full(9, np.nan), np.arange(9.0)))


def test_shuffled_items_give_uniform_p() -> None:
    """Although the pairs of an item belong together, which a test on pairs would take for evidence."""
    p = []
    for seed in range(150):
        random = np.random.default_rng(seed)
        parts, first, second, _ = world(items=12, sources=1, seed=seed)
        effect = random.normal(size=12)
        p.append(mantel(cosine(parts[0]), first, second, effect[first] + effect[second] + random.normal(size=len(first)), permutations=99, seed=seed))
    assert kstest(np.array(p) - np.random.default_rng(0).uniform(0, 0.01, 150), "uniform").pvalue > 0.01


def test_mantel_leaves_out_items_without_a_description() -> None:
    parts, first, second, ratings = world()
    square = cosine(parts[0])
    square[5], square[:, 5] = np.nan, np.nan
    assert mantel(square, first, second, ratings, permutations=99) == 0.01
    assert np.isnan(mantel(np.full_like(square, np.nan), first, second, ratings, permutations=99))


def test_lone_pairs_have_the_interval_of_independent_pairs() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=400)
    y = 0.5 * x + random.normal(size=400)
    draws = bootstrap(x[:, None], y, np.arange(0, 800, 2), np.arange(1, 800, 2), draws=2000)
    plain = []
    for _ in range(2000):
        rows = random.integers(0, 400, 400)
        plain.append(np.corrcoef(x[rows], y[rows])[0, 1])
    assert draws.shape == (2000, 1) and draws.std() == pytest.approx(np.std(plain), rel=0.1) and draws.mean() == pytest.approx(np.mean(plain), abs=0.005)


def test_intervals_count_items_and_not_pairs() -> None:
    """The spread of r over new sets of 30 items, when ratings and similarities both hang on what each item is."""

    def drawn(seed: int) -> tuple[np.ndarray, np.ndarray]:
        random = np.random.default_rng(seed)
        a, b = random.normal(size=(2, 30))
        b = 0.5 * a + b
        return a[first] + a[second], b[first] + b[second]

    first, second = np.triu_indices(30, 1)
    truth = np.std([correlation(*drawn(seed)) for seed in range(500)])
    found = np.mean([bootstrap(x[:, None], y, first, second, draws=200).std() for x, y in map(drawn, range(20))])
    pairs = np.mean([(1 - correlation(*drawn(seed)) ** 2) / np.sqrt(len(first)) for seed in range(20)])
    assert 0.75 * truth < found < 1.33 * truth and pairs < 0.5 * truth


def test_a_source_that_is_silent_on_some_pairs_is_judged_on_the_others() -> None:
    parts, first, second, ratings = world()
    columns = said(parts, first, second)
    columns[::2, 0] = np.nan
    draws = bootstrap(columns, ratings + 0, first, second, draws=100)
    assert np.allclose(draws[:, 0], 1) and np.abs(draws[:, 1]).max() < 0.9


def test_agreement_inside_groups() -> None:
    random = np.random.default_rng(0)
    group = np.repeat([0, 1], 50)
    x, y = random.normal(size=(2, 100)) + 10 * group
    assert correlation(x, y) > 0.9 and abs(within(x, y, group)) < 0.2
    assert within(x, 2 * x + 100 * group, group) == pytest.approx(1)


@pytest.mark.parametrize("ratings, noise", [(4, 1.0), (10, 2.0)])
def test_reliability_is_the_closed_form(ratings: int, noise: float) -> None:
    random = np.random.default_rng(0)
    pair = np.repeat(np.arange(4000), ratings)
    score = random.normal(size=4000)[pair] + noise * random.normal(size=len(pair))
    shuffled = random.permutation(len(pair))
    assert split_half(pair[shuffled], score[shuffled], draws=10) == pytest.approx(1 / (1 + noise**2 / ratings), abs=0.01)


def test_reliability_needs_pairs_that_were_rated_twice() -> None:
    pair, score = np.arange(100) // 2, np.random.default_rng(0).normal(size=100)
    assert np.isnan(split_half(pair[:50], score[:50])) and np.isnan(split_half(np.arange(100), score))
    assert split_half(pair, pair.astype(float)) == pytest.approx(1)
    assert split_half(np.append(pair, 77), np.append(pair, 99.0)) == pytest.approx(1), "a lone rating is not asked"


# --- judgements


def table(**columns: list) -> Dataset:
    return Dataset.from_dict(columns)


def test_each_pair_is_one_whatever_the_order_and_the_rater() -> None:
    rows = [("a", "b", 1.0, "x"), ("b", "a", 3.0, "x"), ("a", "b", 5.0, "y"), ("b", "c", 4.0, "x"), ("c", "c", 5.0, "x"), ("c", "b", 4.0, "y")]
    columns = dict(zip(("first", "second", "score", "rater"), map(list, zip(*rows, strict=True)), strict=True))
    found = Judged.read(table(**columns), ["a", "b", "c"], [1, 5])
    assert found.first.tolist() == [0, 1] and found.second.tolist() == [1, 2]
    assert found.mean.tolist() == [3.5, 4.0], "the two orders of rater x are one rating, 2"
    assert found.pair.tolist() == [0, 0, 1, 1] and found.score.tolist() == [2, 5, 4, 4] and found.raters == 2 and found.itself == 1
    assert found.order == 0.0, "a before b: 3 in the mean; b before a: 3; b before c and c before b: 4"
    assert found.notes() == {"pairs rated several times": 2, "variance of the ratings of a pair": 2.25, "distance between the two orders of a pair": 0.0}
    del columns["rater"]
    plain = Judged.read(table(**columns), ["a", "b", "c"])
    assert plain.mean.tolist() == [3.0, 4.0] and plain.raters == 0 and len(plain.score) == 5
    once = Judged.read(table(first=["a", "b"], second=["b", "c"], score=["1", "2"]), ["a", "b", "c"])
    assert once.order is None and once.notes() == {"pairs rated several times": 0}


def test_judgements_that_cannot_be_used() -> None:
    good = {"first": ["a", "b"], "second": ["b", "c"], "score": [1.0, 2.0]}
    for changes, scale, complaint in (
        ({"second": ["b", "z"]}, None, "name 'z' in row 1"),
        ({"score": [1.0, 9.0]}, [1, 5], "score 9 in row 1, outside the scale 1 to 5"),
        ({"score": [2.0, 2.0]}, None, "one and the same score"),
        ({"second": ["a", "b"]}, None, "one and the same score"),
    ):
        with pytest.raises(BadInput, match=complaint):
            Judged.read(table(**{**good, **changes}), ["a", "b", "c"], scale)


def test_the_pairs_to_ask_next_are_those_on_which_sources_disagree() -> None:
    columns = np.array([[0.1, 0.2], [0.9, 0.1], [0.5, 0.6], [0.2, 0.9], [np.nan, 0.5]])
    assert ask_next(columns, np.array([False, True, False, False, False]), 2).tolist() == [3, 0]
    assert set(ask_next(columns, np.zeros(5, bool), 9)) == {0, 1, 2, 3} and len(ask_next(columns[:, :1], np.zeros(5, bool))) == 0
    assert np.array_equal(ask_next(columns**3 + 5, np.zeros(5, bool), 2), ask_next(columns, np.zeros(5, bool), 2)), "ranks are compared"


def test_pairs_become_a_square() -> None:
    names, square = as_square(np.array([0.5, 0.25]), ["a", "b"], ["b", "c"])
    assert names == ["a", "b", "c"]
    assert np.array_equal(square, [[1, 0.5, np.nan], [0.5, 1, 0.25], [np.nan, 0.25, 1]], equal_nan=True)
    with pytest.raises(BadInput, match="2 values for 1 pairs"):
        as_square(np.zeros(2), ["a"], ["b"])
