"`opd serve`: a real server on a free port, asked by real clients."
import base64
import http.client
import json
import logging
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip('uvicorn', reason='a server is needed: pip install "opd_nb[serve]"')

from opd_nb.alignment.chunks import align
from opd_nb.alignment.vocab import VocabMap
from opd_nb.core.config import OPDConfig
from opd_nb.core.errors import TeacherGone
from opd_nb.core.types import TopKSignal
from opd_nb.engines.batches import Limits
from opd_nb.engines.serve import Service, serving, student_of
from opd_nb.engines.translate import Translator
from opd_nb.lab import countdown
from opd_nb.losses.registry import get_loss
from opd_nb.models.lm import LM
from opd_nb.teachers.base import Unscored, load_teacher
from opd_nb.training.batch import read_and_align, score
from opd_nb.training.rollouts import rollout
from servers import padded, vllm_server

CONFIG = OPDConfig(_env_file=None, student='tiny:student', teacher='tiny:', device='cpu')
ROOMY = Limits(max_logprobs=480)
EVERY = 480   # tokens of the student


class Around:
    "A teacher with something changed."
    def __init__(self, inner): self.inner = inner
    def __getattr__(self, name): return getattr(self.inner, name)
    def split(self, conversations): return [(self, list(range(len(conversations))))]
    def score(self, conversations, completions, on_error='raise'): return self.inner.score(conversations, completions, on_error)
    def generate(self, conversations, max_new_tokens=128): return self.inner.generate(conversations, max_new_tokens)


class Lists(Around):
    "It lists its k most likely tokens, as an endpoint does."
    def __init__(self, inner, k=8):
        super().__init__(inner)
        self.k, self.capabilities = k, replace(inner.capabilities, access=frozenset({'topk', 'logprob'}), k=k)

    def score(self, *args, **kw):
        def lists(s):
            top = s.head(s.hidden).log_softmax(-1).topk(self.k)
            return TopKSignal(s.ids, s.ends, s.logprobs, top.indices, top.values)
        return [lists(s) for s in super().score(*args, **kw)]


class Waits(Around):
    "It works on a batch until it is told to go on."
    def __init__(self, inner): super().__init__(inner); self.busy, self.go_on, self.seen = threading.Event(), threading.Event(), 0
    def score(self, conversations, *args, **kw):
        self.seen += len(conversations)
        self.busy.set()
        assert self.go_on.wait(60)
        return super().score(conversations, *args, **kw)


class Raises(Around):
    def __init__(self, inner, error): super().__init__(inner); self.error = error
    def score(self, *args, **kw): raise self.error


@pytest.fixture(scope='module')
def student(): return student_of(CONFIG)[0]


@pytest.fixture(scope='module')
def teacher(): return load_teacher('tiny:', CONFIG)


@pytest.fixture(scope='module')
def noisy():
    "A student that spells as no tokenizer would, and what it sampled."
    lm = LM.load('tiny:student', dtype='float32', device='cpu')
    torch.manual_seed(0)
    for p in lm.model.parameters(): p.data += .1 * p.data.std() * torch.randn_like(p)
    return lm, [r for r in rollout(lm, countdown.draw(32), 20, temperature=1.2) if r.ids]


@pytest.fixture(scope='module')
def url(student, teacher):
    with serving(Service(Translator(student, teacher), 'tiny:student', ROOMY)) as url: yield url


def ask(url, body, path='/v1/completions', headers={}):
    "Status, JSON and headers of a reply."
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url + path, data, headers), timeout=120) as reply: return reply.status, json.loads(reply.read()), reply.headers
    except urllib.error.HTTPError as e: return e.code, json.loads(e.read()), e.headers


def sequence(r): return [*r.prompt_ids, *r.ids]


def lists_of(url, rollouts, k):
    "What stands at each position of the completions: [{id: logprob}], and how much of it is known."
    status, reply, _ = ask(url, dict(model='tiny:student', prompt=[sequence(r) for r in rollouts], max_tokens=1, temperature=1.0, prompt_logprobs=k, opd_details=True))
    assert status == 200, reply
    found, share = [], []
    for r, choice in zip(rollouts, reply['choices']):
        positions = choice['prompt_logprobs']
        assert positions[:len(r.prompt_ids)] == [None] * len(r.prompt_ids) and len(positions) == len(sequence(r))
        found += [{int(i): x['logprob'] for i, x in p.items()} for p in positions[len(r.prompt_ids):]]
        share += choice['opd']['share']
    return found, share


