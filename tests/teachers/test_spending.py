"The spending limit counts what was paid before: by this process, by others, for replies that were of no use."
import json
import sqlite3
import subprocess
import sys
import threading
import time

import pytest

from opd_nb.data.generate import SyntheticDataGenerator
from opd_nb.data.replies import Replies
from opd_nb.hosted.client import Endpoint, Request
from opd_nb.hosted.pricing import BudgetReached, TeacherGone
from opd_nb.hosted.store import ReplyStore
from servers import Handler, http_server

USAGE = dict(prompt_tokens=1000, completion_tokens=0)  # a cent, at ten dollars a million
USELESS = json.dumps('no object').encode()


@pytest.fixture
def server():
    "Counts its requests; every reply costs a cent, what is asked for as bad is no object."
    class Server(Handler):
        paid, lock = [], threading.Lock()
        def do_POST(self):
            body = json.loads(self.body())
            with self.lock: self.paid.append(body)
            name = (body.get('response_format') or {}).get('json_schema', {}).get('name')
            content = '{"reply": "?"}' if 'bad' in json.dumps(body) else json.dumps({name or 'answer': 'x'})
            reply = dict(choices=[dict(message=dict(content=content), finish_reason='stop')], usage=USAGE)
            self.send(200, USELESS if body.get('prompt') == 'bad' else reply)
    with http_server(Server) as url: yield f'{url}/v1', Server.paid


def asked(url, file, first, n, model='m', max_dollars=.1, price='10,10', what=None, **options):
    "Ask so many questions; the error, if there was one."
    endpoint = Endpoint(url, model, cache=ReplyStore(file), price=price, max_dollars=max_dollars, retries=0, concurrency=1, **options)
    requests = [Request('/completions', dict(prompt=what or f'{model} {i}', n=i), 1000, 0) for i in range(first, first + n)]
    try: endpoint.run([endpoint.ask(r) for r in requests])
    except TeacherGone as e: return e
    finally: endpoint.close()


def test_a_restart_does_not_begin_anew(server, tmp_path):
    "With the limit reached, the same command sends nothing; with a higher one it goes on."
    url, paid = server
    assert isinstance(asked(url, tmp_path / 'a', 0, 30), BudgetReached) and len(paid) == 10
    for _ in range(3): assert isinstance(asked(url, tmp_path / 'a', 0, 30), BudgetReached)
    assert len(paid) == 10
    error = asked(url, tmp_path / 'a', 0, 30, max_dollars=.15)
    assert isinstance(error, BudgetReached) and len(paid) == 15 and '$0.1500' in str(error)
    assert asked(url, tmp_path / 'a', 0, 30, max_dollars=1.) is None and len(paid) == 30


def test_two_at_once_share_the_limit(server, tmp_path):
    "In one process: what one has paid, the other knows before its next request."
    url, paid = server
    each = [Endpoint(url, 'm', cache=ReplyStore(tmp_path / 'a'), price='10,10', max_dollars=.1, concurrency=1) for _ in range(2)]
    reached = 0
    for i in range(40):
        try: each[i % 2].run([each[i % 2].ask(Request('/completions', dict(prompt=str(i)), 1000, 0))])
        except BudgetReached: reached += 1
    assert (len(paid), reached) == (10, 30)
    for endpoint in each: endpoint.close()


PROCESS = '''
import sys
from opd_nb.hosted.client import Endpoint, Request
from opd_nb.hosted.store import ReplyStore
url, file, name = sys.argv[1:]
endpoint = Endpoint(url, 'm', cache=ReplyStore(file), price='10,10', max_dollars=.1, concurrency=8, retries=0)
print('ready', flush=True)
sys.stdin.readline()
endpoint.run([endpoint.ask(Request('/completions', dict(prompt=f'{name} {i}'), 1000, 0)) for i in range(30)])
'''


