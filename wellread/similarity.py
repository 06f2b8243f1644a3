"""How alike things are to a network and to people: cosines, stacking, and agreement whose uncertainty counts items, not pairs.

Pairs are two arrays of item numbers, first and second, int [P]. What M sources say is an array [P, M], NaN where one has nothing to compare.
Pairs share items, so that neither folds nor bootstrap draws nor permutations may treat them as independent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from scipy.optimize import nnls
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components
from scipy.stats import rankdata, spearmanr

from wellread.data import rename
from wellread.errors import BadInput
from wellread.features import embed
from wellread.inputs import TextInput
from wellread.network import Network

PENALTIES = (0.001, 0.01, 0.1, 1.0)
FEWEST_ITEMS, FEWEST_PAIRS = 10, 30  # with fewer nothing is said

# --- similarities


def spread(vectors: np.ndarray, space: str = "raw") -> np.ndarray:
    """Vectors [N, d] as they are ("raw"), less their mean ("centred"), or also divided by each dimension's standard deviation ("zscored").

    Rows of NaN belong to items without a vector and stay. A dimension that never changes becomes 0.
    """
    if space == "raw":
        return vectors
    centred = vectors - np.nanmean(vectors, 0)
    deviation = np.nanstd(vectors, 0)
    constant = deviation <= 1e-6 * max(float(deviation.max()), 1e-30)
    return centred if space == "centred" else centred * np.where(constant, 0, 1 / np.where(constant, 1, deviation))


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors [N, d] of length 1; a zero vector becomes NaN: it has no direction."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(length > 0, length, np.nan)


def cosine(vectors: np.ndarray) -> np.ndarray:
    """Cosines [N, N] of vectors [N, d]; NaN for a vector that is zero or NaN."""
    directions = unit(vectors)
    return directions @ directions.T


def concatenated(parts: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """One vector for each item [N, sum of d] from parts [N, d_m]: each of length 1, then scaled by the root of its weight.

    Its cosines are the weighted mean of the parts' cosines. Without the first step the part with the longest vectors would decide alone.
    """
    return np.concatenate([unit(part) * np.sqrt(weight) for part, weight in zip(parts, weights, strict=True)], axis=1)


def counted(bags: Sequence[Mapping[str, float]]) -> np.ndarray:
    """Cosines [N, N] of bags of tags by TF-IDF, as scikit-learn has it, without any pre-trained model; NaN for an item without tags."""
    from sklearn.feature_extraction.text import TfidfTransformer

    number = {tag: place for place, tag in enumerate(sorted({tag for bag in bags for tag in bag}))}
    row, column, weight = zip(*((i, number[tag], count) for i, bag in enumerate(bags) for tag, count in bag.items()), strict=True)
    vectors = TfidfTransformer().fit_transform(csr_array((weight, (row, column)), shape=(len(bags), len(number))))
    square = (vectors @ vectors.T).toarray()
    empty = [place for place, bag in enumerate(bags) if not bag]
    square[empty], square[:, empty] = np.nan, np.nan
    return square


def described(network: Network, bags: Sequence[Mapping[str, float]]) -> np.ndarray:
    """One vector for each item [N, d]: the weighted mean of the unit vectors of its texts; NaN for an item without any."""
    assert isinstance(network.input, TextInput)
    texts = sorted({text for bag in bags for text in bag}, key=lambda text: (len(text), text))  # of like length: little padding
    directions = unit(embed(network, rename(Dataset.from_dict({network.input.column: texts}), "descriptions")))
    number = {text: place for place, text in enumerate(texts)}
    vectors = np.full((len(bags), directions.shape[1]), np.nan, np.float32)
    for place, bag in enumerate(bags):
        if bag:
            vectors[place] = np.average(directions[[number[text] for text in bag]], axis=0, weights=list(bag.values()))
    return vectors


def filled(said: np.ndarray) -> np.ndarray:
    """What sources say [P, M], with each source's mean where it says nothing: neither alike nor unlike. A pair on which all are silent stays NaN."""
    silent = np.isnan(said)
    whole = np.where(silent, np.nansum(said, 0) / np.maximum((~silent).sum(0), 1), said)
    whole[silent.all(1)] = np.nan
    return whole