def as_one(p, tokens):
    "The student's log-probabilities: each id with all that spell the same."
    same = {}
    for i, text in enumerate(tokens.table): same.setdefault(text if len(text) and not tokens.is_special[i] else i, []).append(i)
    out = p.clone()
    for ids in same.values(): out[:, ids] = p[:, ids].logsumexp(-1, keepdim=True)
    return out, {i: ids for ids in same.values() for i in ids}


def forward_kl(said, share, p, tokens, pool=True):
    "[N] what a client makes of the lists: KL on them and on the tail, whose probability is at least 1e-9 for the student."
    pooled, same = as_one(p, tokens)
    if not pool: pooled, same = p, {i: [i] for i in range(EVERY)}
    values = []
    for listed, known, row, own in zip(said, share, pooled, p):
        taken = [j for i in listed for j in same[i]]
        tail, outside = max(0., 1 - sum(map(math.exp, listed.values()))), own.exp().index_fill(0, torch.tensor(taken, dtype=torch.long), 0).sum().clamp(min=1e-9).log().item()
        on_list = sum(math.exp(q) * (q - row[i].item()) for i, q in listed.items())
        values.append(known * (on_list + (tail * math.log(tail) if tail else 0) - tail * outside))
    return torch.tensor(values)


def top_lists_of(url, rollouts, k):
    "The same in SGLang's dialect, whose lists have nothing but the distribution."
    status, replies, _ = ask(url, dict(input_ids=[sequence(r) for r in rollouts], return_logprob=True, logprob_start_len=0, top_logprobs_num=k, opd_details=True), '/generate')
    assert status == 200, replies
    found = [{i: q for q, i, _ in x or ()} for r, reply in zip(rollouts, replies) for x in reply['meta_info']['input_top_logprobs'][len(r.prompt_ids):]]
    return found, [s for reply in replies for s in reply['meta_info']['opd']['share']]


def bpm_of(lm, teacher, rollouts):
    batch = read_and_align(lm, rollouts, score(teacher, rollouts).signals, VocabMap.build(lm.codec, teacher.codec))
    return get_loss('bpm', batch.vocab)(batch.student, batch.teacher, batch.alignment), batch.student.logits(slice(None)).log_softmax(-1).detach()


def check_loss(lm, teacher, rollouts, found, share, atol=1e-4):
    ours, p = bpm_of(lm, teacher, rollouts)
    rows = torch.as_tensor(ours.rows)
    assert [i for i, s in enumerate(share) if s > 0] == rows.tolist()
    torch.testing.assert_close(forward_kl(found, share, p, lm.codec.bytes)[rows], ours.values, atol=atol, rtol=0, check_dtype=False)
    # no client knows which ids spell the same: probability stands where a tokenizer would put it, so that it need not
    apart = forward_kl(found, share, p, lm.codec.bytes, pool=False)[rows].mean()
    assert abs(apart - ours.values.mean()) < .05 * ours.values.mean(), (apart, ours.values.mean())
    return len(rows), len(p)


def test_loss_from_the_lists_is_bpm(noisy, teacher, url):
    "Every student token listed: at each position the client's loss is ours."
    n, of = check_loss(noisy[0], teacher, noisy[1], *lists_of(url, noisy[1], EVERY))
    assert n > .6 * of > 200


def test_shorter_lists_are_the_beginning_of_longer_ones(noisy, url):
    "And the token that is there is always among them."
    every, _ = lists_of(url, noisy[1], EVERY)
    few, _ = lists_of(url, noisy[1], 4)
    ids = [i for r in noisy[1] for i in r.ids]
    for there, long, short in zip(ids, every, few):
        best = sorted(long, key=long.get, reverse=True)[:4]
        assert there in short and {i: long[i] for i in short} == short and {i for i in best if i in short} >= set(short) - {there}


def test_loss_from_a_teacher_that_lists_is_bpm(noisy, student, teacher):
    "The same k on both sides."
    listing = Lists(teacher)
    with serving(Service(Translator(student, listing), 'tiny:student', ROOMY)) as url:
        n, of = check_loss(noisy[0], listing, noisy[1], *top_lists_of(url, noisy[1], EVERY))
        assert n > .5 * of
        found, _ = lists_of(url, noisy[1], 1)  # what it does not list stands there by chunk credit
    assert all(i in x for x, i in zip(found, (i for r in noisy[1] for i in r.ids)))


