"The file of replies: shared by stores and processes, on full disks, with damaged pages."
import subprocess
import sys

import pytest

from opd_nb.core.errors import BadInput
from opd_nb.hosted.store import ReplyStore

ANOTHER = '''
import sys
from opd_nb.hosted.store import ReplyStore
store = ReplyStore(sys.argv[1])
for i in range(30): store.put(f'{sys.argv[2]} {i}', 'm', 'x' * 3000, 1, 1, 1.)
print(len(store))
store.close()
'''


def another(path, name):
    "A process that writes 30 replies, sees how many there are, and ends."
    done = subprocess.run([sys.executable, '-c', ANOTHER, str(path), name], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-800:]
    return int(done.stdout)


def test_two_stores_in_one_process_and_others(tmp_path):
    "A second store of the same file must not let go of what the first holds: replies were lost, and the file damaged."
    path = tmp_path / 'answers.sqlite'
    first = ReplyStore(path)
    first.put('a', 'm', 1)
    second = ReplyStore(path)
    written = 1
    for n in range(3):
        assert another(path, f'p{n}') == written + 30
        for store, name in ((first, 'f'), (second, 's')):
            for i in range(20): store.put(f'{name} {n} {i}', 'm', 'y' * 3000, 1, 1, 1.)
        written += 70
        assert len(first) == len(second) == written
    assert first.run('PRAGMA integrity_check') == [('ok',)] and first.paid('m') == 0
    first.close()
    second.close()
    assert another(path, 'last') == written + 30


@pytest.mark.parametrize('exclusive', [False, True])
def test_what_cannot_be_a_file(exclusive, tmp_path):
    (tmp_path / 'file').write_bytes(b'no database' * 100)
    for path, why in {tmp_path / 'file': 'not a database', tmp_path: 'directory', tmp_path / 'file' / 'a': 'exists'}.items():
        with pytest.raises(BadInput, match=why): ReplyStore(path, exclusive)
