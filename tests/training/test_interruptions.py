"Runs that are killed, disks that fill up, memory that must not grow, two processes for one run: with real processes and real disks."
import os, re, shutil, signal, subprocess, sys, time

import pytest
import torch

from conftest import ROOT, slow
from test_training import OPD, config, figures, flags, prompts, weights
from opd_nb.core.errors import BadInput
from opd_nb.monitor.run_log import read_log
from opd_nb.core.folders import open_folder
from opd_nb.training.checkpoints import newest_checkpoint, save_student
from opd_nb.training.setup import prepare
from opd_nb.training.loop import train


def same_weights(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_forty_steps_are_twenty_a_kill_and_twenty(prompts, tmp_path):
    kw = dict(max_steps=40, batch=2, max_new_tokens=12, save_every=20, eval_every=10, val_max_samples=3)
    whole = train(config(prompts, tmp_path / 'whole', **kw), progress=False)
    part = config(prompts, tmp_path / 'part', **kw)
    process = subprocess.Popen([*OPD, 'train', *flags(part.model_dump(mode='json', exclude_defaults=True))], cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while process.poll() is None and not any(e['step'] > 20 for e in read_log(tmp_path / 'part')): time.sleep(.01)
    (tmp_path / 'part' / 'step-99.part').mkdir()  # as if it were writing
    with pytest.raises(BadInput, match='another process has a run there'): open_folder(tmp_path / 'part', True)
    assert (tmp_path / 'part' / 'step-99.part').exists()
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, 'it was done before it could be killed'
    assert newest_checkpoint(tmp_path / 'part').name == 'step-20' and not (tmp_path / 'part' / 'final').exists()
    done = subprocess.run([*OPD, 'train', *flags(part.model_dump(mode='json', exclude_defaults=True)), '--resume'], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / 'part' / 'step-99.part').exists()
    assert same_weights(whole.student, tmp_path / 'part' / 'final') and same_weights(whole.best, tmp_path / 'part' / 'best')
    assert figures(whole.folder) == figures(tmp_path / 'part')


def test_kill_while_a_checkpoint_is_written(prompts, tmp_path):
    "A child saves as fast as it can and is killed at some moment, ten times. What carries a name is whole, and nothing that was there is gone."
    run = prepare(config(prompts, tmp_path / 'run', keep_last=1))
    open_folder(tmp_path / 'run', False)
    run.config.save(tmp_path / 'run' / 'config.yaml')  # by which the folder is that of a run
    save_student(run, 'best'); save_student(run, 'step-0')
    seen = set()
    for i in range(10):
        child = os.fork()
        if not child:
            while True:
                run.step += 1
                save_student(run, 'best'); save_student(run, f'step-{run.step}')
        time.sleep(.05 + .013 * i)
        os.kill(child, signal.SIGKILL); os.waitpid(child, 0)
        seen |= {p.suffix for p in (tmp_path / 'run').iterdir()}
        open_folder(tmp_path / 'run', True)  # what going on does first
        assert (tmp_path / 'run' / 'best').is_dir() and len(weights(tmp_path / 'run' / 'best')) > 10
        newest = newest_checkpoint(tmp_path / 'run')
        assert torch.load(newest / 'run.pt', weights_only=True)['step'] == int(newest.name[5:]) and len(weights(newest)) > 10
        run.step = int(newest.name[5:])
    assert '.part' in seen, 'no kill came while something was written'


FULL = '''
import subprocess, sys
from pathlib import Path
from opd_nb.core.errors import BadInput
from opd_nb.core.config import OPDConfig
from opd_nb.training.checkpoints import newest_checkpoint
from opd_nb.training.loop import train
config = OPDConfig(_config=sys.argv[1], _env_file=None)
try: train(config, progress=False)
except BadInput as e: print(e)
print(newest_checkpoint(config.output_dir), [p.name for p in config.output_dir.glob('*.part')])
subprocess.run(['mount', '-o', 'remount,size=40m', config.output_dir.parent], check=True)
done = train(config.model_copy(update=dict(resume=True)), progress=False)
import shutil; shutil.copytree(done.folder, sys.argv[2])
'''


def test_full_disk(prompts, tmp_path):
    "The run's folder is on a disk that has room for two checkpoints and a bit. The third fails; with more room, the run goes on to the same end."
    alone = ['unshare', '-Urm', 'sh', '-c']
    (tmp_path / 'disk').mkdir()
    if not shutil.which('unshare') or subprocess.run([*alone, f'mount -t tmpfs none {tmp_path}/disk'], capture_output=True).returncode: pytest.skip('a small disk cannot be mounted here (unshare -Urm, tmpfs)')
    kw = dict(keep_last=5, eval_every=100, val_fraction=0)
    whole = train(config(prompts, tmp_path / 'whole', **kw), progress=False)
    size = sum(f.stat().st_size for f in (tmp_path / 'whole' / 'step-2').iterdir()) // 1024
    config(prompts, tmp_path / 'disk' / 'run', **kw).save(tmp_path / 'config.yaml')
    (tmp_path / 'full.py').write_text(FULL)
    done = subprocess.run([*alone, f'mount -t tmpfs -o size={int(1.6 * size)}k none {tmp_path}/disk && exec {sys.executable} {tmp_path}/full.py {tmp_path}/config.yaml {tmp_path}/after'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'the disk is full' in done.stdout and '--resume' in done.stdout and 'step-2 []' in done.stdout, done.stdout
    assert same_weights(whole.student, tmp_path / 'after' / 'final') and figures(whole.folder) == figures(tmp_path / 'after')


def launch(*words, how=('--multi_gpu',)):
    "`accelerate launch` of the training module in two processes; --multi_gpu means several of them, and without a GPU they are CPU processes."
    return subprocess.run([sys.executable, '-m', 'accelerate.commands.launch', *how, '--num_processes=2', '--num_machines=1', '--mixed_precision=no', '--dynamo_backend=no', '-m', 'opd_nb', 'train', *words],
                          capture_output=True, text=True, env=os.environ | dict(CUDA_VISIBLE_DEVICES='', PYTHONPATH=str(ROOT)))


def test_two_processes_are_one(prompts, tmp_path):
    kw = dict(max_steps=20, batch=6, num_generations=2, max_new_tokens=12, lambda_sft=.2, eval_every=10, save_every=10, learning_rate=3e-4)
    one = train(config(prompts, tmp_path / 'one', **kw), progress=False)
    done = launch(*flags(config(prompts, tmp_path / 'two', **kw).model_dump(mode='json', exclude_defaults=True)))
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(re.findall('^student ', done.stdout, re.M)) == 1, done.stdout  # one of them speaks
    a, b = figures(one.folder), figures(tmp_path / 'two')
    assert [(e['event'], e['step'], e['trained'], e['length']) for e in a] == [(e['event'], e['step'], e['trained'], e['length']) for e in b]
    assert max(abs(x['loss'] - y['loss']) for x, y in zip(a, b)) < 1e-4
    assert {p.name for p in one.folder.iterdir()} | {'report.html'} == {p.name for p in (tmp_path / 'two').iterdir()}  # the command writes the page too


@slow
def test_divided_layers_are_one_model(prompts, tmp_path):
    "FSDP on two CPU processes: the same losses, ordinary students, and a run that goes on."
    kw = dict(max_steps=4, max_new_tokens=12, num_generations=2, val_max_samples=4)
    one = train(config(prompts, tmp_path / 'one', **kw), progress=False)
    given = config(prompts, tmp_path / 'two', **kw).model_dump(mode='json', exclude_defaults=True)
    how = '--use_fsdp', '--fsdp_version=2', '--fsdp_auto_wrap_policy=TRANSFORMER_BASED_WRAP'
    done = launch(*flags(given), how=how)
    assert done.returncode == 0, done.stderr[-2000:]
    a, b = figures(one.folder), figures(tmp_path / 'two')
    assert [(e['event'], e['step'], e['trained']) for e in a] == [(e['event'], e['step'], e['trained']) for e in b]
    for k in ('loss', 'grad_norm'): assert max(abs(x[k] - y[k]) for x, y in zip(a, b) if k in x) < 1e-3
    same = weights(one.student), weights(tmp_path / 'two' / 'final')
    assert all(torch.allclose(same[0][k], same[1][k], atol=1e-3) for k in same[0]) and same[0].keys() == same[1].keys()
    (tmp_path / 'two' / 'final').rename(tmp_path / 'kept')
    done = launch(*flags(given), '--resume', how=how)  # from step-2, once more to the end
    assert done.returncode == 0, done.stderr[-2000:]
    assert figures(tmp_path / 'two') == b and same_weights(tmp_path / 'two' / 'final', tmp_path / 'kept')


def test_one_of_two_cannot(tmp_path):
    "An error that only one process has ends both, with its message."
    done = launch('--student=tiny:', '--teacher=tiny:', '--data=missing.jsonl', f'--output-dir={tmp_path / "run"}')
    assert done.returncode != 0 and 'nothing is there' in done.stderr


@slow
def test_memory_does_not_grow(prompts, tmp_path):
    "Resident memory after 100 and after 500 steps, with validation and checkpoints."
    import psutil
    from opd_nb.training import loop as training
    open_folder(tmp_path / 'run', False)
    run = prepare(config(prompts, tmp_path / 'run', max_steps=500, batch=4))
    seen = []
    for _ in range(500):
        training.log_event(run, training.train_step(run))
        if run.step % 50 == 0: training.validate_and_keep_best(run); save_student(run, f'step-{run.step}')
        seen.append(psutil.Process().memory_info().rss / 2**20)
    print([round(x) for x in seen[::50]])
    assert max(seen[400:]) - max(seen[50:150]) < 20, 'MiB'
