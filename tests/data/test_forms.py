"Replies of models that think first or talk around what was asked for; and requests that nobody asks twice."
import collections
import json
import threading

import pytest

from opd_nb.data.generate import SyntheticDataGenerator
from opd_nb.data.plan import load_domain, make_plan, question_prompt
from opd_nb.data.replies import Answer, Question, Reply, Solution, Unusable, read_reply, tokens_used
from servers import Handler, http_server

ANSWER = '{"answer": "4"}'
READ = {
    'plain': ANSWER,
    'a think block': f'<think>2+2</think>\n{ANSWER}',
    'thoughts with drafts': '<think>Perhaps {"answer": "5"}? No: ```json\n{"answer": "6"}\n```</think>' + ANSWER,
    'thoughts without a beginning': f'2+2 is 4.\n</think>\n\n{ANSWER}',
    'other tags': f'<thinking>2+2</thinking>{ANSWER}',
    'square brackets': f'[THINK]2+2[/THINK]{ANSWER}',
    'channels': f'<|channel|>analysis<|message|>2+2<|end|><|start|>assistant<|channel|>final<|message|>{ANSWER}',
    'a fence': f'```json\n{ANSWER}\n```',
    'a fence without a name': f'```\n{ANSWER}\n```',
    'a fence within words': f'Here it is:\n```json\n{ANSWER}\n```\nI hope that it helps.',
    'a fence of another name': f'Here it is:\n```JSON5\n{ANSWER}\n```',
    'waves': f'~~~json\n{ANSWER}\n~~~',
    'a fence behind thoughts': f'<think>2+2</think>\nSure!\n```json\n{ANSWER}\n```',
    'a fence that does not end': f'```json\n{ANSWER}',
    'another fence first': f'I compute:\n```python\nprint(2+2)\n```\nSo:\n```json\n{ANSWER}\n```',
    'words around': f'The answer is {ANSWER} as you see.',
    'an object of another form first': f'Given {{"a": 2}}, I say {ANSWER}',
    'line ends of Windows': f'<think>2+2</think>\r\n```json\r\n{ANSWER}\r\n```\r\n',
    'a byte order mark': f'\ufeff{ANSWER}',
}


def reply(text): return Reply(text, 'stop', 'm', 1, 1, 0.)


@pytest.mark.parametrize('case', READ)
def test_answers_are_found(case):
    assert read_reply(reply(READ[case]), Answer) == '4'


@pytest.mark.parametrize('text', [
    'a fence in it:\n```json\n{"answer": "5"}\n```', 'a thought: <think>5</think> and </think>', '```', '{"answer": "5"}', '\\', '</think>'])
def test_what_is_inside_an_answer_stays(text):
    "A reply of the right form is not looked into."
    for form, field in ((Answer, 'answer'), (Question, 'question')):
        for around in ('{}', '<think>so</think>{}', 'Here:\n```json\n{}\n```'):
            if around != '{}' and ('```' in text or 'think>' in text): continue
            assert read_reply(reply(around.replace('{}', json.dumps({field: text}))), form) == text


def test_code_in_an_answer_in_a_fence():
    "The fence that ends the code does not end the JSON."
    text = json.dumps(dict(answer='Type:\n```python\nprint(4)\n```\nand look.'))
    assert 'print(4)' in read_reply(reply(f'Sure:\n```json\n{text}\n```'), Answer)
    assert 'print(4)' in read_reply(reply(f'<think>how?</think>\n{text}'), Answer)


@pytest.mark.parametrize('text', [
    '<think>2+2', '<think>{"answer": "4"}', '<think>{"answer": "4"}</think>', 'It is 4.', '{"answer": 4}', '{"answer": ""}', '{"reply": "4"}',
    '{"answer": "4", "more": 1}', '```json\n{"answer": \n```', '{' * 5000, '```' * 5000, '<think>' * 5000])
def test_what_is_not_there_is_not_found(text):
    "Also what was only thought."
    with pytest.raises(Unusable): read_reply(reply(text), Answer)


