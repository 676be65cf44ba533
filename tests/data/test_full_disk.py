"opd synth on full disks and with damaged pages in its store: a sentence, and nothing that was paid for is lost."
import collections
import contextlib
import json
import random
import shutil
import sqlite3
import subprocess
import threading

import pytest

from conftest import slow
from opd_nb.cli.app import main
from opd_nb.core.errors import BadInput
from opd_nb.hosted.client import Endpoint, Request
from opd_nb.hosted.store import ReplyStore
from servers import Handler, http_server


@contextlib.contextmanager
def disk(folder, size):
    "A disk of this size, or a skip where none can be made. Gives a function that makes it larger."
    folder.mkdir()
    made = subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', str(folder)], capture_output=True)
    if made.returncode: pytest.skip('this user cannot make a small disk')
    try: yield lambda size: subprocess.run(['mount', '-o', f'remount,size={size}', str(folder)], check=True)
    finally: subprocess.run(['umount', '-l', str(folder)], check=True)


@pytest.fixture
def server():
    "Replies that do not pack well, the same to the same request; and the requests."
    class Server(Handler):
        seen, lock = collections.Counter(), threading.Lock()
        def do_POST(self):
            body = json.loads(self.body())
            said = json.dumps(body, sort_keys=True)
            with self.lock: self.seen[said] += 1
            name = (body.get('response_format') or {}).get('json_schema', {}).get('name', 'answer')
            text = random.Random(said).randbytes(6000).hex()
            form = dict(question=dict(question=text), answer=dict(answer=text), solution=dict(steps=['2+2'], answer=text))[name]
            self.send(200, dict(choices=[dict(message=dict(content=json.dumps(form)), finish_reason='stop')], usage=dict(prompt_tokens=10, completion_tokens=5)))
    with http_server(Server) as url: yield f'{url}/v1', Server.seen


def synth(url, out, n=60):
    return main(['synth', '--backend', 'openai', '--model', 'm', '--base-url', url, '--n', str(n), '--out', str(out), '--prices', '1,2'])


@pytest.mark.parametrize('size', ['4k', pytest.param('60k', marks=slow), '1800k'])
def test_a_full_disk_is_a_sentence(size, server, tmp_path, capsys):
    "Also again; and with room, the same goes on without paying for anything twice."
    url, seen = server
    with disk(tmp_path / 'disk', size) as grow:
        out = tmp_path / 'disk' / 'out'
        for _ in range(2):
            capsys.readouterr()
            assert synth(url, out) == 2
            last = capsys.readouterr().err.strip().splitlines()[-1]
            assert last.startswith('opd: ') and ('full' in last or 'No space left' in last) and 'Free some space' in last
        grow('40m')
        assert synth(url, out) == 0
        assert set(seen.values()) == {1} and len(seen) > 120
        assert len(json.loads((out / 'combined_60.json').read_text())['conversations']) > 50


def test_what_was_written_stays_when_there_is_no_room_for_more(server, tmp_path, capsys):
    "The files of an earlier run, and no parts of new ones."
    url, seen = server
    with disk(tmp_path / 'disk', '40m'):
        out = tmp_path / 'disk' / 'out'
        assert synth(url, out) == 0
        before = {p.name: p.read_bytes() for p in out.glob('*_60*')}
        filler = tmp_path / 'disk' / 'filler'
        with contextlib.suppress(OSError): filler.write_bytes(bytes(64 * 2**20))
        assert synth(url, out) == 2
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert 'No space left' in last or 'full' in last
        assert {p.name: p.read_bytes() for p in out.glob('*_60*')} == before and not [*out.glob('*.part')]


def test_a_teachers_cache_on_a_full_disk(server, tmp_path):
    "Nothing more is sent than was under way."
    url, seen = server
    with disk(tmp_path / 'disk', '1500k') as grow:
        endpoint = Endpoint(url, 'm', cache=ReplyStore(tmp_path / 'disk' / 'a'), concurrency=4, price='1,1')
        def ask(n): return endpoint.run([endpoint.ask(Request('/completions', dict(prompt=i), 9, 9)) for i in range(n)])
        with pytest.raises(BadInput, match='full'): ask(300)
        grow('40m')
        assert len(ask(300)) == 300 and set(seen.values()) == {1}
        endpoint.close()


def test_a_store_that_cannot_be_written_to_stops_the_others(server, tmp_path):
    "Whatever the reason is: replies that cannot be kept are not asked for."
    url, seen = server
    store = ReplyStore(tmp_path / 'a')
    store.run("CREATE TRIGGER no BEFORE INSERT ON answers BEGIN SELECT raise(ABORT, 'no'); END")
    endpoint = Endpoint(url, 'm', cache=store, concurrency=4)
    with pytest.raises(BadInput, match='cannot be used'):
        endpoint.run([endpoint.ask(Request('/completions', dict(prompt=i), 9, 9)) for i in range(100)])
    assert len(seen) <= 8
    endpoint.close()


@pytest.mark.parametrize('kind', ['zeros', 'noise', pytest.param('a bit', marks=slow)])
def test_damaged_pages_of_a_store(kind, server, tmp_path, capsys):
    "Each in turn: it works, or a sentence says how to save what is there. Nothing is paid for twice, unless its reply is gone."
    url, seen = server
    assert synth(url, tmp_path / 'whole', 4) == 0
    db = sqlite3.connect(tmp_path / 'whole' / 'replies.sqlite')
    db.execute('PRAGMA wal_checkpoint(TRUNCATE)')
    db.close()
    data = (tmp_path / 'whole' / 'replies.sqlite').read_bytes()
    paid, rng = sum(seen.values()), random.Random(0)
    for start in sorted({0, 4096, *rng.sample(range(0, len(data), 4096), 8)}):
        out = shutil.copytree(tmp_path / 'whole', tmp_path / f'{start}')
        changed = bytearray(data)
        if kind == 'a bit': changed[rng.randrange(start, start + 4096)] ^= 1 << rng.randrange(8)
        else: changed[start:start + 4096] = bytes(4096) if kind == 'zeros' else rng.randbytes(4096)
        (out / 'replies.sqlite').write_bytes(changed)
        capsys.readouterr()
        status = synth(url, out, 4)
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert status == 0 or status == 2 and 'opd: ' in last and '.recover' in last, last
        assert sum(seen.values()) - paid <= 2
        paid = sum(seen.values())
        if status == 2: assert (out / 'replies.sqlite').read_bytes()[start:start + 100] == changed[start:start + 100]


@pytest.mark.parametrize('missing', [False, True])
def test_files_are_whole_or_not_at_all(missing, tmp_path):
    from opd_nb.core.text import write_text
    with disk(tmp_path / 'disk', '64k'):
        path = tmp_path / 'disk' / 'a'
        if not missing: path.write_text('before')
        with pytest.raises(BadInput, match='No space left'): write_text(path, 'x' * 200_000)
        assert [p.read_text() for p in (tmp_path / 'disk').iterdir()] == ([] if missing else ['before'])
