"The laboratory and its baselines: GRPO beside TRL's own trainer, puzzles of a public file, a table that repeats."
import warnings

import pytest
import torch

from opd_nb import countdown
from opd_nb.baselines import group_advantages, grpo_loss
from opd_nb.engine import Side
from opd_nb.models import LM
from opd_nb.types import Head

warnings.filterwarnings('ignore', message='.*experimental.*')
QUESTIONS = countdown.draw(2, seed=5)


def pay(prompts, completions, **_):
    "A reward that tells answers apart even from a student that solves nothing."
    return [float(len(set(c[0]['content'])) % 3) for c in completions]


@pytest.fixture(scope='module')
def trainer(tmp_path_factory):
    trl = pytest.importorskip('trl', reason='TRL is needed to be compared with: pip install "trl>=1.16"')
    from datasets import Dataset
    student, out = LM.load('tiny:student', device='cpu'), tmp_path_factory.mktemp('grpo')
    args = trl.GRPOConfig(str(out), use_cpu=True, bf16=False, report_to=[], per_device_train_batch_size=8, num_generations=4, max_completion_length=20, beta=.04, disable_tqdm=True)
    t = trl.GRPOTrainer(student.model, pay, args, Dataset.from_list([dict(prompt=c.prompt) for c in QUESTIONS]), processing_class=student.codec.tok)
    t.current_gradient_accumulation_steps = 1
    t.model.train()
    return t


@pytest.fixture(scope='module')
def batch(trainer):
    "Answers that TRL sampled, and what it made of them; sampled a while ago, so that ratios differ from 1."
    torch.manual_seed(0)
    rows = [dict(prompt=c.prompt) for c in QUESTIONS for _ in range(4)]
    b = trainer._generate_and_score_completions(rows)
    shape = b['completion_ids'].shape
    with torch.no_grad(): now, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, torch.cat([b['prompt_ids'], b['completion_ids']], 1), torch.cat([b['prompt_mask'], b['completion_mask']], 1), shape[1])
    return b | dict(old_per_token_logps=now + .3 * torch.randn(shape), ref_per_token_logps=now + .5 * torch.randn(shape))


def test_advantages_are_theirs(trainer, batch):
    texts = [trainer.processing_class.decode(i[m.bool()], skip_special_tokens=True) for i, m in zip(batch['completion_ids'], batch['completion_mask'])]
    rewards = pay(None, [[dict(content=t)] for t in texts])
    mine = group_advantages(rewards, [i // 4 for i in range(8)])
    assert mine.abs().max() > .1 and (mine - batch['advantages'].cpu()).abs().max() < 1e-5


@pytest.mark.parametrize('kind, beta, unbiased', [(k, b, True) for k in ('grpo', 'dapo', 'bnpo', 'dr_grpo') for b in (0., .04)] + [('dapo', .04, False)])
def test_grpo_is_theirs(trainer, batch, kind, beta, unbiased):
    "Value and gradient, on the same answers."
    weight = trainer.model.get_input_embeddings().weight
    trainer.loss_type, trainer.beta, trainer.args.use_bias_correction_kl = kind, beta, unbiased
    trainer.model.zero_grad()
    theirs = trainer._compute_loss(trainer.model, batch)
    theirs.backward()
    gradient = weight.grad.clone()
    trainer.model.zero_grad()
    mask, n = batch['completion_mask'].bool(), batch['completion_ids'].shape[1]
    ids = torch.cat([batch['prompt_ids'], batch['completion_ids']], 1)
    hidden = trainer.model.model(input_ids=ids, attention_mask=torch.cat([batch['prompt_mask'], batch['completion_mask']], 1)).last_hidden_state[:, -n - 1:-1]
    side = Side(hidden[mask], batch['completion_ids'][mask], Head(trainer.model.lm_head.weight), batch['old_per_token_logps'][mask])
    out = grpo_loss(side, [list(range(1, m.sum() + 1)) for m in mask], batch['advantages'].cpu(), kind, beta=beta, reference=batch['ref_per_token_logps'][mask], unbiased=unbiased, longest=20)
    mine = out.total / out.weight
    mine.backward()
    assert mine.item() == pytest.approx(theirs.item(), abs=1e-5) and abs(mine.item()) > 1e-4
    assert (weight.grad - gradient).abs().max() < 1e-5 and gradient.abs().max() > 1e-3
