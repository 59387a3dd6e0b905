"""Templates that would take forever or fill the memory, and those that must not notice."""

import time

import jinja2
import jinja2.ext
import jinja2.sandbox
import pytest

from nautilus.data.template import TEMPLATE, as_json, render_template
from nautilus.runtime import UserError

GROW = "{% set n = namespace(s=START) %}{% for i in range(60) %}{% set n.s = STEP %}{% endfor %}"
LONG = "{% set s = 'a' * 4000000 %}"


def grown(start, step):
    return GROW.replace("START", start).replace("STEP", step)


HOSTILE = (
    "{% for i in range(10**9) %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    LONG + "{% for a in s %}{% for b in s if false %}{% endfor %}{% endfor %}",
    LONG + "{% for i in range(99999) %}{{ s }}{% endfor %}",
    LONG + "{% set x %}{% for i in range(99999) %}{{ s }}{% endfor %}{% endset %}",
    LONG + "{% for i in range(99999) %}{% if 'b' in s %}{% endif %}{% endfor %}",
    LONG + "{{ ([s] * 99999) | join }}",
    LONG + "{{ ', '.join([s] * 99999) }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    grown("'aa'", "n.s ~ n.s"),
    grown("'aa'", "n.s + n.s"),
    grown("'aa'", "n.s.replace('a', 'aa')"),
    grown("'aa'", "n.s | replace('a', 'aa')"),
    grown("[1]", "n.s + n.s"),
    grown("[1]", "[n.s, n.s]") + "{{ n.s }}",
    grown("[1]", "[n.s, n.s]") + "{{ n.s | tojson }}",
    grown("[1]", "[n.s, n.s]") + "{{ n.s ~ '' }}",
    grown("[1]", "[n.s, n.s]") + "{{ '%s' % (n.s,) }}",
    grown("[1]", "[n.s, n.s]") + "{{ raise_exception(n.s) }}",
    grown("[1]", "[n.s, n.s]") + "{{ [n.s] | sort }}",
    grown("[1]", "[n.s, n.s]") + "{{ n.s == n.s[1:] }}",
    grown("[1]", "[n.s, n.s]") + "{{ n.s is eq 3 }}",
    grown("[1]", "[n.s, n.s]") + "{{ [3] | select('in', n.s) | list }}",
    grown("[1]", "[n.s, n.s]") + "{{ n.s.count(3) }}",
    grown("(1,)", "(n.s, n.s)") + "{{ {}[n.s] }}",
    grown("(1,)", "(n.s, n.s)") + "{{ {}.get(n.s) }}",
    grown("(1,)", "(n.s, n.s)") + "{{ {n.s: 1} }}",
    grown("[1]", "[n.s] * 500000") + "{{ n.s }}",
    "{{ ([[0] * 500000] * 500000) | sum(start=[]) }}",
    LONG + "{{ s | urlize }}",
    grown("3", "n.s * n.s"),
    grown("3", "n.s ** 9"),
    "{{ 'a' * 10**10 }}",
    "{{ 10**10 * 'a' }}",
    "{{ [0] * 10**10 }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ '{:>1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, '1000000000') }}",
    "{{ strftime_now('%1000000000d') }}",
    "{{ 'a'.center(10**10) }}",
    "{{ 'a' | center(10**10) }}",
    "{{ ['a'] | map('center', 10**10) | list }}",
    "{{ 'a' | indent(10**10, true) }}",
    "{{ [1] | tojson(indent=10**10) }}",
    "{{ [1] | batch(10**10, 0) | list }}",
)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("template", HOSTILE)
def test_a_hostile_template_is_refused_soon_and_by_name(template):
    begin = time.process_time()
    with pytest.raises(UserError, match="does more than any conversation needs: it") as caught:
        render_template(template, {"messages": []})
    assert template[:15] in str(caught.value).replace('"', "'") or template[:10] in str(caught.value)
    assert len(str(caught.value)) < 300 and time.process_time() - begin < 20


TALK = [
    {"role": "user", "content": "Hi, **you** of 12345 %s and {0}"},
    {"role": "assistant", "content": "a" * 300, "reasoning_content": "x\ny", "n": {"a": [1, {"b": "ü"}], "c": None}},
    {"role": "user", "content": ""},
]
USUAL = (
    TEMPLATE,
    "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.previtem.role if loop.index0 }}{% endfor %}",
    "{% for m in messages %}{{ m.n }}{% else %}none{% endfor %}",
    "{% for m in missing %}{% else %}none{% endfor %}{{ missing }}{{ missing is defined }}",
    "{% for m in messages | map(attribute='content') | select %}{{ m | length }}{% endfor %}",
    "{% for m in messages if m.role == 'user' %}{{ loop.last }}{{ m.content | upper | trim }}{% endfor %}",
    "{% for c in messages recursive %}{{ loop(c.values()) if c is mapping else c }}{% endfor %}",
    "{% macro f(x, y=2) %}{{ x }}{{ y }}{{ caller() if caller }}{% endmacro %}{{ f(1) }}{% call f(3) %}a{% endcall %}",
    "{% set x %}{% for m in messages %}{{ m.role }}{% endfor %}{% endset %}{{ x | length }}{{ x ~ 1 ~ none ~ [x] }}",
    "{{ '**%s** %05.2f' % ('a', 2) }}{{ '{:>9}|{a}'.format('x', a=1) }}{{ '%s' | format('b') }}{{ 7 % 4 }}",
    "{{ messages[0].content.split(' ') | join('-') }}{{ messages[::-1][0].role }}{{ messages[-1] }}{{ 'ab'[1:] }}",
    "{{ messages | tojson(indent=2) }}{{ 3 * 'ab' }}{{ [1] * 3 + [2] }}{{ 1 < 2 < 3 }}{{ 'a' in 'cat' }}{{ 2 ** 10 }}",
    "{{ messages | groupby('role') | list | length }}{{ [3, 1] | sort | first }}{{ messages | sum(attribute='x') }}",
    "{% for k, v in messages[1] | dictsort %}{{ k }}={{ v | string }}{% endfor %}{{ dict(a=1) | items | list }}",
    "{{ 'a b c' | replace('b', 'x') | indent(4, true) | title }}{{ 'x' | center(9) }}{{ 1000000 | string }}",
)


@pytest.mark.parametrize("template", USUAL)
def test_an_ordinary_template_gives_the_text_that_jinja_gives(template):
    plain = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    plain.filters["tojson"] = as_json
    messages = [message | {"x": 1} for message in TALK] if "sum(" in template else TALK
    assert render_template(template, {"messages": messages}) == plain.from_string(template).render(messages=messages)


def test_large_numbers_in_a_conversation_are_only_numbers():
    text = "{% macro f(n) %}{{ n }}{% endmacro %}{{ f(messages[0].n) }} {{ messages[0].n | tojson }}"
    number = 1 << 60
    assert render_template(text, {"messages": [{"n": number}]}) == f"{number} {number}"


def test_what_a_long_conversation_needs_is_allowed():
    talk = [{"role": ("user", "assistant")[i % 2], "content": "word " * 100} for i in range(4000)]
    assert len(render_template(TEMPLATE, {"messages": talk})) > 2_000_000
    page = [{"role": "user", "content": "word " * 4_000_000}]
    assert len(render_template(TEMPLATE, {"messages": page})) > 20_000_000
    built = "{% set n = namespace(t='') %}{% for m in messages %}{% set n.t = n.t ~ m.content %}{% endfor %}{{ n.t }}"
    assert len(render_template(built, {"messages": talk[:400]})) == 200_000
