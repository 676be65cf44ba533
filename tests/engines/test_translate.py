"From token ids back to messages, on real tokenizers and the shapes of template that models have."
import pytest
from transformers import PreTrainedTokenizerFast

from conftest import real, slow
from opd_nb.alignment.chat import ChatCodec
from opd_nb.core.errors import BadInput
from opd_nb.engines.translate import Question, completion_starts, find_prompt

USER, REPLY, NEXT = dict(role='user', content='What is 2+2?\nSay it.'), dict(role='assistant', content='It is 4.'), dict(role='user', content='And 3+3, " é 日本"?')
SYSTEM = dict(role='system', content='Be brief.')
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
OWN_SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
HEADERS = "{{ '<|begin_of_text|>' }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
TODAY = HEADERS.replace("{% for m", "<|start_header_id|>system<|end_header_id|>\n\nToday is {{ strftime_now('%d %b %Y') if strftime_now is defined else '1 May' }}.\n\n{% if messages[0].role == 'system' %}{{ messages[0].content }}{% set messages = messages[1:] %}{% endif %}<|eot_id|>{% for m", 1)
INST = ("{% if messages[0].role == 'system' %}{% set first = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}{% set messages = messages[1:] %}{% else %}{% set first = '' %}{% endif %}"
        "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ first if loop.first else '' }}{{ m.content }} [/INST]{% else %} {{ m.content }} </s>{% endif %}{% endfor %}")
MODEL = "<bos>{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"


def codec(name, template, eos):
    tok = PreTrainedTokenizerFast(tokenizer_file=str(real('tokenizers', name) / 'tokenizer.json'), eos_token=eos)
    if template is MODEL: tok.add_tokens(['<bos>', '<start_of_turn>', '<end_of_turn>'], special_tokens=True)
    tok.chat_template = template
    return ChatCodec(tok)


@pytest.mark.parametrize('name, template, eos', [
    ('llama2', INST, '</s>'), ('llama2', MODEL, '</s>'), ('mistral_v3', INST, '</s>'),
    *(pytest.param(*x, marks=slow) for x in [('qwen2', CHATML, '<|im_end|>'), ('qwen2', OWN_SYSTEM + CHATML, '<|im_end|>'), ('qwen2', CHATML.replace('assistant\n{', 'assistant\n<think>\n\n</think>\n\n{'), '<|im_end|>'),
                                             ('llama3', HEADERS, '<|eot_id|>'), ('llama3', TODAY, '<|eot_id|>')])])
@pytest.mark.filterwarnings('ignore::UserWarning')
def test_messages_are_found(name, template, eos):
    c = codec(name, template, eos)
    asked = [[USER], [USER, REPLY, NEXT], [USER, REPLY, NEXT, REPLY, USER]]
    if 'no system' not in template: asked += [[SYSTEM, *x] for x in asked]
    for messages in asked:
        prompt = c.prompt(messages, None)
        for data, stopped in ((b'It is 4.', True), (b'It is', False), (b'\nIt is 4.', True), (b'', True)):
            ids = prompt + c.write(data, stopped)[0]
            found = find_prompt(c, Question(ids))
            assert (found.messages, found.n, found.bare) == (messages, len(prompt), False), (messages, c.tok.decode(ids))
        # a completion that writes a template's own tokens, and goes on
        ids = prompt + c.write(b'Hm.', False)[0] + prompt + c.write(b'4')[0]
        if not any(i in c.stop_ids for i in prompt): assert find_prompt(c, Question(ids)).n == len(prompt)


def test_a_thousand_beginnings_are_not_all_tried():
    "A completion that repeats the end of a prompt."
    c = codec('llama2', INST, '</s>')
    prompt = c.prompt([USER], None)
    assert len(completion_starts(c, prompt + c.write(b' [/INST]' * 1000, False)[0], b' [/INST]')) <= 32
    assert find_prompt(c, Question(prompt + c.write(b' [/INST]' * 1000, False)[0])).n == len(prompt)


def test_other_ids_of_the_same_text_are_no_proof():
    "A prompt whose ids the template would not give is refused, although its text can be read."
    c = codec('llama2', INST, '</s>')
    prompt, table = c.prompt([USER], None), c.bytes.table
    i, halves = next((i, (table.index(table[t][:1]), table.index(table[t][1:]))) for i, t in enumerate(prompt) if table[t] == b'What' or table[t] == b' What')
    ids = [*prompt[:i], *halves, *prompt[i + 1:], *c.write(b'4')[0]]
    assert c.bytes.bytes_of(ids[i:i + 2]) == table[prompt[i]]
    with pytest.raises(BadInput, match='prompt_tokens'): find_prompt(c, Question(ids))
