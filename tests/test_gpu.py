"What only a GPU shows: the same losses and gradients as on a CPU, runs in each number format, memory. Skips, and says so, where there is none."
import os
from importlib.util import find_spec

import pytest
import torch

from conftest import real
from opd_nb.core.config import OPDConfig
from opd_nb.alignment.vocab import VocabMap
from opd_nb.models.lm import LM, read, tiny_folder
from opd_nb.losses.registry import LOSSES
from opd_nb.losses import trl_gold as peers  # the latter for gold_trl
from opd_nb.teachers.hf import HFTeacher
from opd_nb.data.formats import save_conversations
from opd_nb.training.rollouts import rollout
from opd_nb.training.batch import distillation_loss, read_and_align, score
from opd_nb.training.pairs import loss_for
from opd_nb.training.loop import train
from opd_nb.lab import countdown

GPU = os.environ.get('OPD_GPU', 'cuda')  # OPD_GPU=cpu tries the tests themselves
pytestmark = pytest.mark.skipif(GPU == 'cuda' and not torch.cuda.is_available(), reason='needs a GPU')
PAIRS = [('tiny:student', 'tiny:teacher'), ('tiny:student-bpe', 'tiny:teacher'), ('tiny:teacher', 'tiny:teacher')]
SERVED = [n for n, x in LOSSES.items() if x.needs <= {'full', 'topk', 'logprob'} and x.needs]


def loaded(spec, device, dtype='float64'): return LM.load(spec, 'student', dtype, device)


@torch.no_grad()
def moved(lm):
    "Other weights, the same on each device."
    noise = torch.Generator().manual_seed(0)
    for p in lm.model.parameters(): p.add_(torch.randn(p.shape, generator=noise).to(p), alpha=.02)
    return lm


@pytest.fixture(scope='module')
def prompts(tmp_path_factory):
    return str(save_conversations(countdown.draw(60, answers=True), tmp_path_factory.mktemp('data') / 'prompts.jsonl'))


@pytest.fixture(scope='module')
def gguf(tmp_path_factory):
    "The embedded teacher as a file."
    pytest.importorskip('llama_cpp', reason='a GGUF teacher needs llama-cpp-python: pip install opd_nb[gguf]')
    from opd_nb.tools.export_gguf import export_gguf
    return export_gguf('tiny:teacher', tmp_path_factory.mktemp('file') / 'teacher.gguf', 'f32')


def compared(student, teacher, name, rows, **how):
    "The loss, and the gradient of each weight, brought to the CPU."
    vocab = VocabMap.build(student.codec, teacher.codec)
    student.model.zero_grad()
    scored = score(teacher, rows)
    batch = read_and_align(student, scored.rollouts, scored.signals, vocab)
    out, _ = distillation_loss(batch, loss_for(name, vocab, teacher), **how)
    out.total.backward()
    return out.total.item(), {k: p.grad.double().cpu() for k, p in student.model.named_parameters() if p.grad is not None}


def alike(a, b, bound):
    "Both losses, and the gradient of each weight, are the same up to a share of their size."
    far = {k: ((a[1][k] - g).norm() / g.norm()).item() for k, g in b[1].items() if g.norm() > 0}
    assert far and b[0] and abs(a[0] - b[0]) < bound * abs(b[0]) and max(far.values()) < bound, (a[0], b[0], far)


@pytest.mark.parametrize('name', SERVED)
@pytest.mark.parametrize('pair', PAIRS, ids=lambda p: p[0])
def test_loss_and_gradient_as_on_a_cpu(pair, name):
    if LOSSES[name].same_vocab and pair[0] != pair[1]: pytest.skip('for one vocabulary')
    cpu, gpu = ((moved(loaded(pair[0], d)), HFTeacher(loaded(pair[1], d))) for d in ('cpu', GPU))
    rows = rollout(cpu[0], countdown.draw(6), 24, seed=1)
    for how in ({}, dict(score_weight='token', max_chunks=3)):
        alike(compared(*gpu, name, rows, **how), compared(*cpu, name, rows, **how), 1e-4)


