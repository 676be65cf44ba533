"Every key that people have in `.env`, with the meaning and the default it has always had; and presets as files."
import logging
import time
from pathlib import Path

import pytest

from opd_nb.core.errors import BadInput
from opd_nb.core.files import write_whole
from opd_nb.core.folders import open_folder, unlock_folder
from opd_nb.core.sources import presets, read_file, read_preset, read_yaml
from opd_nb.core.config import OPDConfig
from opd_nb.data.dataset import _refuse_other_plan
from opd_nb.data.plan import load_domain

ROOT = Path(__file__).resolve().parents[2]
KEYS = [  # key, a value, the setting it means, what that becomes, the default
    ('STUDENT_MODEL_ID', 'a/b', 'student', 'a/b', 'Qwen/Qwen2.5-0.5B-Instruct'),
    ('STUDENT_MODEL_PATH', './s', 'student', './s', 'Qwen/Qwen2.5-0.5B-Instruct'),
    ('TEACHER_MODE', 'prefix_walk', 'teacher_mode', 'prefix_walk', 'auto'),
    ('TEACHER_MODEL_ID', 'c/d', 'teacher', 'c/d', 'Qwen/Qwen2.5-7B-Instruct'),
    ('TEACHER_DTYPE', 'bf16', 'teacher_dtype', 'bfloat16', 'auto'),  # auto is bfloat16 on a GPU
    ('TEACHER_FLASH_ATTENTION', '1', 'teacher_attention', 'flash_attention_2', 'auto'),
    ('TEACHER_FLASH_ATTENTION', 'false', 'teacher_attention', 'auto', 'auto'),
    ('TEACHER_PREFERRED_QUANT', 'Q8_0', 'teacher_preferred_quant', 'Q8_0', 'Q4_K_M'),
    ('TEACHER_N_GPU_LAYERS', '12', 'teacher_n_gpu_layers', 12, -1),
    ('TEACHER_N_CTX', '4096', 'teacher_n_ctx', 4096, 2048),
    ('TEACHER_N_THREADS', '3', 'teacher_n_threads', 3, None),
    ('TEACHER_TOKENIZER', 'e/f', 'teacher_tokenizer', 'e/f', None),
    ('TEACHER_TOP_K', '20', 'teacher_top_k', 20, 50),
    ('DATA_PATH', 'x.jsonl', 'data', 'x.jsonl', None),
    ('NUM_SAMPLES', '50', 'num_samples', 50, None),
    ('NUM_SAMPLES', 'all', 'num_samples', None, None),
    ('VAL_FRACTION', '.2', 'val_fraction', .2, .1),
    ('VAL_MAX_SAMPLES', '30', 'val_max_samples', 30, 200),
    ('OUTPUT_DIR', 'out', 'output_dir', Path('out'), None),
    ('MAX_STEPS', '7', 'max_steps', 7, 300),
    ('SAVE_EVERY', '9', 'save_every', 9, 100),
    ('LEARNING_RATE', '1e-4', 'learning_rate', 1e-4, 5e-5),
    ('KD_GRAD_CLIP', '.5', 'grad_clip', .5, 1.),
    ('MAX_NEW_TOKENS', '64', 'max_new_tokens', 64, 128),
    ('KD_MAX_NEW_TOKENS', '65', 'max_new_tokens', 65, 128),
    ('NUM_GENERATIONS', '4', 'num_generations', 4, 1),
    ('LAMBDA', '.5', 'lam', .5, 1.),
    ('LAMBDA_KD', '.7', 'lambda_kd', .7, 1.),
    ('LAMBDA_SFT', '.3', 'lambda_sft', .3, 0.),
    ('BETA', '.5', 'beta', .5, 0.),
    ('KD_MIN_TEACHER_LOGP', '-20', 'min_teacher_logp', -20., -30.),
    ('KD_MAX_GROUPS', '100', 'max_groups', 100, 0),
    ('KD_LORA', '1', 'lora', True, False),
    ('KD_LORA', '0', 'lora', False, False),
    ('KD_LORA_R', '8', 'lora_r', 8, 16),
    ('KD_LORA_ALPHA', '64', 'lora_alpha', 64, 32),
    ('KD_LORA_DROPOUT', '0', 'lora_dropout', 0., .05),
    ('KD_LORA_TARGET', 'q_proj', 'lora_target', 'q_proj', 'q_proj,k_proj,v_proj,o_proj'),
    ('EVAL_EVERY', '25', 'eval_every', 25, 50),
    ('PATIENCE', '5', 'patience', 5, 3),
    ('PATIENCE', '0', 'patience', 0, 3),
    ('MONITOR_METRIC', 'val_top1_agreement', 'monitor', 'top1_agreement', 'auto'),
    ('MONITOR_METRIC', 'val_overlap', 'monitor', 'overlap', 'auto'),
    ('MONITOR_MODE', 'min', 'monitor_mode', 'min', 'max'),
    ('BASE_MODEL_ID', 'g/h', 'base_model', 'g/h', None),
    ('SFT_MODEL_PATH', './sft', 'sft_model', './sft', None),
    ('KD_MODEL_PATH', './kd', 'kd_model', './kd', None),
    ('EVAL_TASKS', 'gsm8k', 'eval_tasks', 'gsm8k', 'arc_easy,arc_challenge,hellaswag,truthfulqa,ifeval'),
    ('EVAL_MAX_SAMPLES', '11', 'eval_max_samples', 11, 200),
    ('EVAL_OUTPUT_DIR', 'r', 'eval_output_dir', Path('r'), Path('reports'))]


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch):
    "The keys of whoever runs the tests are not looked at."
    import os
    from opd_nb.core.sources import ENV_KEYS, SPEC_KEYS
    for k in list(os.environ):
        if k in {**ENV_KEYS, **SPEC_KEYS} or k.startswith('OPD_'): monkeypatch.delenv(k)


