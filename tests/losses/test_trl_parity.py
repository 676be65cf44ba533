"""Where the peer is right, `gold` and `uld` equal TRL's `ULDLoss`; where we differ on purpose, both values are shown."""
import warnings
from types import SimpleNamespace

import pytest
import torch

from opd_nb.core.types import Head
from opd_nb.alignment.chunks import align
from opd_nb.alignment.vocab import Events, VocabMap
from opd_nb.models.outputs import Side
from opd_nb.losses.matched import gold, uld

warnings.filterwarnings('ignore', message='.*experimental.*')
trl = pytest.importorskip('trl', reason='TRL is needed to be compared with: pip install "trl>=1.16"')
from trl.experimental.gold.gold_trainer import GOLDTrainer, ULDLoss  # noqa: E402

V_S, V_T = 23, 19
PAIRS = {3: 5, 4: 0, 7: 7, 11: 20, 18: 1, 0: 9}  # teacher id -> student id
PROMPT_S, PROMPT_T = 3, 2                        # prompt tokens before the completion
S_ENDS, T_ENDS = [1, 3, 4, 6, 7, 9], [2, 3, 6, 7, 8, 9]   # chunks: 2:2, 1:1 ... without the stop


def batch(seed=0, v_s=V_S, v_t=V_T, s_ends=S_ENDS, t_ends=T_ENDS, scale=1.5):
    g = torch.Generator().manual_seed(seed)
    r = lambda n, v: torch.randn(n, v, generator=g, dtype=torch.float64) * scale
    n_s, n_t = PROMPT_S + len(s_ends) + 1, PROMPT_T + len(t_ends) + 1  # a stop at the end
    return SimpleNamespace(zs=r(n_s, v_s).requires_grad_(), zt=r(n_t, v_t), ids=torch.randint(v_s, (n_s,), generator=g), tids=torch.randint(v_t, (n_t,), generator=g), s_ends=s_ends, t_ends=t_ends)


def theirs(b, hybrid=True, merge='bayesian', beta=.5, skip=True, stop=True):
    config = SimpleNamespace(uld_crossentropy_weight=0., uld_distillation_weight=1., uld_student_temperature=1., uld_teacher_temperature=1., uld_skip_student_eos=skip, uld_skip_teacher_eos=skip,
                             use_extended_uld=True, uld_token_merge_strategy=merge, uld_use_hybrid_loss=hybrid, uld_hybrid_matched_weight=None, uld_hybrid_unmatched_weight=None, beta=beta)
    vocabulary = lambda n, pairs: SimpleNamespace(get_vocab=lambda: {pairs.get(i, f'{n}{i}'): i for i in range(n)})
    loss = ULDLoss(config, vocabulary(b.zs.shape[1], {s: f'pair{t}' for t, s in PAIRS.items()}), vocabulary(b.zt.shape[1], {t: f'pair{t}' for t in PAIRS}))
    labels = lambda ids, p, n: torch.cat([torch.full((p,), -100), ids[p:p + n]])[None]
    n_s, n_t = len(b.s_ends) + stop, len(b.t_ends) + stop
    offsets = lambda ends, p: [(0, 0)] * p + [(a, e) for a, e in zip([0, *ends], [*ends, *[ends[-1]] * stop])]
    return loss(b.zs[None, :PROMPT_S + n_s], b.zt[None, :PROMPT_T + n_t], labels(b.ids, PROMPT_S, n_s), labels(b.tids, PROMPT_T, n_t), b.ids[None, :PROMPT_S + n_s], b.tids[None, :PROMPT_T + n_t],
                torch.tensor([offsets(b.s_ends, PROMPT_S)]), torch.tensor([offsets(b.t_ends, PROMPT_T)]))


def ours(b, loss=gold, shift=1, stop=False, events=PAIRS, **options):
    "`shift` rows before each token; 1 is the row that predicts it."
    side = lambda z, ids, p, n: Side(z[p - shift:p + n - shift], ids[p:p + n], Head(None))
    s_ends, t_ends = (ends + [ends[-1] + 1] * stop for ends in (b.s_ends, b.t_ends))
    t, s = zip(*events.items())
    vocab = VocabMap(Events.of([[i] for i in s]), Events.of([[i] for i in t]), b.zs.shape[1], b.zt.shape[1], False, -1)
    out = loss(side(b.zs, b.ids, PROMPT_S, len(s_ends)), side(b.zt, b.tids, PROMPT_T, len(t_ends)), align(s_ends, t_ends), vocab, **options)
    return out.total / out.weight


as_trl = dict(rest='none', floor=torch.log(torch.tensor(1e-8)).item())


@pytest.mark.parametrize('beta', [.1, .5, .9])
@pytest.mark.parametrize('seed', [0, 1])
def test_gold_is_theirs(seed, beta):
    b = batch(seed)
    a, c = theirs(b, beta=beta), ours(b, beta=beta, **as_trl)
    torch.testing.assert_close(a, c, atol=1e-5, rtol=1e-5)
    for x, y in zip(torch.autograd.grad(a, b.zs), torch.autograd.grad(c, b.zs)): torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('seed', [0, 1])
