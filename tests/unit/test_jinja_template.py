"""A template that does not compile, does not end or reaches outside is one line with its name, never a stack trace."""

from __future__ import annotations

import pytest

from sft_dist.data.bounded_jinja import MAX_CHARACTERS, MAX_STEPS
from sft_dist.data.chat_template import ChatRenderer
from sft_dist.data.jinja_template import JinjaTemplate, TemplateFailure
from sft_dist.errors import DataError
from tests.helpers.templates import LLAMA3, MISTRAL, NO_EOS, QWEN, R1, build_tokenizer

MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
DOUBLING = "{%% set ns = namespace(s='ab') %%}{%% for i in range(99) %%}\n%s{%% endfor %%}"


def render(source: str) -> str:
    return JinjaTemplate(source, name="my.jinja", variables={}).render(MESSAGES, None)


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("\n{% for %}", "my.jinja: line 2 is not valid Jinja: Expected an expression"),
        ("{% if x %}", "my.jinja: line 1 is not valid Jinja: Unexpected end of template"),
        ("a\n\n{{ x | nofilter }}", "my.jinja: line 3 is not valid Jinja: No filter named 'nofilter'."),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "my.jinja: the chat template cannot be compiled: "),
        ("{% for a in x %}" * 30 + "{% endfor %}" * 30, "my.jinja: the chat template cannot be compiled: "),
        ("{{ " + "9" * 5000 + " }}", "my.jinja: the chat template cannot be compiled: "),
    ],
)
def test_what_is_no_template(source: str, what: str) -> None:
    with pytest.raises(DataError) as raised:
        JinjaTemplate(source, name="my.jinja", variables={})
    assert raised.value.what.startswith(what)
    assert raised.value.fix == "correct the chat template"


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("{{ ''.__class__.__mro__ }}", "line 1: __mro__ is of Python's inside"),
        ("\n{{ ''['__class__'] }}", "line 2: __class__ is of Python's inside"),
        ("{{ cycler.__init__.__globals__.os }}", "line 1: __globals__ is of Python's inside"),
        ("\n{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "line 2: __class__ is of Python's inside"),
        ("{{ __builtins__ }}", "line 1: __builtins__ is of Python's inside"),
        ("\n\n{% include '/etc/passwd' %}", "line 3: {% include %} needs another file"),
        ("{% import 'a' as a %}", "line 1: {% import %} needs another file"),
        ("{% from 'a' import b %}", "line 1: {% from %} needs another file"),
        ("{% extends 'a' %}", "line 1: {% extends %} needs another file"),
    ],
)
def test_other_files_and_python_are_out_of_reach(source: str, what: str) -> None:
    with pytest.raises(DataError) as raised:
        JinjaTemplate(source, name="my.jinja", variables={})
    assert raised.value.what.startswith(f"my.jinja: {what}")


