"`OPDTrainer`: the loss and the gradient are ours on TRL's rollouts, TRL's own for equal vocabularies, and what TRL does around them works."
import copy, os, subprocess, sys, warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import ROOT, slow

trl = pytest.importorskip('trl', reason='TRL is needed: pip install "opd_nb[trl]"')
warnings.filterwarnings('ignore', message='.*gradient_checkpointing.*')
from datasets import Dataset  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from opd_nb.core.errors import BadInput, TeacherGone  # noqa: E402
from opd_nb.core.types import Signal, TextSignal, TopKSignal  # noqa: E402
from opd_nb.lab import countdown  # noqa: E402
from opd_nb.losses.registry import LOSSES, losses_served  # noqa: E402
from opd_nb.models.lm import LM, tiny_folder  # noqa: E402
from opd_nb.teachers.base import Unscored, load_teacher  # noqa: E402
from opd_nb.teachers.hf import HFTeacher  # noqa: E402
from opd_nb.training.batch import distillation_loss, read_and_align, reads_own_ids, score  # noqa: E402
from opd_nb.trl import OPDTrainer, OPDTrainingConfig  # noqa: E402

PROMPTS = Dataset.from_list([dict(prompt=c.prompt) for c in countdown.draw(48)])


def config(folder='unused', kind=OPDTrainingConfig, **settings):
    plain = dict(use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], save_strategy='no', disable_tqdm=True, max_steps=2, logging_steps=1,
                 max_completion_length=12, per_device_train_batch_size=6, learning_rate=1e-3, lr_scheduler_type='constant', seed=0)
    return kind(str(folder), **plain | settings)


@pytest.fixture(scope='module')
def start():
    "A student that spells as no tokenizer would: the embedded one with disturbed weights."
    model = LM.load('tiny:student', dtype='float32', device='cpu').model
    torch.manual_seed(0)
    for p in model.parameters(): p.data += .15 * p.data.std() * torch.randn_like(p)
    return model


@pytest.fixture(scope='module')
def tiny(): return load_teacher('tiny:')


@pytest.fixture(scope='module')
def same(): return HFTeacher(LM.load('tiny:student', dtype='float32', device='cpu'))


def trainer_for(start, teacher, folder='unused', data=PROMPTS, callbacks=None, peft_config=None, **settings):
    from transformers import AutoTokenizer
    tok = AutoTokenizer.from_pretrained(tiny_folder('student'), padding_side='left')
    return OPDTrainer(copy.deepcopy(start), teacher, config(folder, **settings), train_dataset=data, processing_class=tok, callbacks=callbacks, peft_config=peft_config)


def batch_of(trainer, n=6, seed=0):
    "A generation batch, as in training."
    torch.manual_seed(seed)
    trainer.model.train()
    return trainer._generate_and_score_completions([dict(prompt=p) for p in PROMPTS['prompt'][:n]])


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def ours(trainer, rows):
    "The batch functions of `opd train`, on the same rollouts: the loss summed over units, and their weight."
    pair, = trainer.pairs
    own = reads_own_ids(pair.teacher, trainer.lm.codec, pair.vocab)
    scored = score(pair.teacher, [r.rollout for r in rows if r.rollout.ids], own)
    batch = read_and_align(trainer.lm, scored.rollouts, scored.signals, pair.vocab)
    out, _ = distillation_loss(batch, pair.loss, trainer.args.score_weight, trainer.args.min_teacher_logp)
    return out


def close(a, b, atol=1e-5):
    assert a.keys() == b.keys() and any(x.abs().max() > 1e-4 for x in a.values())
    for name in a: torch.testing.assert_close(a[name], b[name], atol=atol, rtol=1e-4)


@pytest.mark.parametrize('same_vocab, name', [(False, x) for x in losses_served({'full', 'topk', 'logprob'}) if not LOSSES[x].same_vocab and x != 'sft'] + [(True, 'gkd'), (True, 'cover')])
def test_loss_and_gradient_are_ours(start, tiny, same, same_vocab, name):
    trainer = trainer_for(start, same if same_vocab else tiny, loss=name)
    batch = batch_of(trainer)
    loss = trainer.compute_loss(trainer.model, batch)
    found = gradients(trainer.model, loss)
    out = ours(trainer, batch['opd_rows'])
    tokens = int(batch['completion_mask'].sum())
    wanted = out.total / tokens
    torch.testing.assert_close(loss, wanted, atol=1e-5, rtol=1e-5)
    close(found, gradients(trainer.model, wanted))
    assert out.weight > 0 and trainer._seen['train']


