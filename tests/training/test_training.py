"Runs that are cut off, cases that need files, and students that must load elsewhere."
import json
import shutil, subprocess, sys

import pytest
import torch

from conftest import ROOT, real, slow
from opd_nb.core.errors import BadInput
from opd_nb.core.types import Conversation
from opd_nb.core.config import OPDConfig
from opd_nb.models.lm import tiny_folder
from opd_nb.data.formats import save_conversations
from opd_nb.monitor.run_log import read_log
from opd_nb.training.checkpoints import newest_checkpoint
from opd_nb.losses.registry import LOSSES
from opd_nb.training.loop import train, train_step
from opd_nb.training.setup import prepare
from opd_nb.lab import countdown


OPD = [sys.executable, '-c', 'import sys; from opd_nb.cli.app import main; sys.exit(main())']


def flags(settings): return [f"--{k.replace('_', '-')}" + ('' if v is True else f'={v}') for k, v in settings.items()]


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
        def __init__(self, t): self.t, self.left, self.codec, self.capabilities = t, 7, t.codec, t.capabilities  # one is the first validation
        def score(self, *a):
            self.left -= 1
            if not self.left: raise Stop
            return self.t.score(*a)
    from opd_nb.teachers.base import load_teacher
    with pytest.raises(Stop): train(part, Leaves(load_teacher('tiny:', part)), progress=False)
    assert newest_checkpoint(tmp_path / 'part').name == 'step-4'
    again = train(part.model_copy(update=dict(resume=True)), progress=False)
    a, b = weights(whole.student), weights(again.student)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert figures(whole.folder) == figures(again.folder)


@pytest.mark.parametrize('loss', sorted({*LOSSES.load_all()} - {'sft', 'continuation'}))  # those are for text alone
def test_every_loss_trains(prompts, tmp_path, loss):
    "Eight steps on the same reference texts. What `pg` and `trust` compute is no distance; there the student must move."
    both = dict(student='tiny:teacher') if loss == 'gkd' else {}
    run = prepare(config(prompts, tmp_path, method='kd', loss=loss, batch=16, num_samples=16, val_fraction=0, max_steps=8, **both))
    torch.manual_seed(0)
    if both:
        for p in run.student.model.parameters(): p.data += .1 * p.data.std() * torch.randn_like(p)
    before = [p.detach().clone() for p in run.weights]
    losses = [train_step(run)['loss'] for _ in range(8)]
    assert losses[-1] < losses[0] or loss in ('pg', 'trust')
    assert all(torch.isfinite(p).all() for p in run.weights) and any(not torch.equal(p, q) for p, q in zip(before, run.weights))


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


@slow
def test_command_function_and_notebook_agree(prompts, tmp_path):
    c = config(prompts, tmp_path / 'function', max_steps=2)
    train(c, progress=False)
    given = c.model_dump(mode='json', exclude_defaults=True)
    parameters = [w for k, v in (given | dict(output_dir=tmp_path / 'notebook')).items() for w in ('-p', k, str(v))]
    notebook = [sys.executable, '-m', 'papermill', str(ROOT / 'nbs' / 'runs' / 'distill.ipynb'), str(tmp_path / 'out.ipynb'), *parameters]
    repeat = [*OPD, 'train', '--config', str(tmp_path / 'command' / 'config.yaml'), '--output-dir', str(tmp_path / 'repeat')]
    for name, command in (('command', [*OPD, 'train', *flags(given | dict(output_dir=tmp_path / 'command'))]), ('notebook', notebook), ('repeat', repeat)):
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert figures(tmp_path / name) == figures(tmp_path / 'function'), name
    assert json.loads((tmp_path / 'notebook' / 'metrics.json').read_text())['last']['step'] == 2


