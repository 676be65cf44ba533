"Rollouts written by a copy of the student in bfloat16: whole runs on the embedded pair."
import pytest
import torch

from opd_nb.core.config import OPDConfig
from opd_nb.data.formats import save_conversations
from opd_nb.lab import countdown
from opd_nb.models.lm import LM
from opd_nb.monitor.run_log import read_log
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


def test_the_student_itself_keeps_its_format_and_learns_what_the_copy_wrote(prompts, tmp_path):
    run = prepare(config(prompts, tmp_path))
    written = sample(run, run.train, 0)
    assert {w.dtype for w in run.student.model.parameters()} == {torch.float32}
    half = LM.load('tiny:student', device='cpu', dtype='bfloat16')
    assert [r.ids for r in written] == [r.ids for r in rollout(half, run.train, 16, run.config.seed, 0, temperature=run.config.temperature)]
    assert all(r.logprobs and len(r.logprobs) == len(r.ids) for r in written)


def test_estimators_divide_by_the_probabilities_of_the_copy(prompts, tmp_path):
    "On-policy `pg` has a ratio of one; for tokens of the copy it is that of student and copy."
    from opd_nb.training.batch import read_and_align, score
    run = prepare(config(prompts, tmp_path, loss='trust'))
    scored = score(run.teacher, sample(run, run.train, 0))
    pair = run.pairs[0].vocab
    batch = read_and_align(run.student, scored.rollouts, scored.signals, pair)
    kept = torch.tensor([x for r in scored.rollouts for x in r.logprobs])
    torch.testing.assert_close(batch.student.logprobs, kept)
