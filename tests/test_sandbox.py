"""Chat templates run as they do elsewhere, and cannot do more: not end, grow, or reach out."""

import json
import threading
import time

import pytest

from mini_forge.data import sandbox
from mini_forge.data.sandbox import TemplateFailure, compile_template

GROW = "{%% set ns = namespace(s='ab') %%}{%% for i in range(99) %%}%s{%% endfor %%}"


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set r = range(9999) %}{% for i in r %}{% for j in r %}{% for k in r %}{% endfor %}{% endfor %}{% endfor %}",
        "{% set r = range(99999) %}{% for i in r if r | map('string') | join == 'x' %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    ],
)
def test_a_template_that_does_not_end_is_stopped_in_any_thread(source, monkeypatch):
    monkeypatch.setattr(sandbox, "LIMIT_SECONDS", 0.2)
    messages = []

    def work():
        try:
            compile_template(source)()
        except sandbox.TemplateTimeout as timeout:
            messages.append(str(timeout))

    began = time.monotonic()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)
    assert time.monotonic() - began < 5 and "longer than 0.2 s" in messages[0]


def test_a_row_may_nest_as_deeply_as_json_does():
    deep = json.loads('{"k":' * 900 + "1" + "}" * 900)
    assert compile_template("{{ messages | length }}")(messages=[{"tools": deep}]) == "1"


def test_what_may_be_spelled_grows_with_what_is_given(monkeypatch):
    monkeypatch.setattr(sandbox, "LIMIT_CHARACTERS", 100)
    spell = compile_template("{% for m in messages %}{{ m['content'] }}{{ m['content'] + '' }}{% endfor %}")
    long = [{"role": "user", "content": "x" * 1000}]
    assert spell(messages=long) == "x" * 2000
    with pytest.raises(TemplateFailure, match="spells more than"):
        compile_template("{{ messages[0]['content'] * 9 }}")(messages=long)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
        "{{ 'x' * 10**9 }}",
        "{{ [0] * 10**9 }}",
        "{% set n = 7 ** 900 %}{{ n ** n }}",
        "{{ 'x' | center(10000000000000) }}",
        "{{ 'x'.ljust(10000000000000) }}",
        "{{ '%10000000000000d' % 1 }}",
        "{{ '%10000000000000d' | format(1) }}",
        "{{ '{:10000000000000}'.format(1) }}",
        GROW % "{% set ns.s = ns.s + ns.s %}",
        GROW % "{% set ns.s = ns.s ~ ns.s %}",
        GROW % "{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}",
        GROW % "{% set ns.s = ns.s | replace('a', 'aaaa') %}",
    ],
)
def test_a_template_that_grows_without_bound_is_stopped(source):
    began = time.process_time()
    with pytest.raises(TemplateFailure, match="stopped: it"):
        compile_template(source)()
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% include 'x' %}", "no loader"),
        ("\n\n{{ nothing.at.all }}", "'nothing' is undefined (line 3 of the template)"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ raise_exception('no\nway') }}", "no way"),
    ],
)
def test_what_a_template_may_not_or_cannot_do_is_its_failure(source, reason):
    with pytest.raises(TemplateFailure) as caught:
        compile_template(source)(messages=[])
    assert reason in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("  {% if true %}\na{% endif %}\n", "a"),  # blocks leave no line of their own
        ("{{ data | tojson }}{{ [1] | tojson(indent=2) }}", '{"é": "<&>", "n": 12345678901}[\n  1\n]'),
        ("{{ 'a' ~ 1 ~ ('b' ~ none) }}{% set x %}y{% endset %}{{ x | upper }}", "a1bNoneY"),
        ("{{ data.n | string }}{{ '%.2f' | format(1) }}{{ none | default(10000000) }}", "123456789011.00None"),
        ("{{ 'Call 12:5551234567 now'.strip() }}", "Call 12:5551234567 now"),
    ],
)
def test_ordinary_templates_run_as_they_do_elsewhere(source, text):
    assert compile_template(source)(data={"é": "<&>", "n": 12345678901}) == text


DOUBLING = """{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}
{%- set ns.y = (ns.y, ns.y) %}{% endfor %}"""


@pytest.mark.parametrize("use", ["ns.x == ns.y", "ns.x", "ns.x | string", "ns.x | tojson", "ns.x ~ 'a'", "'%s' % ns.x"])
def test_lists_that_double_are_stopped_before_they_are_looked_through(use, monkeypatch):
    """At a lower limit, for time: to count both lists up to that as it is takes four seconds."""
    monkeypatch.setattr(sandbox, "LIMIT_CHARACTERS", 100_000)
    began = time.process_time()
    with pytest.raises(TemplateFailure, match="stopped: it spells more than"):
        compile_template(DOUBLING + "{{ " + use + " }}")()
    assert time.process_time() - began < 2


def test_a_list_that_doubles_is_stopped_in_seconds_at_the_limit_as_it_is():
    began = time.process_time()
    with pytest.raises(TemplateFailure, match="stopped: it spells more than"):
        compile_template(
            "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
        )()
    assert time.process_time() - began < 5


@pytest.mark.parametrize("source", [
    "{% set x = [1] %}" + "{% set x = {'a': x, 'b': x} %}" * 40 + "{{ x }}", "{{ ('a\n' * 1000000) | indent(20000) }}",
    "{{ ('a' * 3000000).translate({97: 'b' * 3000000}) }}", "{{ (['a' * 1000000] * 4000) | join | length }}",
    "{{ ('a' * 1000000).encode() * 1000000000 }}",
])  # fmt: skip
def test_text_that_grows_in_a_step_is_stopped_before_it_is_there(source):
    began = time.process_time()
    with pytest.raises(TemplateFailure, match="stopped: "):
        compile_template(source)()
    assert time.process_time() - began < 5


def test_what_python_cannot_name_is_a_failure():
    with pytest.raises(TemplateFailure):
        compile_template("{{ 1e999 | int }}")()


def test_lists_of_what_is_there_are_themselves():
    source = (
        "{% set pair = [m, m.role] %}{{ pair[1] }}{% for a, b in [(m.role, 1), ('x', 2)] %}{{ a }}{{ b }}{% endfor %}"
    )
    assert compile_template(source)(m={"role": "user"}) == "useruser1x2"
