"""Rows of examples: what each kind gives, and what is said of a row that is none."""

from __future__ import annotations

import json

import pytest
from support import hf_folders

from fastlm.finetuning.examples import Encoder
from fastlm.finetuning.rows import WITH_INPUT, WITHOUT_INPUT, Fields, read_rows
from fastlm.inference.chat import ChatTemplate
from fastlm.training.data import DataError

CHAT = ChatTemplate(hf_folders.TEMPLATE, {"eos_token": "<|end|>"})
# as Qwen3's: what was thought before an answer is left out of it once it is past
FORGETFUL = ChatTemplate(
    "{% for m in messages %}{% set past = m.role == 'assistant' and not loop.last %}"
    "<{{ m.role }}>{{ m.content[-2:] if past else m.content }}."
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def read(tmp_path, rows, *, suffix=".jsonl", template=CHAT, fields=None):
    """Of objects, or of the very text of the file."""
    if not isinstance(rows, str):
        rows = "".join(json.dumps(row) + "\n" for row in rows)
    path = tmp_path / f"rows{suffix}"
    path.write_text(rows, encoding="utf-8")
    return read_rows(path, fields or Fields(), template)


def marked(row) -> str:
    """The text, with what is learned in brackets."""
    return "".join(f"[{p.text}]" if p.learned else p.text for p in row.pieces)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "all of it"}, "[all of it]"),
        ({"text": "good", "label": "yes"}, "good\nlabel:[ yes]"),
        ({"text": "good", "label": 1}, "good\nlabel:[ 1]"),
        ({"prompt": "2 + 2 =", "completion": " 4"}, "2 + 2 =[ 4]"),
        ({"prompt": "", "completion": "4"}, "[4]"),
        (
            {"instruction": "Add {x}.", "input": "2 {input}", "output": "4"},
            WITH_INPUT.format(instruction="Add {x}.", input="2 {input}") + "[4]",
        ),
        (
            {"instruction": "Add.", "input": "", "output": "4"},
            WITHOUT_INPUT.format(instruction="Add.") + "[4]",
        ),
        (
            {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"},
                          {"role": "user", "content": "so"}, {"role": "assistant", "content": "1"},
                          {"role": "user", "content": "not answered"}]},
            "<user>hi<|end|><assistant>[ho<|end|>]<user>so<|end|><assistant>[1<|end|>]",
        ),
    ],
)  # fmt: skip
def test_what_is_learned_is_the_answer(tmp_path, row, expected):
    (found,) = read(tmp_path, [row]).rows
    assert marked(found) == expected


def test_of_a_template_that_rewrites_the_past_the_last_answer_is_learned(tmp_path):
    messages = [{"role": role, "content": text} for role, text in (
        ("user", "hi"), ("assistant", "hmm, ho"), ("user", "so"), ("assistant", "hmm, no")
    )]  # fmt: skip
    found = read(tmp_path, [{"messages": messages}], template=FORGETFUL)
    assert marked(found.rows[0]) == "<user>hi.<assistant>ho.<user>so.<assistant>[hmm, no.]"
    assert "of 1 conversations only the last answer is learned" in found.notes[0]


def test_csv_with_quotes_line_ends_and_other_names(tmp_path):
    text = '\ufeffsaid,kind\r\n"one, ""two""\r\nand more",a\r\nlast,b\r\n'
    fields = Fields(text="said", label="kind", label_prompt=" is")
    found = read(tmp_path, text, suffix=".csv", fields=fields)
    assert [marked(row) for row in found.rows] == ['one, "two"\r\nand more is[ a]', "last is[ b]"]
    assert [row.place.rpartition(":")[2] for row in found.rows] == ["2", "4"]


