"Hosted teachers, against real servers and through everything that can go wrong on the way."
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from conftest import real, slow
from opd_nb.core.errors import BadInput
from opd_nb.core.types import Conversation
from opd_nb.core.config import OPDConfig
from opd_nb.models.lm import tiny_folder
from opd_nb.hosted.pricing import BudgetReached, TeacherGone
from opd_nb.hosted.store import ReplyStore
from opd_nb.teachers.base import load_teacher
from opd_nb.lab import countdown
from servers import command_server, contract_server, fault_proxy, llama_server, served

pytest.importorskip('xllamacpp', reason="llama.cpp's server comes with the dev requirements")
KEY = 'sk-planted-4f1c9e'
PASSING = ['busy', 'broken', 'reset', 'hang', 'cut', 'short']


@pytest.fixture(scope='module')
def here(): return load_teacher('tiny:')


@pytest.fixture(scope='module')
def llama():
    with served('tiny:teacher') as (url, _): yield url


@pytest.fixture(scope='module')
def records():
    "Eight conversations, and completions: right ones, truncated ones, wrong ones."
    drawn = countdown.draw(8, answers=True)
    texts = [c.reference.encode() for c in drawn]
    right = [(text, True) for text in texts[:4]]
    truncated = [(text[:7], False) for text in texts[4:6]]
    wrong = [(b'10+7=18 18+3=21', True), ('7*3=21 é'.encode(), True)]
    return prompts_of(drawn), right + truncated + wrong


def prompts_of(drawn): return [Conversation(tuple(c.prompt)) for c in drawn]
def references_of(drawn): return [(c.reference.encode(), True) for c in drawn]


def config(here, cache, **kw):
    usual = dict(teacher_tokenizer=here.lm.path, teacher_top_k=8, teacher_cache=cache, teacher_timeout=1,
                 teacher_retries=3, teacher_concurrency=3, teacher_api_key=KEY)
    return OPDConfig(_env_file=None, **usual | kw)


def port_of(url): return int(url.split(':')[-1].split('/')[0])


def stop(process):
    process.kill()
    process.wait()


def same(a, b):
    for x, y in zip(a, b, strict=True):
        assert (x.ids, x.ends) == (y.ids, y.ends)
        torch.testing.assert_close(x.logprobs, y.logprobs, equal_nan=True, atol=2e-5, rtol=0)
        assert all(set(i.tolist()) == set(j.tolist()) for i, j in zip(x.top_ids, y.top_ids))


def close_to(signals, exact):
    "Largest difference of a token's log-probability from the model in this process; asserts the same top 8."
    far = 0.
    for s, e in zip(signals, exact, strict=True):
        assert s.ids == e.ids and not s.logprobs.isnan().any()
        far = max(far, (s.logprobs - e.logprobs).abs().max().item())
        logits = e.head(e.hidden)
        for row, top in zip(logits, s.top_ids):
            eighth = row.topk(9).values
            if eighth[7] - eighth[8] > 1e-4: assert set(top.tolist()) == set(row.topk(8).indices.tolist())
    return far


def test_same_numbers_as_in_this_process(here, llama, records, tmp_path):
    teacher = load_teacher(f'api:{llama}', config(here, tmp_path / 'a'))
    assert teacher.finding.mode == 'llama_cpp' and teacher.capabilities.best == 'topk'
    assert close_to(teacher.score(*records), here.score(*records)) < 1e-4


def test_a_sample_that_lists_nothing_is_drawn_again(here, llama, tmp_path):
    "An end or half a letter was drawn for the reference; the exact rows stay the choice."
    with fault_proxy(llama, ['unlisted'] * 6) as (url, faults, _):
        teacher = load_teacher(f'api:{url}', config(here, tmp_path / 'a'))
        assert teacher.finding.mode == 'llama_cpp' and not faults


def test_a_lesser_mode_after_an_internal_error_is_said_and_not_kept(here, llama, tmp_path, caplog):
    "The reference is refused by ids and by text, twice each, as where a server is short of memory for a moment."
    with fault_proxy(llama, ['broken'] * 4) as (url, faults, _):
        settings = config(here, tmp_path / 'a')
        assert load_teacher(f'api:{url}', settings).finding.mode == 'prefix_walk' and not faults
        assert 'The next start tries anew' in caplog.text
        assert load_teacher(f'api:{url}', settings).finding.mode == 'llama_cpp'