def from_env(tmp_path, *lines, **kw):
    (tmp_path / '.env').write_text('\n'.join(lines) + '\n')
    return OPDConfig(_env_file=tmp_path / '.env', **kw)


@pytest.mark.parametrize('key, text, setting, value, default', KEYS, ids=[f'{k}={t}' for k, t, *_ in KEYS])
def test_key(tmp_path, monkeypatch, key, text, setting, value, default):
    assert getattr(from_env(tmp_path, f'{key}={text}'), setting) == value
    assert getattr(OPDConfig(_env_file=None), setting) == default
    monkeypatch.setenv(key, text)
    assert getattr(OPDConfig(_env_file=None), setting) == value


@pytest.mark.parametrize('key, setting', [
    ('OPENROUTER_API_KEY', 'openrouter_api_key'),
    ('TEACHER_API_KEY', 'teacher_api_key'),
    ('HF_TOKEN', 'hf_token'),
    ('HUGGINGFACE_HUB_TOKEN', 'hf_token'),
    ('HUGGING_FACE_HUB_TOKEN', 'hf_token')])
def test_secrets_are_masked(tmp_path, key, setting):
    c = from_env(tmp_path, f'{key}=planted-secret-1')
    assert getattr(c, setting).get_secret_value() == 'planted-secret-1'
    c.save(tmp_path / 'config.yaml')
    assert 'planted' not in repr(c) + str(c) + c.model_dump_json() + (tmp_path / 'config.yaml').read_text()


@pytest.mark.parametrize('key', ['OPENAI_API_KEY', 'NVIDIA_API_KEY', 'WANDB_API_KEY'])
def test_keys_of_others_are_let_through(tmp_path, key, monkeypatch, capsys):
    "Their readers look into the environment, so the command puts them there."
    import os
    from opd_nb.cli.app import main
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(key, '')
    monkeypatch.delenv(key)
    c = from_env(tmp_path, f'{key}=planted-secret-2')
    assert main(['notebooks', '--help']) == 0 and os.environ[key] == 'planted-secret-2'
    assert 'planted' not in repr(c) + ''.join(capsys.readouterr())


