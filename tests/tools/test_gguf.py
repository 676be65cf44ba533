"GGUF files against transformers and against the official converter, on shapes and tokenizers that the notebooks have no room for."
import random
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
import yaml

from conftest import real, slow
from opd_nb.core.errors import BadInput
from opd_nb.core.types import Conversation
from opd_nb.alignment.prefix_maps import sub_tokens
from opd_nb.alignment.tokens import TokenBytes
from opd_nb.alignment.chat import ChatCodec
from opd_nb.alignment.vocab import VocabMap, same_vocabulary
from opd_nb.models.lm import LM, tiny_folder
from opd_nb.models.gguf import Reader, Vocabulary, parts_of
from opd_nb.teachers.hf import HFTeacher
from opd_nb.teachers.gguf import FileCodec, GGUFTeacher
from opd_nb.tools.export_gguf import export_gguf
from opd_nb.tools.export_hf import find_student, model_card

LLAMA3_ROPE = dict(rope_type='llama3', rope_theta=5e5, factor=8., low_freq_factor=1., high_freq_factor=4.,
                   original_max_position_embeddings=64)
YARN = dict(rope_type='yarn', rope_theta=1e6, factor=4., beta_fast=32., beta_slow=1.,
            original_max_position_embeddings=64)
LINEAR = dict(rope_type='linear', rope_theta=1e4, factor=2.)
SHAPES = {  # transformers' class and what is special about it; the tokenizer in the real test material
    'llama': ('Llama', 'llama3', dict(rope_parameters=LLAMA3_ROPE, head_dim=32)),
    'llama-sentencepiece': ('Llama', 'llama2', dict(attention_bias=True, rope_parameters=LINEAR)),
    'mistral': ('Mistral', 'mistral_v3', dict(head_dim=32, rope_parameters=YARN)),
    'qwen2': ('Qwen2', 'qwen2', dict(tie_word_embeddings=True)),
    'qwen3': ('Qwen3', 'qwen2', dict(head_dim=32)),
    'gemma3': ('Gemma3', None, dict(head_dim=32, query_pre_attn_scalar=32, num_hidden_layers=7, sliding_window=64,
                                    tie_word_embeddings=True)),
}
COMPARED = [name for name in SHAPES if name != 'gemma3']  # of Gemma the official converter wants a tokenizer.model
ENDS = {'llama3': ('<|begin_of_text|>', '<|end_of_text|>'), 'llama2': ('<s>', '</s>'), 'mistral_v3': ('<s>', '</s>')}


def model(name, tok):
    "A random model of a shape, with weights large enough to tell one token from another."
    import transformers
    family, _, special = SHAPES[name]
    sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                 intermediate_size=96, max_position_embeddings=256, vocab_size=len(tok) + 7)
    torch.manual_seed(0)
    kind = dict(Gemma3='Gemma3Text').get(family, family)
    config = getattr(transformers, f'{kind}Config')(
        bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id, pad_token_id=None, **(sizes | special))
    m = getattr(transformers, f'{family}ForCausalLM')(config).eval()
    for key, p in m.named_parameters(): torch.nn.init.normal_(p, float('norm' in key), .2 if p.ndim == 1 else .1)
    return m


def tokenizer(name):
    "A real tokenizer; Llama's with the BOS that its own files ask for."
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    kind = SHAPES[name][1]
    folder = real('tokenizers', kind)
    if kind == 'qwen2': return AutoTokenizer.from_pretrained(folder)
    bos, eos = ENDS[kind]
    tok = PreTrainedTokenizerFast(tokenizer_file=str(folder / 'tokenizer.json'), bos_token=bos, eos_token=eos,
                                  unk_token='<unk>' if kind != 'llama3' else None)
    tok.backend_tokenizer.post_processor = TemplateProcessing(
        single=f'{bos} $A', pair=f'{bos} $A {bos}:1 $B:1', special_tokens=[(bos, tok.bos_token_id)])
    return tok


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "Name of a shape -> (folder of transformers, float32 GGUF file, codec), each made once."
    cache, root = {}, tmp_path_factory.mktemp('shapes')
    def get(name):
        if name not in cache:
            tok = tokenizer(name)
            m = model(name, tok)
            m.save_pretrained(root / name)
            tok.save_pretrained(root / name)
            lm = LM.load(str(root / name), dtype='float32', device='cpu')
            cache[name] = root / name, export_gguf(lm, root / f'{name}.gguf', 'f32'), lm.codec
        return cache[name]
    return get