def test_one_vocabulary_gives_the_teachers_own_rows(noisy, student):
    "Also where the student spelled as no tokenizer would: the teacher reads its very ids."
    same = load_teacher('tiny:student', CONFIG)
    with serving(Service(Translator(student, same), 'tiny:student', ROOMY)) as url: found, share = lists_of(url, noisy[1], EVERY)
    signals = score(same, noisy[1], own_ids=True).signals
    rows = torch.cat([s.head(s.hidden).log_softmax(-1) for s in signals])
    assert set(share) == {1.} and len(found) == len(rows)
    for listed, row in zip(found, rows):
        torch.testing.assert_close(torch.tensor(list(listed.values())), row[list(listed)], atol=1e-4, rtol=1e-5)
        assert len(listed) > 300


def test_chunk_credit_sums_to_the_teachers_log_likelihood(noisy, teacher, url):
    pairs = zip(noisy[1], score(teacher, noisy[1]).signals)
    several = [(r, s) for r, s in pairs if (align(r.ends, s.ends).student_len > 1).any() and len({*r.ends}) == len(r.ends)]  # tokens of a student share what is said of a chunk; one without text counts as impossible
    assert len(several) > 3
    tokens = noisy[0].codec.bytes
    for r, s in several[:8]:
        _, sglang, _ = ask(url, dict(input_ids=sequence(r), sampling_params=dict(temperature=0, max_new_tokens=0, skip_special_tokens=False), return_logprob=True, logprob_start_len=0), '/generate')
        pairs = sglang['meta_info']['input_token_logprobs']
        assert [i for _, i, _ in pairs] == sequence(r) and pairs[0][0] is None and {x for x, _, _ in pairs[1:len(r.prompt_ids)]} == {0.}
        # as slime and miles read it
        logprobs = torch.tensor([item[0] for item in pairs[1:]], dtype=torch.float32)[-len(r.ids):]
        no_text = sum(tokens.is_special[i] and i not in noisy[0].codec.stop_ids for i in r.ids)  # no teacher is asked about these
        assert abs(logprobs.sum() - s.logprobs.sum() - no_text * math.log(1e-9)) < 1e-3
        _, prime, _ = ask(url, dict(model='tiny:student', token_ids=sequence(r), sampling_params=dict(max_tokens=1, temperature=1.0, top_p=1.0, prompt_logprobs=True)), '/inference/v1/generate')
        read = [0. if x is None else next(iter(x.values()))['logprob'] for x in prime['prompt_logprobs']]
        torch.testing.assert_close(torch.tensor(read[len(r.prompt_ids):]), logprobs)


def test_thirty_two_clients_at_once(noisy, url):
    rows = (noisy[1] * 2)[:32]
    alone = [lists_of(url, [r], 3) for r in rows]
    with ThreadPoolExecutor(32) as pool: together = list(pool.map(lambda r: lists_of(url, [r], 3), rows))
    def numbers(said, r):
        "The three largest of each list, and the token that is there; of two that are as likely, to rounding, either may be listed."
        return torch.tensor([[*[*sorted(x.values(), reverse=True), -9, -9][:3], x[i]] for x, i in zip(said, r.ids)]).clamp(min=-9)
    for r, (a, _), (b, _) in zip(rows, alone, together): torch.testing.assert_close(numbers(a, r), numbers(b, r), atol=1e-3, rtol=0)
    assert not torch.allclose(*(numbers(x, r)[:3] for r, (x, _) in zip(rows, alone[:2])))


def raw(url, body, path='/v1/completions'):
    "A connection on which a request was sent, and nothing read."
    host, port = re.fullmatch(r'http://(.+):(\d+)', url).groups()
    connection = socket.create_connection((host, int(port)))
    data = json.dumps(body).encode()
    connection.sendall(f'POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n'.encode() + data)
    return connection


def metric(url, name):
    text = urllib.request.urlopen(url + '/metrics').read().decode()
    return sum(float(x) for x in re.findall(rf'^opd_serve_{name}(?:_total)?(?:{{.*}})? (\S+)$', text, re.M))


def until(true, seconds=30):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(.02)


def test_a_client_that_goes_away_is_not_worked_for(noisy, student, teacher):
    "The first is being scored, the second waits and goes, the third gets its reply."
    waits = Waits(teacher)
    body = dict(prompt=sequence(noisy[1][0]), prompt_logprobs=1)
    with serving(Service(Translator(student, waits), 's')) as url, ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, url, body)
        assert waits.busy.wait(60)
        gone = raw(url, dict(prompt=[sequence(r) for r in noisy[1][1:6]], prompt_logprobs=1))
        until(lambda: metric(url, 'waiting') == 6)
        gone.close()
        third = pool.submit(ask, url, body)
        until(lambda: metric(url, 'waiting') == 7)
        time.sleep(.1)
        waits.go_on.set()
        assert first.result()[0] == third.result()[0] == 200
        assert metric(url, 'abandoned') == 5 and waits.seen == 2 and metric(url, 'waiting') == 0