def test_empty_lines_are_no_rows_and_separators_of_other_systems_no_lines(tmp_path):
    text = '\n{"text": "a\u2028b"}\n\n{"text": "c"}\n'
    assert [row.place[-1] for row in read(tmp_path, text).rows] == ["2", "4"]


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ('{"text": "a"}\n{"text": ', 2, "is not JSON"),
        ('{"text": "a"}\n["a"]', 2, 'must be an object, got ["a"]'),
        ('{"text": "a"}\n{"txt": "a"}', 2, "has no text, which the first row has; got txt"),
        ('{"text": 7}', 1, "text must be text, got 7"),
        ('{"text": " "}', 1, "text must not be empty"),
        ('{"text": "\\ud800"}', 1, "text must be text that UTF-8 can hold"),
        ('{"words": "a"}', 1, "must have the fields messages, or text and label"),
        ('{"text": "a", "label": null}', 1, "label must be text or a whole number, got null"),
        ('{"text": "a", "label": ""}', 1, "label must not be empty"),
        ('{"prompt": "a", "completion": ""}', 1, "completion must not be empty"),
        ('{"instruction": "a", "output": 1}', 1, "output must be text, got 1"),
        ('{"text": "a", "label": "\\ud800"}', 1, "label must be text that UTF-8 can hold"),
        ('{"text": "a"}\n' + "[" * 100_000, 2, "is nested too deeply"),
        ('{"messages": [{"role": "assistant", "content": "\\ud800"}]}', 1, "that UTF-8 can hold"),
        ('{"messages": "hi"}', 1, 'messages must be a list of messages, got "hi"'),
        ('{"messages": [{"role": "user"}]}', 1, "messages[0].content must be text"),
        ('{"messages": [{"role": "user", "content": "a"}]}', 1, "one of the role assistant"),
        ('{"messages": [{"role": "assistant", "content": ""}]}', 1, "must not be empty"),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_field(tmp_path, text, line, said):
    with pytest.raises(DataError) as error:
        read(tmp_path, text)
    assert f"{tmp_path / 'rows.jsonl'}:{line}: " in str(error.value)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (Fields(label="nope"), "must have the field 'nope' of --label-column, got 'text', 'label'"),
        (Fields(text="said"), "must have the field 'said' of --text-column, got 'text', 'label'"),
    ],
)
def test_a_column_that_is_not_there_is_named(tmp_path, fields, said):
    """And nothing else is learned instead."""
    with pytest.raises(DataError, match=said):
        read(tmp_path, "text,label\na,b\n", suffix=".csv", fields=fields)
    with pytest.raises(DataError, match=r"must have the field '\w+' of"):
        read(tmp_path, [{"messages": [{"role": "assistant", "content": "a"}]}], fields=fields)


def test_nesting_of_any_depth_is_one_line(tmp_path):
    """Also that which can be read and not be shown."""
    for depth in range(800, 1000):
        with pytest.raises(DataError, match=r"nested|must be text"):
            read(tmp_path, '{"text": ' + "[" * depth + "]" * depth + "}")


def test_fields_that_are_not_read_are_told(tmp_path):
    found = read(tmp_path, [{"text": "a", "kind": "b", "id": 3}])
    assert "only the field text is read, not kind, id" in found.notes[0]
    assert not read(tmp_path, [{"text": "a"}]).notes


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("text,label\na,b\nc\n", 3, "must have 2 fields, text, label, got 1"),
        ("text,label\na,b,c\n", 2, "must have 2 fields, text, label, got 3"),
        ('text,label\n"a,b\n', 2, "is not CSV"),
        ("text,text\na,b\n", 1, "names a field twice"),
    ],
)
def test_a_bad_line_of_csv_is_named(tmp_path, text, line, said):
    with pytest.raises(DataError) as error:
        read(tmp_path, text, suffix=".csv")
    assert f"rows.csv:{line}: " in str(error.value)
    assert said in str(error.value)


def test_all_bad_rows_are_counted(tmp_path):
    with pytest.raises(DataError, match=r":2: .* \(and 2 more bad rows\)"):
        read(tmp_path, '{"text": "a"}\n{"text": 1}\n{"text": 2}\n{"text": 3}')


def test_files_that_are_none(tmp_path):
    with pytest.raises(DataError, match=r"must be a \.jsonl or \.csv file, got .*rows\.txt"):
        read(tmp_path, "a", suffix=".txt")
    with pytest.raises(DataError, match="has no rows"):
        read(tmp_path, "\n")
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_rows(tmp_path / "absent.csv", Fields(), None)
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xe9"}\n')
    with pytest.raises(DataError, match=r"latin\.jsonl:2: is not UTF-8"):
        read_rows(tmp_path / "latin.jsonl", Fields(), None)
    with pytest.raises(DataError, match=r"messages need a chat template, which here does not"):
        (tmp_path / "chat.jsonl").write_text('{"messages": []}')
        read_rows(tmp_path / "chat.jsonl", Fields(), None, whose="here")