@pytest.mark.parametrize('name, top_k', [('cover', 0), ('bpm', 0), ('bpm', 8), ('strict', 8), ('escd', 8), ('alm', 8), ('pg', 8)])
def test_a_teacher_beside_the_gpu(gguf, name, top_k):
    "llama.cpp reads on the CPU, the student learns on the GPU."
    from opd_nb.teachers.gguf import GGUFTeacher
    teacher = GGUFTeacher(gguf, top_k, n_gpu_layers=0)
    cpu, gpu = (loaded('tiny:student', d) for d in ('cpu', GPU))
    rows = rollout(cpu, countdown.draw(4), 16, seed=1)
    alike(compared(gpu, teacher, name, rows), compared(cpu, teacher, name, rows), 1e-4)


def test_a_teacher_in_bfloat16_says_nearly_the_same():
    exact, half = HFTeacher(loaded('tiny:teacher', 'cpu', 'float32')), HFTeacher(loaded('tiny:teacher', GPU, 'bfloat16'))
    rows = rollout(exact.lm, countdown.draw(8), 24, seed=1)
    a, b = (torch.cat([s.logprobs.cpu().float() for s in t.score([r.conversation for r in rows], [(r.data, r.stopped) for r in rows])]) for t in (exact, half))
    assert 0 < (a - b).abs().mean() < .05


def config(prompts, folder, **kw):
    kw = dict(student='tiny:student', teacher='tiny:teacher', data=prompts, output_dir=folder, max_steps=6, batch=8, micro_batch=4, max_new_tokens=16, eval_every=3, save_every=3, warmup_steps=1, learning_rate=1e-3, device=GPU) | kw
    return OPDConfig(_env_file=None, **kw)


RUNS = {'whole': {}, 'lora': dict(lora=True), 'float32': dict(dtype='float32'), 'bfloat16': dict(dtype='bfloat16'), 'checkpointing': dict(gradient_checkpointing=True, lora=True), 'muon': dict(optimizer='muon'),
        'kd': dict(method='kd'), 'sft': dict(method='sft'), 'grpo': dict(method='grpo', student='tiny:teacher', num_generations=4, batch=4, temperature=2., max_new_tokens=40), 'λ and both losses': dict(lam=.5, lambda_sft=.5, score_weight='trajectory', num_generations=2)}


@pytest.mark.parametrize('kw', RUNS.values(), ids=RUNS)
def test_runs_learn_and_load_on_a_cpu(prompts, tmp_path, kw):
    done = train(config(prompts, tmp_path / 'run', **kw), progress=False)
    steps = [e for e in done.events if e['event'] == 'step']
    assert len(steps) == 6 and not any(e['skipped'] for e in steps) and all(e['loss'] == e['loss'] for e in steps)
    learnt, began = (LM.load(x, 'student', 'float32', 'cpu') for x in (str(done.student), kw.get('student', 'tiny:student')))
    row = rollout(began, countdown.draw(1), 8)[0]
    first, then = (read(x.model, [row.prompt_ids], [row.ids]).logits(slice(None)) for x in (began, learnt))
    assert then.isfinite().all() and not torch.allclose(first, then)
    on = train(config(prompts, tmp_path / 'run', **kw | dict(max_steps=8, resume=True)), progress=False)
    assert [e['step'] for e in on.events if e['event'] == 'step'] == [*range(1, 9)]


def test_same_seed_same_texts():
    lm = loaded('tiny:student', GPU, 'bfloat16')
    a, b, c = (rollout(lm, countdown.draw(16), 24, seed=s) for s in (1, 1, 2))
    assert [r.ids for r in a] == [r.ids for r in b] != [r.ids for r in c]


def random_qwen(folder, **shape):
    "A Qwen2 with random weights and its real tokenizer."
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
    tok = AutoTokenizer.from_pretrained(real('tokenizers', 'qwen2'))
    torch.manual_seed(0)
    m = Qwen2ForCausalLM(Qwen2Config(vocab_size=151936, **shape, max_position_embeddings=4096, tie_word_embeddings=True, bos_token_id=None, eos_token_id=tok.eos_token_id, pad_token_id=None))
    m.save_pretrained(folder), tok.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize('kw', [dict(lora=True), {}, dict(lora=True, gradient_checkpointing=True)], ids=['lora', 'whole', 'checkpointing'])
