"Rollouts by a server: what can be shown without vLLM, and, slow, with it."
import functools, os, socket, subprocess, sys, threading

import pytest
import torch

from conftest import ROOT, slow
from opd_nb.core.errors import BadInput
from opd_nb.core.config import OPDConfig
from opd_nb.models.lm import LM
from opd_nb.hosted.pricing import TeacherGone
from opd_nb.training.rollouts import fit_prompt, rollout
from opd_nb.training.vllm_rollouts import VLLMRollouts, logprob_differences, parse_completion, rollout_function
from opd_nb.hosted.vllm_server import RolloutServerGone, StaleWeights, VLLMServer
from opd_nb.hosted.weight_transfer import WeightTransfer
from opd_nb.models.served_weights import served_weights
from opd_nb.lab import countdown
from servers import StoreSender, command_server, served, writing_server

ASKS = countdown.draw(6, 1)


def shaken(model, size, seed=0):
    "Other weights, of those that are trained."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad: p.add_(torch.randn(p.shape, generator=g) * size)


def with_adapter(lm):
    from peft import LoraConfig, get_peft_model
    return LM(get_peft_model(lm.model, LoraConfig(r=8, target_modules=['q_proj', 'k_proj', 'v_proj', 'o_proj'], lora_dropout=.3)), lm.codec, lm.path)


def test_what_a_row_is_given_does_not_depend_on_the_batch(tmp_path):
    lm = LM.load('tiny:student', dtype='float32')
    with writing_server('tiny:student') as (url, state):
        whole, halves = (VLLMRollouts(f'vllm:{url}', tmp_path / n) for n in 'ab')
        together = [r.ids for r in whole(lm, ASKS, 24, seed=3, step=2)]
        apart = [r.ids for k in (0, 3) for r in halves(lm, ASKS[k:k + 3], 24, seed=3, step=2, first_row=k)]
        assert together == apart != [r.ids for r in whole(lm, ASKS, 24, seed=3, step=3)]
        asked = [b for path, b in state.seen if path.endswith('completions')]
        assert {b['temperature'] for b in asked} == {1.} and all(b['stop_token_ids'] == list(lm.codec.stop_ids) and b['repetition_penalty'] == 1 for b in asked)


def test_another_server_is_refused_with_what_is_needed(tmp_path):
    "llama.cpp's server takes token ids and tells logprobs, but no ids, and no weights."
    pytest.importorskip('xllamacpp', reason="llama.cpp's server comes with the dev requirements")
    lm = LM.load('tiny:student', dtype='float32')
    with served('tiny:student') as (url, _):
        with pytest.raises(RolloutServerGone, match='VLLM_SERVER_DEV_MODE=1'): VLLMRollouts(f'vllm:{url}', tmp_path)(lm, ASKS, 8)
        with pytest.raises(RolloutServerGone, match='VLLM_ALLOW_RUNTIME_LORA_UPDATING=1'): VLLMRollouts(f'vllm:{url}', tmp_path)(with_adapter(lm), ASKS, 8)
        from opd_nb.training.vllm_rollouts import completion_request
        prompt = lm.codec.prompt(ASKS[0].prompt)
        answer, = VLLMServer(f'vllm:{url}').post(completion_request(prompt, lm.codec.stop_ids, 'any', 'a', 8, 0, 0, 0))
        with pytest.raises(BadInput, match='token ids'): parse_completion(answer, ASKS[0], prompt, lm.codec, 0)


def test_a_server_that_is_away_is_an_end_the_loop_knows(tmp_path):
    lm = LM.load('tiny:student', dtype='float32')
    with writing_server('tiny:student') as (url, _): pass
    writer = VLLMRollouts(f'vllm:{url}', tmp_path)
    writer.server.retries = 0
    with pytest.raises(TeacherGone, match='no connection'): writer(lm, ASKS, 8)


@pytest.mark.parametrize('spec', ['there', 'vllm:', 'vllm:localhost:8000', 'api:http://localhost:8000'])
def test_bad_addresses(spec, tmp_path):
    with pytest.raises(BadInput, match='rollouts'): rollout_function(OPDConfig(_env_file=None, rollouts=spec, output_dir=tmp_path))


