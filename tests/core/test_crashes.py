"What nobody foresaw, a reader that goes away, a user without a home, Python without assert."
import json
import os
import subprocess
import sys

import pytest

from conftest import ROOT
from opd_nb.data.formats import save_conversations
from opd_nb.lab import countdown

OPD = [sys.executable, '-c', 'import sys; from opd_nb.cli.app import main; sys.exit(main())']


@pytest.fixture
def data(tmp_path): return str(save_conversations(countdown.draw(12, answers=True), tmp_path / 'prompts.jsonl'))


def training(data, folder): return ['train', '--student', 'tiny:', '--teacher', 'tiny:', '--data', data, '--output-dir', str(folder), '--max-steps', '1', '--batch', '2', '--max-new-tokens', '8', '--val-fraction', '0']


@pytest.mark.parametrize('words', [['--help'], ['train', '--help'], ['train']], ids=' '.join)
def test_a_reader_that_goes_away(tmp_path, data, words):
    "`opd ... | head -1`: a pipe whose other end is closed."
    words = training(data, tmp_path / 'run') if words == ['train'] else words
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*OPD, *words], stdout=write, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    os.close(write)
    assert done.returncode in ((0, 141) if 'train --help' in ' '.join(words) else (141,)) and 'Traceback' not in done.stderr and 'BrokenPipe' not in done.stderr, done.stderr
    if 'train' == words[0] and '--help' not in words: assert (tmp_path / 'run' / 'final').is_dir()


def test_all_outputs_closed(tmp_path, data):
    read, write = os.pipe()
    os.close(read)
    assert subprocess.run([*OPD, '--help'], stdout=write, stderr=write, cwd=tmp_path).returncode == 141


@pytest.mark.parametrize('error', [ZeroDivisionError('division by zero'), KeyError('a\x1b[2Jb'), OSError(5, 'Input/output error'), RuntimeError('x' * 10**6), RecursionError(), UnicodeDecodeError('utf-8', b'\xff', 0, 1, 'bad')], ids=lambda e: type(e).__name__)
def test_an_unforeseen_error_is_a_sentence_and_a_file(tmp_path, monkeypatch, capsys, error):
    from opd_nb.cli.app import main
    from opd_nb.cli.commands import COMMANDS
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('MY_API_KEY', 'sk-very-secret')
    @COMMANDS.register('explode')
    def explode(argv):
        "Explode"
        secret = os.environ['MY_API_KEY']
        try: raise ValueError(f'asked with {secret}')
        except ValueError: raise error
    try: status = main(['explode', '--hf-token', 'hf_0123456789'])
    finally: del COMMANDS['explode']
    said = capsys.readouterr().err
    path, = tmp_path.glob('opd-crash-*.txt')
    text = path.read_text(encoding='utf-8')
    assert status == 70 and said.count('\n') == 1 and len(said) < 800 and 'Traceback' not in said and '\x1b' not in said
    assert type(error).__name__ in said and path.name in said and 'https://' in said
    assert 'Traceback' in text and 'in explode' in text and 'opd_nb' in text and 'sk-very' not in text + said and 'hf_01' not in text + said


HOMELESS = '''
import os, pwd, sys
def nobody(uid): raise KeyError(f'getpwuid(): uid not found: {uid}')  # as for the number of a user in a container
pwd.getpwuid = nobody
os.environ.pop('HOME', None)
os.environ.pop('XDG_CACHE_HOME', None)
os.environ.pop('OPD_CACHE', None)
import json
from opd_nb.cli.app import main
print(json.dumps([main(words) for words in json.loads(sys.argv[1])]))
'''


def test_no_home_directory(tmp_path, data):
    "What needs none runs; a path in it is not there."
    expected = {'train': 0, 'cache': 0, 'train --student ~/x': 2, 'train --student ~nobody/x': 2, 'train --teacher gguf:~/x.gguf': 2, 'train --data ~/x.jsonl': 2, 'report ~/run': 2}
    commands = [[*training(data, tmp_path / f'run{i}'), *c.split()[1:]] if c.startswith('train') else c.split() for i, c in enumerate(expected)]
    done = subprocess.run([sys.executable, '-c', HOMELESS, json.dumps(commands)], capture_output=True, text=True, cwd=tmp_path, env=os.environ | dict(TMPDIR=str(tmp_path)))
    assert done.returncode == 0 and 'Traceback' not in done.stderr and 'should not have happened' not in done.stderr, done.stderr
    assert dict(zip(expected, json.loads(done.stdout.splitlines()[-1]))) == expected, done.stderr
    assert not [*tmp_path.glob('opd-crash*')]


def test_checks_hold_without_assert(tmp_path):
    "PYTHONOPTIMIZE removes what is written as `assert`."
    program = '''
from opd_nb.core.types import Conversation, Rollout
from opd_nb.losses.checks import check_zero
from opd_nb.losses.matched import gold
from opd_nb.teachers.scoring_apis import TokenScores
assert False, 'this is not removed'
refused = []
def more(*args, **kw):
    from dataclasses import replace
    out = gold(*args, **kw)
    return replace(out, total=out.total + 1)
for bad in (lambda: Rollout(None, (1,), (7, 8), (1,), b'ab', False), lambda: TokenScores([0.], []), lambda: check_zero(more)):
    try: bad()
    except (ValueError, AssertionError) as e: refused.append(type(e).__name__)
print(refused)
'''
    done = subprocess.run([sys.executable, '-O', '-c', program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "['ValueError', 'ValueError', 'AssertionError']", done.stdout + done.stderr
