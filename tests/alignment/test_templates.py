"Chat templates of every kind: parts, headers, ends of turn, prompts without an end, failures."
import warnings

import numpy as np
import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from opd_nb.alignment.chat import ChatCodec
from opd_nb.core.errors import BadInput
from opd_nb.core.types import Conversation
from opd_nb.models.lm import tiny_folder
from opd_nb.teachers.base import encode_record
from opd_nb.training.rollouts import as_rollout, fit_prompt

USER = dict(role='user', content='What is 2+2?')
SYSTEM = dict(role='system', content='Be brief.')
REPLY = dict(role='assistant', content='It is 4.')
TURN = '<|im_start|>{{ m.role }}\n%s<|im_end|>\n'
PROMPT = '{%% if add_generation_prompt %%}<|im_start|>assistant\n%s{%% endif %%}'
PARTS = "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"


def chatml(content='{{ m.content }}', before_answer='', after_prompt='', beginning=''):
    "A template with turns."
    header = "{% if m.role == 'assistant' %}" + before_answer + '{% endif %}'
    turns = '{% for m in messages %}' + TURN % (header + content) + '{% endfor %}'
    return beginning + turns + PROMPT % after_prompt


def tokenizer(template=None, special=True, added=('<|im_start|>', '<|im_end|>', '<|mark|>')):
    "The embedded teacher's tokenizer with ChatML's marks and a template of the test."
    tok = AutoTokenizer.from_pretrained(tiny_folder('teacher'))
    tok.add_tokens(list(added), special_tokens=special)
    tok.chat_template = template
    return tok


def codec(template=None, **options):
    return ChatCodec(tokenizer(template, **options))


def names(c):
    return c.tok.convert_ids_to_tokens(list(c.stop_ids))


def text_of_prompt(c, messages, *completion):
    return c.tok.decode(c.prompt(messages, *completion))


# messages in parts

@pytest.mark.parametrize('content', [
    PARTS,
    "{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] }}{% endfor %}",
    "{{ m.content[0].text }}",
    "{% if m.content is string %}{{ raise_exception('parts') }}{% endif %}" + PARTS,
    "{% if m.role == 'user' %}" + PARTS + '{% else %}{{ m.content }}{% endif %}',
    "{% if m.role == 'system' %}" + PARTS + '{% else %}{{ m.content }}{% endif %}',
])
def test_parts(content):
    c = codec(chatml(content))
    expected = codec(chatml()).prompt([SYSTEM, USER, REPLY, USER])
    assert c.prompt([SYSTEM, USER, REPLY, USER]) == expected
    assert names(c)[0] == '<|im_end|>'


def test_parts_are_not_found_by_chance():
    "A default system prompt that holds the question does not hide that it is missing."
    c = codec(chatml(PARTS, beginning='What is 2+2?'))
    assert text_of_prompt(c, [USER]).count('What is 2+2?') == 2


@pytest.mark.parametrize('content', ['', 'x',
                                     "{% if m.role == 'assistant' %}{{ m.content }}{% endif %}",
                                     "{% if m.role == 'user' %}{{ m.content }}{% endif %}",
                                     '{{ m.content[:3] }}'])
def test_text_that_is_never_written_is_refused(content):
    with pytest.raises(BadInput, match='left out by the chat template'): codec(chatml(content))


def test_a_system_message_that_is_left_out_is_refused():
    c = codec(chatml("{% if m.role != 'system' %}{{ m.content }}{% endif %}"))
    assert 'What is 2+2?' in text_of_prompt(c, [USER])
    with pytest.raises(BadInput, match='system'): c.prompt([SYSTEM, USER])


@pytest.mark.parametrize('content', ['{{ m.content | trim }}', '{{ m.content | tojson }}',
                                     "{{ m.content.split('</think>')[-1] }}"])
def test_templates_that_trim_or_quote_are_taken(content):
    asked = dict(role='user', content='  Say "é"\n and 😀.\n')
    thoughts = dict(role='assistant', content='<think>so</think>\n\nIt is 4.')
    assert codec(chatml(content)).prompt([asked, thoughts, USER])


# ends of turn

@pytest.mark.parametrize('special', [True, False])
def test_first_added_token_ends_a_turn(special):
    c = codec(chatml(), special=special)
    assert names(c)[0] == '<|im_end|>'
    end = c.stop_ids[0]
    data, ends, stopped = c.read([*c.write(b'7*3', False)[0], end])
    assert (data, ends[-1], stopped) == (b'7*3', 4, True)
    spelled, _ = c.write(b'7<|im_end|>8', False)
    assert end not in spelled and c.read(spelled)[0] == b'7<|im_end|>8'


def test_a_blank_added_token_is_no_end():
    c = codec(chatml(content='{{ m.content }}\n\n'), special=False,
              added=('<|im_start|>', '<|im_end|>', '\n\n'))
    assert names(c)[0] == '<|im_end|>'


@pytest.mark.parametrize('word', ['ANSWER', 'ANSWERx', 'QUESTION', 'SYSTEM', 'Q'])
def test_words_of_a_default_system_prompt(word):
    c = codec(chatml(beginning=f'<|im_start|>system\nThe {word}.<|mark|>.<|im_end|>\n'))
    assert names(c)[0] == '<|im_end|>'
    assert c.markers.header == ''


# headers

HEADERS = ['<think>\n\n</think>\n\n', '<|mark|>final<|mark|>', '[THINK][/THINK]', 'Answer: ', ' ']


