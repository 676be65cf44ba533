"Bytes, alignment, vocabulary and prefix maps on eight real tokenizers. Skips, with a message, where they are not at hand."
import functools
import itertools
import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from conftest import ROOT, real, slow
from opd_nb.alignment.tokens import TokenBytes, repair_utf8
from opd_nb.alignment.chunks import align
from opd_nb.alignment.vocab import VocabMap, similarity
from opd_nb.alignment.prefix_maps import prefix_map, sub_tokens

EXACT = ['qwen2', 'llama3', 'llama2', 'mistral_v3', 'gpt2', 'phi2']
LOSSY = ['t5_small', 'bert_uncased']
SPACED = ('llama2', 'mistral_v3')  # `▁` in a text is their space
AWKWARD = ['', ' ', '  ', 'The', ' The', '\n', '\n7*3=21', '7', ' 7', '😀 ok', 'é ', 'naïve café', '日本',
           '\u0301x', '\u200d', 'a\r\n\tb', '▁', '<unk>', '</s>', '[SEP]', '<|im_end|>']


@functools.cache
def table(name):
    folder = real('tokenizers', name)
    if name == 'bert_uncased':
        from transformers import BertTokenizerFast
        tok = BertTokenizerFast(vocab=str(folder / 'vocab.txt'))
    else:
        tok = Tokenizer.from_file(str(folder / 'tokenizer.json'))
    return TokenBytes.from_tokenizer(tok)


@functools.cache
def real_texts():
    "Every text of real/text, line by line; lines that are no UTF-8 with U+FFFD."
    files = ('blns.json', 'emoji17_strings.txt', 'utf8tests.txt', 'utf8tests.bin')
    lines = [line for f in files for line in real('text', f).read_bytes().decode(errors='replace').splitlines()]
    return lines + json.loads(real('text', 'blns.json').read_text(encoding='utf-8'))


def unchanged(name, text):
    "Whether this tokenizer is able to give the text back: no `▁` for SentencePiece, composed characters for Qwen."
    import unicodedata
    if name in SPACED: return '▁' not in text
    return name != 'qwen2' or unicodedata.is_normalized('NFC', text)


def check_texts(name, texts):
    "Joined bytes are the text and the decoded text; ends cover it. Returns how many texts were exact."
    tb, exact = table(name), 0
    encoded = tb.encode_batch(texts)
    decoded = tb.backend.decode_batch([ids for ids, _ in encoded], skip_special_tokens=False)
    for x, (ids, ends), d in zip(texts, encoded, decoded):
        data = x.encode()
        if not len(ids):
            assert name in LOSSY or not data, (x, 'only a lossy tokenizer may swallow a whole text')
            continue
        assert ends[-1] == len(data) and ends[0] >= 0 and (np.diff(ends) >= 0).all(), x
        if name in EXACT and unchanged(name, x):
            assert tb.bytes_of(ids) == data and d == x, (x, 'bytes and decoded text are the text')
            assert ends.tolist() == tb.ends(ids).tolist()
            exact += 1
    return exact


@pytest.mark.parametrize('name', EXACT + LOSSY)
def test_every_real_text(name):
    exact = check_texts(name, real_texts())
    assert (exact > .95 * len(real_texts())) == (name in EXACT)


