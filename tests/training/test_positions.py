"Which positions count, completions that grow, a reward beside distillation: whole runs on the embedded pair."
import math

import pytest
import torch

from opd_nb.core.config import OPDConfig
from opd_nb.core.errors import BadInput
from opd_nb.core.types import Conversation, PositionChoice
from opd_nb.data.formats import save_conversations
from opd_nb.lab import countdown
from opd_nb.losses.positions import beginning
from opd_nb.monitor.run_log import read_log
from opd_nb.tools.inspect_step import load_pair
from opd_nb.tools.trial import probe_round
from opd_nb.training.grpo import REWARDS, register_reward
from opd_nb.training.loop import forward_backward, train
from opd_nb.training.setup import prepare


@pytest.fixture(scope='module')
def prompts(tmp_path_factory):
    return str(save_conversations(countdown.draw(60, answers=True), tmp_path_factory.mktemp('data') / 'prompts.jsonl'))


def config(prompts, folder=None, **kw):
    kw = dict(student='tiny:student', teacher='tiny:teacher', loss='cover', data=prompts, output_dir=folder, max_steps=4, batch=6, max_new_tokens=16,
              eval_every=2, save_every=2, warmup_steps=1, learning_rate=1e-3, device='cpu') | kw
    return OPDConfig(_env_file=None, **kw)


@pytest.fixture
def brevity():
    "A reward that always tells completions apart."
    register_reward('brevity')(lambda c, text: 1 / (1 + len(text)))
    yield 'brevity'
    del REWARDS['brevity']


def steps(folder): return [e for e in read_log(folder) if e['event'] == 'step']


@pytest.mark.parametrize('positions', ['first:0.3', 'entropy:0.5', 'teacher_entropy:0.5'])
def test_a_run_with_fewer_positions_learns_from_fewer(prompts, tmp_path, positions):
    whole = train(config(prompts, tmp_path / 'all', max_steps=2), progress=False)
    part = train(config(prompts, tmp_path / 'part', max_steps=2, positions=positions), progress=False)
    a, b = steps(whole.folder)[0], steps(part.folder)[0]
    assert 0 < b['trained'] < .75 * a['trained']
    assert a['length'] == b['length']                                    # written to the end all the same
    first = [[e for e in run.events if e['event'] == 'validation'][0] for run in (whole, part)]
    assert first[0]['trained'] == first[1]['trained'] and first[0]['loss'] == first[1]['loss']  # validated on all positions


@pytest.mark.parametrize('positions', ['first:0.4', 'entropy:0.5'])
def test_micro_batches_choose_the_same_positions(prompts, positions):
    gradients = []
    for n in (1, 6):
        run = prepare(config(prompts, positions=positions, micro_batch=n))
        term, = forward_backward(run)
        gradients.append((term.trained, term.total, [g / term.weight for g in term.gradients if g is not None]))
    (n_a, total_a, a), (n_b, total_b, b) = gradients
    assert n_a == n_b and total_a == pytest.approx(total_b, rel=1e-4)
    for x, y in zip(a, b): torch.testing.assert_close(x, y, atol=2e-5, rtol=1e-3)


def test_entropies_of_writing_and_of_reading_choose_alike(prompts, monkeypatch):
    def trained(keep):
        run = prepare(config(prompts, positions='entropy:0.5'))
        if not keep:
            sampler = run.sampler.func
            run.sampler = lambda *a, **kw: sampler(*a, **kw)  # without `keep_entropies`, as from a server
        term, = forward_backward(run)
        assert all((r.entropies is not None) == keep for r in term.term.rollouts)
        return term.trained, term.total
    (n_a, a), (n_b, b) = trained(True), trained(False)
    assert n_a == n_b and a == pytest.approx(b, rel=1e-3)


def test_a_teacher_is_not_asked_about_what_is_left_out(prompts):
    run, asked = prepare(config(prompts, positions='first:0.3')), []
    score = run.teacher.score
    run.teacher.score = lambda conversations, completions, **kw: asked.extend(completions) or score(conversations, completions, **kw)
    term, = forward_backward(run)
    rollouts = term.term.rollouts
    expected = {beginning(PositionChoice('first', .3), r).data for r in rollouts}
    assert {data for data, _ in asked} == expected != {r.data for r in rollouts}


