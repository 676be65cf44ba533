"The words of the glossary in CONTRIBUTING.md: what it says we do not say is said nowhere."
import ast
import json
import re
import tokenize
from functools import cache
from io import StringIO
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = [p for p in sorted((ROOT / 'opd_nb').rglob('*.py')) if p.name != '_modidx.py' and p != ROOT / 'opd_nb' / '__init__.py']  # that one lists old names
NOTEBOOKS = [p for p in sorted((ROOT / 'nbs').rglob('*.ipynb')) if '.ipynb_checkpoints' not in p.parts]

# the ordinary meanings of a word, taken out before it is looked for
ORDINARY = dict(
    figure=r'matplotlib figures?|(the|a|of a|returns the) figure\b.{0,40}\b(page|picture|axes|closed|map)|A figure as part of (a|the) page|as heat map\. Returns the figure|`figures?`|-> figures|answer, figures|Returns the figure|gives the figures of',
    mark=r'(question|exclamation|section|punctuation|end|turn|order|chat|channel|quotation) marks?|marks? (each|\*?every|each of them|a|the|turns|spaces|warning)\b|(the|a|with(out)? the) mark\b(?=,|\.| of| it)|`(Task\.)?marks?`?|`▁`.{0,20}marks|mark turns|You mark|Mark (how|the|well)|mark\(|marks?:|marks? of|of marks|tokens mark|marks it',
    room=r'(no|has|have|is|as far as there is|less|leaves?|leave|make|and|memory|there is no|for|if there is no) room|room (for|on|left|that|was)',
    blank=r"`?blank`? (lines?|rows?|cells?)",
)
# where a word stays: a picture's figure, a saved format, a request whose replies are cached, or a page that is being rewritten
EXCEPT = dict(
    figure=('core/html', 'data/page', 'losses/checks', 'eval/report', 'eval/results', 'runs/quickstart', 'runs/distill'),
    mark=('eval/choices', 'teachers/generation_apis'),
    likeliest=('losses/', 'runs/quickstart'),
    blank=('runs/quickstart',),
)


def glossary() -> dict[str, str]:
    "What not to say -> the term, of the table in CONTRIBUTING.md; only words in backticks are looked for."
    text = (ROOT / 'CONTRIBUTING.md').read_text(encoding='utf-8').split('## Words')[1].split('\n## ')[0]
    rows = [[cell.strip() for cell in line.split('|')[1:4]] for line in text.splitlines() if line.startswith('| ')][1:]
    return {word: term for term, _, instead in rows for word in re.findall(r'`(\w+)`', instead)}


def said(source: str):
    "Comments, and strings of more than a word, of a module: what a reader, or a user, is told."
    for token in tokenize.generate_tokens(StringIO(source).readline):
        if token.type == tokenize.COMMENT or (token.type == tokenize.STRING and ' ' in token.string): yield token.start[0], re.sub(r'\{[^{}]*\}', '', token.string)


def names(source: str):
    "Names of functions, classes and parameters, as words."
    for node in ast.walk(ast.parse(source)):
        name = getattr(node, 'name', getattr(node, 'arg', None)) if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.arg)) else None
        if name: yield node.lineno, re.sub(r'_|(?<=[a-z])(?=[A-Z])', ' ', name)


def found(word: str, texts, place: str) -> list[str]:
    "Where a word is used in another than its ordinary meanings."
    if any(part in place for part in EXCEPT.get(word, ())): return []
    plain = re.compile(ORDINARY.get(word, '(?!)'), re.I)
    return [f'{place}:{at} {text.strip()[:90]}' for at, text in texts if word in text.lower() and re.search(rf'\b{word}s?\b', plain.sub('', text), re.I)]


def prose(nb: Path):
    for i, cell in enumerate(json.loads(nb.read_text(encoding='utf-8'))['cells']):
        text = ''.join(cell['source'])
        if cell['cell_type'] == 'markdown': yield from ((i, line) for line in text.splitlines())
        elif 'parameters' in cell['metadata'].get('tags', []): yield from said(text)


@cache
def texts() -> dict[str, list[tuple[int, str]]]:
    "Place -> (line or cell, text) of all that is looked at."
    sources = {str(p.relative_to(ROOT)): p.read_text(encoding='utf-8') for p in MODULES}
    out = {place: [*said(source), *names(source)] for place, source in sources.items()}
    out |= {str(p.relative_to(ROOT)): [*prose(p)] for p in NOTEBOOKS}
    return out | {'README.md': [*enumerate((ROOT / 'README.md').read_text(encoding='utf-8').splitlines(), 1)]}


@pytest.mark.parametrize('word', sorted(glossary()))
def test_the_fields_words_are_used(word):
    assert len(texts()) > 200
    bad = [x for place, lines in texts().items() for x in found(word, lines, place)]
    assert not bad, f'say {glossary()[word]}:\n' + '\n'.join(bad)


@pytest.mark.parametrize('word, planted', [('figure', '# the figures are means'), ('figure', '"no figure of this run"'), ('mark', '"a teacher gives marks"'), ('likeliest', '# k likeliest tokens'), ('room', '"the next room shows it"')])
def test_a_planted_word_is_seen(word, planted):
    assert word in glossary() and found(word, said(planted + '\n'), 'planted')


def test_ordinary_meanings_are_not():
    for word, text in (('figure', '# matplotlib figure'), ('mark', '# a question mark'), ('room', '# leaves no room for a prompt')): assert not found(word, said(text), 'fine')


def test_names_are_looked_at():
    assert found('figure', names('def figures_of(x): pass'), 'planted') and found('merit', names('class MeritOf: pass'), 'planted') and found('purse', names('def f(purse): pass'), 'planted')