@pytest.mark.parametrize('header', HEADERS)
def test_a_header_stands_before_the_answer(header):
    c = codec(chatml(before_answer=header))
    ids, ends = c.write(REPLY['content'].encode())
    own = c.tok.apply_chat_template([USER, REPLY], tokenize=False)
    assert c.tok.decode([*c.prompt([USER]), *ids]) + '\n' == own
    assert ends.tolist()[-1] == len(REPLY['content']) + 1
    # the loss begins with the answer's own tokens; a space may be one with the first of them
    assert (np.array(ends) > 0).all() or header.endswith(' ')


@pytest.mark.parametrize('header', HEADERS[:3])
def test_readers_have_the_header_and_writers_do_not(header):
    c = codec(chatml(before_answer=header))
    conversation = Conversation((USER, REPLY))
    bare = codec(chatml()).prompt([USER])
    record = encode_record(0, conversation, (b'It is 4.', True), c, 1000)
    assert c.tok.decode(record.prompt_ids).endswith('assistant\n' + header)
    assert list(as_rollout(c, conversation, 50).prompt_ids) == record.prompt_ids
    assert fit_prompt(c, conversation).ids == bare
    assert encode_record(0, conversation, (b'', False), c, 1000).prompt_ids == bare


def test_an_answer_with_its_own_thoughts_gets_no_header():
    c = codec(chatml(before_answer=HEADERS[0]))
    assert c.prompt([USER], b'<think>\n2 and 2</think>\n\n4') == codec(chatml()).prompt([USER])
    assert c.prompt([USER], b'<b>4</b>') == c.prompt([USER])


def test_a_template_without_generation_prompt():
    template = '{% for m in messages %}' + TURN % '{{ m.content }}' + '{% endfor %}'
    for completion in ((), (None,), (b'4',)):
        text = text_of_prompt(codec(template), [USER], *completion)
        assert text.endswith('<|im_start|>assistant\n')


def test_a_prompt_that_begins_to_think_is_said():
    with pytest.warns(UserWarning, match='TEACHER_TEMPLATE'):
        codec(chatml(after_prompt='<think>\n'))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        codec(chatml()), codec(chatml(before_answer=HEADERS[0], after_prompt=HEADERS[0]))


# prompts that are to be continued

def closing(tok, pair):
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=pair, special_tokens=[('<s>', 0), (tok.eos_token, tok.eos_token_id)])
    return ChatCodec(tok)


@pytest.mark.parametrize('content', ['What is 2+2?', 'a', 'ends with a space ', 'line\n'])
def test_a_plain_prompt_has_no_end(content):
    tok, message = tokenizer(), dict(role='user', content=content)
    inside = tok(content, add_special_tokens=False)['input_ids']
    assert closing(tok, f'$A {tok.eos_token}').prompt([message]) == inside
    assert closing(tok, f'<s> $A {tok.eos_token}').prompt([message]) == [0, *inside]
    assert closing(tok, '<s> $A').prompt([message]) == [0, *inside]


# templates that fail

def test_a_template_that_needs_a_system_message():
    needs = "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}"
    c = codec(chatml(beginning=needs))
    assert c.prompt([SYSTEM, USER]) == codec(chatml()).prompt([SYSTEM, USER])
    assert names(c)[0] == '<|im_end|>'
    with pytest.raises(BadInput, match='system first'): c.prompt([USER])


FAILING = {
    'adds a number': '{{ messages[0].content + 1 }}',
    'wants tools': "{{ 'Tools: ' + tools }}",
    'does not parse': '{% for m in messages %}{{ m.content }',
    'an unknown filter': '{{ messages | nonsense }}',
    'a missing attribute': '{{ messages[0].a.b }}',
    'divides': '{{ 1 // 0 }}',
    'too long a range': '{% for i in range(10 ** 9) %}{% endfor %}',
    'recursion': '{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}',
    'the sandbox': "{{ ''.__class__.__mro__ }}",
    'refuses all': "{{ raise_exception('no\x1b[31m\n\nway') }}",
    'named': dict(tool_use='x'),
    'an include': "{% include 'other' %}",
    'strftime': '{{ strftime_now(3) }}',
    'a number': 7,
}


@pytest.mark.parametrize('name', FAILING)
def test_a_template_that_fails_is_one_sentence(name):
    with pytest.raises(BadInput) as e: codec(FAILING[name])
    assert str(e.value).isprintable()


def test_a_row_that_a_template_fails_on():
    c = codec(chatml(beginning="{% if 'é' in messages[0].content %}{{ 1 // 0 }}{% endif %}"))
    with pytest.raises(BadInput, match='zero'): c.prompt([dict(role='user', content='é')])
    assert isinstance(encode_record(3, Conversation((dict(role='user', content='é'),)),
                                    (b'x', True), c, 100), BadInput)


# ordinary models

@pytest.mark.parametrize('name', ['student', 'student-bpe', 'teacher'])
def test_prompts_of_embedded_models_are_what_the_template_says(name):
    tok = AutoTokenizer.from_pretrained(tiny_folder(name))
    c = ChatCodec(tok)
    for messages in ([USER], [SYSTEM, USER], [USER, REPLY, USER]):
        own = tok.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        for completion in (b'', b'4', None):
            assert c.prompt(messages, completion) == own['input_ids']
    assert c.stop_ids == (tok.eos_token_id,)
