"Equal vocabularies: the teacher reads the ids that the student wrote, and `gkd` is TRL's loss on what was sampled."
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from opd_nb.alignment.vocab import VocabMap
from opd_nb.core.config import OPDConfig
from opd_nb.lab import countdown
from opd_nb.models.lm import LM
from opd_nb.teachers.base import load_teacher
from opd_nb.teachers.hf import HFTeacher
from opd_nb.tools.export_gguf import export_gguf
from opd_nb.training.batch import distillation_loss, read_and_align, reads_own_ids, score
from opd_nb.training.pairs import loss_for
from opd_nb.training.rollouts import rollout

warnings.filterwarnings('ignore', message='.*experimental.*')


@pytest.fixture(scope='module')
def noisy():
    "A student that spells as no tokenizer would: the embedded one with disturbed weights, and what it sampled."
    lm = LM.load('tiny:student', dtype='float32', device='cpu')
    torch.manual_seed(0)
    for p in lm.model.parameters(): p.data += .15 * p.data.std() * torch.randn_like(p)
    return lm, rollout(lm, countdown.draw(24), 20, temperature=1.5)


@pytest.fixture(scope='module')
def teacher(): return HFTeacher(LM.load('tiny:student', dtype='float32', device='cpu'))


def loss_of(noisy, teacher, own_ids, name='gkd', **kw):
    lm, rollouts = noisy
    rows = [r for r in rollouts if r.ids]
    vocab = VocabMap.build(lm.codec, teacher.codec)
    scored = score(teacher, rows, own_ids and reads_own_ids(teacher, lm.codec, vocab))
    assert len(scored.rollouts) == len(rows)
    batch = read_and_align(lm, scored.rollouts, scored.signals, vocab)
    out, _ = distillation_loss(batch, loss_for(name, vocab, teacher, **kw))
    return out.total / out.weight, len(out), batch


def theirs(lm, teacher, rollouts, beta):
    "TRL's own `_compute_loss`, on its inputs: prompts padded left, completions right."
    trl = pytest.importorskip('trl', reason='TRL is needed to be compared with: pip install "trl>=1.16"').trainer.distillation_trainer
    def padded(rows, left):
        width = max(map(len, rows))
        fill = [[0] * (width - len(r)) for r in rows]
        ids = [f + list(r) if left else list(r) + f for f, r in zip(fill, rows)]
        mask = [[0] * len(f) + [1] * len(r) if left else [1] * len(r) + [0] * len(f) for f, r in zip(fill, rows)]
        return torch.tensor(ids), torch.tensor(mask)
    prompts, completions = padded([r.prompt_ids for r in rollouts], True), padded([r.ids for r in rollouts], False)
    inputs = dict(prompt_ids=prompts[0], prompt_mask=prompts[1], completion_ids=completions[0], completion_mask=completions[1])
    trainer = trl.DistillationTrainer
    fake = SimpleNamespace(teacher_model=teacher.lm.model, beta=beta, temperature=1., model_kwarg_keys=(), _is_vlm=False,
                           accelerator=SimpleNamespace(unwrap_model=lambda m: m), _forward_redirection=lambda wrapper, model, f, *a, **kw: f(*a, **kw))
    fake._get_last_hidden_state = lambda *a, **kw: trainer._get_last_hidden_state.__wrapped__(fake, *a, **kw)
    return trainer._compute_loss(fake, lm.model, inputs, int(completions[1].sum()))[0]


@pytest.mark.parametrize('beta', [0., .5, 1.])
def test_gkd_is_theirs_on_what_was_sampled(noisy, teacher, beta):
    "Every token that was sampled counts on both sides. Encoded anew, many would not, and the loss would be another."
    lm, rollouts = noisy
    rows = [r for r in rollouts if r.ids]
    ours, n, batch = loss_of(noisy, teacher, True, beta=beta)
    assert n == sum(len(r.ids) for r in rows) and batch.same_ids and batch.alignment.coverage == 1
    wanted = theirs(lm, teacher, rows, beta)
    torch.testing.assert_close(ours, wanted, atol=1e-6, rtol=1e-6)
    # a row whose padding is longer is computed in another order; gradients agree as far as float32 does
    weight = lm.model.get_input_embeddings().weight
    torch.testing.assert_close(*(torch.autograd.grad(x, weight)[0] for x in (ours, wanted)), atol=1e-5, rtol=1e-3)
    anew, fewer, _ = loss_of(noisy, teacher, False, beta=beta)
    assert fewer < .9 * n and abs(anew - wanted) > .02, (fewer, n, anew.item(), wanted.item())


