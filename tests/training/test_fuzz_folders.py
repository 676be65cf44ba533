"Folders of runs with damage in any file: they are resumed, shown and loaded, or a `BadInput` says why not."
import logging
import os
import shutil

import pytest
import torch

from conftest import slow
from fuzz import attempts, damaged
from test_training import config, prompts, weights
from opd_nb.core.config import OPDConfig
from opd_nb.core.errors import BadInput
from opd_nb.models.lm import LM
from opd_nb.monitor.report import run_report
from opd_nb.tools.export_hf import find_student
from opd_nb.core.folders import open_folder, unlock_folder
from opd_nb.training.checkpoints import check_resumable, resume_run
from opd_nb.training.loop import train
from opd_nb.training.setup import prepare


@pytest.fixture(scope='module')
def finished(prompts, tmp_path_factory):
    folder = tmp_path_factory.mktemp('finished') / 'run'
    train(config(prompts, folder, max_steps=4, track='tensorboard'), progress=False)
    return folder


def spoil(rng, folder):
    "Damage one file, or two; what was done, for the message."
    files = sorted(p for p in folder.rglob('*') if p.is_file() and p.name != '.lock')
    done = []
    for path in rng.sample(files, rng.choice((1, 1, 2, 3))):
        how = rng.randrange(8)
        data = path.read_bytes()
        path.unlink()
        if how == 0: path.mkdir()
        elif how == 1: path.write_bytes(b'')
        elif how > 2: path.write_bytes(damaged(rng, data))  # else it is gone
        done.append((str(path.relative_to(folder)), how))
    return done


def find(folder): return find_student(str(folder))
def load(folder): return LM.load(str(folder / 'final'), device='cpu')


@pytest.fixture
def quiet():
    logging.getLogger('opd_nb').setLevel(logging.CRITICAL)
    yield
    logging.getLogger('opd_nb').setLevel(logging.NOTSET)


@pytest.mark.parametrize('seconds', [10, pytest.param(60, marks=slow)])
def test_any_damage_of_a_run(prompts, finished, tmp_path, seconds, quiet):
    folder, resumed, refused = tmp_path / 'run', 0, 0
    run = prepare(config(prompts, folder, max_steps=4, resume=True))
    whole = {n: weights(finished / f'step-{n}') for n in (2, 4)}
    for rng in attempts(seconds):
        shutil.copytree(finished, folder, copy_function=os.link)
        run.step, run.events = 0, []
        done = spoil(rng, folder)
        try:
            try: rng.choice([find, load] * 10 + [run_report])(folder)  # whose pictures take long
            except BadInput: refused += 1
            try:
                open_folder(folder, True)
                check_resumable(run.config)
                resume_run(run)
            except BadInput: refused += 1
            else:
                resumed += 1
                if run.step in whole:  # what was taken is what was saved
                    state = run.student.model.state_dict()
                    damage = [name for name, _ in done if name.startswith(f'step-{run.step}/')]
                    assert damage and 'SHA256SUMS' in damage[0] or all(torch.equal(state[k], v) for k, v in whole[run.step].items()), damage
        except Exception:
            print(done)
            raise
        finally:
            unlock_folder(folder)
            shutil.rmtree(folder)
    assert resumed
    print(resumed, 'resumed,', refused, 'refused')