@pytest.mark.parametrize('beta', [0., .5, 1.])
def test_gkd_is_trls_own_loss(start, same, beta):
    "Real trainers both, on the same sampled rollouts; TRL pads prompts on the left, we on the right."
    trainer = trainer_for(start, same, beta=beta)
    assert trainer.pairs[0].loss.name == 'gkd'
    batch = batch_of(trainer)
    theirs = trl.DistillationTrainer(copy.deepcopy(start), same.lm.model, config(kind=trl.DistillationConfig, beta=beta), train_dataset=PROMPTS, processing_class=trainer.processing_class)
    theirs.model.train()
    rest = {k: v for k, v in batch.items() if k != 'opd_rows'}
    wanted, loss = theirs.compute_loss(theirs.model, rest), trainer.compute_loss(trainer.model, batch)
    torch.testing.assert_close(loss, wanted, atol=1e-6, rtol=1e-5)
    close(gradients(trainer.model, loss), gradients(theirs.model, wanted))
    assert trainer._metrics['train']['entropy'] == pytest.approx(theirs._metrics['train']['entropy'], abs=1e-4)


def weights_after(trainer, **kw):
    trainer.train(**kw)
    return torch.cat([p.detach().reshape(-1) for p in trainer.model.parameters() if p.requires_grad]).clone()


@pytest.mark.parametrize('normalize', ['tokens', pytest.param('units', marks=slow)])
def test_accumulation_changes_nothing(start, tiny, normalize):
    "8 × 1 and 2 × 4: the same rollouts, so the same step; SGD, whose step is the gradient."
    step = dict(normalize=normalize, max_steps=1, optim='sgd', learning_rate=.1, max_grad_norm=0., loss='strict')
    def one(size, times):
        trainer = trainer_for(start, tiny, per_device_train_batch_size=size, gradient_accumulation_steps=times, **step)
        return weights_after(trainer), trainer.state.log_history[0]
    (a, log_a), (b, log_b) = one(1, 8), one(4, 2)
    before = torch.cat([p.detach().reshape(-1) for p in start.parameters()])
    assert (a - before).abs().max() > 1e-3
    torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)
    assert log_a['loss'] == pytest.approx(log_b['loss'], abs=1e-4)
    wanted = log_a['opd/unit_loss'] * (log_a['opd/units_per_token'] if normalize == 'tokens' else 1)
    assert log_a['opd/units_per_token'] < .95 and log_a['loss'] == pytest.approx(wanted, abs=1e-3)


def test_units_give_the_gradient_of_opd_train(start, tiny):
    step = dict(normalize='units', max_steps=1, optim='sgd', learning_rate=.1, max_grad_norm=0., loss='strict')
    trainer = trainer_for(start, tiny, per_device_train_batch_size=2, gradient_accumulation_steps=3, **step)
    rows, keep = [], trainer._generate_and_score_completions
    def generate(inputs):
        batch = keep(inputs)
        rows.extend(batch['opd_rows'])
        return batch
    trainer._generate_and_score_completions = generate
    moved = weights_after(trainer)
    fresh = trainer_for(start, tiny, **step)
    out = ours(fresh, rows)
    gradient = gradients(fresh.model, out.total / out.weight)
    wanted = torch.cat([(p.detach() - .1 * gradient[name]).reshape(-1) for name, p in fresh.model.named_parameters()])
    torch.testing.assert_close(moved, wanted, atol=2e-6, rtol=1e-5)


