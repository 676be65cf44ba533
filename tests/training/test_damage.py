"Checkpoints that are damaged, folders that are deleted, data that changes, kills while files are written."
import json
import logging
import os
import shutil
import stat
import subprocess
import sys
import zipfile

import pytest
import torch

from conftest import ROOT
from test_training import OPD, config, figures, flags, prompts, weights
from opd_nb.core.config import OPDConfig
from opd_nb.core.errors import BadInput
from opd_nb.data.formats import load_conversations, save_conversations
from opd_nb.lab import countdown
from opd_nb.monitor.run_log import read_log
from opd_nb.training.checkpoints import newest_checkpoint
from opd_nb.training.loop import train
from opd_nb.training.setup import prepare


@pytest.fixture(scope='module')
def finished(prompts, tmp_path_factory):
    "A run of six steps, with checkpoints of steps 4 and 6."
    folder = tmp_path_factory.mktemp('finished') / 'run'
    train(config(prompts, folder), progress=False)
    return folder


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished, tmp_path / 'run')
    return tmp_path / 'run'


def flip(path, at=-3000):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


DAMAGE = {'a bit of the weights': lambda p: flip(p / 'model.safetensors'), 'a bit of the state': lambda p: flip(p / 'run.pt'),
          'state cut short': lambda p: os.truncate(p / 'run.pt', 1000), 'empty state': lambda p: (p / 'run.pt').write_bytes(b''),
          'weights cut short': lambda p: os.truncate(p / 'model.safetensors', 1000), 'no weights': lambda p: (p / 'model.safetensors').unlink(),
          'no config': lambda p: (p / 'config.json').unlink(), 'a bit of the tokenizer': lambda p: flip(p / 'tokenizer.json', 700)}


@pytest.mark.parametrize('name', DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_older_one_is_taken(prompts, finished, run, name, caplog):
    DAMAGE[name](run / 'step-6')
    with caplog.at_level(logging.WARNING, 'opd_nb'): again = train(config(prompts, run, resume=True), progress=False)
    assert 'step-6 is damaged' in caplog.text and (run / 'step-6.damaged').is_dir() and again.steps == 6
    a, b = weights(finished / 'final'), weights(again.student)
    assert all(torch.equal(a[k], b[k]) for k in a) and figures(run) == figures(finished)


def test_checkpoints_that_are_all_damaged(prompts, run):
    for n in (4, 6): flip(run / f'step-{n}' / 'run.pt')
    before = (run / 'log.jsonl').read_bytes()
    with pytest.raises(BadInput, match=r'no checkpoint that is intact: step-6 .*run\.pt.*step-4') as e: train(config(prompts, run, resume=True), progress=False)
    assert str(run / 'best') in str(e.value) and (run / 'log.jsonl').read_bytes() == before


def test_a_checkpoint_of_an_earlier_version_is_taken(prompts, run, finished):
    "It has no checksums, and does not count prompts."
    (run / 'step-6' / 'SHA256SUMS').unlink()
    saved = torch.load(run / 'step-6' / 'run.pt', weights_only=True)
    torch.save({k: v for k, v in saved.items() if k not in ('data', 'prompts')}, run / 'step-6' / 'run.pt')
    assert train(config(prompts, run, resume=True), progress=False).steps == 6 and figures(run) == figures(finished)


class Recorder:
    "A teacher that remembers whom it was asked about."
    def __init__(self):
        from opd_nb.teachers.base import load_teacher
        self.teacher, self.asked = load_teacher('tiny:', OPDConfig(device='cpu', _env_file=None)), []
        self.codec, self.capabilities = self.teacher.codec, self.teacher.capabilities

    def score(self, conversations, completions):
        self.asked += [c.key for c in conversations]
        return self.teacher.score(conversations, completions)


def test_another_batch_size_asks_each_prompt_once(prompts, tmp_path):
    "Three batches of four, then six of eight: one epoch of sixty prompts."
    teacher, kw = Recorder(), dict(val_fraction=0, eval_every=100, schedule='constant')
    train(config(prompts, tmp_path / 'run', max_steps=3, batch=4, **kw), teacher, progress=False)
    train(config(prompts, tmp_path / 'run', max_steps=9, batch=8, resume=True, **kw), teacher, progress=False)
    everyone = sorted(c.key for c in load_conversations(prompts))
    assert sorted(teacher.asked) == everyone and len(everyone) == 60


def test_other_data_is_refused_and_the_same_elsewhere_is_not(prompts, run, tmp_path):
    shutil.copy(prompts, tmp_path / 'moved.jsonl')
    assert train(config(str(tmp_path / 'moved.jsonl'), run, max_steps=7, resume=True), progress=False).steps == 7
    rows = load_conversations(prompts)
    for name, other in dict(fewer=rows[:50], more=[*rows, *countdown.draw(3, seed=9, answers=True)], order=rows[::-1]).items():
        data = str(save_conversations(other, tmp_path / f'{name}.jsonl'))
        with pytest.raises(BadInput, match='data = .*is not what the run that is resumed was trained on'): train(config(data, run, max_steps=9, resume=True), progress=False)
    with pytest.raises(BadInput, match='val_fraction'): train(config(prompts, run, max_steps=9, val_fraction=.5, resume=True), progress=False)
    assert train(config(prompts, run, max_steps=8, val_max_samples=2, resume=True), progress=False).steps == 8


def test_a_folder_that_is_deleted_in_mid_run(prompts, tmp_path):
    "The message says how to go on; that is what is done; it is the same run."
    folder, kw = tmp_path / 'run', dict(eval_every=100, val_fraction=0, save_every=100)
    whole = train(config(prompts, tmp_path / 'whole', **kw), progress=False)
    def deleting(event):
        if event['step'] == 3: shutil.rmtree(folder)
    with pytest.raises(BadInput, match='its folder is gone.*saved at step 4.*--resume') as e: train(config(prompts, folder, **kw), progress=False, show=deleting)
    advice = str(e.value).rpartition('opd train ')[2].split()
    done = subprocess.run([*OPD, 'train', *advice], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    a, b = weights(whole.student), weights(folder / 'final')
    assert all(torch.equal(a[k], b[k]) for k in a) and figures(folder) == figures(whole.folder)


def test_a_folder_that_is_deleted_after_the_last_step(prompts, tmp_path):
    def deleting(event):
        if event['step'] == 2: shutil.rmtree(tmp_path / 'run')
    done = train(config(prompts, tmp_path / 'run', max_steps=2, val_fraction=0), progress=False, show=deleting)
    assert [e['step'] for e in read_log(tmp_path / 'run')] == [1, 2] and (tmp_path / 'run' / 'config.yaml').is_file() and done.student.is_dir()


def test_weights_can_be_read_by_whom_everything_else_can(prompts, tmp_path):
    before = os.umask(0o027)
    try: done = train(config(prompts, tmp_path / 'run', max_steps=1, val_fraction=0), progress=False)
    finally: os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / 'run').rglob('*') if p.is_file() and p.name != '.lock'}
    assert done.student.is_dir() and set(modes.values()) == {0o640}, modes


