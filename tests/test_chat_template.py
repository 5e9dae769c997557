"""Chat templates: the text that transformers makes, and clear words for those that are bad."""

from __future__ import annotations

import json

import pytest
from support.models import tiny_tokenizer
from transformers import PreTrainedTokenizerFast

import fastlm
from fastlm.inference.chat import ChatTemplate, ChatTemplateError

CHATML = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- set ns.last = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set thought = message.role == 'assistant' and '</think>' in message.content %}
    {%- if thought and loop.index0 < ns.last %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
    {%- else %}
        {%- set content = message.content %}
    {%- endif %}
    {%- if message.role == 'system' and loop.first %}
        {%- continue %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- generation %}
    {{- content + '<|im_end|>' }}
    {%- endgeneration %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
LLAMA3 = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if tools is not none and tools %}
    {{- raise_exception("no tools here") }}
{%- endif %}
{% if messages[0]['role'] == 'system' %}
    {% set system_message = messages[0]['content']|trim %}
    {% set messages = messages[1:] %}
{% else %}
    {% set system_message = "" %}
{% endif %}
{{ "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{ "Today Date: " + date_string }}
{{ system_message + "<|eot_id|>" }}
{% for message in messages %}
    {% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' %}
    {% set content = content + message['content'] | trim + '<|eot_id|>' %}
    {{ content }}
{% endfor %}
{{ {'documents': documents, 'ends': "<é>&'"} | tojson(indent=2) }}
{% if add_generation_prompt %}
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{% endif %}
"""
MISTRAL = """\
{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}\
{% set system = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% endif %}
{{ bos_token }}{% for message in loop_messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('After the optional system message, roles must alternate user/assistant!') }}
{% endif %}
{% if message['role'] == 'user' %}
{% if loop.first and system is defined %}
{{ '[INST] ' + system + '\\n\\n' + message['content'] + ' [/INST]' }}{% else %}
{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endif %}
{% elif message['role'] == 'assistant' %}
{{ ' ' + message['content'] + eos_token }}{% else %}
{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}
"""
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL}
USER, ANSWER = {"role": "user", "content": " Hi <é>\n"}, {"role": "assistant", "content": "Ho"}
SYSTEM = {"role": "system", "content": "Be brief.\n"}
THOUGHT = {"role": "assistant", "content": "<think>\nhm\n</think>\n\n42"}
CONVERSATIONS = [
    [USER],
    [SYSTEM, USER],
    [USER, ANSWER, USER],
    [SYSTEM, USER, THOUGHT, USER, ANSWER],
]


def theirs(template, **tokens):
    return PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer(), chat_template=template, **tokens
    )


@pytest.mark.parametrize("generation", [False, True])
@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_that_of_transformers(name, messages, generation, tmp_path):
    tokenizer = theirs(TEMPLATES[name], bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(tmp_path)
    template = ChatTemplate.read(tmp_path)
    assert template.tokens["bos_token"] == "<s>"
    want = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
    assert template.render(messages, add_generation_prompt=generation) == want
    assert messages in CONVERSATIONS and "Hi" in want


@pytest.mark.parametrize(
    "template",
    [
        "{% generation %}{% set x = 1 %}{{ x }}{% endgeneration %}{{ x }}",
        "{% for i in range(9) %}{% if i == 5 %}{% break %}{% endif %}{{ i }}\n{% endfor %}\n",
        "  {% if true %}\n  yes\n  {% endif %}\n{# remark #}\nend\n",
        "{{ {'b': 1, 'a': [none, true]} | tojson(sort_keys=true, separators=(',', ':')) }}",
        "{{ bos_token }}|{{ pad_token }}|{{ nothing }}|{{ nothing is defined }}",
        "{% set n = namespace(self=1, x=2) %}{% set n.x = 3 %}{{ n.self }}{{ n.x }}",
        "{{ messages | length }}{{ messages | map(attribute='role') | join(',') }}",
        "{{ dict(a=1).items() | list }}{{ 'x'.upper() }}{{ ' y '.strip() ~ 1 }}",
    ],
)  # fmt: skip
def test_corners_of_the_language_are_those_of_transformers(template):
    messages = [USER, ANSWER]
    tokenizer = theirs(template, bos_token="<s>", pad_token="<p>")
    ours = ChatTemplate(template, {"bos_token": "<s>", "pad_token": "<p>"})
    want = tokenizer.apply_chat_template(messages, tokenize=False)
    assert ours.render(messages, add_generation_prompt=False) == want


# ---- where they are found


def test_a_folder_without_a_template_has_none(tmp_path):
    assert ChatTemplate.read(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    assert ChatTemplate.read(tmp_path) is None


@pytest.mark.parametrize(
    ("config", "file", "want"),
    [
        ({"chat_template": "A{{ bos_token }}"}, None, "A<s>"),
        ({"chat_template": "A"}, "B{{ bos_token }}", "B<s>"),
        (
            {"chat_template": [{"name": "tool_use", "template": "T"},
                               {"name": "default", "template": "D"}]},
            None, "D",
        ),
        ({"chat_template": [{"name": "rag", "template": "R"}]}, None, None),
        ({"bos_token": {"content": "<b>", "lstrip": False}}, "{{ bos_token }}", "<b>"),
        ({"bos_token": None}, "{{ bos_token is defined }}", "False"),
    ],
)  # fmt: skip
def test_it_is_in_the_file_of_its_own_or_in_the_tokenizers(config, file, want, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", **config}))
    if file is not None:
        (tmp_path / "chat_template.jinja").write_text(file)
    template = ChatTemplate.read(tmp_path)
    assert want == (template and template.render([USER]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", b"{", "tokenizer_config.json: cannot be read as JSON"),
        ("tokenizer_config.json", b'{"chat_template": 3}', "chat_template must be text, got 3"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja: cannot be read"),
        ("chat_template.jinja", b"{% if %}", "chat_template.jinja: line 1: Expected an expression"),
        ("chat_template.jinja", b"\n{% fi %}", "line 2: Encountered unknown tag 'fi'"),
    ],
)
def test_files_that_hold_no_template_are_named(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises((ChatTemplateError, fastlm.ModelFileError), match=message) as caught:
        ChatTemplate.read(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


# ---- bad ones


BAD = {
    "refuses": ("{{ raise_exception('only\n one role') }}", "only one role"),
    "class": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    "globals": ("{{ cycler.__init__.__globals__.os.system('id') }}", "unsafe"),
    "attr": ("{{ (''|attr('__class__')).__base__ }}", "unsafe"),
    "format": ("{{ '{0.__class__.__mro__}'.format(messages) }}", "unsafe"),
    "mutates": ("{{ messages.append(1) }}", "not safely callable|unsafe"),
    "clears": ("{{ messages[0].clear() }}", "not safely callable|unsafe"),
    "namespace": ("{% set n = namespace() %}{% set n.__html__ = 1 %}", "no attribute '__html__'"),
    "namespace made": ("{{ namespace(**{'__class__': 1}) }}", "no attribute '__class__'"),
    "files": ("{% include '/etc/passwd' %}", "no loader"),
    "undefined": ("{{ messages[0].nothing.at_all }}", "nothing"),
    "types": ("{{ messages[0].content + 1 }}", "concatenate"),
    "zero": ("{{ 1 / 0 }}", "division by zero"),
    "range": ("{% for i in range(1000000000) %}{% endfor %}", "Range too big"),
    "memory": ("{{ 'x' * 1000000000000000 }}", "MemoryError"),
    "power": ("{{ 2.0 ** 5000 }}", "out of range|too large"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "json": ("{{ raise_exception | tojson }}", "not JSON serializable"),
    "filter": ("{{ messages | first | upper | nothing }}", "nothing"),
    "unpack": ("{% for a, b, c in [(1, 2)] %}{% endfor %}", "unpack"),
}


@pytest.mark.parametrize("name", BAD)
def test_templates_that_fail_say_so_in_one_line(name):
    source, message = BAD[name]
    messages = [dict(USER)]
    with pytest.raises(ChatTemplateError, match=f"^here: .*({message})") as caught:
        ChatTemplate(source, origin="here").render(messages)
    assert "\n" not in str(caught.value)
    assert messages == [USER]


def test_what_is_said_is_no_template():
    message = {"role": "user", "content": "{{ 1 + 1 }}{% if %}"}
    assert ChatTemplate("{{ messages[0].content }}").render([message]) == message["content"]
