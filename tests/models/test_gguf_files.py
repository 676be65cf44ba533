"What a GGUF file lacks is said, and what llama.cpp warns of is heard."
import logging

import pytest

from conftest import real
from opd_nb.core.config import OPDConfig
from opd_nb.core.errors import BadInput
from opd_nb.core.types import Conversation
from opd_nb.models.gguf import Reader, Vocabulary
from opd_nb.models.lm import LM
from opd_nb.teachers.gguf import FileCodec, GGUFTeacher
from opd_nb.tools.doctor import teacher_lines
from opd_nb.tools.export_gguf import export_gguf


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    "The embedded models as files: a byte-level vocabulary and one of SentencePiece."
    folder = tmp_path_factory.mktemp('files')
    return {name: export_gguf(f'tiny:{name}', folder / f'{name}.gguf', 'f32') for name in ('teacher', 'student')}


def without(file, key, folder):
    "A copy of a file in which a key has another name."
    data, name = file.read_bytes(), key.encode()
    assert data.count(name) == 1
    copy = folder / f'no-{key.rpartition(".")[2]}-{file.name}'
    copy.write_bytes(data.replace(name, name[:-1] + b'X'))
    return copy


@pytest.mark.parametrize('load', [Vocabulary, FileCodec, GGUFTeacher])
def test_a_byte_level_vocabulary_without_pre_is_refused(load, files, tmp_path):
    "Texts would be cut into other words than the model was trained on."
    file = without(files['teacher'], 'tokenizer.ggml.pre', tmp_path)
    with pytest.raises(BadInput, match='tokenizer.ggml.pre') as e: load(file)
    assert 'gguf-new-metadata' in e.value.remedy and file.name in str(e.value)


def test_a_sentencepiece_vocabulary_needs_no_pre(files, tmp_path):
    "It has nothing that cuts words, whatever the key is called."
    file = without(files['student'], 'tokenizer.ggml.pre', tmp_path)
    text = 'Make 31 from 3 7 10.'
    assert Vocabulary(file).tokenize(text) == Vocabulary(files['student']).tokenize(text)


def test_llama_cpp_warns_once_of_each(files, tmp_path, caplog):
    "Not for each of the three times that a file is opened, and not with what it prints besides."
    file = without(files['teacher'], 'tokenizer.ggml.eos_token_id', tmp_path)
    with caplog.at_level(logging.INFO):
        for _ in range(2): GGUFTeacher(file)
    said = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(said) == 1 and 'special_eos_id is not in special_eog_ids' in said[0] and file.name in said[0]
    assert not [r for r in caplog.records if r.levelno == logging.INFO]


def test_warnings_of_each_file_are_heard(files, tmp_path, caplog):
    for folder in ('a', 'b'):
        (tmp_path / folder).mkdir()
        Reader(without(files['teacher'], 'tokenizer.ggml.eos_token_id', tmp_path / folder))
    assert len(caplog.records) == 2


def test_a_good_file_is_quiet(files, tmp_path, caplog):
    "Also when it is used with less context than it has. Of one with smaller numbers, a line says how many are not so small."
    with caplog.at_level(logging.INFO, 'opd_nb'):
        GGUFTeacher(files['teacher'], n_ctx=64)
        assert caplog.records == []
        GGUFTeacher(export_gguf('tiny:teacher', tmp_path / 'small.gguf', 'q4_k_m'))
    said, = [r.getMessage() for r in caplog.records if r.name == 'opd_nb']
    assert '35 of 47 tensor' in said and 'small' in said


def test_warnings_are_cleaned(caplog):
    "They quote the file."
    from opd_nb.models.llama_cpp import LLAMA_LOG, WARNING
    LLAMA_LOG.begin('x\x1b.gguf')
    LLAMA_LOG.hear(WARNING, b'load: token \x1b[2J\xff is odd\n')
    LLAMA_LOG.hear(WARNING, b'load: ********        \n')
    said, = [r.getMessage() for r in caplog.records]
    assert '\x1b' not in said and '[2J' in said


def test_an_end_that_the_file_does_not_name_is_none(files, tmp_path):
    "llama.cpp takes the 11th token of any byte-level vocabulary for it."
    file = without(files['teacher'], 'tokenizer.ggml.eos_token_id', tmp_path)
    codec, whole = FileCodec(file), FileCodec(files['teacher'])
    assert 11 not in codec.stop_ids and set(codec.stop_ids) <= set(whole.stop_ids)
    plain = without(file, 'tokenizer.chat_template', tmp_path)
    assert FileCodec(plain).stop_ids == whole.stop_ids[:1]  # by its name, <|im_end|>


@pytest.mark.parametrize('name', ['teacher', 'student'])
def test_a_file_without_a_template_is_said(name, files, tmp_path, caplog):
    "When it is loaded, and by the doctor."
    file = without(files[name], 'tokenizer.chat_template', tmp_path)
    teacher = GGUFTeacher(file)
    assert ['no chat template' in r.getMessage() for r in caplog.records] == [True]
    prompt = Conversation(({'role': 'user', 'content': 'Make 31 from 3 7 10.'},))
    assert b'Make 31' in teacher.codec.bytes.bytes_of(teacher.codec.prompt(prompt.prompt))
    lines = teacher_lines(teacher, OPDConfig(_env_file=None))
    line, = [line for line in lines if line.topic == 'template']
    assert line.level == 'warning' and 'plain text' in line.text
    whole = teacher_lines(GGUFTeacher(files[name]), OPDConfig(_env_file=None))
    assert not [line for line in whole if line.topic == 'template']


def test_a_file_of_a_real_model_without_a_template(tmp_path, caplog):
    lm = LM.load(str(real('models', 'babyllama105')), dtype='float32', device='cpu')
    GGUFTeacher(export_gguf(lm, tmp_path / 'x.gguf', 'f32'))
    said = [r.getMessage() for r in caplog.records]
    assert sum('no chat template' in text for text in said) == 1
    assert sum('newline token not found' in text for text in said) == 1


def test_why_a_file_does_not_load(files, tmp_path):
    "In llama.cpp's words, of which the last are not about it."
    file = without(files['teacher'], 'tokenizer.ggml.merges', tmp_path)
    with pytest.raises(BadInput, match='cannot find tokenizer merges'): GGUFTeacher(file)
