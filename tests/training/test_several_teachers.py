"Three teachers of one student that have little in common: other tokens and whole distributions, the student's tokens, the logprobs of its tokens."
import json
from dataclasses import replace

import pytest
import torch

from conftest import slow
from servers import contract_server
from test_interruptions import launch
from opd_nb.core.config import OPDConfig
from opd_nb.core.errors import BadInput
from opd_nb.core.types import Conversation, ScoreSignal
from opd_nb.data.agreement import topk_overlap, validate
from opd_nb.data.formats import save_conversations
from opd_nb.lab import countdown
from opd_nb.models.lm import LM, tiny_folder
from opd_nb.monitor.run_log import read_log
from opd_nb.teachers.base import Capabilities, load_teacher, register_teacher
from opd_nb.teachers.mixture import Mixture
from opd_nb.tools.doctor import examine
from opd_nb.tools.export_gguf import export_gguf
from opd_nb.tools.inspect_step import distil_once, load_pair
from opd_nb.training.loop import distil, train, train_step
from opd_nb.training.methods import step_prompts, step_terms
from opd_nb.training.setup import check_templates, pair_warnings, prepare, run_record

LOSSES = ['cover', 'gkd', 'pg']


@register_teacher('numbers')
def numbers_alone(rest, config):
    "A GGUF file that gives the logprob of each token and no lists."
    teacher = load_teacher(f'gguf:{rest}', config)
    teacher.capabilities = replace(teacher.capabilities, access=frozenset({'logprob'}))
    return teacher


@pytest.fixture(scope='module')
def names(tmp_path_factory):
    "Specs of the three. The second has the student's tokenizer and other weights."
    pytest.importorskip('llama_cpp', reason='GGUF teachers need the extra gguf')
    folder = tmp_path_factory.mktemp('teachers')
    lm = LM.load('tiny:student', device='cpu')
    torch.manual_seed(0)
    with torch.no_grad():
        for p in lm.model.parameters(): p += .05 * p.std() * torch.randn_like(p)
    lm.model.save_pretrained(folder / 'alike')
    lm.codec.tok.save_pretrained(folder / 'alike')
    file = export_gguf('tiny:teacher', folder / 'teacher.gguf', 'f32')
    return ['tiny:teacher', f'hf:{folder / "alike"}', f'numbers:{file}']


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return str(save_conversations(countdown.draw(60, answers=True), tmp_path_factory.mktemp('data') / 'prompts.jsonl'))


def config(data, folder, teachers, **kw):
    spec = ','.join(f'{name}@{w}' for name, w in zip(teachers, (2, 1, 1))) if isinstance(teachers, list) else teachers
    kw = dict(student='tiny:student', teacher=spec, loss='auto', data=data, output_dir=folder, max_steps=4, batch=12, max_new_tokens=16, eval_every=2, save_every=2,
              warmup_steps=0, schedule='constant', learning_rate=1e-3, grad_clip=1e9, teacher_top_k=8, teacher_dtype='float32', device='cpu') | kw
    return OPDConfig(_env_file=None, **kw)


def gradient(run): return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in run.weights])


def distilled(run, rollouts):
    "The mean loss of these rollouts, and its gradient."
    run.student.model.zero_grad()
    result = distil(run, rollouts)
    return result, gradient(run) / result.weight


def figures(folder): return [{k: v for k, v in e.items() if 'seconds' not in k} for e in read_log(folder)]