def test_too_many_are_told_to_come_again(noisy, student, teacher):
    waits = Waits(teacher)
    body = dict(prompt=sequence(noisy[1][0]), prompt_logprobs=1)
    with serving(Service(Translator(student, waits), 's', Limits(max_waiting=2))) as url, ThreadPoolExecutor(2) as pool:
        served = [pool.submit(ask, url, body)]
        assert waits.busy.wait(60)
        served.append(pool.submit(ask, url, body))
        until(lambda: metric(url, 'waiting') == 2)
        status, reply, headers = ask(url, body)
        assert status == 503 and headers['Retry-After'] == '1' and reply['error']['type'] == 'ServiceUnavailable'
        assert ask(url, dict(prompt=[body['prompt']] * 3, prompt_logprobs=1))[0] == 400  # which would never fit
        waits.go_on.set()
        assert [f.result()[0] for f in served] == [200, 200]
        assert ask(url, body)[0] == 200


def test_a_body_of_fifty_megabytes(noisy, url):
    status, reply, _ = ask(url, b' ' * 50_000_000)
    assert status == 413 and '16777216 bytes' in reply['error']['message']
    assert ask(url, dict(prompt=sequence(noisy[1][0]), prompt_logprobs=1))[0] == 200


GOOD = dict(prompt_logprobs=1)

@pytest.mark.parametrize('body, status, says', [
    (dict(GOOD, prompt=[1, 480]), 400, 'out of range: the student has 480'), (dict(GOOD, prompt=[1, -1]), 400, 'out of range'), (dict(GOOD, prompt=[2**70]), 400, 'out of range'),
    (dict(GOOD, prompt=[[1], []]), 400, '0 tokens'), (dict(GOOD, prompt=[]), 400, 'at least 1'), (dict(GOOD, prompt='Make 5.'), 400, 'prompt'), (dict(GOOD, prompt=[True]), 400, 'prompt'),
    (dict(GOOD, prompt=[1] * 40000), 400, 'tokens'), (dict(GOOD, prompt=[1], model='gpt'), 404, 'tiny:student'), (dict(prompt=[1], prompt_logprobs=481), 400, '480 logprobs'),
    (dict(GOOD, prompt=[5, 6, 7]), 400, '"messages"'), (dict(GOOD, prompt=[5], prompt_tokens=2), 400, '1 tokens'), (dict(GOOD, prompt=[[5], [5]], prompt_tokens=[1]), 400, 'one entry'),
    (dict(GOOD, prompt=[5], messages=[dict(role='user', content='Hi', name='x')]), 400, 'messages'), (dict(GOOD, prompt=[1], n=2), 400, 'n'), (dict(GOOD, prompt=[1], max_tokens=16), 400, 'max_tokens'),
    (b'{"prompt": [1]', 400, 'JSON'), (b'', 400, 'JSON'), (b'\xff\xfe{}', 400, 'UTF-8'), (b'{"a":' * 9999, 400, 'recursion'), (b'{"prompt": [NaN], "prompt_logprobs": 1}', 400, ''), (b'null', 400, 'object')])
def test_what_is_wrong_is_said(url, body, status, says):
    got, reply, headers = ask(url, body)
    assert got == status and reply['error']['code'] == status and says in reply['error']['message'], reply
    assert headers['Content-Type'] == 'application/json' and 'Traceback' not in str(reply) and len(str(reply)) < 700


def test_a_prompt_that_is_no_utf8(student, url):
    half = student.bytes.table.index(b'\xf0')
    status, reply, _ = ask(url, dict(prompt=[half, 40, 41], prompt_tokens=1, prompt_logprobs=1))
    assert status == 400 and 'no UTF-8' in reply['error']['message']


def test_other_paths_and_methods(url):
    assert ask(url, {}, '/v1/chat/completions')[0] == 404
    with pytest.raises(urllib.error.HTTPError, match='405'): urllib.request.urlopen(url + '/generate')
    assert json.loads(urllib.request.urlopen(url + '/health').read()) == dict(status='ok')
    assert json.loads(urllib.request.urlopen(url + '/v1/models').read())['data'][0]['id'] == 'tiny:student'


