"Students whose own weights are packed: what is trained, saved, resumed, merged and refused."
import importlib.util
import json

import pytest
import torch

from opd_nb.core.config import OPDConfig
from opd_nb.core.errors import BadInput
from opd_nb.data.formats import save_conversations
from opd_nb.lab import countdown
from opd_nb.models.lm import LM, head_matches, head_of, log_probabilities, tiny_folder
from opd_nb.monitor.run_log import read_log
from opd_nb.teachers.base import load_teacher
from opd_nb.training.checkpoints import newest_checkpoint, save_merged
from opd_nb.training.loop import train
from opd_nb.training.setup import load_student, size_text

has_bitsandbytes = importlib.util.find_spec('bitsandbytes') is not None
packed = pytest.mark.skipif(not has_bitsandbytes, reason='pip install "opd_nb[quantize]"')


@pytest.fixture(scope='module')
def prompts(tmp_path_factory):
    return str(save_conversations(countdown.draw(60, answers=True), tmp_path_factory.mktemp('data') / 'prompts.jsonl'))


def config(prompts, folder, **kw):
    kw = dict(student='tiny:teacher', teacher='tiny:student-bpe', loss='cover', data=prompts, output_dir=folder, max_steps=4, batch=4, max_new_tokens=16, eval_every=2, save_every=2, warmup_steps=1, learning_rate=1e-3, device='cpu', lora=True, quantize='4bit') | kw
    return OPDConfig(_env_file=None, **kw)


def adapters(folder):
    from safetensors.torch import load_file
    return load_file(folder / 'adapter_model.safetensors')


def spelled(lm):
    "Log-probabilities of one completion."
    prompt, (ids, _) = lm.codec.prompt([dict(role='user', content='Make 31 from 3 7 10.')]), lm.codec.write(b'7*3=21 21+10=31')
    return log_probabilities(lm.model, prompt, ids)


def kl(p, q): return (p.exp() * (p - q)).sum(-1).mean().item()


def test_packed_weights_need_adapters(prompts, tmp_path):
    with pytest.raises(BadInput, match='quantize.*--lora'): config(prompts, tmp_path, lora=False)


def test_the_package_is_named(prompts, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name == 'bitsandbytes' else found(name))
    with pytest.raises(BadInput, match=r'pip install "opd_nb\[quantize\]"'): load_student(config(prompts, tmp_path))


@packed
@pytest.mark.parametrize('bits', ['4bit', '8bit'])
def test_a_packed_student(prompts, tmp_path, bits):
    "Packed are the matrices of its layers; the head is a matrix, and only adapters are trained."
    student = load_student(config(prompts, tmp_path, quantize=bits))
    whole = load_student(config(prompts, tmp_path, quantize=None))
    inside = [m for name, m in student.model.named_modules() if name.endswith(('down_proj', 'q_proj.base_layer'))]
    assert inside and all(m.weight.dtype in (torch.uint8, torch.int8) for m in inside)
    assert head_of(student.model).weight.dtype == torch.float32 and head_matches(student.model.eval())
    assert {name.split('.')[-3] for name, p in student.model.named_parameters() if p.requires_grad} == {'lora_A', 'lora_B'}
    assert size_text(student.model) == size_text(whole.model)
    assert 0 < kl(spelled(whole), spelled(student)) < .01  # where it is unpacked wrongly, .1


@packed
@pytest.mark.parametrize('bits', ['4bit', '8bit'])
def test_gradients_after_writing(prompts, tmp_path, bits):
    "A student that was read without a gradient has nearly the gradient it has under whole weights."
    found = {}
    for q in (None, bits):
        student = load_student(config(prompts, tmp_path, quantize=q, lora_dropout=0.))
        torch.manual_seed(0)
        trained = [p for _, p in sorted(student.model.named_parameters()) if p.requires_grad]
        with torch.no_grad():
            for p in trained: p.copy_(torch.randn(p.shape) * .02)
        spelled(student)
        ids = torch.tensor([student.codec.write(b'7*3=21 21+10=31')[0]])
        student.model.train()(ids, labels=ids).loss.backward()
        found[q] = torch.cat([p.grad.flatten() for p in trained])
    assert torch.nn.functional.cosine_similarity(found[None], found[bits], dim=0) > .95