@pytest.mark.parametrize('lines, teacher', [
    (['TEACHER_BACKEND=openrouter'], 'openrouter:qwen/qwen-2.5-7b-instruct'),
    (['TEACHER_BACKEND=openrouter', 'OPENROUTER_MODEL=x/y'], 'openrouter:x/y'),
    (['TEACHER_BACKEND=hf'], 'hf:Qwen/Qwen2.5-7B-Instruct'),
    (['TEACHER_BACKEND=hf', 'TEACHER_MODEL_ID=x/y'], 'hf:x/y'),
    (['TEACHER_BACKEND=tiny'], 'tiny:'),
    (['TEACHER_BACKEND=gguf', 'TEACHER_GGUF=x/y-GGUF'], 'gguf:x/y-GGUF'),
    (['TEACHER_BACKEND=gguf', 'TEACHER_GGUF=x/y-GGUF', 'TEACHER_GGUF_PATH=./z.gguf'], 'gguf:./z.gguf'),
    (['TEACHER_BACKEND=api', 'TEACHER_API_URL=http://h/v1', 'TEACHER_API_MODEL=m'], 'api:http://h/v1#m'),
    (['TEACHER_BACKEND=api', 'TEACHER_API_URL=http://h/v1'], 'api:http://h/v1'),
    (['TEACHER_GGUF_PATH=./z.gguf', 'OPENROUTER_MODEL=x/y'], 'Qwen/Qwen2.5-7B-Instruct')])
def test_teacher_of_a_backend(tmp_path, lines, teacher): assert from_env(tmp_path, *lines).teacher == teacher


def test_a_backend_switched_in_the_environment(tmp_path, monkeypatch):
    lines = ['TEACHER_BACKEND=hf', 'TEACHER_MODEL_ID=c/d', 'OPENROUTER_MODEL=x/y']
    monkeypatch.setenv('TEACHER_BACKEND', 'openrouter')
    assert from_env(tmp_path, *lines).teacher == 'openrouter:x/y'


def test_a_path_wins_over_an_id(tmp_path):
    assert from_env(tmp_path, 'STUDENT_MODEL_PATH=./mine', 'STUDENT_MODEL_ID=a/b').student == './mine'


def test_every_key_of_the_example_is_understood(tmp_path):
    lines = [line[2:] for line in (ROOT / '.env.example').read_text().splitlines()
             if line.startswith('# ') and line[2:].split('=')[0].isupper() and '=' in line]
    assert len(lines) > 90
    assert from_env(tmp_path, *[x for x in lines if not x.startswith('TEACHER_BACKEND')]) == OPDConfig(_env_file=None)


@pytest.mark.parametrize('name', sorted(p.stem for p in (ROOT / 'opd_nb' / 'presets').glob('*.yaml')))
def test_preset(name):
    c, values = OPDConfig(_env_file=None, _preset=name), read_preset(name)
    assert presets()[name]['about'].endswith('.')
    assert c.output_dir is None  # a new folder for each run, as without a preset
    assert {'student', 'teacher'} <= c.model_fields_set and c.lora or name == 'laptop'
    assert all(k in type(c).model_fields for k in values)


def test_order_of_places(tmp_path, monkeypatch):
    (tmp_path / 'run.yaml').write_text('batch: 4\n')
    words = ['--preset', 'laptop']
    def batch(*more): return from_env(tmp_path, 'OPD_BATCH=2', _cli=[*words, *more]).batch
    assert OPDConfig(_env_file=None, _cli=words).batch == 64
    assert batch() == 2
    monkeypatch.setenv('OPD_BATCH', '3')
    saved = '--config', str(tmp_path / 'run.yaml')
    assert batch() == 3
    assert batch(*saved) == 4
    assert batch(*saved, '--batch', '5') == 5