def stacked(said: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The weighted mean [P] of similarities [P, M]; weights [M], at least 0, are divided by their sum."""
    return said @ (weights / weights.sum())


# --- weights


def nonnegative_ridge(inputs: np.ndarray, target: np.ndarray, penalty: float) -> np.ndarray:
    """a [M], the minimum of |target - inputs a|^2 + penalty |a|^2 over a >= 0; inputs [P, M], target [P].

    Least squares with the rows sqrt(penalty) * identity below the inputs and zeros below the target.
    """
    many = inputs.shape[1]
    return nnls(np.vstack([inputs, np.sqrt(penalty) * np.eye(many)]), np.concatenate([target, np.zeros(many)]))[0]


def fit_weights(said: np.ndarray, ratings: np.ndarray, penalty: float) -> np.ndarray:
    """Weights [M] of sum 1 for similarities [P, M] to agree with ratings [P]: a non-negative ridge with a free intercept.

    The penalty is per pair and on standardised similarities, so that neither the scale of a source nor the number of pairs changes its meaning.
    Equal weights when no source has anything to do with the ratings.
    """
    found = nonnegative_ridge(standard(said), ratings - ratings.mean(), penalty * len(ratings)) / np.maximum(said.std(0), 1e-9)
    return found / found.sum() if found.sum() > 0 else np.full(said.shape[1], 1 / said.shape[1])


def by_item(first: np.ndarray, second: np.ndarray, folds: int = 5, seed: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(training pairs, test pairs), row numbers; no item of a test pair is in a training pair, and every pair [P] is tested once.

    The items are dealt into groups; the pairs between two groups (or within one) are tested by what pairs outside both say. Where the pairs fall into
    many islands (`resampling_units`), islands are dealt, and no pair lies between two groups.
    """
    dealt = resampling_units(first, second)
    used, place = np.unique(dealt[np.concatenate([first, second])], return_inverse=True)
    group = np.random.default_rng(seed).permutation(np.arange(len(used)) % folds)[place]
    low, high = np.sort([group[: len(first)], group[len(first) :]], axis=0)
    for a in range(folds):
        for b in range(a, folds):
            test = np.flatnonzero((low == a) & (high == b))
            if len(test):
                yield np.flatnonzero(~np.isin(low, (a, b)) & ~np.isin(high, (a, b))), test


def standard(values: np.ndarray) -> np.ndarray:
    """Values [P] or [P, M] with mean 0 and standard deviation 1 in each column; a column that does not change becomes 0."""
    deviation = values.std(0)
    return np.where(deviation > 1e-9, (values - values.mean(0)) / np.maximum(deviation, 1e-9), 0)


def choose_penalty(said: np.ndarray, ratings: np.ndarray, first: np.ndarray, second: np.ndarray, seed: int = 0) -> float:
    """That of PENALTIES whose stacked similarity agrees best on left-out items; similarities [P, M], ratings, first, second [P].

    0.1 with too few pairs to tell; the smallest when there are so many that a penalty changes nothing.
    """
    parts = [(train, test) for train, test in by_item(first, second, 5, seed) if len(train) >= 10]
    if len(ratings) > 20_000:
        return PENALTIES[0]
    if not parts or said.shape[1] == 1:
        return 0.1
    tested = np.concatenate([test for _, test in parts])
    found = []
    for penalty in PENALTIES:
        held = [standard(stacked(said, fit_weights(said[train], ratings[train], penalty)))[test] for train, test in parts]
        found.append(np.nan_to_num(correlation(np.concatenate(held), ratings[tested]), nan=-1.0))
    return PENALTIES[int(np.argmax(found))]


def held_out(
    said: np.ndarray, ratings: np.ndarray, first: np.ndarray, second: np.ndarray, folds: int = 5, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """For every pair the stacked similarity [P], and that of the one best source [P], both chosen on pairs of other items alone.

    said: [P, M] without NaN. What a fold chose is standardised over all pairs, which needs no ratings, so that folds can be pooled.
    """
    fitted, best = standard(said.mean(1)), standard(said.mean(1))
    for train, test in by_item(first, second, folds, seed):
        if len(train) >= 10 and np.ptp(ratings[train]) > 0:
            penalty = choose_penalty(said[train], ratings[train], first[train], second[train], seed)
            fitted[test] = standard(stacked(said, fit_weights(said[train], ratings[train], penalty)))[test]
            single = [correlation(column, ratings[train]) for column in said[train].T]
            best[test] = standard(said[:, int(np.argmax(np.nan_to_num(single, nan=-1.0)))])[test]
    return fitted, best


# --- people


@dataclass(frozen=True)
class Judged:
    """Ratings of pairs, each pair once whatever the order in which it was asked.

    first, second: int [P], item numbers, first < second; mean: float [P]. pair: int [R], score: float [R]: the single ratings, one a rater and pair.
    raters: how many were named. order: mean distance between the two orders of a pair, None when none was asked in both.
    itself: ratings of an item with itself, which are left out.
    """

    first: np.ndarray
    second: np.ndarray
    mean: np.ndarray
    pair: np.ndarray
    score: np.ndarray
    raters: int
    order: float | None
    itself: int

    @classmethod
    def read(cls, table: Dataset, ids: Sequence[str], scale: Sequence[float] | None = None) -> Judged:
        """From columns first, second (ids), score and perhaps rater. Raises `BadInput` for unknown items, scores out of scale or all alike."""
        number = {name: place for place, name in enumerate(ids)}
        names = [[str(name) for name in table[column]] for column in ("first", "second")]
        for row, unknown in ((row, name) for side in names for row, name in enumerate(side) if name not in number):
            raise BadInput(f"judgements name {unknown!r} in row {row}, and no item has this id: correct it or add the item")
        pairs, score = np.array([[number[name] for name in side] for side in names]).T, np.array(table["score"], float)
        low, high = scale if scale is not None else (-np.inf, np.inf)
        for wrong in np.flatnonzero((score < low) | (score > high)):
            raise BadInput(f"judgements has the score {score[wrong]:g} in row {wrong}, outside the scale {low:g} to {high:g}: correct one of them")
        other = pairs[:, 0] != pairs[:, 1]
        people = np.array([str(name) for name in table["rater"]])[other] if "rater" in table.column_names else np.arange(other.sum())
        score, swapped, itself = score[other], (pairs[:, 0] > pairs[:, 1])[other], int(np.sum(~other))
        if not len(score) or np.ptp(score) == 0:
            raise BadInput("judgements hold one and the same score for all pairs of different items: agreement cannot be measured with them")
        unique, pair = np.unique(np.sort(pairs[other], axis=1), axis=0, return_inverse=True)
        asked, each = _means(2 * pair.reshape(-1) + swapped, score)
        both = np.flatnonzero((asked[:-1] % 2 == 0) & (asked[1:] == asked[:-1] + 1))
        order = float(np.abs(each[both] - each[both + 1]).mean()) if len(both) else None
        who, rater = np.unique(people, return_inverse=True)
        own, score = _means(pair.reshape(-1) * len(who) + rater, score)  # a rater's answers about a pair, in both orders, are one rating
        pair = own // len(who)
        return cls(unique[:, 0], unique[:, 1], _means(pair, score)[1], pair, score, len(who) if "rater" in table.column_names else 0, order, itself)

    def notes(self) -> dict[str, float]:
        """How far ratings of one pair lie apart, and how far the two orders of a pair, where there are such."""
        count = np.bincount(self.pair)
        squares, several = np.bincount(self.pair, (self.score - self.mean[self.pair]) ** 2), count > 1
        found: dict[str, float] = {"pairs rated several times": int(several.sum())}
        found |= {"variance of the ratings of a pair": float((squares[several] / (count[several] - 1)).mean())} if several.any() else {}
        return found | ({"distance between the two orders of a pair": self.order} if self.order is not None else {})


def _means(key: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different keys in order, and the mean value of each."""
    unique, place = np.unique(key, return_inverse=True)
    return unique, np.bincount(place, values) / np.bincount(place)


# --- agreement


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's r of two arrays [P], over the places where neither is NaN; NaN when one of them does not change."""
    known = ~(np.isnan(a) | np.isnan(b))
    a, b = a[known].astype(float), b[known].astype(float)
    if len(a) < 3 or np.ptp(a) < 1e-12 or np.ptp(b) < 1e-12:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def within(a: np.ndarray, b: np.ndarray, group: np.ndarray) -> float:
    """Pearson's r of two arrays [P] after the mean of each group [P] was taken from both: whether they agree inside the groups."""
    known = ~(np.isnan(a) | np.isnan(b))
    a, b, number = a[known].astype(float), b[known].astype(float), np.unique(group[known], return_inverse=True)[1]
    size = np.maximum(np.bincount(number), 1)
    return correlation(*(each - (np.bincount(number, each) / size)[number] for each in (a, b)))


def resampling_units(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """What is drawn (or left out) together, a number for each item: the item alone; or its island, when the pairs fall into many separate islands.

    Drawing the two items of a lone pair apart would count its chance twice. Islands: none has more than a twentieth of the pairs [P].
    """
    items = int(max(first.max(), second.max())) + 1
    _, island = connected_components(coo_array((np.ones(len(first)), (first, second)), shape=(items, items)), directed=False)
    return island if np.bincount(island[first]).max() <= len(first) / 20 else np.arange(items)


def bootstrap(said: np.ndarray, ratings: np.ndarray, first: np.ndarray, second: np.ndarray, *, draws: int = 1000, seed: int = 0) -> np.ndarray:
    """Pearson's r of each source with the ratings in `draws` resamplings of the items, [draws, M]; similarities [P, M] may hold NaN, ratings [P].

    A pair counts as often as its two items were drawn: the product of their counts (of an island: its count).
    """
    unit_of = resampling_units(first, second)
    a, b = unit_of[first], unit_of[second]
    used, places = np.unique(np.concatenate([a, b]), return_inverse=True)
    a, b = places[: len(a)], places[len(a) :]
    known = ~np.isnan(said)
    x = np.where(known, (said - np.nanmean(said, 0)) / np.maximum(np.nanstd(said, 0), 1e-12), 0)
    y = ((ratings - ratings.mean()) / max(float(ratings.std()), 1e-12))[:, None] * known
    terms = np.concatenate([known, x, y, x * x, y * y, x * y], axis=1)
    random, found = np.random.default_rng(seed), []
    step = max(1, 5_000_000 // len(terms))
    for start in range(0, draws, step):
        count = random.multinomial(len(used), np.full(len(used), 1 / len(used)), size=min(step, draws - start)).astype(float)
        weight = np.where(a == b, count[:, a], count[:, a] * count[:, b])
        n, sx, sy, sxx, syy, sxy = np.split(weight @ terms, 6, axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            found.append((n * sxy - sx * sy) / np.sqrt((n * sxx - sx**2) * (n * syy - sy**2)))
    return np.concatenate(found)


def interval(draws: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of bootstrap draws [D] (percentiles)."""
    low, high = np.nanpercentile(draws, (2.5, 97.5)) if np.isfinite(draws).any() else (np.nan, np.nan)
    return float(low), float(high)


def mantel(similarity: np.ndarray, first: np.ndarray, second: np.ndarray, ratings: np.ndarray, *, permutations: int = 999, seed: int = 0) -> float:
    """How often a similarity [N, N] agrees with the ratings [P] as well or better when the names of the judged items are shuffled (one-sided p).

    Items without a similarity (NaN) are left out together with their pairs.
    """
    items = np.unique(np.concatenate([first, second]))
    items = items[~np.isnan(similarity[np.ix_(items, items)]).all(1)]
    place = np.full(len(similarity), -1)
    place[items] = np.arange(len(items))
    a, b = place[first], place[second]
    kept = (a >= 0) & (b >= 0)
    a, b, y, square = a[kept], b[kept], ratings[kept], similarity[np.ix_(items, items)]
    observed, random = correlation(square[a, b], y), np.random.default_rng(seed)
    if np.isnan(observed):
        return float("nan")
    as_good = 0
    for _ in range(permutations):
        order = random.permutation(len(items))
        as_good += correlation(square[order[a], order[b]], y) >= observed - 1e-12
    return (1 + as_good) / (1 + permutations)


def split_half(pair: np.ndarray, ratings: np.ndarray, *, draws: int = 100, seed: int = 0) -> float:
    """Reliability of the mean rating of a pair: the ratings of each pair are split in two at random, the halves correlated, and the
    correlation r of half as many ratings carried to all of them by Spearman and Brown's 2 r / (1 + r); the mean r of `draws` splits is taken.

    pair: int [R], which pair each rating [R] is of. NaN with fewer than 30 pairs that were rated twice. Its root bounds what anything can agree.
    """
    pair = np.unique(pair, return_inverse=True)[1]
    twice = (np.bincount(pair) >= 2)[pair]
    pair, ratings = np.unique(pair[twice], return_inverse=True)[1], ratings[twice]
    if not len(pair) or pair.max() + 1 < FEWEST_PAIRS:
        return float("nan")
    random, found = np.random.default_rng(seed), []
    starts = np.concatenate([[0], np.cumsum(np.bincount(pair))[:-1]])
    for _ in range(draws):
        order = np.lexsort((random.random(len(pair)), pair))
        odd = (np.arange(len(pair)) - starts[pair[order]] + random.integers(0, 2, len(starts))[pair[order]]) % 2 == 1
        halves = [np.bincount(pair[order][side], ratings[order][side]) / np.bincount(pair[order][side]) for side in (odd, ~odd)]
        found.append(correlation(*halves))
    r = max(float(np.mean(found)), 0.0)
    return 2 * r / (1 + r)


def ask_next(said: np.ndarray, judged: np.ndarray, count: int = 20) -> np.ndarray:
    """Row numbers [count] of the unjudged pairs on which the sources disagree most, by the variance of each pair's rank among all pairs.

    said: [P, M]; judged: bool [P]. Pairs on which fewer than two sources speak are left out.
    """
    if said.shape[1] < 2:
        return np.empty(0, int)
    ranks = rankdata(said, axis=0, nan_policy="omit") / np.maximum((~np.isnan(said)).sum(0), 1)
    open_ = np.flatnonzero(~judged & ((~np.isnan(said)).sum(1) >= 2))
    return open_[np.argsort(-np.nanvar(ranks[open_], axis=1), kind="stable")[:count]]


def agreement(
    said: np.ndarray, names: list[str], squares: list[np.ndarray], judged: Judged, classes: np.ndarray | None, *, ceiling: float, folds: int,
    draws: int, permutations: int, seed: int,
) -> tuple[list[dict[str, Any]], np.ndarray, np.ndarray]:  # fmt: skip
    """A row for each source and each way of stacking, bootstrap draws [draws, M + 3] of their correlations, and the weights [M] fitted on all pairs.

    said: what the M sources say about the judged pairs, [P, M], may hold NaN; squares: the same for all items, [N, N] each; classes: int [N].
    The last three rows are the best single source, equal and fitted weights; what the first and third need to learn, they learn on other items.
    """
    first, second, ratings = judged.first, judged.second, judged.mean
    known = ~np.isnan(said).all(1)
    first, second, ratings, said = first[known], second[known], ratings[known], said[known]
    whole = filled(said)
    fitted, best = held_out(whole, ratings, first, second, folds, seed)
    equal = stacked(whole, np.ones(len(names)))
    weights = fit_weights(whole, ratings, choose_penalty(whole, ratings, first, second, seed))
    columns = np.column_stack([said, best, equal, fitted])
    found = bootstrap(columns, ratings, first, second, draws=draws, seed=seed)
    rows = []
    for number, name in enumerate([*names, "best single source, chosen on other items", "stacked, equal weights", "stacked, weights of other items"]):
        column = columns[:, number]
        there = ~np.isnan(column)
        r, (low, high) = correlation(column, ratings), interval(found[:, number])
        row: dict[str, Any] = {"similarity by": name, "Pearson r": r, "low": low, "high": high}
        row["Spearman"] = float(spearmanr(column[there], ratings[there])[0]) if np.isfinite(r) else float("nan")
        row["r / noise ceiling"] = r / ceiling if ceiling > 0 else float("nan")
        row["Mantel p"] = (
            mantel(squares[number], first, second, ratings, permutations=permutations, seed=seed) if number < len(names) else float("nan")
        )
        if classes is not None:
            same = (classes[first] == classes[second]) & there
            row["r within classes"] = within(column[same], ratings[same], classes[first][same]) if same.sum() >= FEWEST_PAIRS else float("nan")
        rows.append(row | {"weight": float(weights[number]) if number < len(names) else float("nan"), "pairs": int(there.sum())})
    return rows, found, weights


def as_square(values: np.ndarray, first: Sequence[str], second: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Names, and similarities [N, N] with ones on the diagonal, from one value [P] for each pair of names; NaN for pairs that are not there.

    Of a saved result: `as_square(scores.values, scores.columns["first"], scores.columns["second"])`.
    """
    names = list(dict.fromkeys([*first, *second]))
    number = {name: place for place, name in enumerate(names)}
    square = np.full((len(names), len(names)), np.nan)
    a, b = np.array([number[name] for name in first], int), np.array([number[name] for name in second], int)
    if len(a) != len(values):
        raise BadInput(f"there are {len(values)} values for {len(a)} pairs: give one for each")
    square[a, b] = square[b, a] = values
    np.fill_diagonal(square, 1.0)
    return names, square
