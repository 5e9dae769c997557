"""Conversations, and the command that holds them."""

from __future__ import annotations

import io
import itertools
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.models import tiny_model, tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import fastlm
from fastlm.cli import FAILED, USAGE, main
from fastlm.cli.chat import ChatOptions
from fastlm.inference.chat import ChatTemplate
from fastlm.inference.conversation import Conversation, open_conversation
from fastlm.inference.language_model import LanguageModel

TEMPLATE = """\
{{ bos_token }}{% for m in messages %}
{% if m.role == 'system' and loop.index > 1 %}{{ raise_exception('not the first') }}{% endif %}
{% if m.content == 'never' %}{{ raise_exception('I never do') }}{% endif %}
[{{ m.role }}] {{ m.content }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}[assistant] {% endif %}"""
START, END = "<|start|>", "<|end|>"


@pytest.fixture(autouse=True)
def _ctrl_c_interrupts() -> Iterator[None]:
    """Also of a run that was started in the background, where shells have it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def write_model(folder: Path, context: int, *, template: str | None = TEMPLATE) -> Path:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens([START])
    start = tokenizer.token_to_id(START)
    # what a tokenizer does to any text, and a template has done itself
    tokenizer.post_processor = TemplateProcessing(
        single=f"{START} $A", special_tokens=[(START, start)]
    )
    size = tokenizer.get_vocab_size()
    with torch.random.fork_rng():
        # whose answers do not end by themselves within 12 tokens
        torch.manual_seed(1)
        tiny_model(vocab_size=size, max_position_embeddings=context).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokens = {"bos_token": START, "eos_token": END, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("chat"), 256)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("plain"), 256, template=None)


@pytest.fixture
def chat(monkeypatch, capsys):
    """Type lines into ``fastlm chat``: its answers, and what else it says."""

    def typed(folder: Path, text: str, *flags: str, code: int = 0) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        assert main(["chat", str(folder), "--max-new-tokens", "12", *flags]) == code
        captured = capsys.readouterr()
        return captured.out, captured.err

    return typed


def expected(folder: Path, questions: list[str], system: str | None = None, **settings) -> str:
    """Answers by hand: each the continuation of transformers' text of all before."""
    lm, tokenizer = without_additions(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    messages = [{"role": "system", "content": system}] if system else []
    ends, answers = [tokenizer.convert_tokens_to_ids(END)], []
    for question in questions:
        messages.append({"role": "user", "content": question})
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        answers.append(lm.generate(prompt, 12, stop_token_ids=ends, **settings))
        messages.append({"role": "assistant", "content": answers[-1]})
    return "".join(f"{answer}\n" for answer in answers)


# ---- the command


def test_answers_continue_the_whole_conversation(folder, chat):
    out, err = chat(folder, "the cat\n\n  and then?  \nwhy\n")
    assert out == expected(folder, ["the cat", "and then?", "why"])
    assert err.count("stopped after max_new_tokens, 12") == 3
    assert "plain text" not in err


def test_flags_are_those_of_generation(folder, chat):
    flags = ("--temperature", "0.9", "--top-k", "40", "--top-p", "0.9", "--seed", "3")
    out, _ = chat(folder, "the cat\nsat\n", *flags, "--system", "be brief")
    settings = {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "seed": 3}
    assert out == expected(folder, ["the cat", "sat"], "be brief", **settings)
    names = set(ChatOptions("x").settings)
    sampling = {"temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"}
    assert names == {"max_new_tokens", "top_logprobs", *sampling}


def test_flags_that_no_answer_changes(folder, chat):
    whole = expected(folder, ["the cat"], repetition_penalty=1.3)
    stop = whole[3:5]
    out, err = chat(folder, "the cat\n", "--stop", stop, "--repetition-penalty", "1.3")
    assert out == whole.partition(stop)[0] + "\n" and "max_new_tokens" not in err
    ids = without_additions(folder).encode(whole.strip())
    flags = ("--stop-token-ids", str(ids[-1]), "--repetition-penalty", "1.3")
    assert len(chat(folder, "the cat\n", *flags)[0]) < len(whole)
    narrow = ("--weights", "int8", "--kv-cache", "int8", "--prompt-lookup-num-tokens", "2")
    assert chat(folder, "the cat\n", *narrow)[1].count("stopped after max_new_tokens") == 1
    assert "group_size 128 divides, got 32" in chat(folder, "", "--weights", "int4", code=USAGE)[1]
    flags = ("--weights", "int4", "--group-size", "32")
    assert "group_size 32 divides, got 48" in chat(folder, "", *flags, code=USAGE)[1]


def test_the_most_likely_tokens_are_shown_after_an_answer(folder, chat):
    lines = "/set top_logprobs=2\nthe cat\n/set top_logprobs=-1\n"
    out, err = chat(folder, lines, code=FAILED)
    assert out == expected(folder, ["the cat"])
    shown = [re.fullmatch(r"(.+) (.+)% of \1 \2%, .+ (.+)%", line) for line in err.splitlines()]
    rows = [match for match in shown if match]
    # the greedy token is the most likely
    assert 1 <= len(rows) <= 12
    assert all(float(row[2]) >= float(row[3]) for row in rows)
    assert "top_logprobs must be at least 0, got -1" in err


def test_reset_and_system_and_set(folder, chat):
    lines = [
        "the cat", "/reset", "the dog", "/system be brief", "/reset", "the cat",
        "/system", "/reset", "/set temperature = 0.7", "/set seed=5", "the cat",
        "/set temperature=none", "/set seed=None", "/reset", "//help",
    ]  # fmt: skip
    out, err = chat(folder, "\n".join(lines))
    assert out == "".join([
        expected(folder, ["the cat"]),
        expected(folder, ["the dog"]),
        expected(folder, ["the cat"], "be brief"),
        expected(folder, ["the cat"], temperature=0.7, seed=5),
        expected(folder, ["/help"]),
    ])  # fmt: skip
    assert "/quit" not in err


def test_help_shows_the_commands_and_set_the_settings(folder, chat):
    out, err = chat(folder, "/help\n/set\n/quit\nthe cat\n")
    assert out == ""
    for word in ("/reset", "/system TEXT", "/set NAME=VALUE", "/quit", "Ctrl-C"):
        assert word in err
    assert "max_new_tokens=12\ntemperature=None\n" in err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/rest", "there is no command /rest; /help lists them"),
        ("/set heat=3", "setting must be one of max_new_tokens, temperature, .*, got 'heat'"),
        ("/set temperature=hot", "temperature must be a number, got 'hot'"),
        ("/set temperature", "temperature must be a number, got ''"),
        ("/set temperature=-1", "temperature must be a number of at least 0, got -1.0"),
        ("/set top_k=1.5", "top_k must be a whole number, got '1.5'"),
        ("/set max_new_tokens=0", "max_new_tokens must be above 0, got 0"),
        ("/set max_new_tokens=none", "max_new_tokens must be a whole number, got 'none'"),
        ("/set seed=99999999999999999999", "seed must be a whole number of 64 bits"),
        ("never", "chat_template.jinja: I never do"),
        ("lone \udcff", "must be text that UTF-8 can hold"),
        ("the cat " * 200, r"room for an answer in the context of 256 tokens, got \d{3}"),
    ],
)
def test_what_cannot_be_done_is_said_and_changes_nothing(line, message, folder, chat):
    # who reads the answers of a pipe learns that one is missing
    out, err = chat(folder, f"the cat\n{line}\nsat\n", code=FAILED)
    assert out == expected(folder, ["the cat", "sat"])
    (said,) = (text for text in err.splitlines() if not text.startswith("stopped after"))
    assert re.search(message, said), said