def test_the_estimate_of_memory(prompts, tmp_path, kw):
    "What `opd doctor` says before, and what CUDA's allocator saw."
    if GPU != 'cuda': pytest.skip('only CUDA tells')
    from opd_nb.models.memory import estimate, shape_of
    student = random_qwen(tmp_path / 's', hidden_size=512, num_hidden_layers=12, num_attention_heads=8, num_key_value_heads=2, intermediate_size=2048)
    teacher = random_qwen(tmp_path / 't', hidden_size=1024, num_hidden_layers=12, num_attention_heads=8, num_key_value_heads=2, intermediate_size=4096)
    c = config(prompts, tmp_path / 'run', student=student, teacher=teacher, batch=32, micro_batch=32, max_new_tokens=256, max_steps=2, val_fraction=0., **kw)
    torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    train(c, progress=False)
    took, said = torch.cuda.max_memory_allocated() - before, estimate(c, shape_of(student, 'student', c), shape_of(teacher, 'teacher'), prompt=110)
    print(f'{took / 1e9:.2f} GB, estimated {said.peak / 1e9:.2f} GB while {said.worst}: {said.parts}')
    assert .9 < said.peak / took < 1.3


def test_too_little_memory_halves_the_micro_batch(prompts, tmp_path, caplog):
    "CUDA itself refuses."
    if GPU != 'cuda': pytest.skip('only CUDA refuses')
    student = random_qwen(tmp_path / 's', hidden_size=256, num_hidden_layers=16, num_attention_heads=4, num_key_value_heads=4, intermediate_size=1024)
    kw = dict(student=student, teacher=student, batch=64, micro_batch=64, max_new_tokens=128, max_steps=1, val_fraction=0., dtype='float32', lora=True)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 3e9) / total)
    try: done = train(config(prompts, tmp_path / 'run', **kw), progress=False)
    finally: torch.cuda.set_per_process_memory_fraction(1.); torch.cuda.empty_cache()
    assert 'with a micro-batch of' in caplog.text and done.steps == 1


def test_the_doctor_sees_the_gpu(capsys, prompts):
    from opd_nb.cli.app import main
    status = main(['doctor', '--student', 'tiny:', '--teacher', 'tiny:', '--data', prompts, '--device', GPU])
    said = capsys.readouterr()
    text = said.out + said.err
    assert status == 0 and (GPU == 'cpu' or torch.cuda.get_device_name() in text), text


def test_answers_as_on_a_cpu(tmp_path):
    "The same questions, by batches as large as the GPU takes."
    pytest.importorskip('lm_eval', reason='pip install "opd_nb[eval]"')
    from opd_nb.eval.evaluate import evaluate
    from opd_nb.eval.questions import Options
    shares = {}
    for device, dtype in (('cpu', 'float32'), (GPU, 'float32'), (GPU, 'bfloat16')):
        got = evaluate(['m=tiny:teacher'], ['countdown', 'arc_easy_local'], Options(limit=50, data=real('benchmarks')), tmp_path / f'{device}-{dtype}', progress=False, device=device, dtype=dtype)
        assert not got.failures
        for t in got.tasks: shares.setdefault(t.name, []).append(sum(r['figures'][t.main] for r in got.records['m', t.name]) / 50)
    print(shares)
    assert all(max(x) - min(x) <= .06 for x in shares.values()) and shares['countdown'][0] > .5


@pytest.mark.parametrize('bits', ['4bit', '8bit'])
def test_a_teacher_in_fewer_bits(prompts, tmp_path, bits):
    pytest.importorskip('bitsandbytes', reason='pip install bitsandbytes')
    if GPU != 'cuda': pytest.skip('bitsandbytes is for GPUs')
    whole, few = (train(config(prompts, tmp_path / str(q), teacher=f"hf:{tiny_folder('teacher')}", teacher_quantize=q, max_steps=1), progress=False).events[0]['teacher_nll'] for q in (None, bits))
    assert 0 < abs(whole - few) < 1  # the same texts, by nearly the same teacher