def test_a_wrong_tokenizer_is_found_out_although_its_check_failed_once(llama, tmp_path):
    other = load_teacher('tiny:student')
    with fault_proxy(llama, [None] * 4 + ['broken'] * 2) as (url, faults, _):
        with pytest.raises(BadInput, match='teacher_tokenizer'): load_teacher(f'api:{url}', config(other, tmp_path / 'a'))
        assert not faults


def test_real_model_without_template(tmp_path):
    "A SentencePiece model with BOS, `<unk>` and no byte fallback, prompted with plain text."
    folder = real('models', 'babyllama105')
    exact = load_teacher(f'hf:{folder}')
    story = Conversation(({'role': 'user', 'content': 'Once upon a time there was a little'},))
    records = [story] * 2, [(b' girl named Lily. She liked to play', False), (b' dog. The end.', True)]
    with served(str(folder)) as (url, _):
        teacher = load_teacher(f'api:{url}', config(exact, tmp_path / 'a'))
        assert close_to(teacher.score(*records), exact.score(*records)) < 1e-4
        assert teacher.generate([story], 12)[0][0] == exact.generate([story], 12)[0][0]


@pytest.mark.parametrize('fault', PASSING)
def test_faults_change_nothing(here, llama, records, tmp_path, fault):
    clean = load_teacher(f'api:{llama}', config(here, tmp_path / 'clean')).score(*records)
    with fault_proxy(llama) as (url, faults, seen):
        teacher = load_teacher(f'api:{url}', config(here, tmp_path / 'a'))
        probed = len(seen)
        faults[:] = [fault, None, fault]
        same(teacher.score(*records), clean)
        assert not faults and len(seen) > probed + 3
        asked = len(seen)
        same(load_teacher(f'api:{url}', config(here, tmp_path / 'a')).score(*records), clean)
        assert len(seen) == asked + 1  # only whether it is still the same model


STOPPING = {
    'expired key': (['expired'], 'key'),
    'wrong model': (['no model'], 'name'),
    'always 500': (['broken'] * 40, 'HTTP 500'),
    'always short': (['short'] * 40, 'positions'),
    'always reset': (['reset'] * 40, 'no connection')}


@pytest.mark.parametrize('faults, told', STOPPING.values(), ids=STOPPING)
def test_stops_clearly_and_loses_nothing(here, llama, records, tmp_path, faults, told):
    conversations, answers = records
    with fault_proxy(llama) as (url, script, seen):
        teacher = load_teacher(f'api:{url}', config(here, tmp_path / 'a', teacher_retries=1))
        teacher.score(conversations[:3], answers[:3])
        probed, script[:] = len(seen), faults
        with pytest.raises(TeacherGone) as gone: teacher.score(*records)
        text = str(gone.value)
        assert told in text and KEY not in text and 'Make' not in text
        assert not any(a.decode() in text for a, _ in answers if len(a) > 4)
        script.clear()
        asked, kept = len(seen), len(teacher.endpoint.cache)
        again = load_teacher(f'api:{url}', config(here, tmp_path / 'a'))
        assert len(again.score(*records)) == len(answers)
        new = [b for _, _, b in seen[asked + 1:]]  # after the one that asks whether it is still the same model
        old = [b for _, _, b in seen[:probed]]
        assert new and not any(b in old for b in new)  # what was answered before is not asked again
        assert len(again.endpoint.cache) == kept + len(new)


def test_refused_record_says_nothing_and_the_others_are_scored(here, llama, records, tmp_path):
    with fault_proxy(llama) as (url, script, _):
        teacher = load_teacher(f'api:{url}', config(here, tmp_path / 'a', teacher_concurrency=1))
        script[:] = ['too long']
        signals = teacher.score(*records)
    assert teacher.refused == 1 == sum(bool(s.logprobs.isnan().all()) and not s.scored.any() for s in signals)
    with fault_proxy(llama) as (url, script, _):
        teacher = load_teacher(f'api:{url}', config(here, tmp_path / 'b'))
        script[:] = ['too long'] * 20
        with pytest.raises(TeacherGone, match='refuses every completion'): teacher.score(*records)