@pytest.mark.parametrize(
    ("flags", "message", "code"),
    [
        (["--temperature", "-1"], "temperature must be a number of at least 0, got -1.0", USAGE),
        (["--max-new-tokens", "0"], "max_new_tokens must be above 0, got 0", USAGE),
        (["--seed", str(2**64)], "seed must be a whole number of 64 bits", USAGE),
        (
            ["--prompt-lookup-num-tokens", "-1"],
            "prompt_lookup_num_tokens must be at least 0",
            USAGE,
        ),
        (["--stop", ""], "stop must be strings that are not empty, got ('',)", USAGE),
        (["--sytem", "x"], "did you mean --system?", USAGE),
    ],
)
def test_wrong_flags_are_refused_at_once(flags, message, code, tmp_path, chat):
    out, err = chat(tmp_path / "no model", "", *flags, code=code)
    assert out == "" and message in err


@pytest.mark.parametrize("token", [-1, 99999])
def test_stop_tokens_that_the_model_does_not_know_are_refused_at_once(token, folder, chat):
    out, err = chat(folder, "the cat\n", "--stop-token-ids", str(token), code=USAGE)
    assert out == "" and re.fullmatch(
        rf"fastlm: .*stop_token_ids must be .*, got \({token},\)\n", err
    )


def test_impossible_sampling_of_the_model_is_refused_at_once(folder, tmp_path, chat):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text('{"do_sample": true, "top_k": -1}')
    out, err = chat(tmp_path, "the cat\n", code=FAILED)
    assert out == "" and "generation_config.json: top_k must be a whole number" in err
    # a flag wins
    flags = ("--top-k", "5", "--seed", "1")
    assert chat(tmp_path, "the cat\n", *flags)[0] == expected(folder, ["the cat"], top_k=5, seed=1)


