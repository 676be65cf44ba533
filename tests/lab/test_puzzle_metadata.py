"Numbers and targets of puzzles as data sets have them: as numbers, as text, or not at all."
import json

import pytest

from opd_nb.core.errors import BadInput
from opd_nb.core.types import Conversation
from opd_nb.lab.countdown import verify
from opd_nb.lab.plugin import countdown_reward

RIGHT, WRONG = ('7*3=21 21+10=31', '7*3+10'), ('7*3=21 21+10=30', '7+3+10', '')
READ = [  # numbers, target
    ([3, 7, 10], 31), (['3', '7', '10'], '31'), ([3., 7., 10.], 31.), (('3', 7, '10 '), ' 31'),
    ('3 7 10', '31'), ('3, 7, 10', 31), ('[3, 7, 10]', '31'), ("['3', '7', '10']", '31.0'), ('(3, 7, 10)', 31)]
REFUSED = [
    (['3', '7', 'ten'], 31), ([3, 7, None], 31), (None, 31), ('', 31), ([], 31), ('three', 31), (31, 31), ([[3, 7, 10]], 31),
    ([3, 7, 10], None), ([3, 7, 10], 'x'), ([3, 7, 10], 30.5), ([3, 7, 10], ''), ([3, 7, 10], [31]), ([3, 7, 10], True),
    ([3, 7, 10], float('nan')), ([3, 7, 10], float('inf')), ([3, 7, 10], '9' * 6000), ({'a': 3}, 31), ([3, True, 10], 31)]


def puzzle(numbers, target):
    return Conversation((dict(role='user', content='Make 31 from 3 7 10.'),), dict(numbers=numbers, target=target))


@pytest.mark.parametrize('numbers, target', READ)
def test_numbers_are_read(numbers, target):
    "Right answers are right, and wrong ones wrong, however the numbers are written."
    for text in RIGHT:
        assert verify(numbers, target, text) and countdown_reward(puzzle(numbers, target), text) == 1
    for text in WRONG:
        assert not verify(numbers, target, text) and countdown_reward(puzzle(numbers, target), text) == 0


@pytest.mark.parametrize('numbers, target', REFUSED)
def test_what_is_no_puzzle_is_refused(numbers, target):
    "A verifier that finds everything wrong would say that the model is."
    for text in (*RIGHT, *WRONG):
        with pytest.raises(BadInput, match='numbers|target'): verify(numbers, target, text)
        with pytest.raises(BadInput, match='numbers|target'): countdown_reward(puzzle(numbers, target), text)


def test_a_task_of_such_puzzles(tmp_path):
    "Read alike, and a row without them is named."
    pytest.importorskip('lm_eval', reason='pip install "opd_nb[eval]"')
    from opd_nb.eval.questions import Options
    from opd_nb.eval.tasks import tasks_for
    rows = [dict(prompt='Make 31 from 3 7 10.', metadata=dict(numbers=numbers, target=target)) for numbers, target in READ]
    file = tmp_path / 'puzzles.jsonl'
    file.write_text('\n'.join(map(json.dumps, rows)))
    task, = tasks_for(f'countdown={file}', Options())
    marks = task.mark(range(len(rows)), [dict(answer=RIGHT[0])] * len(rows))
    assert [m['right'] for m in marks] == [1] * len(rows)
    file.write_text('\n'.join(map(json.dumps, [*rows, rows[0] | dict(metadata=dict(numbers='x', target=1))])))
    with pytest.raises(BadInput, match=f'row {len(rows) + 1}.*numbers'): tasks_for(f'countdown={file}', Options())