def texts():
    rng = random.Random(0)
    out = ['Make 31 from 3 7 10.', ' Hello', 'Hello  world', '\n\nfoo 12345 bar', 'def f(x):\n    return x\n',
           "I'm sure we'll've", '你好 мир 😀 naïve']
    for f in ('blns.json', 'emoji17_strings.txt', 'utf8tests.txt'):
        lines = real('text', f).read_text(encoding='utf-8', errors='replace').splitlines()
        out += rng.sample(lines, min(len(lines), 200))
    return out


class HalfGELU(torch.nn.Module):
    "The activation as llama.cpp computes it, from a table in float16."
    def forward(self, x): return torch.nn.functional.gelu(x.half().float(), approximate='tanh').half().float()


@pytest.mark.parametrize('name', SHAPES)
def test_llama_cpp_computes_what_transformers_computes(name, tmp_path):
    "Every shape with an embedded tokenizer, on a sequence that is longer than the original context of the stretched ones."
    from transformers import AutoTokenizer
    tok = AutoTokenizer.from_pretrained(tiny_folder('student' if 'sentencepiece' in name or name in ('mistral', 'gemma3') else 'teacher'))
    m, rng = model(name, tok), random.Random(0)
    ids = [rng.randrange(len(tok)) for _ in range(200)]
    reader = Reader(export_gguf(LM(m, ChatCodec(tok), name), tmp_path / 'x.gguf', 'f32'))
    mine = torch.from_numpy(np.concatenate([r.copy() for r in reader.rows(ids, 0)])).log_softmax(-1)
    if name == 'gemma3':
        for layer in m.model.layers: layer.mlp.act_fn = HalfGELU()
    with torch.no_grad(): theirs = m(torch.tensor([ids])).logits[0].log_softmax(-1)
    torch.testing.assert_close(mine, theirs, atol=.02 if name == 'gemma3' else 2e-4, rtol=0)
    torch.testing.assert_close(mine[0], theirs[0], atol=2e-4, rtol=0)  # before such differences add up
    assert theirs.std(0).mean() > .1, 'a model that says the same everywhere would prove nothing'


@pytest.mark.parametrize('name', ['llama', 'llama-sentencepiece', 'mistral', 'qwen2'])  # one of each tokenizer
def test_texts_are_cut_as_the_tokenizer_cuts_them(name, made):
    "At the beginning of a text, with what is put there, and in the middle of one."
    folder, file, codec = made(name)
    begin, middle = Vocabulary(file), FileCodec(file).bytes
    for x in texts():
        assert begin.tokenize(x, special=True, ends=True) == codec.tok(x)['input_ids'], x
        theirs, ends = codec.bytes.encode(x)
        if codec.bytes.bytes_of(theirs) != x.encode(): continue  # the NFC of Qwen's normalizer, which llama.cpp leaves out
        ids, mine = middle.encode(x)
        assert ids == theirs and (mine == ends).all(), x


@pytest.mark.parametrize('name', ['llama', 'llama-sentencepiece', 'mistral', 'qwen2'])
def test_vocabularies_are_the_same(name, made):
    _, file, codec = made(name)
    mine = FileCodec(file)
    other = [i for i, (a, b) in enumerate(zip(mine.bytes.table, codec.bytes.table)) if a != b]
    assert all(p == '</s>' or p.startswith('<|') for p in codec.tok.convert_ids_to_tokens(other)), 'only those that llama.cpp takes for control tokens by their names'
    assert same_vocabulary(codec.bytes, mine.bytes) and mine.stop_ids[0] == codec.stop_ids[0]
    assert len(VocabMap.build(codec, mine)) > .99 * len(codec.tok)


def test_a_real_chat_template(made):
    "Qwen2.5's, with its system prompt, several turns, and tools left out."
    _, file, codec = made('qwen2')
    mine = FileCodec(file)
    talk = [{'role': 'user', 'content': 'Wie geht’s? 😀'},
            {'role': 'assistant', 'content': 'Gut.\n'},
            {'role': 'user', 'content': ' <|im_end|> 12'}]
    assert mine.tok.chat_template == codec.tok.chat_template
    for messages in (talk, [{'role': 'system', 'content': 'Be short.'}, *talk], talk[:1]):
        assert mine.prompt(messages) == codec.prompt(messages)


