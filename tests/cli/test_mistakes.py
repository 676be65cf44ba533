"Mistakes cost nothing: keys of other programs, a taken folder, a run that is stopped, folders that hold nothing."
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from conftest import slow
from opd_nb.cli.app import main
from opd_nb.core.config import OPDConfig
from opd_nb.core.errors import BadInput
from opd_nb.monitor.run_log import read_log

OPD = [sys.executable, '-W', 'ignore', '-c', 'import sys; from opd_nb.cli.app import main; sys.exit(main())']
TINY = ['--preset', 'laptop', '--batch', '4', '--max-new-tokens', '12', '--val-max-samples', '4', '--eval-every', '1000']


def opd(capsys, *words):
    status = main([str(w) for w in words])
    shown = capsys.readouterr()
    return status, shown.out, shown.err


def losses(folder):
    return [(e['step'], e['loss']) for e in read_log(folder) if e['event'] == 'step']


OTHERS = ['DATABASE_URL', 'AWS_SECRET_ACCESS_KEY', 'HF_HOME', 'PORT', 'DEBUG', 'PYTHONPATH', 'database_url', 'HF_ENDPOINT']
NEAR = [('MAX_STEP', 'MAX_STEPS'), ('LERNING_RATE', 'LEARNING_RATE'), ('OPD_STEPS_OF_ALL', 'OPD_'),
        ('TEACHER_BACKND', 'TEACHER_BACKEND'), ('HF_TOKENN', 'HF_TOKEN'), ('hf_tokn', 'HF_TOKEN')]


@pytest.mark.parametrize('key', OTHERS)
def test_keys_of_other_programs_are_nobodys_business(tmp_path, key):
    (tmp_path / '.env').write_text(f'{key}=planted-secret\nOPD_SEED=7\n')
    assert OPDConfig(_env_file=tmp_path / '.env').seed == 7


@pytest.mark.parametrize('key, meant', NEAR)
def test_a_near_miss_of_our_keys_is_an_error(tmp_path, key, meant):
    (tmp_path / '.env').write_text(f'{key}=3\n')
    with pytest.raises(BadInput, match=meant): OPDConfig(_env_file=tmp_path / '.env')


def loaded_by(*words):
    "Names of the packages that a command imports."
    code = ('import contextlib, io, sys\nfrom opd_nb.cli.app import main\n'
            'with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):\n'
            f'    main({list(words)!r})\nprint(*sys.modules)')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    return {name.partition('.')[0] for name in done.stdout.split()}


@pytest.mark.parametrize('words, not_loaded', [
    (['--help'], 'torch transformers pandas numpy pydantic pydantic_settings asyncio yaml'),
    (['--version'], 'torch transformers pandas numpy pydantic pydantic_settings asyncio yaml'),
    (['trian'], 'torch transformers pandas numpy pydantic pydantic_settings asyncio yaml'),
    (['export', '--merg'], 'torch transformers pandas numpy'),
    (['chat', '--promt'], 'torch transformers pandas numpy'),
    (['train', '--max-stepz', '3'], 'torch transformers pandas numpy'),
    (['doctor', '--max-stepz', '3'], 'torch transformers pandas numpy'),
    (['synth', '--domian', 'x'], 'torch transformers pandas numpy openai'),
    (['validate', 'x.jsonl', '--techer', 'x'], 'torch transformers pandas numpy')])
def test_what_needs_little_imports_little(tmp_path, words, not_loaded):
    assert not loaded_by(*words) & set(not_loaded.split())


def test_a_taken_folder_is_said_before_anything_is_loaded(tmp_path):
    (tmp_path / 'taken').mkdir()
    (tmp_path / 'taken' / 'log.jsonl').write_text('{"event": "step", "step": 1}\n')
    code = ('import sys\nfrom opd_nb.cli.app import main\n'
            f'status = main(["train", "--preset", "laptop", "--output-dir", {str(tmp_path / "taken")!r}])\n'
            'print(status, "torch" in sys.modules)')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stdout.split() == ['2', 'False'] and 'holds a run already' in done.stderr