def test_why_names_what_is_wrong_with_the_object():
    with pytest.raises(Unusable, match='steps'): read_reply(reply(f'<think>so</think>```json\n{ANSWER}\n```'), Solution)


@pytest.mark.parametrize('usage', [
    dict(prompt_tokens=-5, completion_tokens=-7), dict(prompt_tokens=True, completion_tokens=True), dict(prompt_tokens=2.5, completion_tokens='7'),
    dict(prompt_tokens=10**30, completion_tokens=10**30), dict(prompt_tokens=None), [], 'x', None])
def test_counts_that_cannot_be_are_none(usage):
    assert tokens_used(dict(usage=usage)) == (0, 0)


def test_one_count_that_cannot_be():
    assert tokens_used(dict(usage=dict(prompt_tokens=5, completion_tokens=-7))) == (0, 0)
    assert tokens_used(dict(usage=dict(prompt_tokens=5, completion_tokens=0))) == (5, 0)


class Thinks(Handler):
    "Writes what was asked for behind a think block, and in a fence."
    seen, lock, usage = [], threading.Lock(), dict(prompt_tokens=10, completion_tokens=5)

    def do_POST(self):
        body = json.loads(self.body())
        with self.lock: self.seen.append(json.dumps(body['messages']))
        name = body['response_format']['json_schema']['name']
        said = dict(question=dict(question=f'What is {len(self.seen)}?'), answer=dict(answer='4'), solution=dict(steps=['2+2'], answer='4'))[name]
        content = f'<think>Let me see. {{"answer": "5"}}</think>\nHere it is:\n```json\n{json.dumps(said)}\n```'
        self.send(200, dict(choices=[dict(message=dict(role='assistant', content=content), finish_reason='stop')], usage=self.usage))


@pytest.fixture
def thinks():
    class Server(Thinks): seen = []
    with http_server(Server) as url: yield f'{url}/v1', Server


def generator(out, url, **options):
    return SyntheticDataGenerator('openai', 'm', out, 'general', base_url=url, per_million=(1, 2), concurrency=4, **options)


def test_nothing_is_paid_twice(thinks, tmp_path):
    "Two requests a record with one turn, and none when the same is run again."
    url, server = thinks
    g = generator(tmp_path, url)
    plan = g.mixture(12, dict(reasoning=1, instruction=1))
    made = g.generate(plan)
    assert (len(made.records), made.aside, len(server.seen)) == (12, [], 24)
    assert all('think' not in m['content'] and '```' not in m['content'] for c in made.records for m in c.messages)
    assert len(g.generate(plan).records) == 12 and len(server.seen) == 24


def test_counts_below_zero_do_not_lift_the_cap(thinks, tmp_path):
    url, server = thinks
    server.usage = dict(prompt_tokens=-10**6, completion_tokens=-10**6)
    g = generator(tmp_path, url, max_tokens=100)
    made = g.generate(g.mixture(200), cap=.02)
    assert made.pending > 0 and 0 < made.total['dollars'] <= .02 and len(server.seen) < 100


@pytest.mark.parametrize('domain, n', [('general', 1000), ('countdown', 300)])
def test_no_first_request_is_asked_twice(domain, n):
    "What no prompt shows, such as how many turns there will be, makes no difference."
    from opd_nb.lab.countdown import draw
    domain = load_domain(domain)
    plan = make_plan(domain, n, questions=dict(countdown=draw))
    asked = collections.Counter(row['question'] or json.dumps(question_prompt(domain, row, [])) for row in plan.to_dict('records'))
    assert [text for text, times in asked.items() if times > 1] == []


def test_a_dialogue_is_asked_for_once_whatever_its_turns(thinks, tmp_path):
    "As the endpoint sees it."
    url, server = thinks
    g = generator(tmp_path, url)
    g.generate(g.dialogue(60))
    first = collections.Counter(m for m in server.seen if 'Topic:' in m)
    assert len(first) == 60 and set(first.values()) == {1}