def test_a_template_cannot_leave_its_sandbox(made):
    from jinja2.exceptions import SecurityError
    tok = FileCodec(made('qwen2')[1]).tok
    tok.chat_template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(SecurityError): tok.apply_chat_template([{'role': 'user', 'content': 'x'}])


def test_a_character_without_a_token_is_an_error_of_its_record(tmp_path):
    lm = LM.load(str(real('models', 'babyllama105')), dtype='float32', device='cpu')
    file = GGUFTeacher(export_gguf(lm, tmp_path / 'x.gguf', 'f32'))
    c = Conversation(({'role': 'user', 'content': 'Once upon a time'},))
    good = (b', there was a fox.', False)
    bad, fine = file.score([c, c], [(', there was a 🦊.'.encode(), False), good], on_error='return')
    assert '🦊' in str(bad) and 'record 0' in str(bad)
    torch.testing.assert_close(fine.logprobs, HFTeacher(lm).score([c], [good])[0].logprobs, atol=1e-4, rtol=0)
    assert file.generate([c], 12) == HFTeacher(lm).generate([c], 12)


def test_a_distilled_student_answers_from_its_file_as_from_its_folder(tmp_path):
    "Greedy answers to 150 held-out puzzles, of a student that has just been trained."
    from opd_nb.lab import countdown
    from opd_nb.core.config import OPDConfig
    from opd_nb.data.formats import save_conversations
    from opd_nb.training.loop import train
    prompts = save_conversations(countdown.draw(80), tmp_path / 'p.jsonl')
    puzzles = countdown.draw(150, seed=7, split='held_out')
    config = OPDConfig(_env_file=None, student='tiny:student', teacher='tiny:teacher', loss='gold', data=str(prompts),
                       output_dir=tmp_path / 'run', max_steps=4, batch=16, max_new_tokens=24, learning_rate=1e-3,
                       val_fraction=0, device='cpu')
    done = train(config, progress=False)
    twin = HFTeacher(LM.load(str(done.student), device='cpu')).generate(puzzles, 40)
    assert twin != HFTeacher(LM.load('tiny:student', device='cpu')).generate(puzzles, 40), 'it learnt nothing'
    same = {}
    for quant in ('f32', 'q8_0'):
        file = GGUFTeacher(export_gguf(str(done.student), tmp_path / f'{quant}.gguf', quant))
        same[quant] = sum(a == b for a, b in zip(twin, file.generate(puzzles, 40)))
    solved = sum(bool(countdown.verify(p.metadata['numbers'], p.metadata['target'], text))
                 for p, (text, _) in zip(puzzles, twin))
    print(same, solved)
    assert same['f32'] == 150 and same['q8_0'] > 135 and solved > 5, (same, solved)


@slow
@pytest.mark.parametrize('name', ['qwen2'])
def test_a_file_becomes_the_folder_that_it_was_made_of(name, made, tmp_path, monkeypatch):
    "As a student: with a real tokenizer, which transformers reads from a file with guesses."
    monkeypatch.setenv('OPD_CACHE', str(tmp_path))
    _, file, codec = made(name)
    lm = LM.load(f'gguf:{file}', device='cpu')
    for x in texts(): assert lm.codec.tok(x)['input_ids'] == codec.tok(x)['input_ids'], x


@pytest.fixture(scope='session')
def converter(tmp_path_factory):
    "llama.cpp's own converter, from the source distribution of llama-cpp-python, and what it imports besides."
    import llama_cpp
    root = tmp_path_factory.mktemp('converter')
    pip = [sys.executable, '-m', 'pip', '-q', '--disable-pip-version-check']
    try:
        source = f'llama-cpp-python=={llama_cpp.__version__}'
        subprocess.run([*pip, 'download', '--no-deps', '--no-binary', ':all:', '-d', str(root), source],
                       check=True, capture_output=True, timeout=900)
        subprocess.run([*pip, 'install', '--no-deps', '--target', str(root / 'more'), 'sentencepiece'],
                       check=True, capture_output=True, timeout=300)
    except subprocess.SubprocessError:
        pytest.skip('the source distribution of llama-cpp-python cannot be had here')
    with tarfile.open(next(root.glob('llama_cpp_python-*.tar.gz'))) as t: t.extractall(root, filter='data')
    return next(root.glob('llama_cpp_python-*/vendor/llama.cpp/convert_hf_to_gguf.py')), root / 'more'


