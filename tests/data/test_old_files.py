"""Files that the code before the merge of the two stores wrote: what was paid for then is not paid for again.

`old/expected.json` holds what that code made of the same files."""
import json, shutil
from pathlib import Path

import pytest

from opd_nb.core.types import Conversation
from opd_nb.data.generate import SyntheticDataGenerator
from opd_nb.data.plan import Domain
from opd_nb.data.replies import Replies
from opd_nb.hosted.store import ReplyStore, request_key
from opd_nb.lab import countdown

OLD = Path(__file__).parent / 'old'
EXPECTED = json.loads((OLD / 'expected.json').read_text(encoding='utf-8'))
NUMBERS = Domain(domain_name='numbers', description='Numbers.', reasoning_tasks={'counting': 1}, questions='numbers')


def say(n, seed): return [Conversation((dict(role='user', content=f'Say {i} please.'),)) for i in range(n)]


def with_endpoint(out):
    "The generator that wrote the file; its address leads nowhere."
    options = dict(temperature=.5, extra_body=dict(seed=1), extra_headers={'X-A': 'b'})
    return SyntheticDataGenerator('openai', 'm', out, NUMBERS, questions=dict(numbers=say), base_url='http://opd.invalid/v1', per_million=(1, 2), max_tokens=20, options=options)


def with_teacher(out):
    return SyntheticDataGenerator('local', out=out, domain='countdown', questions=dict(countdown=countdown.draw), max_tokens=24)


def plain(result):
    records = [dict(messages=list(c.messages), metadata=c.metadata) for c in result.records]
    return dict(records=records, aside=sorted(result.aside, key=lambda a: a['row']), total=result.total, said=str(result))


@pytest.mark.parametrize('name, make, n', [('openai', with_endpoint, 10), ('local', with_teacher, 6)])
def test_records_are_made_of_an_old_file_without_a_request(tmp_path, monkeypatch, name, make, n):
    "Texts, tokens, dollars and times are as before, in the first run, which moves the rows, and in the second."
    from opd_nb.hosted.client import Client
    from opd_nb.teachers.hf import HFTeacher
    def nothing(*args, **kwargs): raise AssertionError('something was asked for')
    monkeypatch.setattr(Client, 'send', nothing)
    monkeypatch.setattr(HFTeacher, 'generate', nothing)
    shutil.copy(OLD / f'synthesis_{name}.sqlite', tmp_path / 'replies.sqlite')
    expected = dict(EXPECTED[name])
    estimate = expected.pop('estimate', None)
    generator = make(tmp_path)
    plan = generator.mixture(n)
    for _ in range(2):
        assert plain(generator.generate(plan)) == expected
        assert estimate is None or str(generator.estimate(plan)) == estimate
    store = Replies(tmp_path)
    assert [name for name, in store.run("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")] == ['answers', 'paid', 'requests', 'reserved']
    assert len(store) == expected['total']['replies']
    store.close()


def test_rows_are_moved_all_or_none(tmp_path, monkeypatch):
    "Whoever is stopped in the middle finds the old table as it was."
    shutil.copy(OLD / 'synthesis_openai.sqlite', tmp_path / 'replies.sqlite')
    put, calls = Replies.put, []
    def stopped(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 5: raise KeyboardInterrupt
        return put(self, *args, **kwargs)
    monkeypatch.setattr(Replies, 'put', stopped)
    with pytest.raises(KeyboardInterrupt): Replies(tmp_path)
    monkeypatch.setattr(Replies, 'put', put)
    store = Replies(tmp_path)
    assert store.total() == EXPECTED['openai']['total']
    store.close()


def test_the_cap_counts_what_an_old_file_has_cost(tmp_path):
    "13 replies with a count of tokens, and the worst for the one without."
    shutil.copy(OLD / 'synthesis_openai.sqlite', tmp_path / 'replies.sqlite')
    store = Replies(tmp_path)
    known, = store.run('SELECT total(dollars) FROM answers')[0]
    assert known > 0 and store.spent(lambda model, tokens: 1.) == pytest.approx(known + 1)
    store.close()


def test_a_teachers_cache_keeps_its_form(tmp_path):
    path = shutil.copy(OLD / 'teacher_cache.sqlite', tmp_path / 'answers.sqlite')
    store = ReplyStore(path)
    keys = [request_key('http://h/v1', '/completions', dict(model='m', prompt=[1, i])) for i in range(3)]
    assert [store.get(k) for k in keys] == [dict(choices=[dict(text=f'é{i}')]) for i in range(3)]
    assert store.table() == [dict(model='m', answers=3, tokens_in=6, tokens_out=3, dollars=None, bytes=store.table()[0]['bytes'])]
    store.put('new', 'm', dict(choices=[]), 1, 1, 0.)
    assert len(store) == 4
