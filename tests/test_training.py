"Runs that are cut off, cases that need files, and students that must load elsewhere."
import json
import subprocess, sys

import pytest
import torch

from opd_nb import countdown
from opd_nb.config import OPDConfig
from opd_nb.data import save_conversations
from opd_nb.training import newest_checkpoint, read_log, train
from opd_nb.types import BadInput


OPD = [sys.executable, '-c', 'import sys; from opd_nb.cli import main; sys.exit(main())']


@pytest.fixture(scope='module')
def prompts(tmp_path_factory):
    return str(save_conversations(countdown.draw(60, answers=True), tmp_path_factory.mktemp('data') / 'prompts.jsonl'))


def config(prompts, folder, **kw):
    kw = dict(student='tiny:student', teacher='tiny:teacher', loss='gold', data=prompts, output_dir=folder, max_steps=6, batch=4, max_new_tokens=16, eval_every=3, save_every=2, warmup_steps=1, learning_rate=1e-3, device='cpu') | kw
    return OPDConfig(_env_file=None, **kw)


def weights(folder):
    from safetensors.torch import load_file
    return load_file(next(folder.glob('*.safetensors')))


def figures(folder): return [{k: v for k, v in e.items() if 'seconds' not in k} for e in read_log(folder)]


@pytest.mark.parametrize('kw', [{}, dict(lora=True), dict(lam=.5)], ids=['all weights', 'lora', 'lambda'])
def test_resumed_run_is_the_same_run(prompts, tmp_path, kw):
    whole = train(config(prompts, tmp_path / 'whole', **kw), progress=False)
    part = config(prompts, tmp_path / 'part', **kw)
    class Stop(Exception): pass
    class Leaves:
        "A teacher that goes away in the fifth step."
        def __init__(self, t): self.t, self.left, self.codec, self.capabilities = t, 6, t.codec, t.capabilities
        def score(self, *a):
            self.left -= 1
            if not self.left: raise Stop
            return self.t.score(*a)
    from opd_nb.teachers import load_teacher
    with pytest.raises(Stop): train(part, Leaves(load_teacher('tiny:', part)), progress=False)
    assert newest_checkpoint(tmp_path / 'part').name == 'step-4'
    again = train(part.model_copy(update=dict(resume=True)), progress=False)
    a, b = weights(whole.student), weights(again.student)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert figures(whole.folder) == figures(again.folder)


def test_micro_batches_change_nothing(prompts, tmp_path):
    runs = [train(config(prompts, tmp_path / str(n), max_steps=2, micro_batch=n), progress=False) for n in (1, 4)]
    a, b = (weights(r.student) for r in runs)
    for k in a: torch.testing.assert_close(a[k], b[k], atol=2e-4, rtol=1e-3)


def test_saved_students_load_with_plain_libraries(prompts, tmp_path):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM
    AutoModelForCausalLM.from_pretrained(train(config(prompts, tmp_path / 'a', max_steps=1), progress=False).student)
    student = train(config(prompts, tmp_path / 'b', max_steps=1, lora=True), progress=False).student
    assert (student / 'adapter_config.json').exists()
    AutoPeftModelForCausalLM.from_pretrained(student)


def test_command_and_function_agree(prompts, tmp_path):
    c = config(prompts, tmp_path / 'function', max_steps=2)
    train(c, progress=False)
    words = [w for k, v in c.model_dump(mode='json', exclude_defaults=True).items() for w in (f"--{k.replace('_', '-')}", str(v))]
    words[words.index('--output-dir') + 1] = str(tmp_path / 'command')
    done = subprocess.run([*OPD, 'train', *words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert figures(tmp_path / 'command') == figures(tmp_path / 'function')
    done = subprocess.run([*OPD, 'train', '--config', str(tmp_path / 'command' / 'config.yaml'), '--output-dir', str(tmp_path / 'repeat')], capture_output=True, text=True, cwd=tmp_path)
    assert figures(tmp_path / 'repeat') == figures(tmp_path / 'function'), done.stderr


@pytest.mark.parametrize('kw, says', [
    (dict(loss='golden'), "'gold'"), (dict(loss='gkd'), 'different ones'), (dict(teacher='ggguf:x'), 'tiny:'), (dict(teacher='hf:./nowhere'), 'nothing is there'),
    (dict(student='.'), 'config.json'), (dict(data=None), 'must name a file'), (dict(data='missing.jsonl'), 'nothing is there'), (dict(output_dir='/proc/none'), 'output_dir'), (dict(lora=True, lora_target='nothing'), 'q_proj')])
def test_bad_input(prompts, tmp_path, monkeypatch, kw, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match='(?s)' + says.replace('.', r'\.')): train(config(prompts, tmp_path / 'run', **kw), progress=False)


@pytest.mark.parametrize('text, says', [('', 'is empty'), ('{"a"', 'not JSON'), ('{"prompt": " "}', 'row 1: field prompt has no text'), ('{"x": 1}', 'no known field')])
def test_bad_data(tmp_path, text, says):
    (tmp_path / 'd.jsonl').write_text(text)
    with pytest.raises(BadInput, match=says): train(config(str(tmp_path / 'd.jsonl'), tmp_path / 'run'), progress=False)


def test_lambda_needs_references(tmp_path):
    data = save_conversations(countdown.draw(5), tmp_path / 'd.jsonl')
    with pytest.raises(BadInput, match='cold-start-steps 0'): train(config(str(data), tmp_path / 'run', lam=.5), progress=False)