def contents(path):
    "Metadata and tensors of a file."
    from gguf import GGUFReader
    r = GGUFReader(path)
    keys = {k: f.contents() for k, f in r.fields.items() if not k.startswith('GGUF')}
    return keys, {t.name: (t.tensor_type, t.shape.tolist(), t.data) for t in r.tensors}


@slow
@pytest.mark.parametrize('kind', ['f32', 'f16'])
@pytest.mark.parametrize('name', COMPARED)
def test_files_equal_the_official_converters(name, kind, made, converter, tmp_path):
    import os
    folder, _, codec = made(name)
    script, more = converter
    theirs = tmp_path / 'theirs.gguf'
    subprocess.run([sys.executable, str(script), '--outtype', kind, '--outfile', str(theirs), str(folder)],
                   check=True, capture_output=True, env=os.environ | {'PYTHONPATH': str(more)})
    keys, tensors = contents(theirs)
    mine, my_tensors = contents(export_gguf(str(folder), tmp_path / 'mine.gguf', kind))
    assert tensors.keys() == my_tensors.keys()
    for key, (dtype, shape, data) in tensors.items():
        assert my_tensors[key][:2] == (dtype, shape) and np.array_equal(my_tensors[key][2], data), key
    # from a tokenizer.json the converter knows neither scores nor which pieces are control tokens,
    # and leaves out what the embedding has beyond the tokenizer
    if 'tokenizer.ggml.scores' in keys:
        n = len(keys['tokenizer.ggml.tokens'])
        assert set(keys.pop('tokenizer.ggml.scores')) == {-1000.} and len(set(mine.pop('tokenizer.ggml.scores'))) > 1000
        assert keys.pop('tokenizer.ggml.tokens') == mine.pop('tokenizer.ggml.tokens')[:n]
        types = zip(keys.pop('tokenizer.ggml.token_type'), mine.pop('tokenizer.ggml.token_type'))
        differ = [i for i, (a, b) in enumerate(types) if a != b]
        assert set(differ) <= set(codec.tok.added_tokens_decoder)
    def named(d):
        def said(k, v): return v or not k.startswith('tokenizer.ggml.add_')  # "not added" is said or left out
        return {k: v for k, v in d.items() if k != 'general.name' and said(k, v)}
    extra = {k for k in named(mine) if k not in keys}
    assert extra <= {'tokenizer.ggml.add_space_prefix'}, extra
    assert named(keys) == {k: v for k, v in named(mine).items() if k not in extra}


@slow
def test_the_official_converter_writes_what_is_not_written_here(converter, tmp_path, monkeypatch):
    "A family that is unknown here, with a tokenizer that llama.cpp knows."
    from transformers import Olmo2Config, Olmo2ForCausalLM
    tok = tokenizer('qwen2')
    torch.manual_seed(0)
    m = Olmo2ForCausalLM(Olmo2Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96,
        max_position_embeddings=256, vocab_size=len(tok), bos_token_id=None, eos_token_id=tok.eos_token_id)).eval()
    for p in m.parameters(): torch.nn.init.normal_(p, float(p.ndim == 1), .2 if p.ndim == 1 else .1)
    lm = LM(m, ChatCodec(tok), 'small-olmo')
    with pytest.raises(BadInput, match='olmo2') as e: export_gguf(lm, tmp_path / 'x.gguf', 'f32')
    assert 'OPD_LLAMA_CPP' in e.value.remedy and not list(tmp_path.iterdir())
    script, more = converter
    monkeypatch.setenv('OPD_LLAMA_CPP', str(script.parent))
    monkeypatch.setenv('PYTHONPATH', str(more), prepend=':')
    file = export_gguf(lm, tmp_path / 'x.gguf', 'f32')
    ids = tok('Make 31 from 3 7 10. Say how.')['input_ids']
    assert Vocabulary(file).tokenize('Make 31 from 3 7 10. Say how.') == ids
    with torch.no_grad(): theirs = m(torch.tensor([ids])).logits[0].log_softmax(-1)
    mine = torch.from_numpy(np.concatenate([x.copy() for x in Reader(file).rows(ids, 0)])).log_softmax(-1)
    torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=0)


