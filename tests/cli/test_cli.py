"The command as a process, and what needs a server or a finished run."
import http.server
import io
import json
import os
import subprocess
import sys
import threading

import pytest

from opd_nb.cli.commands import COMMANDS
from opd_nb.cli.app import main

OPD = [sys.executable, '-W', 'ignore', '-c', 'import sys; from opd_nb.cli.app import main; sys.exit(main())']


def opd(capsys, *words):
    try: status = main([str(w) for w in words])
    except SystemExit as e: status = e.code or 0
    shown = capsys.readouterr()
    return status, shown.out, shown.err


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "What `opd train --preset laptop` leaves, with nothing else named."
    folder, before = tmp_path_factory.mktemp('laptop'), os.getcwd()
    os.chdir(folder)
    try: assert main(['train', '--preset', 'laptop', '--max-steps', '3', '--lora']) == 0
    finally: os.chdir(before)
    made, = (folder / 'runs').iterdir()
    return made


def test_the_laptop_preset_needs_nothing_else(run):
    assert {'config.yaml', 'log.jsonl', 'best', 'final'} <= {p.name for p in run.iterdir()}
    assert sum(json.loads(x)['event'] == 'step' for x in (run / 'log.jsonl').read_text().splitlines()) == 3


@pytest.mark.parametrize('name', COMMANDS)
def test_help_reads_well(capsys, name):
    status, out, _ = opd(capsys, name, '--help')
    assert status == 0 and f'usage: opd {name}' in out
    assert all(len(line) <= 125 for line in out.splitlines()), max(out.splitlines(), key=len)
    assert not any(word in out for word in ('SecretStr', 'Literal', 'None]', 'default: None'))


@pytest.mark.parametrize('name, typo, meant', [
    ('train', '--learning-rat', '--learning-rate'),
    ('doctor', '--techer', '--teacher'),
    ('step', '--promt', '--prompt'),
    ('chat', '--temprature', '--temperature'),
    ('export', '--murge', '--merge'),
    ('synth', '--domian', '--domain'),
    ('validate', '--studnet', '--student'),
    ('cache', '--cler', '--clear'),
    ('demo', '--max-stepz', '--max-steps')])
def test_an_unknown_flag_names_the_nearest(capsys, name, typo, meant):
    positional = ['x'] if name in ('chat', 'export', 'validate') else []
    status, _, err = opd(capsys, name, *positional, typo, '1')
    assert status == 2 and f"'{meant}'" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize('preset', ['cluster', 'gguf', 'gpu-hf', 'laptop', 'mac', 'openrouter'])
def test_presets_are_listed(capsys, preset):
    from opd_nb.core.sources import presets
    for name in ('train', 'doctor', 'step'):
        out = opd(capsys, name, '--help')[1]
        assert preset in out and presets()[preset]['about'][:40] in out


def test_step(capsys):
    status, out, _ = opd(capsys, 'step', '--preset', 'laptop', '--seed', 1)
    parts = ('the student sees', '[INST]', '<|im_start|>', 'log q', 'gradient norm', 'loss cover')
    assert status == 0 and all(x in out for x in parts)
    prompt = 'Make 31 from 3 7 10.'
    assert prompt in opd(capsys, 'step', '--preset', 'laptop', '--prompt', prompt)[1]


def test_doctor_of_a_preset(capsys):
    status, out, _ = opd(capsys, 'doctor', '--preset', 'laptop')
    topics = [line.split()[1] for line in out.splitlines()]
    assert status == 0
    assert {'python', 'packages', 'device', 'data', 'memory', 'disk', 'losses', 'student', 'tokenizers',
            'time', 'tokens', 'dollars', 'overlap'} <= set(topics)
    assert all(line.split()[0] in ('ok', 'warning', 'stop') for line in out.splitlines())


def test_doctor_stops_before_it_loads_what_does_not_fit(capsys):
    huge = 10**8
    status, out, _ = opd(capsys, 'doctor', '--preset', 'laptop', '--batch', huge, '--micro-batch', huge)
    assert status == 1 and 'stop     memory' in out and '--micro-batch' in out
    assert 'scores' not in out


@pytest.mark.parametrize('words, says', [
    (['--preset', 'laptop', '--device', 'warp'], 'stop     device'),
    (['--preset', 'laptop', '--data', 'nowhere.jsonl'], 'stop     data'),
    (['--preset', 'laptop', '--loss', 'gkd'], 'Choose one that aligns bytes'),
    (['--teacher', 'openrouter:a/b'], 'OPENROUTER_API_KEY')])
def test_doctor_says_what_stops_a_run(capsys, monkeypatch, words, says):
    monkeypatch.delenv('OPENROUTER_API_KEY', raising=False)
    status, out, _ = opd(capsys, 'doctor', *words)
    assert status == 1 and says in out


def test_chat(run, capsys, monkeypatch):
    status, out, _ = opd(capsys, 'chat', run, 'tiny:student-bpe', '--prompt', 'Make 31 from 3 7 10.',
                         '--max-new-tokens', 16, '--device', 'cpu')
    head = out.splitlines()[0]
    assert status == 0 and '(base)' in head and 'best' in head and 'student-bpe' in head and '=' in out
    monkeypatch.setattr('sys.stdin', io.StringIO('Make 3 from 8 11 6.\n/new\n/quit\nnever\n'))
    status, out, _ = opd(capsys, 'chat', run, '--max-new-tokens', 12, '--device', 'cpu')
    assert status == 0 and out.count('(base)') == 1


def test_export_merges_and_tells(run, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    status, out, _ = opd(capsys, 'export', run, '--merge', '--out', tmp_path / 'student', '--data-license', 'mit')
    assert status == 0 and 'card' in out
    AutoModelForCausalLM.from_pretrained(tmp_path / 'student')
    AutoTokenizer.from_pretrained(tmp_path / 'student')
    card = (tmp_path / 'student' / 'README.md').read_text()
    parts = ('license: mit', 'distilled from tiny:', 'countdown.jsonl', '| step |', 'learning_rate: 0.002', '| data | mit |')
    assert all(x in card for x in parts)
    assert str(run.parent) not in card
    status, _, err = opd(capsys, 'export', run, '--out', tmp_path / 'student')
    assert status == 2 and 'there already' in err


class Refuses(http.server.BaseHTTPRequestHandler):
    "A Hub that knows no key."
    def do_POST(self):
        self.rfile.read(int(self.headers.get('content-length', 0)))
        self.send_response(401)
        self.send_header('content-length', '2')
        self.end_headers()
        self.wfile.write(b'{}')
    do_GET = do_POST
    def log_message(self, *a): pass


def test_push_ends_in_a_sentence(run, tmp_path):
    server = http.server.HTTPServer(('127.0.0.1', 0), Refuses)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {k: v for k, v in os.environ.items() if 'OFFLINE' not in k}
    env |= dict(HF_ENDPOINT=f'http://127.0.0.1:{server.server_port}', HF_TOKEN='hf_planted_4')
    words = ['export', str(run), '--out', str(tmp_path / 'out'), '--push', 'me/student']
    done = subprocess.run([*OPD, *words], capture_output=True, text=True, env=env)
    server.shutdown()
    assert done.returncode == 2 and (tmp_path / 'out' / 'README.md').is_file(), done.stderr
    assert 'status 401' in done.stderr and 'HF_TOKEN' in done.stderr
    assert 'planted' not in done.stdout + done.stderr and 'Traceback' not in done.stderr