def test_server_that_dies_and_comes_back(here, records, tmp_path):
    from opd_nb.tools.export_gguf import export_gguf
    conversations, answers = records
    gguf = export_gguf('tiny:teacher', tmp_path / 'm.gguf', 'f32')
    with llama_server(gguf) as (url, process):
        port = port_of(url)
        teacher = load_teacher(f'api:{url}', config(here, tmp_path / 'a', teacher_retries=1))
        first = teacher.score(conversations[:4], answers[:4])
        stop(process)
        with pytest.raises(TeacherGone, match='no connection'): teacher.score(*records)
        same(teacher.score(conversations[:4], answers[:4]), first)  # from the cache
    with llama_server(gguf, port): same(teacher.score(*records)[:4], first)


def test_another_model_under_the_same_name_is_not_taken_for_the_old_one(here, records, tmp_path, monkeypatch, caplog):
    "By a scoring API and by the chat route; an error for this machine, a warning for a public provider."
    from opd_nb.tools.export_gguf import export_gguf
    from opd_nb.models.lm import LM
    lm, gguf = LM.load('tiny:teacher', dtype='float32', device='cpu'), tmp_path / 'm.gguf'
    export_gguf(lm, gguf, 'f32')
    ways = [config(here, tmp_path / mode, teacher_mode=mode) for mode in ('auto', 'prefix_walk')]
    with llama_server(gguf) as (url, _):
        port = port_of(url)
        for way in ways: load_teacher(f'api:{url}#teacher', way)
    with torch.no_grad():
        for p in lm.model.parameters(): p.mul_(.9)
    export_gguf(lm, gguf, 'f32')
    with llama_server(gguf, port) as (url, _):
        for way in ways:
            with pytest.raises(BadInput, match='another model has this name now'):
                load_teacher(f'api:{url}#teacher', way)
        load_teacher(f'api:{url}#teacher', config(here, tmp_path / 'new'))
        monkeypatch.setattr('opd_nb.teachers.same_model.is_private', lambda url: False)
        load_teacher(f'api:{url}#teacher', ways[0])
        assert 'may have several machines' in caplog.text


@pytest.mark.parametrize('done', [1, 2], ids=['in a step', 'in a validation'])
def test_training_pauses_when_its_server_dies_and_goes_on_to_the_same_end(tmp_path, monkeypatch, capfd, done):
    "`opd train` with a server that is killed after so many steps; validation follows each second one."
    from opd_nb.cli.app import main
    from opd_nb.data.formats import save_conversations
    from opd_nb.tools.export_gguf import export_gguf
    from opd_nb.monitor.run_log import read_log
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('TEACHER_API_KEY', KEY)
    gguf = export_gguf('tiny:teacher', tmp_path / 'm.gguf', 'f32')
    prompts = save_conversations(countdown.draw(24), tmp_path / 'p.jsonl')

    def run(folder, *more):
        words = (f'train --student tiny: --teacher api:{url}#teacher --teacher-tokenizer {tiny_folder("teacher")} '
                 f'--teacher-cache a.sqlite --teacher-retries 0 --teacher-concurrency 2 --loss bpm --data {prompts} '
                 f'--val-max-samples 3 --eval-every 2 --max-steps 4 --batch 3 --max-new-tokens 12 '
                 f'--learning-rate 2e-3 --device cpu --output-dir {folder}')
        return main([*words.split(), *more])

    def events(folder): return [{k: v for k, v in e.items() if 'seconds' not in k} for e in read_log(folder)]
    with llama_server(gguf) as (real, process):
        def kill():
            log = events('dies') if deadly else []
            if log and log[-1] == dict(log[-1], event='step', step=done): stop(process)
        deadly = True
        with fault_proxy(real, before=kill) as (url, _, seen):
            assert run('dies') == 75
            told, deadly = capfd.readouterr(), False
            assert f'saved at step {done}' in told.err and '--resume' in told.err and 'Traceback' not in told.err
            for secret in (KEY, 'Make ', '+'): assert secret not in (told.out + told.err).replace('e+', '')
            with llama_server(gguf, port_of(real)):
                assert main(['train', '--config', 'dies/config.yaml', '--resume']) == 0
                asked, scored = len(seen), [str(b) for path, _, b in seen if path == '/completion']
                assert len(scored) - len(set(scored)) <= 2  # those that were under way
                assert run('undisturbed') == 0
                assert len(seen) == asked + 1  # everything is cached; one asks whether it is still the same model
    assert events('dies') == events('undisturbed')
    weights = [(tmp_path / run / 'final/model.safetensors').read_bytes() for run in ('dies', 'undisturbed')]
    assert weights[0] == weights[1]


