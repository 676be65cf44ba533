"Odd replies of endpoints: what is not said is left out, what cannot be is asked again, and nothing escapes."
import asyncio
import base64
import copy
import gzip
import json
import math
import random
import time
from urllib.parse import quote, quote_plus

import pytest

import replies
from conftest import slow
from fuzz import attempts
from opd_nb.core.config import OPDConfig
from opd_nb.core.errors import BadInput
from opd_nb.core.sources import warn_once
from opd_nb.core.types import Conversation
from opd_nb.hosted.client import Endpoint, Request
from opd_nb.data.replies import reply_of
from opd_nb.hosted.pricing import BudgetReached, TeacherGone, price_of
from opd_nb.hosted.store import ReplyStore, StoredReply
from opd_nb.teachers.api import APITeacher, find_codec
from opd_nb.teachers.base import load_teacher
from opd_nb.teachers.scoring_apis import read_id
from opd_nb.teachers.same_model import check_same_model
from replies import MODES, PUZZLE, RECORDS, Replay
from servers import Handler, http_server

KEY = 'sk-planted-4f1c9e'
LISTS = [mode for mode in MODES if mode != 'continuation']


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
    "Nobody waits before a request is sent again."
    real = asyncio.sleep
    monkeypatch.setattr(asyncio, 'sleep', lambda seconds, *rest: real(min(seconds, .001), *rest))


@pytest.fixture(scope='module')
def codec(): return load_teacher('tiny:').codec


def at(store, replies, change=lambda n, reply: reply, **options):
    "An endpoint that gives recorded replies."
    endpoint = Endpoint('http://127.0.0.1:9/v1', 'teacher', cache=store, **dict(retries=2) | options)
    endpoint.client = Replay(replies, change=change)
    return endpoint


@pytest.fixture(scope='module')
def recorded():
    "For each mode the replies of a real server to its probe and to one completion, see `replies.py`."
    return replies.recorded()


def teacher_of(mode, codec, store, replies, change=lambda n, reply: reply, **options):
    return APITeacher(at(store, replies, change, **options), codec, mode, 8)


def places(value, path=()):
    "Every place in a JSON value."
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def put(value, path, new):
    for key in path[:-1]: value = value[key]
    value[path[-1]] = new


def lists_of(mode, reply):
    "Every position's list in a reply, as (list of entries' places, setter of a log-probability)."
    if mode == 'prompt_logprobs':
        rows = reply['choices'][0].get('prompt_logprobs') or []
        return [[(row[i], 'logprob') for i in sorted(row, key=lambda i: row[i]['rank'])] for row in rows if row]
    if mode == 'sglang':
        return [[(entry, 0) for entry in row] for row in (reply.get('meta_info') or {}).get('input_top_logprobs') or [] if row]
    if mode == 'echo':
        rows = ((reply.get('choices') or [{}])[0].get('logprobs') or {}).get('top_logprobs') or []
        return [[(row, text) for text in row] for row in rows if row]
    if mode == 'llama_cpp':
        found = [p for r in (reply if isinstance(reply, list) else [reply]) for p in r.get('completion_probabilities') or []]
        return [[(e, 'logprob') for e in p['top_logprobs']] for p in found if p['top_logprobs']]
    entries = ((reply.get('choices') or [{}])[0].get('logprobs') or {}).get('content') or []
    return [[(e, 'logprob') for e in entry['top_logprobs']] for entry in entries if entry.get('top_logprobs')]


def only_lists(mode, reply):
    "Whether a reply is one that the mode scores with, and no other of the probe."
    needs = dict(prompt_logprobs='prompt_logprobs', sglang='input_top_logprobs', echo='top_logprobs',
                 prefix_walk='content', llama_cpp='completion_probabilities')[mode]
    return needs in json.dumps(reply) and bool(lists_of(mode, reply))


