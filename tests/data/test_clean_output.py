"Nothing that others wrote moves a cursor, calculates in a spreadsheet, or fills the memory: in a terminal, a page, a table."
import csv
import json
import logging
import threading

import pytest
import yaml

from opd_nb.cli.app import main, set_up_logging
from opd_nb.core.errors import BadInput, unknown
from opd_nb.core.types import Conversation
from opd_nb.data.formats import save_conversations
from servers import Handler, http_server

NASTY = '\x1b[2J\x1b]0;title\x07=cmd|x\r\x9b31m\u202egnirts\x00\u2066'
FORBIDDEN = '\x1b\x07\x9b\u202e\x00\u2066\ud83d'


def clean(text): return not [c for c in FORBIDDEN if c in text]


def jsonl(path, rows):
    path.write_text('\n'.join(map(json.dumps, rows)))
    return path


@pytest.fixture
def rows(tmp_path):
    "Puzzles with a nasty text at each place."
    rows = [dict(prompt=f'Make 31 from 3 7 10. {NASTY} {i}', response=f'7*3=21 {NASTY}', kind=f'k{NASTY}') for i in range(4)]
    return jsonl(tmp_path / 'rows.jsonl', rows)


def printed(capsys):
    said = capsys.readouterr()
    return said.out + said.err.replace('\r', '')


def test_validate(rows, tmp_path, capsys):
    "Answers of data sets are in the table, and on the page."
    assert main(['validate', str(rows), '--teacher', 'tiny:teacher', '--n', '4', '--max-new-tokens', '4', '--report', str(tmp_path / 'r.html')]) in (3, 4)
    text, page = printed(capsys), (tmp_path / 'r.html').read_text(encoding='utf-8')
    assert 'lowest answer overlap' in text and clean(text) and clean(page) and 'gnirts' in page


def test_eval(rows, tmp_path, capsys):
    "Names of files and models, answers, and files that fail; the tables calculate nothing."
    pytest.importorskip('lm_eval', reason='pip install "opd_nb[eval]"')
    rows = rows.rename(tmp_path / '@SUM(1)\x1b[2J\u202e.jsonl')
    bad = jsonl(tmp_path / 'bad\x1b.jsonl', [dict(prompt=NASTY)])
    words = ['eval', '--models', 'm=tiny:student', '--tasks', f'{rows},{bad}', '--limit', '3', '--answer-tokens', '4', '--out', str(tmp_path / 'out')]
    assert main(words) == 1
    text, (folder,) = printed(capsys), (tmp_path / 'out').glob('2*')
    assert 'failed: ' in text and clean(text) and clean((folder / 'report.html').read_text(encoding='utf-8'))
    for name in ('results.csv', 'differences.csv'):
        cells = [cell for row in csv.reader((folder / name).open(encoding='utf-8')) for cell in row]
        assert clean(''.join(cells)) and not [cell for cell in cells if cell.startswith('@')]
    assert "'@SUM(1)" in (folder / 'results.csv').read_text(encoding='utf-8')


class Nasty(Handler):
    "An endpoint whose every word is nasty."
    def do_GET(self): self.send(200, dict(data=[dict(id=f'm{NASTY}')]))
    def do_POST(self):
        body = json.loads(self.body())
        if 'refused' in json.dumps(body): return self.send(400, dict(error=dict(message=NASTY)))
        self.send(200, dict(choices=[dict(message=dict(content=None, refusal=f'No. {NASTY}'), finish_reason='stop')], usage=dict(prompt_tokens=9, completion_tokens=9)))


@pytest.mark.parametrize('domain', ['general', 'refused'])
def test_synth(domain, tmp_path, capsys):
    "Why rows were set aside, in words of the endpoint."
    if domain == 'refused':
        file = tmp_path / 'refused.yaml'
        file.write_text(yaml.safe_dump(dict(domain_name='refused', description='x', instructions=['a\x1b[2J'])))
        domain = str(file)
    with http_server(Nasty) as url:
        main(['synth', '--backend', 'openai', '--model', 'm', '--base-url', f'{url}/v1', '--n', '3', '--domain', domain, '--out', str(tmp_path / 'out')])
    text, pages = printed(capsys), [p.read_text(encoding='utf-8') for p in (tmp_path / 'out').glob('*.html')]
    assert 'HTTP 400' in text or '[2J' in text
    assert clean(text) and all(clean(page) for page in pages)


