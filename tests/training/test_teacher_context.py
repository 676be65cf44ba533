"A teacher that is told more, and the student as its own teacher: what leaks, what is refused, what is learnt, how it is resumed."
import json
import logging

import pytest
import torch

from opd_nb.core.config import OPDConfig
from opd_nb.core.errors import BadInput
from opd_nb.monitor.run_log import read_log
from opd_nb.teachers.base import load_teacher
from opd_nb.training.checkpoints import load_state, newest_checkpoint
from opd_nb.training.loop import train
from opd_nb.training.methods import step_terms
from opd_nb.training.setup import prepare

MARK = 'Xylophone-Quartz'


@pytest.fixture
def data(tmp_path):
    def write(n=24, **fields):
        rows = [dict(prompt=f'Make {i + 9} from 3 7 10.', response='7*3=21 21+10=31') | fields for i in range(n)]
        path = tmp_path / 'prompts.jsonl'
        path.write_text(''.join(json.dumps(r) + '\n' for r in rows), encoding='utf-8')
        return path
    return write


def settings(tmp_path, prompts, name='run', **kw):
    kw = dict(student='tiny:student', teacher='self:', data=str(prompts), output_dir=tmp_path / name, max_steps=4, batch=8, max_new_tokens=12, val_fraction=.2,
              eval_every=2, patience=0, warmup_steps=0, learning_rate=1e-3, save_every=2, schedule='constant', device='cpu') | kw
    return OPDConfig(_env_file=None, **kw)


def told(tmp_path):
    "Settings that tell the teacher a system message and an example, each with a mark in it, from files."
    (tmp_path / 'rule.md').write_text(f'Write the steps of {MARK}.')
    (tmp_path / 'two.jsonl').write_text(json.dumps(dict(prompt=f'Make 5 from 2 3, {MARK}.', answer='2+3=5')) + '\n')
    return dict(teacher_system=str(tmp_path / 'rule.md'), teacher_examples=tmp_path / 'two.jsonl', teacher_sees='reference')


def mean_loss(done, steps): return sum(e['loss'] for e in done.events if e['event'] == 'step' and e['step'] in steps) / len(steps)
def figures(folder): return [{k: v for k, v in e.items() if 'seconds' not in k} for e in read_log(folder)]


def weights(folder):
    from safetensors.torch import load_file
    return load_file(next(folder.glob('*.safetensors')))


class Watched:
    "A teacher that notes what it is shown."
    def __init__(self, teacher): self.teacher, self.codec, self.capabilities, self.seen = teacher, teacher.codec, teacher.capabilities, []
    def score(self, conversations, completions, on_error='raise'):
        self.seen += [json.dumps(c.prompt) for c in conversations]
        return self.teacher.score(conversations, completions, on_error)


def test_no_byte_of_it_reaches_the_student(tmp_path, data):
    "Neither its prompt nor a file of the run; the teacher sees all of it in every prompt."
    config = settings(tmp_path, data(teacher_context=f'A hint: {MARK}.', teacher_messages=[['Who?', f'{MARK}.']]), max_steps=2, lambda_sft=.5, **told(tmp_path))
    teacher = Watched(load_teacher('tiny:', config))
    run = prepare(config, teacher)
    rollouts = [r for term in step_terms(run, 0) for r in term.rollouts]
    read = run.student.codec.bytes
    assert len(rollouts) == 16 and not any(MARK.encode() in read.bytes_of([*r.prompt_ids, *r.ids]) for r in rollouts)
    assert not any(MARK in json.dumps(r.conversation.messages) for r in rollouts)
    plain = prepare(config.model_copy(update=dict(teacher_system=None, teacher_examples=None, teacher_sees='prompt')), teacher)
    assert [r.prompt_ids for t in step_terms(plain, 0) for r in t.rollouts] == [r.prompt_ids for r in rollouts]
    done = train(config, teacher, progress=False)
    assert teacher.seen and all(text.count(MARK) == 4 and '21+10=31' in text for text in teacher.seen)
    assert (done.folder / 'samples.jsonl').stat().st_size
    for path in done.folder.rglob('*'):
        if path.is_file(): assert MARK.encode() not in path.read_bytes(), path
    assert 'told a system message' in ' '.join((done.folder / 'config.yaml').read_text().split())


@pytest.mark.parametrize('kw', [dict(), dict(lora=True, teacher='self:adapter-off'), dict(lora=True, teacher='self:ema@0.9')], ids=['start', 'adapters off', 'average'])
def test_a_student_teaches_itself_what_it_is_told(tmp_path, data, kw):
    "Few steps on the embedded student, told the answers: what it was told moves into the weights."
    kw = dict(max_steps=16, learning_rate=2e-3, batch=16, eval_every=100, num_generations=1) | (dict(learning_rate=1e-2) if kw else {}) | kw
    done = train(settings(tmp_path, data(32), teacher_sees='reference', **kw), progress=False)
    first, last = mean_loss(done, (1, 2, 3)), mean_loss(done, (14, 15, 16))
    assert done.events[0]['objective'] == 'gkd' and first > .02 and last < .8 * first, (first, last)


