"A teacher that is asked once: files that are resumed, damaged or of another tokenizer, and training on them."
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from test_interruptions import flags, launch

from opd_nb.alignment.vocab import VocabMap
from opd_nb.cli.app import main
from opd_nb.core.config import OPDConfig
from opd_nb.core.errors import BadInput
from opd_nb.core.types import Conversation
from opd_nb.data.formats import save_conversations
from opd_nb.lab import countdown
from opd_nb.models.lm import LM, tiny_folder
from opd_nb.monitor.kept_rollouts import read_kept_rollouts
from opd_nb.teachers.base import load_teacher
from opd_nb.teachers.scored_file import Header, read_scored, reduced, write_scored
from opd_nb.tools.score import logprobs_of_own, score_texts
from opd_nb.training.checkpoints import newest_checkpoint
from opd_nb.training.loop import train, train_step
from opd_nb.training.methods import sample_or_reference
from opd_nb.training.setup import prepare

OPD = [sys.executable, '-W', 'ignore', '-c', 'import sys; from opd_nb.cli.app import main; sys.exit(main())']
N = 24


def settings(**more): return OPDConfig(**dict(_env_file=None, student='tiny:student', device='cpu', max_new_tokens=16, batch=8, micro_batch=8) | more)


def asking(folder, **more): return settings(**dict(teacher='tiny:', data=str(folder / 'prompts.jsonl'), teacher_top_k=16) | more)


def training(file, out, **more):
    return settings(**dict(teacher=f'scored:{file}', output_dir=out, val_fraction=0, loss='trust', max_steps=6, learning_rate=1e-3, warmup_steps=1) | more)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('scored')
    save_conversations(countdown.draw(N, answers=True), folder / 'prompts.jsonl')
    score_texts(asking(folder), folder / 'own.safetensors', progress=False)
    score_texts(asking(folder, method='kd'), folder / 'references.safetensors', progress=False)
    return folder


def with_texts(file, change, out):
    "The same file with other texts."
    found = read_scored(file)
    write_scored(out, found.header, found.codec, [change(t) for t in found.texts])
    return out


def first_rollouts(run): return sample_or_reference(run, run.train[:8], 0)


def first_step(config):
    run = prepare(config)
    return run, train_step(run)


@pytest.mark.parametrize('name', ['own', 'references'])
def test_the_signals_are_those_of_the_live_teacher(folder, name):
    "In batches as they were, so that the rounding is the same."
    live, file = load_teacher('tiny:', asking(folder)), read_scored(folder / f'{name}.safetensors')
    stored = load_teacher(f'scored:{folder / name}.safetensors')
    assert len(file.texts) == N
    for i in range(0, N, 8):
        texts = file.texts[i:i + 8]
        asked = [t.conversation for t in texts], [(t.data, t.stopped) for t in texts]
        for a, b in zip(live.score(*asked), stored.score(*asked)):
            a = reduced(a, 16)
            assert (a.ids, a.ends) == (b.ids, b.ends) and torch.equal(a.top_ids, b.top_ids)
            torch.testing.assert_close(a.logprobs, b.logprobs, rtol=0, atol=1e-6)
            torch.testing.assert_close(a.top_logprobs, b.top_logprobs, rtol=0, atol=1e-6)


@pytest.mark.parametrize('loss', ['bpm', 'trust', 'alm'])
def test_the_loss_is_that_of_the_live_teacher(folder, tmp_path, loss):
    "Of the references, whose texts both have: a teacher that gives lists of 16 tokens, and the file."
    from opd_nb.teachers.base import Capabilities, MinimalTeacher

    class Lists:
        "The live teacher, reduced before it is asked by a run."
        def __init__(self): self.inner = load_teacher('tiny:', asking(folder))
        codec = property(lambda self: self.inner.codec)
        capabilities = Capabilities(frozenset({'topk', 'logprob'}), True, 'tiny:', 16)
        def score(self, *asked, on_error='raise'): return [reduced(s, 16) for s in self.inner.score(*asked)]
        def generate(self, *asked): return self.inner.generate(*asked)

    shared = dict(method='kd', loss=loss, val_fraction=0, max_new_tokens=40)
    run = prepare(asking(folder, output_dir=tmp_path / 'live', **shared), MinimalTeacher(Lists()))
    live = train_step(run)
    _, stored = first_step(training(folder / 'references.safetensors', tmp_path / 'stored', **shared))
    assert stored['scored'] == live['scored'] == 8 and not stored['left_out']
    assert stored['loss'] == pytest.approx(live['loss'], abs=1e-6)
    assert stored['grad_norm'] == pytest.approx(live['grad_norm'], rel=1e-4)