def test_a_broken_template_is_refused_at_once(tmp_path, chat):
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    _, err = chat(tmp_path, "the cat\n", code=FAILED)
    assert "chat_template.jinja: line 1: Expected an expression" in err


def test_without_a_template_text_is_continued(plain, chat):
    out, err = chat(plain, "the cat\nthe dog\n", "--system", "animals")
    assert err.count("has no chat template: what you write is continued as plain text") == 1
    lm = fastlm.load(plain)
    first = lm.generate("animals\nthe cat", 12)
    second = lm.generate(f"animals\nthe cat{first}\nthe dog", 12)
    assert out == f"{first}\n{second}\n"


def test_a_model_that_breaks_ends_its_answer_and_not_the_program(folder, chat, monkeypatch):
    stream = LanguageModel.stream

    def broken(self, prompt, *args, **options):
        items = stream(self, prompt, *args, **options)
        if "sat" not in prompt:
            return items
        raise_ = FloatingPointError("generate: the model's logits are not finite")
        return itertools.chain(itertools.islice(items, 1), raising(raise_))

    monkeypatch.setattr(LanguageModel, "stream", broken)
    out, err = chat(folder, "sat\n/reset\nthe cat\n", code=FAILED)
    assert out.endswith(expected(folder, ["the cat"])) and out.count("\n") > 1
    assert err.count("the model's logits are not finite") == 1


def raising(error):
    raise error
    yield


def test_ctrl_c_stops_an_answer_and_not_the_program(folder, chat, monkeypatch):
    stream, calls = LanguageModel.stream, []

    def interrupted(self, prompt, *args, **kwargs):
        calls.append(prompt)
        for number, item in enumerate(stream(self, prompt, *args, **kwargs)):
            if number == 4 and len(calls) == 1:
                signal.raise_signal(signal.SIGINT)
            yield item

    monkeypatch.setattr(LanguageModel, "stream", interrupted)
    out, err = chat(folder, "the cat\nsat\n", "--seed", "1", "--temperature", "1")
    items = stream(without_additions(folder), calls[0], 12, seed=1, temperature=1.0)
    part = "".join(item.text for item in itertools.islice(items, 4))
    assert out.startswith(f"{part}\n") and out.count("\n") >= 2
    assert err.count("stopped\n") == 1
    # what was said of the answer is part of the conversation
    assert f"[assistant] {part}{END}\n[user] sat" in calls[1]


def without_additions(folder: Path) -> LanguageModel:
    lm = fastlm.load(folder)
    lm.tokenizer.post_processor = None
    return lm