def test_an_evaluation_between_two_steps_changes_nothing(start, tiny):
    "Not the sums by which a step is divided, nor what the log says of it."
    step = dict(normalize='units', optim='sgd', learning_rate=.1, loss='strict')
    plain, evaluated = trainer_for(start, tiny, **step), trainer_for(start, tiny, **step)
    class Evaluates(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kw):
            if 'loss' not in logs: return
            with torch.random.fork_rng(): evaluated.evaluate(PROMPTS.select(range(6)))
            evaluated.model.train()
    evaluated.add_callback(Evaluates())
    moved = []
    for trainer in (plain, evaluated):
        torch.manual_seed(0)
        moved.append(weights_after(trainer))
    torch.testing.assert_close(*moved, atol=0, rtol=0)
    a, b = ([e for e in t.state.log_history if 'loss' in e] for t in (plain, evaluated))
    assert len(a) == 2 and [e['opd/teacher_nll'] for e in a] == [e['opd/teacher_nll'] for e in b]
    assert sum('eval_opd/teacher_nll' in e for e in evaluated.state.log_history) == 2


def test_adapters_and_gradient_checkpointing(start, tiny):
    "Only adapters move, and activations computed again change nothing."
    from peft import LoraConfig
    lora = dict(peft_config=LoraConfig(r=4, target_modules=['q_proj', 'v_proj'], lora_dropout=0.))
    a = trainer_for(start, tiny, **lora)
    moved = weights_after(a)
    assert all('lora' in name for name, p in a.model.named_parameters() if p.requires_grad) and moved.abs().sum() > 0
    assert any(p.abs().sum() > 0 for name, p in a.model.named_parameters() if 'lora_B' in name)
    torch.testing.assert_close(weights_after(trainer_for(start, tiny, gradient_checkpointing=True, **lora)), moved, atol=1e-6, rtol=1e-5)


class Noted(TrainerCallback):
    def __init__(self): self.events = []
    def on_step_end(self, args, state, control, **kw): self.events.append('step')
    def on_save(self, args, state, control, **kw): self.events.append('save')
    def on_log(self, args, state, control, logs=None, **kw): self.events.append(logs)
    def on_evaluate(self, args, state, control, metrics=None, **kw): self.events.append(metrics)


def test_resume_callbacks_trackers_evaluation(start, tiny, tmp_path):
    "Four steps at once, and two and two: the same weights. What was logged is in TensorBoard's files."
    tb = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator', reason='pip install tensorboard')
    noted = Noted()
    run = dict(max_steps=4, save_strategy='steps', save_steps=2, report_to=['tensorboard'], eval_strategy='steps', eval_steps=4)
    os.environ['TENSORBOARD_LOGGING_DIR'] = str(tmp_path / 'tb')
    try: trainer = trainer_for(start, tiny, tmp_path / 'a', callbacks=[noted], **run | dict(eval_strategy='no'))
    finally: del os.environ['TENSORBOARD_LOGGING_DIR']
    whole = weights_after(trainer)
    assert noted.events.count('step') == 4 and noted.events.count('save') == 2
    logged = [e for e in noted.events if isinstance(e, dict)]
    assert {'loss', 'entropy', 'opd/teacher_nll', 'opd/scored', 'opd/overlap'} <= set(logged[0])
    found = tb.EventAccumulator(str(next((tmp_path / 'tb').rglob('events.*')).parent))
    found.Reload()
    assert len(found.Scalars('train/opd/teacher_nll')) == 4
    metrics = trainer.evaluate(PROMPTS.select(range(6)))
    assert metrics['eval_loss'] > 0 and metrics['eval_opd/teacher_nll'] > 0
    resumed = trainer_for(start, tiny, tmp_path / 'a', **run | dict(report_to=[], eval_strategy='no'))
    torch.testing.assert_close(weights_after(resumed, resume_from_checkpoint=str(tmp_path / 'a' / 'checkpoint-2')), whole, atol=0, rtol=0)