@pytest.mark.parametrize(
    "source",
    ["{{ ''['__cla' ~ 'ss__'].mro() }}", "{{ ''|attr('__class__')|attr('mro') }}{{ x() }}", "{{ messages.append(1) }}"],
)
def test_the_sandbox_refuses_what_is_only_found_while_rendering(source: str) -> None:
    with pytest.raises(TemplateFailure, match="line 1 of the template"):
        render(source)


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("{% for a in range(99999) %}\n{% for b in range(99999) %}{% endfor %}{% endfor %}", f"{MAX_STEPS:,} steps"),
        ("{% for a in range(99999) %}" + "x" * 999 + "{% endfor %}", f"more than {MAX_CHARACTERS:,} characters"),
        (
            "{% for a in range(99999) %}{{ messages[0].content.ljust(999) }}{% endfor %}",
            f"more than {MAX_CHARACTERS:,}",
        ),
        ("{% macro m(x) %}{{ m(x) }}{% endmacro %}\n{{ m(1) }}", "calls itself without end"),
        ("{% for x in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}", "calls itself without end"),
        ("{{ 'a' * 10**10 }}", "text or list longer than"),
        ("{{ [1] * 10**10 }}", "text or list longer than"),
        ("{{ 99 ** 99999999 }}", "a number of more than 4,096 bits"),
        ("{{ 'a'.ljust(10**10) }}", "the number 10000000000"),
        ("{{ 'a' | center(10000000000) }}", "the number 10000000000"),
        ("{{ [1] | tojson(indent=10000000000) }}", "the number 10000000000"),
        ("{{ '%99999999999d' % 1 }}", "99999999999 characters wide"),
        ("{{ '%99999999999d' | format(1) }}", "99999999999 characters wide"),
        ("{{ '{:99999999999}'.format(1) }}", "99999999999 characters wide"),
        (DOUBLING % "{% set ns.s = ns.s ~ ns.s %}", "my.jinja: line 2: it makes a text or list longer than"),
        (DOUBLING % "{% set ns.s = ns.s + ns.s %}", "my.jinja: line 2: it makes a text or list longer than"),
        (DOUBLING % "{% set ns.s = ns.s.replace('a', ns.s) %}", "text or list longer than"),
        (DOUBLING % "{% set ns.s = ns.s | replace('a', ns.s) %}", "text or list longer than"),
        (DOUBLING % "{% set ns.s = 'x'.join([ns.s, ns.s]) %}", "text or list longer than"),
        (DOUBLING % "{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}", f"more than {MAX_CHARACTERS:,} characters"),
        ("{% macro m(x) %}{{ m(x + x) }}{% endmacro %}{{ m('ab') }}", "text or list longer than"),
    ],
)
def test_a_template_without_end_ends(source: str, what: str) -> None:
    with pytest.raises(DataError) as raised:
        render(source)
    assert what in raised.value.what
    assert raised.value.what.startswith("my.jinja: line ")


def test_a_range_that_is_too_large_is_the_sandboxs_to_refuse() -> None:
    with pytest.raises(TemplateFailure, match=r"Range too big.*line 1 of the template"):
        render("{% for a in range(10**9) %}x{% endfor %}")


def test_a_failure_names_the_line_of_the_template() -> None:
    with pytest.raises(TemplateFailure, match=r"^only one \(line 3 of the template\)$"):
        render("{% for m in messages %}\n\n{{ raise_exception('only one') }}{% endfor %}")
    with pytest.raises(TemplateFailure, match=r"^division by zero \(line 2 of the template\)$"):
        render("\n{{ 1 / 0 }}")


def test_a_runaway_template_is_refused_as_it_is_loaded() -> None:
    runaway = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}" + NO_EOS
    with pytest.raises(DataError, match="steps for one conversation"):
        ChatRenderer(build_tokenizer("plain", None), runaway)


@pytest.mark.parametrize("source", [LLAMA3, MISTRAL, QWEN, R1])
def test_the_bounds_change_nothing_that_a_template_writes(source: str) -> None:
    tokenizer = build_tokenizer("plain", source.replace("strftime_now('%d %b %Y')", "'26 Jul 2024'"))
    jinja = JinjaTemplate(tokenizer.chat_template, name="t", variables=tokenizer.special_tokens_map)
    assert jinja.render(MESSAGES, None) == tokenizer.apply_chat_template(MESSAGES, tokenize=False)


def test_large_conversations_are_within_the_bounds() -> None:
    turns = [{"role": role, "content": "word " * 1000} for _ in range(500) for role in ("user", "assistant")]
    text = JinjaTemplate(QWEN, name="t", variables={}).render(turns, None)
    assert len(text) > 5_000_000
    ids = "{{ 1700000000 | default(1700000000) }}{{ '%d' | format(1700000000) }}{{ 'x'.join(['a', 'b']) }}"
    assert JinjaTemplate(ids, name="t", variables={}).render(turns, None) == "17000000001700000000axb"
