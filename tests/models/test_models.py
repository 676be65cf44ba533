"Models of the Hub, as its client keeps them on this machine."
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model

from conftest import slow
from opd_nb.core.types import Conversation
from opd_nb.models.lm import LM
from opd_nb.teachers.hf import HFTeacher

COMMIT = 'c0ffee'.ljust(40, '0')
PROMPT = {'role': 'user', 'content': 'Make 31 from 3 7 10.'}
ABSENT = ('config.json', 'added_tokens.json', 'special_tokens_map.json', 'chat_template.json',
          'tokenizer.model', 'vocab.json', 'merges.txt')
LOAD = """
from opd_nb.core.types import Conversation
from opd_nb.models.lm import LM
from opd_nb.teachers.base import load_teacher
lm = LM.load('someone/adapters', device='cpu', revision='v2')
said, = load_teacher('hf:someone/adapters').score([Conversation(({'role': 'user', 'content': 'Make 31 from 3 7 10.'},))], [(b'7*3=21', True)])
print(hasattr(lm.model, 'merge_and_unload'), lm.codec.tok.pad_token, float(said.logprobs.sum()))
"""


@pytest.mark.parametrize('own_tokenizer', [pytest.param(False, marks=slow), True])
def test_adapters_of_the_hub_are_adapters(own_tokenizer, tmp_path, monkeypatch):
    "They stand on their base, with its tokenizer unless they brought another."
    torch.manual_seed(0)
    base = LM.load('tiny:student', device='cpu', dtype='float32')
    lora = LoraConfig(r=2, task_type='CAUSAL_LM', target_modules=['q_proj'], init_lora_weights=False)
    model = get_peft_model(base.model, lora).eval()
    repo = tmp_path / 'models--someone--adapters'
    folder, absent = repo / 'snapshots' / COMMIT, repo / '.no_exist' / COMMIT
    for at in (folder, absent, repo / 'refs'): at.mkdir(parents=True)
    for name in ('main', 'v2'): (repo / 'refs' / name).write_text(COMMIT)  # the base has no branch v2
    for name in ABSENT: (absent / name).touch()
    model.save_pretrained(folder)
    if own_tokenizer:
        base.codec.tok.pad_token = '<|im_end|>'
        base.codec.tok.save_pretrained(folder)
    monkeypatch.setenv('HF_HUB_CACHE', str(tmp_path))  # read when the client is imported
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', LOAD], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    adapted, pad, said = done.stdout.split()
    teacher = HFTeacher(LM(model, base.codec, 'here'))
    here, = teacher.score([Conversation((PROMPT,))], [(b'7*3=21', True)])
    assert adapted == 'True' and abs(float(said) - float(here.logprobs.sum())) < 1e-3
    assert (pad == '<|im_end|>') == own_tokenizer