@slow
def test_training_under_a_file_is_training_under_its_folder(tmp_path):
    "A hundred steps on the embedded pair: the same losses at first; at the end the same accuracy within noise, and a loss well below where it began."
    from opd_nb.lab import countdown
    from opd_nb.core.config import OPDConfig
    from opd_nb.data.formats import save_conversations
    from opd_nb.monitor.run_log import read_log
    from opd_nb.training.loop import train
    prompts = save_conversations(countdown.draw(4000), tmp_path / 'prompts.jsonl')
    puzzles = countdown.draw(400, seed=5, split='held_out')
    def share(lm):
        completions = HFTeacher(lm).generate(puzzles, 24)
        return np.mean([bool(countdown.verify(p.metadata['numbers'], p.metadata['target'], text))
                        for p, (text, _) in zip(puzzles, completions)])
    solved, losses = {'untouched': share(LM.load('tiny:student', device='cpu'))}, {}
    file = export_gguf('tiny:teacher', tmp_path / 'teacher.gguf', 'f32')
    for kind, teacher in (('folder', 'tiny:teacher'), ('file', f'gguf:{file}')):
        config = OPDConfig(_env_file=None, student='tiny:student', teacher=teacher, loss='gold', beta=.5,
                           data=str(prompts), output_dir=tmp_path / kind, max_steps=100, batch=64, max_new_tokens=24,
                           learning_rate=2e-3, eval_every=100, save_every=100, warmup_steps=20, device='cpu')
        train(config, progress=False)
        losses[kind] = [e['loss'] for e in read_log(tmp_path / kind) if e['event'] == 'step']
        solved[kind] = share(LM.load(str(tmp_path / kind / 'final'), device='cpu'))
    first = {k: np.mean(v[:10]) for k, v in losses.items()}
    last = {k: np.mean(v[-10:]) for k, v in losses.items()}
    print(solved, first, last)
    assert losses['file'][:5] == pytest.approx(losses['folder'][:5], rel=1e-3)
    assert abs(solved['folder'] - solved['file']) < .07, solved
    assert all(last[k] < .9 * first[k] for k in losses), (first, last)
    assert last['file'] == pytest.approx(last['folder'], rel=.1), (first, last)


def test_sub_tokens_of_a_file_are_those_of_its_model(tmp_path, monkeypatch):
    "xtoken's matrix: a file has a tokenizer that cannot be written down, and splits alike."
    monkeypatch.setenv('OPD_CACHE', str(tmp_path))
    file, student = export_gguf('tiny:teacher', tmp_path / 't.gguf', 'f32'), LM.load('tiny:student', device='cpu')
    of_file, of_model = (sub_tokens(VocabMap.build(student.codec, codec)) for codec in (FileCodec(file), LM.load('tiny:teacher', device='cpu').codec))
    for name in ('rows', 'cols', 'weights'): assert np.array_equal(getattr(of_file, name), getattr(of_model, name))


def test_a_file_that_cannot_be_written_is_closed(tmp_path, monkeypatch):
    import gguf
    lm, opened = LM.load('tiny:student', device='cpu'), []
    monkeypatch.setattr(gguf.GGUFWriter, 'write_tensors_to_file', lambda writer: opened.append(writer) or open('/nowhere/x'))
    with pytest.raises((OSError, BadInput)): export_gguf(lm, tmp_path / 'x.gguf', 'f32')
    assert opened[0].fout is None and not list(tmp_path.iterdir())


def test_a_name_says_any_number_of_parts():
    assert parts_of('x-00001-of-99999999999.gguf') == ['x-00001-of-99999999999.gguf'] and len(parts_of('x-00001-of-00003.gguf')) == 3


def test_what_a_card_quotes_is_text(tmp_path):
    shutil.copytree(tiny_folder('student'), tmp_path / 'best')
    (tmp_path / 'best' / 'README.md').write_text('---\na0: &a0 [ha, ha]\n' + ''.join(f'a{n}: &a{n} [' + f'*a{n - 1}, ' * 9 + ']\n' for n in range(1, 9)) + 'license: *a8\n---\nx')
    teacher = 'a\n---\nlicense: gpl\n<script>x</script>\x1b[2J' + 'x/' * 3000
    (tmp_path / 'config.yaml').write_text(yaml.safe_dump(dict(student=str(tmp_path / 'best'), teacher=teacher, data='```\n# mine', loss='x|y')))
    (tmp_path / 'log.jsonl').touch()
    card = model_card(find_student(tmp_path))
    prose = ''.join(card.split('```')[::2])
    assert card.count('\n---\n') == 1 and '<script' not in prose and '\x1b' not in card and card.count('```') == 4 and '\n# mine' not in prose
