"""Synthesis against a real OpenAI-compatible server, through a proxy that fails in ten ways, and after kill -9."""
import collections, http.client, importlib.util, json, os, random, select, signal, socket, struct, subprocess, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from conftest import slow
from opd_nb.core.errors import BadInput
from opd_nb.data.replies import Replies
from opd_nb.data.generate import SyntheticDataGenerator
from opd_nb.data.filters import clean
from opd_nb.data.dataset import SynthSettings, synthesize
from opd_nb.lab import countdown
from test_runs import cut_off, papermill

PUZZLES = dict(countdown=countdown.draw)
STEP = '[0-9]{1,3}[-+*/][0-9]{1,3}=[0-9]{1,3}'
STEPS = dict(pattern=f'^{STEP}( {STEP}){{1,2}}$')       # answers in the form of the game
WORDS = dict(pattern='^[a-z]{2,8}( [a-z]{2,8}){3,8}$')  # the embedded model knows no prose: words to look at
SERVER = '''
import signal, sys
import xllamacpp as x
p = x.CommonParams(); p.model.path = sys.argv[1]; p.hostnames = ['127.0.0.1']; p.port = int(sys.argv[2])
p.n_ctx = 8192; p.n_parallel = 4; p.warmup = False; p.cache_ram_mib = 0
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 1  # more would wait for each other, busily
server = x.Server(p); print('ready', flush=True); signal.pause()
'''
FAULTS = ('429 retry-after', '429', '500', 'reset', 'hang', 'body', 'truncated', 'schema', 'empty', 'refusal')


def free_port():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]


@pytest.fixture(scope='module')
def llama(tmp_path_factory):
    "llama.cpp's server with the embedded teacher, its window widened; the port."
    for module in ('xllamacpp', 'gguf', 'opd_nb.tools.export_gguf'):
        if not importlib.util.find_spec(module): pytest.skip(f'needs {module}')
    from opd_nb.tools.export_gguf import export_gguf
    from opd_nb.models.lm import LM
    folder, port = tmp_path_factory.mktemp('llama'), free_port()
    lm = LM.load('tiny:teacher', dtype='float32', device='cpu')
    lm.model.config.max_position_embeddings = 4096
    export_gguf(lm, folder / 'tiny.gguf', 'f32')
    with open(folder / 'log', 'w') as log: process = subprocess.Popen([sys.executable, '-c', SERVER, str(folder / 'tiny.gguf'), str(port)], stdout=subprocess.PIPE, stderr=log, text=True)
    assert process.stdout.readline() == 'ready\n', (folder / 'log').read_text()[-2000:]
    yield port
    process.kill(); process.wait()


