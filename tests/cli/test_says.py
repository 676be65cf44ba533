"Every command says what it does: before, during and after."
import http.server
import json
import logging
import re
import threading

import pytest
import yaml

from opd_nb.cli.app import main
from opd_nb.core.config import OPDConfig
from opd_nb.core.errors import BadInput
from opd_nb.data.formats import save_conversations
from opd_nb.lab import countdown
from opd_nb.monitor.run_log import read_log

PAIR = ['--student', 'tiny:', '--teacher', 'tiny:', '--device', 'cpu', '--batch', '8', '--max-new-tokens', '16']


def opd(capsys, *words):
    try: status = main([str(w) for w in words])
    except SystemExit as e: status = e.code or 0
    shown = capsys.readouterr()
    return status, shown.out, shown.err


@pytest.fixture
def prompts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_conversations(countdown.draw(40, answers=True), tmp_path / 'p.jsonl')
    return 'p.jsonl'


def test_a_run_says_what_it_is_and_ends_with_what_to_type(prompts, tmp_path, capsys, caplog):
    caplog.set_level(logging.INFO, 'opd_nb')
    status, out, _ = opd(capsys, 'train', *PAIR, '--data', prompts, '--max-steps', 4, '--eval-every', 2, '--output-dir', 'run')
    said = '\n'.join(r.getMessage() for r in caplog.records)
    assert status == 0
    for topic, parts in dict(student=('0.41 M weights', '480 tokens', 'chat template'), teacher=('1.13 M weights', '512 tokens'), device=('cpu',),
                             loss=('cover (chosen by auto)',), budget=('4 steps', '8 rollouts', '16 tokens')).items():
        line = next(x for x in said.splitlines() if x.startswith(topic))
        assert all(part in line for part in parts), line
    assert re.search(r'time +the student writes .*the teacher reads .*the student reads and learns', out)
    assert out.count('before  ') == out.count('after   ') == 3
    assert out.strip().splitlines()[-1] == 'next     opd chat run'
    events = read_log(tmp_path / 'run')
    assert [e['step'] for e in events if e['event'] == 'validation'] == [0, 2, 4]
    assert {e['objective'] for e in events} == {'cover'}
    assert all({'seconds_writing', 'seconds_teacher', 'seconds_student'} <= set(e) for e in events if e['event'] == 'step')


def test_the_resolved_loss_is_kept(prompts, tmp_path, capsys):
    assert opd(capsys, 'train', *PAIR, '--data', prompts, '--max-steps', 1, '--output-dir', 'run')[0] == 0
    kept = yaml.safe_load((tmp_path / 'run' / 'config.yaml').read_text())
    assert kept['loss'] == 'auto' and kept['record']['loss'].startswith('cover')
    assert OPDConfig(_config=tmp_path / 'run' / 'config.yaml', _env_file=None).loss == 'auto'
    assert 'cover (chosen by auto)' in (tmp_path / 'run' / 'report.html').read_text()
    assert opd(capsys, 'export', 'run', '--out', 'out')[0] == 0
    card = (tmp_path / 'out' / 'README.md').read_text()
    assert '| loss | cover (chosen by auto) |' in card
    assert str(tmp_path) not in card


def test_students_are_for_all_who_may_read_and_name_no_folder(prompts, tmp_path, capsys):
    "Adapters on a student in a folder of this machine: neither what the run saves nor what is exported says where that is, but to the loader."
    import shutil
    from opd_nb.models.files import tiny_folder
    shutil.copytree(tiny_folder('student'), tmp_path / 'mine')
    assert opd(capsys, 'train', *PAIR, '--student', tmp_path / 'mine', '--lora', '--data', tmp_path / prompts, '--max-steps', 1, '--output-dir', tmp_path / 'run')[0] == 0
    for words in ([], ['--merge']): assert opd(capsys, 'export', 'run', '--out', f'out{len(words)}', *words)[0] == 0
    written = [p for name in ('run/final', 'run/best', 'out0', 'out1') for p in (tmp_path / name).iterdir()]
    assert not [p for p in written if str(tmp_path).encode() in p.read_bytes() and p.name != 'adapter_config.json']
    assert len({p.stat().st_mode for p in written}) == 1


