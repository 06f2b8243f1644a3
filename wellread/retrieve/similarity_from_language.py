"""Human similarity from networks, captions and tags, and all of them stacked (Marjieh et al. 2023, arXiv 2206.04105).

Judgements of all pairs of N things cost N(N-1)/2 questions, describing each in words costs N, and the vectors of a network cost nothing. This says
how far each of these agrees with the judgements there are, and what their weighted sum gives.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from datasets import Dataset

from wellread import similarity as agree
from wellread.data import Needs, labels
from wellread.errors import BadInput
from wellread.features import embed
from wellread.inputs import TextInput
from wellread.method import method
from wellread.network import Network, Networks
from wellread.results import Scores
from wellread.retrieve.spans import scripts
from wellread.similarity import FEWEST_ITEMS, FEWEST_PAIRS, Judged, agreement

Items = Annotated[Dataset, Needs("items: an id column, if there is one, and at least one of image, text, captions, tags", ())]
Judgements = Annotated[Dataset, Needs("judgements: columns first and second (ids of items), score, perhaps rater", ("first", "second", "score"))]
MOST_ITEMS = 5000  # all pairs are held in memory


# --- words


def tags_of(value: Any) -> dict[str, float]:
    """Tags of one item with their weights, from a list or from "a; b; c". A tag may carry a weight, "a:3" (raters or stars); repeated ones add up."""
    found: dict[str, float] = {}
    for part in _parts(value, r"[;\n]"):
        weighted = re.fullmatch(r"(.*\S)\s*:\s*(\d+(?:\.\d+)?)", part, re.DOTALL)
        tag, weight = (weighted[1], float(weighted[2])) if weighted else (part, 1.0)
        if weight > 0:
            found[tag.casefold()] = found.get(tag.casefold(), 0.0) + weight
    return found


def captions_of(value: Any) -> dict[str, float]:
    """Captions of one item, each of weight 1, from a list, or from one text with a | or a line break between them."""
    return {caption: float(times) for caption, times in Counter(_parts(value, r"[|\n]")).items()}


def _parts(value: Any, between: str) -> list[str]:
    parts = value if isinstance(value, list) else re.split(between, str(value if value is not None else ""))
    return [str(part).strip() for part in parts if str(part).strip()]


READERS = {"text": lambda value: dict.fromkeys(_parts([value or ""], ""), 1.0), "captions": captions_of, "tags": tags_of}


# --- collecting tags


@dataclass(frozen=True)
class Tag:
    """A tag in a chain of raters: who came later rated it from 1 to 5 or flagged it."""

    ratings: tuple[int, ...] = ()
    flags: int = 0


def step_tag(chain: Mapping[str, Tag], ratings: Mapping[str, int], flagged: Collection[str] = (), added: Collection[str] = ()) -> dict[str, Tag]:
    """The chain of an item's tags after one more rater, who rates the tags so far, flags those that are out of place and adds new ones.

    Show a rater `shown_tags(chain)`; start with {}; about ten raters make a chain. Nothing is forgotten: flagged tags stay, with their ratings.
    """
    if unknown := next((tag for tag in [*ratings, *flagged] if tag not in chain), None):
        raise BadInput(f"the tag {unknown!r} is rated or flagged and not in the chain: add it first")
    if wrong := next((rating for rating in ratings.values() if rating not in (1, 2, 3, 4, 5)), None):
        raise BadInput(f"a tag is rated {wrong!r}: give 1, 2, 3, 4 or 5")
    after = {tag: Tag((*old.ratings, *([ratings[tag]] if tag in ratings else [])), old.flags + (tag in flagged)) for tag, old in chain.items()}
    return {tag: Tag() for tag in added} | after


def shown_tags(chain: Mapping[str, Tag]) -> dict[str, float]:
    """The tags that fewer than two raters flagged, with their mean rating as weight; 3, the middle, for one that nobody rated yet."""
    return {tag: float(np.mean(found.ratings or (3,))) for tag, found in chain.items() if found.flags < 2}


# --- what is brought


def sources(items: Dataset, several: Networks, space: str) -> tuple[dict[str, np.ndarray], list[str]]:
    """Similarities [N, N] by the name of their source, NaN where an item has nothing to compare, and cautions, one sentence each.

    A network that reads pictures gives one source; one that reads text one for each of the columns text, captions, tags; tags give one alone.
    """
    columns = set(items.column_names)
    words = {column: [reader(value) for value in items[column]] for column, reader in READERS.items() if column in columns}
    if empty := next((column for column, bags in words.items() if not any(bags)), None):
        raise BadInput(f"the column {empty!r} of items is empty in every row: fill it or leave it out")
    plans = [_reads(several, number, words, columns) for number in range(len(several))]
    if not plans and "tags" not in words:
        raise BadInput("there is nothing to compare the items by: give a network, or items with a column 'tags'")
    found: dict[str, np.ndarray] = {}
    missing = {column: bags.count({}) for column, bags in words.items()}
    cautions = [f"{count} items have no {column}: there they are like nothing and unlike nothing" for column, count in missing.items() if count]
    names = [Path(several.name(number)).name for number in range(len(several))]
    for number, reads in enumerate(plans):
        network = several[number]
        network.check_finite()
        name = f"network {number + 1} ({names[number]})" if names.count(names[number]) > 1 else names[number]
        if not reads:
            found[f"{name}: image"] = agree.cosine(agree.spread(embed(network, items), space))
        for column in reads:
            found[f"{name}: {column}"] = agree.cosine(agree.spread(agree.described(network, words[column]), space))
            cautions += _foreign(network, name, column, words[column])
    if "tags" in words:
        found["tags, counted"] = agree.counted(words["tags"])
    return found, cautions


def _reads(several: Networks, number: int, words: Mapping[str, Any], columns: Collection[str]) -> list[str]:
    """The columns of words that a network reads; none for one that reads pictures. Raises `BadInput` when the items have nothing for it."""
    record, name = several.record(number), several.name(number)
    if record["input"] is None:
        raise BadInput(f"{name} does not say how it is fed: make it with Network(module, input=ImageInput(...)) or TextInput(...)")
    if record["output"] in ("score", "anomaly_score"):
        raise BadInput(f"{name} gives {record['output'].replace('_', ' ')}s and no vector for each item: give an encoder or a classifier")
    if record["input"]["kind"] == "image":
        if "image" not in columns:
            raise BadInput(f"{name} reads pictures and items has no column 'image' (it has {', '.join(columns)}): add it, or leave this network out")
        return []
    if not words:
        raise BadInput(f"{name} reads text and items has none of the columns text, captions, tags: describe the items, or leave this network out")
    return list(words)


def _foreign(network: Network, name: str, column: str, bags: list[dict[str, float]]) -> list[str]:
    texts, source = sorted({text for bag in bags for text in bag})[:2000], network.input
    assert isinstance(source, TextInput)
    ids = source.tokenizer(texts, add_special_tokens=False, truncation=True, max_length=source.max_length)["input_ids"]
    unknown, kinds = sum(each.count(source.tokenizer.unk_token_id) for each in ids) / max(sum(map(len, ids)), 1), scripts(texts)
    many = ", ".join(sorted(kind.title() for kind, count in kinds.items() if count >= 0.1 * sum(kinds.values())))
    found = [f"{name} does not know {unknown:.0%} of the words of {column}: take an encoder made for this language"] if unknown > 0.2 else []
    mixed = [f"the {column} mix the scripts {many}: words of different languages are only alike to a multilingual encoder"] if "," in many else []
    return found + mixed


# --- what comes out


def costs(items: int, raters: int, iterations: int) -> list[dict[str, Any]]:
    """How many answers of people each way of asking needs for `items` items."""
    ways = (
        ("rate every pair", items * (items - 1) // 2 * raters, f"{items} x {items - 1} / 2 pairs x {raters} raters"),
        ("collect tags in chains", items * iterations, f"{items} items x {iterations} raters in a chain"),
        ("write captions", items * raters, f"{items} items x {raters} captions"),
        ("rate 100 pairs, to know how well any of this agrees", min(100, items * (items - 1) // 2) * raters, f"100 pairs x {raters} raters"),
        ("the vectors of a network", 0, "nobody is asked"),
    )
    return [{"way": way, "answers": answers, "how": how} for way, answers, how in ways]


def advice(rows: list[dict[str, Any]], gain: tuple[float, float, float] | None, names: list[str], items: int) -> str:
    """What to do, in one sentence, from the rows of `agreement` (none when it was not measured) and the gain of stacking with its interval."""
    words = [name for name in names if not name.endswith(": image")]
    if not rows and items < 30:
        return f"with {items} items, ask people about every pair: {items * (items - 1) // 2} pairs are few"
    if not rows and not words:
        return "collect a few captions or tags of each item and stack them with the network, and have 100 pairs judged to know how far that carries"
    if not rows:
        return f"use {'the sources stacked with equal weights' if len(names) > 1 else names[0]}, and have 100 pairs judged to know how far that agrees with people"
    best = max((row for row in rows if row["similarity by"] in names), key=lambda row: np.nan_to_num(row["Pearson r"], nan=-2.0))
    if np.isnan(best["Pearson r"]) or best["low"] <= 0:
        return "none of these agrees with people beyond chance: describe the items in words, or ask people about the pairs"
    if gain is not None and gain[1] > 0:
        return f"use the stacked similarity: it agrees with people by {gain[0]:.2f} more in r than the best single source ({gain[1]:.2f} to {gain[2]:.2f})"
    more = "" if gain is None else f"; stacking is not measurably better ({gain[1]:+.2f} to {gain[2]:+.2f} in r)"
    advised = "" if words else "; captions or tags may come closer, and cost one answer an item instead of one a pair"
    return f"use {best['similarity by']} (r = {best['Pearson r']:.2f}){more}{advised}"


@method
def similarity_from_language(
    items: Items,
    networks: list[Network] | None = None,
    judgements: Judgements | None = None,
    *,
    space: Literal["raw", "centred", "zscored"] = "raw",
    stack: Literal["fitted", "equal"] = "fitted",
    scale: list[float] | None = None,
    folds: int = 5,
    draws: int = 1000,
    permutations: int = 999,
    pairs: int = 500_000,
    ask: int = 20,
    raters: int = 5,
    iterations: int = 10,
    seed: int = 0,
) -> Scores:
    """How alike your things are, by what networks see and by what people wrote about them, and how far each of these agrees with people's judgements.

    items: a row for each thing: id (the row number when there is none), and image, text, captions ("a cat | a sleeping cat", or a list) or tags
        ("cat:4; grey", or a list; a number is how many raters gave it), whichever there are. With a column label, agreement inside the classes is given too.
    networks: of pictures or of text, in any mixture; each reads what is meant for it, by the vector that goes into its head. Tags need none.
    judgements: first, second (ids) and score, higher is more alike; with a column rater the noise ceiling is measured. Without judgements
        the similarities are still given, and nothing is said about agreement.
    space: cosines of the vectors as they are, less their mean, or with each dimension standardised.
    stack: weights of the sources in the result: fitted on the judgements (non-negative ridge), or equal, as they are when nothing was judged.
    scale: lowest and highest score that can be given; others are refused.
    folds: groups of items; what is fitted is judged on pairs of items that it was not fitted on.
    draws: resamplings of the items for the 95 % intervals.
    permutations: shufflings of the items for the Mantel test.
    pairs: so many pairs are in the result: the judged ones, then the most alike.
    ask: so many unjudged pairs are named, on which the sources disagree most: those to ask people about next.
    raters: people who answer each question, in the table of costs.
    iterations: raters in the chain that tags one item, in the table of costs.
    seed: of folds, draws and permutations.

    Raises BadInput for items with nothing to compare them by, a network with nothing to read, ids that occur twice or are unknown, scores outside the scale,
    more than 5,000 items. With fewer than 10 items or 30 judged pairs agreement is not measured.
    Source: Marjieh et al. 2023, arXiv 2206.04105.
    """
    for right, sentence in (
        (2 <= len(items) <= MOST_ITEMS, f"items has {len(items)} rows: give from 2 to {MOST_ITEMS}, every pair is compared"),
        (scale is None or (len(scale) == 2 and scale[0] < scale[1]), f"scale is {scale}: give the lowest and the highest score"),
        (folds >= 3, f"folds is {folds}: give at least 3, pairs between two groups are judged by the others"),
        (draws >= 100 and permutations >= 99, f"draws is {draws} and permutations {permutations}: give at least 100 and 99"),
        (pairs >= 1 and ask >= 0 and raters >= 1 and iterations >= 1, "pairs, raters and iterations must be at least 1, and ask 0 or more"),
    ):
        if not right:
            raise BadInput(sentence)
    ids = [str(name) for name in items["id"]] if "id" in items.column_names else [str(row) for row in range(len(items))]
    if len(set(ids)) < len(ids):
        raise BadInput(f"two items have the id {Counter(ids).most_common(1)[0][0]!r}: give each its own")
    judged = Judged.read(judgements, ids, scale) if judgements is not None else None
    found, cautions = sources(items, networks if isinstance(networks, Networks) else Networks(networks or []), space)
    names, squares = list(found), [square.astype(np.float32) for square in found.values()]
    first, second = np.triu_indices(len(items), 1)
    said = np.column_stack([square[first, second] for square in squares])
    if np.isnan(said).all():
        raise BadInput("no two items can be compared: each has an empty description")
    place = np.empty((0,), int) if judged is None else judged.first * len(items) - judged.first * (judged.first + 3) // 2 + judged.second - 1
    figures: dict[str, Any] = {"items": len(items), "sources": len(names)}
    rows: list[dict[str, Any]] = []
    gain, weights = None, np.ones(len(names))
    if judged is None:
        cautions.append("no human judgements: agreement not measured")
    else:
        figures |= {"judged pairs": len(judged.mean), "raters": judged.raters or "not named"} | judged.notes()
        cautions += [f"{judged.itself} judgements of an item with itself are left out"] if judged.itself else []
        used = place[~np.isnan(said[place]).all(1)]
        judged_items = len({*first[used], *second[used]})
        if judged_items < FEWEST_ITEMS or len(used) < FEWEST_PAIRS:
            cautions.append(
                f"too few to say: {len(used)} judged pairs of {judged_items} items; agreement is measured from {FEWEST_PAIRS} pairs of {FEWEST_ITEMS} items on"
            )
        else:
            ceiling = float(np.sqrt(agree.split_half(judged.pair, judged.score, seed=seed))) if judged.raters > 1 else float("nan")
            figures |= {"noise ceiling (r)": ceiling}
            cautions += ["the raters do not agree with each other: nothing can agree with them"] if ceiling == 0 else []
            if np.isnan(ceiling):
                cautions.append(f"the noise ceiling was not measured: it needs a column rater and {FEWEST_PAIRS} pairs that several people rated")
            classes = labels(items, "items") if "label" in items.column_names else None
            rows, drawn, fitted = agreement(
                said[place], names, squares, judged, classes, ceiling=ceiling, folds=folds, draws=draws, permutations=permutations, seed=seed
            )
            if len(names) > 1:
                better = -1 if stack == "fitted" else -2
                gain = (rows[better]["Pearson r"] - rows[-3]["Pearson r"], *agree.interval(drawn[:, better] - drawn[:, -3]))
                figures |= {"gain of stacking (r)": gain[0], "gain, low": gain[1], "gain, high": gain[2]}
            else:
                rows = rows[:1]
            weights = fitted if stack == "fitted" else weights
    total = agree.stacked(agree.filled(said), weights)
    human = np.full(len(total), np.nan)
    human[place] = judged.mean if judged is not None else []
    order = np.lexsort((-total, np.isnan(human)))
    kept = np.sort(order[~np.isnan(total[order])][:pairs])
    figures["recommendation"] = advice(rows, gain, names, len(items))

    def listed(which: np.ndarray) -> dict[str, list[Any]]:
        columns = {"first": [ids[each] for each in first[which]], "second": [ids[each] for each in second[which]]}
        return columns | {name: said[which, number].tolist() for number, name in enumerate(names)}

    columns, asked = listed(kept), listed(agree.ask_next(said, ~np.isnan(human), ask))
    tables = {
        "agreement with people": rows,
        "what asking people costs": costs(len(items), raters, iterations),
        "pairs to ask people about next": [dict(zip(asked, row, strict=True)) for row in zip(*asked.values(), strict=True)],
    }
    return Scores(
        total[kept],
        "similarity",
        f"The higher, the more alike the two things are: {len(names)} sources in one" + (", weighted as the judgements say." if rows and stack == "fitted" else "."),
        columns=columns | ({"people": human[kept].tolist()} if judged is not None else {}),
        figures=figures,
        tables={name: table for name, table in tables.items() if table},
        warnings=cautions,
    )