# makes standard input the terminal of this process, so that Ctrl-C there is a signal here
IN_TERMINAL = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from fastlm.cli import main
sys.exit(main())
"""


def test_in_a_terminal(tmp_path):
    folder = write_model(tmp_path, 8192)
    outer, inner = pty.openpty()
    flags = [str(folder), "--max-new-tokens", "8000"]
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", IN_TERMINAL, "chat", *flags],
        stdin=inner, stdout=inner, stderr=inner, start_new_session=True,
        env={**os.environ, "TERM": "dumb"},
    )  # fmt: skip
    os.close(inner)
    try:
        assert "/help lists the commands" in read_until(outer, "> ")
        os.write(outer, b"the cat\n")
        # the line itself, and then some of the answer
        read_until(outer, "the cat\r\n")
        read_until(outer, "")
        os.write(outer, b"\x03")
        read_until(outer, "stopped\r\n> ")
        # with nothing to stop it forgets what was typed
        os.write(outer, b"typo")
        read_until(outer, "typo")
        # a signal between two keys is seen, one between key and waiting only with the next key
        time.sleep(0.3)
        os.write(outer, b"\x03")
        read_until(outer, "> ")
        # who types sees what is refused: it is no failure of the program
        os.write(outer, b"/set seed=x\n")
        read_until(outer, "whole number, got 'x'\r\n> ")
        os.write(outer, b"/set seed=1\n")
        assert "typo" not in read_until(outer, "> ")
        os.write(outer, b"\x04")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(outer)


def read_until(terminal: int, text: str) -> str:
    seen = ""
    while not seen or text not in seen:
        ready, _, _ = select.select([terminal], [], [], 30)
        assert ready, f"{text!r} does not come after {seen!r}"
        seen += os.read(terminal, 4096).decode(errors="replace")
    return seen


# ---- conversations


def test_a_prompt_has_the_tokens_that_transformers_gives_it(folder):
    conversation = open_conversation(folder)
    conversation.messages = [{"role": "user", "content": "the cat"}]
    prompt, length = conversation._prompt(conversation.messages)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    want = tokenizer.apply_chat_template(
        conversation.messages, add_generation_prompt=True, return_dict=False
    )
    assert conversation._model.encode(prompt) == want and length == len(want)
    assert want.count(tokenizer.bos_token_id) == 1


def test_the_token_that_ends_a_turn_ends_an_answer(folder):
    lm, text = fastlm.load(folder), "{{ messages[-1].content }}"
    free = list(Conversation(lm, ChatTemplate(text)).answer("the cat", 9, seed=2, temperature=1.0))
    ids = [item.id for item in free]
    last = next(n for n in range(2, 9) if ids[n] not in ids[:n])
    ends = {"eos_token": lm.tokenizer.id_to_token(ids[last])}
    conversation = Conversation(lm, ChatTemplate(text, ends))
    items = list(conversation.answer("the cat", 9, seed=2, temperature=1.0))
    assert items[:-1] == free[:last] and items[-1].finish == "eos"
    said = "".join(item.text for item in items)
    assert conversation.messages[-1] == {"role": "assistant", "content": said}


def test_an_answer_may_be_left_before_it_begins(folder):
    conversation = open_conversation(folder)
    conversation.answer("the cat").close()
    assert [m["role"] for m in conversation.messages] == ["user", "assistant"]
    items = conversation.answer("sat", 9)
    text = next(items).text + next(items).text
    assert conversation.messages[-1] == {"role": "assistant", "content": text}
    conversation.reset()
    assert conversation.messages == []


def test_the_oldest_turns_are_forgotten_but_not_the_instruction(tmp_path):
    conversation = open_conversation(write_model(tmp_path, 96), "be brief")
    lost = 0
    for number in range(6):
        list(conversation.answer(f"question {number}", 16))
        lost += conversation.forgotten
        kept = [m["content"] for m in conversation.messages if m["role"] == "user"]
        assert kept == [f"question {n}" for n in range(lost, number + 1)]
        assert conversation.messages[0] == {"role": "system", "content": "be brief"}
        _, length = conversation._prompt(conversation.messages[:-1])
        assert length <= 96 - 16
    assert 0 < lost < 6


def test_the_command_says_what_is_forgotten(tmp_path, chat):
    _, err = chat(write_model(tmp_path, 64), "question one\nquestion two\nquestion three\n")
    assert "the conversation passes the context of 64 tokens: its 1 oldest turn is forgotten" in err


def test_an_answer_ends_where_the_context_does(tmp_path, chat):
    folder = write_model(tmp_path, 40, template=None)
    _, err = chat(folder, "the cat\n", "--max-new-tokens", "99")
    assert "stopped where the context of 40 tokens is full" in err


def test_a_question_that_is_refused_is_no_part_of_the_conversation(folder):
    conversation = open_conversation(folder)
    list(conversation.answer("the cat", 3))
    before = list(conversation.messages)
    for question, settings in (("the cat " * 200, {}), ("never", {}), ("x", {"top_p": 2.0})):
        with pytest.raises(ValueError):
            conversation.answer(question, 3, **settings)
        assert conversation.messages == before