def test_merged_uld_is_theirs(seed):
    b = batch(seed)
    a, c = theirs(b, hybrid=False), ours(b, uld)
    torch.testing.assert_close(a, c, atol=1e-5, rtol=1e-5)
    for x, y in zip(torch.autograd.grad(a, b.zs), torch.autograd.grad(c, b.zs)): torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


def test_observed_rows_are_one_late():
    "Their default merge reads the row after each token; told to do the same, we agree, and the first token gets no gradient."
    b = batch(2)
    a, late, right = theirs(b, merge='observed'), ours(b, shift=0, merge='observed', **as_trl), ours(b, merge='observed', **as_trl)
    torch.testing.assert_close(a, late, atol=1e-5, rtol=1e-5)
    assert abs(a - right) > .01, (a.item(), right.item())
    trained = lambda loss: torch.autograd.grad(loss, b.zs, retain_graph=True)[0].abs().sum(1) > 1e-12
    assert not trained(a)[PROMPT_S - 1] and trained(right)[PROMPT_S - 1]  # the row that predicts the first token
    assert trained(a)[PROMPT_S + len(S_ENDS) - 1] and not trained(right)[PROMPT_S + len(S_ENDS) - 1]  # the one that predicts the stop


def test_without_a_bucket_it_is_no_divergence():
    "Parts of distributions: a student that gives the matched tokens less than the teacher does has a negative loss at β = 1. With the bucket it has not."
    values = []
    for seed in range(10):
        b = batch(seed)
        with torch.no_grad(): b.zs[:, list(PAIRS.values())] -= 2
        matched = b.zs[:6].softmax(-1)[:, list(PAIRS.values())], b.zt[:6].softmax(-1)[:, list(PAIRS)]
        values.append((GOLDTrainer.generalized_jsd_loss(*matched, beta=1., logits_are_probs=True).item(), ours(b, beta=1., weights=(1., 0.)).item()))
    least = [min(v) for v in zip(*values)]
    assert least[0] < 0 <= least[1], least


def test_bytes_match_what_strings_do_not():
    "On the embedded pair, a byte-level and a SentencePiece vocabulary: what is the same text is spelled otherwise."
    from transformers import AutoTokenizer
    from opd_nb.models.lm import tiny_folder
    from opd_nb.alignment.chat import ChatCodec
    student, teacher = (AutoTokenizer.from_pretrained(tiny_folder(n)) for n in ('student', 'teacher'))
    config = SimpleNamespace(**{f'uld_{k}': 1. for k in ('crossentropy_weight', 'distillation_weight', 'student_temperature', 'teacher_temperature')}, uld_skip_student_eos=True, uld_skip_teacher_eos=True,
                             use_extended_uld=True, uld_token_merge_strategy='bayesian', uld_use_hybrid_loss=True, beta=.5)
    by_string = {t: s for t, s in ULDLoss(config, student, teacher)._vocab_mapping.items()}
    vocab = VocabMap.build(ChatCodec(student), ChatCodec(teacher))
    by_bytes = {(int(s), int(t)) for s, t in zip(vocab.student.ids, vocab.teacher.ids)}
    spaced = [(s, t) for s, t in by_bytes if vocab.tokens[0].table[s].startswith(b' ')]
    assert len(by_bytes) > len(by_string) and spaced and not any((s, t) in spaced for t, s in by_string.items()), (len(by_bytes), len(by_string), len(spaced))


def test_their_stop_is_skipped_and_a_real_token_with_it():
    "With skip-EOS, their default, the stop has no row; on a rollout cut by length the same setting drops a real token."
    b = batch(3)
    stopped, with_stop = theirs(b), ours(b, stop=True, **as_trl)
    trained = lambda loss: (torch.autograd.grad(loss, b.zs, retain_graph=True)[0].abs().sum(1) > 1e-12)
    last = PROMPT_S + len(S_ENDS) - 1
    assert not trained(stopped)[last] and trained(with_stop)[last]
    cut = theirs(b, stop=False)
    assert not trained(cut)[last - 1] and trained(ours(b, **as_trl))[last - 1]


def test_denominator_of_the_step():
    "A mean of means weighs a short answer's tokens more. Ours is the mean over all trained positions, however the step is cut."
    one, two = batch(4, scale=3), batch(5, s_ends=[1], t_ends=[1], scale=3)
    chunks = [len(align(x.s_ends, x.t_ends)) for x in (one, two)]
    theirs_, parts = (theirs(one) + theirs(two)) / 2, [ours(x, **as_trl) for x in (one, two)]
    step = sum(p * n for p, n in zip(parts, chunks)) / sum(chunks)
    torch.testing.assert_close(theirs_, sum(parts) / 2, atol=1e-5, rtol=1e-5)
    assert abs(theirs_ - step) > .01, (theirs_.item(), step.item())
