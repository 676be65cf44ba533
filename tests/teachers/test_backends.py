"The same weights teach the same: losses and gradients of one batch, from transformers, llama.cpp and its server."
import os
from dataclasses import replace

import pytest
import torch

from conftest import real, slow
from opd_nb.core.types import Conversation
from opd_nb.core.config import OPDConfig
from opd_nb.alignment.chunks import align
from opd_nb.alignment.vocab import VocabMap
from opd_nb.models.outputs import teacher_side
from opd_nb.models.lm import LM, model_path, read
from opd_nb.losses.registry import get_loss
from opd_nb.losses.checks import listed
from opd_nb.teachers.base import load_teacher
from opd_nb.training.rollouts import rollout
from opd_nb.tools.export_gguf import export_gguf
from opd_nb.lab import countdown
from servers import llama_server, padded, vllm_server

pytest.importorskip('llama_cpp', reason='a GGUF teacher needs llama-cpp-python: pip install opd_nb[gguf]')
pytest.importorskip('xllamacpp', reason="llama.cpp's server comes with the dev requirements")
K, DENSE, LISTS, REALISED = 50, ['gold', 'bpm'], ['cover', 'bpm', 'strict', 'escd'], ['alm', 'pg']


def puzzles(): return [Conversation(tuple(c.prompt)) for c in countdown.draw(8)]
def stories():
    names = 'Lily Mia Sue Anna Lucy Emma Sara Amy'.split()
    texts = [f'Once upon a time, there was a little girl named {name}. One day,' for name in names]
    return [Conversation((dict(role='user', content=text),)) for text in texts]


class Batch:
    "What a student wrote, and what three teachers of the same weights say of it."
    def __init__(self, teacher, student, conversations, folder):
        self.spec, self.student = teacher, LM.load(student, dtype='float32', device='cpu')
        self.rollouts = [r for r in rollout(self.student, conversations, 24) if r.ids]
        settings = dict(_env_file=None, device='cpu', teacher_dtype='float32', teacher_n_gpu_layers=0,
                        teacher_cache=folder / 'a', teacher_tokenizer=model_path(teacher, 'teacher'))
        gguf = export_gguf(teacher, folder / 'm.gguf', 'f32')
        with llama_server(gguf) as (url, _):
            self.teachers = dict(
                hf=load_teacher(teacher, OPDConfig(**settings)),
                gguf=load_teacher(f'gguf:{gguf}', OPDConfig(**settings)),
                api=load_teacher(f'api:{url}', OPDConfig(**settings, teacher_top_k=K)))
            self.signals = {name: self.scored(t) for name, t in self.teachers.items()}

    def scored(self, teacher):
        completions = [(r.data, r.stopped) for r in self.rollouts]
        return teacher.score([r.conversation for r in self.rollouts], completions)

    def loss(self, backend, name, lists=False):
        "Value and gradient of a loss."
        teacher, signals = self.teachers[backend], self.signals[backend]
        side = read(self.student.model, [r.prompt_ids for r in self.rollouts], [r.ids for r in self.rollouts])
        said = teacher_side(signals, len(teacher.codec.bytes))
        if lists and 'full' in said.access: said = listed(said, min(K, said.width))
        alignment = align([r.ends for r in self.rollouts], [s.ends for s in signals])
        out = get_loss(name, VocabMap.build(self.student.codec, teacher.codec))(side, said, alignment)
        return (out.total / out.weight).item(), torch.autograd.grad(out.total, side.hidden)[0], len(out)


@pytest.fixture(scope='module', params=['embedded', 'babyllama105'])
def batch(request, tmp_path_factory):
    if request.param == 'embedded': pair = 'tiny:teacher', 'tiny:student', puzzles()
    else: pair = str(real('models', 'babyllama105')), str(real('models', 'bitllama3M')), stories()
    return Batch(*pair, tmp_path_factory.mktemp('backends'))


