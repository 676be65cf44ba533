"Bytes, alignment and vocabulary on eight real tokenizers. Skips, and says so, where they are not at hand."
import itertools, random

import numpy as np
import pytest
from tokenizers import Tokenizer

from conftest import real
from opd_nb.alignment import align
from opd_nb.tokens import TokenBytes, repair
from opd_nb.vocab import VocabMap

EXACT = ['qwen2', 'llama3', 'llama2', 'mistral_v3', 'gpt2', 'phi2']
LOSSY = ['t5_small', 'bert_uncased']
CACHE = {}


def table(name):
    if name not in CACHE:
        folder = real('tokenizers', name)
        if name == 'bert_uncased':
            from transformers import BertTokenizerFast
            tok = BertTokenizerFast(vocab_file=str(folder / 'vocab.txt'))
        else: tok = Tokenizer.from_file(str(folder / 'tokenizer.json'))
        CACHE[name] = TokenBytes.from_tokenizer(tok)
    return CACHE[name]


def texts(n=400):
    rng = random.Random(0)
    naughty = real('text', 'blns.json').read_text(encoding='utf-8').splitlines()
    emoji = real('text', 'emoji17_strings.txt').read_text(encoding='utf-8').splitlines()
    utf8 = real('text', 'utf8tests.txt').read_text(encoding='utf-8', errors='replace').splitlines()
    return [x for kind in (naughty, emoji, utf8) for x in rng.sample(kind, min(len(kind), n))]


@pytest.mark.parametrize('name', EXACT)
def test_bytes_are_the_text(name):
    tb = table(name)
    assert tb.family in ('byte_level', 'sentencepiece')
    for x in texts():
        ids, ends = tb.encode(x)
        if tb.bytes_of(ids) != x.encode():  # a character that the normalizer changes (NFC) or that means the space
            assert '▁' in x or name == 'qwen2', x
        if len(ids): assert ends[-1] == len(x.encode()) and (np.diff(ends) >= 0).all()


@pytest.mark.parametrize('name', EXACT)
def test_random_ids_decode_to_their_bytes(name):
    tb, rng = table(name), random.Random(1)
    for _ in range(300):
        ids = [rng.randrange(len(tb)) for _ in range(8)]
        decoded = tb.backend.decode(ids)
        if tb.family == 'byte_level': assert tb.bytes_of(ids).decode(errors='replace') == decoded
        elif '�' not in decoded: assert tb.bytes_of(ids).decode() == decoded


@pytest.mark.parametrize('name', LOSSY)
def test_lossy_families_cover_the_text(name):
    tb = table(name)
    assert tb.family == 'lossy'
    for x in texts(150):
        ids, ends = tb.encode(x)
        if len(ids): assert ends[-1] == len(x.encode()) and (np.diff(ends) >= 0).all()


@pytest.mark.parametrize('a, b', list(itertools.permutations(EXACT[:4], 2)))
def test_alignment_of_real_pairs(a, b):
    for x in (' Hello', 'Hello', '\n7*3=21', '😀 ok', 'naïve café', ' '):
        (_, s), (_, t) = table(a).encode(x), table(b).encode(x)
        al = align(s, t)
        assert al.student_len.sum() == len(s) and al.teacher_len.sum() == len(t), (x, 'every token is in a chunk')


def test_invalid_bytes_reach_the_teacher_repaired():
    for line in real('text', 'utf8tests.bin').read_bytes().splitlines():
        text, origin = repair(line)
        assert text == line.decode(errors='replace') and origin[-1] == len(line)
        ids, ends = table('llama2').encode(text)
        assert not len(ends) or origin[ends[-1]] == len(line)


@pytest.mark.parametrize('student, teacher, share', [('qwen2', 'llama2', .826), ('qwen2', 'mistral_v3', .896), ('qwen2', 'llama3', .854)])
def test_matching_by_bytes(student, teacher, share):
    "Share of the smaller vocabulary that has a token of the same bytes: the figures of the design."
    s, t = table(student), table(teacher)
    smaller = min((s, t), key=len)
    m = VocabMap.build(s, t)
    assert m.share('student' if smaller is s else 'teacher') == pytest.approx(share, abs=.01)