@pytest.mark.parametrize('mode', LISTS)
@pytest.mark.parametrize('value', [None, math.nan, -math.inf, -3.4028234663852886e38], ids=['null', 'NaN', '-inf', 'lowest'])
def test_an_entry_that_says_nothing_is_left_out(mode, value, codec, recorded, tmp_path):
    clean, = teacher_of(mode, codec, ReplyStore(tmp_path / 'a'), recorded[mode]).score(*RECORDS)

    def last(n, reply):
        if only_lists(mode, reply):
            for row in lists_of(mode, reply)[::2]:
                if len(row) > 5: row[4][0][row[4][1]] = value
        return reply

    teacher = teacher_of(mode, codec, ReplyStore(tmp_path / 'b'), recorded[mode])
    teacher.endpoint.cache.clear()
    teacher.endpoint.client.change = last
    said, = teacher.score(*RECORDS)
    assert said.ids == clean.ids and not said.top_logprobs.isnan().any() and not said.top_logprobs.isinf().any()
    for t in range(len(said.ids)):
        then, now = ({int(i): float(lp) for i, lp in zip(s.top_ids[t], s.top_logprobs[t]) if i >= 0} for s in (clean, said))
        assert now.items() <= then.items() and len(then) - len(now) <= 1
    listed = [int((s.top_ids >= 0).sum()) for s in (clean, said)]
    assert listed[1] < listed[0]


@pytest.mark.parametrize('value', [None, math.nan])
def test_a_token_of_which_nothing_is_said_has_no_score(value, codec, recorded, tmp_path):
    def own(n, reply):
        pairs = (reply.get('meta_info') or {}).get('input_token_logprobs')
        if pairs: pairs[-3][0] = value
        return reply
    said, = teacher_of('sglang', codec, ReplyStore(tmp_path / 'a'), recorded['sglang'], own).score(*RECORDS)
    assert said.logprobs.isnan().tolist() == [t == len(said.ids) - 3 for t in range(len(said.ids))]


def over_0(row): row[0][0][row[0][1]] = .5
def all_likely(row):
    for place, key in row: place[key] = -.1
def as_text(row): row[0][0][row[0][1]] = str(row[0][0][row[0][1]])
def true(row): row[0][0][row[0][1]] = False
IMPOSSIBLE = [over_0, all_likely, as_text, true]


def scored_list(mode, reply):
    "The last list of the completion; `echo` gives one more, of the token that it wrote."
    return lists_of(mode, reply)[-2 if mode == 'echo' else -1]


def bad_then_good(mode, spoil):
    "The first reply with lists is spoilt."
    left = [1]
    def change(n, reply):
        if left and only_lists(mode, reply):
            left.pop()
            spoil(scored_list(mode, reply))
        return reply
    return change


@pytest.mark.parametrize('mode', LISTS)
@pytest.mark.parametrize('spoil', IMPOSSIBLE)
def test_what_cannot_be_is_asked_again_and_not_kept(mode, spoil, codec, recorded, tmp_path):
    store = ReplyStore(tmp_path / 'a')
    teacher = teacher_of(mode, codec, store, recorded[mode])
    clean, = teacher.score(*RECORDS)
    store.run('DELETE FROM answers')
    before = teacher.endpoint.client.asked
    teacher.score(*RECORDS)
    needed = teacher.endpoint.client.asked - before
    store.run('DELETE FROM answers')
    before, teacher.endpoint.client.change = teacher.endpoint.client.asked, bad_then_good(mode, spoil)
    said, = teacher.score(*RECORDS)
    assert said.ids == clean.ids and said.top_logprobs.equal(clean.top_logprobs) and said.top_ids.equal(clean.top_ids)
    assert teacher.endpoint.client.asked - before == needed + 1
    kept, = teacher.score(*RECORDS)
    assert teacher.endpoint.client.asked - before == needed + 1 and kept.top_logprobs.equal(clean.top_logprobs)
    # an older version kept such replies: they are found when they are read
    for key, in store.run('SELECT key FROM answers'):
        reply = store.get(key)
        if only_lists(mode, reply):
            spoil(scored_list(mode, reply))
            store.put(key, 'teacher', reply)
    before = teacher.endpoint.client.asked
    mended, = teacher.score(*RECORDS)
    assert mended.top_logprobs.equal(clean.top_logprobs) and teacher.endpoint.client.asked > before


@pytest.mark.parametrize('mode, name', [('prompt_logprobs', '1000000'), ('prompt_logprobs', '-1'), ('sglang', 10**6),
                                        ('sglang', -1), ('sglang', 2**70), ('llama_cpp', 2**70), ('llama_cpp', -1)])
