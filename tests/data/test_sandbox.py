"""Chat templates of strangers end, stay small and reach nothing."""

import time

import pytest

from megakd.data.chat_template import BadRecord, ChatTemplate
from megakd.errors import DataError

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
DOUBLED = "{% set ns=namespace(s='aaaa') %}{% for i in range(60) %}{% set ns.s = ns.s OP ns.s %}{% endfor %}"
BOMBS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops that write": "{% for i in range(99999) %}{% for j in range(999) %}xxxxxxxxxxxx{% endfor %}{% endfor %}",
    "calls": "{% macro a(n) %}{% if n %}{{ a(n-1) }}{{ a(n-1) }}{% endif %}{% endmacro %}{{ a(40) }}",
    "calls for ever": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "lipsum": "{{ lipsum(n=100000) }}",
    "a long text": "{{ 'a' * 10**12 }}",
    "a doubled text": DOUBLED.replace("OP", "~"),
    "a doubled sum": DOUBLED.replace("OP", "+"),
    "a wide filter": "{{ 'a'|center(10**9) }}",
    "a wide method": "{{ 'a'.ljust(10**9) }}",
    "a wide format": "{{ '%1000000000d' % 1 }}",
    "another wide format": "{{ '{:1000000000}'.format(1) }}",
    "replaced": "{{ ('a'*1000000)|replace('a','b'*1000000) }}",
    "joined": "{{ ''.join(['x'*999999]*999999) }}",
    "joined as it is made": "{{ (['x'*9999999]*99999)|map('upper')|join }}",
    "a long number": "{% set ns=namespace(n=9) %}{% for i in range(60) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "kept, not written": "{% set s %}{% for i in range(99999) %}{{ 'x'*9999999 }}{% endfor %}{% endset %}",
    "a range": "{{ range(10**8)|list }}",
    "brackets": "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}",
    "blocks": "{% for i in x %}" * 60 + "{% endfor %}" * 60,
    "a long source": "x" * (1 << 20) + "x",
    "Python": "{{ cycler.__init__.__globals__.os.system('false') }}",
    "classes": "{{ messages.__class__.__mro__ }}",
    "a file": "{% include '/etc/passwd' %}",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_are_refused(bomb, monkeypatch):
    monkeypatch.setenv("MEGAKD_LIMIT_TEMPLATE_SECONDS", "2")
    started = time.process_time()
    with pytest.raises((DataError, BadRecord)) as caught:
        ChatTemplate(BOMBS[bomb], {}).segments(MESSAGES, [False, True])
    assert str(caught.value) and time.process_time() - started < 20


def test_a_limit_that_stops_a_template_says_how_it_is_raised(monkeypatch):
    monkeypatch.setenv("MEGAKD_LIMIT_TEMPLATE_CHARACTERS", "20")
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", {})
    with pytest.raises(DataError, match="exceed the limit TEMPLATE_CHARACTERS = 20") as caught:
        template.segments([{"role": "user", "content": "x" * 21}], [False])
    assert "MEGAKD_LIMIT_TEMPLATE_CHARACTERS" in caught.value.hint
    assert template.segments(MESSAGES, [False, True])[0][-1].text == "yo", "a conversation after it is counted anew"


def test_what_templates_do_is_as_before():
    source = (
        "{% macro turn(m) %}{{ '<|' ~ m.role ~ '|>' + m['content'] | trim }}{% endmacro %}"
        "{% for m in messages if m.content %}{{ turn(m) }}{% if not loop.last %}\n{% endif %}"
        "{{ eos_token }}{% endfor %}"
        "{{ messages|map(attribute='role')|join(', ') }} {{ ['a','b']|join(d='-') }} {{ '%s=%d' % ('a', 3) }}"
        "{{ 'b'.replace('b', 'c') }}{{ [1, 2] + [3] }}{{ {'k': 1}|tojson }}{{ 2 ** 10 }}"
    )
    segments, _ = ChatTemplate(source, {"eos_token": "</s>"}).segments(MESSAGES[:1], [False])
    (text,) = [segment.text for segment in segments]
    assert text == '<|user|>hi</s>user a-b a=3c[1, 2, 3]{"k": 1}1024'