ONE_OF_TWO = '''
import sys
from opd_nb.core.errors import BadInput
from opd_nb.core.distributed import on_main_process, process_state
state = process_state('cpu')
def work(): raise eval(sys.argv[1])
print(on_main_process(lambda: state.process_index + 7))
try: on_main_process(work)
except Exception as e: print(type(e).__name__, e)
'''


@pytest.mark.parametrize('error', ["OSError(28, 'No space left on device')", *(pytest.param(e, marks=slow) for e in ("BadInput('rollouts', 'vllm:', 'must be near', 'Look.')", "ValueError('id')"))])
def test_what_the_first_process_cannot_do_ends_all(error):
    "Any error, or the others would wait for ever."
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    env = os.environ | dict(WORLD_SIZE='2', LOCAL_WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), CUDA_VISIBLE_DEVICES='', PYTHONPATH=str(ROOT))
    both = [subprocess.Popen([sys.executable, '-c', ONE_OF_TWO, error], env=env | dict(RANK=str(r), LOCAL_RANK=str(r)), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) for r in range(2)]
    try: said = [p.communicate(timeout=60)[0] for p in both]
    finally: [p.kill() for p in both]
    assert said[0] == said[1] and said[0].startswith('7\n') and error.partition('(')[0] in said[0], said


def test_here_is_the_students_own_writing(tmp_path):
    assert rollout_function(OPDConfig(_env_file=None, output_dir=tmp_path)).func is rollout


@pytest.fixture(scope='module')
def vllm(tmp_path_factory):
    "A vLLM server of the embedded student. OPD_VLLM_PYTHON is the interpreter of an environment that has it. The head is saved untied: on a CPU vLLM keeps a packed copy of a tied one, which a reload does not renew."
    python = os.environ.get('OPD_VLLM_PYTHON') or pytest.skip('OPD_VLLM_PYTHON names no environment with vLLM')
    lm, folder = LM.load('tiny:student', dtype='float32'), tmp_path_factory.mktemp('untied')
    untied(lm.model)
    lm.model.save_pretrained(folder); lm.codec.tok.save_pretrained(folder)
    with command_server(python, '-m', 'vllm.entrypoints.openai.api_server', '--model', str(folder), '--port', '{port}', '--host', '127.0.0.1', '--dtype', 'float32', '--max-model-len', '512', '--enforce-eager', '--distributed-executor-backend', 'uni',
                        '--enable-lora', '--max-lora-rank', '16', '--max-loras', '2', patience=400, HF_HUB_OFFLINE='1', VLLM_NO_USAGE_STATS='1', VLLM_CPU_KVCACHE_SPACE='1', TORCHDYNAMO_DISABLE='1', VLLM_ENABLE_V1_MULTIPROCESSING='0',
                        VLLM_SERVER_DEV_MODE='1', VLLM_ALLOW_RUNTIME_LORA_UPDATING='1') as url: yield str(folder), url


def untied(model):
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.get_input_embeddings().weight.detach().clone())


@slow
@pytest.mark.parametrize('lora', [False, True], ids=['whole', 'lora'])
def test_vllm_follows_the_student(vllm, lora, tmp_path):
    folder, url = vllm
    lm = LM.load(folder, dtype='float32')
    VLLMRollouts(f'vllm:{url}', tmp_path / 'base').sync_weights(lm, 0)  # another test left other weights there, which the first batch would find
    if lora: lm = with_adapter(lm)
    writer, seen = VLLMRollouts(f'vllm:{url}', tmp_path, sync_every=2), []
    for step in range(4):
        rolled = writer(lm, ASKS, 24, seed=1, step=step)
        seen.append((rolled[0].version, logprob_differences(lm, rolled).abs().max().item()))
        assert all(len(r.logprobs) == len(r.ids) for r in rolled) and any(r.stopped for r in rolled)
        shaken(lm.model, .1 if lora else .02, step)
    assert [v for v, _ in seen] == [0, 0, 2, 2]
    assert max(d for _, d in seen[::2]) < 1e-4 < .1 < min(d for _, d in seen[1::2]), seen  # exact when new, and it shows when not
    assert [r.ids for r in writer(lm, ASKS, 24, seed=1, step=4)] == [r.ids for r in writer(lm, ASKS, 24, seed=1, step=4)]
    one_token = lm.codec.bytes.encode('=')[0][-1]
    stops = LM(lm.model, lm.codec, lm.path); kept = lm.codec.stop_ids
    try:
        lm.codec.stop_ids = (*kept, one_token)
        ended = writer(stops, ASKS, 24, seed=1, step=4)
        assert any(r.ids[-1] == one_token for r in ended) and all(one_token not in r.ids[:-1] for r in ended)
    finally: lm.codec.stop_ids = kept


