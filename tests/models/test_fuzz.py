"Damaged GGUF files and odd chat templates: whatever comes, the only error is the project's own."
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import slow
from opd_nb.alignment.chat import ChatCodec
from opd_nb.core.errors import BadInput
from opd_nb.models.lm import tiny_folder
from opd_nb.tools.export_gguf import export_gguf

MINUTE = pytest.mark.parametrize('seconds', [10, pytest.param(60, marks=slow)])


@MINUTE
def test_gguf_headers(seconds, tmp_path):
    "In a process of its own, which must not end."
    pytest.importorskip('llama_cpp')
    from gguf import GGUFReader
    files = []
    for name in ('teacher', 'student'):
        file = export_gguf(f'tiny:{name}', tmp_path / f'{name}.gguf', 'f32')
        files.append(f'{file}={min(t.data_offset for t in GGUFReader(str(file)).tensors)}')
    first = 0 if seconds == 10 else 1000
    script = Path(__file__).with_name('fuzz_gguf.py')
    done = subprocess.run([sys.executable, str(script), str(first), str(seconds), str(tmp_path), *files], capture_output=True, text=True)
    lines = (tmp_path / 'results').read_text().splitlines()
    said = [line for line in lines if not line.startswith('seed')]
    print(f'{len(said)} files, {said.count("opened")} opened, {said.count("refused")} refused')
    assert done.returncode == 0, (lines[-1], done.stderr[-800:])
    assert not [line for line in said if line.startswith('escaped')] and said.count('refused') > 1


PIECES = [
    '{{ m.content }}', '{{ m.role }}', '<|im_start|>', '<|im_end|>', '\n', ' ', '</s>', '<think>\n\n</think>\n\n', '{{ bos_token }}', '{{ eos_token }}',
    "{{ raise_exception('no') }}", '{% if m.role == "system" %}', '{% else %}', '{% endif %}', '{% for x in m.content %}', '{% endfor %}', '{{ x }}', '{{ x.text }}',
    "{{ m['content'][0]['text'] }}", '{{ m.content.strip() }}', '{{ m.content | trim }}', '{{ m.content | upper }}', '{{ m.content[:3] }}', '{{ m.content | tojson }}',
    '{% if loop.last %}', '{% if loop.first %}', '{{ 1 / 0 }}', '{{ m.nothing.more }}', '{{ nothing }}', '{{ messages }}', '{{ 10 ** 10 }}', "{{ 'x' * 3 }}",
    '{{ namespace(a=1).a }}', '{% set a = m.content %}', '{{ a }}', '{{ m.items() }}', "{{ ''.__class__ }}", '{{ m.content.format(1) }}', '{{ strftime_now("%d") }}',
    '{% macro f(x) %}{{ x }}{% endmacro %}', '{{ f(m.content) }}', '{% break %}', '{% continue %}', '{# #}', '{%- -%}', '{{', '}}', '{%', '%}', '\ud83d', '\x00', 'é🦊', '{{ m.content | length }}',
    '{% generation %}', '{% endgeneration %}', '{{ range(3) | list }}', '{{ m.content.encode() }}', '{{ m.tool_calls }}', '{{ tools }}', '{% include "x" %}', '{% import "x" as y %}', '{{ self }}']
START = '{% for m in messages %}'
END = '{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
TALKS = [[dict(role='user', content='Make 31 from 3 7 10.')],
         [dict(role='system', content='Be short.'), dict(role='user', content='Hi 🦊'), dict(role='assistant', content='Hi.\n'), dict(role='user', content=' <|im_end|> {{ x }}')],
         [dict(role='user', content='')], [dict(role='tool', content='{"a": 1}'), dict(role='user', content=[dict(type='text', text='Hi')])]]


def template(base, rng):
    "A template made of pieces, or a good one with changes."
    if rng.random() < .5: return START + ''.join(rng.choices(PIECES, k=rng.randrange(1, 9))) + (END if rng.random() < .8 else '')
    text = list(base)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(text))
        change = rng.random()
        if change < .4: text[at] = rng.choice(PIECES)
        elif change < .7: del text[at:at + rng.randrange(1, 12)]
        else: text[at] = rng.choice('{}%"\'| \n()[]')
        text = text or ['']
    return ''.join(text)


def use(tok):
    "A codec of this tokenizer, on some conversations."
    codec, made = ChatCodec(tok), 0
    for talk in TALKS:
        try:
            ids = codec.prompt(talk)
            assert all(type(i) is int for i in ids)
            made += 1
        except BadInput: pass
    codec.read(list(codec.write(b'7*3=21', True)[0]))
    return made


@pytest.mark.parametrize('name', ['teacher', 'student'])
@MINUTE
@pytest.mark.filterwarnings('ignore')
def test_chat_templates(seconds, name):
    "Made of pieces that templates have, and of a real one with changes: used, or a sentence."
    from transformers import AutoTokenizer
    tok = AutoTokenizer.from_pretrained(tiny_folder(name))
    base, seed, end = tok.chat_template, 0 if seconds == 10 else 10**6, time.monotonic() + seconds / 2
    used = refused = 0
    while time.monotonic() < end:
        rng, seed = random.Random(f'{name} {seed}'), seed + 1
        tok.chat_template = template(base, rng)
        try:
            use(tok)
            used += 1
        except BadInput as e:
            refused += 1
            assert str(e).isprintable() or '\n' not in str(e)
        except Exception as e:
            raise AssertionError(f'seed {seed - 1}: {type(e).__name__} escaped from {tok.chat_template!r}') from e
    print(f'{used + refused} templates, {used} used, {refused} refused')
    assert used > 5 and refused > 5