def test_a_key(noisy, student, teacher, caplog):
    "As a bearer token, or in the address; it stands in no log and no reply."
    body, key = dict(prompt=sequence(noisy[1][0]), prompt_logprobs=1), 'a-very-secret-key'
    def basic(x): return {'Authorization': 'Basic ' + base64.b64encode(x.encode()).decode()}
    with caplog.at_level(logging.DEBUG), serving(Service(Translator(student, teacher), 's', key=key)) as url:
        for headers in ({}, {'Authorization': 'Bearer wrong'}, {'Authorization': f'Bearer {key}x'}, {'Authorization': 'Bearer ü'}, {'Authorization': 'Basic %%%'}, basic('opd:wrong'), basic(key)):
            status, reply, _ = ask(url, body, headers={k: v.encode('latin-1') for k, v in headers.items()})
            assert status == 401 and key not in str(reply)
        for path in ('/v1/models', '/metrics'):
            with pytest.raises(urllib.error.HTTPError, match='401'): urllib.request.urlopen(url + path)
        assert urllib.request.urlopen(url + '/health').status == 200
        assert ask(url, body, headers={'Authorization': f'Bearer {key}'})[0] == ask(url, body, headers=basic(f'opd:{key}'))[0] == 200
    assert key not in caplog.text


@pytest.mark.parametrize('error, status', [(RuntimeError('/secret/path'), 500), (TeacherGone('m at https://host', 'is gone', 'Wait.'), 503)])
def test_what_goes_wrong_inside_stays_inside(noisy, student, teacher, error, status):
    with serving(Service(Translator(student, Raises(teacher, error)), 's')) as url:
        got, reply, headers = ask(url, dict(prompt=[sequence(r) for r in noisy[1][:2]], prompt_logprobs=1))
        assert got == status and not re.search('Traceback|secret|https', str(reply)) and (status == 500 or headers['Retry-After'])
        assert metric(url, 'waiting') == 0


def test_what_the_teacher_cannot_read(noisy, student, teacher):
    "vLLM's dialect has null for it, beside others that were scored; the other dialects cannot say it."
    short = Around(teacher)
    def score(conversations, completions, on_error='raise'):
        signals = teacher.score(conversations, completions, on_error)
        return [Unscored('record 0', '', 'has 99 tokens, but the context holds 9', 'Shorten it.', 'too_long') if len(c[0]) > 12 else s for c, s in zip(completions, signals)]
    short.score = score
    rows = [min(noisy[1], key=lambda r: len(r.data)), max(noisy[1], key=lambda r: len(r.data))]
    with serving(Service(Translator(student, short), 's')) as url:
        status, reply, _ = ask(url, dict(prompt=[sequence(r) for r in rows], prompt_logprobs=1))
        good, bad = reply['choices']
        assert status == 200 and bad['prompt_logprobs'] == [None] * len(sequence(rows[1])) and bad['opd']['left_out'] == 'too_long'
        assert None not in good['prompt_logprobs'][len(rows[0].prompt_ids):] and metric(url, 'left_out') == 1
        status, reply, _ = ask(url, dict(input_ids=sequence(rows[1]), return_logprob=True, logprob_start_len=0), '/generate')
        assert status == 422 and 'Shorten it' in reply['error']['message']


@pytest.mark.slow
def test_the_command(tmp_path):
    "It says where it listens, replies, and ends when it is told to."
    words = [sys.executable, '-m', 'opd_nb', 'serve', '--teacher', 'tiny:', '--student', 'tiny:student', '--port', '0', '--device', 'cpu']
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path, env=os.environ | dict(OPD_SERVE_KEY='k' * 20)) as process:
        try:
            lines = [process.stdout.readline() for _ in range(3)]
            url = re.search(r'http://\S+', lines[-1])[0]
            until(lambda: subprocess.run([sys.executable, '-c', f'import urllib.request; urllib.request.urlopen("{url}/health")'], capture_output=True).returncode == 0)
            assert ask(url, dict(prompt=[1], prompt_logprobs=1))[0] == 401
            process.send_signal(signal.SIGTERM)
            rest = process.stdout.read()
            assert process.wait(30) in (0, 143, -15) and 'Traceback' not in rest and 'k' * 20 not in ''.join(lines) + rest, rest
        finally: process.kill()