def test_prompts_of_the_laptop_are_those_of_the_game():
    from opd_nb.lab import countdown
    from opd_nb.data.formats import load_conversations
    assert load_conversations(read_preset('laptop')['data']) == countdown.draw(8000)


def test_nothing_secret_in_a_message(tmp_path):
    with pytest.raises(BadInput) as e: OPDConfig(_env_file=None, openrouter_api_key=dict(key='planted-secret-3'))
    assert 'planted' not in str(e.value)


LAUGHS = 'a0: &a0 [ha, ha]\n' + ''.join(f'a{n}: &a{n} [' + f'*a{n - 1}, ' * 9 + ']\n' for n in range(1, 12))
MERGES = 'a0: &a0 {k: v}\n' + ''.join(f'a{n}: &a{n} {{<<: [' + f'*a{n - 1}, ' * 9 + f'], k{n}: v}}\n' for n in range(1, 12))


@pytest.mark.parametrize('text, words', [(LAUGHS, 'too large'), (MERGES, 'too large'), ('a: &a ' + 'x' * 10**5 + '\n' + ''.join(f'b{n}: *a\n' for n in range(20)), 'too large'),
                                         ('a: &a [*a]', 'itself'), ('max_steps: 5\nmax_steps: 9', 'twice'), ('a: {b: 1, b: 2}', 'twice'), ('- ' * 3000, 'deeply')])
@pytest.mark.parametrize('reader', [read_file, load_domain, lambda path: _refuse_other_plan(path.parent, dict(n='3'))], ids=['settings', 'domain', 'plan'])
def test_yaml_that_is_a_trap(tmp_path, text, words, reader):
    "One loader for all YAML of others: it expands nothing, and says what is wrong."
    path = tmp_path / 'plan.yaml'
    path.write_text(text)
    start = time.monotonic()
    with pytest.raises(BadInput, match=words if reader in (read_file, load_domain) else 'cannot be read') as error: reader(path)
    assert time.monotonic() - start < 5 and len(str(error.value)) < 1000


def test_yaml_with_aliases_is_read(tmp_path):
    (tmp_path / 'x.yaml').write_text('\ufeffa: &a {b: 1}\n' + ''.join(f'c{n}: {{<<: *a, b: 2}}\n' for n in range(100)), encoding='utf-8')
    found = read_yaml(tmp_path / 'x.yaml')
    assert found['a'] == {'b': 1} and found['c99'] == {'b': 2} and len(found) == 101


def test_a_method_that_was_registered_is_a_setting():
    "Its name is accepted from where all settings are; another one is not."
    from opd_nb.training.methods import METHODS, register_method
    with pytest.raises(BadInput, match='opd'): OPDConfig(method='mine', _env_file=None)
    register_method('mine')(print)
    try: assert OPDConfig(method='mine', _env_file=None).method == 'mine'
    finally: del METHODS['mine']


@pytest.mark.parametrize('name', ['best.old', 'config.yaml.part', 'run.old'])
def test_a_link_in_a_folder_leads_nowhere(tmp_path, name):
    "What a link of somebody else's folder points to is neither removed nor written."
    folder, other = tmp_path / 'run', tmp_path / 'other'
    for made in (folder, folder / 'best', other): made.mkdir()
    (folder / 'log.jsonl').touch()
    (other / 'precious').write_text('keep')
    (folder / name).symlink_to(other / 'precious' if name.endswith('part') else other)
    write_whole(folder / 'config.yaml', 'max_steps: 1\n')
    open_folder(folder, True)
    unlock_folder(folder)
    assert (other / 'precious').read_text() == 'keep'


def test_a_folder_that_no_system_has():
    with pytest.raises(BadInput, match='null byte'): open_folder(Path('a\0b'), False)


def test_what_is_logged_is_clean(caplog):
    logging.getLogger('opd_nb').warning('%s and %d', 'a\x1b[2J\u202e.jsonl', 7)
    assert '\x1b' not in caplog.text and '\u202e' not in caplog.text and 'and 7' in caplog.text