def test_a_vocabulary_of_ones_own_is_read_as_it_was_written(tmp_path):
    "Student and teacher are one tokenizer: the student's ids are what was scored, and every token is compared."
    save_conversations(countdown.draw(8), tmp_path / 'prompts.jsonl')
    done = score_texts(asking(tmp_path, student='tiny:teacher', temperature=3.), tmp_path / 'same.safetensors', progress=False)
    codec = load_teacher('tiny:').codec
    assert any(tuple(codec.write(t.data, t.stopped)[0]) != t.ids for t in done.file.texts), 'all are spelled as the tokenizer would'
    assert all(t.signal.ids == t.ids for t in done.file.texts)
    run, event = first_step(training(tmp_path / 'same.safetensors', tmp_path / 'run', student='tiny:teacher', loss='strict'))
    assert VocabMap.build(run.student.codec, run.teacher.codec).identical and event['scored'] == 8 and event['coverage'] == 1


def test_a_killed_scoring_goes_on(folder, tmp_path, capsys):
    "Killed after the first part; what is there is not scored again, and the file is that of an undisturbed run."
    flags = ['--teacher', 'tiny:', '--student', 'tiny:student', '--data', str(folder / 'prompts.jsonl'), '--teacher-top-k', '16', '--device', 'cpu',
             '--max-new-tokens', '16', '--batch', '8', '--micro-batch', '1', '--out', str(tmp_path / 'f')]
    env = os.environ | dict(OMP_NUM_THREADS='1')
    process = subprocess.Popen([*OPD, 'score', *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)
    parts = tmp_path / 'f.parts'
    while process.poll() is None and len([*parts.glob('*.safetensors')]) < 2: time.sleep(.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, 'it was done before it could be killed'
    kept = sorted(parts.glob('*.safetensors'))
    assert 2 <= len(kept) < N and not (tmp_path / 'f').exists()
    damaged, planted = kept[:2]
    damaged.write_bytes(damaged.read_bytes()[:-7])
    with_texts(planted, lambda t: replace(t, logprobs=(-.125,) * len(t.ids)), planted)  # what is kept is not scored again
    config = asking(folder, micro_batch=1)
    with pytest.raises(BadInput, match='of another command'): score_texts(asking(folder, micro_batch=1, seed=1), tmp_path / 'f', progress=False)
    resumed = score_texts(config, tmp_path / 'f', progress=False).file
    assert not parts.exists()
    whole = score_texts(config, tmp_path / 'g', progress=False).file
    assert [t.identity[:-1] for t in resumed.texts] == [t.identity[:-1] for t in whole.texts]  # but for the planted logprobs
    assert [i for i, (a, b) in enumerate(zip(resumed.texts, whole.texts)) if a.logprobs != b.logprobs] == [1] and set(resumed.texts[1].logprobs) == {-.125}
    assert all(torch.equal(a.signal.top_logprobs, b.signal.top_logprobs) for a, b in zip(resumed.texts, whole.texts))
    assert main(['score', *flags]) == 0
    said = capsys.readouterr().out
    assert '0 of them new' in said and 'opd train --teacher scored:' in said


def test_damage_is_a_sentence(folder, tmp_path):
    good = (folder / 'own.safetensors').read_bytes()
    for name, data, says in (('short', good[:-3], 'damaged'), ('text', b'{"prompt": 1}\n' * 9, 'damaged'), ('flipped', good[:-900] + bytes([good[-900] ^ 4]) + good[-899:], 'hash differs')):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(BadInput, match=says): prepare(training(tmp_path / name, tmp_path / 'run'))
        with pytest.raises(BadInput, match=says): score_texts(asking(folder), tmp_path / name, progress=False)
        assert (tmp_path / name).read_bytes() == data
    assert not [p for p in tmp_path.iterdir() if p.suffix == '.parts']


def test_random_bytes_change_nothing_or_are_a_sentence(folder, tmp_path):
    good, generator = (folder / 'own.safetensors').read_bytes(), torch.Generator().manual_seed(0)
    for at in torch.randint(len(good), (40,), generator=generator).tolist():
        (tmp_path / 'f').write_bytes(good[:at] + bytes([good[at] ^ 16]) + good[at + 1:])
        with pytest.raises(BadInput): read_scored(tmp_path / 'f')


def test_a_loss_for_whole_rows_is_refused(folder, tmp_path):
    for loss in ('xtoken', 'gold'):
        with pytest.raises(BadInput, match='asks more than this teacher gives'): prepare(training(folder / 'own.safetensors', tmp_path / 'run', loss=loss))
    assert prepare(training(folder / 'own.safetensors', tmp_path / 'run', loss='auto')).loss_name == 'cover'


def test_another_tokenizer(folder, tmp_path, caplog):
    "A student with another tokenizer reads the texts anew, without ratios; a file is not added to by a teacher with another tokenizer."
    with caplog.at_level('WARNING', 'opd_nb'): run, event = first_step(training(folder / 'own.safetensors', tmp_path / 'run', student='tiny:student-bpe'))
    assert f'{N} of {N} texts are of a student with another tokenizer' in caplog.text
    assert event['scored'] == 8 and event['trained'] and 'ratio_max' not in event
    texts = [t.data for t in read_scored(folder / 'own.safetensors').texts]
    assert all(any(data.startswith(r.data) for data in texts) for r in first_rollouts(run))
    (tmp_path / 'f').write_bytes((folder / 'own.safetensors').read_bytes())
    with pytest.raises(BadInput, match='another teacher'): score_texts(asking(folder, teacher='tiny:student', method='kd'), tmp_path / 'f', progress=False)
    other = read_scored(folder / 'own.safetensors')
    codec = load_teacher('tiny:student').codec  # as if the folder of the teacher had been given another tokenizer
    write_scored(tmp_path / 'f', Header.of(codec, teacher='tiny:', asked=other.header.asked, access=['topk'], k=16), codec, [])
    found = read_scored(tmp_path / 'f', allow_empty=True)
    from opd_nb.tools.score import check_same_teacher, read_order
    with pytest.raises(BadInput, match='another tokenizer'): check_same_teacher(found, read_order(asking(folder)), tmp_path / 'f', other.codec)


def test_passes_with_trust_use_the_ratio(folder, tmp_path):
    "In the first step the student is the one that wrote, so the ratio is 1; in the second pass it is not. Other kept logprobs are another loss."
    file = folder / 'own.safetensors'
    done = train(training(file, tmp_path / 'run'), progress=False)
    steps = [e for e in done.events if e['event'] == 'step']
    assert len(steps) == 6 and all(e['scored'] == 8 and e['on_policy'] == 0 for e in steps)  # two passes of three steps
    assert steps[0]['ratio_max'] == pytest.approx(1, abs=1e-3) and steps[-1]['ratio_max'] > 1.05
    assert sum(e['loss'] for e in steps[3:]) < sum(e['loss'] for e in steps[:3])
    losses = {}
    for shift in (0., -.7):
        changed = with_texts(file, lambda t: replace(t, logprobs=tuple(min(0., x + shift) for x in t.logprobs)), tmp_path / f'{shift}')
        losses[shift] = first_step(training(changed, tmp_path / f'run{shift}'))[1]
    assert losses[0.]['loss'] == pytest.approx(steps[0]['loss'], abs=1e-6)
    assert abs(losses[-.7]['loss'] - losses[0.]['loss']) > 1e-3 and losses[-.7]['ratio_max'] > 1.5


def test_epochs_and_a_held_out_share(folder, tmp_path):
    done = train(training(folder / 'own.safetensors', tmp_path / 'run', epochs=2, val_fraction=.2, eval_every=2, loss='bpm'), progress=False)
    run = prepare(training(folder / 'own.safetensors', tmp_path / 'x', val_fraction=.2))
    assert len(run.train) + len(run.val) == N and not {c.key for c in run.train} & {c.key for c in run.val}
    assert done.steps == -(-2 * len(run.train) // 8)
    validations = [e for e in done.events if e['event'] == 'validation']
    assert len(validations) >= 2 and all(e['trained'] and e['scored'] == len(run.val) and not e['left_out'] for e in validations)
    assert validations[-1]['loss'] != validations[0]['loss']
    assert not (tmp_path / 'run' / 'samples.jsonl').read_text()  # the student wrote nothing


def test_a_stopped_run_goes_on_bit_for_bit(folder, tmp_path):
    file = folder / 'own.safetensors'
    whole = train(training(file, tmp_path / 'whole', schedule='constant'), progress=False)
    train(training(file, tmp_path / 'part', max_steps=3, schedule='constant'), progress=False)
    resumed = train(training(file, tmp_path / 'part', schedule='constant', resume=True), progress=False)
    from safetensors.torch import load_file
    a, b = (load_file(d.student / 'model.safetensors') for d in (whole, resumed))
    assert all(torch.equal(a[k], b[k]) for k in a) and resumed.steps == 6
    changed = with_texts(file, lambda t: replace(t, logprobs=tuple(x - .1 for x in t.logprobs)), tmp_path / 'f')
    with pytest.raises(BadInput, match='is not what the run'): train(training(changed, tmp_path / 'part', max_steps=8, schedule='constant', resume=True), progress=False)


def test_shorter_rollouts_than_the_files(folder, tmp_path):
    run, event = first_step(training(folder / 'references.safetensors', tmp_path / 'run', max_new_tokens=5, loss='bpm'))
    assert event['scored'] == 8 and not event['left_out']
    rollouts = first_rollouts(run)
    assert all(len(r.ids) == 5 and not r.stopped for r in rollouts)
    signals = run.teacher.score([r.conversation for r in rollouts], [r.completion() for r in rollouts])
    assert all(s.ids and s.ends[-1] <= len(r.data) for r, s in zip(rollouts, signals))


def test_settings_that_mean_nothing_are_said(folder, tmp_path, caplog):
    file = folder / 'own.safetensors'
    with caplog.at_level('WARNING', 'opd_nb'): prepare(training(file, tmp_path / 'run', data=str(folder / 'prompts.jsonl')))
    assert 'is not read' in caplog.text
    with pytest.raises(BadInput, match='num_generations'): prepare(training(file, tmp_path / 'run', num_generations=2))
    with pytest.raises(BadInput, match='learns from references'): prepare(training(file, tmp_path / 'run', method='kd'))


def test_nothing_of_a_records_metadata_is_kept(tmp_path):
    "What only the teacher is told is not for whoever gets the file."
    rows = [Conversation(c.messages, dict(teacher_context='a planted secret', numbers=[1])) for c in countdown.draw(4, answers=True)]
    save_conversations(rows, tmp_path / 'prompts.jsonl')
    done = score_texts(asking(tmp_path, method='kd'), tmp_path / 'f', progress=False)
    assert b'planted' not in (tmp_path / 'f').read_bytes()
    plain = tmp_path / 'plain'
    plain.mkdir()
    save_conversations([Conversation(c.messages) for c in rows], plain / 'prompts.jsonl')
    untold = score_texts(asking(plain, method='kd'), plain / 'f', progress=False)
    assert not torch.equal(untold.file.texts[0].signal.logprobs, done.file.texts[0].signal.logprobs)


def test_an_endpoint_is_asked_once(tmp_path):
    "A real server; afterwards it is gone, and the run goes on without it."
    pytest.importorskip('xllamacpp', reason="llama.cpp's server comes with the dev requirements")
    from servers import served
    save_conversations(countdown.draw(8, answers=True), tmp_path / 'prompts.jsonl')
    with served('tiny:teacher') as (url, _):
        config = asking(tmp_path, teacher=f'api:{url}', teacher_tokenizer=str(tiny_folder('teacher')), teacher_cache=tmp_path / 'cache', teacher_top_k=8)
        done = score_texts(config, tmp_path / 'f', progress=False)
    assert len(done.file.texts) == 8 and done.file.header.k == 8 and done.file.header.access == ['logprob', 'topk']
    trained = train(training(tmp_path / 'f', tmp_path / 'run', max_steps=3), progress=False)
    assert [e['scored'] for e in trained.events if e['event'] == 'step'] == [8] * 3


def keeping(folder, out, **more):
    return asking(folder, **dict(output_dir=out, loss='cover', max_steps=4, save_every=2, val_fraction=0, learning_rate=1e-3, warmup_steps=1) | more)


def losses_of(run): return [e['loss'] for e in run.events if e['event'] == 'step']


@pytest.mark.parametrize('more', [{}, dict(rollout_dtype='bfloat16')], ids=['here', 'by a copy'])
def test_a_run_that_keeps_its_rollouts_is_the_same_run(folder, tmp_path, more):
    "And one that is killed and goes on keeps each rollout once."
    plain = train(keeping(folder, tmp_path / 'plain', **more), progress=False)
    kept = train(keeping(folder, tmp_path / 'kept', keep_rollouts=True, **more), progress=False)
    assert losses_of(plain) == losses_of(kept) and not (tmp_path / 'plain/rollouts.jsonl').exists()
    file = tmp_path / 'kept/rollouts.jsonl'
    whole = file.read_bytes()
    shutil.rmtree(newest_checkpoint(tmp_path / 'kept'))  # killed before step 4 was saved
    with open(file, 'a') as f: f.write('{"step": 4, "ro')
    again = train(keeping(folder, tmp_path / 'kept', keep_rollouts=True, resume=True, **more), progress=False)
    assert again.steps == 4 and file.read_bytes() == whole
    assert len(read_kept_rollouts(tmp_path / 'kept', LM.load('tiny:student', device='cpu').codec)) == 4 * 8


@pytest.mark.parametrize('loss', ['trust', 'pg'])
def test_a_ratio_to_what_is_kept_is_one_but_for_rounding(folder, tmp_path, loss):
    plain, kept = (train(keeping(folder, tmp_path / str(k), loss=loss, keep_rollouts=k, max_steps=2), progress=False) for k in (False, True))
    assert losses_of(kept) == pytest.approx(losses_of(plain), abs=1e-4)


def test_rollouts_of_a_run_are_scored_by_another_teacher(folder, tmp_path):
    "They are what the run wrote, with the logprobs that the student of that step gave them."
    out = tmp_path / 'run'
    train(keeping(folder, out, keep_rollouts=True, keep_last=9, num_generations=2, batch=4, temperature=1.3), progress=False)
    about_run = OPDConfig(_env_file=None, teacher='tiny:', data=str(out), teacher_top_k=16, device='cpu')
    texts = score_texts(about_run, tmp_path / 'f', progress=False).file.texts
    kept = read_kept_rollouts(out, LM.load('tiny:student', device='cpu').codec)
    assert len(kept) == 4 * 8 and {(t.conversation.key, t.ids, t.logprobs) for t in texts} == {(r.conversation.key, r.ids, r.logprobs) for r in kept}
    writer = read_scored(tmp_path / 'f').header.writers[0]
    assert (writer.student, writer.max_new_tokens, writer.temperature) == ('tiny:student', 16, 1.3)
    live, some = load_teacher('tiny:', about_run), texts[:16]
    for a, t in zip(live.score([t.conversation for t in some], [(t.data, t.stopped) for t in some]), some):
        torch.testing.assert_close(a.logprobs, t.signal.logprobs, rtol=0, atol=1e-5)
    third, then = kept[16:24], LM.load(str(out / 'step-2'), device='cpu')
    for r, values in zip(third, logprobs_of_own(then, third, None)): assert r.logprobs == pytest.approx(values, abs=1e-4)
    now = LM.load(str(out / 'final'), device='cpu')
    assert any(abs(a - b) > 1e-2 for r, values in zip(third, logprobs_of_own(now, third, None)) for a, b in zip(r.logprobs, values))
    assert train(training(tmp_path / 'f', tmp_path / 'b'), progress=False).steps == 6
    with pytest.raises(BadInput, match='written anew'): prepare(training(tmp_path / 'f', tmp_path / 'c', keep_rollouts=True))


def test_what_a_run_kept_may_be_told_to_another_teacher(folder, tmp_path, capsys):
    "References stay with the rollouts; a run that was stopped before it saved anything will do; one that kept none will not."
    train(keeping(folder, tmp_path / 'run', keep_rollouts=True), progress=False)
    for saved in ('final', 'step-2', 'step-4'): shutil.rmtree(tmp_path / 'run' / saved)
    told = OPDConfig(_env_file=None, teacher='tiny:', data=str(tmp_path / 'run'), teacher_sees='reference', device='cpu', student='tiny:student')
    assert score_texts(told, tmp_path / 'f', progress=False).file.header.told == 'the reference answer'
    train(keeping(folder, tmp_path / 'forgets'), progress=False)
    assert main(['score', f"--data={tmp_path / 'forgets'}", '--teacher=tiny:', f"--out={tmp_path / 'g'}"]) == 2
    assert '--keep-rollouts' in capsys.readouterr().err
    for text in ('a: [', 'loss: gold'):
        (tmp_path / 'run/config.yaml').write_text(text)
        with pytest.raises(BadInput, match='has a config.yaml that'): score_texts(told, tmp_path / 'h', progress=False)


def test_two_processes_keep_what_one_would(folder, tmp_path):
    train(keeping(folder, tmp_path / 'one', keep_rollouts=True, max_steps=2), progress=False)
    given = keeping(folder, tmp_path / 'two', keep_rollouts=True, max_steps=2).model_dump(mode='json', exclude_defaults=True)
    done = launch(*flags(given))
    assert done.returncode == 0, done.stderr[-2000:]
    codec = LM.load('tiny:student', device='cpu').codec
    assert {p.name for p in (tmp_path / 'two').glob('rollouts*')} == {'rollouts.jsonl', 'rollouts-1.jsonl'}
    one, two = ([(r.conversation.key, r.ids) for r in read_kept_rollouts(tmp_path / n, codec)] for n in ('one', 'two'))
    assert sorted(one) == sorted(two) and len(two) == 16
