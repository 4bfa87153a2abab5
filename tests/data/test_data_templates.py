"""How prompts are written: the papers' wording, chat templates, and what a template cannot write."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dpkd.data.conversations import Message
from dpkd.data.formats import Example, RowFormat, to_examples
from dpkd.data.rows import RawRow
from dpkd.data.templates import chat_lead, render, template_fingerprint, with_chat_template
from dpkd.errors import DpkdError

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
INST = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }} <eos>"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported') }}{% endif %}{% endfor %}"
)
DATED = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% "
    "endif %}{{ date_string }}|"
    "{% for m in messages %}{{ m.content }}{% endfor %}"
)
PLAIN = Example("f:1", instruction="Add {1} and {input}.", references=("3",))
WITH_INPUT = Example("f:2", instruction="Sum up {x}.", input="{y}\nz", references=("3",))
READY = Example("f:3", prompt="1 + 1 =", references=(" 2",))
TURNS = Example("f:4", messages=(Message("system", "Be kind."), Message("user", "Hi")), references=("Hello",))
ONE_TURN = Example("f:5", messages=(Message("user", "Hi"),), references=("Hello",))

ALPACA_PLAIN = """Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
Add {1} and {input}.

### Response:
"""  # noqa: E501
ALPACA_WITH_INPUT = """Below is an instruction that describes a task, paired with an input that provides further context. Write a response that appropriately completes the request.

### Instruction:
Sum up {x}.

### Input:
{y}
z