def test_an_id_out_of_range_is_asked_again(mode, name, codec, recorded, tmp_path):
    def rename(row):
        place = row[-1][0]
        if mode == 'sglang': place[1] = name
        else: place['id'] = name
    def rename_key(n, reply):
        rows = reply['choices'][0].get('prompt_logprobs') if reply.get('choices') else None
        if rows and not done: done.append(rows[-1].update({name: dict(logprob=-20., rank=2)}))
        return reply
    done = []
    change = rename_key if mode == 'prompt_logprobs' else bad_then_good(mode, rename)
    clean, = teacher_of(mode, codec, ReplyStore(tmp_path / 'a'), recorded[mode]).score(*RECORDS)
    teacher = teacher_of(mode, codec, ReplyStore(tmp_path / 'b'), recorded[mode])
    teacher.endpoint.cache.run('DELETE FROM answers')
    teacher.endpoint.client.change = change
    assert teacher.score(*RECORDS)[0].top_ids.equal(clean.top_ids)


@pytest.mark.parametrize('mode', MODES)
def test_a_page_at_any_place_of_the_probe_is_not_kept(mode, codec, recorded, tmp_path):
    whole = at(ReplyStore(tmp_path / 'whole'), recorded[mode])
    APITeacher(whole, codec, mode, 8).score(*RECORDS)
    for place in range(whole.client.asked):
        store = ReplyStore(tmp_path / str(place))
        def page(n, reply): return '<html>Sign in</html>' if n == place else reply
        try: teacher_of(mode, codec, store, recorded[mode], page, retries=0).score(*RECORDS)
        except (BadInput, TeacherGone): pass
        assert not any(isinstance(store.get(key), str) for key, in store.run('SELECT key FROM answers'))
        said, = teacher_of(mode, codec, store, recorded[mode]).score(*RECORDS)
        assert said is not None


@pytest.mark.parametrize('count', [-10**9, math.nan, 2.5, '7', True, 10**30, [1], math.inf, -1])
def test_usage_that_cannot_be_is_the_worst_case(count, tmp_path):
    replies = {json.dumps(['completions', dict(model='teacher', prompt=n)], sort_keys=True):
               dict(n=n, usage=dict(prompt_tokens=count, completion_tokens=count)) for n in range(30)}
    endpoint = at(ReplyStore(tmp_path / 'a'), replies, price='10000,10000', max_dollars=1., concurrency=1)
    asks = [endpoint.ask(Request('/completions', dict(prompt=n), 9, 1)) for n in range(30)]
    with pytest.raises(BudgetReached): endpoint.run(asks)
    assert endpoint.client.asked == 10 and endpoint.budget.dollars == pytest.approx(1.)


@pytest.mark.parametrize('said', [dict(content=None), dict(role='assistant'), dict(content=None, reasoning_content='Hm')])
def test_a_reply_without_text_is_an_empty_row(said, codec, recorded, tmp_path, caplog):
    teacher = teacher_of('prompt_logprobs', codec, ReplyStore(tmp_path / 'a'), recorded['prompt_logprobs'])
    replies = [dict(choices=[dict(message=m, finish_reason='stop')]) for m in (dict(content='31'), said, dict(content='7'))]
    teacher.endpoint.slots._value = 1
    teacher.endpoint.client.change = lambda n, reply: replies.pop(0)
    asked = [Conversation(({'role': 'user', 'content': str(n)},)) for n in range(3)]
    written = teacher.generate(asked, 8)
    assert [text for text, _ in written] == ['31', '', '7'] and '1 of 3 completions have no text' in caplog.text


def served_by(answer):
    "A server whose POSTs are answered by a function, and the requests that it saw."
    seen = []

    class Serve(Handler):
        def do_GET(self): self.send(200, dict(data=[]))
        def do_POST(self):
            body = self.body()
            seen.append((self.path, dict(self.headers), body))
            answer(self)

    return http_server(Serve), seen


def one(endpoint, read=lambda reply: reply): return endpoint.run([endpoint.ask(Request('/completions', dict(prompt='p'), 1), read)])


