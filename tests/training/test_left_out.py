"What the teacher cannot read is counted and said; a prompt that is too long is the same prompt for both readers."
import json
import logging
import shutil

import pytest
import torch

from opd_nb.core.config import OPDConfig
from opd_nb.core.errors import BadInput
from opd_nb.core.types import Conversation
from opd_nb.models.lm import LM, tiny_folder
from opd_nb.monitor.report import run_report
from opd_nb.teachers.base import load_teacher
from opd_nb.training.loop import train
from opd_nb.training.rollouts import as_rollout, rollout

SHORT, LONG = 'Make {} from 3 7 10.', 'Keep it short. ' * 20 + 'Make {} from 3 7 10.'


def data(folder, *kinds):
    path = folder / 'prompts.jsonl'
    rows = [dict(prompt=kind.format(i), response='7*3=21 21+10=31') for k, kind in enumerate(kinds) for i in range(20 + 20 * k, 40 + 20 * k)]
    path.write_text(''.join(json.dumps(r) + '\n' for r in rows), encoding='utf-8')
    return path


@pytest.fixture
def short_teacher(tmp_path):
    "The embedded teacher with a context of 48 tokens."
    folder = tmp_path / 'short'
    shutil.copytree(tiny_folder('teacher'), folder)
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps(config | dict(max_position_embeddings=48)))
    return str(folder)


def settings(tmp_path, prompts, **kw):
    kw = dict(student='tiny:student', data=str(prompts), output_dir=tmp_path / 'run', loss='gold', max_steps=6, batch=8, max_new_tokens=12, val_fraction=0, patience=0, device='cpu') | kw
    return OPDConfig(_env_file=None, **kw)


def test_texts_that_are_too_long_for_the_teacher_are_counted(tmp_path, short_teacher, caplog):
    "Half of the prompts are. It is said before the run, in each step, as a warning, at the end, and on the page."
    prompts = data(tmp_path, SHORT, LONG)
    with caplog.at_level(logging.INFO, 'opd_nb'): done = train(settings(tmp_path, prompts, teacher=short_teacher), progress=False)
    assert '20 of 40 prompts are too long for the context of the teacher' in caplog.text
    steps = [e for e in done.events if e['event'] == 'step']
    assert all(e['scored'] + e['left_out'] == 8 and e['left_out'] == e['left_out_too_long'] for e in steps)
    n = sum(e['left_out'] for e in steps)
    assert n and any('texts_left_out' in w for e in steps for w in e.get('warnings', []))
    from opd_nb.monitor.report import end_of_run
    assert f'the teacher left out {n} of 48 completions (too long {n})' in end_of_run(done.events, done.seconds)
    assert f'left out {n} of 48 completions' in run_report(done.folder).read_text(encoding='utf-8')


def test_a_run_of_which_nothing_could_be_learnt_is_refused(tmp_path, short_teacher):
    with pytest.raises(BadInput, match='too short a context for 20 of 20 prompts'):
        train(settings(tmp_path, data(tmp_path, LONG), teacher=short_teacher), progress=False)
    assert not (tmp_path / 'run' / 'log.jsonl').exists()


def test_references_that_are_left_out_are_said_too(tmp_path, short_teacher):
    done = train(settings(tmp_path, data(tmp_path, SHORT, LONG), teacher=short_teacher, method='kd', max_steps=6), progress=False)
    assert any('texts_left_out' in w for e in done.events for w in e.get('warnings', []))


class Refusing:
    "An endpoint that says 400 to all but short prompts."
    def __init__(self, teacher): self.teacher, self.codec, self.capabilities = teacher, teacher.codec, teacher.capabilities

    def score(self, conversations, completions, on_error='raise'):
        signals = self.teacher.score(conversations, completions)
        return [s if len(c.prompt[0]['content']) < 100 else BadInput('record', 1, 'is refused (HTTP 400)', 'Be short.') for c, s in zip(conversations, signals)]


def test_what_a_teacher_refuses_is_counted(tmp_path):
    done = train(settings(tmp_path, data(tmp_path, SHORT, LONG), teacher='tiny:', micro_batch=2), Refusing(load_teacher('tiny:', OPDConfig(device='cpu', _env_file=None))), progress=False)
    assert sum(e['left_out'] for e in done.events) == sum(e['left_out_other'] for e in done.events) > 0


