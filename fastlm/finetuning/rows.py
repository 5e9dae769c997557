"""Files of examples: what each row gives, and what of it is to be learned."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlm.finetuning.config import COMMAND
from fastlm.inference.chat import ChatTemplate, ChatTemplateError
from fastlm.training.data import DataError

# Stanford Alpaca's words, by which rows of instructions are usually written down
_TASK = "Below is an instruction that describes a task"
_REQUEST = "Write a response that appropriately completes the request."
WITH_INPUT = (
    f"{_TASK}, paired with an input that provides further context. {_REQUEST}\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
WITHOUT_INPUT = f"{_TASK}. {_REQUEST}\n\n### Instruction:\n{{instruction}}\n\n### Response:\n"

_REST = "__rest__"


@dataclass(frozen=True)
class Piece:
    """Part of an example's text, and whether the loss is on it."""

    text: str
    learned: bool


@dataclass(frozen=True)
class Row:
    """An example.

    Attributes:
        place: Where it stands, as ``file:line``.
        pieces: Its text, in order.
        label: That of a labelled text, which is its last piece after a space; else None.
        spelled: Whether the special tokens are in the text already, and it has its own end.
        left_out: Answers that are not learned though they are the assistant's.
    """

    place: str
    pieces: tuple[Piece, ...]
    label: str | None = None
    spelled: bool = False
    left_out: int = 0

    @property
    def prompt(self) -> str:
        """What comes before the last thing to learn."""
        return "".join(piece.text for piece in self.pieces[:-1])


@dataclass(frozen=True)
class Rows:
    """All rows of a file, which are of one kind.

    Attributes:
        kind: The fields that each row has.
        rows: In the order of the file.
        notes: What the reader did that a user may want to know.
    """

    kind: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fields:
    """Names of a labelled text's fields, and what stands between the two."""

    text: str = "text"
    label: str = "label"
    label_prompt: str = "\nlabel:"


class _BadRowError(ValueError):
    """What is wrong with one row."""


def read_rows(
    path: str | Path, fields: Fields, template: ChatTemplate | None, *, whose: str = "the model"
) -> Rows:
    """Read a ``.jsonl`` or ``.csv`` file.

    Args:
        path: The file, in UTF-8.
        fields: Of labelled texts.
        template: Writes down messages.
        whose: What the template belongs to, for errors.

    Raises:
        DataError: The file cannot be read, or a row is not as the first one, or as rows must be;
            the message begins with the file, the line and the field, and says how many more there
            are.
    """
    path = Path(path)
    records = _records(path)
    maker: Callable[[Mapping[str, Any], str], Row] | None = None
    kind, rows, wrong, unread = "", list[Row](), list[str](), list[str]()
    for line, record in records:
        place = f"{path}:{line}"
        try:
            if isinstance(record, _BadRowError):
                raise record
            if maker is None:
                kind, maker = _maker(record, fields, template, whose)
                if maker is _text:
                    unread = [name for name in record if name != "text"]
            rows.append(maker(record, place))
        except _BadRowError as error:
            wrong.append(f"{place}: {error}")
    if wrong:
        more = f" (and {len(wrong) - 1} more bad rows)" if len(wrong) > 1 else ""
        raise DataError(f"{COMMAND}: {wrong[0]}{more}")
    if not rows:
        raise DataError(f"{COMMAND}: {path} has no rows")
    notes = list[str]()
    if unread:
        notes.append(
            f"of these rows only the field text is read, not {', '.join(unread)}; --label-column "
            "names the field of a label"
        )
    if rewritten := sum(row.left_out > 0 for row in rows):
        notes.append(
            f"of {rewritten:,} conversations only the last answer is learned: the chat template "
            "writes earlier ones otherwise once they are past"
        )
    return Rows(kind, tuple(rows), tuple(notes))


def _records(path: Path) -> Iterator[tuple[int, Any]]:
    """Line numbers and objects; an object that is none is the error of its row."""
    if path.suffix not in (".jsonl", ".csv"):
        raise DataError(f"{COMMAND}: data must be a .jsonl or .csv file, got {path}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{COMMAND}: {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{COMMAND}: {path}:{line}: is not UTF-8: {error.reason}") from None
    return _of_json_lines(text) if path.suffix == ".jsonl" else _of_csv(text, path)


def _of_json_lines(text: str) -> Iterator[tuple[int, Any]]:
    # not splitlines: characters that other systems end lines by may stand in a JSON string
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            yield number, _BadRowError(f"is not JSON: {error}")
            continue
        except RecursionError:
            yield number, _BadRowError("is nested too deeply")
            continue
        if isinstance(record, dict):
            yield number, record
        else:
            yield number, _BadRowError(f"must be an object, got {_shown(record)}")


def _of_csv(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), restkey=_REST, strict=True)
    before = 1
    try:
        names = reader.fieldnames or []
        if len(set(names)) != len(names):
            raise DataError(f"{COMMAND}: {path}:1: names a field twice: {', '.join(names)}")
        before = reader.line_num
        for record in reader:
            line, before = before + 1, reader.line_num
            if _REST in record or None in record.values():
                got = sum(value is not None for key, value in record.items() if key != _REST)
                got += len(record.get(_REST, ()))
                error = f"must have {len(names)} fields, {', '.join(names)}, got {got}"
                yield line, _BadRowError(error)
            else:
                yield line, record
    except csv.Error as error:
        raise DataError(f"{COMMAND}: {path}:{before + 1}: is not CSV: {error}") from None