class As:
    "The embedded teacher as an endpoint shows it, and how often it was asked."
    hosted = True
    def __init__(self, tiny, how, refuse=lambda i: False, gone_at=None):
        self.inner, self.codec, self.how, self.refuse, self.gone_at, self.asked = tiny, tiny.codec, how, refuse, gone_at, []
        access = dict(lists={'topk', 'logprob'}, numbers={'logprob'}, text={'text'}, scores={'score'}, whole={'full', 'topk', 'logprob'})[how]
        self.capabilities = replace(tiny.capabilities, access=frozenset(access), k=8)

    def generate(self, conversations, max_new_tokens=128): return self.inner.generate(conversations, max_new_tokens)

    def score(self, conversations, completions, on_error='raise'):
        self.asked.append(len(completions))
        if len(self.asked) == self.gone_at: raise TeacherGone('the teacher', 'does not answer', 'Wait.')
        return [Unscored('record', data, 'is refused', 'Leave it out.', 'refused') if self.refuse(i) else self.one(c, (data, stopped))
                for i, (c, (data, stopped)) in enumerate(zip(conversations, completions))]

    def one(self, c, completion):
        s, = self.inner.score([c], [completion])
        if self.how == 'whole': return s
        if self.how == 'text': return TextSignal((), (), torch.zeros(0), 3, completion[0][:3] + b'=1', True)
        if self.how == 'numbers': return Signal(s.ids, s.ends, s.logprobs)
        top = s.head(s.hidden).log_softmax(-1).topk(8)
        return TopKSignal(s.ids, s.ends, s.logprobs, top.indices, top.values)


@pytest.mark.parametrize('how, loss', [('lists', 'cover'), ('numbers', 'pg'), ('text', 'continuation')])
def test_an_endpoint_is_asked_once_a_generation_batch(start, tiny, how, loss):
    teacher = As(tiny, how)
    trainer = trainer_for(start, teacher, per_device_train_batch_size=3, gradient_accumulation_steps=2, max_steps=1)
    trainer.train()
    assert trainer.pairs[0].loss.name == loss and teacher.asked == [6] and trainer.state.log_history[0]['grad_norm'] > 0


def test_whole_distributions_are_asked_for_a_micro_batch_at_a_time(start, tiny):
    teacher = As(tiny, 'whole')
    trainer_for(start, teacher, per_device_train_batch_size=3, gradient_accumulation_steps=2, max_steps=1).train()
    assert teacher.asked == [3, 3]


def test_what_is_refused_is_counted_and_a_batch_without_anything_has_a_graph(start, tiny):
    for n, how in ((2, 'lists'), (0, 'lists'), (0, 'whole')):
        trainer = trainer_for(start, As(tiny, how, refuse=lambda i: i >= n))
        batch = batch_of(trainer)
        loss = trainer.compute_loss(trainer.model, batch)
        found = gradients(trainer.model, loss)
        assert set(found) == {name for name, _ in trainer.model.named_parameters()}
        assert (loss.item() > 0) == (n > 0) == any(g.abs().max() > 0 for g in found.values())
        assert (1, dict(scored=n, left_out=6 - n, left_out_refused=6 - n)) in trainer._seen['train']
        if n: torch.testing.assert_close(loss, ours(trainer, batch['opd_rows']).total / int(batch['completion_mask'].sum()), atol=1e-5, rtol=1e-5)


def test_a_teacher_that_is_gone_leaves_a_checkpoint(start, tiny, tmp_path):
    with pytest.raises(TeacherGone, match=r'step 1; go on with trainer.train\(resume_from_checkpoint=True\)'):
        trainer_for(start, As(tiny, 'lists', gone_at=2), tmp_path).train()
    assert (tmp_path / 'checkpoint-1' / 'optimizer.pt').exists()
    trainer = trainer_for(start, As(tiny, 'lists'), tmp_path)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2


def test_several_teachers_each_with_its_loss(start, tiny, same):
    from opd_nb.teachers.mixture import Mixture
    trainer = trainer_for(start, Mixture([same, As(tiny, 'lists')], [1, 1], ['a', 'b']))
    assert [p.loss.name for p in trainer.pairs] == ['gkd', 'cover']
    batch = batch_of(trainer)
    loss = trainer.compute_loss(trainer.model, batch)
    parts = [trainer_for(start, t) for t in (same, As(tiny, 'lists'))]
    groups = [[r for r in batch['opd_rows'] if r.pair is p] for p in trainer.pairs]
    assert all(groups)
    wanted = sum(ours(part, rows).total for part, rows in zip(parts, groups)) / int(batch['completion_mask'].sum())
    torch.testing.assert_close(loss, wanted, atol=1e-5, rtol=1e-5)


