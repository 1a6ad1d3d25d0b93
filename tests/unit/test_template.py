"""A chat template is a program that came with the model: it may do its work and no more."""

import json
import resource
import threading
import time

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mlx_dist.engine import allowance, template
from mlx_dist.engine.allowance import bounded
from mlx_dist.engine.patience import Patience
from mlx_dist.engine.text import Tokenizer
from mlx_dist.errors import RequestError
from tests.models import write_template

ROOMY = {"max_position_embeddings": 100_000}
HELLO = [{"role": "user", "content": "Hello"}]
# Some 8 million characters.
BIG = "{% set x = 'a' * 8000000 %}"
DOUBLED = "".join(f"{{% set x{i + 1} = [x{i}, x{i}] %}}" for i in range(60))
RESULTS = "".join(f"{{% set x{i} = x[1:] %}}" for i in range(40))


def render(source, **variables):
    environment = template.BoundedEnvironment()
    with bounded():
        return environment.from_string(source).render(messages=HELLO, **variables)


ATTACKS = {
    "a long text": "{{ 'a' * 10 ** 10 }}",
    "a long text by a number in front": "{{ 10 ** 10 * 'a' }}",
    "a long list": "{{ [0] * 10 ** 10 }}",
    "a long number": "{{ 10 ** 10 ** 10 }}",
    "long numbers": "{% set n = namespace(x=7) %}{% for i in range(99) %}"
    "{% set n.x = n.x * n.x %}{% endfor %}",
    "a number of many digits": "{{ ('1' * 4000000) | int(base=2) }}",
    "nested ranges": "{% for a in range(99999) %}{% for b in range(99999) %}"
    "{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "nested ranges of text": "{% for a in range(99999) %}{% for b in range(99999) %}"
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa{% endfor %}{% endfor %}",
    "a range too long": "{{ range(10 ** 9) | list }}",
    "macros that call": "{% macro f(n) %}{% for i in range(999) %}{{ f(n) if n else '' }}"
    "{{ f(n - 1) if n else '' }}{% endfor %}{% endmacro %}{{ f(9) }}",
    "a loop that recurs": "{% for i in range(999) recursive %}"
    "{{ loop(range(999)) if loop.depth < 9 else '' }}{% endfor %}",
    "a text that doubles": "{% set n = namespace(x='a') %}{% for i in range(99) %}"
    "{% set n.x = n.x + n.x %}{% endfor %}",
    "a text that doubles by ~": "{% set n = namespace(x='a') %}{% for i in range(99) %}"
    "{% set n.x = n.x ~ n.x %}{% endfor %}",
    "a text that doubles in a block": "{% set n = namespace(x='a') %}{% for i in range(99) %}"
    "{% set x %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = x %}{% endfor %}",
    "a list that doubles, shown": f"{{% set x0 = [1] %}}{DOUBLED}{{{{ x60 }}}}",
    "lists that double, compared": f"{{% set x0 = [1] %}}{DOUBLED}{{% set y = x60 %}}"
    f"{DOUBLED}{{{{ x60 == y }}}}",
    "tuples that double, as keys": "{% set x0 = (1, 2) %}"
    + DOUBLED.replace("[", "(").replace("]", ")")
    + "{{ {x60: 1} }}",
    "namespaces that double": "{% set x0 = namespace() %}"
    + DOUBLED.replace("[x", "namespace(a=x").replace(", x", ", b=x").replace("]", ")")
    + "{{ x60 }}",
    "replacing": f"{BIG}{{{{ x.replace('a', 'b' * 9999) }}}}",
    "replacing by a filter": f"{BIG}{{{{ x | replace('a', 'b' * 9999) }}}}",
    "replacing nothing": f"{BIG}{{{{ x.replace('', 'b' * 9999) }}}}",
    "joining": "{{ ('a' * 99999).join('b' * 99999) }}",
    "joining by a filter": "{{ range(99999) | join('b' * 99999) }}",
    "joining what has no length": "{{ range(99999) | map('string') | join('b' * 99999) }}",
    "joining it by a method": "{{ ('b' * 99999).join(range(99999) | map('string')) }}",
    "a wide field": "{{ '%10000000000d' % 1 }}",
    "a wide field by a filter": "{{ '%10000000000d' | format(1) }}",
    "a width of its own": "{{ '%*d' % (10 ** 10, 1) }}",
    "a wide field in braces": "{{ '{:>10000000000}'.format('a') }}",
    "a width in braces of its own": "{{ '{:>{w}}'.format('a', w='9999999999') }}",
    "many fields": f"{BIG}{{{{ ('{{0}}' * 9999).format(x) }}}}",
    "padding": "{{ 'a'.ljust(10 ** 10) }}",
    "padding by a filter": "{{ 'a' | center(10 ** 10) }}",
    "indenting": "{{ ('a\\n' * 9999) | indent(999999) }}",
    "indenting JSON": "{{ [1, 2, 3] | tojson(indent=10 ** 10) }}",
    "indenting JSON by a text": "{{ (range(9999) | list) | tojson(indent='a' * 99999) }}",
    "expanding tabs": "{{ ('\\t' * 9999).expandtabs(999999) }}",
    "filling batches": "{{ [1] | batch(10 ** 10, 0) | list }}",
    "many results at a time": "{{ range(99999) | map('center', 999999) | list }}",
    "many parts of a text": f"{BIG}{RESULTS}",
    "a search from the end": "{{ ('a' * 4000000).rfind('b' + 'a' * 2000000) }}",
    "summing lists": "{{ ([[1]] * 200000) | sum(start=[]) | length }}",
    "bytes of a number": "{{ (5).to_bytes(10 ** 10, 'big') }}",
    "filler text": "{{ lipsum(n=10 ** 9) }}",
    "a slow encoding": "{{ ('ä' * 99999).encode('punycode') }}",
    "slow patterns": "{{ ('<' * 999999) | striptags }}",
    "a long template": "{# " + "a" * (1 << 18) + " #}",
    "deep brackets": "{{ " + "(" * 9999 + ")" * 9999 + " }}",
    "deep lists": "{{ " + "[" * 9999 + "]" * 9999 + " }}",
    "deep conditions": "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
    "deep loops": "{% for i in [1] %}" * 99 + "{% endfor %}" * 99,
    "a chain of operators": "{{ " + "- " * 50000 + "1 }}",
    "including": "{% include '/etc/passwd' %}",
    "importing": "{% import '/etc/passwd' as x %}",
    "extending": "{% extends '/etc/passwd' %}",
    "Python's inside": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "Python's inside by a filter": "{{ (['a'] | map(attribute='__class__') | list)[0].mro() }}",
    "Python's inside by attr": "{{ ('' | attr('__class__')).mro() }}",
    "Python's inside by a format": "{{ '{0.__class__.mro}'.format('a') }}",
    "the count itself": "{{ environment.tick(0) }}{{ self.environment.spend(-9) }}",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_template_that_would_use_too_much_is_refused(attack, monkeypatch):
    monkeypatch.setattr(allowance, "_MOST_CPU_S", 0.2)
    before_kb, start_s = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.thread_time()
    with pytest.raises(Exception):  # noqa: B017
        render(ATTACKS[attack])
    assert time.thread_time() - start_s < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb < 300_000


def test_it_is_the_models_template_that_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(allowance, "_MOST_CPU_S", 0.2)
    for source, reason in (
        ("{{ 'a' * 10 ** 10 }}", "more than 8388608 characters"),
        (ATTACKS["nested ranges"], "has not come to an end"),
    ):
        astray = Tokenizer(write_template(tmp_path, source), ROOMY)
        with pytest.raises(RequestError, match=f"chat template refuses the prompt: .*{reason}"):
            astray.encode_chat(HELLO)


# What templates of models do, each in a line or two.
ORDINARY = """\
{%- macro tool(t, depth=0) -%}{{ '  ' * depth }}{{ t.function.name | upper }}:
{%- for key, value in t.function.parameters | dictsort %} {{ key }}={{ value | tojson }}
{%- endfor %}{%- endmacro %}
{%- set ns = namespace(first=true, texts=[], last=-1) %}
{%- if tools %}{% for t in tools %}{{ tool(t, depth=loop.index0) }}{% endfor %}
{{- tools | tojson(indent=4) }}{{ tools | map(attribute='function') | map(attribute='name')
| join(', ') }}{% endif %}
{%- for m in messages[::-1] %}{% if m.role == 'user' and ns.last < 0 %}
{%- set ns.last = messages | length - 1 - loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role not in ['user', 'assistant'] %}{% continue %}{% endif %}
{%- set content = m.content if m.content is string else m.content[0].text %}
{%- if '</think>' in content %}
{%- set thought, content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1],
    content.split('</think>')[-1].lstrip('\n') %}{{ '[' ~ thought ~ ']' }}
{%- endif %}
{%- set ns.texts = ns.texts + [content | trim] %}
{{- '<|' + m['role'] + '|>' }}{{ content | replace('Hello', 'Bye') | default('', true) }}
{%- if loop.first %} first{% elif loop.last %} last {{ loop.index * 2 ** 3 % 7 }}{% endif %}
{%- endfor %}
{%- set block %}{{ ns.texts | join('|') }} {{ (3, 'a') }} {{ {'a': [1, 2.5, none]} }}{% endset %}
{{- block.title() }}{{ 'n={} {}'.format(ns.last, '%05.1f' % 2.25) }}{{ '%s-%d' | format('a', 3) }}
{{- messages | selectattr('role', 'equalto', 'user') | list | length }}
{{- messages[0].items() | list | first }}{{ messages[0].get('name', 'nobody') }}
{{- 'yes' if tools is defined and tools is not none and tools | length > 0 else 'no' }}
{{- 'Ünïcödé 🙂'[2:5] ~ undefined_thing ~ 1 }}{{ dict(a=1, **{'b': 2}) | items | list }}
{%- call(x) tool_like() %}{{ x }}{% endcall %}
"""
CALLED = "{% macro tool_like() %}<{{ caller('called') }}>{% endmacro %}"


def test_an_ordinary_template_writes_what_it_writes_unbounded():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": " Hello "}]},
        {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nYes."},
        {"role": "user", "content": "Hello\n"},
    ]
    tools = [
        {"function": {"name": name, "parameters": {"b": [1], "a": {"type": "ö"}}}} for name in "xy"
    ]
    options = {
        "trim_blocks": True,
        "lstrip_blocks": True,
        "extensions": ["jinja2.ext.loopcontrols"],
    }
    for given in (tools, None):
        written = [
            environment(**options)
            .from_string(CALLED + ORDINARY)
            .render(messages=messages, tools=given)
            for environment in (template.BoundedEnvironment, ImmutableSandboxedEnvironment)
        ]
        assert written[0] == written[1]
        assert "<|user|> Bye " in written[0] and "<called>" in written[0]


def test_a_long_chat_is_within_the_bounds():
    messages = [{"role": "user", "content": "word " * 200}] * 1000
    environment = template.BoundedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    with bounded():
        for _ in range(4):
            environment.from_string(CALLED + ORDINARY).render(messages=messages)


def test_work_that_does_not_end_is_left_to_itself():
    release = threading.Event()
    patient = Patience(limit_s=0.05, most_left=2)
    for _ in range(2):
        with pytest.raises(RequestError, match="the tokenizer takes more than 0 s"):
            patient.do("the tokenizer", release.wait)
    with pytest.raises(RequestError, match="still busy"):
        patient.do("the tokenizer", lambda: 3)
    release.set()
    for thread in patient._left:
        thread.join()
    assert patient.do("the tokenizer", lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        patient.do("the tokenizer", lambda: 1 / 0)


def test_a_pattern_that_takes_for_ever_is_refused(tmp_path):
    write_template(tmp_path, "{{ messages[0].content }}")
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    tokenizer["pre_tokenizer"] = split | {"pattern": {"Regex": "(a+)+$"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    slow = Tokenizer(tmp_path, ROOMY)
    for encode in (slow.encode_text, lambda t: slow.encode_chat([{"role": "user", "content": t}])):
        with pytest.raises(RequestError, match=r"tokenizer breaks on this prompt: .*retry-limit"):
            encode("a" * 40 + "!")
    assert slow.encode_text("Hello")