### Response:
"""  # noqa: E501


@pytest.fixture
def chat(byte_level):
    byte_level.chat_template = CHATML
    return byte_level


@pytest.mark.parametrize(
    ("example", "template", "text", "form"),
    [
        (PLAIN, "auto", "<|user|>\nAdd {1} and {input}.<eos>\n<|assistant|>\n", "chat"),
        (WITH_INPUT, "auto", "<|user|>\nSum up {x}.\n\n{y}\nz<eos>\n<|assistant|>\n", "chat"),
        (READY, "auto", "<|user|>\n1 + 1 =<eos>\n<|assistant|>\n", "chat"),
        (PLAIN, "alpaca", ALPACA_PLAIN, "alpaca"),
        (WITH_INPUT, "alpaca", ALPACA_WITH_INPUT, "alpaca"),
        (READY, "none", "1 + 1 =", "none"),
        (TURNS, "auto", "<|system|>\nBe kind.<eos>\n<|user|>\nHi<eos>\n<|assistant|>\n", "chat"),
        (WITH_INPUT, "chat", "<|user|>\nSum up {x}.\n\n{y}\nz<eos>\n<|assistant|>\n", "chat"),
        (READY, "chat", "<|user|>\n1 + 1 =<eos>\n<|assistant|>\n", "chat"),
        (WITH_INPUT, "none", "Sum up {x}.\n\n{y}\nz", "none"),
        (PLAIN, "none", "Add {1} and {input}.", "none"),
        (ONE_TURN, "none", "Hi", "none"),
        (ONE_TURN, "alpaca", ALPACA_PLAIN.replace(PLAIN.instruction, "Hi"), "alpaca"),
        (READY, "alpaca", ALPACA_PLAIN.replace(PLAIN.instruction, "1 + 1 ="), "alpaca"),
    ],
)
def test_what_each_template_writes(chat, example, template, text, form):
    assert render(example, template, chat) == (text, form)


@pytest.mark.parametrize(
    ("example", "text", "form"),
    [(PLAIN, ALPACA_PLAIN, "alpaca"), (WITH_INPUT, ALPACA_WITH_INPUT, "alpaca"), (READY, "1 + 1 =", "none")],
)
def test_auto_for_a_tokenizer_without_a_chat_template(byte_level, example, text, form):
    assert render(example, "auto", byte_level) == (text, form)


def test_a_data_set_of_a_mixture_has_a_template_of_its_own(chat):
    assert render(replace(READY, template="none"), "chat", chat).form == "none"


def test_tools_and_their_calls_reach_the_template(byte_level):
    byte_level.chat_template = (
        "{% for t in tools or [] %}<tool:{{ t.function.name }}>{% endfor %}"
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
        "{% for c in m.tool_calls or [] %}<call:{{ c.function.name }}>{% endfor %}{% endfor %}"
    )
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": "{}"}}]}
    row = RawRow(
        "f:1",
        {
            "tools": [{"type": "function", "function": {"name": "add"}}],
            "messages": [
                {"role": "user", "content": "1 + 1?"},
                call,
                {"role": "tool", "content": "2", "tool_call_id": "a"},
                {"role": "assistant", "content": "Two."},
            ],
        },
    )
    (example,) = to_examples(row, RowFormat("messages", "messages"), require_response=True, every_turn=True)
    assert example.references == ("Two.",)
    assert render(example, "auto", byte_level).text == "<tool:add><user>1 + 1?<assistant><call:add><tool>2"


def test_a_template_from_a_file(chat, tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text("{% for m in messages %}{% generation %}[{{ m.content }}]{% endgeneration %}{% endfor %}")
    changed = with_chat_template(chat, str(file))
    assert render(ONE_TURN, "auto", changed).text == "[Hi]"
    assert chat.chat_template == CHATML
    assert with_chat_template(chat, None) is chat
    file.write_text("{% for m in messages %}")
    with pytest.raises(DpkdError, match=r"data\.chat_template: .*own\.jinja is not a valid Jinja template"):
        with_chat_template(chat, str(file))
    with pytest.raises(DpkdError, match=r"cannot be read"):
        with_chat_template(chat, str(tmp_path / "none.jinja"))


def test_a_tokenizer_without_a_chat_template(byte_level):
    with pytest.raises(DpkdError) as caught:
        render(TURNS, "auto", byte_level)
    assert str(caught.value) == (
        "f:4: data.template is chat (auto picks it for `messages`), but the tokenizer has no chat template. "
        "Other templates cannot format 2 messages as one prompt: use an instruction-tuned model, or bring a template: "
        "--set data.chat_template=FILE"
    )
    with pytest.raises(DpkdError, match=r"instruction-tuned model, or --set data\.template=alpaca"):
        render(ONE_TURN, "auto", byte_level)


def test_a_conversation_that_a_template_cannot_write(chat):
    with pytest.raises(DpkdError) as caught:
        render(TURNS, "alpaca", chat)
    assert str(caught.value) == (
        "f:4: a conversation of 2 messages cannot be written with data.template 'alpaca'. "
        "Use --set data.template=chat and a model with a chat template"
    )
    chat.chat_template = INST
    with pytest.raises(DpkdError) as caught:
        render(TURNS, "chat", chat)
    assert str(caught.value) == (
        "f:4: the tokenizer's chat template rejects the messages (system, user): Only user and "
        "assistant roles are "
        "supported. Fix the row, or use another --set data.template"
    )


@pytest.mark.parametrize("template", [3, {"a": "b"}, "{{ 1 / 0 }}"])
def test_a_template_that_fails_is_named(template, chat):
    chat.chat_template = template
    with pytest.raises(DpkdError, match=r"f:4: the tokenizer's chat template rejects the messages \(.*\): \w+Error: "):
        render(TURNS, "chat", chat)


def test_the_white_space_before_a_chat_response(chat):
    assert chat_lead(chat) == ""
    chat.chat_template = INST
    assert chat_lead(chat) == " "
    chat.chat_template = CHATML.replace("{{ m.content }}", "<think></think>{{ m.content }}")
    assert chat_lead(chat) == ""  # not white space: words of the template that no reference has
    chat.chat_template = "{{ raise_exception('never') }}"
    assert chat_lead(chat) == ""


def test_a_template_that_writes_the_date_writes_the_same_one_every_day(byte_level):
    byte_level.chat_template = DATED
    assert render(ONE_TURN, "chat", byte_level).text == "26 Jul 2024|Hi"


def test_the_fingerprint_changes_with_what_is_written_and_not_else(byte_level, pieces):
    chats = {}
    for template in ("auto", "alpaca", "chat", "none"):
        chats[template] = template_fingerprint(template, byte_level)
        assert template_fingerprint(template, pieces) == chats[template]
    assert len(set(chats.values())) == 4
    pieces.chat_template = CHATML
    changed = {t for t in chats if template_fingerprint(t, pieces) != chats[t]}
    assert changed == {"auto", "chat"}