def test_the_student_as_its_own_teacher(start, tmp_path):
    "Told more it is a teacher; an average follows, and a checkpoint keeps it."
    told = dict(teacher_settings=dict(teacher_system='Be brief.'), save_strategy='steps', save_steps=1)
    trainer = trainer_for(start, 'self:ema@0.5', tmp_path, **told)
    before = [x.clone() for x in trainer.teacher.inner.average]
    trainer.train()
    assert any((a - b).abs().max() > 0 for a, b in zip(before, trainer.teacher.inner.average))
    resumed = trainer_for(start, 'self:ema@0.5', tmp_path, **told)
    resumed.train(resume_from_checkpoint=str(tmp_path / 'checkpoint-1'))
    for a, b in zip(trainer.teacher.inner.average, resumed.teacher.inner.average): torch.testing.assert_close(a, b, atol=0, rtol=0)
    with pytest.raises(BadInput, match='adapters'): trainer_for(start, 'self:adapter-off')


def test_only_the_teacher_is_told(start, tiny):
    "The reference of a row goes to the teacher, and into no prompt of the student."
    rows = [dict(prompt=c.prompt, completion=[dict(role='assistant', content=c.reference)]) for c in countdown.draw(6, answers=True)]
    seen = []
    class Listening(As):
        def score(self, conversations, completions, on_error='raise'):
            seen.extend(conversations)
            return super().score(conversations, completions, on_error)
    trainer = trainer_for(start, Listening(tiny, 'lists'), teacher_settings=dict(teacher_sees='reference'), max_steps=1, data=Dataset.from_list(rows))
    trainer.model.train()
    batch = trainer._generate_and_score_completions(rows)
    for row, c, ids in zip(rows, seen, batch['prompt_ids']):
        answer = row['completion'][0]['content']
        assert answer in c.prompt[-1]['content'] and answer not in trainer._tokenizer.decode(ids)


@pytest.mark.parametrize('positions', ['first:0.3', 'entropy:0.5', 'teacher_entropy:0.5'])
def test_positions_are_chosen_in_training_alone(start, tiny, positions):
    trainer = trainer_for(start, tiny, positions=positions)
    batch = batch_of(trainer)
    trainer.compute_loss(trainer.model, batch)
    trainer.model.eval()
    torch.manual_seed(0)
    with torch.no_grad(): trainer.compute_loss(trainer.model, trainer._generate_and_score_completions([dict(prompt=p) for p in PROMPTS['prompt'][:6]]))
    share = {mode: next(m['units_per_token'] for _, m in seen if 'units_per_token' in m) for mode, seen in trainer._seen.items()}
    assert 0 < share['train'] < .7 * share['eval']


def test_a_machine_without_a_gpu_needs_no_settings():
    if torch.accelerator.is_available(): pytest.skip('there is a GPU')
    with pytest.raises(ValueError, match='bf16'): trl.DistillationConfig('unused')
    assert OPDTrainingConfig('unused').bf16 is False


def test_a_warmer_sampling_is_possible(start, tiny):
    "The remedy of the refusal works: the sampling has the temperature, the loss has none."
    trainer = trainer_for(start, tiny, generation_kwargs=dict(temperature=.5))
    assert trainer.generation_config.temperature == .5 and trainer.temperature == 1


@pytest.mark.parametrize('settings, says', [(dict(temperature=.7), 'generation_kwargs={"temperature": 0.7}'), (dict(score_weight='trajectory'), 'one of each'),
                                            (dict(loss='gkd'), 'different'), (dict(loss='cover', loss_options=dict(bta=1)), 'bta'), (dict(loss='pg', beta=.5), 'beta'), (dict(positions='lst:1'), 'positions')])
def test_settings_are_refused(start, tiny, settings, says):
    with pytest.raises(BadInput, match=None) as e: trainer_for(start, tiny, **settings)
    assert says in str(e.value)


