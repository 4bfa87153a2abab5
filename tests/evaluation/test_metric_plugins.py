"""Metrics of strangers: found beside losses or in their own group, checked, and never in the way of others."""

from __future__ import annotations

import re

import numpy as np
import pytest

from dpkd.api import Answers, MetricSpec, TokenScores
from dpkd.errors import DpkdError
from dpkd.evaluation.evaluator import metric_specs
from dpkd.evaluation.results import score, score_tokens
from dpkd.plugins import load_registry

METRIC = """
from dpkd.api import MetricSpec, hookimpl

@hookimpl
def dpkd_metrics():
    return [MetricSpec("letters", "letters", "", "Letters.", per_row=lambda a: [len(p) for p in a.predictions])]
"""
OF_ANSWERS = {"rouge_l", "exact_match", "words", "tokens", "eos_rate", "repetition", "distinct_1", "distinct_2"}
OF_TOKENS = {
    *("nll", "perplexity", "bits_per_byte", "teacher_nll", "forward_kl", "reverse_kl", "reward_sum", "reward_mean"),
    *("first_token_forward_kl", "first_token_reverse_kl"),
}
BUILT_IN = OF_ANSWERS | OF_TOKENS
STRANGER = {"DPKD_PLUGINS": "stranger"}


def test_the_built_in_metrics_need_no_permission():
    for environment in ({}, {"DPKD_PLUGINS": "nobody"}):
        registry = load_registry(environment)
        assert set(registry.all(MetricSpec)) == BUILT_IN
        assert registry.broken == []


def test_a_stranger_brings_a_metric_alone_or_beside_a_loss(install_plugin, loss_source):
    install_plugin("stranger", {"alone": METRIC, "both": loss_source("curved") + METRIC.replace("letters", "signs")})
    registry = load_registry(STRANGER)
    specs = metric_specs(registry)
    assert set(specs) - BUILT_IN == {"letters", "signs"}
    assert list(registry.losses) == ["curved"]
    assert registry.broken == []
    assert set(metric_specs(load_registry({"DPKD_PLUGINS": "nobody"}))) == BUILT_IN
    answers = Answers(["abc", "d"], [["x"], ["y"]], [1, 1], [False, False])
    assert score({1: answers}, specs)[0]["letters"].mean == 2


def test_a_stranger_brings_a_divergence_in_one_file(install_plugin):
    """Half of both KLs at each token, by hand."""
    source = METRIC.replace("per_row=lambda a: [len(p) for p in a.predictions]", "of_tokens=half, title='half KL'")
    half = (
        "def half(s):\n    return None if s.logp_N is None else float((s.forward_kl_N + s.reverse_kl_N).mean() / 2)\n"
    )
    install_plugin("stranger", {"x": half + source})
    specs = metric_specs(load_registry(STRANGER))
    zeros = np.zeros(2)
    found = TokenScores(zeros, np.array([0, 1]), zeros, np.array([1.0, 3.0]), np.array([2.0, 4.0]))
    metric = score_tokens(found, specs)["letters"]
    assert (metric.mean, metric.title) == (2.5, "half KL")
    assert "letters" not in score_tokens(TokenScores(zeros, np.array([0, 1])), specs)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("[MetricSpec(", "['x' or MetricSpec("), "must return MetricSpecs, but the list holds str"),
        (('"letters", ""', '"letters", "high"'), "`better` of 'letters' should be higher, lower or empty, not 'high'"),
        (('"letters", "letters"', '"Let-ters", "x"'), "the name 'Let-ters' should be lower-case letters"),
        (
            (", per_row=lambda a: [len(p) for p in a.predictions]", ""),
            "needs exactly one of `per_row`, `overall` and `of_tokens`",
        ),
        (("return [", "return 3 and 4 or ["), "must return a list of MetricSpec, but returned int"),
        (("    return", "    raise OSError('no disk')\n    return"), "OSError: no disk"),
    ],
    ids=["not-a-spec", "direction", "name", "nothing-to-compute", "not-a-list", "raises"],
)
def test_a_broken_one_is_listed_with_its_reason(install_plugin, change, reason):
    install_plugin("stranger", {"x": METRIC.replace(*change)})
    registry = load_registry(STRANGER)
    assert set(registry.all(MetricSpec)) == BUILT_IN
    (broken,) = registry.broken
    assert reason in broken.reason
    assert broken.distribution == "stranger"


def test_a_name_that_is_taken_is_an_error_that_names_both(install_plugin):
    install_plugin("stranger", {"x": METRIC.replace('"letters", "letters"', '"rouge_l", "x"')})
    with pytest.raises(DpkdError, match=re.escape("two metrics are called 'rouge_l': dpkd 0.")):
        metric_specs(load_registry(STRANGER))


def test_a_broken_loss_is_not_told_twice(install_plugin):
    install_plugin("stranger", {"x": "1 / 0"})
    registry = load_registry(STRANGER)
    assert not registry.losses
    assert set(registry.all(MetricSpec)) == BUILT_IN
    assert [b.entry_point for b in registry.broken] == ["x"]


def test_the_title_is_the_name_in_words_unless_it_says_otherwise():
    assert MetricSpec("exact_match", "× 100", "higher", "").title == "exact match"
    assert MetricSpec("exact_match", "× 100", "higher", "", title="EM").title == "EM"
