"""Raw rows to examples: which column holds what, and whether a row holds what it must."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from dpkd.data.rows import BadRow, RawRow
from dpkd.data.settings import Columns
from dpkd.errors import DpkdError

INPUTS = ("input", "context")
OUTPUTS = ("output", "response", "completion")


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """One prompt and its references; the response to train on is the first reference.

    The prompt is one of three: instruction (and input), a ready `prompt`, or `messages` up to the response.
    `id` is `FILE:NUMBER` and never depends on order, limit or batch.
    """

    id: str
    instruction: str = ""
    input: str = ""
    references: tuple[str, ...] = ()
    prompt: str | None = None
    messages: tuple[Message, ...] | None = None


class RowFormat(NamedTuple):
    """The kind of the rows, the column of their prompt, and where input and response may stand."""

    kind: Literal["instruction", "prompt", "messages"]
    main: str
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()


class _BadValueError(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def find_shape(row: RawRow, columns: Columns, *, require_response: bool) -> RowFormat | None:
    """The shape of a row, by the settings or by its column names; None when it has not what is needed.

    Raises DpkdError when two shapes fit.
    """
    outputs = (columns.output,) if columns.output else OUTPUTS
    inputs = (columns.input,) if columns.input else INPUTS
    messages = [] if columns.input or columns.output else [RowFormat("messages", columns.messages or "messages")]
    candidates = [
        *messages,
        RowFormat("prompt", columns.prompt or "prompt", (), outputs),
        RowFormat("instruction", columns.instruction or "instruction", inputs, outputs),
    ]
    named = [shape for shape in candidates if getattr(columns, shape.kind)]
    fitting = [s for s in named or candidates if _fits(s, row.value, require_response)]
    if len(fitting) > 1:
        raise DpkdError(_ambiguous(row, [f"`{shape.main}`" for shape in fitting], fitting[0]))
    if fitting and len(found := _given(row.value, fitting[0].outputs)) > 1:
        raise DpkdError(_ambiguous(row, [f"`{name}`" for name in found], None))
    return fitting[0] if fitting else None


def _fits(shape: RowFormat, row: Mapping[str, Any], require_response: bool) -> bool:
    has_response = shape.kind == "messages" or not require_response or any(name in row for name in shape.outputs)
    return shape.main in row and has_response


def _ambiguous(row: RawRow, names: list[str], shape: RowFormat | None) -> str:
    setting = f"data.columns.{shape.kind}={shape.main}" if shape else f"data.columns.output={names[0].strip('`')}"
    role = "prompt" if shape else "response"
    return f"{row.id}: the {role} may be in {' or in '.join(names)}. Say which, e.g. --set {setting}"


def not_understood(row: RawRow, columns: Columns, *, require_response: bool) -> DpkdError:
    """The error for rows in which prompt or response cannot be found."""
    named = [f"{key}={value}" for key, value in columns.model_dump().items() if value]
    by_settings = f" (data.columns says {', '.join(named)})" if named else ""
    response = " with output, response or completion" if require_response else ""
    return DpkdError(
        f"{row.id}: the columns are not understood: {', '.join(map(str, row.value)) or 'none'}{by_settings}. "
        f"dpkd reads instruction (and input or context){response}; prompt{response}; or chat messages. Say "
        "which column is which: --set data.columns.instruction=COLUMN --set data.columns.output=COLUMN "
        "(or data.columns.prompt, data.columns.messages)."
    )


def to_example(row: RawRow, shape: RowFormat, *, require_response: bool) -> Example | BadRow:
    """The example of a row, or what is wrong with the row."""
    try:
        if shape.kind == "messages":
            return _conversation(row, shape, require_response)
        main = _text(row.value, shape.main)
        if not main.strip():
            raise _BadValueError(f"empty {shape.kind}", f"`{shape.main}` holds no text")
        references = _references(row.value, shape.outputs, require_response)
        if shape.kind == "prompt":
            return Example(row.id, references=references, prompt=main)
        return Example(row.id, main, _input(row.value, shape.inputs), references)
    except _BadValueError as bad:
        return BadRow(row.id, bad.reason, bad.detail)


def check_text(row: RawRow, column: str) -> str | BadRow:
    """The text in a column of a row, or what is wrong with it."""
    try:
        return _text(row.value, column)
    except _BadValueError as bad:
        return BadRow(row.id, bad.reason, bad.detail)


def _given(row: Mapping[str, Any], names: tuple[str, ...]) -> list[str]:
    return [name for name in names if row.get(name) is not None]


def _require_text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise _BadValueError("wrong type", f"{what} is {_kind(value)}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        raise _BadValueError(
            "not UTF-8", f"{what} holds U+{code:04X}, half of a character, at {error.start + 1}"
        ) from None
    return value


def _kind(value: Any) -> str:
    names = {str: "text", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    shown = repr(value) if len(repr(value)) <= 40 else f"{repr(value)[:37]}..."
    return f"{names.get(type(value), type(value).__name__)} ({shown})"


def _text(row: Mapping[str, Any], name: str) -> str:
    if row.get(name) is None:
        raise _BadValueError("missing field", f"`{name}` is {'null' if name in row else 'not there'}")
    return _require_text(row[name], f"`{name}`")


def _one_of(row: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    given = _given(row, names)
    if len(given) > 1:
        raise _BadValueError("ambiguous", f"both `{given[0]}` and `{given[1]}` are given")
    return given[0] if given else None


def _input(row: Mapping[str, Any], names: tuple[str, ...]) -> str:
    name = _one_of(row, names)
    return _text(row, name) if name else ""


def _references(row: Mapping[str, Any], names: tuple[str, ...], required: bool) -> tuple[str, ...]:
    name = _one_of(row, names)
    if name is None:
        if required:
            raise _BadValueError("missing field", f"no response in {' or '.join(f'`{n}`' for n in names)}")
        return ()
    values = row[name] if isinstance(row[name], list) else [row[name]]
    texts = tuple(_require_text(value, f"`{name}`") for value in values)
    references = tuple(text for text in texts if text.strip())
    if required and not references:
        raise _BadValueError("empty response", f"`{name}` holds no text")
    return references


def _message(value: Any, number: int) -> Message:
    if not isinstance(value, dict):
        raise _BadValueError("wrong type", f"message {number} is {_kind(value)}, expected an object")
    if value.get("tool_calls"):
        raise _BadValueError("tool call", f"message {number} calls a tool; only text can be trained")
    for key in ("role", "content"):
        if value.get(key) is None:
            raise _BadValueError("missing field", f"message {number} has no `{key}`")
    role, content = (_require_text(value[key], f"`{key}` of message {number}") for key in ("role", "content"))
    return Message(role, content)


def _conversation(row: RawRow, shape: RowFormat, required: bool) -> Example:
    """The last assistant message is the response, what stands before it the prompt; the rest is left out."""
    values = row.value.get(shape.main)
    if not isinstance(values, list):
        found = "null or not there" if values is None else _kind(values)
        raise _BadValueError("wrong type", f"`{shape.main}` is {found}, expected a list of messages")
    messages = tuple(_message(value, number) for number, value in enumerate(values, 1))
    last = max((i for i, message in enumerate(messages) if message.role == "assistant"), default=None)
    if last is None and required:
        raise _BadValueError("missing field", f"`{shape.main}` has no assistant message")
    if last is None or (not required and last < len(messages) - 1):
        last = len(messages)
    response = messages[last].content if last < len(messages) else ""
    if required and not response.strip():
        raise _BadValueError("empty response", "the last assistant message holds no text")
    if last == 0:
        raise _BadValueError("empty prompt", f"`{shape.main}` has nothing before the response")
    return Example(row.id, references=(response,) if response.strip() else (), messages=messages[:last])