@pytest.mark.parametrize('status', [301, 302, 303, 307, 308])
def test_no_redirect_to_another_origin(status, tmp_path):
    other, elsewhere = served_by(lambda h: h.send(200, dict(text='mine now')))
    with other as there:
        first, seen = served_by(lambda h: h.send(status, {}, Location=there + '/v1/completions'))
        with first as url:
            endpoint = Endpoint(url, 'm', KEY, ReplyStore(tmp_path / 'a'), retries=3, headers={'X-Api-Key': 'planted'})
            with pytest.raises(TeacherGone) as gone: one(endpoint)
    assert there in str(gone.value) and not elsewhere and len(seen) == 1


def test_redirects_within_an_origin_are_followed_and_circles_end(tmp_path):
    def onward(handler):
        if handler.path.endswith('/there'): handler.send(200, dict(text='x'))
        else: handler.send(308, {}, Location='/v1/there' if straight else '/v1/completions')
    server, seen = served_by(onward)
    with server as url:
        straight = True
        assert one(Endpoint(url, 'm', cache=ReplyStore(tmp_path / 'a'), retries=0)) == [dict(text='x')]
        straight = False
        with pytest.raises(TeacherGone, match='circle'): one(Endpoint(url, 'm', cache=ReplyStore(tmp_path / 'b'), retries=6))
    assert len(seen) == 2 + 6


@pytest.mark.parametrize('packed', [True, False])
def test_a_body_that_is_too_long_is_asked_for_once(packed, tmp_path):
    body = b'{"text": "' + b'x' * (70 * 2**20)
    data, headers = (gzip.compress(body, 1), dict(Content_Encoding='gzip')) if packed else (body, {})
    def answer(handler):
        try: handler.send(200, data, **headers)
        except OSError: handler.close_connection = True  # the client has gone
    server, seen = served_by(answer)
    with server as url:
        with pytest.raises(TeacherGone, match='64 MB'): one(Endpoint(url, 'm', cache=ReplyStore(tmp_path / 'a'), retries=3))
    assert len(seen) == 1


def test_a_packed_reply_is_read(tmp_path):
    server, _ = served_by(lambda h: h.send(200, gzip.compress(b'{"text": "x"}'), Content_Encoding='gzip'))
    with server as url: assert one(Endpoint(url, 'm', cache=ReplyStore(tmp_path / 'a'), retries=0)) == [dict(text='x')]


def test_a_key_that_comes_back_is_hidden(tmp_path):
    server, seen = served_by(lambda h: h.send(200, {'headers': dict(h.headers.items()), h.headers['Authorization']: [h.headers['X-Api-Key']]}))
    with server as url:
        endpoint = Endpoint(url, 'm', KEY, ReplyStore(tmp_path / 'a'), headers={'X-Api-Key': 'planted-too'})
        told = str(one(endpoint)) + str([endpoint.cache.get(key) for key, in endpoint.cache.run('SELECT key FROM answers')])
    sent = {name.lower(): value for name, value in seen[0][1].items()}
    assert sent['x-api-key'] == 'planted-too' and sent['authorization'] == f'Bearer {KEY}'
    assert KEY not in told and 'planted-too' not in told and '***' in told


def test_the_timeout_is_for_the_whole_reply(tmp_path):
    def drip(handler):
        handler.send_response(200)
        handler.send_header('Content-Type', 'application/json')
        handler.end_headers()
        handler.close_connection = True
        try:
            for byte in b'{"text": "x"}' + b' ' * 10:
                handler.wfile.write(bytes([byte]))
                time.sleep(.1)
        except OSError: pass
    server, seen = served_by(drip)
    with server as url:
        with pytest.raises(TeacherGone, match='in time'): one(Endpoint(url, 'm', cache=ReplyStore(tmp_path / 'a'), timeout=.5, retries=0))