def with_textless(lm, r):
    "A rollout with a special token in the middle, which has no text and ends nothing."
    odd = next(i for i, n in enumerate(lm.codec.bytes.lengths) if n == 0 and i not in lm.codec.stop_ids)
    ids = [*r.ids[:3], odd, *r.ids[3:]]
    data, ends, stopped = lm.codec.read(ids)
    return replace(r, ids=tuple(ids), ends=tuple(ends.tolist()), data=data, stopped=stopped)


def test_tokens_without_text_count_too(noisy, teacher):
    "A student may sample one; TRL counts it, and behind it both read the same ids."
    lm, rollouts = noisy
    rows = [with_textless(lm, r) for r in rollouts if len(r.ids) > 4]
    ours, n, batch = loss_of((lm, rows), teacher, True)
    assert n == sum(len(r.ids) for r in rows) and batch.same_ids
    torch.testing.assert_close(ours, theirs(lm, teacher, rows, 0.), atol=1e-6, rtol=1e-6)
    for name in ('bpm', 'cover', 'gold'): assert loss_of((lm, rows), teacher, True, name)[0].isfinite()


@pytest.mark.parametrize('name', ['strict', 'gold', 'bpm', 'cover', 'alm', 'pg'])
def test_other_losses_read_the_same_ids(noisy, teacher, name):
    "They train more positions than on a text that was encoded anew, and none that is not there."
    ours, n, batch = loss_of(noisy, teacher, True, name)
    _, fewer, _ = loss_of(noisy, teacher, False, name)
    assert batch.same_ids and ours.isfinite() and fewer < n <= sum(len(r.ids) for r in batch.rollouts)


def test_another_vocabulary_has_tokens_of_its_own(noisy):
    lm, _ = noisy
    other = load_teacher('tiny:', OPDConfig(_env_file=None, device='cpu'))
    assert not reads_own_ids(other, lm.codec, VocabMap.build(lm.codec, other.codec))
    assert not reads_own_ids(other, lm.codec, None)
    _, _, batch = loss_of(noisy, other, True, 'gold')
    assert not batch.same_ids and batch.alignment.coverage < 1


def test_ids_that_a_narrower_head_lacks_are_encoded_anew(noisy, teacher):
    "Heads of one family are padded differently; the padding means nothing, and a narrow embedding has no row for it."
    lm, rollouts = noisy
    odd = replace(rollouts[0], ids=(*rollouts[0].ids[:-1], len(teacher.codec.bytes) + 3))
    assert len(score(teacher, [odd], True).signals) == 1


def test_llama_cpp_reads_them_too(noisy, teacher, tmp_path):
    pytest.importorskip('llama_cpp', reason='a GGUF teacher needs llama-cpp-python: pip install opd_nb[gguf]')
    pytest.importorskip('xllamacpp', reason="llama.cpp's server comes with the dev requirements")
    from servers import llama_server
    gguf = export_gguf('tiny:student', tmp_path / 'm.gguf', 'f32')
    settings = dict(_env_file=None, device='cpu', teacher_n_gpu_layers=0, teacher_cache=tmp_path / 'a', teacher_tokenizer=teacher.lm.path, teacher_top_k=20)
    wanted, n, _ = loss_of(noisy, teacher, True)
    whole = dict(settings)
    del whole['teacher_top_k']
    ours, m, batch = loss_of(noisy, load_teacher(f'gguf:{gguf}', OPDConfig(**whole)), True)
    assert batch.same_ids and m == n
    torch.testing.assert_close(ours, wanted, atol=1e-3, rtol=1e-3)
    with llama_server(gguf) as (url, _):
        assert_scores_what_was_written(noisy, teacher, load_teacher(f'api:{url}', OPDConfig(**settings)))


def assert_scores_what_was_written(noisy, teacher, hosted):
    "A hosted teacher scores the student's own ids as the model in this process does, where no tokenizer would write them."
    rows = [r for r in noisy[1] if r.ids][:6]
    assert any(list(r.ids) != list(teacher.codec.write(r.data, r.stopped)[0]) for r in rows)
    for r, here, there in zip(rows, score(teacher, rows, True).signals, score(hosted, rows, True).signals, strict=True):
        assert tuple(there.ids) == tuple(here.ids) == tuple(r.ids)
        torch.testing.assert_close(there.logprobs, here.logprobs, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize('api', ['prompt_logprobs', 'sglang'])
def test_servers_that_take_token_prompts_read_them_too(noisy, teacher, tmp_path, api):
    from servers import contract_server
    with contract_server('tiny:student', can=(api, 'ids')) as url:
        hosted = load_teacher(f'api:{url}', OPDConfig(_env_file=None, teacher_cache=tmp_path / 'a', teacher_tokenizer=teacher.lm.path, teacher_top_k=20))
        assert hosted.finding.mode == api
        assert_scores_what_was_written(noisy, teacher, hosted)
