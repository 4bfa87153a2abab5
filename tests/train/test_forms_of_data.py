"""Data of other tools in whole runs: what is trained, said, kept, and refused."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpkd.data.settings import DataSettings
from dpkd.errors import DpkdError
from dpkd.train import run
from dpkd.train.plan import dry_run
from dpkd.train.prepare import prepare
from dpkd.train.progress import Display

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
HI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
BYE = [{"role": "user", "content": "Bye"}, {"role": "assistant", "content": "Farewell."}]


@pytest.fixture
def written(tmp_path):
    def write(*rows, name="d.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


def said(action, resolved, **how) -> tuple[str, object]:
    buffer = io.StringIO()
    result = action(resolved, console=Console(file=buffer, width=200, **how))
    return buffer.getvalue(), result


def test_prompts_alone_are_enough_where_nobody_reads_the_response(settings_of, written):
    path = written({"prompt": "red "}, {"prompt": "blue "}, {"prompt": "old ", "completion": "cat"})
    on_policy = {"data.path": path, "text.source": "student", "terms.lm.weight": 0.0}
    _, folder = said(run.train, settings_of("rkl", on_policy))
    assert json.loads(folder.facts.read_text())["data"]["kept"] == 3
    said(dry_run, settings_of("kd", {**on_policy, "text.source": "teacher", "output": "elsewhere"}))
    for needed in ({"text.source": "dataset"}, {"terms.lm.weight": 0.5}):
        with pytest.raises(DpkdError, match=r"no response in|columns are not understood|only prompt given"):
            said(dry_run, settings_of("rkl", {**on_policy, **needed, "output": "elsewhere"}))


def test_a_chat_template_from_a_file_is_used_said_and_saved(settings_of, written, tmp_path):
    (tmp_path / "t.jinja").write_text(TEMPLATE, encoding="utf-8")
    path = written({"messages": [*HI, *BYE]}, {"messages": HI})
    changes = {"data.path": path, "data.chat_template": str(tmp_path / "t.jinja")}
    text, folder = said(run.train, settings_of("sft", changes))
    line = "prompts are written with the tokenizer's chat template (data.template: chat, chosen by auto)"
    assert line in text
    assert "2 rows are 3 examples: every assistant turn of a conversation is trained on" in text
    facts = json.loads(folder.facts.read_text())["data"]
    assert (facts["templates"], facts["examples"]) == (line, 3)
    assert AutoTokenizer.from_pretrained(folder.model).chat_template == TEMPLATE
    AutoModelForCausalLM.from_pretrained(folder.model)


def test_the_plan_shows_what_is_trained_in_another_color(settings_of, written):
    path = written({"prompt": "red ", "completion": "cat ⟦x⟧"})
    text, plan = said(dry_run, settings_of("sft", {"data.path": path}), force_terminal=True, color_system="standard")
    assert plan.example.startswith("red ⟦cat ⟦x⟧<eos>⟧")
    assert "red \x1b[1;32m⟦cat ⟦x⟧<eos>⟧\x1b[0m" in text


def test_the_plan_shows_both_responses_of_a_pair_and_no_more_than_a_screen(settings_of, written):
    path = written({"prompt": "red ", "chosen": "cat" * 500, "rejected": "dog"})
    changes = {"data.path": path, "text.source": "preference", "data.max_tokens": 2000}
    _, plan = said(dry_run, settings_of("dpkd-simpo", changes))
    shown = f"red ⟦{'cat' * 200} [... 305 characters ...] {('cat' * 500 + '<eos>')[-600:]}⟧"
    assert plan.example == f"{shown}\n(trained: what stands in ⟦ ⟧, 1501 tokens)\n(rejected: ⟦dog<eos>⟧, 4 tokens)"


def test_rejected_responses_that_nothing_reads_are_refused(settings_of, written):
    path = written({"prompt": "red ", "chosen": "cat", "rejected": "dog"})
    changes = {"data.path": path, "data.columns.output": "chosen"}
    with pytest.raises(DpkdError, match="this loss ignores the rejected one"):
        said(dry_run, settings_of("sft", changes))
    prepared = prepare(settings_of("sft", {**changes, "data.drop_rejected": True}), Display(Console(quiet=True)))
    assert prepared.data.prompts[0].references == ("cat",)


def test_a_mixture_trains(settings_of, written):
    one = written(*({"prompt": f"a{i} ", "completion": "x"} for i in range(9)), name="one.jsonl")
    two = written(*({"instruction": f"b{i}", "output": "y"} for i in range(3)), name="two.jsonl")
    parts = [{"path": one, "weight": 0.75}, {"path": two, "weight": 0.25, "template": "alpaca"}]
    changes = {"data": {"path": "databricks/databricks-dolly-15k", "mix": parts}}
    text, folder = said(run.train, settings_of("kd", changes))
    facts = json.loads(folder.facts.read_text())["data"]
    assert facts["path"].startswith(f"{one} (")
    assert "in the Alpaca form (" in text
    with pytest.raises(ValueError, match=r"`mix` names the data sets, so leave `path`"):
        DataSettings(path=one, mix=parts)