@pytest.mark.slow
@pytest.mark.parametrize('beta, k', [(0., 16), (.5, 1)])
def test_trls_server_trainer_learns(beta, k, url, monkeypatch, tmp_path):
    "TRL's own ServerDistillationTrainer, whose teacher is `opd serve`. Of vLLM it only asks whether it is installed."
    pytest.importorskip('trl')
    datasets = pytest.importorskip('datasets')
    import trl.generation.vllm_client as client
    from trl.experimental.server_distillation import ServerDistillationConfig, ServerDistillationTrainer
    monkeypatch.setattr(client, 'is_vllm_available', lambda *a, **kw: True)
    lm = LM.load('tiny:student', dtype='float32', device='cpu')
    torch.manual_seed(0)
    for p in lm.model.parameters(): p.data += .1 * p.data.std() * torch.randn_like(p)
    prompts = datasets.Dataset.from_list([dict(prompt=c.prompt) for c in countdown.draw(512)])
    args = ServerDistillationConfig(output_dir=str(tmp_path), teacher_model_server_url=url, beta=beta, loss_top_k=k, max_steps=60, per_device_train_batch_size=16, learning_rate=2e-3, max_completion_length=24,
                                    use_cpu=True, bf16=False, report_to='none', logging_steps=1, save_strategy='no', gradient_checkpointing=False, lr_scheduler_type='constant', disable_tqdm=True, seed=0)
    trainer = ServerDistillationTrainer(lm.model, args=args, train_dataset=prompts, processing_class=lm.codec.tok)
    trainer.train()
    losses = [e['loss'] for e in trainer.state.log_history if 'loss' in e]
    first, last = (sum(x) / len(x) for x in (losses[:8], losses[-8:]))
    print(f'beta {beta}, lists of {k}: loss {first:.3f} -> {last:.3f}', [round(x, 3) for x in losses[::4]])
    assert len(losses) == 60 and all(map(math.isfinite, losses)) and last < (.85, .96)[beta > 0] * first


@pytest.mark.slow
def test_with_one_vocabulary_it_says_what_vllm_says(tmp_path):
    "A real vLLM and `opd serve` with the same weights, asked the same. OPD_VLLM_PYTHON is the interpreter of an environment that has vLLM."
    python = os.environ.get('OPD_VLLM_PYTHON') or pytest.skip('OPD_VLLM_PYTHON names no environment with vLLM')
    folder = str(padded('tiny:teacher', tmp_path / 'model'))
    config = OPDConfig(_env_file=None, student=folder, teacher=f'hf:{folder}', device='cpu', dtype='float32', teacher_dtype='float32')
    lm = LM.load(folder, dtype='float32', device='cpu')
    rolled = [r for r in rollout(lm, countdown.draw(8), 20, temperature=1.2) if r.ids]
    body = dict(model=folder, prompt=[sequence(r) for r in rolled], max_tokens=1, temperature=1.0, prompt_logprobs=16)
    with vllm_server(python, folder) as url: status, theirs, _ = ask(url, body, '/completions', {'Content-Type': 'application/json'})
    assert status == 200, theirs
    with serving(Service(Translator(student_of(config)[0], load_teacher(config.teacher, config)), folder, ROOMY)) as url: status, ours, _ = ask(url, body)
    assert status == 200 and set(ours) - {'opd'} <= set(theirs) and ours['object'] == theirs['object'] and ours['usage']['prompt_tokens'] == theirs['usage']['prompt_tokens']
    far, positions, ranks = 0, 0, 0
    for r, a, b in zip(rolled, ours['choices'], theirs['choices'], strict=True):
        assert len(a['prompt_logprobs']) == len(b['prompt_logprobs']) == len(sequence(r)) and set(a) - {'opd'} <= set(b)
        for i, x, y in list(zip(r.ids, a['prompt_logprobs'][len(r.prompt_ids):], b['prompt_logprobs'][len(r.prompt_ids):])):
            assert str(i) in x and str(i) in y and set(x[str(i)]) == set(y[str(i)]), (x, y)
            shared = x.keys() & y.keys()
            assert len(shared) >= min(len(x), len(y)) - 1  # the last of the list may be a tie
            far = max([far, *(abs(x[j]['logprob'] - y[j]['logprob']) for j in shared)])
            ranks += x[str(i)]['rank'] == y[str(i)]['rank']
            assert x[str(i)]['decoded_token'] == y[str(i)]['decoded_token']
            positions += 1
    print(f'{positions} positions: log-probabilities within {far:.1e} nats, the same rank of the token that is there at {ranks}')
    assert far < 1e-3 and ranks > .98 * positions
