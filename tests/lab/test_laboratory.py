"The laboratory and its baselines: GRPO beside TRL's own trainer, puzzles of a public file, a table that repeats."

import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from conftest import real, slow
from opd_nb.core.types import Head
from opd_nb.alignment.chunks import align
from opd_nb.alignment.vocab import VocabMap
from opd_nb.models.outputs import Side
from opd_nb.models.lm import LM
from opd_nb.losses.grpo import group_advantages, grpo_loss
from opd_nb.losses.trl_gold import gold_trl
from opd_nb.data.formats import save_conversations
from opd_nb.lab import countdown, tiny_models
from opd_nb.lab.arms import ARMS, FAST
from opd_nb.lab.queue import work
from opd_nb.lab.tables import compare, read_results

warnings.filterwarnings('ignore', message='.*experimental.*')
QUESTIONS = countdown.draw(2, seed=5)


def pay(prompts, completions, **_):
    "A reward that tells answers apart even from a student that solves nothing."
    return [float(len(set(c[0]['content'])) % 3) for c in completions]


@pytest.fixture(scope='module')
def trainer(tmp_path_factory):
    trl = pytest.importorskip(
        'trl', reason='TRL is needed to be compared with: pip install "trl>=1.16"'
    )
    from datasets import Dataset

    student, out = LM.load('tiny:student', device='cpu'), tmp_path_factory.mktemp('grpo')
    args = trl.GRPOConfig(
        str(out),
        use_cpu=True,
        bf16=False,
        report_to=[],
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=20,
        beta=0.04,
        disable_tqdm=True,
    )
    t = trl.GRPOTrainer(
        student.model,
        pay,
        args,
        Dataset.from_list([dict(prompt=c.prompt) for c in QUESTIONS]),
        processing_class=student.codec.tok,
    )
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
    with torch.no_grad():
        now, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            torch.cat([b['prompt_ids'], b['completion_ids']], 1),
            torch.cat([b['prompt_mask'], b['completion_mask']], 1),
            shape[1],
        )
    return b | dict(
        old_per_token_logps=now + 0.3 * torch.randn(shape),
        ref_per_token_logps=now + 0.5 * torch.randn(shape),
    )


