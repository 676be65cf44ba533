"A GGUF file stands wherever a student is named, and what comes out are ordinary folders."
import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from conftest import slow
from opd_nb.cli.app import main
from opd_nb.core.config import OPDConfig
from opd_nb.core.errors import BadInput
from opd_nb.data.formats import save_conversations
from opd_nb.lab import countdown
from opd_nb.models.gguf_student import student_folder
from opd_nb.models.lm import LM
from opd_nb.models.memory import shape_of
from opd_nb.monitor.run_log import read_log
from opd_nb.tools.doctor import examine
from opd_nb.tools.export_gguf import export_gguf
from opd_nb.tools.export_hf import default_path, find_student
from opd_nb.training.loop import train


@pytest.fixture(scope='module')
def file(tmp_path_factory):
    return export_gguf('tiny:student-bpe', tmp_path_factory.mktemp('files') / 'small-F16.gguf', 'f16')


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    "One folder for all tests of this file, so that a file is unpacked once."
    folder = tmp_path_factory.getbasetemp() / 'cache'
    monkeypatch.setenv('OPD_CACHE', str(folder))
    return folder


@pytest.fixture(scope='module')
def prompts(tmp_path_factory):
    return str(save_conversations(countdown.draw(20, answers=True), tmp_path_factory.mktemp('data') / 'prompts.jsonl'))


def config(file, prompts, folder, **kw):
    kw = dict(student=f'gguf:{file}', teacher='tiny:teacher', data=prompts, output_dir=folder, max_steps=2, batch=2,
              max_new_tokens=8, eval_every=2, save_every=1, warmup_steps=0, device='cpu') | kw
    return OPDConfig(_env_file=None, **kw)


def losses(folder): return [e['loss'] for e in read_log(folder) if 'loss' in e]


def test_a_run_ends_in_an_ordinary_folder(file, prompts, tmp_path):
    "Resumed after its first step, it is the same run."
    done = train(config(file, prompts, tmp_path / 'run'), progress=False)
    saved = json.loads((done.student / 'config.json').read_text())
    assert 'quantization_config' not in saved and saved['dtype'] == 'float32'
    AutoModelForCausalLM.from_pretrained(done.student)
    shutil.rmtree(tmp_path / 'run' / 'step-2')
    train(config(file, prompts, tmp_path / 'run', resume=True), progress=False)
    whole = losses(tmp_path / 'run')
    train(config(file, prompts, tmp_path / 'again'), progress=False)
    assert whole == losses(tmp_path / 'again')


def test_adapters_stand_on_a_base_in_the_folder_of_their_run(file, prompts, tmp_path, cache):
    "They load when the unpacked file is gone."
    done = train(config(file, prompts, tmp_path / 'run', lora=True), progress=False)
    base = json.loads((done.student / 'adapter_config.json').read_text())['base_model_name_or_path']
    assert Path(base) == (tmp_path / 'run' / 'base').resolve()
    shutil.rmtree(cache / 'gguf')
    LM.load(str(done.student), device='cpu')


@slow
def test_adapters_may_name_a_file_as_their_base(file, prompts, tmp_path):
    done = train(config(file, prompts, tmp_path / 'run', lora=True), progress=False)
    path = done.student / 'adapter_config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(base_model_name_or_path=f'gguf:{file}')))
    (done.student / 'SHA256SUMS').unlink()
    LM.load(str(done.student), device='cpu')


def test_the_doctor_examines_it(file, prompts, tmp_path):
    lines = [*examine(config(file, prompts, tmp_path / 'run'))]
    assert not [str(line) for line in lines if line.level == 'stop']
    assert shape_of(f'gguf:{file}') == shape_of('tiny:student-bpe')


@slow
def test_it_chats_evaluates_and_is_exported(file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(['chat', f'gguf:{file}', '--prompt', 'Make 24 from 11 4 17.', '--max-new-tokens', '8']) == 0
    assert main(['eval', '--models', f'a=gguf:{file}', '--tasks', 'countdown', '--limit', '2', '--out', 'reports']) == 0
    assert main(['export', f'gguf:{file}', '--gguf', 'q8_0']) == 0
    assert default_path(find_student(f'gguf:{file}').student, 'export') == Path('small-F16-export')
    assert [p.name for p in tmp_path.glob('*.gguf')] == ['small-F16-q8_0.gguf']


def test_a_repository_is_looked_for_with_its_quantisation(monkeypatch):
    "Offline, the message says so; the spelling is understood."
    with pytest.raises(BadInput, match='gguf:me/tiny-GGUF:Q8_0.*not on this machine'):
        student_folder('me/tiny-GGUF:Q8_0', 'student', 'gguf:me/tiny-GGUF:Q8_0')