@pytest.mark.parametrize('bits', ['4bit', '8bit'])
def test_a_student_in_fewer_bits(prompts, tmp_path, bits):
    "Trained beside the same student in bfloat16: less memory, nearly the same losses, adapters of the base that is whole."
    pytest.importorskip('bitsandbytes', reason='pip install "opd_nb[quantize]"')
    if GPU != 'cuda': pytest.skip('tests/training/test_quantized.py does it on a CPU')
    from opd_nb.models.lm import head_matches
    from opd_nb.training.setup import load_student
    student = random_qwen(tmp_path / 's', hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8, intermediate_size=2048)
    kw = dict(student=student, teacher=student, max_steps=2, lora=True, dtype='bfloat16')
    losses, sizes = {}, {}
    for q in (None, bits):
        torch.cuda.empty_cache(); before = torch.cuda.memory_allocated()
        loaded_student = load_student(config(prompts, tmp_path / f'look-{q}', quantize=q, **kw))
        sizes[q] = torch.cuda.memory_allocated() - before
        assert head_matches(loaded_student.model.eval())
        del loaded_student
        done = train(config(prompts, tmp_path / str(q), quantize=q, **kw), progress=False)
        losses[q] = [e['teacher_nll'] for e in done.events if 'teacher_nll' in e]
    print(sizes, losses)
    from opd_nb.models.memory import BITSANDBYTES
    in_layers = 8 * (4 * 512 * 512 + 3 * 512 * 2048)
    assert sizes[None] - sizes[bits] > .9 * in_layers * (2 - BITSANDBYTES[bits]) and abs(losses[bits][0] - losses[None][0]) < .5
    assert not hasattr(LM.load(str(done.student), device='cpu').model.config, 'quantization_config')


@pytest.mark.parametrize('lora', [False, True], ids=['whole', 'lora'])
def test_weights_reach_vllm_over_nccl(tmp_path, lora):
    "The student on the first GPU, vLLM on the second. Nothing has run this yet: tests/training/test_server_rollouts.py has the same order of calls, with another transport."
    if GPU != 'cuda' or torch.cuda.device_count() < 2: pytest.skip('needs two GPUs: NCCL has one member of a group on each')
    if find_spec('vllm') is None: pytest.skip('needs vLLM beside the student: pip install "opd_nb[vllm]"')
    import sys
    from servers import command_server
    from opd_nb.models.optim import add_lora
    from opd_nb.training.vllm_rollouts import VLLMRollouts
    lm = loaded('tiny:student', 'cuda:0', 'float32')
    lm.model.save_pretrained(tmp_path / 'student'), lm.codec.tok.save_pretrained(tmp_path / 'student')
    if lora: lm = LM(add_lora(lm.model, OPDConfig(_env_file=None, lora=True)), lm.codec, lm.path)
    words = f'-m vllm.entrypoints.openai.api_server --model {tmp_path / "student"} --port {{port}} --host 127.0.0.1 --dtype float32 --max-model-len 256 --enforce-eager'.split()
    with command_server(sys.executable, *words, '--weight-transfer-config', '{{"backend": "nccl"}}', patience=400, CUDA_VISIBLE_DEVICES='1', VLLM_SERVER_DEV_MODE='1', HF_HUB_OFFLINE='1', VLLM_NO_USAGE_STATS='1') as url:
        writer = VLLMRollouts(f'vllm:{url}', tmp_path, sync='auto')
        for step in range(3):  # each push is compared with the student's own logprobs
            assert writer(lm, countdown.draw(6), 24, step=step)[0].version == step
            moved(lm)
        assert writer.transfer is not None and not writer.folder.exists()


def test_how_long_the_losses_take(tmp_path):
    "The benchmark's section on bare products at 16,000 positions of Qwen's and Llama's sizes, by CUDA events: the ratios are printed, and no time is asserted. Aimed at are 1.5 times the products."
    import json, subprocess, sys
    from conftest import ROOT
    sizes = dict(rows=16_000) if GPU == 'cuda' else dict(rows=16, dims='16', student_vocab=2000, teacher_vocab=1500)
    given = sizes | dict(lengths='16', repeats=5 if GPU == 'cuda' else 1, peer=False, copy_runs=0, real_models='none', text_mb=.02, real_data=str(real('tokenizers').parent), output_dir=str(tmp_path))
    words = [w for k, v in given.items() for w in ('-p', k, str(v))]
    done = subprocess.run([sys.executable, '-m', 'papermill', str(ROOT / 'nbs/runs/benchmark.ipynb'), str(tmp_path / 'out.ipynb'), *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / 'metrics.json').read_text())
    over = {k: v for k, v in found.items() if k.endswith('_over_floor')}
    print(over)
    assert {'cover_over_floor', 'bpm_over_floor', 'strict_over_floor', 'escd_over_floor', 'gold_over_floor', 'uld_over_floor'} <= over.keys() and all(v > 0 for v in over.values())