@functools.cache
def drawn(n):
    "`n` distinct strings that hypothesis makes: pairs of fragments, of characters of every plane and of what tokenizers trip over."
    awkward = st.sampled_from([
        '▁', ' ', '  ', '\n', '\t', '\u200d', '\ufe0f', '\u0301', 'é', '😀', '<0x0A>', '</s>', '<|im_end|>',
        'Ġ', '##', '�', 'the', '7*3'])
    fragment = st.one_of(st.text(max_size=8), st.lists(awkward, max_size=5).map(''.join))
    fragments = st.lists(fragment, min_size=20, max_size=40)
    out = {}

    @seed(0)
    @settings(max_examples=n // 60, database=None, deadline=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))
    @given(fragments)
    def collect(some):
        rng = random.Random(len(out))
        pairs = [a + b for a in some for b in rng.sample(some, min(len(some), 10))]
        out.update(dict.fromkeys([*some, *pairs]))
    collect()
    return list(out)[:n]


@pytest.mark.parametrize('n', [20_000, pytest.param(100_000, marks=slow)])
@pytest.mark.parametrize('name', EXACT + LOSSY)
def test_strings_of_every_kind(name, n):
    texts = drawn(n)
    assert len(texts) == n
    exact = check_texts(name, texts)
    assert (exact > n / 2) == (name in EXACT)


@pytest.mark.parametrize('name', EXACT)
def test_random_ids_decode_to_their_bytes(name):
    "What a student under training emits: any ids in any order, invalid UTF-8 and all."
    tb, draw = table(name), np.random.default_rng(1)
    fallback = [i for i, b in enumerate(tb.table) if len(b) == 1 and b[0] > 127]  # halves of characters
    content = np.flatnonzero(~tb.is_special)
    rows = [draw.choice(content if k % 2 else fallback, 8).tolist() for k in range(2000)]
    broken = 0
    for ids, decoded in zip(rows, tb.backend.decode_batch(rows)):
        data = tb.bytes_of(ids)
        assert tb.ends(ids)[-1] == len(data)
        text, origin = repair_utf8(data)
        assert text == data.decode(errors='replace') and origin[-1] == len(data)
        if tb.family == 'byte_level': assert text == decoded
        elif '�' not in decoded: assert data.decode() == decoded  # it drops a run of bytes if one is wrong
        broken += '�' in decoded
    assert broken > 500


def test_padding_above_the_vocabulary():
    wide = TokenBytes.from_tokenizer(Tokenizer.from_file(str(real('tokenizers', 'qwen2', 'tokenizer.json'))), size=151_936)
    assert len(wide) == wide.width == 151_936 and wide.is_special[151_646:].all()
    assert wide.bytes_of([151_935, 9, 151_700]) == wide.table[9]
    assert len(VocabMap.build(wide, table('llama3'))) == len(VocabMap.build(table('qwen2'), table('llama3')))


@pytest.mark.parametrize('name', ['qwen2', 'phi2', 't5_small'])
def test_same_table_from_transformers(name):
    from transformers import AutoTokenizer
    tok = AutoTokenizer.from_pretrained(str(real('tokenizers', name)))
    a, b = TokenBytes.from_tokenizer(tok), TokenBytes.from_tokenizer(tok.backend_tokenizer)
    assert a.table == b.table and a.family == b.family == table(name).family
    shared = min(len(a), len(table(name)))
    differ = [i for i in range(shared) if a.table[i] != table(name).table[i]]
    assert all(a.is_special[i] for i in differ), 'transformers may make more tokens special, and changes nothing else'


def test_llama_tokenizer_keeps_a_leading_space():
    "transformers' LlamaTokenizer gives ' Hello' and 'Hello' the same ids; a completion keeps its space."
    from transformers import LlamaTokenizer
    model = json.loads(real('tokenizers', 'llama2', 'tokenizer.json').read_text(encoding='utf-8'))['model']
    merges = [tuple(m.split(' ')) if isinstance(m, str) else tuple(m) for m in model['merges']]
    tok = LlamaTokenizer(vocab=model['vocab'], merges=merges)
    assert tok.tokenize(' Hello') == tok.tokenize('Hello')
    tb = TokenBytes.from_tokenizer(tok)
    for x in AWKWARD:
        if '▁' not in x: assert tb.bytes_of(tb.encode(x)[0]) == x.encode(), x


@pytest.mark.parametrize('model, fallback', [('bitllama3M', True), ('babyllama105', False)])
def test_tokenizers_of_the_little_models(model, fallback):
    "Both collapse runs of spaces and strip the edges; a leading space must survive all the same."
    tb = TokenBytes.from_tokenizer(Tokenizer.from_file(str(real('models', model, 'tokenizer.json'))))
    assert tb.family == 'lossy'
    assert tb.bytes_of(tb.encode(' once upon')[0]) == b' once upon'
    for x in AWKWARD:
        ids, ends = tb.encode(x)
        if len(ids): assert ends[-1] == len(x.encode()) and (np.diff(ends) >= 0).all(), x
    ids, ends = tb.encode('a 日本語 b')
    assert bool(set(range(3, 11)) & set(ends.tolist())) == fallback, 'no point inside what is unknown'


def test_t5_marks_every_word():
    tb = table('t5_small')
    own = Tokenizer.from_file(str(real('tokenizers', 't5_small', 'tokenizer.json')))
    for x in ('the cat sat', ' the  cat\nsat'):
        assert tb.encode(x)[0] == own.encode(x, add_special_tokens=False).ids
    assert tb.encode('the cat')[1].tolist() == [3, 7]


def test_lossy_says_what_is_lost():
    bert = table('bert_uncased')
    assert bert.encode(' The  café')[1].tolist() == [4, 11]  # case, accent and spaces are gone, ends are not
    assert bert.encode(' ')[0] == []                         # nothing is left of whitespace
    ids, ends = bert.encode('a 😀 b')
    assert bert.is_special[ids].tolist() == [False, True, False] and ends.tolist() == [1, 6, 8]


@pytest.mark.parametrize('a, b', list(itertools.permutations(EXACT + LOSSY, 2)))
def test_alignment_of_every_pair(a, b):
    "Completions that begin in every awkward way: every token is in a chunk, and chunks of exact pairs are the same bytes."
    (sa, ta) = table(a), table(b)
    rows = [(x, sa.encode(x), ta.encode(x)) for x in AWKWARD]
    rows = [(x, s, t) for x, s, t in rows if len(s[0]) and len(t[0])]
    al = align([s[1] for _, s, _ in rows], [t[1] for _, _, t in rows])
    assert al.student_len.sum() == al.n_student and al.teacher_len.sum() == al.n_teacher
    if not {a, b} & set(LOSSY):
        s_ids, t_ids = [[i for r in rows for i in r[k][0]] for k in (1, 2)]
        for c in range(len(al)):
            x = rows[al.row[c]][0]
            if not (unchanged(a, x) and unchanged(b, x)): continue
            mine = s_ids[al.student_start[c]:][:al.student_len[c]]
            other = t_ids[al.teacher_start[c]:][:al.teacher_len[c]]
            assert sa.bytes_of(mine) == ta.bytes_of(other), x


def test_invalid_bytes_reach_the_teacher_repaired():
    for line in real('text', 'utf8tests.bin').read_bytes().splitlines():
        text, origin = repair_utf8(line)
        assert text == line.decode(errors='replace') and origin[-1] == len(line)
        ids, ends = table('llama2').encode(text)
        assert not len(ends) or origin[ends[-1]] == len(line)


HALVES = st.sampled_from(['😀'.encode(), '�'.encode(), b'\xed\xa0\x80', b'\xf0\x9f', b'a'])


@settings(max_examples=2000, deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=3), HALVES), max_size=8).map(b''.join))
def test_repair_of_any_bytes(data):
    text, origin = repair_utf8(data)
    assert text == data.decode(errors='replace') and len(origin) == len(text.encode()) + 1
    assert origin[0] == 0 and origin[-1] == len(data) and (np.diff(origin) >= 0).all()
    pos = 0
    for good in data.decode('utf-8', 'surrogateescape'):
        pos += len(good.encode('utf-8', 'surrogateescape'))
        if not '\udc80' <= good <= '\udcff': assert pos in origin, 'a valid character keeps its end'