@pytest.mark.parametrize('blob', [b'', b'not packed', 'text', None, 7])
def test_a_damaged_reply_in_the_cache_is_a_miss(blob, codec, recorded, tmp_path, caplog):
    store = ReplyStore(tmp_path / 'a')
    clean, = teacher_of('sglang', codec, store, recorded['sglang']).score(*RECORDS)
    columns = store.run('PRAGMA table_info(answers)')
    if blob is None and any(name == 'answer' and strict for _, name, _, strict, *_ in columns): blob = b'\x78\x9c'
    store.run('UPDATE answers SET answer = ?', blob)
    endpoint = at(store, recorded['sglang'])
    check_same_model(endpoint, codec, 8)
    said, = APITeacher(endpoint, codec, 'sglang', 8).score(*RECORDS)
    assert said.logprobs.equal(clean.logprobs) and endpoint.client.asked and 'damaged' in caplog.text


DEEP = []
for _ in range(300): DEEP = [DEEP]
ODD = [None, True, 0, -1, 7, .5, 2.5, -.1, 2**31, 2**70, -2**70, 10**400, math.nan, math.inf, -math.inf, 1e308, '', 'x', '5', '-0.5', 'NaN',
       '\ud83d', '�', 'token_id:9' * 3, 'token_id:99999999999999999', 'token_id:x', [], {}, [None], [[]], [256], [-1], ['a'], 10**12,
       dict(bytes=10**12), dict(logprob='x'), dict(id=2**70), DEEP, '[' * 5000, '{"score": ' + '[' * 5000, '{"score": 1e999}']


def mutated(reply, chance):
    "A reply with one to three damages."
    for _ in range(chance.randint(1, 3)):
        found = list(places(reply))
        if not found: return reply
        path = chance.choice(found)
        parent = reply
        for key in path[:-1]: parent = parent[key]
        what = chance.random()
        if what < .7: parent[path[-1]] = copy.copy(chance.choice(ODD))
        elif what < .8: del parent[path[-1]]
        elif isinstance(parent, list): parent.insert(path[-1], parent[path[-1]])
        else: parent[chance.choice(['x', '99999999999999999999', '-1', '٣', '\ud83d'])] = parent[path[-1]]
        if found and chance.random() < .02: return chance.choice(ODD)
    return reply


@pytest.mark.parametrize('seconds', [10, pytest.param(60, marks=slow)])
def test_no_reply_ends_in_anything_but_an_error_of_the_projects_own(seconds, codec, recorded, tmp_path):
    "Damage at any place of a probe, of a score or of a completion, in all modes."
    store, n_requests, read, refused = ReplyStore(tmp_path / 'a'), {}, 0, 0
    endpoint = at(store, {}, retries=0)  # one for all: making a client takes longer than a try
    for mode in MODES:
        endpoint.client = Replay(recorded[mode])
        store.run('DELETE FROM answers')
        APITeacher(endpoint, codec, mode, 8).score(*RECORDS)
        n_requests[mode] = endpoint.client.asked
    for chance in attempts(seconds):
        mode = chance.choice(MODES)
        place = chance.randrange(n_requests[mode])
        endpoint.client = Replay(recorded[mode], change=lambda n, reply: mutated(reply, chance) if n >= place else reply)
        store.run('DELETE FROM answers')
        try:
            teacher = APITeacher(endpoint, codec, mode, 8)
            for signal in teacher.score(*RECORDS):
                assert not (signal.logprobs > 0).any()
                if hasattr(signal, 'top_ids'):
                    listed = signal.top_ids >= 0
                    assert (signal.top_ids < len(codec.bytes)).all() and (signal.top_ids >= -1).all()
                    assert ((signal.top_logprobs.exp() * listed).sum(-1) <= 1.0011).all()
            read += 1
            teacher.generate([PUZZLE], 8)  # which nobody recorded: damage without a seed
            check_same_model(endpoint, codec, 8)
        except (TeacherGone, BadInput): refused += 1
    endpoint.close()
    print(read, 'scored;', refused, 'ended in a refusal')
    assert read and refused


