"Records that a hosted teacher cannot read or will not, and what a mixture of hosted teachers costs."
import json
import math

import pytest

from opd_nb.core.config import OPDConfig
from opd_nb.core.errors import BadInput
from opd_nb.core.types import Conversation
from opd_nb.hosted.pricing import Estimate, Price, TeacherGone
from opd_nb.models.lm import tiny_folder
from opd_nb.teachers.base import load_teacher, measure_scoring
from opd_nb.teachers.mixture import Mixture
from opd_nb.training.batch import score
from opd_nb.core.types import Rollout
from servers import contract_server, fault_proxy

PUZZLES = [Conversation(({'role': 'user', 'content': f'Make {n} from 3 7 10.'},)) for n in (31, 20, 24)]
ANSWERS = [(b'7*3=21 21+10=31', True), (b'7+3=10 10+10=20', True), (b'7*3=21 21+10=24', True)]


@pytest.fixture(scope='module')
def url():
    with contract_server('tiny:teacher') as address: yield address


def teacher_at(url, folder, **options):
    return load_teacher(f'api:{url}', OPDConfig(_env_file=None, teacher_cache=folder / 'a', teacher_retries=0, teacher_top_k=8,
                                                teacher_tokenizer=str(tiny_folder('teacher')), **options))


MODES = ['prompt_logprobs', 'prefix_walk', 'continuation', 'sequence']


@pytest.mark.parametrize('mode', MODES[:3])
def test_a_record_that_cannot_be_read(mode, url, tmp_path):
    "Its template refuses it: its error stands in its place, or is raised before anything is asked."
    teacher = teacher_at(url, tmp_path, teacher_mode=mode)
    template = teacher.codec.tok.chat_template
    teacher.codec.tok.chat_template = "{% if 'twenty' in messages[0].content %}{{ raise_exception('no words') }}{% endif %}" + template
    rows = [PUZZLES[0], Conversation(({'role': 'user', 'content': 'Make twenty.'},)), PUZZLES[2]]
    good, bad, other = teacher.score(rows, ANSWERS, on_error='return')
    assert isinstance(bad, BadInput) and 'record 1' in str(bad) and 'no words' in str(bad)
    assert type(good) is type(other) is not BadInput
    before = teacher.endpoint.budget.requests
    with pytest.raises(BadInput, match='record 1'): teacher.score([PUZZLES[1], rows[1]], ANSWERS[:2])
    with pytest.raises(BadInput, match='record 0'): teacher.score([rows[1]], ANSWERS[:1], on_error='raise')
    assert teacher.endpoint.budget.requests == before
    only, = teacher.score([rows[1]], ANSWERS[:1], on_error='return')
    assert isinstance(only, BadInput)


@pytest.mark.parametrize('mode', MODES[:3])
def test_a_record_that_the_endpoint_refuses(mode, url, tmp_path):
    "With 'return' its error, which a run counts as left out; else a signal without a score."
    with fault_proxy(url) as (address, script, _):
        teacher = teacher_at(address, tmp_path, teacher_mode=mode, teacher_concurrency=1)
        script[:] = ['too long']
        signals = teacher.score(PUZZLES, ANSWERS, on_error='return')
        bad, = [s for s in signals if isinstance(s, BadInput)]
        assert 'refused' in str(bad) and 'HTTP 400' in str(bad)
        script[:] = ['too long'] * 30
        one = [Conversation(({'role': 'user', 'content': 'Make 7 from 3 4.'},))], [(b'3+4=7', True)]
        refused, = teacher.score(*one, on_error='return')  # a run counts it, and says so if nothing is left
        assert refused.reason == 'refused'
        with pytest.raises(TeacherGone, match='refuses every completion'): teacher.score(*one)


def test_training_leaves_it_out(url, tmp_path):
    with fault_proxy(url) as (address, script, _):
        teacher = teacher_at(address, tmp_path, teacher_concurrency=1)
        script[:] = ['too long']
        rollouts = []
        for c, (data, stopped) in zip(PUZZLES, ANSWERS):
            ids, ends = teacher.codec.write(data, stopped)
            rollouts.append(Rollout(c, tuple(teacher.codec.prompt(c.prompt)), tuple(ids), tuple(map(int, ends)), data, stopped))
        found = score(teacher, rollouts)
        scored, signals = found.rollouts, found.signals
    assert len(scored) == len(signals) == 2


def test_estimates_are_added():
    a, b = Estimate(2, 100, 10, Price(1., 2.)), Estimate(3, 200, 20, Price(10., 20.))
    both = a + b
    assert (both.requests, both.tokens_in, both.tokens_out) == (5, 300, 30)
    assert both.dollars == pytest.approx(a.dollars + b.dollars) and (both + a).dollars == pytest.approx(2 * a.dollars + b.dollars)
    assert (a + Estimate(1, 1, 1, None)).dollars is None and 'price unknown' in str(a + Estimate(1, 1, 1, None))


def test_a_mixture_of_hosted_teachers_has_a_price(url, tmp_path):
    "The sum of what its members would take; a member that runs here costs nothing."
    dear = teacher_at(url, tmp_path, teacher_price='10,20')
    cheap = teacher_at(url.replace('127.0.0.1', 'localhost'), tmp_path, teacher_price='1,2')
    mixed = Mixture([dear, cheap], [1, 1], ['dear', 'cheap'])
    assert mixed.hosted
    rows = [Conversation(c.messages, dict(teacher=name)) for c, name in zip(PUZZLES, ('dear', 'cheap', 'dear'))]
    estimate = mixed.estimate(rows, ANSWERS)
    alone = dear.estimate([rows[0], rows[2]], [ANSWERS[0], ANSWERS[2]]).dollars + cheap.estimate(rows[1:2], ANSWERS[1:2]).dollars
    assert estimate.dollars == pytest.approx(alone) and alone > 0
    assert mixed.estimate(rows[:1], ANSWERS[:1]).dollars == dear.estimate(rows[:1], ANSWERS[:1]).dollars
    took = measure_scoring(mixed, Conversation((*PUZZLES[0].messages, dict(role='assistant', content='7*3=21 21+10=31'))))
    assert took['dollars'] > 0 and not math.isnan(took['dollars'])


def test_a_mixture_of_teachers_here_has_none():
    here = load_teacher('tiny:teacher')
    mixed = Mixture([here, here], [1, 1])
    assert not mixed.hosted and mixed.estimate(PUZZLES, ANSWERS) is None and json.dumps(measure_scoring(mixed, PUZZLES[0]))