@slow
def test_vllm_that_stays_behind_is_found_out(vllm, tmp_path, monkeypatch):
    "Somebody gives the server other weights after they were handed over; a copy of the base model writes in place of an adapter."
    folder, url = vllm
    lm = LM.load(folder, dtype='float32')
    writer = VLLMRollouts(f'vllm:{url}', tmp_path / 'a', sync_every=9)
    writer(lm, ASKS, 24)
    VLLMRollouts(f'vllm:{url}', tmp_path / 'b').sync_weights(lm, 0)
    with pytest.raises(StaleWeights, match='somebody else'): writer(lm, ASKS, 24, step=1)
    VLLMRollouts(f'vllm:{url}', tmp_path / 'base').sync_weights(lm, 0)
    adapted = with_adapter(lm)
    writer = VLLMRollouts(f'vllm:{url}', tmp_path / 'c')
    writer(adapted, ASKS, 24)
    shaken(adapted.model, .1)
    base = VLLMServer(f'vllm:{url}').get('/models')['data'][0]['id']
    monkeypatch.setattr('opd_nb.training.vllm_rollouts.push_weights', lambda *a: base)
    with pytest.raises(StaleWeights, match='differ by up to'): writer(adapted, ASKS, 24, step=1)


TWO = '''
import sys
from opd_nb.core.distributed import process_state
from opd_nb.models.lm import LM
from opd_nb.training.vllm_rollouts import VLLMRollouts, RolloutServerGone
from opd_nb.lab import countdown
state, (url, folder) = process_state('cpu'), sys.argv[1:]
mine = countdown.draw(6, 1)[state.process_index * 3:][:3]
writer = VLLMRollouts(f'vllm:{url}', folder)
for step in range(2): print('ids', state.process_index, step, [r.ids for r in writer(LM.load('tiny:student', dtype='float32', device='cpu'), mine, 8, step=step, first_row=state.process_index * 3)], flush=True)
try: VLLMRollouts('vllm:http://127.0.0.1:9', folder)(LM.load('tiny:student', device='cpu'), mine, 8)
except RolloutServerGone as e: print('end', state.process_index, e, flush=True)
'''


@slow
def test_two_processes_share_one_writer(tmp_path):
    "One hands over, both write; what they write is what one alone would get; an end reaches both."
    import subprocess, sys
    (tmp_path / 'two.py').write_text(TWO)
    with writing_server('tiny:student') as (url, state):
        done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2', '--standalone', str(tmp_path / 'two.py'), url, str(tmp_path)], capture_output=True, text=True, timeout=300, env=os.environ | dict(ACCELERATE_USE_CPU='true'))
        assert done.returncode == 0, done.stderr[-2000:]
        assert sum(p == '/collective_rpc' for p, _ in state.seen) == 2
        alone = VLLMRollouts(f'vllm:{url}', tmp_path / 'alone')(LM.load('tiny:student', dtype='float32'), ASKS, 8, step=1)
    said = sorted(line for line in done.stdout.splitlines() if line.startswith(('ids', 'end')))
    assert [line.split()[1] for line in said[:2]] == ['0', '1'] and all('does not take new weights' in line for line in said[:2]), said
    assert [said[3], said[5]] == [f'ids {k} 1 {[r.ids for r in alone[3 * k:3 * k + 3]]}' for k in range(2)]