def test_teachers_tools_and_images_are_refused(start, tiny):
    for teacher, says in ((None, 'must be named'), ('scored:a.safetensors', 'written anew'), (As(tiny, 'scores'), 'one of each'), ('tinny:', 'tiny:')):
        with pytest.raises(BadInput, match=says): trainer_for(start, teacher)
    with pytest.raises(BadInput, match='tools'): OPDTrainer(start, tiny, config(), train_dataset=PROMPTS, tools=[print])
    trainer = trainer_for(start, tiny)
    image = [dict(role='user', content=[dict(type='image'), dict(type='text', text='Look')])]
    for row in (dict(prompt='Look', image=1), dict(prompt=image)):
        with pytest.raises(BadInput, match='not understood'): trainer._generate_and_score_completions([row])


def test_the_seam(start, tiny):
    "What `OPDTrainer` takes from TRL is there as it was. If this fails, TRL has changed: the message says where."
    from opd_nb.engines.trl_trainer import PARTS, SEAM, seam_changes
    assert seam_changes() == []
    overridden = {name for name in vars(OPDTrainer) if name in vars(trl.DistillationTrainer) and callable(getattr(OPDTrainer, name))}
    assert overridden | {'_get_last_hidden_state', '_load_from_checkpoint'} == set(SEAM)
    trainer = trainer_for(start, tiny)
    batch = trl.DistillationTrainer._generate_and_score_completions(trainer, [dict(prompt=PROMPTS['prompt'][0])])
    assert set(PARTS) == set(batch)
    fields = set(trl.DistillationConfig.__dataclass_fields__)
    assert {'beta', 'temperature', 'teacher_model_name_or_path', 'generation_kwargs', 'max_completion_length'} <= fields
    ours_alone = {'teacher', 'loss', 'loss_options', 'score_weight', 'min_teacher_logp', 'positions', 'teacher_settings', 'normalize'}
    assert not ours_alone & fields, 'TRL has a setting of that name now'
    assert all(hasattr(trainer, name) for name in ('_tokenizer', 'eos_token_ids', '_is_vlm', '_step', '_buffered_inputs'))


def test_a_head_in_parts_is_gathered_and_has_a_gradient():
    "As FSDP keeps it; one process has the only part."
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
    from opd_nb.core.types import Head
    from opd_nb.engines.trl_trainer import whole_head
    from opd_nb.models.outputs import Side
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    try:
        weight = torch.nn.Parameter(distribute_tensor(torch.arange(15.).reshape(5, 3), init_device_mesh('cpu', (1,)), [Shard(0)]))
        side = whole_head(Side(torch.ones(2, 3), torch.tensor([1, 0]), Head(weight)))
        assert type(side.head.weight) is torch.Tensor
        side.logits(slice(None)).sum().backward()
        assert (weight.grad.full_tensor() == 2).all()
    finally: dist.destroy_process_group()


def test_the_shortcut_is_the_module():
    "By the name of another library; nothing is said, since the name is to stay."
    import opd_nb
    from opd_nb.engines import trl_trainer
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        sys.modules.pop('opd_nb.trl')
        names = {}
        exec('import opd_nb.trl as short\nfrom opd_nb.trl import *', names)
    assert all(names[x] is getattr(names['short'], x) is getattr(trl_trainer, x) for x in trl_trainer.__all__) and opd_nb.trl is names['short']
    assert not {*opd_nb.SHORTCUTS} & {*opd_nb.MOVED, *opd_nb.PUBLIC}


def test_without_trl_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'trl', None)
    monkeypatch.delitem(sys.modules, 'opd_nb.engines.trl_trainer')
    monkeypatch.delitem(sys.modules, 'opd_nb.trl')
    with pytest.raises(ImportError, match=r'pip install "opd_nb\[trl\]"'): import opd_nb.trl  # noqa: F401