class Proxy(ThreadingHTTPServer):
    "Passes requests on, and spoils a share of them. Its ledger holds what was delivered, by request."
    daemon_threads, request_queue_size = True, 64

    def __init__(self, upstream, share, seed=0):
        super().__init__(('127.0.0.1', 0), Handler)
        self.upstream, self.share, self.rng, self.lock, self.seen = upstream, share, random.Random(seed), threading.Lock(), collections.Counter()
        self.ledger, self.keys, self.over = [], set(), threading.Event()
        self.url = f'http://127.0.0.1:{self.server_port}/v1'
        threading.Thread(target=self.serve_forever, kwargs=dict(poll_interval=.05), daemon=True).start()

    def handle_error(self, request, address): pass  # a client that hung up

    def stop(self): self.over.set(); self.shutdown(); self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    def log_message(self, *words): pass

    def reply(self, status, body, cut=False, **headers):
        self.send_response(status)
        for k, v in dict(headers, **{'Content-Type': 'application/json', 'Content-Length': str(len(body))}).items(): self.send_header(k.replace('_', '-'), v)
        self.end_headers()
        self.wfile.write(body[:len(body) // 2] if cut else body); self.wfile.flush()
        if cut:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
            self.connection.close(); self.close_connection = True

    def do_POST(self):
        proxy, sent = self.server, self.rfile.read(int(self.headers['Content-Length']))
        key = self.headers.get('Authorization', '').removeprefix('Bearer ')
        if self.path.startswith('/denied'): return self.reply(401, json.dumps(dict(error=dict(message=f'Incorrect API key provided: {key}'))).encode())
        with proxy.lock:
            proxy.keys.add(key)
            fault = proxy.rng.choice(FAULTS) if proxy.rng.random() < proxy.share else 'none'
            if fault == 'hang' and proxy.seen[fault] == 4: fault = '500'  # each takes as long as a client's patience
            proxy.seen[fault] += 1
        error = json.dumps(dict(error=dict(message='no'))).encode()
        if fault == '429 retry-after': return self.reply(429, error, Retry_After='0.2')
        if fault in ('429', '500'): return self.reply(int(fault), error)
        if fault == 'hang': proxy.over.wait(60); self.close_connection = True; return
        up = http.client.HTTPConnection('127.0.0.1', proxy.upstream, timeout=60)
        up.request('POST', self.path, sent, {'Content-Type': 'application/json'})
        answer = up.getresponse(); body, status = answer.read(), answer.status
        up.close()
        if fault == 'reset': return self.reply(status, body, cut=True)
        if fault == 'body': return self.reply(status, body[:len(body) // 2])
        if status == 200:
            got = json.loads(body); message = got['choices'][0]['message']
            if fault == 'truncated': message['content'] = message['content'][:-4]
            if fault == 'schema': message['content'] = '{"reply": "yes"}'
            if fault == 'refusal': message.update(content=None, refusal='I will not.')
            if fault == 'empty': got['choices'] = []
            body = json.dumps(got).encode()
            if select.select([self.connection], [], [], 0)[0]: self.close_connection = True; return  # the client lost patience meanwhile
            with proxy.lock: proxy.ledger.append((sent, got['usage']['prompt_tokens'], got['usage']['completion_tokens']))
        self.reply(status, body)


@pytest.fixture
def proxy(llama):
    made = []
    def make(share, seed=0): made.append(Proxy(llama, share, seed)); return made[-1]
    yield make
    for p in made: p.stop()


def generator(out, url, domain='countdown', limits=STEPS, **options):
    return SyntheticDataGenerator('openai', 'tiny', out, domain, questions=PUZZLES, **dict(base_url=url, limits=limits, max_tokens=400, timeout=5, per_million=(1, 2), concurrency=8) | options)


def spent(ledger): return sum(i * 1e-6 + o * 2e-6 for _, i, o in ledger)


@pytest.mark.parametrize('domain, limits, n', [('countdown', STEPS, 60), ('general', WORDS, 30)])
def test_endpoint_end_to_end(llama, tmp_path, domain, limits, n):
    "N asked for, N valid, four fifths kept; and the estimate from ten rows is within a quarter of the tokens counted."
    g = generator(tmp_path, f'http://127.0.0.1:{llama}/v1', domain, limits, timeout=30, question_model='asker')  # the server takes any name
    plan = g.mixture(n)
    g.generate(plan[:10])
    expected = g.estimate(plan)
    made = g.generate(plan)
    assert (len(made.records), made.aside, made.pending) == (n, [], 0)
    assert len(clean(made.records).kept) >= .8 * n
    counted = made.total['input_tokens'] + made.total['output_tokens']
    assert abs(expected.input_tokens + expected.output_tokens - counted) < .25 * counted and expected.requests == made.total['replies']
    assert abs(expected.dollars - made.total['dollars']) < .25 * made.total['dollars']
    for c, row in zip(made.records, plan.to_dict('records')):
        assert [m['role'] for m in c.messages] == ['user', 'assistant'] * row['turns']
        assert {'model', 'question_model', 'prompts', 'seed', 'time', 'input_tokens', 'output_tokens', 'dollars', 'kind', 'topic'} <= set(c.metadata)
    assert {(c.metadata['question_model'], c.metadata['model']) for c in made.records} == {('given' if domain == 'countdown' else 'asker', 'tiny')}
    assert abs(sum(c.metadata['dollars'] for c in made.records) - made.total['dollars']) < 1e-9
    print(f'{made}; kept {len(clean(made.records).kept)}; estimated {expected.input_tokens + expected.output_tokens} tokens, counted {counted}')


def test_ten_kinds_of_failure(proxy, tmp_path):
    "Five hundred requests, three in ten spoiled: each record arrives or is set aside with a reason, none twice, each reply is counted once."
    bad = proxy(.3)
    g = generator(tmp_path, bad.url)
    plan = g.mixture(500)
    made = g.generate(plan)
    print(made, dict(bad.seen))
    assert all(bad.seen[f] > 2 for f in FAULTS), bad.seen
    rows = [c.metadata['row'] for c in made.records] + [a['row'] for a in made.aside]
    assert sorted(rows) == list(range(500)) and made.pending == 0
    assert all(a['why'] for a in made.aside) and any('refused' in a['why'] for a in made.aside)
    assert (made.total['replies'], made.total['input_tokens']) == (len(bad.ledger), sum(i for _, i, _ in bad.ledger))
    assert abs(made.total['dollars'] - spent(bad.ledger)) < 1e-9
    bad.share = 0
    before, again = len(bad.ledger), [a for a in made.aside if a['again']]
    resumed = g.generate(plan)
    assert len(bad.ledger) - before <= 2 * len(again) and not [a for a in resumed.aside if a['again']]
    assert len(resumed.records) + len(resumed.aside) == 500 and resumed.records != [] and {c.metadata['row'] for c in made.records} <= {c.metadata['row'] for c in resumed.records}


def command(out, url, *words):
    return ['synth', '--backend', 'openai', '--model', 'tiny', '--domain', 'countdown', '--out', str(out), '--base-url', url, '--limits', json.dumps(STEPS),
            '--prices', '1,2', '--max-tokens', '100', '--timeout', '5', '--concurrency', '8', '--key', 'PLANTED', *words]


def test_killed_in_the_middle(proxy, tmp_path):
    "kill -9 loses what was in flight. Nothing else is paid for again, and the planted key is in nothing that was written."
    bad, key, out = proxy(.3, seed=1), 'sk-planted-0123456789abcdef', tmp_path / 'out'
    run = [sys.executable, '-c', 'import sys; from opd_nb.cli.app import main; sys.exit(main())', *command(out, bad.url, '--n', '300', '--options', json.dumps(dict(extra_headers={'X-Key': key})))]
    env = dict(os.environ, PLANTED=key)
    with open(tmp_path / 'first.log', 'w') as log: first = subprocess.Popen(run, cwd=tmp_path, env=env, stdout=log, stderr=log)
    until = time.monotonic() + 60
    while len(bad.ledger) < 120 and first.poll() is None and time.monotonic() < until: time.sleep(.02)
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -9, (tmp_path / 'first.log').read_text()
    time.sleep(.5)
    store = Replies(out); kept = store.total()['replies']; store.close()
    delivered = len(bad.ledger)
    assert 100 < kept <= delivered <= kept + 8
    done = subprocess.run(run, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    store = Replies(out); total = store.total(); store.close()
    assert total['replies'] == len(bad.ledger) - (delivered - kept)
    twice = [k for k, n in collections.Counter(sent for sent, _, _ in bad.ledger).items() if n > 1]
    assert len(twice) <= 8 + bad.seen['empty'] + bad.seen['refusal']
    records, lost = json.loads((out / 'combined_300.json').read_text())['conversations'], [json.loads(line) for line in (out / 'dropped_300.jsonl').read_text().splitlines()]
    rows = [c['metadata']['row'] for c in records] + [r.get('row', r.get('metadata', {}).get('row')) for r in lost]
    print(f'{len(records)} records, {len(lost)} lost; {delivered} replies delivered at the kill, {kept} of them kept, {len(bad.ledger)} delivered in all, {total["replies"]} paid for once; {dict(bad.seen)}')
    assert sorted(rows) == list(range(300)) and all(r['why'] for r in lost)
    assert bad.keys == {key}
    said = [done.stdout, done.stderr, (tmp_path / 'first.log').read_text()]
    assert not [p for p in tmp_path.rglob('*') if p.is_file() and key.encode() in p.read_bytes()] and not any(key in s for s in said)


def test_refused_key_is_not_repeated(proxy, tmp_path, monkeypatch):
    "An endpoint that quotes the key back ends the run at once, and the message does not hold it."
    monkeypatch.setenv('PLANTED', 'sk-planted-0123456789abcdef')
    g = generator(tmp_path, proxy(0).url.replace('/v1', '/denied/v1'), key='PLANTED')
    with pytest.raises(BadInput, match=r'Incorrect API key provided: \*\*\*') as e: g.generate(g.mixture(30))
    assert 'planted' not in str(e.value)


def test_cap_in_dollars(proxy, tmp_path):
    "The cap holds with many requests under way, and a higher one goes on."
    good = proxy(0)
    g = generator(tmp_path, good.url, max_tokens=60)
    plan = g.mixture(60)
    made = g.generate(plan, cap=.001)
    assert 0 < made.total['dollars'] <= .001 and made.pending > 0 and not made.aside
    more = g.generate(plan, cap=1)
    assert len(more.records) == 60 and more.records[:1] == made.records[:1] and abs(more.total['dollars'] - spent(good.ledger)) < 1e-9
    with pytest.raises(BadInput, match='prices'): generator(tmp_path / 'x', good.url, per_million=None).generate(plan, cap=1)


def test_offline(tmp_path):
    "The commands of the README, with no network at all."
    wrap, code = cut_off(), 'import sys; from opd_nb.cli.app import main; sys.exit(main("synth --backend local --teacher tiny: --n 50 --out data".split()) or main("validate data/combined_50.json --teacher tiny: --n 20".split()))'
    done = subprocess.run([*wrap, sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and 'verdict: good' in done.stdout, done.stderr[-2000:]
    if not wrap: pytest.skip('works, but this machine cannot take the network away (unshare, ip)')


def test_run_notebooks(tmp_path):
    "synthesize, then validate what it made."
    done = papermill(tmp_path, '-p', 'n', '30', notebook='synthesize')
    assert done.returncode == 0, done.stderr[-2000:]
    m = json.loads((tmp_path / 'metrics.json').read_text())
    assert m['made'] == m['replies'] == 30 and m['kept'] + sum(m['dropped'].values()) == 30
    (tmp_path / 'v').mkdir()
    done = papermill(tmp_path / 'v', '-p', 'data', str(tmp_path / 'combined_30.json'), '-p', 'n', '20', notebook='validate')
    assert done.returncode == 0, done.stderr[-2000:]
    m = json.loads((tmp_path / 'v' / 'metrics.json').read_text())
    assert m['records'] == 20 and m['answer'] == 1 and 0 < m['topk'] < 1


def test_trl_reads_it(tmp_path):
    pytest.importorskip('trl'); datasets = pytest.importorskip('datasets')
    from trl.data_utils import is_conversational, maybe_apply_chat_template
    from opd_nb.models.lm import LM
    done = synthesize(SynthSettings(out=tmp_path, n=5, max_tokens=48), PUZZLES)
    rows = datasets.load_dataset('json', data_files=str(done.files['jsonl']), split='train', cache_dir=str(tmp_path / 'cache'))
    assert is_conversational(rows[0])
    text = maybe_apply_chat_template(rows[0], LM.load('tiny:student').codec.tok)['text']
    assert done.cleaned.kept[0].reference in text


GRAMMAR = dict(grammar='root ::= [a-z]{2,8} (" " [a-z]{2,8}){3,6}')  # for data-designer, which sends no schema of ours


@slow
def test_nemo_end_to_end(proxy, tmp_path, monkeypatch):
    "data-designer makes the plan on the same kind of server, asks for nothing twice when it is run again, and writes no key."
    pytest.importorskip('data_designer', reason="needs data-designer: pip install '.[nemo]'")
    good, key = proxy(0), 'sk-planted-0123456789abcdef'
    monkeypatch.setenv('PLANTED', key)
    g = SyntheticDataGenerator('nemo', 'tiny', tmp_path, 'general', base_url=good.url, key='PLANTED', max_tokens=40, options=GRAMMAR)
    plan = g.mixture(20)
    made = g.generate(plan)
    assert len(made.records) == 20 and not made.aside and good.keys == {key} and made.total['dollars'] is None
    for c, row in zip(made.records, plan.to_dict('records')): assert [m['role'] for m in c.messages] == ['user', 'assistant'] * row['turns'] and c.metadata['row'] == row['row']
    paid = len(good.ledger)
    assert g.generate(plan).records != [] and len(good.ledger) == paid
    assert not [p for p in tmp_path.rglob('*') if p.is_file() and key.encode() in p.read_bytes()]
    with pytest.raises(BadInput, match='cap'): g.generate(plan, cap=1)


@slow
def test_nemo_run_notebook(llama, tmp_path):
    "The run notebook synthesize, with data-designer."
    pytest.importorskip('data_designer', reason="needs data-designer: pip install '.[nemo]'")
    done = papermill(tmp_path, '-p', 'n', '12', '-p', 'backend', 'nemo', '-p', 'model', 'tiny', '-p', 'domain', 'general', '-p', 'base_url', f'http://127.0.0.1:{llama}/v1', '-p', 'max_tokens', '40', '-p', 'options', json.dumps(GRAMMAR), notebook='synthesize')
    assert done.returncode == 0, done.stderr[-2000:]
    m = json.loads((tmp_path / 'metrics.json').read_text())
    assert (m['backend'], m['made'], m['set_aside'], m['dollars']) == ('nemo', 12, 0, None) and m['kept'] + sum(m['dropped'].values()) == 12, m
    assert len(json.loads((tmp_path / 'combined_12.json').read_text())['conversations']) == m['kept']
