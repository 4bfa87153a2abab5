"""`preset`: another loss with other defaults, as a spec of its own; a stranger's works like a built-in one."""

from __future__ import annotations

import pytest
from dpkd_zoo import jsd

from dpkd.api import Card, LossSpec, Source, Text, preset
from dpkd.hookspecs import kind_of
from dpkd.testing import check_loss

CARD = Card(
    title="Nearly forward",
    summary="JSD with little of the teacher in the mixture.",
    formula="β·KL(p‖m) + (1-β)·KL(q‖m)",
    sources=(Source("A paper", "https://example.org", "§1"),),
    use_when="testing",
    avoid_when="not testing",
)


def _made() -> LossSpec:
    return preset(
        jsd.SPEC,
        name="nearly-forward",
        card=CARD,
        defaults={"beta": (0.1, "Table 2")},
        accepts=frozenset({Text.DATASET}),
        suggests={"text": {"source": "dataset"}},
    )


def test_only_what_is_named_differs() -> None:
    spec = _made()
    kind_of(LossSpec).check(spec)
    assert (spec.name, spec.preset_of, spec.card) == ("nearly-forward", "jsd", CARD)
    assert (spec.loss, spec.reads, spec.traits) == (jsd.SPEC.loss, jsd.SPEC.reads, jsd.SPEC.traits)
    assert spec.accepts == {Text.DATASET}
    assert spec.config().model_dump() == {**jsd.SPEC.config().model_dump(), "beta": 0.1}


def test_the_setting_keeps_bounds_and_description_and_gets_a_source() -> None:
    mine, base = (spec.config.model_json_schema()["properties"]["beta"] for spec in (_made(), jsd.SPEC))
    assert mine == {**base, "default": 0.1, "source": "Table 2"}
    assert base["default"] == 0.5
    with pytest.raises(ValueError, match="less than or equal to 1"):
        _made().config(beta=2)


def test_it_keeps_the_contract() -> None:
    assert check_loss(_made()).ok


@pytest.mark.parametrize(
    ("defaults", "message"),
    [({"bets": (0.1, "x")}, "'nearly-forward': JSDConfig has no setting named bets"), ({"beta": (2, "x")}, "beta")],
)
def test_wrong_defaults_are_refused_when_the_preset_is_made(
    defaults: dict[str, tuple[float, str]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        preset(jsd.SPEC, name="nearly-forward", card=CARD, defaults=defaults)
