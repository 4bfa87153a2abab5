"""How a prompt is written: the papers' Alpaca form, the tokenizer's chat template, or as it is."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar, cast

from dpkd.data.conversations import Message, as_dicts
from dpkd.data.formats import Example
from dpkd.data.settings import Template
from dpkd.errors import DpkdError, described

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Form = Literal["alpaca", "chat", "none"]

# The wording of Stanford Alpaca, used by MiniLLM, DPKD, DistiLLM and others.
ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)

# Llama's templates write today's date: a run resumed tomorrow would have other prompts. Their own default.
FIXED_DATE = "26 Jul 2024"


class Rendered(NamedTuple):
    """The text of a prompt, and the form that wrote it."""

    text: str
    form: Form


def render(example: Example, template: Template, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """Write the prompt of an example. Raises DpkdError when the template cannot write it.

    What an example says itself comes before `template`. `auto` is chat where the tokenizer has a chat template; else
    alpaca for instructions, as the papers do, and none for ready prompts.
    """
    asked = cast("Template", example.template or template)
    form = _form(example, tokenizer) if asked == "auto" else asked
    if form == "chat":
        return Rendered(_chat(example, tokenizer), form)
    if form == "none":
        return Rendered(_plain(example, form), form)
    if example.input:
        return Rendered(ALPACA_INPUT.format(instruction=example.instruction, input=example.input), form)
    return Rendered(ALPACA.format(instruction=_plain(example, form)), form)


def _form(example: Example, tokenizer: PreTrainedTokenizerBase) -> Form:
    if example.messages is not None or tokenizer.chat_template:
        return "chat"
    return "none" if example.prompt is not None else "alpaca"


def _plain(example: Example, form: Form) -> str:
    """The prompt as one text; a conversation only when it is a single message."""
    if example.prompt is not None:
        return example.prompt
    if example.messages is None:
        return "\n\n".join(part for part in (example.instruction, example.input) if part)
    if len(example.messages) > 1:
        raise DpkdError(
            f"{example.id}: a conversation of {len(example.messages)} messages cannot be written with "
            f"data.template {form!r}. Use --set data.template=chat and a model with a chat template"
        )
    return example.messages[0].content


def _chat(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    messages = example.messages or (Message("user", _plain(example, "chat")),)
    if not tokenizer.chat_template:
        where = f" of {tokenizer.name_or_path}" if tokenizer.name_or_path else ""
        turns = example.messages or ()
        advice = (
            "Use an instruction-tuned model, or --set data.template=alpaca"
            if len(turns) <= 1
            else f"Other templates cannot format {len(turns)} messages as one prompt: use an instruction-tuned model, "
            "or bring a template: --set data.chat_template=FILE"
        )
        raise DpkdError(
            f"{example.id}: data.template is chat (auto picks it for `messages`), but the tokenizer{where} "
            f"has no chat template. {advice}"
        )
    return _apply(messages, tokenizer, example.id, add_generation_prompt=True, more=example.more)


def _apply(
    messages: tuple[Message, ...],
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    *,
    add_generation_prompt: bool,
    more: str | None = None,
) -> str:
    from jinja2 import TemplateError

    values, tools = as_dicts(messages, more)
    try:
        text = tokenizer.apply_chat_template(
            values, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt, date_string=FIXED_DATE
        )
    except Exception as error:  # a template is code that came with the model
        reason = str(error) if isinstance(error, TemplateError) else described(error)
        roles = ", ".join(message.role for message in messages)
        raise DpkdError(
            f"{where}: the tokenizer's chat template rejects the messages ({roles}): {reason}. "
            "Fix the row, or use another --set data.template"
        ) from error
    return str(text)


def chat_lead(tokenizer: PreTrainedTokenizerBase) -> str:
    """White space that the chat template puts between prompt and response (as in Llama-2), usually none."""
    question, answer = Message("user", "question"), Message("assistant", "answer")
    try:
        prompt = _apply((question,), tokenizer, "chat template", add_generation_prompt=True)
        whole = _apply((question, answer), tokenizer, "chat template", add_generation_prompt=False)
    except DpkdError:
        return ""
    lead = whole.removeprefix(prompt).partition(answer.content)[0] if whole.startswith(prompt) else ""
    return lead if lead.isspace() else ""


TokenizerT = TypeVar("TokenizerT")


def with_chat_template(tokenizer: TokenizerT, file: str | None) -> TokenizerT:
    """The tokenizer, a copy with the chat template of a file where one is named. Raises DpkdError for a bad one."""
    if file is None:
        return tokenizer
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        text = Path(file).expanduser().read_text(encoding="utf-8")
        ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(
            text.replace("{% generation %}", "").replace("{% endgeneration %}", "")
        )
    except (OSError, UnicodeDecodeError) as error:
        raise DpkdError(f"data.chat_template: {file} cannot be read: {error}") from error
    except TemplateError as error:
        raise DpkdError(f"data.chat_template: {file} is not a valid Jinja template: {error}") from error
    changed = deepcopy(tokenizer)
    changed.chat_template = text  # type: ignore[attr-defined]
    return changed


_SENTENCES: dict[Form, str] = {
    "chat": "with the tokenizer's chat template",
    "alpaca": "in the Alpaca form",
    "none": "as they are",
}


def template_line(forms: Iterable[Form], template: Template) -> str:
    """Which templates wrote how many prompts, for the start of a run."""
    counts = Counter(forms)
    how = " and ".join(
        f"{_SENTENCES[form]}" + (f" ({count:,})" if len(counts) > 1 else "") for form, count in counts.most_common()
    )
    chosen = ", chosen by auto" if template == "auto" else ""
    return (
        f"prompts are written {how} (data.template: {' and '.join(form for form, _ in counts.most_common())}{chosen})"
    )


def template_fingerprint(template: Template, tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of everything that decides how examples are written: equal hash, equal prompts."""
    forms: dict[str, object] = {"none": "none"}
    if template in ("auto", "alpaca"):
        forms["alpaca"] = [ALPACA, ALPACA_INPUT]
    if template in ("auto", "chat"):
        forms["chat"] = [tokenizer.chat_template, FIXED_DATE]
    return hashlib.sha256(json.dumps([template, forms], sort_keys=True).encode()).hexdigest()