@pytest.mark.parametrize('student, teacher, by_string, by_bytes', [
    ('qwen2', 'llama2', .300, .826), ('qwen2', 'mistral_v3', .322, .896), ('qwen2', 'llama3', .854, .854)])
def test_matching_by_bytes(student, teacher, by_string, by_bytes):
    "Share of all ids of the smaller vocabulary, the teacher's here, that the other has too: the numbers of the design."
    s, t = table(student), table(teacher)
    strings = {p for p in s.pieces if p} & {p for p in t.pieces if p}
    assert len(strings) / len(t) == pytest.approx(by_string, abs=.001)
    assert VocabMap.build(s, t).share('teacher') == pytest.approx(by_bytes, abs=.001)


def test_similarity_of_a_real_pair():
    lines = real('benchmarks', 'gsm8k_test.jsonl').read_text(encoding='utf-8').splitlines()[:50]
    problems = [json.loads(line) for line in lines]
    f = similarity(table('qwen2'), table('llama2'), [p['question'] for p in problems])
    assert f['teacher_matched'] > 2.5 * f['teacher_matched_by_string']
    assert .8 < f['one_to_one'] < f['shared_ends'] <= 1 and f['length_kl'] > 0


@pytest.mark.parametrize('student, teacher', [('qwen2', 'llama3'), ('llama2', 'qwen2'), ('qwen2', 't5_small')])
def test_projections_of_real_pairs(student, teacher, tmp_path, monkeypatch):
    "A sample of φ and W by their definitions; W's rows sum to one."
    monkeypatch.setenv('OPD_CACHE', str(tmp_path))
    v, rng = VocabMap.build(table(student), table(teacher)), random.Random(0)
    p, w = prefix_map(v), sub_tokens(v)
    have = set(p.student.keys)
    for e in rng.sample(range(len(p.teacher)), 2000):
        b = p.teacher.keys[e]
        for k, u in enumerate(p.phi[p.start[e]:p.start[e + 1]]):
            best = next((b[k:k + n] for n in range(len(b) - k, 0, -1) if b[k:k + n] in have), None)
            assert best == (None if u < 0 else p.student.keys[u])
    sums = np.bincount(w.rows, w.weights, len(w.student))
    assert np.allclose(sums[sums > 0], 1, atol=1e-5)
    for e in rng.sample(range(len(w.student)), 2000):
        cols = w.cols[slice(*np.searchsorted(w.rows, [e, e + 1]))]
        key, parts = w.student.keys[e], [w.teacher.keys[c] for c in cols]
        if w.teacher.index(key) >= 0: assert parts == [key]
        elif table(teacher).family != 'lossy' and 0xef not in key: assert all(part in key for part in parts)
    again = sub_tokens(v)
    assert (again.cols == w.cols).all() and len(list(tmp_path.glob('*.npz'))) == 2