def test_each_is_trained_as_it_would_be_alone(names, data, tmp_path):
    "Loss and gradient of each teacher are those of a run with this teacher and no other, on the same rollouts; in the step they count by prompts."
    run = prepare(config(data, tmp_path, names))
    assert [p.objective for p in run.pairs] == LOSSES and [p.vocab.identical for p in run.pairs] == [False, True, False]
    terms = step_terms(run, 0)
    assert [t.objective for t in terms] == LOSSES and sum(len(t.rollouts) for t in terms) == 12
    losses, gradients = [], []
    for i, term in enumerate(terms):
        assert {run.teacher.teacher_index(r.conversation) for r in term.rollouts} == {i} and term.factor == len(term.rollouts) / 12
        ours, mine = distilled(run, term.rollouts)
        alone = prepare(config(data, tmp_path, names[i]))
        assert alone.loss_name == LOSSES[i]
        theirs, its = distilled(alone, term.rollouts)
        assert ours.trained == theirs.trained and abs(ours.loss - theirs.loss) < 1e-6 and ours.loss > .001
        torch.testing.assert_close(mine, its, atol=1e-6, rtol=1e-5)
        losses.append(ours.loss), gradients.append(mine)
    event = train_step(prepare(config(data, tmp_path, names)))
    assert event['objective'] == 'cover, gkd, pg' and event['scored'] == 12
    assert [event[f'loss_{name}'] for name in LOSSES] == pytest.approx(losses, abs=1e-5)
    assert event['loss'] == pytest.approx(sum(t.factor * x for t, x in zip(terms, losses)), abs=1e-5)
    assert event['grad_norm'] == pytest.approx(sum(t.factor * g for t, g in zip(terms, gradients)).norm().item(), rel=1e-4)


def test_micro_batches_and_what_each_is_worth(names, data, tmp_path):
    "Neither the size of micro-batches nor the units of a loss change its share. Texts and agreement are those of all prompts."
    events = [train_step(prepare(config(data, tmp_path, names, micro_batch=n, lambda_sft=.5))) for n in (1, 5, 64)]
    named = [f'loss_{name}' for name in (*LOSSES, 'sft')]
    for e in events:
        for k in ('loss', 'grad_norm', 'overlap', 'teacher_nll', 'length', *named): assert e[k] == pytest.approx(events[0][k], rel=1e-4), k
        assert e['trained'] == events[0]['trained'] and e['compared'] == events[0]['compared']
    run = prepare(config(data, tmp_path, names, num_generations=2, batch=6))
    owners = [run.teacher.teacher_index(c) for c in step_prompts(run)]
    assert {t.objective: t.factor for t in step_terms(run, 0)} == {loss: owners.count(i) / 12 for i, loss in enumerate(LOSSES) if i in owners}


def test_one_loss_for_all_is_one_term(names, data, tmp_path):
    "A loss that was named: the teachers' units are pooled, each with its own vocabulary."
    run = prepare(config(data, tmp_path, names, loss='alm'))
    term, = step_terms(run, 0)
    whole, of_all = distilled(run, term.rollouts)
    parts = [distilled(prepare(config(data, tmp_path, name, loss='alm')), [r for r in term.rollouts if run.teacher.teacher_index(r.conversation) == i])
             for i, name in enumerate(names)]
    weight = sum(part.weight for part, _ in parts)
    assert whole.weight == weight and whole.loss == pytest.approx(sum(part.loss * part.weight for part, _ in parts) / weight, abs=1e-6)
    torch.testing.assert_close(of_all, sum(g * part.weight for part, g in parts) / weight, atol=1e-6, rtol=1e-4)
    event = train_step(run)
    assert event['objective'] == 'alm' and not any(k.startswith('loss_') for k in event)


def test_a_run_and_one_that_was_resumed(names, data, tmp_path):
    whole = train(config(data, tmp_path / 'whole', names), progress=False)
    part = config(data, tmp_path / 'part', names)
    train(part.model_copy(update=dict(max_steps=2)), progress=False)
    train(part.model_copy(update=dict(resume=True)), progress=False)
    ours, theirs = (([e for e in figures(folder) if e['event'] == 'step']) for folder in (whole.folder, tmp_path / 'part'))
    assert ours == theirs and len(ours) == 4
    run = prepare(config(data, tmp_path, names))
    owners = {LOSSES[run.teacher.teacher_index(c)] for c in run.val}
    validation = [e for e in whole.events if e['event'] == 'validation'][-1]
    assert {k for k in validation if k.startswith('loss_')} == {f'loss_{name}' for name in owners} and validation['loss'] > 0
    samples = [json.loads(line) for line in (whole.folder / 'samples.jsonl').read_text().splitlines()]
    assert [s['prompt'] for s in samples if s['step'] == 4] == [c.prompt[-1]['content'] for c in run.val][:8]  # of all teachers, in order
    record = run_record(run)
    assert all(f'loss {loss}' in record[f'teacher {i}'] for i, loss in enumerate(LOSSES, 1)) and record['loss'] == 'cover, gkd, pg (chosen by auto)'
    assert sum(int(record[f'teacher {i}'].split('; ')[1].split()[0]) for i in (1, 2, 3)) == len(run.train)