def test_estimate_of_a_walk_is_what_was_counted(here, llama, records, tmp_path):
    for n, positions in enumerate((None, 3)):
        walk = config(here, tmp_path / str(n), teacher_mode='prefix_walk', teacher_positions=positions)
        teacher = load_teacher(f'api:{llama}', walk)
        meter = teacher.endpoint.budget
        before, estimate = (meter.requests, meter.tokens_in, meter.tokens_out), teacher.estimate(*records)
        signals = teacher.score(*records)
        counted = meter.requests - before[0], meter.tokens_in - before[1], meter.tokens_out - before[2]
        unsaid = sum(1 for s in signals for row in s.scored if not row)
        assert estimate.tokens_in == counted[1] and estimate.requests == counted[0]
        assert counted[2] <= estimate.tokens_out  # an answer that ends at once may be counted as nothing
        if positions: assert sum(int(s.scored.sum()) for s in signals) <= 3 * len(signals)
        else: assert unsaid < 12


def test_cap_stops_before_the_request_that_would_pass_it(here, llama, records, tmp_path):
    with fault_proxy(llama) as (url, _, seen):
        free = load_teacher(f'api:{url}', config(here, tmp_path / 'a'))
        probed, estimate = len(seen), free.estimate(*records)
        price = .02 / (estimate.tokens_in + estimate.tokens_out) * 1e6  # all eight would cost two cents
        limited = dict(teacher_price=f'{price},{price}', teacher_max_dollars=.01, teacher_concurrency=2)
        paid = config(here, tmp_path / 'a', **limited)
        teacher = load_teacher(f'api:{url}', paid)
        with pytest.raises(BudgetReached, match=r'\$0.01'): teacher.score(*records)
        assert 0 < teacher.endpoint.budget.dollars <= .01 and len(seen) > probed
        asked = len(seen)
        with pytest.raises(BudgetReached): teacher.score(*records)
        assert teacher.endpoint.budget.dollars <= .01
        more = load_teacher(f'api:{url}', paid.model_copy(update=dict(teacher_max_dollars=1.)))
        assert len(more.score(*records)) == 8
        bodies = [str(b) for path, _, b in seen[probed:] if path == '/completion']
        assert len(set(bodies)) == len(bodies)  # nothing was paid for twice


RUN = textwrap.dedent('''
    import sys
    from opd_nb.lab import countdown
    from opd_nb.core.config import OPDConfig
    from opd_nb.hosted.pricing import TeacherGone
    from opd_nb.teachers.base import load_teacher
    from opd_nb.core.types import Conversation
    url, cache, tokenizer, key = sys.argv[1:]
    drawn = countdown.draw(8, answers=True)
    settings = OPDConfig(_env_file=None, teacher_tokenizer=tokenizer, teacher_top_k=8, teacher_cache=cache,
                         teacher_api_key=key, teacher_concurrency=1, teacher_retries=0)
    teacher = load_teacher(f'api:{url}#teacher', settings)
    conversations = [Conversation(tuple(c.prompt)) for c in drawn]
    completions = [(c.reference.encode(), True) for c in drawn]
    print('ready', flush=True)
    for n in (2, 4, 6, 8):
        input()
        try: teacher.score(conversations[:n], completions[:n])
        except TeacherGone as e: print(e)
        print(teacher, repr(teacher.endpoint), teacher.notes)
        print('ready', flush=True)
''')


