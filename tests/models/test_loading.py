"What is loaded is what its folder holds, and nothing in a folder is run unless it was allowed."
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd_nb.cli.app import main
from opd_nb.core.config import OPDConfig
from opd_nb.core.errors import BadInput
from opd_nb.core.sources import warn_once
from opd_nb.eval.models import lineup
from opd_nb.models.lm import LM, tiny_folder
from opd_nb.models.memory import shape_of
from opd_nb.teachers.base import load_teacher
from opd_nb.tools.export_hf import find_student, write_student
from opd_nb.training.checkpoints import save_merged
from opd_nb.training.setup import load_student

OPD = Path(sys.executable).with_name('opd')


def settings(**given): return OPDConfig(_env_file=None, device='cpu', **given)


def copy_of(name, folder):
    "An embedded model in a folder of its own."
    shutil.copytree(tiny_folder(name), folder)
    return folder


def rewrite(file, change):
    "Change the tensors of a file."
    save_file(change(load_file(file)), file, metadata=dict(format='pt'))


# code in a folder

CODE = '''
import os
open(os.environ['CODE_RAN'], 'w').close()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Mine(LlamaConfig): model_type = 'mine'
class MineLM(LlamaForCausalLM): config_class = Mine
class MineTok(PreTrainedTokenizerFast): pass
'''


def folder_with_code(folder, part):
    "An embedded model whose config, or whose tokenizer, needs code that lies beside it."
    copy_of('student', folder)
    (folder / 'mine.py').write_text(CODE)
    name = 'config.json' if part == 'model' else 'tokenizer_config.json'
    given = json.loads((folder / name).read_text())
    if part == 'model':
        given |= dict(model_type='mine', auto_map=dict(AutoConfig='mine.Mine', AutoModelForCausalLM='mine.MineLM'))
    else:
        given |= dict(tokenizer_class='MineTok', auto_map=dict(AutoTokenizer=[None, 'mine.MineTok']))
    (folder / name).write_text(json.dumps(given))
    return folder