def test_doctor(tmp_path, capsys):
    "An endpoint that names itself, and data that cannot be read."
    with http_server(Nasty) as url:
        main(['doctor', '--student', 'tiny:', '--teacher', f'api:{url}/v1', '--teacher-retries', '0', '--teacher-cache', str(tmp_path / 'a')])
    assert clean(printed(capsys))
    main(['doctor', '--student', 'tiny:', '--teacher', 'tiny:', '--data', str(jsonl(tmp_path / 'x.jsonl', [dict(prompt=[NASTY] * 5, role=NASTY)]))])
    assert clean(printed(capsys))


def test_cache(tmp_path, capsys):
    from opd_nb.hosted.store import ReplyStore
    store = ReplyStore(tmp_path / 'a')
    store.put('k', f'm{NASTY}', 1)
    assert main(['cache', '--teacher-cache', str(tmp_path / 'a')]) == 0
    text = printed(capsys)
    assert 'gnirts' in text and clean(text)


def test_log_lines_and_errors(capsys):
    "Whatever quotes something foreign."
    set_up_logging()
    handler = logging.getLogger().handlers[0]
    assert clean(handler.format(logging.LogRecord('opd_nb', 30, '', 0, 'read %s\nand more', (NASTY,), None)))
    assert main([f'tra{NASTY}in']) == 2 and clean(printed(capsys))


def laughs(n=30):
    "Ten lists of ten lists of ... that share their memory."
    value = ['ha']
    for _ in range(n): value = [value] * 10
    return value


def laughing_yaml(n=30):
    lines = ['a0: &a0 [ha]', *(f'a{i}: &a{i} [{", ".join([f"*a{i - 1}"] * 10)}]' for i in range(1, n))]
    return '\n'.join(lines) + '\n'


@pytest.mark.parametrize('make', [
    lambda x: BadInput('a', x, 'b', 'c'), lambda x: unknown('name', x, ['one', 'two']), lambda x: BadInput('a', {'b': x}, 'b', 'c'),
    lambda x: BadInput('a', Conversation((dict(role='user', content='x'),), dict(more=x)), 'b', 'c')])
def test_messages_are_cut_before_they_are_built(make):
    for value in (laughs(), {'a': laughs()}, 'x' * 10**7, list(range(10**6)), 10**5000, b'x' * 10**7):
        assert len(str(make(value))) < 300


FIELDS = ['loss', 'max_steps', 'template', 'teacher_template', 'track', 'a_name_that_is_none', 'output_dir', 'device', 'hf_token']


@pytest.mark.parametrize('field', FIELDS)
def test_laughing_config(field, tmp_path, capsys):
    "A sentence, and at once."
    file = tmp_path / 'config.yaml'
    file.write_text(f'student: "tiny:"\nteacher: "tiny:"\n{field}: &a29 [x]\n' + laughing_yaml(12).replace('a0: ', f'{field}: ', 1))
    assert main(['train', '--config', str(file), '--output-dir', str(tmp_path / 'out')]) == 2
    text = printed(capsys)
    assert 'Traceback' not in text and len(text) < 3000


@pytest.mark.parametrize('field', ['domain_name', 'instructions', 'languages', 'turns', 'answer_tokens', 'nonsense', 'system'])
def test_laughing_domain(field, tmp_path, capsys):
    file = tmp_path / 'domain.yaml'
    text = laughing_yaml(12) + f'{field}: *a11\n'
    file.write_text('domain_name: x\ndescription: y\n' * (field != 'domain_name') + text)
    assert main(['synth', '--backend', 'local', '--teacher', 'tiny:', '--domain', str(file), '--out', str(tmp_path / 'out')]) == 2
    assert len(printed(capsys)) < 3000


@pytest.mark.parametrize('file', ['plan.yaml'])
def test_laughing_plan(file, tmp_path, capsys):
    words = ['synth', '--backend', 'local', '--teacher', 'tiny:', '--n', '2', '--out', str(tmp_path / 'out')]
    assert main([*words, '--plan-only']) == 0
    (tmp_path / 'out' / file).write_text(laughing_yaml(12))
    assert main(words) == 2
    assert len(printed(capsys)) < 3000


def test_half_characters(tmp_path):
    "What no encoding holds is written as its escape, and shown as a mark."
    c = Conversation((dict(role='user', content='a\ud83d'),))
    assert b'ud83d' in save_conversations([c], tmp_path / 'x.jsonl').read_bytes()
    assert '\ud83d' not in str(BadInput('a\ud83d', 'b\ud83d', 'c\ud83d', 'd\ud83d'))