def test_run_that_meets_faults_and_is_killed_writes_no_secret_and_goes_on_where_it_was(here, llama, records, tmp_path):
    env = dict(os.environ, HOME=str(tmp_path), XDG_CACHE_HOME=str(tmp_path / 'c'))
    words, pipe = [str(tmp_path / 'answers.sqlite'), here.lm.path, KEY], subprocess.PIPE
    with (fault_proxy(llama) as (url, script, seen),
          subprocess.Popen([sys.executable, '-c', RUN, url, *words], cwd=tmp_path, env=env, stdin=pipe, stdout=pipe,
                           stderr=subprocess.STDOUT, text=True) as run):
        said = []

        def wait():
            while (line := run.stdout.readline()) and 'ready' not in line: said.append(line)

        def go(*faults):
            script[:] = faults
            run.stdin.write('\n')
            run.stdin.flush()

        wait()
        probed = len(seen)
        for faults in ((), ('expired',), ('cut',)):
            go(*faults)
            wait()
        go(*['slow'] * 99)
        while len(seen) < probed + 6: time.sleep(.05)
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
        time.sleep(.4)
        script.clear()

        said = ''.join(said)
        assert 'HTTP 401' in said and 'half a JSON' in said and 'Traceback' not in said
        assert all(h.get('authorization') == f'Bearer {KEY}' for _, h, _ in seen)
        drawn = countdown.draw(8, answers=True)
        for text in [KEY, *(c.reference for c in drawn), *(c.prompt[-1]['content'] for c in drawn)]:
            assert text not in said, text
        cache, files = ReplyStore(tmp_path / 'answers.sqlite'), [p for p in tmp_path.rglob('*') if p.is_file()]
        assert cache.path in files and not any(KEY.encode() in p.read_bytes() for p in files)
        assert not any(KEY in str(cache.get(k)) for k, in cache.run('SELECT key FROM answers'))

        asked, before = len(seen), [str(b) for _, _, b in seen[probed:]]
        teacher = load_teacher(f'api:{url}#teacher', config(here, tmp_path / 'answers.sqlite'))
        conversations, answers = prompts_of(drawn), references_of(drawn)
        assert close_to(teacher.score(conversations, answers), here.score(conversations, answers)) < 1e-4
        again = [str(b) for _, _, b in seen[asked:]]
        assert again
        assert sum(b in before for b in again) <= 3  # the expired, the cut, and the one under way at the kill
        asked = len(seen)
        load_teacher(f'api:{url}#teacher', config(here, tmp_path / 'answers.sqlite')).score(conversations, answers)
        assert len(seen) == asked + 1


@pytest.mark.parametrize('provider', ['', 'deepinfra'])
def test_openrouter_preset(here, tmp_path, monkeypatch, caplog, provider):
    "Headers, honoured parameters, thinking off, the tokenizer from the list of models: a chat model works as it comes."
    model = 'qwen/qwen-2.5-7b-instruct'
    entry = dict(id=model, hugging_face_id=here.lm.path, supported_parameters=['logprobs', 'reasoning'])
    puzzle = Conversation(({'role': 'user', 'content': 'Make 31 from 3 7 10.'},))
    with (contract_server('tiny:teacher', can=('chat', 'prefill'), listing=entry) as server,
          fault_proxy(server) as (url, _, seen)):
        monkeypatch.setattr('opd_nb.teachers.api.OPENROUTER', url)
        keys = dict(openrouter_api_key=KEY, teacher_price='.1,.2')
        settings = OPDConfig(_env_file=None, teacher_cache=tmp_path / 'a', **keys)
        teacher = load_teacher(f'openrouter:{model}' + f'#{provider}' * bool(provider), settings)
        signals = teacher.score([puzzle], [(b'7*3=21 21+10=31', True)])
    assert teacher.finding.mode == 'prefix_walk' and teacher.capabilities.k == 20 and signals[0].scored.sum() > 6
    one = dict(only=[provider], allow_fallbacks=False) if provider else {}
    assert ('every request to another provider' in caplog.text) == (not provider)
    for _, headers, body in seen:
        assert body['provider'] == dict(require_parameters=True) | one and body['reasoning'] == dict(enabled=False)
        assert body['model'] == model
        assert headers['x-title'] == 'opd_nb' and 'http-referer' in headers
        assert headers['authorization'] == f'Bearer {KEY}'


