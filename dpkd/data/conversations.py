"""Chat messages: OpenAI's and TRL's `role`/`content`, ShareGPT's `from`/`value`; which turns are trained."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

# ShareGPT's names of roles.
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}


class BadValueError(Exception):
    """What is wrong with a row: the kind of mistake, and what was found."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    content: str


class Turns(NamedTuple):
    """A conversation; `more` has what messages hold beside role and content (calls of tools), by their number."""

    messages: tuple[Message, ...]
    more: dict[int, dict[str, Any]]


class Turn(NamedTuple):
    """An assistant message to train on, and what stands before it.

    `more` is JSON of what the messages before it hold beside role and content, None where they hold nothing else.
    """

    before: tuple[Message, ...]
    response: str
    more: str | None


def is_conversation(value: Any) -> bool:
    """Whether a value is a list of messages."""
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def read_messages(values: Any, name: str) -> Turns:
    """The messages of a list. Raises BadValueError."""
    if not isinstance(values, list):
        found = "null or not there" if values is None else kind(values)
        raise BadValueError("wrong type", f"`{name}` is {found}, expected a list of messages")
    messages, more = [], {}
    for number, value in enumerate(values, 1):
        message, rest = _message(value, number)
        messages.append(message)
        if rest:
            more[number - 1] = rest
    return Turns(tuple(messages), more)


def _message(value: Any, number: int) -> tuple[Message, dict[str, Any]]:
    if not isinstance(value, dict):
        raise BadValueError("wrong type", f"message {number} is {kind(value)}, expected an object")
    sharegpt = "role" not in value and "from" in value
    role_key, content_key = ("from", "value") if sharegpt else ("role", "content")
    rest = {k: v for k, v in value.items() if k not in (role_key, content_key) and v not in (None, [], {})}
    content = value.get(content_key)
    if content is None and rest.get("tool_calls"):
        content = ""  # OpenAI's way to write a call of a tool without words
    for key, found in ((role_key, value.get(role_key)), (content_key, content)):
        if found is None:
            raise BadValueError("missing field", f"message {number} has no `{key}`")
    if isinstance(content, list) and _is_parts(content):
        content = "".join(part["text"] for part in content)
    role = require_text(value[role_key], f"`{role_key}` of message {number}")
    text = require_text(content, f"`{content_key}` of message {number}")
    return Message(ROLES.get(role, role) if sharegpt else role, text), rest


def _is_parts(content: list[Any]) -> bool:
    """OpenAI's list of parts, all of them text."""
    return is_conversation(content) and all(p.get("type") == "text" and isinstance(p.get("text"), str) for p in content)


def trained_turns(turns: Turns, name: str, *, first: int, every: bool, required: bool, tools: Any = None) -> list[Turn]:
    """The assistant turns to train on, from message `first` on: every one, or the last; with all that is before each.

    Turns that call a tool or hold no text are part of the conversation and are not trained. Where no response is
    `required`, a conversation that ends otherwise is a prompt as a whole. Raises BadValueError.
    """
    messages = turns.messages
    answers = [i for i, message in enumerate(messages) if message.role == "assistant" and i >= first]
    if not required and (not answers or answers[-1] < len(messages) - 1):
        return [_turn(turns, len(messages), tools)]
    if not answers:
        raise BadValueError("missing field", f"`{name}` has no assistant message")
    usable = [i for i in answers if messages[i].content.strip() and "tool_calls" not in turns.more.get(i, {})]
    if not every or not usable:
        last = answers[-1]
        if "tool_calls" in turns.more.get(last, {}):
            raise BadValueError("tool call", f"message {last + 1} calls a tool; only text can be trained on")
        if required and not messages[last].content.strip():
            raise BadValueError("empty response", "the last assistant message has no text")
        usable = [last]
    if usable[0] == 0:
        usable = usable[1:]
        if not usable:
            raise BadValueError("empty prompt", f"`{name}` has nothing before the response")
    return [_turn(turns, i, tools) for i in usable]


def _turn(turns: Turns, place: int, tools: Any) -> Turn:
    before = {i: rest for i, rest in turns.more.items() if i < place}
    more = {key: value for key, value in (("messages", before), ("tools", _tools(tools))) if value}
    text = json.dumps(more, sort_keys=True) if more else None
    return Turn(turns.messages[:place], turns.messages[place].content if place < len(turns.messages) else "", text)


def _tools(tools: Any) -> Any:
    """The tools that a row offers: a list, or its JSON."""
    if not isinstance(tools, str):
        return tools
    try:
        return json.loads(tools)
    except ValueError as error:
        raise BadValueError("wrong type", f"`tools` is text that is not JSON: {error}") from None


def last_response(values: Any, name: str) -> str:
    """The text of the assistant message that ends a conversation. Raises BadValueError."""
    messages = read_messages(values, name).messages
    if not messages or messages[-1].role != "assistant" or not messages[-1].content.strip():
        raise BadValueError("missing field", f"`{name}` does not end with an assistant message with text")
    return messages[-1].content


def as_dicts(messages: Sequence[Message], more: str | None) -> tuple[list[dict[str, Any]], Any]:
    """What a chat template is given: the messages with all that they hold, and the tools."""
    rest: Mapping[str, Any] = json.loads(more) if more else {}
    others = rest.get("messages", {})
    return [{**message._asdict(), **others.get(str(i), {})} for i, message in enumerate(messages)], rest.get("tools")


def require_text(value: Any, what: str) -> str:
    """The value, if it is text that can be encoded. Raises BadValueError."""
    if not isinstance(value, str):
        raise BadValueError("wrong type", f"{what} is {kind(value)}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        raise BadValueError(
            "not UTF-8", f"{what} holds U+{code:04X}, half of a character, at {error.start + 1}"
        ) from None
    return value


def kind(value: Any) -> str:
    """What a value is, for messages."""
    names = {str: "text", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    shown = repr(value) if len(repr(value)) <= 40 else f"{repr(value)[:37]}..."
    return f"{names.get(type(value), type(value).__name__)} ({shown})"
