"Where TRL's `ULDLoss` is right, `gold` and `uld` equal it; where we differ on purpose, both values are compared."
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
    "Random logits (`zs`, `zt`) and ids of one completion, prompt and a stop at the end included."
    g = torch.Generator().manual_seed(seed)
    n_s, n_t = PROMPT_S + len(s_ends) + 1, PROMPT_T + len(t_ends) + 1
    zs = torch.randn(n_s, v_s, generator=g, dtype=torch.float64) * scale
    zt = torch.randn(n_t, v_t, generator=g, dtype=torch.float64) * scale
    ids, tids = torch.randint(v_s, (n_s,), generator=g), torch.randint(v_t, (n_t,), generator=g)
    return SimpleNamespace(zs=zs.requires_grad_(), zt=zt, ids=ids, tids=tids, s_ends=s_ends, t_ends=t_ends)


def trl_config(**changed):
    weights = dict(uld_crossentropy_weight=0., uld_distillation_weight=1., uld_student_temperature=1., uld_teacher_temperature=1.)
    extended = dict(use_extended_uld=True, uld_token_merge_strategy='bayesian', uld_use_hybrid_loss=True,
                    uld_hybrid_matched_weight=None, uld_hybrid_unmatched_weight=None, beta=.5)
    return SimpleNamespace(**weights | extended | dict(uld_skip_student_eos=True, uld_skip_teacher_eos=True) | changed)


def vocabulary(n, pairs):
    "What TRL asks of a tokenizer: strings; those in `pairs` are the same on both sides."
    return SimpleNamespace(get_vocab=lambda: {pairs.get(i, f'{n}{i}'): i for i in range(n)})


def labels_of(ids, n_prompt, n):
    return torch.cat([torch.full((n_prompt,), -100), ids[n_prompt:n_prompt + n]])[None]


def offsets_of(ends, n_prompt, stop):
    starts, ends = [0, *ends], [*ends, *[ends[-1]] * stop]
    return torch.tensor([[(0, 0)] * n_prompt + list(zip(starts, ends))])


def theirs(b, hybrid=True, merge='bayesian', beta=.5, skip=True, stop=True):
    config = trl_config(uld_skip_student_eos=skip, uld_skip_teacher_eos=skip, uld_token_merge_strategy=merge,
                        uld_use_hybrid_loss=hybrid, beta=beta)
    student = vocabulary(b.zs.shape[1], {s: f'pair{t}' for t, s in PAIRS.items()})
    teacher = vocabulary(b.zt.shape[1], {t: f'pair{t}' for t in PAIRS})
    n_s, n_t = len(b.s_ends) + stop, len(b.t_ends) + stop
    all_s, all_t = PROMPT_S + n_s, PROMPT_T + n_t
    return ULDLoss(config, student, teacher)(
        b.zs[None, :all_s], b.zt[None, :all_t],
        labels_of(b.ids, PROMPT_S, n_s), labels_of(b.tids, PROMPT_T, n_t),
        b.ids[None, :all_s], b.tids[None, :all_t],
        offsets_of(b.s_ends, PROMPT_S, stop), offsets_of(b.t_ends, PROMPT_T, stop))


def ours(b, loss=gold, shift=1, stop=False, events=PAIRS, **options):
    "`shift` rows before each token; 1 is the row that predicts it."
    def side(z, ids, n_prompt, n):
        return Side(z[n_prompt - shift:n_prompt + n - shift], ids[n_prompt:n_prompt + n], Head(None))

    s_ends, t_ends = (ends + [ends[-1] + 1] * stop for ends in (b.s_ends, b.t_ends))
    student, teacher = side(b.zs, b.ids, PROMPT_S, len(s_ends)), side(b.zt, b.tids, PROMPT_T, len(t_ends))
    matched_s, matched_t = (Events.of([[i] for i in ids]) for ids in (events.values(), events))
    vocab = VocabMap(matched_s, matched_t, b.zs.shape[1], b.zt.shape[1], False, -1)
    out = loss(student, teacher, align(s_ends, t_ends), vocab, **options)
    return out.total / out.weight


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def trained_rows(loss, b):
    "[N] bool: which of the student's rows the loss has a gradient for."
    return torch.autograd.grad(loss, b.zs, retain_graph=True)[0].abs().sum(1) > 1e-12


as_trl = dict(rest='none', floor=torch.log(torch.tensor(1e-8)).item())