def test_what_is_shown_of_a_step(names, data, tmp_path):
    "The record's own teacher, with its loss and its tokens."
    models = load_pair(config(data, None, names))
    puzzle = countdown.draw(1, seed=5)[0]
    for i, (name, loss) in enumerate(zip(names, LOSSES)):
        step = distil_once(models, Conversation(puzzle.messages, dict(teacher=name)), seed=1)
        assert (step.teacher, step.loss) == (name, loss) and name in str(step)
        alone = distil_once(load_pair(config(data, None, name)), puzzle, seed=1)
        assert alone.teacher == '' and step.value == pytest.approx(alone.value, abs=1e-6) and step.token_bytes == alone.token_bytes


def test_doctor_looks_at_each(names, data, tmp_path):
    lines = list(examine(config(data, tmp_path / 'run', names)))
    assert not [line for line in lines if line.level == 'stop'], lines
    for name, loss in zip(names, LOSSES):
        mine = {line.topic: line.text for line in lines if line.text.startswith(f'{name}: ')}
        assert {'scores', 'losses', 'completion', 'prompts', 'tokenizers', 'loss'} <= set(mine) and f'{loss} fits (chosen by auto)' in mine['loss']
    assert sum(int(line.text.split(': ')[1].split()[0]) for line in lines if line.topic == 'prompts') == 60
    lines = list(examine(config(data, tmp_path / 'run', names, loss='gkd')))
    stops = [line.text for line in lines if line.level == 'stop']
    assert len(stops) == 2 and stops[0].startswith(f'{names[0]}: loss')
    nothing = str(save_conversations([Conversation(c.messages, dict(teacher=names[0])) for c in countdown.draw(30)], tmp_path / 'one.jsonl'))
    lines = list(examine(config(nothing, tmp_path / 'run', names)))
    assert [line.level for line in lines if line.topic == 'prompts'] == ['ok', 'warning', 'warning']


@pytest.mark.parametrize('loss, says', [('gkd', 'tiny:teacher: it needs one vocabulary'), ('cover', r'teacher\.gguf: it asks more than this teacher gives \(logprob\).*alm'),
                                        ('continuation', 'tiny:teacher: it asks more'), ('golden', "Did you mean 'gold'")])
def test_a_loss_that_one_of_them_cannot_serve(names, data, tmp_path, loss, says):
    with pytest.raises(BadInput, match=says): prepare(config(data, tmp_path, names, loss=loss))


def test_who_is_not_there(names, data, tmp_path):
    rows = [Conversation(c.messages, dict(teacher='somebody')) for c in countdown.draw(20)]
    routed = str(save_conversations(rows, tmp_path / 'routed.jsonl'))
    with pytest.raises(BadInput, match='somebody'): prepare(config(routed, tmp_path, names))
    with pytest.raises(BadInput, match='mixes the student itself'): prepare(config(data, tmp_path, 'self:,tiny:'))
    refuse = prepare(config(data, tmp_path, names))
    tok = refuse.pairs[0].teacher.codec.tok
    tok.chat_template = "{{ raise_exception('no words') }}" + tok.chat_template
    with pytest.raises(BadInput, match='not for this teacher tiny:teacher'): check_templates(refuse)
    assert pair_warnings(refuse) == []


