"The look before a run, at a real server."
import re

import pytest

from conftest import real
from opd_nb.models.lm import tiny_folder
from opd_nb.cli.app import main
from servers import fault_proxy, served

pytest.importorskip('xllamacpp', reason="llama.cpp's server comes with the dev requirements")
KEY = 'sk-planted-77aa01'
MACHINE = ('python', 'packages', 'device', 'data', 'memory', 'disk')  # what is looked at before the teacher


@pytest.fixture(scope='module')
def llama():
    with served('tiny:teacher') as (url, _): yield url


def opd(capsys, *words):
    status = main([str(w) for w in words])
    shown = capsys.readouterr()
    lines = [line.split(maxsplit=2) for line in shown.out.splitlines()]
    return status, [x for x in lines if x[1] not in MACHINE], shown.out + shown.err


def test_doctor_looks_at_a_real_server(llama, tmp_path, capsys):
    words = ['doctor', '--teacher', f'api:{llama}', '--teacher-tokenizer', tiny_folder('teacher'), '--teacher-cache', tmp_path / 'a', '--teacher-top-k', 8,
             '--teacher-api-key', KEY, '--teacher-price', '1,2', '--device', 'cpu']
    status, lines, text = opd(capsys, *words, '--student', 'tiny:', '--loss', 'bpm')
    found = {topic: (level, said) for level, topic, said in lines if topic != 'way'}
    assert status == 0 and {level for level, *_ in lines} <= {'ok', 'warning'} and KEY not in text
    assert found['mode'] == ('ok', 'llama_cpp') and 'top 8' in found['scores'][1] and 'bpm' in found['losses'][1]
    assert any(topic == 'way' and said.startswith('llama_cpp: yes') for _, topic, said in lines) and any(said.startswith('prompt_logprobs: no') for _, topic, said in lines)
    cost = found['completion'][1]
    assert ' requests' in cost and '$0.000000' not in cost and '$' in cost
    assert found['time'][0] == 'ok' and '$0.00 ' not in found['dollars'][1] and 'for the run' in found['dollars'][1]
    part = opd(capsys, *words, '--student', 'tiny:', '--loss', 'bpm', '--positions', 'first:0.3')[2]
    dollars = [float(re.search(r'\$([\d.]+) for the run', shown)[1]) for shown in (part, text)]
    assert 0 < dollars[0] < .8 * dollars[1]  # less of each completion is scored
    status, lines, text = opd(capsys, *words, '--student', 'tiny:', '--loss', 'gold')
    assert status == 1 and lines[-1][:2] == ['stop', 'loss'] and KEY not in text


def test_each_look_measures_the_teacher_and_not_the_cache(llama, tmp_path, capsys):
    with fault_proxy(llama) as (url, faults, seen):
        words = ['doctor', '--teacher', f'api:{url}', '--teacher-tokenizer', tiny_folder('teacher'), '--teacher-cache', tmp_path / 'a', '--teacher-top-k', 8, '--teacher-retries', 0, '--teacher-api-key', KEY]
        assert opd(capsys, *words)[0] == 0
        first = len(seen)
        assert opd(capsys, *words)[0] == 0
        assert 0 < len(seen) - first < first  # the completion, and not the probe
        faults.extend(['expired'] * 2)  # to the question whether it is the same model, and to the one that is measured
        status, lines, text = opd(capsys, *words)
        assert status == 1 and ['stop', 'completion'] in [line[:2] for line in lines] and 'HTTP 401' in text and KEY not in text


def test_wrong_tokenizer_is_a_stop(llama, tmp_path, capsys):
    status, lines, _ = opd(capsys, 'doctor', '--teacher', f'api:{llama}', '--teacher-tokenizer', tiny_folder('student-bpe'), '--teacher-cache', tmp_path / 'a')
    assert status == 1 and lines[0][:2] == ['stop', 'teacher'] and 'TEACHER_TOKENIZER' in lines[0][2]


def test_cache_of_a_real_server(llama, tmp_path, capsys):
    words = ['--teacher-cache', tmp_path / 'a']
    opd(capsys, 'doctor', '--teacher', f'api:{llama}', '--teacher-tokenizer', tiny_folder('teacher'), *words)
    status, _, text = opd(capsys, 'cache', *words)
    assert status == 0 and ' tokens, ' in text and ' replies' in text
    assert '0 replies' in opd(capsys, 'cache', '--clear', *words)[2].splitlines()[1]


def test_a_vocabulary_that_spells_little(tmp_path, capsys):
    "babyllama105 has letters and hardly more; what it cannot spell is a line and no traceback."
    pytest.importorskip('llama_cpp', reason='a GGUF teacher needs llama-cpp-python: pip install opd_nb[gguf]')
    from opd_nb.tools.export_gguf import export_gguf
    gguf = export_gguf(str(real('models', 'babyllama105')), tmp_path / 'm.gguf', 'f32')
    (tmp_path / 'p.jsonl').write_text('{"prompt": "What is 1 = 1?"}\n')
    words = ['doctor', '--teacher', f'gguf:{gguf}', '--student', real('models', 'bitllama3M'), '--loss', 'bpm', '--device', 'cpu', '--teacher-n-gpu-layers', 0]
    status, lines, text = opd(capsys, *words)
    found = {topic: (level, said) for level, topic, said in lines}
    assert status == 0 and found['loss'][0] == 'ok' and 'bpm fits' in found['loss'][1] and found['tokenizers'][0] == 'warning', text
    status, lines, _ = opd(capsys, *words, '--data', tmp_path / 'p.jsonl')
    assert status == 1 and lines[-1][:2] == ['stop', 'pair'] and 'spell' in lines[-1][2]


def test_nobody_there(tmp_path, capsys):
    status, lines, text = opd(capsys, 'doctor', '--teacher', 'api:http://127.0.0.1:9/v1', '--teacher-retries', 0, '--teacher-cache', tmp_path / 'a', '--teacher-api-key', KEY)
    assert status == 1 and [line[:2] for line in lines] == [['stop', 'teacher']] and KEY not in text