def settings_of(url, folder, student, **settings):
    import json
    prompts = folder / 'puzzles.jsonl'
    if not prompts.exists(): prompts.write_text(''.join(json.dumps(dict(messages=list(c.prompt), metadata=c.metadata)) + '\n' for c in countdown.draw(40)))
    fixed = dict(student=student, teacher='tiny:', data=str(prompts), rollouts=f'vllm:{url}', sync_every=2, output_dir=folder / 'run', batch=8, max_new_tokens=16, max_steps=6, warmup_steps=0, learning_rate=2e-3, val_fraction=0.)
    return OPDConfig(_env_file=None, **fixed | settings)


def trained(url, folder, student, **settings):
    "Six steps by `train`, written by a server."
    from opd_nb.training.loop import train
    done = train(settings_of(url, folder, student, **settings), progress=False)
    return [e for e in done.events if e['event'] == 'step']


def follows(steps):
    assert len(steps) == 6 and not any(e['skipped'] for e in steps)
    assert [e['writer_lag'] for e in steps] == [0, 1] * 3
    fresh, old = [e['writer_gap'] for e in steps[::2]], [e['writer_gap'] for e in steps[1::2]]
    assert max(fresh) < 1e-4 < min(old) and all(.5 < e['importance_ratio'] < 2 for e in steps), (fresh, old)


@pytest.mark.parametrize('lora', [False, True], ids=['whole', 'lora'])
def test_a_run_whose_rollouts_a_server_writes(lora, tmp_path):
    with writing_server('tiny:student') as (url, state):
        follows(trained(url, tmp_path, 'tiny:student', lora=lora))
        assert sum(p.endswith(('load_lora_adapter', 'collective_rpc')) for p, _ in state.seen) >= 3 and len(state.models) == 1 + lora


def by_store(monkeypatch):
    "What sends the weights of a run, where there is no GPU."
    monkeypatch.setattr(VLLMRollouts, '__init__', functools.partialmethod(VLLMRollouts.__init__, sender=StoreSender))


@pytest.mark.parametrize('lora', [False, True], ids=['whole', 'lora'])
def test_a_run_whose_weights_are_transferred(lora, tmp_path, monkeypatch):
    "Nothing but the run's own files is on the disk; `auto` finds out that the server offers it."
    by_store(monkeypatch)
    with writing_server('tiny:student', transfer=True) as (url, state):
        follows(trained(url, tmp_path, 'tiny:student', lora=lora))
        paths = [path for path, _ in state.seen if not path.endswith('completions')]
        each = ['/pause?mode=wait', '/start_weight_update', '/update_weights', '/finish_weight_update', '/update_weight_version', '/resume']
        assert paths == ['/init_weight_transfer_engine', *each * 3] and not (tmp_path / 'run' / 'writer').exists()


def test_auto_takes_the_folder_and_says_why(tmp_path, caplog):
    "The server could take the weights over NCCL, and this process has no GPU."
    with writing_server('tiny:student', transfer=True) as (url, state):
        writer = VLLMRollouts(f'vllm:{url}', tmp_path)
        writer(LM.load('tiny:student', dtype='float32', device='cpu'), ASKS[:1], 8)
        assert 'the student is on the cpu' in caplog.text and state.seen[0][0] == '/collective_rpc' and writer.folder.exists()


def test_a_sender_that_fails_is_not_waited_for():
    class Failing(StoreSender):
        def __call__(self, weights):
            next(weights)
            raise OSError('the GPU has fallen off the bus')

    weights = served_weights(LM.load('tiny:student', dtype='float32').model)
    with writing_server('tiny:student', transfer=True) as (url, state):
        transfer = WeightTransfer(VLLMServer(f'vllm:{url}'), torch.device('cpu'), Failing)
        transfer.begin()
        with pytest.raises(RolloutServerGone, match='OSError here: the GPU has fallen off'): transfer.send(weights)
        assert state.paused


AHEAD = dict(staleness=1, sync_every=1, batch=4, max_new_tokens=12, max_steps=5, loss='trust')


