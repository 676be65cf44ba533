"A student without a chat template is given one, keeps it, and stops where it ends a turn."
import json
import logging

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd_nb.core.config import OPDConfig
from opd_nb.core.errors import BadInput
from opd_nb.data.formats import save_conversations
from opd_nb.eval.models import lineup
from opd_nb.lab import countdown
from opd_nb.models.lm import LM, tiny_folder
from opd_nb.monitor.run_log import read_log
from opd_nb.tools.doctor import examine
from opd_nb.tools.export_hf import find_student, model_card, write_student
from opd_nb.training.checkpoints import save_merged
from opd_nb.training.loop import train
from opd_nb.training.setup import load_student

SAID = [dict(role='system', content='Play.'), dict(role='user', content='Make 31 from 3 7 10.')]
OWN = "{% for m in messages %}{{ m.content }}{{ '<|stop|>' if m.role == 'assistant' }}\n{% endfor %}"


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    "The embedded student as a base model would be: no template, and a token that ends nothing yet."
    folder = tmp_path_factory.mktemp('base') / 'bare'
    tok = AutoTokenizer.from_pretrained(tiny_folder('student-bpe'))
    model = AutoModelForCausalLM.from_pretrained(tiny_folder('student-bpe'))
    tok.add_special_tokens(dict(additional_special_tokens=['<|stop|>']))
    tok.chat_template = None
    model.resize_token_embeddings(len(tok), mean_resizing=False)
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


@pytest.fixture(scope='module')
def prompts(tmp_path_factory):
    return str(save_conversations(countdown.draw(20, answers=True), tmp_path_factory.mktemp('data') / 'prompts.jsonl'))


def config(base, prompts, folder, **kw):
    kw = dict(student=str(base), teacher='tiny:teacher', data=prompts, output_dir=folder, max_steps=2, batch=2,
              max_new_tokens=8, eval_every=2, save_every=1, warmup_steps=0, device='cpu', chat_template='plain') | kw
    return OPDConfig(_env_file=None, **kw)


@pytest.mark.parametrize('lora', [False, True], ids=['all weights', 'lora'])
def test_what_is_saved_asks_as_the_run_did(base, prompts, tmp_path, lora):
    "And stops where it did. The template is a file's, whose turns end with a token that ended nothing before."
    own = tmp_path / 'own.jinja'
    own.write_text(OWN)
    c = config(base, prompts, tmp_path / 'run', chat_template=str(own), lora=lora)
    student = load_student(c)
    stop = student.codec.tok.convert_tokens_to_ids('<|stop|>')
    assert student.codec.stop_ids[0] == stop and student.codec.write(b'21')[0][-1] == stop
    done = train(c, progress=False)
    whole = save_merged(done.student, tmp_path / 'merged') if lora else done.student
    assert json.loads((whole / 'generation_config.json').read_text())['eos_token_id'][0] == stop
    saved = LM.load(str(done.student), device='cpu')
    assert saved.codec.prompt(SAID) == student.codec.prompt(SAID)
    assert saved.codec.stop_ids[0] == stop
    folder = write_student(find_student(tmp_path / 'run'), tmp_path / 'out', merge=True)
    assert json.loads((folder / 'generation_config.json').read_text())['eos_token_id'][0] == stop
    assert f'chat template | {own.name}' in (folder / 'README.md').read_text()


def test_a_run_that_is_resumed_keeps_its_template(base, prompts, tmp_path):
    own = tmp_path / 'own.jinja'
    own.write_text(OWN)
    c = config(base, prompts, tmp_path / 'run', chat_template=str(own), max_steps=1)
    train(c, progress=False)
    again = c.model_copy(update=dict(resume=True, max_steps=2))
    train(again, progress=False)
    whole = train(c.model_copy(update=dict(max_steps=2, output_dir=tmp_path / 'whole')), progress=False)
    assert whole.student.joinpath('chat_template.jinja').read_text() == OWN
    assert [e['step'] for e in read_log(tmp_path / 'run') if 'loss' in e][-1] == 2
    own.write_text(OWN + 'x')
    for changed in (dict(max_steps=3), dict(max_steps=3, chat_template='plain'), dict(max_steps=3, chat_template=None)):
        with pytest.raises(BadInput, match='not the template that the run was trained with'):
            train(again.model_copy(update=changed), progress=False)


def test_the_doctor_suggests_one(base, prompts, tmp_path):
    "Where the teacher has a template, and the student none; not where one was chosen."
    said = [str(line) for line in examine(config(base, prompts, tmp_path / 'run', chat_template=None))]
    assert any('--chat-template plain' in line for line in said)
    said = [str(line) for line in examine(config(base, prompts, tmp_path / 'run'))]
    assert any('chat template plain' in line for line in said)
    assert not any('--chat-template plain' in line for line in said)


def test_without_the_setting_prompts_go_in_bare(base):
    "As before."
    assert LM.load(str(base), device='cpu').codec.render(SAID) == 'Play.\nMake 31 from 3 7 10.'


def test_a_template_that_is_there_is_replaced_and_it_is_said(caplog):
    with caplog.at_level(logging.WARNING, 'opd_nb'):
        lm = LM.load('tiny:student-bpe', device='cpu', chat_template='plain')
    assert 'which --chat-template plain replaces' in caplog.text
    assert lm.codec.render(SAID) == 'Play.\n\nUser: Make 31 from 3 7 10.\n\nAssistant:'


def test_a_run_is_evaluated_with_its_template(base, prompts, tmp_path):
    "Also the student that it began with; otherwise the two would be asked different things."
    train(config(base, prompts, tmp_path / 'run', max_steps=1), progress=False)
    first, *_, last = [LM.load(e.spec, device='cpu', **e.loading) for e in lineup([str(tmp_path / 'run')])]
    assert first.codec.prompt(SAID) == last.codec.prompt(SAID)
    assert first.path == str(base)
