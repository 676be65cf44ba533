"FSDP on two CPU processes: every kind of run has the losses that one process has, goes on as it was, and leaves ordinary folders."
import json, os, signal, subprocess, sys
from types import SimpleNamespace

import pytest
import torch

from conftest import ROOT, slow
from test_interruptions import same_weights
from test_training import config, figures, prompts, weights
from opd_nb.core.config import OPDConfig
from opd_nb.core.errors import BadInput
from opd_nb.models.fsdp import check_fsdp_settings, shard
from opd_nb.models.lm import LM
from opd_nb.training.loop import train

RUNS = '''
import json, os, peft, socket, sys
from opd_nb.core.config import OPDConfig
from opd_nb.core.distributed import process_state
from opd_nb.core.errors import BadInput
from opd_nb.models.lm import LM
from opd_nb.teachers.base import load_teacher
from opd_nb.training.loop import train

LM.load('tiny:student', device='cpu')  # all is imported once, for both processes
with socket.socket() as s:
    s.bind(('', 0))
    port = s.getsockname()[1]
other = os.fork()
rank = '0' if other else '1'
os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE='2', MASTER_ADDR='localhost', MASTER_PORT=str(port))

class GoesAway:
    "A teacher that has nothing to say to the second process from its third call on; the first two are a validation."
    def __init__(self, t, rank): self.t, self.left, self.codec, self.capabilities = t, 3 if rank else 99, t.codec, t.capabilities
    def score(self, *a):
        self.left -= 1
        if self.left < 0: raise BadInput('teacher', 'tiny:', 'went away', 'Call it back.')
        return self.t.score(*a)

for settings in json.load(open(sys.argv[1])):
    goes_away = settings.pop('goes_away', False)
    c = OPDConfig(_env_file=None, **settings)
    if not goes_away:
        train(c, progress=False)
        continue
    try: train(c, GoesAway(load_teacher(c.teacher, c), process_state('cpu').process_index), progress=False)
    except BadInput as e: print(f'both know: {e}'.replace(chr(10), ' '), flush=True)
if other: sys.exit(os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]))
'''


