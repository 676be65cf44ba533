"""The trackers, for real. tensorboard is read back whenever it is installed; wandb and trackio take longer, in modes that need no network.
To run all: pip install opd_nb[track], then OPD_SLOW=1 pytest tests/test_trackers.py."""
import importlib.util, json, os, subprocess, sys

import pytest

from conftest import slow
from opd_nb.core.errors import BadInput
from opd_nb.core.settings import TRACKERS
from opd_nb.core.config import OPDConfig
from opd_nb.monitor.trackers import Trackers, tracker_names

KEY = 'sk-this-must-not-be-told'


def config(track, **kw): return OPDConfig(track=track, teacher_api_key=KEY, learning_rate=1e-3, _env_file=None, **kw)


def tell(track, folder, steps, **kw):
    trackers = Trackers(config(track), folder, **kw)
    for i in steps: trackers.log(dict(event='step', step=i, loss=1 / i, nll=None))
    trackers.log(dict(event='validation', step=steps[-1], loss=.5))
    trackers.close()


def secrets_in(folder): return [p for p in folder.rglob('*') if p.is_file() and KEY.encode() in p.read_bytes()]


@pytest.mark.parametrize('name', TRACKERS)
def test_a_missing_package_is_named(name, monkeypatch):
    find = importlib.util.find_spec
    if find(name): monkeypatch.setattr(importlib.util, 'find_spec', lambda n, *a: None if n == name else find(n, *a))
    with pytest.raises(BadInput, match=f'pip install {name}'): tracker_names(f' {name}')


def test_an_unknown_tracker_is_named():
    with pytest.raises(BadInput, match="Did you mean 'wandb'"): tracker_names('wandbb')


def test_tensorboard_has_every_number_and_no_secret(tmp_path):
    pytest.importorskip('tensorboard', reason='tensorboard is not installed: pip install tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    tell('tensorboard', tmp_path, range(1, 8))
    tell('tensorboard', tmp_path, range(6, 10), step=5)  # resumed at a checkpoint of step 5: 6 and 7 are told anew
    found = EventAccumulator(str(tmp_path / 'tensorboard')); found.Reload()
    assert found.Tags()['scalars'] == ['step/loss', 'validation/loss']
    assert [e.step for e in found.Scalars('step/loss')] == list(range(1, 10))
    assert [e.value for e in found.Scalars('step/loss')] == pytest.approx([1 / i for i in range(1, 10)])
    assert list(tmp_path.rglob('hparams.yml')) and not secrets_in(tmp_path)


def elsewhere(code, *words, **env):
    "What a fresh process prints; these packages keep what they first saw of the environment."
    env = {k: v for k, v in os.environ.items() if not k.startswith('WANDB_')} | env
    out = subprocess.run([sys.executable, '-c', f'import sys, json; sys.path.insert(0, {os.path.dirname(__file__)!r})\nfrom test_trackers import *\nfrom pathlib import Path\n' + code, *map(str, words)], env=env, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    return out.stdout


@slow
def test_wandb_offline(tmp_path):
    pytest.importorskip('wandb', reason='wandb is not installed: pip install wandb')
    alone = dict(HOME=str(tmp_path), NETRC=str(tmp_path / 'netrc'))
    assert 'WANDB_MODE=offline' in elsewhere('try: wanted("wandb")\nexcept BadInput as e: print(e)', **alone)
    run = tmp_path / 'run'; run.mkdir()
    elsewhere('tell("wandb", Path(sys.argv[1]), range(1, 8)); print()', run, WANDB_MODE='offline', **alone)
    kept = list(run.rglob('run-*.wandb'))
    assert kept and (run / 'run_id').read_text() in str(kept[0]) and b'validation/loss' in kept[0].read_bytes()
    assert not secrets_in(run)


@slow
def test_trackio_here(tmp_path):
    pytest.importorskip('trackio', reason='trackio is not installed: pip install trackio')
    run = tmp_path / 'run'; run.mkdir()
    out = elsewhere('tell("trackio", Path(sys.argv[1]), range(1, 8)); tell("trackio", Path(sys.argv[1]), range(8, 10))\n'
                    'import trackio; r, = trackio.Api().runs("opd_nb"); print(json.dumps([r.name, r.config]))', run, TRACKIO_DIR=str(tmp_path / 'trackio'))
    name, told = json.loads(next(line for line in out.splitlines() if line.startswith('["')))
    assert name == 'run-' + (run / 'run_id').read_text() 
    assert any(b'validation/loss' in p.read_bytes() for p in (tmp_path / 'trackio').rglob('*') if p.is_file())
    assert told['learning_rate'] == 1e-3 and not secrets_in(tmp_path)
