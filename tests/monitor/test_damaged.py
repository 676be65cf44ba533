"""A run's folder after a crash, an editor or an attack: the page is made of what can be read, and says
what could not. Names are text in every picture, also those with dollar signs."""
import json
import logging
import random
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from opd_nb.core.errors import BadInput
from opd_nb.core.text import as_cell, from_cell
from opd_nb.core.types import Conversation
from opd_nb.data.page import data_report, kind_table, plot_lengths
from opd_nb.monitor.alerts import Watch
from opd_nb.monitor.curves import plot_log
from opd_nb.monitor.report import early_and_late, outcome, plot_time, read_samples, run_report, time_by_phase
from opd_nb.monitor.run_log import read_log
from opd_nb.monitor.trackers import run_id, tracked_metrics

STEPS = [dict(event='step', step=i, loss=1 / i, overlap=.5, seconds=2., seconds_writing=1.) for i in range(1, 9)]
SAMPLES = [dict(step=s, row=0, prompt='Who?', completion='Ann', stopped=True, teacher_nll=None) for s in (1, 8)]


def lines(rows): return ''.join(json.dumps(row) + '\n' for row in rows).encode()


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close('all')


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / 'run'
    folder.mkdir()
    (folder / 'log.jsonl').write_bytes(lines(STEPS))
    (folder / 'samples.jsonl').write_bytes(lines(SAMPLES))
    (folder / 'config.yaml').write_text('max_steps: 8\nlearning_rate: 0.5\n')
    return folder


BAD_LINES = {'no UTF-8': b'\xff\xfe\x00\n', 'a list': b'[1, 2]\n', 'a number': b'7\n', 'no event': b'{"step": 3}\n', 'a step that is a word': b'{"event": "step", "step": "3"}\n',
             'a step that is a list': b'{"event": "step", "step": [3]}\n', 'a step beyond all runs': b'{"event": "step", "step": ' + b'9' * 400 + b'}\n',
             'an event that is a list': b'{"event": ["step"], "step": 3}\n', 'deep': b'[' * 100_000 + b'\n', 'cut': b'{"event": "st', 'zeros': b'\0' * 100 + b'\n'}


@pytest.mark.parametrize('name', BAD_LINES)
def test_a_damaged_line_of_the_log_is_skipped_and_counted(run, name, caplog):
    log = run / 'log.jsonl'
    log.write_bytes(lines(STEPS[:4]) + BAD_LINES[name].rstrip(b'\n') + b'\n' + lines(STEPS[4:]))
    with caplog.at_level(logging.WARNING, 'opd_nb'):
        assert read_log(run) == STEPS
        run_report(run)
    assert '1 line that cannot be read is skipped' in caplog.text


BAD_VALUES = ['x', '1.5', None, [1], {'a': 1}, True, -1, 10**400, 1e308, -10**400, '\ud83d', [[[]]]]


@pytest.mark.parametrize('metric', ['loss', 'overlap', 'seconds', 'seconds_writing', 'on_policy', 'top1_agreement', 'warnings', 'seconds_$x_$'])
def test_a_metric_that_is_no_number(run, metric):
    bad = [dict(event=kind, step=9, **{metric: value}) for value in BAD_VALUES for kind in ('step', 'validation')]
    (run / 'log.jsonl').write_bytes(lines(STEPS + bad))
    events, watch = read_log(run), Watch()
    for event in events:
        watch.see(event)
        tracked_metrics(event)
        assert 'Ended after 9 steps' in outcome([*STEPS, event | dict(step=9)], {}, True, [])
        time_by_phase([*STEPS, event])
    assert len(events) == len(STEPS + bad)
    run_report(run)


@pytest.mark.parametrize('line', [b'7', b'[]', b'\xff', b'{"step": 1}', b'{"step": [1], "prompt": "x", "completion": "y"}', b'{"step": 1, "prompt": ["x"], "completion": "y"}',
                                  b'{"step": 1, "prompt": "x", "completion": null}', b'{"step": 1, "row": {}, "prompt": "x", "completion": "y"}', b'{"step": "one", "prompt": "x", "completion": "y"}'])
def test_a_damaged_line_of_the_samples(run, line, caplog):
    (run / 'samples.jsonl').write_bytes(lines(SAMPLES[:1]) + line + b'\n' + lines(SAMPLES[1:]))
    with caplog.at_level(logging.WARNING, 'opd_nb'): assert read_samples(run) == SAMPLES
    assert '1 line without a sample' in caplog.text


def test_a_sample_without_its_last_fields(run):
    (run / 'samples.jsonl').write_bytes(lines([dict(step=1, prompt='Who?', completion='half \ud83d')]))
    assert early_and_late(read_samples(run)) == [{'prompt': 'Who?', 'step 1': 'half ? … (cut)'}]
    assert 'half ?' in run_report(run).read_text(encoding='utf-8')


BOMB = 'a: &a [x, x, x, x, x, x, x, x, x]\n' + ''.join(f'{n}: &{n} [{", ".join(["*" + m] * 9)}]\n' for m, n in zip('abcdefgh', 'bcdefghi'))


