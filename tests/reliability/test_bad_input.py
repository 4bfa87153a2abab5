"""A sample of the generated bad input; `make soak` runs ten thousand cases of it."""

from __future__ import annotations

import bad_input
import pytest

QUICK = {name: 3 if name in ("models", "plugins", "data", "folders") else 20 for name in bad_input.FAMILIES}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> bad_input.World:
    return bad_input.World.make(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("family", sorted(bad_input.FAMILIES))
def test_bad_input_is_a_sentence_and_the_right_exit_code(family: str, world: bad_input.World) -> None:
    rows = [{"number": number, **bad_input.run(family, number, world)} for number in range(QUICK[family])]
    assert [row for row in rows if row["outcome"] in bad_input.BAD] == []
    assert any(row["outcome"] == "refused" for row in rows)


def test_the_harness_sees_what_must_not_be() -> None:
    case = bad_input.Case([], (0, 2))
    seen = [bad_input._outcome(case, 1, text) for text in ("no", "", "unexpected error, X", "unexpected error, Hang")]
    assert seen == ["wrong code", "wrong code", "unforeseen", "hang"]
    assert bad_input._outcome(case, 1, "Traceback (most recent call last)") == "traceback"
    assert bad_input._outcome(case, 2, "a sentence") == "refused"