def divided(folder, configs, seconds=240):
    "Run after run in two processes that divide the layers. If they wait for each other, all of them are ended."
    runs = [c if isinstance(c, dict) else c.model_dump(mode='json', exclude_defaults=True) for c in configs]
    (folder / 'runs.json').write_text(json.dumps(runs))
    env = os.environ | dict(ACCELERATE_USE_FSDP='true', FSDP_VERSION='2', FSDP_RESHARD_AFTER_FORWARD='true', CUDA_VISIBLE_DEVICES='', PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
    process = subprocess.Popen([sys.executable, '-c', RUNS, str(folder / 'runs.json')], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try: out, err = process.communicate(timeout=seconds)
    finally:
        if process.poll() != 0: os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, err[-3000:]
    return out


def compare(one, two, tolerance=1e-4):
    "The same events, with the same losses and gradients."
    one, two = figures(one), figures(two)
    assert [(e['event'], e['step'], e['trained'], e.get('length')) for e in one] == [(e['event'], e['step'], e['trained'], e.get('length')) for e in two]
    for a, b in zip(one, two):
        for k in ('loss', 'grad_norm'): assert abs(a.get(k, 0) - b.get(k, 0)) <= tolerance * max(1, abs(a.get(k, 0))), (k, a, b)
    return one


ADAPTERS = dict(lora=True, lora_dropout=0., learning_rate=1e-3)
UNEVEN = dict(batch=5, micro_batch=2, max_new_tokens=12, val_max_samples=3, schedule='constant', warmup_steps=0)


def test_adapters_references_and_two_teachers_at_once(prompts, tmp_path):
    "Stopped after two steps and resumed; and a teacher that fails in one process: both raise its error."
    kw = UNEVEN | ADAPTERS | dict(max_steps=4, learning_rate=1e-2, lam=.5, lambda_sft=.3, seed=3, eval_every=2, save_every=2, gradient_checkpointing=True, teacher='tiny:teacher@2,tiny:student', loss='auto')
    one = train(config(prompts, tmp_path / 'one', **kw), progress=False)
    two = config(prompts, tmp_path / 'two', **kw | dict(max_steps=2))
    left = config(prompts, tmp_path / 'left', **UNEVEN, max_steps=2, eval_every=2).model_dump(mode='json', exclude_defaults=True)
    said = divided(tmp_path, [two, two.model_copy(update=dict(max_steps=4, resume=True)), left | dict(goes_away=True)])
    events = compare(one.folder, two.output_dir)
    assert {e['on_policy'] for e in events if 'on_policy' in e} == {0, 1} and events[1]['objective'] == 'cover, gkd'
    ours, theirs = weights(one.student), weights(two.output_dir / 'final')
    assert ours.keys() == theirs.keys() and all(torch.allclose(ours[k], theirs[k], atol=1e-3) for k in ours)
    assert sorted(p.name for p in one.student.iterdir()) == sorted(p.name for p in (two.output_dir / 'final').iterdir())
    assert said.count('both know') == said.count('went away') == 2, said


MATRIX = {
    'all weights': {}, 'adapters': ADAPTERS, 'references': dict(lam=.5), 'SFT share': dict(lambda_sft=.3), 'cold start': dict(cold_start_steps=8),
    'two teachers': dict(teacher='tiny:teacher@2,tiny:student', loss='auto'), 'checkpointing': dict(gradient_checkpointing=True),
    'adapters, checkpointing': ADAPTERS | dict(gradient_checkpointing=True), 'adapters in bfloat16': ADAPTERS | dict(dtype='bfloat16', max_steps=2),
    'rewards': dict(reward_weight=.2, reward='countdown', num_generations=4, temperature=.5), 'grpo': dict(method='grpo', reward='countdown', num_generations=8, temperature=.5),
    'kd': dict(method='kd'), 'sft': dict(method='sft'), 'fewer prompts than processes': dict(batch=1), 'muon': dict(optimizer='muon', max_steps=3)}


@slow
def test_each_kind_of_run_over_twenty_steps(prompts, tmp_path):
    "Adapters that are stopped and resumed are the same to the bit. Muon works on matrices in bfloat16, whose sums are rounded otherwise when they are divided; it takes three steps and a base in bfloat16 two, before a rounding makes another completion."
    kw = UNEVEN | dict(max_steps=20, eval_every=10, learning_rate=3e-4, loss='cover', save_every=20)
    runs = {name: kw | more for name, more in MATRIX.items()}
    for name, settings in runs.items(): train(config(prompts, tmp_path / 'one' / name, **settings), progress=False)
    stopped = config(prompts, tmp_path / 'stopped', **kw | ADAPTERS | dict(max_steps=10))
    divided(tmp_path, [config(prompts, tmp_path / 'two' / name, **settings) for name, settings in runs.items()]
            + [stopped, stopped.model_copy(update=dict(max_steps=20, resume=True))], 1200)
    assert figures(stopped.output_dir) == figures(tmp_path / 'two' / 'adapters')
    assert same_weights(stopped.output_dir / 'final', tmp_path / 'two' / 'adapters' / 'final')
    for folder in (stopped.output_dir, tmp_path / 'one' / 'adapters'): train(stopped.model_copy(update=dict(max_steps=22, resume=True, output_dir=folder)), progress=False)  # both in one process
    compare(tmp_path / 'one' / 'adapters', stopped.output_dir)
    for name in [name for name in runs if name != 'adapters']:
        events = compare(tmp_path / 'one' / name, tmp_path / 'two' / name, 1e-2 if name in ('muon', 'adapters in bfloat16') else 1e-4)
        assert any(e.get('grad_norm') for e in events), f'{name} had nothing to learn'


def test_what_cannot_be_divided():
    with pytest.raises(BadInput, match="quantize = '4bit'"): check_fsdp_settings(OPDConfig(_env_file=None, lora=True, quantize='4bit'))
    model = LM.load('tiny:student', device='cpu').model
    model._no_split_modules = None
    with pytest.raises(BadInput, match='which of its modules are layers'): shard(model, SimpleNamespace(device=torch.device('cpu'), num_processes=2))