@pytest.mark.parametrize('text', [b'\xff\xfe', b'[1, 2]', b'just words', b'a: [', b'', b'\0\0', b'!!python/object/apply:os.system ["true"]', b'[' * 5000, BOMB.encode()],
                         ids=['latin', 'list', 'text', 'cut', 'empty', 'zeros', 'object', 'deep', 'laughs'])
def test_damaged_settings(run, text, caplog):
    (run / 'config.yaml').write_bytes(text)
    with caplog.at_level(logging.WARNING, 'opd_nb'): page = run_report(run).read_text(encoding='utf-8')
    assert 'holds no settings' in page and 'holds no settings' in caplog.text and 'learning_rate' not in page


@pytest.mark.parametrize('text', ['learning_rate: [1, 2]', 'max_steps: {a: 1}', '7: 8', '? [1, 2]\n: 3', 'learning_rate: .nan', 'data: "$x_$"', 'x: ' + 'y' * 10**5, 'max_steps: null'])
def test_odd_settings_are_shown(run, text):
    (run / 'config.yaml').write_text(text)
    page = run_report(run).read_text(encoding='utf-8')
    assert '<h2>Settings' in page and len(page) < 4 * 10**5


def test_any_damage_of_the_folder(run):
    "Bytes flipped, cut and inserted in each of the three files."
    rng, whole = random.Random(0), {p: p.read_bytes() for p in run.iterdir()}
    for _ in range(200):
        for path, data in whole.items():
            data = bytearray(data)
            for _ in range(rng.randint(0, 3)):
                at = rng.randrange(len(data))
                if rng.random() < .5: data[at] = rng.randrange(256)
                elif rng.random() < .5: del data[at:at + rng.randint(1, 30)]
                else: data[at:at] = rng.choice([b'\n', b'[[', b'"', b'\xff', b'null', b'9' * 50, b'{'])
            path.write_bytes(data)
        events = read_log(run)
        assert outcome(events, {}, True, []) and isinstance(early_and_late(read_samples(run)), list)
        for event in events: Watch().see(event)
        time_by_phase(events)
    run_report(run)


def test_files_that_cannot_be_read_or_written(run, monkeypatch):
    with pytest.raises(BadInput, match='could not be written'): run_report(run, run)  # a folder
    def refuse(self, *args): raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr(Path, 'read_bytes', refuse)
    with pytest.raises(BadInput, match=r'could not be read \(Permission denied\)'): read_log(run)


def test_the_log_is_read_as_utf_8_in_every_locale(run, monkeypatch):
    import io
    text_encoding = io.text_encoding
    monkeypatch.setattr(io, 'text_encoding', lambda encoding, *a: text_encoding(encoding, *a) if encoding else 'ascii')
    (run / 'log.jsonl').write_bytes('{"event": "step", "step": 1, "note": "größer"}\n'.encode())
    (run / 'config.yaml').write_bytes('data: größer.jsonl\n'.encode())
    assert read_log(run)[0]['note'] == 'größer' and 'größer.jsonl' in run_report(run).read_text(encoding='utf-8')
    assert run_id(run) == run_id(run)


# names with dollar signs

NAMES = ['$x_$', '$5 or $6', 'a$b', r'\$', '$', '$$', r'$\frac$', '_hidden', '']


@pytest.mark.parametrize('name', NAMES)
def test_a_name_is_no_formula(name):
    events = [dict(event='step', step=i, **{name: 1. * i, f'seconds_{name}': 1.}) for i in range(3)]
    warning = type('W', (), dict(name=name, metric=name, step=1))
    for fig in (plot_log(events, (name,), [warning]), plot_time(time_by_phase(events))): fig.canvas.draw()
    records = [Conversation((dict(role='user', content='Hi'), dict(role='assistant', content='Ho')), dict(kind=kind)) for kind in (name, 'dialogue')]
    plot_lengths(records).savefig(Path('/dev/null'), format='png')


@pytest.mark.parametrize('kinds', [[], [None], [None, None], ['other'], [3, 'a', None], [['a'], {'b': 1}], list(range(20))], ids=str)
def test_lengths_whatever_the_kinds_are(tmp_path, kinds):
    records = [Conversation((dict(role='user', content='Hi'), dict(role='assistant', content='Ho ho')), dict(kind=kind, topic=[kind])) for kind in kinds]
    page = data_report(tmp_path / 'x.html', 'Title', 'fine', {'Kinds': ('By kind.', kind_table(records))} if records else {}, plot_lengths(records))
    assert '<img' in page.read_text(encoding='utf-8')
    if records: assert kind_table(records).records.iloc[-1] == len(records)


def test_counts_of_one(run):
    assert '1 warning, see below' in outcome([], {}, True, [None]) and 'Ended after 1 step;' in outcome(STEPS[:1], {}, True, [])


@pytest.mark.parametrize('text', ['=1', '+1+1', '@a', "'=1", '\n=1', '-1', '- a', '', 'a'])
def test_cells(text):
    assert from_cell(as_cell(text)) == text and not as_cell(text).startswith(('=', '@', '+'))