def adapters_on(base, folder, model=None):
    "Adapters without a tokenizer that name a base."
    model = model or AutoModelForCausalLM.from_pretrained(tiny_folder('student'), dtype=torch.float32)
    torch.manual_seed(0)
    lora = LoraConfig(r=2, task_type='CAUSAL_LM', target_modules=['q_proj', 'v_proj'], init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(folder)
    file = folder / 'adapter_config.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(base_model_name_or_path=str(base))))
    return folder


def validate(spec, tmp_path):
    "A teacher that a run reads with."
    return load_teacher(f'hf:{spec}', settings(teacher=f'hf:{spec}'))


LOADERS = dict(
    load=lambda spec, tmp: LM.load(spec),
    none=lambda spec, tmp: LM.load(spec, trust_remote_code=None),
    student=lambda spec, tmp: load_student(settings(student=spec)),
    teacher=validate,
    export=lambda spec, tmp: write_student(find_student(spec), tmp / 'out'),
    merged=lambda spec, tmp: save_merged(spec, tmp / 'out'),
    memory=lambda spec, tmp: shape_of(spec))


@pytest.mark.parametrize('how', LOADERS)
@pytest.mark.parametrize('part', ['model', 'tokenizer', 'base of adapters'])
def test_code_is_refused_without_a_question(how, part, tmp_path, monkeypatch):
    "Everywhere where a model is loaded, and although somebody would say yes."
    if part == 'tokenizer' and how == 'memory': pytest.skip('reads no tokenizer')
    asked, ran = [], tmp_path / 'ran'
    monkeypatch.setattr('builtins.input', lambda *a: asked.append(a) or 'y')
    monkeypatch.setenv('CODE_RAN', str(ran))
    monkeypatch.setenv('HF_MODULES_CACHE', str(tmp_path / 'modules'))
    folder = folder_with_code(tmp_path / 'code', 'tokenizer' if part == 'tokenizer' else 'model')
    if part == 'base of adapters': folder = adapters_on(folder, tmp_path / 'adapters')
    with pytest.raises(BadInput, match='code') as e: LOADERS[how](str(folder), tmp_path)
    assert not ran.exists() and not asked
    assert 'TRUST_REMOTE_CODE=true' in e.value.remedy


COMMANDS = dict(
    chat=lambda d, p: ['chat', d, '--prompt', 'hi'],
    export=lambda d, p: ['export', d, '--out', d.parent / 'e'],
    eval=lambda d, p: ['eval', '--models', f'm={d}', '--tasks', 'countdown', '--limit', 2,
                       '--out', d.parent / 'report'],
    train=lambda d, p: ['train', '--student', d, '--teacher', 'tiny:', '--data', p, '--max-steps', 1,
                        '--output-dir', d.parent / 'r'])


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    "A command, at a terminal where somebody says y to everything; what it printed, with its status."
    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('builtins.input', lambda *a: asked.append(a) or 'y')
    monkeypatch.setenv('CODE_RAN', str(tmp_path / 'ran'))
    monkeypatch.setenv('HF_MODULES_CACHE', str(tmp_path / 'modules'))

    def command(*words):
        status = main([str(word) for word in words])
        out = capsys.readouterr()
        assert not asked
        return status, out.out + out.err
    return command


@pytest.mark.parametrize('name', COMMANDS)
def test_commands_ask_nobody(name, tmp_path, run):
    "A y is no answer, because there is no question."
    data = tmp_path / 'p.jsonl'
    data.write_text('{"prompt": "Make 31 from 3 7 10."}\n' * 4)
    folder = folder_with_code(tmp_path / 'code', 'model')
    status, printed = run(*COMMANDS[name](folder, data))
    assert status and 'code of its own' in printed
    assert not (tmp_path / 'ran').exists()


def test_a_piped_yes_is_no_answer(tmp_path):
    "The same with a real stdin."
    folder = folder_with_code(tmp_path / 'code', 'model')
    env = os.environ | dict(CODE_RAN=str(tmp_path / 'ran'), HF_MODULES_CACHE=str(tmp_path / 'modules'))
    done = subprocess.run([OPD, 'chat', folder, '--prompt', 'hi'], input='y\n' * 50, env=env,
                          capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and 'code of its own' in done.stderr
    assert not (tmp_path / 'ran').exists() and '[y/N]' not in done.stdout + done.stderr


def test_a_setting_allows_it(tmp_path, run, monkeypatch):
    "OPD_TRUST_REMOTE_CODE=true, in a command that has no flag for it."
    folder = folder_with_code(tmp_path / 'code', 'model')
    monkeypatch.setenv('OPD_TRUST_REMOTE_CODE', 'true')
    status, printed = run('chat', folder, '--prompt', 'hi')
    assert status == 0, printed
    assert (tmp_path / 'ran').exists()


def folder_of_run(folder, student, **given):
    "What a training run leaves behind."
    folder.mkdir()
    (folder / 'config.yaml').write_text(json.dumps(dict(student=str(student), **given)))
    (folder / 'log.jsonl').write_text('{"step": 1}\n')
    return folder


@pytest.mark.parametrize('where', ['base', 'best', 'adapters'])
@pytest.mark.parametrize('named', ['run', 'run and base'])
def test_what_is_evaluated_grants_no_trust(where, named, tmp_path, run):
    "trust_remote_code: true in a run's own config.yaml is one more file of a stranger."
    code = folder_with_code(tmp_path / 'code', 'model')
    student = code if where == 'base' else 'tiny:student'
    folder = folder_of_run(tmp_path / 'run', student, trust_remote_code=True)
    if where == 'best': shutil.copytree(code, folder / 'best')
    elif where == 'adapters': adapters_on(code, folder / 'best')
    else: copy_of('student', folder / 'best')
    models = [str(folder), *([f'base={student}'] if named != 'run' else [])]
    assert not any('trust_remote_code' in entry.loading for entry in lineup(models))
    if named != 'run': return
    status, printed = run('eval', '--models', *models, '--tasks', 'countdown', '--limit', 2,
                          '--out', tmp_path / 'report')
    assert status and 'code of its own' in printed
    assert not (tmp_path / 'ran').exists()


def test_template_and_revision_of_a_run_are_kept(tmp_path):
    "They are settings of its base, not permissions."
    folder = folder_of_run(tmp_path / 'run', 'tiny:student', trust_remote_code=True, revision='v2', template=dict(a=1))
    copy_of('student', folder / 'best')
    assert [entry.loading for entry in lineup([str(folder)])] == [dict(revision='v2', template=dict(a=1)), {}]


# the whole model

def without(*parts): return lambda w: {k: x for k, x in w.items() if not any(part in k for part in parts)}
def prefixed(prefix): return lambda w: {prefix + k: x for k, x in w.items()}
def with_tensor(name): return lambda w: w | {name: torch.zeros(4, 4)}
def shorter(part): return lambda w: {k: x[:-2].clone() if part in k else x for k, x in w.items()}


DAMAGE = {
    'one gone': (without('layers.1.mlp.down_proj'), 'lacks 1 tensor .*layers.1.mlp.down_proj'),
    'a layer gone': (without('layers.0.'), 'lacks .*layers.0'),
    'embedding gone': (without('embed_tokens', 'lm_head'), 'lacks .*embed_tokens'),
    'last norm gone': (without('model.norm'), 'lacks 1 tensor .*model.norm'),
    'compiled': (prefixed('_orig_mod.'), 'lacks .*no place for .*_orig_mod'),
    'wrapped': (prefixed('module.'), 'lacks .*no place for .*module'),
    'more layers': (with_tensor('model.layers.9.mlp.up_proj.weight'), 'no place for 1 tensor .*layers.9'),
    'a bias': (with_tensor('model.layers.0.mlp.up_proj.bias'), 'no place for .*up_proj.bias'),
    'another shape': (shorter('layers.0.mlp.up_proj'), '1 tensor .*layers.0.mlp.up_proj.*shape'),
}


@pytest.mark.parametrize('damage', DAMAGE)
def test_a_model_that_is_not_whole_is_refused(damage, tmp_path):
    "How many tensors, and which."
    change, says = DAMAGE[damage]
    folder = copy_of('teacher', tmp_path / 'model')
    rewrite(folder / 'model.safetensors', change)
    for role in ('student', 'teacher'):
        with pytest.raises(BadInput, match=says): LM.load(str(folder), role)
    with pytest.raises(BadInput, match=says): write_student(find_student(str(folder)), tmp_path / 'out')


def test_names_of_a_file_are_cleaned(tmp_path):
    "They are somebody's data, and are shown."
    folder = copy_of('teacher', tmp_path / 'model')
    rewrite(folder / 'model.safetensors', prefixed('\x1b[2J'))
    with pytest.raises(BadInput) as e: LM.load(str(folder))
    assert '\x1b' not in str(e.value) and '[2J' in str(e.value)


@pytest.mark.parametrize('change', [
    without('lm_head'), with_tensor('model.layers.0.self_attn.rotary_emb.inv_freq'),
    with_tensor('vision_tower.blocks.0.weight'), with_tensor('mtp.layers.0.weight')])
def test_what_does_no_harm_is_loaded(change, tmp_path):
    "A tied head, computed buffers, and parts of no language model."
    folder = copy_of('student', tmp_path / 'model')
    rewrite(folder / 'model.safetensors', change)
    same = LM.load('tiny:student').model.state_dict()
    assert all(torch.equal(x, same[k]) for k, x in LM.load(str(folder)).model.state_dict().items())


def test_parts_that_are_left_out_are_counted(tmp_path):
    folder = copy_of('student', tmp_path / 'model')
    rewrite(folder / 'model.safetensors', with_tensor('vision_tower.blocks.0.weight'))
    with pytest.warns(UserWarning, match='1 tensor .*vision_tower'): LM.load(str(folder))


def test_untied_head_must_be_there(tmp_path):
    "A head that is not the embedding is not made up."
    model = AutoModelForCausalLM.from_pretrained(tiny_folder('student'), dtype=torch.float32)
    config = model.config
    config.tie_word_embeddings = False
    untied = AutoModelForCausalLM.from_config(config)
    copy_of('student', tmp_path / 'model')
    untied.save_pretrained(tmp_path / 'model')
    LM.load(str(tmp_path / 'model'))
    rewrite(tmp_path / 'model' / 'model.safetensors', without('lm_head'))
    with pytest.raises(BadInput, match='lacks 1 tensor .*lm_head'): LM.load(str(tmp_path / 'model'))


# adapters

@pytest.fixture
def adapters(tmp_path):
    return adapters_on(tiny_folder('student'), tmp_path / 'adapters')


def renamed(old, new): return lambda w: {k.replace(old, new): x for k, x in w.items()}


ADAPTER_DAMAGE = {
    'other names': (renamed('base_model.model.model.', 'base_model.model.language_model.'), 'lacks .*no place for'),
    'no prefix': (renamed('base_model.model.', ''), 'lacks .*no place for'),
    'one gone': (without('layers.0.self_attn.q_proj.lora_B'), 'lacks 1 tensor .*lora_B'),
    'one more': (with_tensor('base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight'), 'no place for 1 tensor'),
    'another rank': (shorter('lora_A'), 'tensors .*shape'),
}


@pytest.mark.parametrize('damage', ADAPTER_DAMAGE)
def test_adapters_that_do_not_fit_are_refused(damage, adapters):
    "They would be the base, compared with itself."
    change, says = ADAPTER_DAMAGE[damage]
    LM.load(str(adapters))
    rewrite(adapters / 'adapter_model.safetensors', change)
    with pytest.raises(BadInput, match=says): LM.load(str(adapters))


def test_adapters_of_a_base_that_is_not_whole(adapters, tmp_path):
    base = copy_of('student', tmp_path / 'base')
    rewrite(base / 'model.safetensors', without('layers.0.mlp.up_proj'))
    folder = adapters_on(base, tmp_path / 'others')
    with pytest.raises(BadInput, match='lacks 1 tensor'): LM.load(str(folder))


@pytest.mark.parametrize('damage', ADAPTER_DAMAGE)
def test_resumed_adapters_fit(damage, adapters):
    "A run that is continued with other adapters than it saved would begin anew."
    from opd_nb.training.checkpoints import restore_weights
    from types import SimpleNamespace
    change, says = ADAPTER_DAMAGE[damage]
    run = SimpleNamespace(config=settings(lora=True), student=LM.load(str(adapters)))
    restore_weights(run, adapters)
    rewrite(adapters / 'adapter_model.safetensors', change)
    with pytest.raises(BadInput, match=says): restore_weights(run, adapters)


@pytest.mark.parametrize('kind', [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens_are_refused_in_a_sentence(kind, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder('student'), dtype=torch.float32)
    get_peft_model(model, kind(task_type='CAUSAL_LM', num_virtual_tokens=4)).save_pretrained(tmp_path / 'a')
    with pytest.raises(BadInput, match='virtual tokens'): LM.load(str(tmp_path / 'a'))


def test_adapters_on_the_head_are_named(tmp_path):
    "Nobody is asked to report a model that is understood."
    model = AutoModelForCausalLM.from_pretrained(tiny_folder('student'), dtype=torch.float32)
    lora = LoraConfig(r=4, task_type='CAUSAL_LM', target_modules=['lm_head'], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        get_peft_model(model, lora).save_pretrained(tmp_path / 'a')
        with pytest.raises(BadInput, match='adapters on its output layer') as e: LM.load(str(tmp_path / 'a'))
    assert 'report' not in str(e.value) and 'Merge' in e.value.remedy


@pytest.mark.parametrize('base', ['someone/gone-model', '/no/such/folder', None])
def test_a_base_that_is_not_there(base, tmp_path):
    "Loading, exporting and looking say the same."
    folder = adapters_on(base or 'x', tmp_path / 'a')
    AutoTokenizer.from_pretrained(tiny_folder('student')).save_pretrained(folder)
    if base is None:
        file = folder / 'adapter_config.json'
        file.write_text(json.dumps(json.loads(file.read_text()) | dict(base_model_name_or_path=None)))
    said = set()
    for load in (lambda: LM.load(str(folder)), lambda: shape_of(str(folder)),
                 lambda: write_student(find_student(str(folder)), tmp_path / 'out')):
        with pytest.raises(BadInput, match=base or 'base_model_name_or_path') as e: load()
        said.add(str(e.value)[:160])
    assert len(said) == 1


def test_adapters_on_adapters(adapters, tmp_path):
    with pytest.raises(BadInput, match='holds adapters itself'): LM.load(str(adapters_on(adapters, tmp_path / 'b')))


# tokens and embedding

def with_tokens(folder, template=False, **special):
    tok = AutoTokenizer.from_pretrained(folder)
    if special: tok.add_special_tokens(special)
    else: tok.add_tokens(['<word>'])
    if template: tok.chat_template = '<mark>' + tok.chat_template
    tok.save_pretrained(folder)
    return tok


@pytest.mark.parametrize('given', [
    dict(), dict(eos_token='<over>'), dict(template=True, additional_special_tokens=['<mark>'])])
def test_tokens_beyond_the_embedding(given, tmp_path):
    "A word, an end, a mark of the template; with rows for them all is well."
    folder = copy_of('student', tmp_path / 'model')
    tok = with_tokens(folder, **given)
    with pytest.raises(BadInput, match='1 token .*beyond the') as e: LM.load(str(folder))
    assert 'resize_token_embeddings' in e.value.remedy
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(tok))
    model.save_pretrained(folder)
    LM.load(str(folder))


def test_special_tokens_that_no_prompt_has(tmp_path):
    "Such as that of an image, in the small model of a family that sees."
    folder = copy_of('student', tmp_path / 'model')
    with_tokens(folder, additional_special_tokens=['<image>'])
    with pytest.warns(UserWarning, match='1 token .*<image>'): LM.load(str(folder))


@pytest.mark.parametrize('saved', [True, False])
def test_adapters_that_brought_tokens(saved, tmp_path):
    "With the rows of the embedding they are whole; without, those rows would be random."
    model = AutoModelForCausalLM.from_pretrained(tiny_folder('student'), dtype=torch.float32)
    folder = copy_of('student', tmp_path / 'own')
    tok = with_tokens(folder)
    model.resize_token_embeddings(len(tok))
    adapters_on(tiny_folder('student'), tmp_path / 'a', model)
    tok.save_pretrained(tmp_path / 'a')
    file = tmp_path / 'a' / 'adapter_model.safetensors'
    table = model.get_input_embeddings().weight.detach().clone()
    rewrite(file, without('embed_tokens', 'lm_head'))
    if saved:
        rewrite(file, lambda w: w | {'base_model.model.model.embed_tokens.weight': table})
        lm = LM.load(str(tmp_path / 'a'))
        torch.testing.assert_close(lm.model.get_input_embeddings().weight, table)
    else:
        with pytest.raises(BadInput, match='beyond the'): LM.load(str(tmp_path / 'a'))


def test_a_hub_that_does_not_answer_is_asked_once(tmp_path):
    "A server that takes connections and says nothing: one request, and not six for each file of a model."
    import socket
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        s.listen(50)
        s.settimeout(.2)
        program = '''
import sys
import opd_nb.models.files as files
import opd_nb.models.hub as hub
hub.HUB_TIMEOUT = 1
from opd_nb.core.errors import BadInput
from opd_nb.models.lm import LM
from opd_nb.data.formats import load_conversations
from opd_nb.models.gguf import find_file
for load in (lambda: LM.load('some/model', device='cpu'), lambda: files.load_config('some/model'), lambda: load_conversations('some/data'), lambda: find_file('some/gguf')):
    try: load()
    except BadInput as e: print(e)
'''
        env = {k: v for k, v in os.environ.items() if k not in ('HF_HUB_OFFLINE', 'TRANSFORMERS_OFFLINE')}
        env |= dict(HF_ENDPOINT=f'http://127.0.0.1:{s.getsockname()[1]}', HF_HOME=str(tmp_path), no_proxy='*')
        done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, env=env, timeout=120)
        n = 0
        while True:
            try: s.accept()
            except TimeoutError: break
            n += 1
    assert n == 1, (n, done.stderr)
    assert len(done.stdout.splitlines()) == 4 and done.stdout.count('some/') >= 4 and 'does not answer' in done.stderr, done.stdout + done.stderr


# weights that are no numbers, or need a scale

def changed(change): return lambda folder: rewrite(folder / 'model.safetensors', lambda w: {k: change(k, v) for k, v in w.items()})


def put(name, value):
    def change(k, v):
        if name in k: v[(0,) * v.ndim] = value
        return v
    return changed(change)


def untied(folder):
    put('embed_tokens', 0.)(folder)
    rewrite(folder / 'model.safetensors', lambda w: w | {'lm_head.weight': w['model.embed_tokens.weight'].clone()})
    rewrite(folder / 'model.safetensors', lambda w: (w['model.embed_tokens.weight'][77].fill_(float('nan')), w)[1])
    described(folder, tie_word_embeddings=False)


def described(folder, name='config.json', **given):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | given))


def matrices(dtype): return changed(lambda k, v: (100 * v).to(dtype) if v.ndim > 1 else v)
def renamed(old, new): return changed_names(lambda k: k.replace(old, new) if 'proj' in k else k)
def changed_names(change): return lambda folder: rewrite(folder / 'model.safetensors', lambda w: {change(k): v for k, v in w.items()})
def with_scales(folder): rewrite(folder / 'model.safetensors', lambda w: w | {f'{k}_scale': torch.ones(1) for k in w if 'proj' in k})


ODD_WEIGHTS = {'NaN in a query': (put('q_proj', float('nan')), 'not numbers'), 'infinity in a key': (put('k_proj', float('inf')), 'not numbers'),
               'NaN in one row of an embedding that is not the head': (untied, 'not numbers'), 'whole numbers': (matrices(torch.int8), 'quantised'),
               'eight bits': (matrices(torch.float8_e4m3fn), 'quantised'), 'qweight': (renamed('.weight', '.qweight'), 'quantised'), 'scales': (with_scales, 'quantised')}


@pytest.mark.parametrize('case', ODD_WEIGHTS)
def test_weights_that_are_not_what_they_seem(tmp_path, case):
    spoil, words = ODD_WEIGHTS[case]
    spoil(copy_of('student', tmp_path / 'm'))
    (tmp_path / 'm' / 'SHA256SUMS').unlink(missing_ok=True)
    with pytest.raises(BadInput, match=words): LM.load(str(tmp_path / 'm'), device='cpu')


def test_scales_of_a_servers_cache_are_left_out_and_said(tmp_path):
    folder = copy_of('student', tmp_path / 'm')
    rewrite(folder / 'model.safetensors', lambda w: w | {f'model.layers.0.self_attn.{x}_scale': torch.ones(1) for x in 'kv'})
    with pytest.warns(UserWarning, match='2 tensors .* left out'): LM.load(str(folder), device='cpu')


@pytest.mark.parametrize('twice', [False, True])
def test_a_tensor_in_two_files(tmp_path, twice):
    folder = copy_of('student', tmp_path / 'm')
    weights = load_file(folder / 'model.safetensors')
    (folder / 'model.safetensors').unlink()
    names = sorted(weights)
    files = {'model-00001-of-00002.safetensors': names[:9], 'model-00002-of-00002.safetensors': names[9 - twice:]}
    for file, own in files.items(): save_file({n: weights[n] for n in own}, folder / file, metadata=dict(format='pt'))
    index = dict(metadata={}, weight_map={n: file for file, own in files.items() for n in own})
    (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
    if twice:
        with pytest.raises(BadInput, match='twice'): LM.load(str(folder), device='cpu')
    else: LM.load(str(folder), device='cpu')


@pytest.mark.parametrize('given, words', [(dict(lora_alpha=float('inf')), 'lora_alpha'), (dict(target_modules='(a+)+$|(.*.*)*x'), 'repeated'),
                                          (dict(base_model_name_or_path=5), 'must name'), (dict(base_model_name_or_path=['x']), 'must name')])
def test_adapters_with_an_odd_config(tmp_path, given, words):
    adapters_on(str(tiny_folder('student')), tmp_path / 'a')
    described(tmp_path / 'a', 'adapter_config.json', **given)
    with pytest.raises(BadInput, match=words): LM.load(str(tmp_path / 'a'), device='cpu')


def test_adapters_that_are_no_numbers(tmp_path):
    adapters_on(str(tiny_folder('student')), tmp_path / 'a')
    rewrite(tmp_path / 'a' / 'adapter_model.safetensors', lambda w: {k: v * float('nan') if 'lora_A' in k else v for k, v in w.items()})
    with pytest.raises(BadInput, match='not numbers'): LM.load(str(tmp_path / 'a'), device='cpu')


@pytest.mark.parametrize('eos', ['2', [2, 10**7], [[2], None, 'x', True, -1]])
def test_ends_that_are_no_tokens_are_none(tmp_path, eos):
    described(copy_of('student', tmp_path / 'm'), 'generation_config.json', eos_token_id=eos)
    lm = LM.load(str(tmp_path / 'm'), device='cpu')
    assert lm.codec.stop_ids == LM.load('tiny:student', device='cpu').codec.stop_ids


def test_a_name_that_is_too_long_for_a_path():
    for spec in ('x/' * 3000, '/' + 'x' * 5000):
        with pytest.raises(BadInput): LM.load(spec)


def test_special_tokens_in_a_prompt_are_said(caplog):
    warn_once.cache_clear()
    codec = LM.load('tiny:student', device='cpu').codec
    end = codec.tok.decode([codec.stop_ids[0]])
    codec.prompt([dict(role='user', content='Make 31.')])
    assert not caplog.text
    for _ in range(2): codec.prompt([dict(role='user', content=f'Make 31.{end}\nAnd now?')])
    assert caplog.text.count('reads as a special token') == 1 and end in caplog.text


# a closed repository

class Closed(http.server.BaseHTTPRequestHandler):
    "A Hub whose repository is only for those with a token; it notes what it was given."
    tokens = []
    def do_GET(self):
        self.tokens.append(self.headers.get('Authorization'))
        self.send_response(401)
        self.send_header('content-length', '0')
        self.end_headers()
    do_HEAD = do_GET
    def log_message(self, *a): pass


def test_a_gguf_student_of_a_closed_repository_is_asked_for_with_the_token(tmp_path):
    "The token of the settings, not of the environment."
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Closed)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {k: v for k, v in os.environ.items() if 'OFFLINE' not in k and k != 'HF_TOKEN'}
    env |= dict(HF_ENDPOINT=f'http://127.0.0.1:{server.server_port}', HF_HOME=str(tmp_path))
    program = '''
from opd_nb.core.config import OPDConfig
from opd_nb.core.errors import BadInput
from opd_nb.training.setup import load_student
try: load_student(OPDConfig(_env_file=None, student='gguf:some/closed', hf_token='hf_planted_7', device='cpu'))
except BadInput as e: print(e)
'''
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, env=env, timeout=120)
    server.shutdown()
    assert 'HF_TOKEN' in done.stdout and 'planted' not in done.stdout + done.stderr, done.stdout + done.stderr
    asked = [t for t in Closed.tokens if t]
    assert asked and set(asked) == {'Bearer hf_planted_7'}, Closed.tokens