def _maker(
    first: Mapping[str, Any], fields: Fields, template: ChatTemplate | None, whose: str
) -> tuple[str, Callable[[Mapping[str, Any], str], Row]]:
    """What rows with these fields are, and how an example is made of one."""
    names = ", ".join(map(repr, first)) or "none"
    usual = Fields()
    if (fields.text, fields.label) != (usual.text, usual.label):
        for flag, name in (("--text-column", fields.text), ("--label-column", fields.label)):
            if name not in first:
                raise _BadRowError(f"must have the field {name!r} of {flag}, got {names}")
    elif "messages" in first:
        if template is None:
            raise DataError(
                f"{COMMAND}: messages need a chat template, which {whose} does not have; put one "
                "into it as chat_template.jinja, or use rows of prompt and completion"
            )
        return "messages", lambda record, place: _conversation(record, place, template)
    if fields.text in first and fields.label in first:
        return f"{fields.text}, {fields.label}", lambda r, place: _labelled(r, place, fields)
    if "prompt" in first and "completion" in first:
        return "prompt, completion", _completion
    if "instruction" in first and "output" in first:
        return "instruction, input, output", _instruction
    if "text" in first:
        return "text", _text
    raise _BadRowError(
        "must have the fields messages, or text and label, or prompt and completion, or "
        f"instruction and output, or text, got {names}; --text-column and --label-column name "
        "other fields of labelled texts"
    )


def _labelled(record: Mapping[str, Any], place: str, fields: Fields) -> Row:
    text = _field(record, fields.text)
    label = record.get(fields.label)
    if isinstance(label, int) and not isinstance(label, bool):
        label = str(label)
    if not isinstance(label, str):
        raise _BadRowError(f"{fields.label} must be text or a whole number, got {_shown(label)}")
    label = label.strip()
    if not label:
        raise _BadRowError(f"{fields.label} must not be empty")
    _check_encodable(fields.label, label)
    pieces = (Piece(text + fields.label_prompt, False), Piece(f" {label}", True))
    return Row(place, pieces, label)


def _completion(record: Mapping[str, Any], place: str) -> Row:
    prompt = _field(record, "prompt", may_be_empty=True)
    return Row(place, (Piece(prompt, False), Piece(_field(record, "completion"), True)))


def _instruction(record: Mapping[str, Any], place: str) -> Row:
    given = _field(record, "input", may_be_empty=True) if record.get("input") else ""
    values = {"instruction": _field(record, "instruction"), "input": given}
    prompt = (WITH_INPUT if given else WITHOUT_INPUT).format_map(values)
    return Row(place, (Piece(prompt, False), Piece(_field(record, "output"), True)))


def _text(record: Mapping[str, Any], place: str) -> Row:
    return Row(place, (Piece(_field(record, "text"), True),))


def _conversation(record: Mapping[str, Any], place: str, template: ChatTemplate) -> Row:
    """Every answer of the assistant is learned, if the whole text has them all as they were.

    An answer is what a text with it has more than the text that asks for it.
    """
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _BadRowError(f"messages must be a list of messages, got {_shown(messages)}")
    for number, message in enumerate(messages):
        for name in ("role", "content"):
            if not isinstance(message, dict) or not isinstance(message.get(name), str):
                raise _BadRowError(f"messages[{number}].{name} must be text")
    answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise _BadRowError("messages must have one of the role assistant")
    last = answers[-1]
    try:
        spans = [_answer(messages[: number + 1], template) for number in answers]
    except ChatTemplateError as error:
        raise _BadRowError(f"messages: {error}") from None
    whole = spans[-1][0] + spans[-1][1]
    _check_encodable("messages", whole)
    kept = [span for span in spans if whole.startswith(span[0] + span[1])]
    if len(kept) != len(spans):
        kept = spans[-1:]
    if not messages[last]["content"].strip():
        raise _BadRowError(f"messages[{last}].content must not be empty")
    pieces, at = list[Piece](), 0
    for before, answer in kept:
        pieces += [Piece(before[at:], False), Piece(answer, True)]
        at = len(before) + len(answer)
    return Row(place, tuple(pieces), spelled=True, left_out=len(spans) - len(kept))


def _answer(messages: Sequence[Mapping[str, str]], template: ChatTemplate) -> tuple[str, str]:
    """The text that asks for the last message, and the message as it continues that."""
    asking = template.render(messages[:-1])
    whole = template.render(messages, add_generation_prompt=False)
    if not whole.startswith(asking) or len(whole) == len(asking):
        raise _BadRowError(
            "messages: with its answer the chat template writes another text than it asks for it by"
        )
    return asking, whole[len(asking) :]


def _field(record: Mapping[str, Any], name: str, *, may_be_empty: bool = False) -> str:
    if name not in record:
        raise _BadRowError(f"has no {name}, which the first row has; got {', '.join(record)}")
    value = record[name]
    if not isinstance(value, str):
        raise _BadRowError(f"{name} must be text, got {_shown(value)}")
    if not value.strip() and not may_be_empty:
        raise _BadRowError(f"{name} must not be empty")
    _check_encodable(name, value)
    return value


def _check_encodable(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _BadRowError(f"{name} must be text that UTF-8 can hold") from None


def _shown(value: object) -> str:
    try:
        text = json.dumps(value)
    except RecursionError:
        return "nested values"
    return text if len(text) <= 40 else f"{text[:37]}..."