def started(url, file, names):
    "Processes that begin when all of them are there."
    running = [subprocess.Popen([sys.executable, '-c', PROCESS, url, str(file), name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) for name in names]
    for p in running: p.stdout.readline()
    for p in running: p.stdin.write(b'now\n'); p.stdin.flush()
    return running


@pytest.fixture
def slow_server(server, monkeypatch):
    "A server whose replies take a moment, so that many requests are under way at once."
    answer = Handler.send
    monkeypatch.setattr(Handler, 'send', lambda *a, **k: (time.sleep(.2), answer(*a, **k)))
    return server


def test_processes_share_the_limit(slow_server, tmp_path):
    "Two at once, each with eight requests under way: together they pay for ten, and not for one more."
    url, paid = slow_server
    for p in started(url, tmp_path / 'a', 'ab'): p.communicate()
    assert len(paid) == 10 and sorted(body['prompt'][0] for body in paid) != ['a'] * 10
    assert ReplyStore(tmp_path / 'a').run('SELECT * FROM reserved') == []
    assert [p.name for p in tmp_path.iterdir() if len(p.name) > 9] == []


def test_a_killed_process_sets_nothing_aside(tmp_path):
    "Its requests were not paid for, as far as anybody knows; what it had set aside is free again."
    class Hang(Handler):
        seen = []
        def do_POST(self):
            self.seen.append(self.body())
            time.sleep(1.5)
            self.close_connection = True
    with http_server(Hang) as url:
        process, = started(f'{url}/v1', tmp_path / 'a', 'a')
        while len(Hang.seen) < 8: time.sleep(.02)
        store = ReplyStore(tmp_path / 'a')
        assert store.reserve('m', .05, .1) is None
        process.kill()
        process.communicate()
        assert store.reserve('m', .05, .1) is not None
        assert store.run('SELECT count(*) FROM reserved') == [(1,)]


def test_a_request_waits_for_one_of_another_process(server, tmp_path):
    "What may be free again soon does not end a run."
    url, paid = server
    other = ReplyStore(tmp_path / 'a')
    held = other.reserve('m', .095, .1)
    threading.Timer(.5, lambda: other.settle('m', held, 0.)).start()
    assert asked(url, tmp_path / 'a', 0, 3) is None and len(paid) == 3


def test_replies_of_no_use_were_paid_for(server, tmp_path):
    "They are not kept, and they count."
    url, paid = server
    for _ in range(4): asked(url, tmp_path / 'a', 0, 3, what='bad')
    bad = len(paid)
    assert bad >= 4 and len(ReplyStore(tmp_path / 'a')) == 0
    assert isinstance(asked(url, tmp_path / 'a', 0, 30), BudgetReached) and len(paid) == 10


def test_each_model_has_an_account(server, tmp_path):
    url, paid = server
    for model in ('m', 'other'): assert isinstance(asked(url, tmp_path / 'a', 0, 30, model), BudgetReached)
    assert len(paid) == 20


def test_no_limit_and_no_price(server, tmp_path):
    "What an unknown price was paid for is not known; what a known one was paid for counts later."
    url, paid = server
    assert asked(url, tmp_path / 'a', 0, 5, max_dollars=None, price=None) is None
    assert asked(url, tmp_path / 'a', 5, 5, max_dollars=None) is None
    assert isinstance(asked(url, tmp_path / 'a', 10, 30), BudgetReached) and len(paid) == 15


def test_a_store_of_an_earlier_version(server, tmp_path):
    "It has replies with their dollars, and no account."
    url, paid = server
    asked(url, tmp_path / 'a', 0, 7, max_dollars=None)
    db = sqlite3.connect(tmp_path / 'a')
    for name, in db.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name != 'answers'").fetchall(): db.execute(f'DROP TABLE {name}')
    db.close()
    assert isinstance(asked(url, tmp_path / 'a', 10, 30), BudgetReached) and len(paid) == 10


def test_clearing_begins_anew(server, tmp_path):
    "Also for one model alone."
    url, paid = server
    for model in ('m', 'other'): asked(url, tmp_path / 'a', 0, 30, model)
    ReplyStore(tmp_path / 'a').clear('m')
    assert isinstance(asked(url, tmp_path / 'a', 0, 30, 'other'), BudgetReached) and len(paid) == 20
    assert isinstance(asked(url, tmp_path / 'a', 0, 30), BudgetReached) and len(paid) == 30
    ReplyStore(tmp_path / 'a').clear()
    asked(url, tmp_path / 'a', 0, 30, 'other')
    assert len(paid) == 40


def generate(url, out, n, cap, **options):
    g = SyntheticDataGenerator('openai', 'm', out, options.pop('domain', 'general'), base_url=url, per_million=(10, 10), concurrency=1, max_tokens=1, retries=0, **options)
    return g.generate(g.mixture(n, dict(instruction=1)), cap=cap)


def test_synthesis_goes_on_from_what_was_paid(server, tmp_path):
    "In a folder, for replies that were set aside as for those that were used."
    url, paid = server
    bad = tmp_path / 'bad.yaml'
    bad.write_text('domain_name: bad\ndescription: x\ninstructions: [tea, milk]\n')
    for _ in range(3): made = generate(url, tmp_path / 'out', 15, .1, domain=str(bad))
    assert made.records == [] and 8 <= len(paid) <= 10
    before = len(paid)
    made = generate(url, tmp_path / 'out', 15, .2, domain=str(bad))
    store = Replies(tmp_path / 'out')
    assert len(paid) <= 20 and len(paid) > before and store.total()['dollars'] < .2001
    store.close()