def check(batch, name, backends, lists=False, slack=1e-3):
    value, gradient, n = batch.loss('hf', name, lists)
    assert n > 20 and abs(value) > 1e-3
    for backend in backends:
        other, g, m = batch.loss(backend, name, lists)
        assert m == n, f'{name}: {backend} trains {m} units, hf {n}'
        assert abs(other - value) < 1e-3 * abs(value), f'{name}: {value} by hf, {other} by {backend}'
        assert (g - gradient).norm() < slack * gradient.norm(), f'{name}: the gradient from {backend} is another'


@pytest.mark.parametrize('name', DENSE)
def test_whole_distributions(batch, name): check(batch, name, ['gguf'])

@pytest.mark.parametrize('name', LISTS)
def test_lists(batch, name):
    check(batch, name, ['gguf', 'api'], lists=True, slack=1e-2)  # a tail is a difference of nearly equal numbers

@pytest.mark.parametrize('name', REALISED)
def test_realised_tokens(batch, name): check(batch, name, ['gguf', 'api'])


@pytest.mark.parametrize('backend', ['gguf', 'api'])
def test_realised_and_likeliest(batch, backend): assert realised_and_likeliest(batch, backend) < 1e-4


def realised_and_likeliest(batch, backend):
    "Largest difference of a token's log-probability; asserts the same top 8 where there is no tie."
    clear, far = 0, 0.
    for mine, theirs in zip(batch.signals['hf'], batch.signals[backend], strict=True):
        assert (mine.ids, mine.ends) == (theirs.ids, tuple(theirs.ends))
        far = max(far, (theirs.logprobs - mine.logprobs).abs().max().item())
        ids = theirs.top_ids[:, :8] if hasattr(theirs, 'top_ids') else theirs.head(theirs.hidden).topk(8).indices
        for row, top in zip(mine.head(mine.hidden), ids):
            ninth = row.topk(9).values
            if ninth[7] - ninth[8] <= 1e-4: continue
            clear += 1
            assert set(top.tolist()) == set(row.topk(8).indices.tolist())
    assert clear > 50
    return far


def test_a_shift_by_one_is_seen(batch):
    "These tests can fail: rows moved by one position, as a misaligned echo gives them, change every loss."
    value, _, _ = batch.loss('gguf', 'alm')
    kept = batch.signals['gguf']
    batch.signals['gguf'] = [replace(s, logprobs=s.logprobs.roll(1)) for s in kept]
    try: assert abs(batch.loss('gguf', 'alm')[0] - value) > 1e-2 * abs(value)
    finally: batch.signals['gguf'] = kept


@slow
def test_vllm_teaches_the_same(batch, tmp_path):
    "The real `prompt_logprobs` contract. OPD_VLLM_PYTHON is the interpreter of an environment that has vLLM."
    python = os.environ.get('OPD_VLLM_PYTHON') or pytest.skip('OPD_VLLM_PYTHON names no environment with vLLM')
    with vllm_server(python, padded(batch.spec, tmp_path / 'model')) as url:
        settings = OPDConfig(_env_file=None, teacher_tokenizer=model_path(batch.spec, 'teacher'), teacher_top_k=K,
                             teacher_cache=tmp_path / 'a', teacher_timeout=60)
        batch.teachers['vllm'] = load_teacher(f'api:{url}', settings)
        assert batch.teachers['vllm'].finding.mode == 'prompt_logprobs'
        batch.signals['vllm'] = batch.scored(batch.teachers['vllm'])
    far = realised_and_likeliest(batch, 'vllm')
    def change(name): return abs(batch.loss('vllm', name)[0] / batch.loss('hf', name, name in LISTS)[0] - 1)
    print(f'largest difference {far:.1e};', ', '.join(f'{name} {change(name):.1e}' for name in LISTS + REALISED))
    assert far < 1e-4
    for name in LISTS: check(batch, name, ['vllm'], lists=True, slack=1e-2)
    for name in REALISED: check(batch, name, ['vllm'])
