"""Every loss on fixed tensors gives the numbers it gave on 28 November 2026, before the modules were moved.

`tests/data/loss_values.json` has, for each loss, seed, vocabulary and kind of teacher: total, weight, the sum of the
gradient's absolute values, a weighted sum of the gradient, and the number of values. Numbers that change on purpose
are written anew by `python tests/losses/test_values.py`, in a commit that says why."""
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from opd_nb.losses import trl_gold  # noqa: F401, registers its loss
from opd_nb.losses.checks import listed, toy_batch
from opd_nb.losses.registry import LOSSES

FILE = Path(__file__).resolve().parents[1] / 'data' / 'loss_values.json'
KNOWN = json.loads(FILE.read_text())


def case(key):
    "Student, teacher, alignment and vocabulary of a key such as 'gold/0/unlike/dense'."
    _, seed, vocabulary, kind = key.split('/')
    student, teacher, alignment, vocab = toy_batch(int(seed), same=vocabulary == 'same')
    if vocabulary == 'same':
        other, n = toy_batch(int(seed) + 50, same=True).student, len(student.ids)
        scale = torch.linspace(.5, 1.5, n, dtype=torch.float64)[:, None]
        teacher = replace(other, hidden=other.hidden[:1].repeat(n, 1) * scale, ids=student.ids,
                          logprobs=torch.linspace(-3, -.2, n, dtype=torch.float64))
    return student, listed(teacher, 4) if kind == 'listed' else teacher, alignment, vocab


def measured(key):
    student, teacher, alignment, vocab = case(key)
    out = LOSSES[key.split('/')[0]](student, teacher, alignment, vocab)
    gradient = None
    if out.total.requires_grad: gradient = torch.autograd.grad(out.total, student.hidden, allow_unused=True)[0]
    if gradient is None: return [out.total.item(), float(out.weight), 0., 0., len(out.values)]
    order = torch.arange(1, gradient.numel() + 1).reshape(gradient.shape)
    return [out.total.item(), float(out.weight), gradient.abs().sum().item(), (gradient * order).sum().item(),
            len(out.values)]


@pytest.mark.parametrize('name', sorted({key.split('/')[0] for key in KNOWN}))
def test_a_loss_gives_the_numbers_it_gave(name):
    mine = {key: measured(key) for key in KNOWN if key.split('/')[0] == name}
    assert mine and all(mine[key] == pytest.approx(KNOWN[key], rel=1e-8, abs=1e-8) for key in mine)


def test_no_loss_is_left_out():
    "Except those that read reference texts, the teacher's own text, or token strings."
    assert set(LOSSES.names) - {'sft', 'continuation', 'gold_trl', 'unlikely'} <= {key.split('/')[0] for key in KNOWN}


if __name__ == '__main__':
    FILE.write_text('{\n' + ',\n'.join(f'"{key}": {json.dumps(measured(key))}' for key in KNOWN) + '\n}\n')