@pytest.fixture
def only_env(llama, here, tmp_path, monkeypatch):
    "`opd train` with everything in a `.env`; OpenRouter is llama.cpp's server with nothing but its chat route."
    from opd_nb.cli.app import main
    from opd_nb.data.formats import save_conversations
    monkeypatch.chdir(tmp_path)
    save_conversations(countdown.draw(16), tmp_path / 'p.jsonl')
    keys = dict(
        TEACHER_BACKEND='openrouter', OPENROUTER_API_KEY=KEY, TEACHER_PRICE='1,2', OPD_TEACHER_CACHE='a.sqlite',
        OPD_STUDENT='tiny:', DATA_PATH='p.jsonl', OUTPUT_DIR='run', MAX_STEPS=3, OPD_BATCH=2, MAX_NEW_TOKENS=10,
        VAL_MAX_SAMPLES=2, OPD_DEVICE='cpu', LEARNING_RATE=1e-3)
    with fault_proxy(llama, only='/chat/completions') as (url, _, seen):
        monkeypatch.setattr('opd_nb.teachers.api.OPENROUTER', url)
        def run(*more, **changed):
            Path('.env').write_text(''.join(f'{k}={v}\n' for k, v in (keys | changed).items()))
            return main(['train', *more])
        yield run, seen


@pytest.mark.parametrize('tokenizer, mode', [(True, 'prefix_walk'), (False, 'continuation')])
def test_trains_through_a_chat_route_alone(only_env, here, capfd, tokenizer, mode):
    from opd_nb.monitor.run_log import read_log
    run, seen = only_env
    assert run(**(dict(TEACHER_TOKENIZER=here.lm.path) if tokenizer else {})) == 0
    told = capfd.readouterr()
    assert f'asked by {mode}: it continues a prefilled reply' in told.out
    assert '$1 for a million tokens read' in told.out and ('TEACHER_TOKENIZER' in told.out) != tokenizer
    assert 'completions: $' in told.out and KEY not in told.out + told.err
    assert 'Make ' not in told.err + told.out.partition('what it wrote')[0]  # samples are shown, and nothing else
    steps = [e for e in read_log('run') if e['event'] == 'step']
    assert len(steps) == 3 and all(e['trained'] > 0 and not e['skipped'] and 0 < e['loss'] < 10 for e in steps)
    assert all(body['provider'] == dict(require_parameters=True) for _, _, body in seen if 'messages' in body)
    files = [p for p in Path('.').rglob('*') if p.is_file() and p.name != '.env']
    assert not any(KEY.encode() in p.read_bytes() for p in files)


def test_a_run_stops_at_its_cap_and_goes_on(only_env, here, capfd):
    run, seen = only_env
    assert run(TEACHER_TOKENIZER=here.lm.path, TEACHER_MAX_DOLLARS=.01, TEACHER_PRICE='15,30') == 75
    told = capfd.readouterr().err
    cost = float(told.partition('has cost $')[2].split(',')[0])
    assert 0 < cost <= .01 and 'would pass the limit of $0.01' in told and 'Traceback' not in told
    asked = len(seen)
    assert run('--config', 'run/config.yaml', '--resume', '--teacher-max-dollars', '1') == 0 and len(seen) > asked
    bodies = [str(body) for _, _, body in seen if body.get('max_tokens') == 1 and 'messages' in body]
    assert len(set(bodies)) == len(bodies)  # nothing was paid for twice


def test_tokenizer_of_another_model_is_refused(llama, tmp_path):
    other = load_teacher('tiny:student-bpe')
    with pytest.raises(BadInput, match='teacher_tokenizer'): load_teacher(f'api:{llama}', config(other, tmp_path / 'a'))