def test_untold_it_has_nothing_to_teach(tmp_path, data, caplog):
    with caplog.at_level(logging.WARNING, 'opd_nb'): done = train(settings(tmp_path, data(), max_steps=1), progress=False)
    step = next(e for e in done.events if e['event'] == 'step')
    assert abs(step['loss']) < 1e-6 and step['grad_norm'] < 1e-3
    assert 'its own teacher and is told nothing more' in caplog.text


@pytest.mark.parametrize('kw', [dict(teacher='self:ema@0.8'), dict(teacher='self:ema@0.8', lora=True), dict(teacher='self:')], ids=['whole', 'adapters', 'start'])
def test_it_is_resumed_to_the_bit(tmp_path, data, kw):
    prompts = data()
    kw = dict(teacher_sees='reference') | kw
    whole = train(settings(tmp_path, prompts, 'whole', **kw), progress=False)
    config = settings(tmp_path, prompts, 'part', **kw)
    train(config.model_copy(update=dict(max_steps=2)), progress=False)
    again = train(config.model_copy(update=dict(resume=True)), progress=False)
    a, b = weights(whole.student), weights(again.student)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    ours = [load_state(newest_checkpoint(x.folder)).get('teacher', {}).get('average', []) for x in (whole, again)]
    assert len(ours[0]) == len(ours[1]) and all(torch.equal(x, y) for x, y in zip(*ours))
    assert bool(ours[0]) == ('ema' in kw['teacher'])
    earlier = load_state(whole.folder / 'step-2').get('teacher', {}).get('average', [])
    assert not any(torch.equal(x, y) for x, y in zip(ours[0], earlier) if x.any())  # it follows
    losses = [[e['loss'] for e in figures(x.folder) if e['event'] == 'step'] for x in (whole, again)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_an_older_checkpoint_has_no_average(tmp_path, data, caplog):
    prompts = data()
    config = settings(tmp_path, prompts, teacher='tiny:student', teacher_sees='reference')
    train(config.model_copy(update=dict(max_steps=2)), progress=False)
    with caplog.at_level(logging.WARNING, 'opd_nb'): train(config.model_copy(update=dict(resume=True, teacher='self:ema@0.9')), progress=False)
    assert 'has no average; the teacher begins' in caplog.text


def test_other_words_for_a_record_are_other_data(tmp_path, data):
    config = settings(tmp_path, data(teacher_context='One hint.'))
    train(config.model_copy(update=dict(max_steps=2)), progress=False)
    data(teacher_context='Another.')
    with pytest.raises(BadInput, match='not what the run that is resumed was trained on'): train(config.model_copy(update=dict(resume=True)), progress=False)


def refused(tmp_path, prompts, match, **kw):
    with pytest.raises(BadInput, match=match): prepare(settings(tmp_path, prompts, **kw))


def test_what_cannot_be_told_is_refused(tmp_path, data):
    prompts = data()
    refused(tmp_path, prompts, 'too short a context for 24 of 24 prompts with what only it is told', teacher='tiny:', teacher_system='Write the steps. ' * 300)
    refused(tmp_path, prompts, 'needs adapters', teacher='self:adapter-off')
    refused(tmp_path, prompts, "'self:ema@0.99'|decay", teacher='self:ema@2')
    refused(tmp_path, prompts, 'mixes the student itself', teacher='self:,tiny:')
    refused(tmp_path, prompts, 'is no file', teacher_system='rule.md')
    refused(tmp_path, prompts, 'answre', teacher_words='{question} {answre}')
    (tmp_path / 'none.jsonl').write_text('\n')
    refused(tmp_path, prompts, 'has no turns', teacher_examples=tmp_path / 'none.jsonl')
    refused(tmp_path, data(response=''), 'shows the teacher the reference answer, but 24 rows have none', teacher_sees='reference')
    refused(tmp_path, data(teacher_sytem='x'), 'did you mean teacher_system')


def test_little_room_is_said(tmp_path, data, caplog):
    with caplog.at_level(logging.WARNING, 'opd_nb'):
        run = prepare(settings(tmp_path, data(), teacher='tiny:', teacher_system='Write the steps. ' * 3))
        assert 'leaves less than' not in caplog.text
        room = run.teacher.context - max(len(run.teacher.codec.prompt(run.teacher.told(c).prompt)) for c in run.train)
        prepare(settings(tmp_path, data(), teacher='tiny:', teacher_system='Write the steps. ' * 3, max_new_tokens=int(room) + 1, max_prompt_tokens=40))
    assert 'leaves less than' in caplog.text