@slow
def test_the_recorded_replies_are_those_of_the_servers(recorded, tmp_path):
    "The same requests, and replies of the same form with the same numbers."
    pytest.importorskip('xllamacpp', reason="llama.cpp's server comes with the dev requirements")
    def alike(a, b):
        "The same, with numbers up to what another processor makes of them."
        if isinstance(a, dict) and isinstance(b, dict): return a.keys() == b.keys() and all(alike(a[k], b[k]) for k in a)
        if isinstance(a, list) and isinstance(b, list): return len(a) == len(b) and all(map(alike, a, b))
        return abs(a - b) < .1 if isinstance(a, float) and isinstance(b, float) else a == b
    now = replies.record(tmp_path)
    for mode in MODES:
        assert now[mode].keys() == recorded[mode].keys()
        same = sum(alike(now[mode][key], recorded[mode][key]) for key in recorded[mode])
        assert same > .7 * len(recorded[mode]), mode  # of two that are nearly as likely, the processor decides which is first


@pytest.mark.parametrize('key', ['sk-planted/4f1c+9e==', 'sk planted 4f1c9e'])
def test_a_key_is_hidden_in_every_spelling(key, tmp_path):
    said = ' '.join([key, quote(key, safe=''), quote_plus(key), base64.b64encode(key.encode()).decode(), json.dumps(key)])
    server, _ = served_by(lambda h: h.send(400, dict(error=dict(message=said))))
    with server as url: told = str(one(Endpoint(url, 'm', key, ReplyStore(tmp_path / 'a'), retries=0)))
    assert 'planted' not in told and 'cGxhbnRlZ' not in told and '***' in told


@pytest.mark.parametrize('key, headers', [('sk-pl“nted', None), ('sk-a\nb', None), ('sk-abc', {'X-A': 'a\r\nX-B: b'})])
def test_what_no_header_can_hold_is_refused(key, headers, tmp_path):
    with pytest.raises(BadInput, match='ASCII') as error: Endpoint('http://127.0.0.1:9', 'm', key, ReplyStore(tmp_path / 'a'), headers=headers)
    assert 'sk-' not in str(error.value)


def test_white_space_around_a_key_is_none_of_it(tmp_path):
    server, seen = served_by(lambda h: h.send(200, dict(text='x')))
    with server as url: one(Endpoint(url, 'm', f' {KEY}\n', ReplyStore(tmp_path / 'a')))
    assert {k.lower(): v for k, v in seen[0][1].items()}['authorization'] == f'Bearer {KEY}'


@pytest.mark.parametrize('url', ['http://[::1', 'http://a:99999/v1', 'http://a:b/v1', 'http://\x1b[31m/v1'])
def test_an_address_that_is_none(url, tmp_path):
    with pytest.raises(BadInput, match='address') as error: Endpoint(url, 'm', cache=ReplyStore(tmp_path / 'a'))
    assert str(error.value).isprintable()


@pytest.mark.parametrize('price', ['nan,1', 'inf,inf', '-1,-1', '1e400,1', (math.nan, 1.), (1.,), (None, 1.)])
def test_a_price_that_would_lift_the_limit(price):
    with pytest.raises(BadInput, match='two numbers'): price_of('http://127.0.0.1', 'm', price)


@pytest.mark.parametrize('content', [[dict(text=5)], [dict(text=None), 'x', 7], {'a': 1}, [[dict(text='a')]]])
def test_odd_parts_of_a_synthetic_reply(content):
    assert isinstance(reply_of(StoredReply(dict(choices=[dict(message=dict(content=content))]), 'm', 1, 1, None, math.inf)).text, str)


def test_only_the_user_grants_trust_to_a_tokenizer(tmp_path, monkeypatch):
    "What an endpoint names as its tokenizer runs no code, even if the user trusts that of the model."
    asked = []
    monkeypatch.setattr('transformers.AutoTokenizer.from_pretrained', lambda name, **options: asked.append((name, options['trust_remote_code'])) or 1 / 0)
    endpoint = Endpoint('http://127.0.0.1:9', 'mine', cache=ReplyStore(tmp_path / 'a'))
    monkeypatch.setattr(endpoint, 'entry', lambda: dict(root='theirs/code'))
    assert find_codec(endpoint, OPDConfig(teacher_trust_remote_code=True, _env_file=None)) is None
    assert asked == [('theirs/code', False), ('mine', True)]


def test_ids_that_the_tokenizer_does_not_have_are_said(caplog):
    warn_once.cache_clear()
    assert [read_id(i, 512) for i in (511, 512, 513)] == [511, None, None] and caplog.text.count('left out') == 1