@slow
def test_llama_cpp_python_echoes_the_wrong_rows(here, tmp_path):
    pytest.importorskip('llama_cpp.server.app', reason='pip install llama-cpp-python[server]')
    from opd_nb.tools.export_gguf import export_gguf
    gguf = export_gguf('tiny:teacher', tmp_path / 'm.gguf', 'f32')
    options = '--port {port} --n_ctx 512 --logits_all true --type_k 0 --type_v 0 --verbose false'.split()
    with command_server(sys.executable, '-m', 'llama_cpp.server', '--model', str(gguf), *options) as url:
        with pytest.raises(BadInput, match='off by one: row t is of token t\\+1'):
            load_teacher(f'api:{url}', config(here, tmp_path / 'a', teacher_timeout=20, teacher_retries=0))


@slow
def test_transformers_serve_ignores_what_it_accepts(here, tmp_path):
    for name in ('fastapi', 'uvicorn'): pytest.importorskip(name, reason='pip install transformers[serving]')
    folder, command = here.lm.path, str(Path(sys.executable).with_name('transformers'))
    options = '--port {port} --host 127.0.0.1 --device cpu --dtype float32'.split()
    with command_server(command, 'serve', folder, *options) as url:
        with pytest.raises(BadInput) as e:
            load_teacher(f'api:{url}#{folder}', config(here, tmp_path / 'a', teacher_timeout=60, teacher_retries=0))
    for part in ('no logprobs of the tokens it writes', 'it accepts logprobs and lists none', 'starts another'):
        assert part in str(e.value)


ROUTES = {'prefixes': ('chat', 'prefill'), 'echo by text': ('echo',), 'echo by ids': ('echo', 'ids')}


@pytest.mark.parametrize('can', ROUTES.values(), ids=ROUTES)
def test_pieces_before_the_bytes_they_fall_back_on(can, tmp_path):
    "A SentencePiece teacher has `7` twice, as a piece and as the byte <0x37>. What a server calls `7` is the piece."
    from opd_nb.models.outputs import teacher_side
    asked, text = Conversation(({'role': 'user', 'content': 'Make 31 from 3 7 10.'},)), (b'7*3=21 21+10=31', True)
    student = load_teacher('tiny:student', OPDConfig(_env_file=None, device='cpu'))
    own = student.score([asked], [text])[0]
    likeliest = teacher_side([own], len(student.codec.bytes)).logp(slice(None)).argmax(-1)
    with contract_server('tiny:student', can=can) as url:
        settings = OPDConfig(_env_file=None, teacher_cache=tmp_path / 'a', teacher_tokenizer=str(tiny_folder('student')))
        said, = load_teacher(f'api:{url}/v1#teacher', settings).score([asked], [text])
    seen = [t for t in range(len(said.ids)) if said.scored[t]]
    assert len(seen) > 8 and [int(said.ids[t]) for t in seen] == [int(own.ids[t]) for t in seen]
    assert all(int(said.top_ids[t][0]) == likeliest[t] for t in seen)  # and not the byte of the same name
    realised = [t for t in seen if not said.logprobs[t].isnan()]
    assert len(realised) > 5 and all(abs(float(said.logprobs[t]) - float(own.logprobs[t])) < 1e-3 for t in realised)


def test_an_error_with_status_200_and_a_model_list_that_fails_once(tmp_path):
    "Gateways say 200 and mean 502; servers that start answer later. Neither is kept."
    from servers import Handler, http_server
    from opd_nb.hosted.store import ReplyStore
    from opd_nb.hosted.client import Endpoint, Request
    answers = [dict(error=dict(message='upstream')), dict(choices=[]), dict(choices=[dict(text='x')])]
    models = [503, 503, 200]

    class Odd(Handler):
        def do_GET(self): self.send(models.pop(0), dict(data=[dict(id='m')]))
        def do_POST(self):
            self.body()
            self.send(200, answers.pop(0))

    with http_server(Odd) as url:
        end = Endpoint(f'{url}/v1', 'm', cache=ReplyStore(tmp_path / 'a'), retries=3)
        work = end.ask(Request('/completions', dict(prompt='x'), 1), lambda a: a['choices'][0]['text'])
        assert end.run([work]) == ['x'] and not answers
        assert end.entry() == {} and end.entry() == dict(id='m')