KILLED = '''
import builtins, os, sys
real, WHAT = builtins.open, sys.argv[2]
def killed(file, mode='r', *args, **kw):
    "As a kill while a file is written leaves it."
    f = real(file, mode, *args, **kw)
    def half(text):
        type(f).write(f, text[:len(text) // 2])
        f.flush()
        os._exit(9)
    if WHAT in str(file) and mode in ('x', 'w'): f.write = half
    return f
builtins.open = killed
from opd_nb.core.config import OPDConfig
from opd_nb.training.loop import train
train(OPDConfig(_config=sys.argv[1], _env_file=None, resume=True), progress=False)
'''


@pytest.mark.parametrize('name', ['config.yaml', 'log.jsonl'])
def test_a_kill_while_a_file_is_written_leaves_the_old_one(prompts, run, tmp_path, name):
    "In the middle of the text, which no writer of a whole file may show."
    config(prompts, run, max_steps=7).save(tmp_path / 'again.yaml')
    (tmp_path / 'killed.py').write_text(KILLED)
    before = (run / name).read_bytes()
    done = subprocess.run([sys.executable, tmp_path / 'killed.py', tmp_path / 'again.yaml', name], capture_output=True, text=True)
    assert done.returncode == 9, done.stderr
    assert (run / name).read_bytes() == before
    assert train(config(prompts, run, max_steps=7, resume=True), progress=False).steps == 7
    assert not [*run.glob('*.part')]


def test_the_folder_of_pushed_weights_does_not_grow(tmp_path):
    "Five processes that push twice and are killed; what else lies there stays."
    from servers import writing_server
    from opd_nb.models.lm import LM
    from opd_nb.training.vllm_rollouts import VLLMRollouts
    lm, asks = LM.load('tiny:student', dtype='float32', device='cpu'), countdown.draw(2)
    (tmp_path / 'run' / 'writer' / 'notes').mkdir(parents=True)
    with writing_server('tiny:student') as (url, _):
        for _ in range(5):
            sampler = VLLMRollouts(f'vllm:{url}', tmp_path / 'run')  # as a new process has it
            for step in range(2): sampler(lm, asks, 4, step=step)
    left = sorted(p.name for p in (tmp_path / 'run' / 'writer').iterdir())
    assert left == ['notes', sampler.weights_name]


@pytest.fixture
def broken_teacher():
    "A backend whose numbers are NaN."
    from test_left_out import Damaged
    from opd_nb.teachers.base import TEACHERS, load_teacher, register_teacher
    register_teacher('broken')(lambda rest, c: Damaged(load_teacher('tiny:', c), False))
    yield 'broken:'
    del TEACHERS['broken']


@pytest.mark.parametrize('loss, says', [('gold', 'the loss is no number'), ('cover', 'nothing was scored')])
def test_the_command_ends_with_what_is_so(prompts, tmp_path, capsys, broken_teacher, loss, says):
    "Three steps of which none has a loss: a sentence, and no 'loss 0.0000'."
    from opd_nb.cli.app import main
    settings = config(prompts, tmp_path / 'run', max_steps=3, teacher=broken_teacher, loss=loss, val_fraction=.2, eval_every=3)
    assert main(['train', *flags(settings.model_dump(mode='json', exclude_defaults=True))]) == 0
    said = capsys.readouterr().out
    assert says in said and '3 steps changed nothing' in said and 'loss 0' not in said, said


def test_a_damaged_student_is_not_loaded(run, prompts):
    "Nor exported, asked or evaluated; its card and its settings may be edited."
    from opd_nb.models.lm import LM
    (run / 'final' / 'README.md').write_text('my student')
    (run / 'final' / 'generation_config.json').write_text('{}')
    LM.load(str(run / 'final'), device='cpu')
    flip(run / 'final' / 'model.safetensors')
    with pytest.raises(BadInput, match='is damaged: model.safetensors is not what was written'): LM.load(str(run / 'final'), device='cpu')
    (run / 'final' / 'SHA256SUMS').unlink()
    LM.load(str(run / 'final'), device='cpu')