def test_several_teachers_and_their_records(prompts, tmp_path):
    "Two teachers of unequal weight; who teaches a record can be said in it."
    shutil.copytree(tiny_folder('teacher'), tmp_path / 'other')
    spec = f"tiny:teacher@3,hf:{tmp_path / 'other'}"
    one = train(config(prompts, tmp_path / 'one', max_steps=2), progress=False)
    two = train(config(prompts, tmp_path / 'two', max_steps=2, teacher=spec), progress=False)  # the same weights under two names
    for a, b in zip(figures(one.folder), figures(two.folder)): assert abs(a['loss'] - b['loss']) < 1e-4 and a['trained'] == b['trained']
    rows = [dict(messages=list(c.messages), metadata=c.metadata | dict(teacher='somebody')) for c in countdown.draw(20)]
    (tmp_path / 'routed.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    with pytest.raises(BadInput, match='somebody'): train(config(str(tmp_path / 'routed.jsonl'), tmp_path / 'three', max_steps=1, teacher=spec), progress=False)


def stories(folder):
    "Both real models with the stop that they use, and openings of stories."
    for name in ('bitllama3M', 'babyllama105'):
        shutil.copytree(real('models', name), folder / name)
        for file, change in (('tokenizer_config.json', dict(eos_token='<s>')), ('generation_config.json', dict(eos_token_id=[1, 2]))):
            (folder / name / file).write_text(json.dumps(json.loads((folder / name / file).read_text()) | change))
    openings = [f'Once upon a time, there was a little child named {n}. {n} loved {x}. One day,' for n in ('Lily', 'Tom', 'Mia', 'Ben', 'Sue', 'Max') for x in ('to sing', 'big trucks', 'the little dog', 'to climb trees')]
    return str(save_conversations([Conversation(({'role': 'user', 'content': o},)) for o in openings], folder / 'openings.jsonl'))


@pytest.mark.parametrize('steps', [4, pytest.param(200, marks=slow)])
@pytest.mark.parametrize('kw', [pytest.param(dict(learning_rate=3e-5), id='all weights'), pytest.param(dict(lora=True, learning_rate=5e-4, lora_target='q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj'), id='lora', marks=slow)])
def test_two_real_models(tmp_path, kw, steps):
    "Models that others trained, by the command. The student loads with plain libraries and writes; in two hundred steps the validation loss falls (four are too few to tell)."
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer
    settings = dict(student=tmp_path / 'babyllama105', teacher=f"hf:{tmp_path / 'bitllama3M'}", data=stories(tmp_path), output_dir=tmp_path / 'run', loss='bpm', max_steps=steps, batch=4, max_new_tokens=24, temperature=.7,
                    val_fraction=.3, eval_every=steps // 2, warmup_steps=1, device='cpu', teacher_dtype='float32', monitor='val_loss', monitor_mode='min', **kw)
    done = subprocess.run([*OPD, 'train', *flags(settings)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    tests = [e for e in read_log(tmp_path / 'run') if e['event'] == 'validation']
    assert [e['step'] for e in tests] == [0, steps // 2, steps] and all(0 < e['loss'] < .6 for e in tests)
    if steps == 200: assert tests[2]['loss'] < tests[1]['loss'], tests
    student = (AutoPeftModelForCausalLM if kw.get('lora') else AutoModelForCausalLM).from_pretrained(tmp_path / 'run' / 'final')
    tok = AutoTokenizer.from_pretrained(tmp_path / 'run' / 'final')
    ids = tok('Once upon a time', return_tensors='pt').input_ids
    assert student.generate(input_ids=ids, max_new_tokens=12, do_sample=False).shape[1] > ids.shape[1]


def test_configuration_files_of_accelerate():
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils import DistributedType
    found = {p.stem: load_config_from_file(str(p)) for p in (ROOT / 'opd_nb' / 'accelerate').glob('*.yaml')}
    assert {k: (v.distributed_type, v.num_machines, v.mixed_precision) for k, v in found.items()} == {
        'processes': (DistributedType.MULTI_GPU, 1, 'bf16'), 'fsdp': (DistributedType.FSDP, 1, 'bf16'), 'fsdp-nodes': (DistributedType.FSDP, 2, 'bf16')}
    assert all(v.fsdp_config['fsdp_version'] == 2 for k, v in found.items() if 'fsdp' in k)


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


def test_memory_that_never_suffices_leaves_a_run_that_goes_on(prompts, tmp_path, monkeypatch):
    "The machine has too little memory for a single answer, from the third step on; on a larger one the run goes on."
    import opd_nb.training.loop as training
    from opd_nb.core.errors import BadInput
    kw, real, left = dict(max_steps=4, val_fraction=0), training.forward_backward, [2]
    def short(run):
        if not left[0]: raise MemoryError('no room')
        left[0] -= 1
        return real(run)
    monkeypatch.setattr(training, 'forward_backward', short)
    with pytest.raises(BadInput, match='--resume'): train(config(prompts, tmp_path / 'run', **kw), progress=False)
    monkeypatch.setattr(training, 'forward_backward', real)
    assert train(config(prompts, tmp_path / 'run', resume=True, **kw), progress=False).steps == 4


def test_what_the_settings_say_when_a_run_is_resumed(prompts, tmp_path):
    "Rates, micro-batch and length may change on the way; what the weights are of may not."
    from opd_nb.core.errors import BadInput
    first = train(config(prompts, tmp_path / 'run', max_steps=3, warmup_steps=0, schedule='constant', val_fraction=0), progress=False)
    more = train(config(prompts, tmp_path / 'run', max_steps=5, warmup_steps=0, schedule='constant', val_fraction=0, learning_rate=1e-6, micro_batch=1, resume=True), progress=False)
    rates = [e['lr'] for e in more.events if e['event'] == 'step']
    assert rates[:3] == [e['lr'] for e in first.events if e['event'] == 'step'] and rates[3:] == [1e-6, 1e-6]
    fewer = train(config(prompts, tmp_path / 'run', max_steps=2, val_fraction=0, resume=True), progress=False)
    assert fewer.steps == 5  # more than were asked for are there: nothing is to be done
    with pytest.raises(BadInput, match='as in the run that is resumed'): train(config(prompts, tmp_path / 'run', student='tiny:student-bpe', max_steps=9, resume=True), progress=False)


@pytest.mark.parametrize('method', ['opd', 'grpo'])
def test_all_held_out_prompts_are_validated(prompts, tmp_path, method):
    "However many answers a step has to each prompt."
    from opd_nb.training.setup import prepare
    from opd_nb.training.loop import validate
    run = prepare(config(prompts, tmp_path / 'run', method=method, num_generations=8, batch=1, val_fraction=.2))
    n = len(run.val)
    assert n % 8 and validate(run)['trained'] and len(run.last_rollouts) == n


def test_the_base_of_another_student_is_not_taken(prompts, tmp_path):
    "A folder in which somebody tried an adapter of another student before."
    from peft import LoraConfig, get_peft_model
    from opd_nb.models.lm import LM
    from opd_nb.training.setup import load_student
    def adapter(name):
        lm = LM.load(f'tiny:{name}', device='cpu')
        get_peft_model(lm.model, LoraConfig(r=2, target_modules=['q_proj'])).save_pretrained(tmp_path / name); lm.codec.tok.save_pretrained(tmp_path / name)
        return str(tmp_path / name)
    vocabulary = lambda name: load_student(config(prompts, tmp_path / 'run', student=adapter(name), lora=True)).model.config.vocab_size
    assert vocabulary('student') == 480 and vocabulary('student-bpe') == 277


def test_bad_rows_are_skipped_when_asked(tmp_path):
    "--on-error skip, as the refusal of a bad row says."
    data = tmp_path / 'p.jsonl'
    good = [json.dumps(dict(prompt=f'Make {i} from 3 7 10.')) for i in range(20, 28)]
    data.write_text('\n'.join([*good, '{"prompt": 7, "respons']) + '\n')
    with pytest.raises(BadInput, match='--on-error skip'): prepare_data(tmp_path, data)
    assert len(prepare_data(tmp_path, data, on_error='skip').train) == 8


def prepare_data(tmp_path, data, **settings):
    from opd_nb.training.setup import prepare
    return prepare(OPDConfig(_env_file=None, student='tiny:student', teacher='tiny:teacher', data=str(data), val_fraction=0, output_dir=tmp_path / 'run', device='cpu', **settings))
