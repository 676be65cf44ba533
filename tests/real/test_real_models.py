"""Two models that people use, of two families, as GGUF files and as folders: what is shown on small ones elsewhere.

OPD_REAL_MODELS names a folder with smollm2.gguf (SmolLM2-135M-Instruct), gemma3.gguf (the base model Gemma 3 270M)
and, under smollm2/ and gemma3/, the same weights as folders of transformers."""
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import slow
from opd_nb.cli.app import main
from opd_nb.core.config import OPDConfig
from opd_nb.core.types import Conversation
from opd_nb.data.formats import save_conversations
from opd_nb.models.gguf import Reader, Vocabulary
from opd_nb.models.gguf_student import StudentFile, TOLERANCE_QUANTIZED, compare_with_llama_cpp
from opd_nb.models.lm import LM
from opd_nb.models.writing import write
from opd_nb.monitor.run_log import read_log
from opd_nb.teachers.base import load_teacher
from opd_nb.tools.doctor import examine
from opd_nb.tools.export_gguf import export_gguf
from opd_nb.training.loop import train

pytestmark = slow
FAMILIES = 'smollm2', 'gemma3'
QUESTIONS = ('What is the capital of France?', 'Name three colours.', 'Why is the sky blue?', 'What is 7 times 3?',
             'Write a short sentence about a dog.', 'Give a word that rhymes with cat.', 'Who wrote Hamlet?',
             'How many days has a week?', 'What do bees make?', 'Is ice warmer than steam?')
NEAR = .5   # nats between two tokens that eight bits may exchange


@pytest.fixture(scope='module')
def models():
    "The folder with the models, or a skip that says how to have it."
    folder = os.environ.get('OPD_REAL_MODELS')
    if not folder: pytest.skip('no real models; set OPD_REAL_MODELS to a folder with smollm2.gguf, smollm2/, gemma3.gguf and gemma3/')
    missing = [name for family in FAMILIES for name in (f'{family}.gguf', family) if not (Path(folder) / name).exists()]
    if missing: pytest.skip(f'OPD_REAL_MODELS lacks {", ".join(missing)}')
    return Path(folder)


@pytest.fixture(scope='module')
def prompts(tmp_path_factory):
    rows = [Conversation((dict(role='user', content=q), dict(role='assistant', content='I do not know.'))) for q in QUESTIONS]
    return str(save_conversations(rows, tmp_path_factory.mktemp('data') / 'prompts.jsonl'))


def config(student, teacher, prompts, folder, **kw):
    return OPDConfig(_env_file=None, student=student, teacher=teacher, data=prompts, output_dir=folder, max_steps=2, batch=2,
                     max_new_tokens=16, val_max_samples=2, eval_every=2, warmup_steps=0, device='cpu', **kw)


def pair(models, student, teacher):
    "The student and the teacher, one as a file and one as a folder, and what a base model is given to be asked."
    specs = dict(smollm2=f"gguf:{models / 'smollm2.gguf'}", gemma3=f"hf:{models / 'gemma3'}")
    return specs[student], specs[teacher], dict(chat_template='plain') if student == 'gemma3' else {}


@pytest.mark.parametrize('student, teacher', [FAMILIES, FAMILIES[::-1]])
def test_the_doctor_lets_them_train(models, prompts, tmp_path, student, teacher):
    s, t, more = pair(models, student, teacher)
    lines = [*examine(config(s, t, prompts, tmp_path / 'run', **more))]
    print(*lines, sep='\n')
    assert not [str(line) for line in lines if line.level == 'stop']
    licences = next(line.text for line in lines if line.topic == 'licences')
    assert 'student apache-2.0' in licences if student == 'smollm2' else 'teacher apache-2.0' in licences


@pytest.mark.parametrize('student, teacher', [FAMILIES, FAMILIES[::-1]])
def test_they_train_and_what_is_saved_loads(models, prompts, tmp_path, student, teacher):
    "Two steps; the folder is an ordinary one, and asks as the run did."
    s, t, more = pair(models, student, teacher)
    done = train(config(s, t, prompts, tmp_path / 'run', **more), progress=False)
    losses = [e['loss'] for e in read_log(tmp_path / 'run') if e['event'] == 'step']
    assert len(losses) == 2 and all(0 < x < 20 for x in losses), losses
    assert not hasattr(AutoModelForCausalLM.from_pretrained(done.student).config, 'quantization_config')
    question = [dict(role='user', content=QUESTIONS[0])]
    asked = LM.load(str(done.student), device='cpu').codec.render(question, None)
    assert asked.endswith('\n\nAssistant:' if more else '<|im_start|>assistant\n')
    assert main(['eval', '--models', f'a={done.student}', '--tasks', prompts, '--limit', '2', '--answer-tokens', '8',
                 '--out', str(tmp_path / 'reports')]) == 0


@pytest.mark.parametrize('family', FAMILIES)
def test_an_exported_file_answers_as_its_folder(models, tmp_path, family):
    "Twenty tokens of ten greedy completions; where they part, both tokens were nearly as likely."
    lm = LM.load(f'hf:{models / family}', device='cpu')
    reader = Reader(export_gguf(lm, tmp_path / 'x.gguf', 'q8_0'))
    vocabulary, same, gaps = Vocabulary(tmp_path / 'x.gguf'), 0, []
    for question in QUESTIONS:
        prompt = lm.codec.prompt([dict(role='user', content=question)], None)
        text = lm.codec.render([dict(role='user', content=question)], None)
        assert vocabulary.tokenize(text, special=True, ends=not lm.codec.tok.chat_template) == prompt
        ours, theirs = [*write(lm, [prompt], 20)[0]], []
        while len(theirs) < 20 and not (theirs and theirs[-1] in lm.codec.stop_ids):
            ids = [*prompt, *theirs]
            last = [part.copy() for part in reader.rows(ids, len(ids) - 1)][-1]
            theirs.append(int(last[-1].argmax()))
        same += ours == theirs
        at = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), None)
        if at is None: continue
        with torch.no_grad(): logp = lm.model(torch.tensor([[*prompt, *ours[:at]]])).logits[0, -1].log_softmax(-1)
        gaps.append((logp[ours[at]] - logp[theirs[at]]).item())
    print(f'{family}: {same} of {len(QUESTIONS)} completions are the same; where they part, by', [round(g, 3) for g in gaps])
    assert same >= 3 and all(0 <= gap < NEAR for gap in gaps)


@pytest.mark.parametrize('family', FAMILIES)
def test_a_file_and_its_folder_give_the_same_signals(models, family):
    "As a teacher, and position by position: within what rounding explains."
    file, folder = f'gguf:{models / family}.gguf', f'hf:{models / family}'
    rows = [Conversation((dict(role='user', content=q),)) for q in QUESTIONS[:3]]
    texts = [(b'The answer is not so easy, but I will try to give one.', True)] * 3
    settings = OPDConfig(_env_file=None, device='cpu')
    of_file, of_folder = (load_teacher(spec, settings).score(rows, texts) for spec in (file, folder))
    for a, b in zip(of_file, of_folder): assert (a.logprobs - b.logprobs).abs().max() < TOLERANCE_QUANTIZED.worst
    lm = LM.load(file, device='cpu')
    found = compare_with_llama_cpp(lm.model, lm.codec.tok, StudentFile(models / f'{family}.gguf', file, 'student'))
    print(family, found)
    assert found.mean < TOLERANCE_QUANTIZED.mean / 2 and found.same_top > .9 * found.positions