def test_an_endpoint_that_refuses_the_longest_does_not_end_the_run(tmp_path):
    "They come together in a micro-batch, of which it refuses all."
    from servers import served
    pytest.importorskip('xllamacpp', reason="llama.cpp's server comes with the dev requirements")
    from opd_nb.teachers.api import api_teacher
    prompts = data(tmp_path, SHORT, LONG)
    with served('tiny:teacher') as (url, _):
        teacher = api_teacher(url, OPDConfig(_env_file=None, teacher_cache=tmp_path / 'cache.sqlite', teacher_tokenizer=str(tiny_folder('teacher')), max_new_tokens=12))
        from opd_nb.hosted.client import Refused
        ask = teacher.endpoint.ask
        async def refuse(request, *args, **kw):
            if request.tokens_in > 60: raise Refused('the context holds 60 tokens')
            return await ask(request, *args, **kw)
        teacher.endpoint.ask = refuse
        done = train(settings(tmp_path, prompts, teacher='tiny:', loss='auto', micro_batch=2), teacher, progress=False)
    assert sum(e['left_out_refused'] for e in done.events) == sum(e['left_out'] for e in done.events) > 0


@pytest.mark.parametrize('rows', [
    [('user', 'a passage ' * 100 + 'Make 31 from 3 7 10.')],
    [('system', 'Be short.'), ('user', 'a passage ' * 100 + 'Make 31 from 3 7 10.')],
    [('system', 'a passage ' * 100), ('user', 'Make 31 from 3 7 10.')],
    [('user', 'a passage ' * 100), ('assistant', 'Yes.'), ('user', 'Make 31 from 3 7 10.')],
    [('user', 'Ü€😀' * 300)]], ids=['one turn', 'system', 'long system', 'two turns', 'wide letters'])
def test_both_readers_have_the_same_prompt(rows):
    "Whatever was cut of it, for a rollout and for a reference."
    lm, teacher = LM.load('tiny:student', device='cpu'), load_teacher('tiny:', OPDConfig(device='cpu', _env_file=None))
    c = Conversation((*(dict(role=r, content=t) for r, t in rows), dict(role='assistant', content='7*3=21')))
    for r in (*rollout(lm, [c], 8, max_prompt_tokens=50), as_rollout(lm.codec, c, 8, 50)):
        assert len(r.prompt_ids) <= 50 and list(r.prompt_ids) == lm.codec.prompt(r.conversation.prompt)
        assert r.conversation.prompt[-1]['content'].endswith(rows[-1][1][-4:]) and r.conversation.prompt[-1]['role'] == 'user'
        assert len(teacher.codec.prompt(r.conversation.prompt)) < 120 and r.conversation.reference == '7*3=21'


def test_too_little_room_for_any_prompt_is_said_before_the_run(tmp_path):
    with pytest.raises(BadInput, match='leaves no room for a prompt'):
        train(settings(tmp_path, data(tmp_path, SHORT), teacher='tiny:', max_prompt_tokens=3), progress=False)
    assert not (tmp_path / 'run' / 'log.jsonl').exists()


class Damaged:
    "A teacher whose numbers are NaN: of whole distributions, or of lists."
    def __init__(self, teacher, lists):
        self.teacher, self.lists, self.codec, self.capabilities = teacher, lists, teacher.codec, teacher.capabilities
        if lists: from dataclasses import replace; self.capabilities = replace(teacher.capabilities, access=frozenset({'topk', 'logprob'}), k=2)

    def score(self, conversations, completions):
        from dataclasses import replace
        from opd_nb.core.types import TopKSignal
        signals = self.teacher.score(conversations, completions)
        if not self.lists: return [replace(s, logprobs=s.logprobs * torch.nan, hidden=s.hidden * torch.nan) for s in signals]
        return [TopKSignal(s.ids, s.ends, s.logprobs * torch.nan, torch.full((len(s.ids), 2), -1), torch.zeros(len(s.ids), 2)) for s in signals]


@pytest.mark.parametrize('lists', [False, True])
def test_a_teacher_that_sends_no_number_is_named(tmp_path, lists):
    "And not the student's learning rate, nor the loss."
    teacher = Damaged(load_teacher('tiny:', OPDConfig(device='cpu', _env_file=None)), lists)
    with pytest.raises(BadInput, match='teacher = .*gave no number for any token'):
        train(settings(tmp_path, data(tmp_path, SHORT), teacher='tiny:', loss='auto', max_steps=12, batch=2), teacher, progress=False)


def test_a_step_in_which_nothing_was_scored_has_no_loss(tmp_path):
    class Silent(Refusing):
        def score(self, conversations, completions, on_error='raise'): return [BadInput('record', 1, 'is refused', 'Be short.')] * len(completions)
    done = train(settings(tmp_path, data(tmp_path, SHORT), teacher='tiny:', val_fraction=.2, eval_every=1, max_steps=2), Silent(load_teacher('tiny:', OPDConfig(device='cpu', _env_file=None))), progress=False)
    assert all(e['loss'] is None and not e['trained'] for e in done.events) and len(done.events) == 5