def test_validation_of_data_asks_the_own_teacher_of_each_record(names, data):
    "Agreement of a data set with three teachers: of each record that of its own."
    both, student = load_teacher(f'tiny:teacher@1,{names[1]}@1', OPDConfig(device='cpu', _env_file=None)), LM.load('tiny:student', device='cpu')
    rows = countdown.draw(6, answers=True)
    assert len({both.teacher_index(c) for c in rows}) == 2
    alone = [topk_overlap([c], both.teachers[both.teacher_index(c)], student)[0] for c in rows]
    assert topk_overlap(rows, both, student) == [pytest.approx(x) for x in alone]
    assert validate(data, both, n=6, student=student, max_new_tokens=8).metrics()['records'] == 6


def test_one_that_only_writes_beside_one_that_scores(data, tmp_path):
    "A teacher without logprobs continues the texts of its prompts."
    with contract_server('tiny:teacher', can=('chat', 'prefill')) as url:
        def at(mode, **kw): return load_teacher(f'api:{url}', OPDConfig(_env_file=None, teacher_cache=tmp_path / mode, teacher_mode=mode, teacher_tokenizer=str(tiny_folder('teacher')), **kw))
        several = Mixture([load_teacher('tiny:'), at('continuation')], [1, 1], ['scores', 'writes'])
        run = prepare(config(data, tmp_path, 'tiny:', batch=4, max_new_tokens=8, val_fraction=.1), several)
        assert [p.objective for p in run.pairs] == ['cover', 'continuation']
        event = train_step(run)
    assert event['loss_continuation'] > 0 and event['loss_cover'] > 0 and event['skipped'] == 0


class Rule:
    "A judge that likes short completions."
    codec, capabilities = None, Capabilities(frozenset({'score'}), generates=False, tokenizer='')
    def score(self, conversations, completions): return [ScoreSignal((), (), None, score=1 / (1 + len(data))) for data, _ in completions]
    def generate(self, conversations, max_new_tokens=128): raise NotImplementedError


@pytest.mark.parametrize('micro_batch', [1, 64])
def test_a_judge_beside_a_teacher_with_logprobs(data, tmp_path, micro_batch):
    "Both are trained by pg, with advantages of their own: two objectives. The completions of a prompt stay together, however small the micro-batch."
    tiny = load_teacher('tiny:')
    tiny.capabilities = replace(tiny.capabilities, access=frozenset({'logprob'}))
    kw = dict(num_generations=4, batch=4, micro_batch=micro_batch)
    run = prepare(config(data, tmp_path, 'tiny:', **kw), Mixture([tiny, Rule()], [1, 1], ['logprobs', 'judge']))
    assert [(p.objective, p.loss.name) for p in run.pairs] == [('pg', 'pg'), ('judge', 'pg')] and run.pairs[1].vocab is None
    terms = step_terms(run, 0)
    assert [t.objective for t in terms] == ['pg', 'judge'] and sum(t.factor for t in terms) == 1
    for term, teacher in zip(terms, (tiny, Rule())):
        ours, mine = distilled(run, term.rollouts)
        theirs, its = distilled(prepare(config(data, tmp_path, 'tiny:', **kw | dict(micro_batch=64)), teacher), term.rollouts)
        assert abs(ours.loss - theirs.loss) < 1e-6 and mine.norm() > 1e-3
        torch.testing.assert_close(mine, its, atol=1e-5, rtol=1e-4)
    event = train_step(run)
    assert event['objective'] == 'pg, judge' and 0 < event['mark'] < 1 and {'loss_pg', 'loss_judge'} <= set(event)


@slow
def test_two_processes_take_the_same_steps(names, data, tmp_path):
    one = train(config(data, tmp_path / 'one', names, max_steps=2), progress=False)
    settings = config(data, tmp_path / 'two', names, max_steps=2).model_dump(mode='json', exclude_defaults=True)
    done = launch(*(f"--{k.replace('_', '-')}={v}" for k, v in settings.items()))
    assert done.returncode == 0, done.stderr[-2000:]
    for a, b in zip(figures(one.folder), figures(tmp_path / 'two')):
        for k in a: assert a[k] == pytest.approx(b[k], rel=1e-3, abs=1e-5) if isinstance(a[k], float) else a[k] == b[k], k
