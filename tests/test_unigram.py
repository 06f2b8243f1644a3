"""The unigram model by closed forms, its limits, and what it reads."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from scipy.stats import chisquare

from wellread.errors import BadInput
from wellread.unigram import dirichlet, forms_of, kept, unigram

TEXTS = ["wing flow wing", "flow heat", "heat heat shock flow flow"]
TF = [{"wing": 2, "flow": 1}, {"flow": 1, "heat": 1}, {"heat": 2, "shock": 1, "flow": 2}]
DF = {"wing": 1, "flow": 3, "heat": 2, "shock": 1}
CF = {"wing": 2, "flow": 4, "heat": 3, "shock": 1}


def test_a_query_likelihood_by_hand() -> None:
    for background, of in (("documents", DF), ("collection", CF)):
        model = unigram(TEXTS, language=None, background=background, least=1)
        assert model.stems == ["flow", "heat", "shock", "wing"] and model.mu == pytest.approx(10 / 3)
        for number, tf in enumerate(TF):
            query = ["flow", "wing", "flow"]
            size, mu = sum(tf.values()), 10 / 3
            by_hand = sum(math.log((tf.get(word, 0) + mu * of[word] / sum(of.values())) / (size + mu)) for word in query)
            assert model.likelihood(np.array([model.stems.index(word) for word in query]), number) == pytest.approx(by_hand, rel=1e-12)
    order = sorted(range(3), key=lambda number: -model.likelihood(np.array([3, 0]), number))
    assert order[0] == 0, "the document with both words is the first"


def test_probabilities_sum_to_one_and_have_their_limits() -> None:
    model = unigram(TEXTS, language=None, least=1)
    for number in range(3):
        stems, times = model.document(number)
        full = np.zeros(4)
        full[stems] = times
        assert dirichlet(full, times.sum(), model.background, model.mu).sum() == pytest.approx(1, abs=1e-12)
        assert np.array_equal(dirichlet(full, times.sum(), model.background, 0.0), full / times.sum())
        np.testing.assert_allclose(dirichlet(full, times.sum(), model.background, 1e12), model.background, atol=1e-9)


def test_rare_words_are_left_out_everywhere() -> None:
    model = unigram(TEXTS, language=None, least=2)
    assert model.stems == ["flow", "heat", "wing"] and model.lengths.tolist() == [3, 2, 4] and model.background.sum() == pytest.approx(1)
    np.testing.assert_allclose(model.frequency, [4 / 9, 3 / 9, 2 / 9])


def test_stems_keep_their_forms_and_stop_words_go() -> None:
    model = unigram(["The flows of a flow, flowing; 1958 wings", "Wing and the flow: 4x4 flow flow"], least=1)
    assert model.stems == ["flow", "wing"] and model.counts.toarray().tolist() == [[3, 1], [3, 1]]
    assert model.forms[model.first[0] : model.first[1]] == ["flow", "flowing", "flows"] and model.forms[model.first[1] :] == ["wing", "wings"]
    other = model.counted(["flowing wings of an unknown flow", "nothing"])
    assert other.toarray().tolist() == [[2, 1], [0, 0]]
    drawn = Counter(model.spoken(np.zeros(20_000, int), np.random.default_rng(0)).tolist())
    odds = np.log([5, 2, 2])  # flow 4 times, the others once: log(count + 1)
    assert chisquare([drawn[form] for form in range(3)], 20_000 * odds / odds.sum()).pvalue > 0.01
    assert set(model.spoken(np.ones(500, int), np.random.default_rng(0)).tolist()) == {3, 4}
    assert forms_of("Don't say 3D, say Überschall_wing!") == ["don", "t", "say", "say", "überschall", "wing"]


def test_frequent_words_are_kept_less_often() -> None:
    np.testing.assert_allclose(kept(np.array([1e-2, 1e-4, 1e-6]), 1e-4), [0.1 + 0.01, 1, 1])
    assert (kept(np.array([0.5, 0.1]), float("inf")) == 1).all()


def test_bad_input() -> None:
    for texts, language, complaint in (
        (["1 2 3", ""], None, "no words of letters"),
        (["the of and", "the"], "en", "no word 2 times"),
        (["wing", "flow"], "en", "no word 2 times"),
        (TEXTS, "xx", "not known"),
    ):
        with pytest.raises(BadInput, match=complaint):
            unigram(texts, language=language)
