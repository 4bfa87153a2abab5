"""Raw rows to examples: which column holds what, and whether a row holds what it must."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from dpkd.data.conversations import (
    BadValueError,
    Message,
    Turn,
    is_conversation,
    last_response,
    read_messages,
    require_text,
    trained_turns,
)
from dpkd.data.rows import BadRow, RawRow
from dpkd.data.settings import Columns
from dpkd.errors import DpkdError

INPUTS = ("input", "context")
OUTPUTS = ("output", "response", "completion", "chosen")
MESSAGES = ("messages", "conversations")


@dataclass(frozen=True)
class Example:
    """One prompt and its references; the response to train on is the first reference.

    The prompt is one of three: instruction (and input), a ready `prompt`, or `messages` up to the response.
    `id` is `FILE:NUMBER`, with `#TURN` where a conversation is trained on in several turns, and never depends on order,
    limit or batch.

    rejected  the other response of a pair, where the row has one
    more      JSON of what messages hold beside role and content, and of the tools that are offered
    template  how the prompt is written, where its data set says so itself
    teacher   the name of the row's teacher, where a column of the data has it
    """

    id: str
    instruction: str = ""
    input: str = ""
    references: tuple[str, ...] = ()
    prompt: str | None = None
    messages: tuple[Message, ...] | None = None
    rejected: str | None = None
    more: str | None = None
    template: str | None = None
    teacher: str | None = None


class RowFormat(NamedTuple):
    """The kind of the rows, the column of their prompt, and where input, response and the rejected one may stand."""

    kind: Literal["instruction", "prompt", "messages"]
    main: str
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    rejected: str = "rejected"


def find_shape(row: RawRow, columns: Columns, *, require_response: bool) -> RowFormat | None:
    """The shape of a row, by the settings or by its column names; None when it has not what is needed.

    Raises DpkdError when two shapes fit.
    """
    outputs = (columns.output,) if columns.output else OUTPUTS
    inputs = (columns.input,) if columns.input else INPUTS
    rejected = columns.rejected or "rejected"
    names = (columns.messages,) if columns.messages else MESSAGES
    messages = (
        [] if columns.input or columns.output else [RowFormat("messages", name, (), (), rejected) for name in names]
    )
    candidates = [
        *messages,
        RowFormat("prompt", columns.prompt or "prompt", (), outputs, rejected),
        RowFormat("instruction", columns.instruction or "instruction", inputs, outputs, rejected),
    ]
    named = [shape for shape in candidates if getattr(columns, shape.kind)]
    fitting = [s for s in named or candidates if _fits(s, row.value, require_response)]
    if not named and is_conversation(row.value.get("chosen")) and not any(s.kind == "prompt" for s in fitting):
        return RowFormat("messages", "chosen", (), (), rejected)  # TRL's pairs of whole conversations
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
    return f"{row.id}: the {role} may be in {' or in '.join(names)}. Choose one, e.g. --set {setting}"


def not_understood(row: RawRow, columns: Columns, *, require_response: bool) -> DpkdError:
    """The error for rows in which prompt or response cannot be found."""
    named = [f"{key}={value}" for key, value in columns.model_dump().items() if value]
    by_settings = f" (data.columns says {', '.join(named)})" if named else ""
    response = " with output, response, completion or chosen" if require_response else ""
    return DpkdError(
        f"{row.id}: the columns are not understood: {', '.join(map(str, row.value)) or 'none'}{by_settings}. "
        f"dpkd reads instruction (and input or context){response}; prompt{response}; or chat messages (messages, "
        "conversations). Map the columns: --set data.columns.instruction=COLUMN --set "
        "data.columns.output=COLUMN (or data.columns.prompt, data.columns.messages)."
    )


def to_examples(
    row: RawRow, shape: RowFormat, *, require_response: bool, every_turn: bool = False
) -> list[Example] | BadRow:
    """The example of a row, or one for each turn that is trained on; or what is wrong with the row."""
    try:
        if shape.kind == "messages" or is_conversation(row.value.get(shape.main)):
            return _conversation(row, shape, require_response, every_turn)
        main = _text(row.value, shape.main)
        if not main.strip():
            raise BadValueError(f"empty {shape.kind}", f"`{shape.main}` holds no text")
        references = _references(row.value, shape.outputs, require_response)
        rejected = _rejected(row.value, shape)
        if shape.kind == "prompt":
            return [Example(row.id, references=references, prompt=main, rejected=rejected)]
        name = _one_of(row.value, shape.inputs)
        return [Example(row.id, main, _text(row.value, name) if name else "", references, rejected=rejected)]
    except BadValueError as bad:
        return BadRow(row.id, bad.reason, bad.detail)


def check_text(row: RawRow, column: str) -> str | BadRow:
    """The text in a column of a row, or what is wrong with it."""
    try:
        return _text(row.value, column)
    except BadValueError as bad:
        return BadRow(row.id, bad.reason, bad.detail)


def _given(row: Mapping[str, Any], names: tuple[str, ...]) -> list[str]:
    return [name for name in names if row.get(name) is not None]


def _text(row: Mapping[str, Any], name: str) -> str:
    if row.get(name) is None:
        raise BadValueError("missing field", f"`{name}` is {'null' if name in row else 'not there'}")
    return require_text(row[name], f"`{name}`")


def _one_of(row: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    given = _given(row, names)
    if len(given) > 1:
        raise BadValueError("ambiguous", f"both `{given[0]}` and `{given[1]}` are given")
    return given[0] if given else None


def _references(row: Mapping[str, Any], names: tuple[str, ...], required: bool) -> tuple[str, ...]:
    name = _one_of(row, names)
    if name is None:
        if required:
            raise BadValueError("missing field", f"no response in {' or '.join(f'`{n}`' for n in names)}")
        return ()
    if is_conversation(row[name]):
        return (last_response(row[name], name),)
    values = row[name] if isinstance(row[name], list) else [row[name]]
    texts = tuple(require_text(value, f"`{name}`") for value in values)
    references = tuple(text for text in texts if text.strip())
    if required and not references:
        raise BadValueError("empty response", f"`{name}` holds no text")
    return references


def _rejected(row: Mapping[str, Any], shape: RowFormat) -> str | None:
    """The rejected response, where the row has one: text, or the last message of a conversation."""
    value = row.get(shape.rejected)
    if value is None:
        return None
    return (
        last_response(value, shape.rejected) if is_conversation(value) else require_text(value, f"`{shape.rejected}`")
    )


def _conversation(row: RawRow, shape: RowFormat, required: bool, every: bool) -> list[Example]:
    """Prompts from the messages before an assistant turn; TRL's form has prompt and completion apart."""
    messages = row.value.get(shape.main)
    first, name = 0, shape.main
    if shape.kind == "prompt" and isinstance(messages, list):
        first = len(messages)
        name = _one_of(row.value, shape.outputs) or shape.main
        if name != shape.main:
            messages = [*messages, *_as_messages(row.value[name], name)]
    turns = read_messages(messages, name)
    found = trained_turns(turns, name, first=first, every=every, required=required, tools=row.value.get("tools"))
    rejected = _rejected(row.value, shape)
    if rejected is not None:
        found = found[-1:]  # a pair is two ways to end a conversation
    return [_example(row.id if len(found) == 1 else f"{row.id}#{n}", turn, rejected) for n, turn in enumerate(found, 1)]


def _as_messages(value: Any, name: str) -> list[Any]:
    return value if is_conversation(value) else [{"role": "assistant", "content": require_text(value, f"`{name}`")}]


def _example(where: str, turn: Turn, rejected: str | None) -> Example:
    references = (turn.response,) if turn.response.strip() else ()
    return Example(where, references=references, messages=turn.before, rejected=rejected, more=turn.more)