@pytest.mark.parametrize('beta', [.1, .5, .9])
@pytest.mark.parametrize('seed', [0, 1])
def test_gold_is_theirs(seed, beta):
    b = batch(seed)
    a, c = theirs(b, beta=beta), ours(b, beta=beta, **as_trl)
    close(a, c)
    close(torch.autograd.grad(a, b.zs)[0], torch.autograd.grad(c, b.zs)[0])


@pytest.mark.parametrize('seed', [0, 1])
def test_merged_uld_is_theirs(seed):
    b = batch(seed)
    a, c = theirs(b, hybrid=False), ours(b, uld)
    close(a, c)
    close(torch.autograd.grad(a, b.zs)[0], torch.autograd.grad(c, b.zs)[0])


def test_observed_rows_are_one_late():
    "Their default merge reads the row after each token; told to do the same, we agree, and the first token gets no gradient."
    b = batch(2)
    a = theirs(b, merge='observed')
    late, right = (ours(b, shift=shift, merge='observed', **as_trl) for shift in (0, 1))
    close(a, late)
    assert abs(a - right) > .01, (a.item(), right.item())
    first, stop = PROMPT_S - 1, PROMPT_S + len(S_ENDS) - 1  # rows that predict the first token and the stop
    assert not trained_rows(a, b)[first] and trained_rows(right, b)[first]
    assert trained_rows(a, b)[stop] and not trained_rows(right, b)[stop]


def test_without_a_bucket_it_is_no_divergence():
    "At β = 1 a student that gives the matched tokens less than the teacher does has a negative loss; with the bucket it has not."
    values = []
    for seed in range(10):
        b = batch(seed)
        with torch.no_grad():
            b.zs[:, list(PAIRS.values())] -= 2
        matched = b.zs[:6].softmax(-1)[:, list(PAIRS.values())], b.zt[:6].softmax(-1)[:, list(PAIRS)]
        without = GOLDTrainer.generalized_jsd_loss(*matched, beta=1., logits_are_probs=True).item()
        values.append((without, ours(b, beta=1., weights=(1., 0.)).item()))
    smallest = [min(v) for v in zip(*values)]
    assert smallest[0] < 0 <= smallest[1], smallest


def test_bytes_match_what_strings_do_not():
    "On the embedded pair, a byte-level and a SentencePiece vocabulary: what is the same text is spelled otherwise."
    from transformers import AutoTokenizer
    from opd_nb.models.lm import tiny_folder
    from opd_nb.alignment.chat import ChatCodec
    student, teacher = (AutoTokenizer.from_pretrained(tiny_folder(n)) for n in ('student', 'teacher'))
    config = trl_config(uld_crossentropy_weight=1.)
    by_string = {t: s for t, s in ULDLoss(config, student, teacher)._vocab_mapping.items()}
    vocab = VocabMap.build(ChatCodec(student), ChatCodec(teacher))
    by_bytes = {(int(s), int(t)) for s, t in zip(vocab.student.ids, vocab.teacher.ids)}
    spaced = [(s, t) for s, t in by_bytes if vocab.tokens[0].table[s].startswith(b' ')]
    assert len(by_bytes) > len(by_string) and spaced, (len(by_bytes), len(by_string), len(spaced))
    assert not any((s, t) in spaced for t, s in by_string.items())


def test_their_stop_is_skipped_and_a_real_token_with_it():
    "With skip-EOS, their default, the stop has no row; on a rollout truncated by length the same setting drops a real token."
    b = batch(3)
    stopped, with_stop = theirs(b), ours(b, stop=True, **as_trl)
    last = PROMPT_S + len(S_ENDS) - 1
    assert not trained_rows(stopped, b)[last] and trained_rows(with_stop, b)[last]
    truncated = theirs(b, stop=False)
    assert not trained_rows(truncated, b)[last - 1] and trained_rows(ours(b, **as_trl), b)[last - 1]


def test_denominator_of_the_step():
    "A mean of means weighs a short completion's tokens more. Ours is the mean over all trained positions, however the step is split."
    one, two = batch(4, scale=3), batch(5, s_ends=[1], t_ends=[1], scale=3)
    chunks = [len(align(x.s_ends, x.t_ends)) for x in (one, two)]
    mean_of_means, parts = (theirs(one) + theirs(two)) / 2, [ours(x, **as_trl) for x in (one, two)]
    step = sum(p * n for p, n in zip(parts, chunks)) / sum(chunks)
    close(mean_of_means, sum(parts) / 2)
    assert abs(mean_of_means - step) > .01, (mean_of_means.item(), step.item())