@pytest.fixture(scope="module")
def tokenizer():
    return hf_folders.tokenizer()


def encoded(tmp_path, tokenizer, rows, max_length=64, labels=()):
    encoder = Encoder(tokenizer, max_length, labels)
    return encoder, [e for row in read(tmp_path, rows).rows for e in encoder.encode(row)]


def test_an_answer_ends_and_its_prompt_has_the_tokens_it_has_alone(tmp_path, tokenizer):
    encoder, (found,) = encoded(tmp_path, tokenizer, [{"prompt": "the c", "completion": "at"}])
    prompt = encoder.prompt_ids("the c")
    # and not those of "the cat", which is a token
    assert found.ids == (*prompt, *tokenizer.encode("at"), tokenizer.eos_token_id)
    assert found.learned == (False,) * len(prompt) + (True,) * (len(found.ids) - len(prompt))
    assert found.prompt == len(prompt)


def test_an_empty_prompt_is_the_token_that_starts_a_text(tmp_path, tokenizer):
    _, (found,) = encoded(tmp_path, tokenizer, [{"prompt": "", "completion": "cat"}])
    assert found.ids[0] == tokenizer.bos_token_id
    assert not found.learned[0]


def test_what_nothing_comes_before_is_not_learned(tmp_path, tokenizer):
    """It would be predicted from the example before it in a packed row."""
    bare = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
    row = {"messages": [{"role": "assistant", "content": "cat sat"}]}
    (found,) = Encoder(tokenizer, 64).encode(read(tmp_path, [row], template=bare).rows[0])
    assert found.learned == (False, *[True] * (len(found.ids) - 1))


def test_an_answer_of_one_token_that_nothing_comes_before_is_refused(tmp_path, tokenizer):
    bare = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
    row = {"messages": [{"role": "assistant", "content": "cat"}]}
    with pytest.raises(DataError, match=r"rows\.jsonl:1: nothing comes before its one token"):
        Encoder(tokenizer, 64).encode(read(tmp_path, [row], template=bare).rows[0])


def test_a_long_prompt_loses_its_beginning_and_never_its_answer(tmp_path, tokenizer):
    row = {"prompt": "x" * 40 + "yz", "completion": "cat"}
    encoder, (found,) = encoded(tmp_path, tokenizer, [row], max_length=6)
    assert tokenizer.decode(found.ids) == "xyz" + "cat<|end|>" or len(found.ids) == 6
    assert tokenizer.decode(found.ids).endswith("yzcat<|end|>")
    assert len(found.ids) == 6
    assert encoder.shortened == 1


def test_prompts_are_cut_alike_whatever_the_label(tmp_path, tokenizer):
    rows = [{"text": "q" * 40, "label": label} for label in ("a", "abcdefgh")]
    _, found = encoded(tmp_path, tokenizer, rows, max_length=24, labels=("a", "abcdefgh"))
    first, second = (e.ids[: e.prompt] for e in found)
    assert first == second
    assert len(found[1].ids) == 24


def test_a_long_text_becomes_several_examples(tmp_path, tokenizer):
    encoder, found = encoded(tmp_path, tokenizer, [{"text": "x" * 21}], max_length=10)
    assert [len(e.ids) for e in found] == [10, 10, 2]
    assert [e.num_learned for e in found] == [9, 9, 1]
    assert encoder.split == 1


def test_an_answer_that_does_not_fit_is_named(tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the answer must be shorter than max_len"):
        encoded(tmp_path, tokenizer, [{"prompt": "a", "completion": "x" * 20}], max_length=10)
    rows = [{"text": "a", "label": "x" * 12}, {"text": "a", "label": "b"}]
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the answer must be shorter"):
        encoded(tmp_path, tokenizer, rows, max_length=12, labels=("x" * 12, "b"))


def test_labels_count_their_end_only_where_one_begins_another(tokenizer):
    end = tokenizer.eos_token_id
    assert all(ids[-1] != end for ids in Encoder(tokenizer, 64, ("pos", "neg")).label_ids)
    assert all(ids[-1] == end for ids in Encoder(tokenizer, 64, ("pos", "posx", "neg")).label_ids)


def test_labels_that_nothing_tells_apart_are_refused():
    tokenizer = hf_folders.tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="none may begin another, got 'pos', 'posx'"):
        Encoder(tokenizer, 64, ("pos", "posx"))