def test_advantages_are_theirs(trainer, batch):
    texts = [
        trainer.processing_class.decode(i[m.bool()], skip_special_tokens=True)
        for i, m in zip(batch['completion_ids'], batch['completion_mask'])
    ]
    rewards = pay(None, [[dict(content=t)] for t in texts])
    mine = group_advantages(rewards, [i // 4 for i in range(8)])
    assert mine.abs().max() > 0.1 and (mine - batch['advantages'].cpu()).abs().max() < 1e-5


@pytest.mark.parametrize(
    'kind, beta, unbiased',
    [(k, b, True) for k in ('grpo', 'dapo', 'bnpo', 'dr_grpo') for b in (0.0, 0.04)]
    + [('dapo', 0.04, False)],
)
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
    hidden = trainer.model.model(
        input_ids=ids, attention_mask=torch.cat([batch['prompt_mask'], batch['completion_mask']], 1)
    ).last_hidden_state[:, -n - 1 : -1]
    side = Side(
        hidden[mask],
        batch['completion_ids'][mask],
        Head(trainer.model.lm_head.weight),
        batch['old_per_token_logps'][mask],
    )
    out = grpo_loss(
        side,
        [list(range(1, m.sum() + 1)) for m in mask],
        batch['advantages'].cpu(),
        kind,
        beta=beta,
        reference=batch['ref_per_token_logps'][mask],
        unbiased=unbiased,
        longest=20,
    )
    mine = out.total / out.weight
    mine.backward()
    assert mine.item() == pytest.approx(theirs.item(), abs=1e-5) and abs(mine.item()) > 1e-4
    assert (weight.grad - gradient).abs().max() < 1e-5 and gradient.abs().max() > 1e-3


def test_public_puzzles_are_what_they_say():
    "256 puzzles with three numbers, each with an answer that the verifier accepts."
    puzzles = tiny_models.from_lines(real('benchmarks', 'countdown_cd3_test.jsonl').read_text())
    assert len(puzzles) == 256 and {len(c.metadata['numbers']) for c in puzzles} == {3}
    for c in puzzles:
        numbers, target = c.metadata['numbers'], c.metadata['target']
        answer = next(
            ' '.join(steps)
            for steps, reached in countdown.solutions(tuple(sorted(numbers)))
            if reached == target
        )
        assert countdown.verify(numbers, target, answer) and not countdown.verify(
            numbers, target + 1, answer
        )


@pytest.mark.parametrize('seed', [0, 1])
def test_gold_trl_is_theirs(seed):
    "The peer of the laboratory's table against the peer's own code, strings and late rows included."
    import test_trl_parity as trl

    b = trl.batch(seed)
    names = lambda n, pairs: [pairs.get(i, f'{n}{i}') for i in range(n)]
    tokens = [
        SimpleNamespace(pieces=names(trl.V_S, {s: f'pair{t}' for t, s in trl.PAIRS.items()})),
        SimpleNamespace(pieces=names(trl.V_T, {t: f'pair{t}' for t in trl.PAIRS})),
    ]
    vocab = VocabMap(None, None, trl.V_S, trl.V_T, False, -1, tuple(tokens))
    s_ends, t_ends = (
        [*e, e[-1] + 1] for e in (b.s_ends, b.t_ends)
    )  # our rows predict their tokens; one_late undoes that
    side = lambda z, ids, p, n: Side(z[p - 1 : p + n - 1], ids[p : p + n], Head(None))
    out = gold_trl(
        side(b.zs, b.ids, trl.PROMPT_S, len(s_ends)),
        side(b.zt, b.tids, trl.PROMPT_T, len(t_ends)),
        align([s_ends], [t_ends]),
        vocab,
    )
    mine, peer = out.total / out.weight, trl.theirs(b, merge='observed')
    assert mine.item() == pytest.approx(peer.item(), abs=1e-5)
    g, h = (torch.autograd.grad(x, b.zs)[0] for x in (mine, peer))
    assert (g - h).abs().max() < 1e-5 and g.abs().max() > 1e-4


def test_grpo_by_command(tmp_path):
    "opd train --method grpo --reward countdown"
    save_conversations(countdown.draw(8), tmp_path / 'puzzles.jsonl')
    words = [
        'train',
        '--method',
        'grpo',
        '--reward',
        'countdown',
        '--num-generations',
        '4',
        '--student',
        'tiny:',
        '--data',
        str(tmp_path / 'puzzles.jsonl'),
        '--batch',
        '2',
        '--max-steps',
        '2',
        '--max-new-tokens',
        '16',
        '--val-fraction',
        '0',
        '--output-dir',
        str(tmp_path / 'run'),
        '--device',
        'cpu',
    ]
    done = subprocess.run(
        [
            sys.executable,
            '-c',
            'import sys; from opd_nb.cli.app import main; sys.exit(main(sys.argv[1:]))',
            *words,
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    steps = [json.loads(line) for line in (tmp_path / 'run' / 'log.jsonl').read_text().splitlines()]
    assert [s['event'] for s in steps] == ['step'] * 2 and all(
        'reward' in s and 'silent' in s for s in steps
    )


EVERY_ARM = bool(os.environ.get('OPD_SLOW'))
TRIED = list(ARMS) if EVERY_ARM else ['before', 'cover', 'gold', 'grpo', 'kd', 'sft']


def tried(arm, pair, seed):
    "The runs of the fast laboratory; `make test-slow` makes every arm."
    return seed == 0 and pair in ('crossing', 'teacher') and arm in ['before', *TRIED]


@pytest.fixture(scope='module')
def fast(tmp_path_factory):
    "The laboratory at a budget that tries the machinery, on the most different pair."
    folder = tmp_path_factory.mktemp('laboratory')
    assert (
        work(
            folder / 'results',
            folder / 'cache',
            FAST,
            only=tried,
            tell=lambda line: None,
        )
        == 0
    )
    return folder


def test_fast_laboratory_makes_arms_once(fast):
    files = sorted((fast / 'results').glob('*.json'))
    assert {f.name for f in files} == {
        f'{a}-crossing-0.json' for a in TRIED if a in ARMS and 'crossing' in ARMS[a].pairs
    } | {'before-crossing-0.json', 'before-teacher-0.json'}
    stamps = [f.stat().st_mtime_ns for f in files]
    (fast / 'results' / 'pg-crossing-0.part').write_text('{"cut')  # what a killed run leaves
    assert (
        work(
            fast / 'results',
            fast / 'cache',
            FAST,
            hours=-1,
            only=tried,
        )
        == 0
    )
    assert [f.stat().st_mtime_ns for f in files] == stamps
    for arm, r in ((f.name.split('-')[0], json.loads(f.read_text())) for f in files):
        if arm == 'before': continue
        assert (
            r['at']['tokens']['tokens'] >= FAST.tokens
            and r['at']['seconds']['seconds'] >= FAST.seconds
            and len(r['before']) == FAST.puzzles
        )
        assert all(m['loss'] == m['loss'] for m in r['marks']) and sum(
            r['at']['tokens']['spent'].values()
        ) == pytest.approx(r['at']['tokens']['seconds'], abs=0.2)
        assert (
            not r['at']['tokens']['cut']
            and r['student']
            and r['student']
            == json.loads((fast / 'results' / 'before-crossing-0.json').read_text())['student']
        )


def test_two_workers_share_a_folder(fast, tmp_path):
    "A run that another worker is at is left to it. One whose learning rate is not known waits for its trials, which are made first unless they belong to another folder."
    from filelock import FileLock

    pick, made = (
        lambda arm, pair, seed: pair in ('crossing', 'teacher')
        and seed == 0
        and arm in ('before', 'sft'),
        [],
    )
    with FileLock(tmp_path / 'sft-crossing-0.json.lock'):
        assert work(tmp_path, fast / 'cache', FAST, only=pick, tell=made.append) == 1
    assert len(made) == len(list(tmp_path.glob('*.json'))) == 2
    assert work(tmp_path, fast / 'cache', FAST, only=pick, tell=made.append) == 0 and made[
        -1
    ].startswith('sft-crossing-0')
    two, one = replace(FAST, rates=(1e-4, 1e-3)), lambda arm, pair, seed: (arm, pair, seed) == (
        'sft',
        'crossing',
        0,
    )
    assert work(tmp_path / 'none', fast / 'cache', two, only=one, trials=tmp_path / 'nowhere') == 1
    made.clear()
    assert work(tmp_path / 'own', fast / 'cache', two, only=one, tell=made.append) == 0
    assert (
        made[-1].startswith('sft-crossing-0')
        and [m.split('-1000')[0] for m in made[:2]] == ['sft@0.0001-pieces', 'sft@0.001-pieces']
        and all(m.startswith('sft@') for m in made[:-1])
    )


def test_same_seed_same_table(fast, tmp_path):
    pick = (
        lambda arm, pair, seed: seed == 0
        and pair in ('crossing', 'teacher')
        and arm in ('before', 'gold', 'grpo', 'sft')
    )
    assert work(tmp_path, fast / 'cache', FAST, only=pick, tell=lambda line: None) == 0
    a, b = (
        {k: r for k, r in read_results(folder).items() if pick(*k)}
        for folder in (fast / 'results', tmp_path)
    )
    assert set(a) == set(b) and len(a) == 5
    for k in a:  # seconds are measured and differ; what was learnt at so many tokens does not
        at = lambda r: (
            r['solved']
            if r['arm'] == 'before'
            else (
                r['at']['tokens']['solved'],
                r['at']['tokens']['step'],
                r['at']['tokens']['tokens'],
            )
        )
        assert at(a[k]) == at(b[k])
    columns = [
        'arm',
        'pair',
        'accuracy',
        'low',
        'high',
        'recovery',
        'recovery_low',
        'recovery_high',
        'tokens',
    ]
    assert compare(a)[columns].equals(compare(b)[columns])


def papermill(folder, *words):
    nb = Path(__file__).resolve().parents[2] / 'nbs' / 'runs' / 'countdown.ipynb'
    done = subprocess.run(
        [
            sys.executable,
            '-m',
            'papermill',
            str(nb),
            str(folder / 'out.ipynb'),
            '-p',
            'output_dir',
            str(folder),
            *words,
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / 'metrics.json').read_text())


def test_notebook_reads_what_is_there(fast, tmp_path):
    "Tables and pictures of the finished runs."
    m = papermill(tmp_path, '-p', 'results', str(fast / 'results'))
    assert (
        m['finished'] == len(read_results(fast / 'results')) > 2
        and {'gold-crossing', 'cover-crossing'} <= set(m['recovery'])
        and not m['long']
    )
    found = {p.name for p in tmp_path.iterdir()}
    assert {'recovery.png', 'costs.png'} <= found and any(n.startswith('curves-') for n in found)


@slow
def test_fast_notebook(fast, tmp_path):
    "With fast, the notebook makes what is missing in its own folder; all but three arms are there already, to save time."
    import shutil

    shutil.copytree(fast / 'results', tmp_path / 'fast')
    shutil.copytree(fast / 'cache', tmp_path / 'cache')
    gone = [tmp_path / 'fast' / f'{arm}-crossing-0.json' for arm in ('sft', 'grpo', 'cover')]
    for f in gone:
        f.unlink()
    assert papermill(tmp_path, '-p', 'fast', 'True')['finished'] == 2 + sum(
        'crossing' in arm.pairs for arm in ARMS.values()
    ) and all(f.exists() for f in gone)


def made_tiny(family, folder):
    "A randomly initialised model of a family, with its real tokenizer."
    from transformers import (
        AutoTokenizer,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    if family == 'llama':
        tok = PreTrainedTokenizerFast(
            tokenizer_file=str(real('tokenizers', 'llama3', 'tokenizer.json')),
            bos_token='<|begin_of_text|>',
            eos_token='<|eot_id|>',
            pad_token='<|eot_id|>',
            chat_template="{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        )
    else:
        tok = AutoTokenizer.from_pretrained(real('tokenizers', 'qwen2'))
    config, model = dict(
        llama=(LlamaConfig, LlamaForCausalLM),
        qwen2=(Qwen2Config, Qwen2ForCausalLM),
        qwen3=(Qwen3Config, Qwen3ForCausalLM),
    )[family]
    torch.manual_seed(0)
    more = dict(head_dim=8) if family == 'qwen3' else {}
    m = model(
        config(
            vocab_size=dict(llama=128_256).get(family, 151_936),
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=32,
            tie_word_embeddings=True,
            eos_token_id=tok.eos_token_id,
            bos_token_id=None,
            **more,
        )
    )
    m.save_pretrained(folder / family)
    tok.save_pretrained(folder / family)
    return str(folder / family)


@slow
@pytest.mark.parametrize(
    'recipe, student, teacher, words',
    [
        pytest.param(
            'questions',
            'qwen2',
            'qwen2',
            ['-p', 'tasks', 'arc_easy_local,hellaswag_local,truthfulqa_mc2_local'],
            id='questions',
        ),
        pytest.param('same-qwen', 'qwen2', 'qwen2', [], id='same-qwen'),
        pytest.param(
            'gold-llama',
            'llama',
            'qwen3',
            ['-p', 'methods', 'grpo,gold_trl,cover'],
            id='gold-llama',
        ),
    ],
)
def test_recipe_at_tiny_size(tmp_path, monkeypatch, recipe, student, teacher, words):
    "The full-size recipes, on random models of their families."
    monkeypatch.setenv('OPD_REAL_DATA', str(real('benchmarks').parent))
    models = [
        made_tiny(f, tmp_path / side) for f, side in ((student, 'students'), (teacher, 'teachers'))
    ]
    papermill(
        tmp_path,
        '-p',
        'recipe',
        recipe,
        '-p',
        'student',
        models[0],
        '-p',
        'teacher',
        models[1],
        '-p',
        'max_steps',
        '1',
        '-p',
        'max_new_tokens',
        '6',
        '-p',
        'eval_max_samples',
        '3',
        *words,
    )
    done = {p.parent.name for p in (tmp_path / recipe).glob('*/final')}
    assert (
        done
        == {
            'questions': {'sft', 'distilled'},
            'same-qwen': {'sft', 'grpo', 'gkd'},
            'gold-llama': {'grpo', 'gold_trl', 'cover'},
        }[recipe]
    )
    shown = json.dumps(json.loads((tmp_path / 'out.ipynb').read_text()))
    assert all(name in shown for name in ['base', *done])


def test_sft_before_a_run_has_the_rate_of_its_trials():
    "The students of the map are made without the folder of trials, so what these found is written down once more."
    from conftest import ROOT
    from opd_nb.lab.arms import RunBudget
    from opd_nb.lab.queue import rate_for
    from opd_nb.lab.run import SFT_RATE
    assert rate_for('sft', 'crossing', ROOT / 'nbs/runs/results/countdown', RunBudget()) == SFT_RATE