def test_nothing_to_resume_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, _, err = opd(capsys, 'train', *TINY, '--resume')
    assert status == 2 and 'no run' in err and not (tmp_path / 'runs').exists()
    status, _, err = opd(capsys, 'train', '--student', 'tiny:', '--teacher', 'tiny:', '--resume')
    assert status == 2 and 'no run' in err and not (tmp_path / 'runs').exists()


def test_every_run_has_a_new_folder_and_resume_finds_it(tmp_path, monkeypatch, capsys):
    from opd_nb.data.formats import save_conversations
    from opd_nb.lab import countdown
    monkeypatch.chdir(tmp_path)
    save_conversations(countdown.draw(20), tmp_path / 'p.jsonl')
    words = ['train', '--student', 'tiny:', '--teacher', 'tiny:', '--data', 'p.jsonl', '--batch', 4, '--max-new-tokens', 8, '--device', 'cpu']
    for steps in (1, 1, 2):
        status, out, err = opd(capsys, *words, '--max-steps', steps)
        assert status == 0, err
    first, second, third = sorted((tmp_path / 'runs').iterdir(), key=lambda p: p.stat().st_mtime)
    date = time.strftime('%Y-%m-%d')
    assert first.name == f'{date}-tiny-auto' and second.name == f'{date}-tiny-auto-2' and third.name == f'{date}-tiny-auto-3'
    status, out, err = opd(capsys, *words, '--max-steps', 1, '--resume')
    assert status == 0 and f'runs/{second.name}' in out + err and third.name not in out + err
    assert len(list((tmp_path / 'runs').iterdir())) == 3
    status, out, err = opd(capsys, *words, '--max-steps', 3, '--resume')
    assert status == 2 and 'max_steps' in err and second.name in err  # the newest, and how it differs


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "The steps of a run that nobody stops."
    folder = tmp_path_factory.mktemp('whole') / 'run'
    assert main(['train', *TINY, '--max-steps', '40', '--output-dir', str(folder)]) == 0
    return losses(folder)


def can_be_interrupted(): signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started the tests


@pytest.mark.parametrize('number', [signal.SIGINT, pytest.param(signal.SIGTERM, marks=slow)])
def test_a_run_that_is_stopped_goes_on(tmp_path, monkeypatch, whole, number):
    "The steps are those of a run that nobody stopped."
    words = [*OPD, 'train', *TINY, '--max-steps', '40', '--output-dir', 'part']
    process = subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=can_be_interrupted)
    while process.poll() is None and not losses(tmp_path / 'part'): time.sleep(.01)
    process.send_signal(number)
    out, err = process.communicate()
    assert process.returncode == 128 + number, (out, err)
    done = len(losses(tmp_path / 'part'))
    assert 0 < done < 40 and f'at step {done}' in err and '--resume' in err and 'Traceback' not in err, err
    again = err.strip().splitlines()[-1].partition('opd train ')[2].split()
    monkeypatch.chdir(tmp_path)
    assert main(['train', *again]) == 0
    assert losses(tmp_path / 'part') == whole


@pytest.mark.parametrize('spec', ['./nothing', 'runs/nothing', 'runs/nothing/best', '/nowhere/at/all', 'nothing/', '~/nothing-here', 'runs/empty', 'nothing'])
@pytest.mark.parametrize('command', ['export', 'chat'])
def test_a_folder_that_is_none_is_one_sentence(tmp_path, monkeypatch, capsys, command, spec):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'runs' / 'empty').mkdir(parents=True)
    status, out, err = opd(capsys, command, spec, *(['--prompt', 'x'] if command == 'chat' else []))
    assert status == 2 and len(err.strip().splitlines()) == 1 and 'Hub' in err, err
    assert 'nothing is there' in err or 'neither a model nor a finished run' in err, err