def test_no_teacher_is_an_error_that_names_them(prompts, capsys):
    for command in ('train', 'doctor', 'step'):
        status, out, err = opd(capsys, command, '--student', 'tiny:', '--data', prompts, '--device', 'cpu')
        assert status == 2 and all(x in err for x in ('tiny:', 'hf:ID', 'gguf:FILE', 'openrouter:MODEL')), command
    with pytest.raises(BadInput, match='must be named'):
        from opd_nb.training.loop import train
        train(OPDConfig(student='tiny:', data=prompts, device='cpu', _env_file=None))


def test_odd_pairs_are_said(prompts, tmp_path, capsys, caplog):
    from opd_nb.models.lm import LM
    lm = LM.load('tiny:student', device='cpu')
    lm.model.save_pretrained(tmp_path / 'base')
    lm.codec.tok.chat_template = None
    lm.codec.tok.save_pretrained(tmp_path / 'base')
    for name in ('chat_template.jinja',): (tmp_path / 'base' / name).unlink(missing_ok=True)
    words = ['--teacher', 'tiny:student', '--student', 'tiny:teacher', '--data', prompts, '--max-steps', 1, '--device', 'cpu', '--batch', 2, '--max-new-tokens', 4]
    assert opd(capsys, 'train', *words)[0] == 0 and 'larger than its teacher' in caplog.text
    caplog.clear()
    words[3] = './base'
    assert opd(capsys, 'train', *words)[0] == 0 and 'student has no chat template' in caplog.text and 'larger' not in caplog.text


def test_version(capsys):
    import opd_nb
    assert opd(capsys, '--version') == (0, f'opd_nb {opd_nb.__version__}\n', '')


def test_epochs_become_steps(prompts, tmp_path, capsys):
    assert opd(capsys, 'train', *PAIR, '--data', prompts, '--epochs', 2, '--val-fraction', 0, '--output-dir', 'run')[0] == 0
    assert max(e['step'] for e in read_log(tmp_path / 'run')) == 10  # twice 40 prompts, 8 a step
    assert yaml.safe_load((tmp_path / 'run' / 'config.yaml').read_text())['max_steps'] == 10
    assert opd(capsys, 'train', '--config', 'run/config.yaml', '--resume')[0] == 0


def test_validation_on_a_file_of_its_own(prompts, tmp_path, capsys):
    save_conversations(countdown.draw(5, split='held_out'), tmp_path / 'held_out.jsonl')
    assert opd(capsys, 'train', *PAIR, '--data', prompts, '--eval-data', 'held_out.jsonl', '--max-steps', 1, '--output-dir', 'run')[0] == 0
    asked = {json.loads(line)['prompt'] for line in (tmp_path / 'run' / 'samples.jsonl').read_text().splitlines()}
    assert asked == {c.prompt[0]['content'] for c in countdown.draw(5, split='held_out')}


def test_dry_run_looks_and_stops(prompts, tmp_path, capsys):
    status, out, _ = opd(capsys, 'train', *PAIR, '--data', prompts, '--dry-run', '--output-dir', 'run')
    assert status == 0 and 'ok       memory' in out and not (tmp_path / 'run').exists()


def test_data_is_described(prompts, tmp_path, capsys):
    status, out, _ = opd(capsys, 'data', prompts)
    assert status == 0 and '40, 40 with a reference' in out and 'user (40)' in out and 'tokens, median' in out and '[INST]Make' in out
    status, _, err = opd(capsys, 'data', 'nowhere.jsonl')
    assert status == 2 and len(err.strip().splitlines()) == 1


def test_help_begins_with_what_is_most_used(capsys):
    out = opd(capsys, 'train', '--help')[1]
    head = out[:out.index('\nstudent:')]
    used = ['student', 'teacher', 'data', 'max-steps', 'epochs', 'batch', 'learning-rate', 'max-new-tokens', 'lora', 'output-dir']
    assert all(f'--{name}' in head for name in used) and '--weight-decay' not in head and 'cluster ' not in head


def test_what_training_returns_prints_as_two_lines(prompts, tmp_path):
    from opd_nb.training.loop import train
    done = train(OPDConfig(student='tiny:', teacher='tiny:', data=prompts, device='cpu', max_steps=1, batch=2, max_new_tokens=8, output_dir='run', _env_file=None), progress=False)
    assert len(str(done).splitlines()) == 2 and '1 step in' in str(done) and 'run/final' in str(done) and len(repr(done)) < 400


