"Rollouts written by a copy of the student in bfloat16: whole runs on the embedded pair."
from dataclasses import replace

import pytest
import torch

from opd_nb.core.config import OPDConfig
from opd_nb.data.formats import save_conversations
from opd_nb.lab import countdown
from opd_nb.models.lm import LM
from opd_nb.monitor.run_log import read_log
from opd_nb.training.batch import read_and_align, score
from opd_nb.training.loop import train
from opd_nb.training.methods import sample
from opd_nb.training.rollouts import rollout
from opd_nb.training.setup import prepare


@pytest.fixture(scope='module')
def prompts(tmp_path_factory):
    return str(save_conversations(countdown.draw(60, answers=True), tmp_path_factory.mktemp('data') / 'prompts.jsonl'))


def config(prompts, folder=None, **kw):
    kw = dict(student='tiny:student', teacher='tiny:teacher', loss='cover', data=prompts, output_dir=folder, max_steps=4, batch=8, max_new_tokens=16,
              eval_every=10, save_every=2, warmup_steps=1, learning_rate=1e-3, device='cpu', rollout_dtype='bfloat16') | kw
    return OPDConfig(_env_file=None, **kw)


def losses(folder): return [e['loss'] for e in read_log(folder) if e['event'] == 'step']


@pytest.mark.parametrize('how', [{}, dict(lora=True), dict(positions='entropy:0.5'), dict(loss='trust')])
def test_a_run_that_is_resumed_writes_the_same(prompts, tmp_path, how):
    train(config(prompts, tmp_path / 'parts', max_steps=2, schedule='constant', **how), progress=False)
    resumed = train(config(prompts, tmp_path / 'parts', schedule='constant', resume=True, **how), progress=False)
    straight = train(config(prompts, tmp_path / 'straight', schedule='constant', **how), progress=False)
    assert losses(resumed.folder) == losses(straight.folder) and len(losses(resumed.folder)) == 4
    weights = [LM.load(str(run.student), device='cpu').model.state_dict() for run in (resumed, straight)]
    for name, w in weights[0].items(): torch.testing.assert_close(w, weights[1][name], atol=0, rtol=0)


def test_a_copy_writes_and_the_student_keeps_its_format(prompts, tmp_path):
    run = prepare(config(prompts, tmp_path))
    written = sample(run, run.train, 0)
    assert {w.dtype for w in run.student.model.parameters()} == {torch.float32}
    how = dict(max_new_tokens=16, seed=run.config.seed, temperature=run.config.temperature)
    half = LM.load('tiny:student', device='cpu', dtype='bfloat16')
    assert [r.ids for r in written] == [r.ids for r in rollout(half, run.train, **how)]
    assert [r.ids for r in written] != [r.ids for r in rollout(run.student, run.train, **how)]
    assert all(r.logprobs is None for r in written)       # `cover` divides by no probability


def test_estimators_divide_by_the_probabilities_of_the_copy(prompts, tmp_path):
    run = prepare(config(prompts, tmp_path, loss='trust'))
    pair = run.pairs[0]
    scored = score(run.teacher, sample(run, run.train, 0))
    half = LM.load('tiny:student', device='cpu', dtype='bfloat16')
    by_copy = rollout(half, run.train, 16, run.config.seed, temperature=run.config.temperature, keep_logprobs=True)
    assert [r.logprobs for r in scored.rollouts] == [r.logprobs for r in by_copy]
    batch = read_and_align(run.student, scored.rollouts, scored.signals, pair.vocab)
    plain = replace(batch.student, logprobs=None)
    losses = [pair.loss(student, batch.teacher, batch.alignment).total.item() for student in (batch.student, plain)]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=.05)


def test_what_the_copy_writes_decides_nothing_when_it_is_the_student(prompts, tmp_path):
    "A student in bfloat16 shares all weights with its copy, and writes the same."
    own, copy = (prepare(config(prompts, tmp_path, dtype='bfloat16', rollout_dtype=name)) for name in ('auto', 'bfloat16'))
    assert [r.ids for r in sample(own, own.train, 0)] == [r.ids for r in sample(copy, copy.train, 0)]
    pairs = zip(copy.sampler.copy.model.parameters(), copy.student.model.parameters())
    assert all(a is b for a, b in pairs)
