"Questions that say nothing are named by file and row, and a model's own generation config shapes no evaluation."
import json
import shutil

import pytest

pytest.importorskip('lm_eval', reason='pip install "opd_nb[eval]"')
from opd_nb.core.errors import BadInput
from opd_nb.eval.evaluate import evaluate
from opd_nb.eval.questions import Options
from opd_nb.eval.tasks import tasks_for
from opd_nb.models.lm import LM, tiny_folder
from opd_nb.models.writing import write


def jsonl(path, rows):
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows), encoding='utf-8')
    return path


def choices(*texts, **more): return dict(question='2+2?', choices=[*texts], answer=0) | more


GOOD = choices('4', '3')
ARC, HELLASWAG = 'arc_easy_local', 'hellaswag_local'
BAD_ROWS = {
    'null': (ARC, choices('4', None), 'choice 2'),
    'empty': (ARC, choices('', '3'), 'choice 1'),
    'blank': (ARC, choices('4', ' \n'), 'choice 2'),
    'a list': (ARC, choices('4', ['3']), 'choice 2'),
    'not a number': (ARC, choices('4', float('nan')), 'choice 2'),
    'null in text': (ARC, dict(question='Q?', choices=dict(text=['4', None], label=['A', 'B']), answerKey='A'), 'choice 2'),
    'empty by letter': (ARC, dict(question='Q?', choices=dict(A='4', B=''), answer='A'), 'choice 2'),
    'nothing left': (HELLASWAG, choices('4', '[header]'), 'choice 2'),
    'empty right one': ('truthfulqa_mc1_local', dict(question='Q?', mc1_targets={'': 1, 'x': 0}), 'choice 1'),
    'null among labels': ('truthfulqa_mc2_local', dict(question='Q?', mc2_targets=dict(choices=['4', None], labels=[1, 0])), 'choice 2'),
    'too few labels': ('truthfulqa_mc2_local', dict(question='Q?', mc2_targets=dict(choices=['4', '3'], labels=[1])), 'labels'),
    'null question': (ARC, choices('4', '3', question=None), 'question'),
    'empty question': (ARC, choices('4', '3', question=' '), 'question'),
    'no JSON': (ARC, None, 'is not JSON'),
    'gsm8k without an answer': ('gsm8k_local', dict(question='2+2?', answer=None), 'answer'),
    'gsm8k without a question': ('gsm8k_local', dict(question='', answer='4'), 'question'),
    'gsm8k with other names': ('gsm8k_local', dict(prompt='2+2?', answer='4'), 'question'),
}
OF_GSM8K = dict(question='2+2?', answer='#### 4')


@pytest.mark.parametrize('case', BAD_ROWS)
def test_a_question_that_says_nothing_is_named(case, tmp_path):
    "By its file and its row, before anything is asked."
    name, row, says = BAD_ROWS[case]
    good = OF_GSM8K if name == 'gsm8k_local' else GOOD
    good = good | dict(mc1_targets={'4': 1, '3': 0}, mc2_targets=dict(choices=['4', '3'], labels=[1, 0]))
    file = jsonl(tmp_path / 'questions.jsonl', [good] * 6)
    lines = file.read_text().splitlines()
    lines.insert(4, '{"question": "2+2?' if row is None else json.dumps(row))
    file.write_text('\n'.join(lines))
    with pytest.raises(BadInput, match='row 5') as e: tasks_for(f'{name}={file}', Options(limit=2, fewshot=0))
    assert 'questions.jsonl' in str(e.value) and says in str(e.value)


@pytest.mark.parametrize('texts', [('4', '3'), (4, 3), (4.5, 3.5), (True, False), ('None', 'null'), (' 4', '\u200b')])
def test_choices_that_say_something_are_asked(texts, tmp_path):
    file = jsonl(tmp_path / 'questions.jsonl', [choices(*texts)])
    task, = tasks_for(f'{ARC}={file}', Options(limit=2, fewshot=0))
    assert task.questions[0]['choices'] == [str(x) for x in texts]


@pytest.mark.parametrize('spec, rows', [
    (f'{ARC}=', [choices('4', '')] * 2), (f'{HELLASWAG}=', [choices('4', None)] * 2), ('', [dict(prompt='2+2?')] * 2),
    ('', [dict(prompt=None, response='4')] * 2), ('countdown=', [dict(prompt='Make 4.', response='4')] * 2)])
def test_the_other_tasks_go_on(spec, rows, tmp_path):
    "What is wrong with one file is said, and the results of the others are there."
    file = jsonl(tmp_path / 'questions.jsonl', rows)
    options = Options(limit=2, fewshot=0, max_new_tokens=4)
    good = jsonl(tmp_path / 'good.jsonl', [dict(prompt='2+2?', response='4')])
    found = evaluate({'a': 'tiny:student'}, [f'{spec}{file}', str(good)], options, tmp_path, progress=False)
    assert found.status == 1 and len(found.records['a', 'good']) == 1
    failure, = found.failures
    assert 'questions.jsonl' in failure['why'] and 'row' in failure['why']


def test_a_file_alone_that_cannot_be_asked_ends_the_command(tmp_path):
    "There is nothing to report."
    file = jsonl(tmp_path / 'questions.jsonl', [choices('4', '')])
    with pytest.raises(BadInput, match='row 1'):
        evaluate({'a': 'tiny:student'}, [f'{ARC}={file}'], Options(fewshot=0), tmp_path, progress=False)


OWN = {
    'repetition': dict(repetition_penalty=9.),
    'no twice': dict(no_repeat_ngram_size=1),
    'no digits': dict(suppress_tokens=[*range(3, 60)]),
    'sampling': dict(do_sample=True, temperature=5., top_k=0),
    'length': dict(min_new_tokens=30),
    'beams': dict(num_beams=3, length_penalty=9.),
}


@pytest.fixture(scope='module')
def teacher_says(tmp_path_factory):
    "Answers of the embedded teacher to a task that lm-eval generates."
    folder = tmp_path_factory.mktemp('generation')
    rows = [dict(question=f'Make {n} from 3 7 10.', answer='#### 1') for n in (31, 20, 24, 40)]
    file = jsonl(folder / 'gsm8k.jsonl', rows)
    def ask(spec):
        found = evaluate({'a': str(spec)}, [f'gsm8k_local={file}'], Options(4, 0, 'on', max_new_tokens=24),
                         folder / 'out', progress=False)
        assert not found.failures
        return [r['answer'] for r in found.records['a', 'gsm8k_local']]
    return ask, ask('tiny:teacher')


@pytest.mark.parametrize('own', OWN)
def test_generation_config_of_a_model_shapes_no_answer(own, teacher_says, tmp_path):
    "Of lm-eval's tasks as of our own."
    ask, plain = teacher_says
    folder = shutil.copytree(tiny_folder('teacher'), tmp_path / own.replace(' ', '_'))
    file = folder / 'generation_config.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | OWN[own]))
    assert ask(folder) == plain
    lm = LM.load(str(folder))
    before = lm.model.generation_config.to_dict()
    assert all(before[k] == v for k, v in OWN[own].items())


def test_an_answer_is_what_the_model_writes(teacher_says):
    "To its own end of the turn, and not beyond."
    ask, plain = teacher_says
    lm = LM.load('tiny:teacher')
    questions = [f'Question: Make {n} from 3 7 10.\nAnswer:' for n in (31, 20, 24, 40)]
    prompts = [lm.codec.prompt([dict(role='user', content=q)], None) for q in questions]
    own = [lm.codec.read(ids)[0].decode() for ids in write(lm, prompts, 24)]
    assert [text.strip() for text in plain] == [text.strip() for text in own]