def test_warnings_go_above_the_bar(prompts, capsys):
    "Each line with a warning has nothing of the bar in it."
    from opd_nb.training.loop import train
    handler = logging.StreamHandler()
    logging.getLogger().addHandler(handler)
    def warn(event): logging.getLogger('opd_nb').warning('a warning of step %d', event['step'])
    try:
        train(OPDConfig(student='tiny:', teacher='tiny:', data=prompts, device='cpu', max_steps=4, batch=2, max_new_tokens=8, val_fraction=0, output_dir='run', _env_file=None), show=warn)
    finally: logging.getLogger().removeHandler(handler)
    err = capsys.readouterr().err
    for step in range(1, 5):
        assert re.search(rf'(?:^|[\r\n])a warning of step {step}\n', err), err


def test_no_warning_after_one_step():
    from opd_nb.monitor.alerts import Watch
    watch = Watch(OPDConfig(_env_file=None))
    bad = dict(overlap=.01, stop_rate=0., repetition=.9, skipped=1)
    assert watch.see(dict(event='validation', step=0, **bad)) == [] and watch.see(dict(event='step', step=1, **bad)) == []
    assert {w.name for i in range(2, 8) for w in watch.see(dict(event='step', step=i, **bad))} >= {'low_overlap', 'no_answer_ends', 'skipped_steps'}


def test_no_warning_advises_what_is_set():
    from opd_nb.monitor.alerts import Watch
    events = [dict(event='step', step=i, entropy=1. if i < 20 else .01, teacher_entropy=1., length=10. if i < 20 else 90., top1_agreement=.8 if i < 20 else .2) for i in range(40)]
    def advice(**settings):
        watch = Watch(OPDConfig(_env_file=None, **settings))
        return {w.name: w.remedy for e in events for w in watch.see(e)}
    assert {'entropy_collapse', 'length_inflation', 'falling_agreement'} <= set(advice())
    assert '--beta 0' not in advice(beta=0)['entropy_collapse'] and '--beta 0' in advice(beta=1)['entropy_collapse']
    assert '--lam 0.5' in advice()['length_inflation'] and '--lam 0.5' not in advice(lam=.4)['length_inflation']


def test_garbage_at_the_end_is_named(prompts, tmp_path, capsys, caplog):
    "A temperature at which the student writes noise."
    status, out, err = opd(capsys, 'train', *PAIR, '--data', prompts, '--max-steps', 6, '--temperature', 5, '--output-dir', 'run')
    assert status == 0 and 'byte garbage' in caplog.text


def test_chat_says_whether_a_puzzle_is_solved(capsys):
    status, out, _ = opd(capsys, 'chat', 'tiny:teacher', '--prompt', 'Make 31 from 3 7 10.', '--device', 'cpu')
    assert status == 0 and '(right)' in out
    status, out, _ = opd(capsys, 'chat', 'tiny:student', '--prompt', 'Make 31 from 3 7 10.', '--device', 'cpu')
    assert status == 0 and '(wrong: ' in out
    status, out, _ = opd(capsys, 'chat', 'tiny:student', '--prompt', 'Hello', '--device', 'cpu')
    assert '(right)' not in out and '(wrong' not in out


class Hub(http.server.BaseHTTPRequestHandler):
    "A Hub that has one model, says how large it is, and does not give it away."
    def do_GET(self):
        body = b'{}'
        if '/api/models/' in self.path:
            files = [dict(rfilename='model.safetensors', size=15_000_000_000), dict(rfilename='config.json', size=600)]
            body = json.dumps(dict(id='big/model', sha='0' * 40, siblings=files)).encode()
        self.send_response(200 if '/api/models/' in self.path else 404)
        self.send_header('content-length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    do_HEAD = do_GET
    def log_message(self, *a): pass


def test_a_download_is_announced_with_its_size(tmp_path):
    import os, subprocess, sys
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {k: v for k, v in os.environ.items() if 'OFFLINE' not in k} | dict(HF_ENDPOINT=f'http://127.0.0.1:{server.server_port}', HF_HOME=str(tmp_path))
    code = 'import sys; from opd_nb.cli.app import main; sys.exit(main(["chat", "big/model", "--prompt", "x"]))'
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, env=env, timeout=120)
    server.shutdown()
    assert 'big/model is downloaded: 15.0 GB' in done.stderr and done.returncode == 2, done.stderr[-1500:]