def learnt(steps): return [{k: v for k, v in e.items() if 'seconds' not in k and not k.startswith('written_')} for e in steps]


def test_writing_goes_on_while_this_step_is_learnt(tmp_path):
    "The server writes nothing of step 2 before step 1 is over: a run that waited for it would never end. And it was asked before step 1 was over."
    from opd_nb.training.loop import train
    over, asked, found = threading.Event(), [], []
    with writing_server('tiny:student') as (url, state):
        def gate(body):
            if body['max_tokens'] < 20: return  # one that is read at once
            asked.append(body['seed'])
            if len(asked) > 4: assert over.wait(30)
        def show(event):
            if event['event'] != 'step': return
            found.append((event['step'], len(asked), event['writer_lag'], event.get('written_from', 0) < 0))
            over.set()
        state.gate = gate
        train(settings_of(url, tmp_path, 'tiny:student', **AHEAD | dict(max_steps=2, max_new_tokens=20)), progress=False, show=show)
    assert found == [(1, 8, 0, False), (2, 8, 1, True)] and len(set(asked)) == 8


@pytest.mark.parametrize('reply', [{}, {'choices': []}, {'choices': [3]}, None, [], {'choices': [{'token_ids': 5}]}])
def test_a_reply_of_odd_form_does_not_hinder_saving(reply, tmp_path):
    "Its step will say what is wrong; the checkpoint before it just has nothing that was written ahead."
    from concurrent.futures import Future
    from opd_nb.training.vllm_rollouts import Writing
    lm = LM.load('tiny:student', dtype='float32')
    writer, replies = VLLMRollouts('vllm:http://127.0.0.1:9', tmp_path), Future()
    replies.set_result([reply])
    writer.begun[1] = Writing(1, 0, [fit_prompt(lm.codec, ASKS[0], None)], replies)
    assert writer.state(1) == {}
    with pytest.raises((RolloutServerGone, BadInput)): writer._read(lm, writer.begun[1])


@pytest.mark.parametrize('stop', [2, pytest.param(4, marks=slow)])
def test_a_run_that_is_stopped_takes_the_same_steps(stop, tmp_path):
    "Also in what it learns from: the rollouts that were written ahead are in the checkpoint."
    with writing_server('tiny:student') as (url, state):
        whole = trained(url, tmp_path, 'tiny:student', output_dir=tmp_path / 'whole', **AHEAD)
        assert [e['writer_lag'] for e in whole] == [0, 1, 1, 1, 1] and all('ratio_max' in e for e in whole)
        def until(event):
            if event['step'] == stop: os.kill(os.getpid(), 2)
        from opd_nb.core.errors import Interrupted
        from opd_nb.training.loop import train
        with pytest.raises(Interrupted): train(settings_of(url, tmp_path, 'tiny:student', **AHEAD), progress=False, show=until)
        n_asked = sum(path.endswith('completions') for path, _ in state.seen)
        again = trained(url, tmp_path, 'tiny:student', resume=True, **AHEAD)
        assert learnt(again) == learnt(whole)
        assert sum(path.endswith('completions') for path, _ in state.seen) - n_asked == (5 - stop - 1) * 8  # those of the next step are not written again


def test_staleness_needs_a_server(tmp_path):
    from opd_nb.training.loop import train
    with pytest.raises(BadInput, match='staleness'): train(settings_of('', tmp_path, 'tiny:student', **AHEAD | dict(rollouts='here')), progress=False)


TWO_HALVES = '''
import sys
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from opd_nb.core.distributed import process_state
from opd_nb.training.vllm_rollouts import VLLMRollouts
from opd_nb.lab import countdown
from servers import StoreSender
from test_server_rollouts import student
state, (url, folder, sync, lora) = process_state('cpu'), sys.argv[1:]
mine = countdown.draw(6, 1)[state.process_index * 3:][:3]
lm = student(lora)
base = lm.model.get_base_model() if lora else lm.model
for layer in base.model.layers: fully_shard(layer, mesh=init_device_mesh('cpu', (2,)))
writer = VLLMRollouts(f'vllm:{url}', folder, sync=sync, sender=StoreSender)
for step in range(2): rolled = writer(lm, mine, 8, step=step, first_row=state.process_index * 3)
open(f'{folder}/said-{state.process_index}', 'w').write(str([r.ids for r in rolled]))
'''