@packed
def test_blocks_that_are_not_whole_are_refused_on_a_cpu(prompts, tmp_path):
    with pytest.raises(BadInput, match='96 wide.*multiple of 64'): load_student(config(prompts, tmp_path, student='tiny:student'))
    load_student(config(prompts, tmp_path, student='tiny:student', quantize='8bit'))


@packed
@pytest.mark.parametrize('bits', ['4bit', '8bit'])
def test_a_run_that_is_resumed_is_the_same_run(prompts, tmp_path, bits):
    whole = train(config(prompts, tmp_path / 'whole', quantize=bits), progress=False)
    class Stop(Exception): pass
    class Leaves:
        "A teacher that goes away in the third step."
        def __init__(self, t): self.t, self.left, self.codec, self.capabilities = t, 5, t.codec, t.capabilities
        def score(self, *a):
            self.left -= 1
            if not self.left: raise Stop
            return self.t.score(*a)
    part = config(prompts, tmp_path / 'part', quantize=bits)
    with pytest.raises(Stop): train(part, Leaves(load_teacher('tiny:student-bpe', part)), progress=False)
    assert newest_checkpoint(tmp_path / 'part').name == 'step-2'
    again = train(part.model_copy(update=dict(resume=True)), progress=False)
    a, b = adapters(whole.student), adapters(again.student)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert any(x.any() for k, x in a.items() if 'lora_B' in k)
    losses = [e['loss'] for e in read_log(tmp_path / 'whole') if e.get('event') == 'step' or 'loss' in e]
    assert all(0 < x < 100 for x in losses)


@packed
def test_what_is_saved_is_not_packed(prompts, tmp_path):
    done = train(config(prompts, tmp_path / 'run', learning_rate=1e-2), progress=False)
    saved = json.loads((done.student / 'adapter_config.json').read_text())
    assert saved['base_model_name_or_path'] == str(tiny_folder('teacher'))
    loaded = LM.load(str(done.student), device='cpu')
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    merged = LM.load(str(save_merged(done.student, tmp_path / 'merged')), device='cpu')
    assert not hasattr(merged.model, 'peft_config') and 'quantization_config' not in (tmp_path / 'merged/config.json').read_text()
    base = LM.load('tiny:teacher', 'teacher', device='cpu')
    assert kl(spelled(loaded), spelled(merged)) < 1e-4 < kl(spelled(loaded), spelled(base))


@packed
def test_its_own_teacher_is_the_packed_base(prompts, tmp_path):
    done = train(config(prompts, tmp_path / 'run', teacher='self:adapter-off', loss='auto', max_steps=2), progress=False)
    steps = [e for e in done.events if 'loss' in e and e.get('step') == 1]
    assert steps and abs(steps[0]['loss']) < .05  # adapters that are new change nothing; dropout does a little


@packed
def test_a_student_that_is_adapters_is_merged_whole(prompts, tmp_path):
    first = train(config(prompts, tmp_path / 'first', quantize=None, learning_rate=1e-2), progress=False)
    second = config(prompts, tmp_path / 'second', student=str(first.student))
    done = train(second, progress=False)
    assert 'quantization_config' not in (tmp_path / 'second/base/config.json').read_text()
    saved = json.loads((done.student / 'adapter_config.json').read_text())
    assert saved['base_model_name_or_path'] == str(tmp_path / 'second/base')
    assert kl(spelled(LM.load(str(first.student), device='cpu')), spelled(LM.load(str(tmp_path / 'second/base'), device='cpu'))) < 1e-4
    assert LM.load(str(done.student), device='cpu').model.peft_config