def test_two_processes_project_a_real_pair(tmp_path):
    "Both ask at once; both get the same arrays, and one file of each kind is left."
    a, b = (str(real('tokenizers', n, 'tokenizer.json')) for n in ('gpt2', 'llama2'))
    code = '\n'.join([
        'import hashlib, sys',
        'from tokenizers import Tokenizer',
        'from opd_nb.alignment.prefix_maps import prefix_map, sub_tokens',
        'from opd_nb.alignment.tokens import TokenBytes',
        'from opd_nb.alignment.vocab import VocabMap',
        'v = VocabMap.build(*(TokenBytes.from_tokenizer(Tokenizer.from_file(f)) for f in sys.argv[1:]))',
        'p, w = prefix_map(v), sub_tokens(v)',
        'data = p.phi.tobytes() + w.weights.tobytes() + w.cols.tobytes()',
        'print(hashlib.sha256(data).hexdigest())'])
    env = os.environ | {'OPD_CACHE': str(tmp_path), 'PYTHONPATH': str(ROOT)}
    command = [sys.executable, '-c', code, a, b]
    both = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in 'ab']
    said = [p.communicate(timeout=300)[0].strip() for p in both]
    assert said[0] == said[1] and len(said[0]) == 64
    assert sorted(p.name.split('-')[0] for p in tmp_path.glob('*.npz')) == ['prefixes', 'sub_tokens']
    assert not list(tmp_path.glob('*.part'))