def student(lora):
    "The same in each process."
    torch.manual_seed(0)
    lm = LM.load('tiny:student', dtype='float32', device='cpu')
    if lora: lm = with_adapter(lm)
    shaken(lm.model, .1 if lora else .02)
    return lm


@slow
@pytest.mark.parametrize('sync', ['disk', 'transfer'])
@pytest.mark.parametrize('lora', ['', 'lora'], ids=['whole', 'lora'])
def test_a_divided_student_is_put_together(sync, lora, tmp_path):
    "Two processes hold half of each layer. The server writes what the whole student would, and each process finds its own logprobs in it."
    (tmp_path / 'two.py').write_text(TWO_HALVES)
    with writing_server('tiny:student', transfer=True) as (url, _):
        env = os.environ | dict(ACCELERATE_USE_CPU='true', PYTHONPATH=os.pathsep.join(map(str, (ROOT, ROOT / 'tests', ROOT / 'tests' / 'training'))))
        done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2', '--standalone', str(tmp_path / 'two.py'), url, str(tmp_path), sync, lora], capture_output=True, text=True, timeout=300, env=env)
        assert done.returncode == 0, done.stderr[-3000:]
    with writing_server('tiny:student') as (url, _): alone = VLLMRollouts(f'vllm:{url}', tmp_path / 'alone')(student(lora), ASKS, 8, step=1)
    assert [(tmp_path / f'said-{k}').read_text() for k in range(2)] == [str([r.ids for r in alone[3 * k:3 * k + 3]]) for k in range(2)]


ONE_HALF_FAILS = TWO_HALVES.partition('for step in range(2)')[0] + '''
from opd_nb.core.distributed import all_gather
writer.server.retries, said = 0, 'nothing'
def ask(step): return writer(lm, mine, 24, step=step, first_row=state.process_index * 3)
ask(0)
try:
    writer.write_ahead(lm, mine, 24, step=1, now=0, first_row=state.process_index * 3)
    ask(1)
except Exception as e: said = type(e).__name__
open(f'{folder}/said-{state.process_index}', 'w').write(str([said, all_gather(state, [state.process_index])]))
'''


@slow
@pytest.mark.parametrize('most', [16, 24], ids=['probe', 'written ahead'])
def test_a_request_that_fails_in_one_process_ends_both(most, tmp_path):
    "The other process would wait for the failed one's half of a layer."
    (tmp_path / 'two.py').write_text(ONE_HALF_FAILS)
    lm, asked = student(''), []
    second = [fit_prompt(lm.codec, c, None).ids for c in ASKS[3:]]
    def gate(body):
        asked.append(body['max_tokens'])
        assert not (16 in asked and body['max_tokens'] == most and body['prompt'] in second), 'away'
    with writing_server('tiny:student') as (url, state):
        state.gate = gate
        env = os.environ | dict(ACCELERATE_USE_CPU='true', PYTHONPATH=os.pathsep.join(map(str, (ROOT, ROOT / 'tests', ROOT / 'tests' / 'training'))))
        done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2', '--standalone', str(tmp_path / 'two.py'), url, str(tmp_path), 'disk', ''], capture_output=True, text=True, timeout=120, env=env)
        assert done.returncode == 0, done.stderr[-3000:]
    assert [(tmp_path / f'said-{k}').read_text() for k in range(2)] == ["['RolloutServerGone', [0, 1]]"] * 2


@slow
@pytest.mark.parametrize('lora', [False, True], ids=['whole', 'lora'])
def test_a_run_whose_rollouts_vllm_writes(vllm, lora, tmp_path):
    folder, url = vllm
    VLLMRollouts(f'vllm:{url}', tmp_path / 'base').sync_weights(LM.load(folder, dtype='float32'), 0)
    follows(trained(url, tmp_path, folder, lora=lora))