def test_completions_grow(prompts, tmp_path):
    done = train(config(prompts, tmp_path / 'run', first_new_tokens=2, temperature=2.), progress=False)
    lengths = [e['length'] for e in steps(done.folder)]
    assert lengths[0] <= 2 and lengths[1] <= 9 < lengths[2]
    validation = [e for e in done.events if e['event'] == 'validation'][0]
    assert validation['length'] > 2


def test_reward_beside_distillation(prompts, brevity, tmp_path):
    settings = dict(reward=brevity, reward_weight=.5, num_generations=4, batch=3, temperature=.5, schedule='constant')
    done = train(config(prompts, tmp_path / 'whole', **settings), progress=False)
    first = steps(done.folder)[0]
    assert first['loss'] == pytest.approx(first['loss_opd'] + .5 * first['loss_grpo']) and 0 < first['reward'] <= 1
    validations = [e for e in done.events if e['event'] == 'validation']
    assert all('reward' in e for e in validations)
    cut = config(prompts, tmp_path / 'part', **settings)
    train(cut.model_copy(update=dict(max_steps=2)), progress=False)
    part = train(cut.model_copy(update=dict(resume=True)), progress=False)
    keys = ('loss', 'loss_opd', 'loss_grpo', 'reward', 'grad_norm')
    assert [{k: e[k] for k in keys} for e in steps(part.folder)[2:]] == [{k: e[k] for k in keys} for e in steps(done.folder)[2:]]


def test_the_gradient_is_the_sum_of_both(prompts, brevity):
    def gradient(**kw):
        run = prepare(config(prompts, num_generations=4, batch=3, temperature=.5, reward=brevity, **kw))
        terms = forward_backward(run)
        return [sum(t.term.factor * t.gradients[i] / t.weight for t in terms if t.weight) for i, p in enumerate(run.weights)]
    opd, grpo = gradient(), gradient(method='grpo')
    assert max(g.abs().max() for g in grpo) > 0
    for both, a, b in zip(gradient(reward_weight=.5), opd, grpo): torch.testing.assert_close(both, a + .5 * b, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize('kw, says', [
    (dict(positions='first:0'), 'over 0 and at most 1'), (dict(positions='last:0.5'), 'Use all, first:0.3'), (dict(positions='first:0.3', method='grpo'), 'grpo has none'),
    (dict(first_new_tokens=99), 'more than the longest rollout'), (dict(reward_weight=1), 'there is one of each'),
    (dict(reward_weight=-1), 'at least 0'), (dict(reward_weight=1, num_generations=4, method='kd'), 'writes now')])
def test_bad_input(prompts, kw, says):
    with pytest.raises(BadInput, match=says): config(prompts, **kw)


@pytest.mark.parametrize('reward, says', [('countdwn', 'Did you mean'), ('countdown', 'needs numbers')])
def test_a_reward_is_tried_before_the_models_are_loaded(tmp_path, reward, says):
    "Not at the first validation, when a step of rollouts has been written and paid for."
    plain = [Conversation((dict(role='user', content=f'Question {i}?'),)) for i in range(4)]
    data = str(save_conversations(plain, tmp_path / 'plain.jsonl'))
    nowhere = dict(student='./no/such/student', teacher='hf:./no/such/teacher')
    with pytest.raises(BadInput, match=says):
        prepare(config(data, tmp_path / 'run', reward=reward, reward_weight=.5, num_generations=2, **nowhere))


def test_the_forecast_counts_what_is_read(prompts):
    "A first look trains on the positions of the run, and asks the teacher about as much."
    whole, part = (probe_round(load_pair(config(prompts, positions=p)), countdown.draw(8), 8, 8) for p in ('all', 'first:0.3'))
    assert [r.ids for r in part.rollouts] == [r.ids for r in whole.rollouts] == [r.ids for r in whole.read]
    assert [len(r.ids) for r in part.read] == [math.ceil(.3 * len(r.ids)) for r in part.rollouts]
    assert part.metrics['compared'] < whole.metrics['compared']