@slow
def test_llama_cpp_and_a_server_teach_alike(start, tiny, tmp_path):
    "On the same rollouts: a GGUF file gives the loss of the model it was made of, a server with 20 tokens of each position nearly so, asked once."
    pytest.importorskip('llama_cpp', reason='a GGUF teacher needs llama-cpp-python: pip install opd_nb[gguf]')
    pytest.importorskip('xllamacpp', reason="llama.cpp's server comes with the dev requirements")
    from servers import llama_server
    from opd_nb.tools.export_gguf import export_gguf
    gguf = export_gguf('tiny:teacher', tmp_path / 'm.gguf', 'f32')
    def one(teacher, **settings):
        trainer = trainer_for(start, teacher, tmp_path / 'run', loss='bpm', min_teacher_logp=-200., teacher_settings=settings)
        batch = batch_of(trainer)
        early = [r.done for r in batch['opd_rows']]
        loss = trainer.compute_loss(trainer.model, batch)
        assert gradients(trainer.model, loss)
        trainer.train()
        assert trainer.state.log_history[0]['opd/scored'] == 12  # with those of the batch above
        return loss.item(), all(early)
    wanted, _ = one(tiny)
    loss, early = one(f'gguf:{gguf}', teacher_n_gpu_layers=0)
    assert loss == pytest.approx(wanted, rel=1e-3) and not early
    with llama_server(gguf) as (url, _):
        loss, early = one(f'api:{url}', teacher_cache=str(tmp_path / 'a'), teacher_tokenizer=str(tiny_folder('teacher')), teacher_top_k=20)
    assert loss == pytest.approx(wanted, rel=.3) and early


TWO = '''
import json, sys, torch
sys.path.insert(0, {tests!r})
from test_trl_trainer import *
def model():
    m = LM.load('tiny:student', dtype='float32', device='cpu').model
    torch.manual_seed(0)
    for p in m.parameters(): p.data += .15 * p.data.std() * torch.randn_like(p)
    return m
rows, refuse = [], {refuse}
trainer = trainer_for(model(), As(load_teacher('tiny:'), 'lists', refuse=lambda i: refuse and int(os.environ['RANK']) == 1), {folder!r}, normalize={normalize!r}, max_steps=1, optim='sgd',
                      learning_rate=.1, max_grad_norm=0., per_device_train_batch_size=2, gradient_accumulation_steps=2, loss='strict', ddp_backend='gloo')
assert trainer.accelerator.num_processes == 2
generate = trainer._generate_and_score_completions
def kept(inputs):
    batch = generate(inputs)
    rows.extend(batch['opd_rows'])
    return batch
trainer._generate_and_score_completions = kept
moved = weights_after(trainer)
from accelerate.utils import gather_object
texts = gather_object([r.rollout for r in rows if r.signal is not None])
tokens = sum(gather_object([len(r.rollout.ids) for r in rows]))
log = trainer.state.log_history[0]
if trainer.accelerator.is_main_process:
    from types import SimpleNamespace
    one = trainer
    one.lm = replace(one.lm, model=model())
    one.pairs = [replace(one.pairs[0], teacher=As(load_teacher('tiny:'), 'lists'))]
    out = ours(one, [SimpleNamespace(rollout=r) for r in texts])
    g = gradients(one.lm.model, out.total / (out.weight if {normalize!r} == 'units' else tokens))
    wanted = torch.cat([(p.detach() - .1 * g[n]).reshape(-1) for n, p in one.lm.model.named_parameters()])
    torch.testing.assert_close(moved, wanted, atol=2e-6, rtol=1e-5)
    assert log['opd/scored'] == len(texts) == (4 if refuse else 8), log
    mean = (out.total / (out.weight if {normalize!r} == 'units' else tokens)).item()
    assert abs(log['loss'] - mean) < 1e-3, (log, mean)
    print('the same')
'''


@slow
@pytest.mark.parametrize('normalize, refuse', [('tokens', False), ('units', False), ('tokens', True)])
def test_two_processes(tmp_path, normalize, refuse):
    "The step of two processes is that of our batch functions on the rollouts of both; one of them may have nothing that its teacher can read."
    (tmp_path / 'two.py').write_text(TWO.format(tests=str(Path(__file__).parent), folder=str(tmp_path / 'out'), normalize=normalize, refuse=refuse))
    env = os.environ | dict(PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / 'tests'), os.environ.get('PYTHONPATH', '')]), ACCELERATE_USE_CPU='true', OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1')
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2', '--master-port', '0', '--rdzv-backend', 'c10d', '--rdzv-endpoint', 'localhost:0', str(tmp_path / 'two.py')],
                          capture_output=True, text=True, timeout=300, env=env, cwd=tmp_path)
    assert done.returncode == 0 and 'the same' in done.stdout, done.stderr[-3000:]
