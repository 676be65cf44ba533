"What only the teacher is told, by every backend: the same words reach it, and are in the key and the price of a request."
from dataclasses import replace

import pytest
import torch

from opd_nb.core.config import OPDConfig
from opd_nb.core.types import Conversation
from opd_nb.models.lm import model_path
from opd_nb.teachers.base import Capabilities, Teacher, load_teacher
from opd_nb.teachers.context import InContext, TeacherContext, in_context
from opd_nb.tools.export_gguf import export_gguf
from servers import llama_server

QUESTION = dict(role='user', content='Make 31 from 3 7 10.')
EXTRA = TeacherContext('Write the steps.', (dict(role='user', content='Make 5 from 2 3.'), dict(role='assistant', content='2+3=5')))
RECORD = Conversation((QUESTION,), dict(teacher_context='Begin with 7*3.'))
COMPLETIONS = [(b'7*3=21 21+10=31', True)]


@pytest.fixture(scope='module')
def backends(tmp_path_factory):
    pytest.importorskip('llama_cpp', reason='a GGUF teacher needs llama-cpp-python: pip install opd_nb[gguf]')
    pytest.importorskip('xllamacpp', reason="llama.cpp's server comes with the dev requirements")
    folder = tmp_path_factory.mktemp('context')
    settings = dict(_env_file=None, device='cpu', teacher_dtype='float32', teacher_n_gpu_layers=0, teacher_cache=folder / 'a',
                    teacher_price='1,1', teacher_tokenizer=model_path('tiny:teacher', 'teacher'))
    gguf = export_gguf('tiny:teacher', folder / 'm.gguf', 'f32')
    with llama_server(gguf) as (url, _):
        yield dict(hf=load_teacher('tiny:', OPDConfig(**settings)), gguf=load_teacher(f'gguf:{gguf}', OPDConfig(**settings)),
                   api=load_teacher(f'api:{url}', OPDConfig(**settings, teacher_top_k=8)),
                   walk=load_teacher(f'api:{url}', OPDConfig(**settings, teacher_top_k=8, teacher_mode='prefix_walk')),
                   text=load_teacher(f'api:{url}', OPDConfig(**settings, teacher_mode='continuation', max_new_tokens=8)))


@pytest.mark.parametrize('name', ['hf', 'gguf', 'api'])
def test_every_backend_is_told_the_same(backends, name):
    plain, hf = backends[name], InContext(backends['hf'], EXTRA)
    told, = InContext(plain, EXTRA).score([RECORD], COMPLETIONS)
    torch.testing.assert_close(told.logprobs, hf.score([RECORD], COMPLETIONS)[0].logprobs, atol=1e-3, rtol=1e-3)
    untold, = plain.score([RECORD], COMPLETIONS)
    assert (told.logprobs - untold.logprobs).abs().max() > .01
    assert InContext(plain, EXTRA).generate([RECORD], 6) == hf.generate([RECORD], 6)


@pytest.mark.parametrize('name', ['api', 'walk', 'text'])
def test_a_request_has_the_context_in_it_and_its_price(backends, name, monkeypatch):
    "So a reply that was stored without it is not taken for one with it."
    plain, sent = backends[name], []
    ask = plain.endpoint.ask
    def noted(request, *args, **kw):
        sent.append(request.body)
        return ask(request, *args, **kw)
    monkeypatch.setattr(plain.endpoint, 'ask', noted)
    sides = {}
    for side, teacher in dict(untold=plain, told=InContext(plain, EXTRA)).items():
        sent.clear()
        teacher.score([RECORD], COMPLETIONS)
        sides[side] = str(sent), teacher.estimate([RECORD], COMPLETIONS).tokens_in
    assert sides['untold'][0] != sides['told'][0]
    assert sides['told'][1] > sides['untold'][1] + 20
    if name != 'api': assert 'Write the steps.' in sides['told'][0] and 'Begin with 7*3.' in sides['told'][0] and 'Write' not in sides['untold'][0]


def test_somebody_elses_teacher_is_told_too():
    "One that reads nothing but `conversation.prompt`, of which this package knows nothing else."
    class Own:
        codec, capabilities, seen = None, Capabilities(frozenset({'text'}), True, ''), []
        def score(self, conversations, completions): self.seen += [c.prompt for c in conversations]; return completions
        def generate(self, conversations, max_new_tokens=128): self.seen += [c.prompt for c in conversations]; return []
    own = Own()
    teacher = in_context(own, EXTRA)
    teacher.score([RECORD], COMPLETIONS, on_error='return')
    teacher.generate([RECORD])
    assert isinstance(teacher, Teacher) and own.seen == [EXTRA.tell(RECORD).prompt] * 2


def test_a_judge_may_see_the_reference(backends):
    "Every teacher that reads a prompt does; a judge has it in its request."
    seen = replace(RECORD, messages=(QUESTION, dict(role='assistant', content='7*3=21 21+10=31')), metadata={})
    told = TeacherContext(sees_reference=True).tell(seen)
    assert '21+10=31' in told.prompt[-1]['content'] and told.reference == seen.reference
