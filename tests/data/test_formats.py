"""Data as people bring it: columns that belong to the prompt, lists of messages in a CSV cell,
damaged and hostile files. Whatever a file holds, it is read, or refused with a `BadInput`."""
import csv
import json
import logging
import time
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import slow
from fuzz import attempts, damaged
from opd_nb.core.errors import BadInput
from opd_nb.core.text import as_cell, loaded
from opd_nb.core.types import Conversation
from opd_nb.data.formats import load_conversations, read_rows, save_conversations

TALK = [{'from': 'human', 'value': 'Where is "Ulm"?\nTell me.'}, {'from': 'gpt', 'value': "It's on the Danube."}]
QUESTION, ANSWER = TALK[0]['value'], TALK[1]['value']


def write(folder, rows, name='data.jsonl'):
    path = folder / name
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows), encoding='utf-8')
    return path


def load_one(folder, row):
    conversation, = load_conversations(write(folder, [row]))
    return conversation


def texts(conversation):
    return [(m['role'], m['content']) for m in conversation.messages]


def refusal(folder, row):
    with pytest.raises(BadInput) as e: load_one(folder, row)
    return str(e.value)


# columns

PASSAGE = 'Ann keeps a heron.'
TAKEN = {
    'dolly': (dict(instruction='Who keeps it?', context=PASSAGE, response='Ann', category='qa'),
              [('user', f'Who keeps it?\n\n{PASSAGE}'), ('assistant', 'Ann')]),
    'squad': (dict(context=PASSAGE, question='Who keeps it?', answer='Ann'),
              [('user', f'{PASSAGE}\n\nWho keeps it?'), ('assistant', 'Ann')]),
    'boolq': (dict(passage=PASSAGE, question='Is it a bird?', answer='yes'),
              [('user', f'{PASSAGE}\n\nIs it a bird?'), ('assistant', 'yes')]),
    'several passages': (dict(contexts=['One.', 'Two.'], query='Which?', answer='One'),
                         [('user', 'One.\n\nTwo.\n\nWhich?'), ('assistant', 'One')]),
    'prompt and input': (dict(prompt='Double it.', input=4, output=8), [('user', 'Double it.\n\n4'), ('assistant', '8')]),
    'instruction and question': (dict(instruction='Answer in rhyme.', question='Who are you?', output='A shrew.'),
                                 [('user', 'Answer in rhyme.\n\nWho are you?'), ('assistant', 'A shrew.')]),
    'messages and context': (dict(messages=[dict(role='user', content='Who keeps it?')], context=PASSAGE),
                             [('user', f'{PASSAGE}\n\nWho keeps it?')]),
    'in the prompt already': (dict(prompt=f'Read: {PASSAGE} Who?', context=PASSAGE), [('user', f'Read: {PASSAGE} Who?')]),
    'system_prompt': (dict(system_prompt='In French.', question='Name a fish.', response='Sole'),
                      [('system', 'In French.'), ('user', 'Name a fish.'), ('assistant', 'Sole')]),
    'system_message': (dict(System_Message='Be brief.', prompt='Hi', completion='Ho'),
                       [('system', 'Be brief.'), ('user', 'Hi'), ('assistant', 'Ho')]),
    'history of pairs': (dict(instruction='And three?', output='Six.', system='Double.', history=[['one', 'Two.'], ['two', 'Four.']]),
                         [('system', 'Double.'), ('user', 'one'), ('assistant', 'Two.'), ('user', 'two'), ('assistant', 'Four.'),
                          ('user', 'And three?'), ('assistant', 'Six.')]),
    'history of texts': (dict(query='And two?', response='Four.', history=['one', 'Two.']),
                         [('user', 'one'), ('assistant', 'Two.'), ('user', 'And two?'), ('assistant', 'Four.')]),
    'history of messages': (dict(prompt='And two?', chat_history=[dict(role='user', content='one'), dict(role='assistant', content='Two.')]),
                            [('user', 'one'), ('assistant', 'Two.'), ('user', 'And two?')]),
    'history with the question': (dict(prompt='one', history=[dict(role='user', content='one')]), [('user', 'one')]),
    'empty history': (dict(prompt='one', history=[]), [('user', 'one')]),
    'input and target': (dict(input='Hi', target='Ho'), [('user', 'Hi'), ('assistant', 'Ho')]),
    'target of a puzzle': (dict(prompt='Make 31 from 3 7 10.', target=31), [('user', 'Make 31 from 3 7 10.')]),
    'dpo with one message': (dict(conversations=TALK[:1], chosen=TALK[1], rejected={'from': 'gpt', 'value': 'No.'}),
                             [('user', QUESTION), ('assistant', ANSWER)]),
    'turns as objects': (dict(conversation=[dict(system='S', input='a', output='b'), dict(input='c', output='d')]),
                         [('system', 'S'), ('user', 'a'), ('assistant', 'b'), ('user', 'c'), ('assistant', 'd')]),
    'a sequence of messages': (dict(messages=dict(role=['user', 'assistant'], content=['Hi', 'Ho'])), [('user', 'Hi'), ('assistant', 'Ho')]),
    'a number is an answer': (dict(question='2+2?', answer=4), [('user', '2+2?'), ('assistant', '4')]),
    'an answer with its aliases': (dict(question='2+2?', answer=dict(value='4', aliases=['four'])), [('user', '2+2?'), ('assistant', '4')]),
    'a call that is text': (dict(conversations=[TALK[0], {'from': 'function_call', 'value': '{"name": "map"}'},
                                                {'from': 'observation', 'value': 'Ulm'}, TALK[1]]),
                            [('user', QUESTION), ('assistant', '{"name": "map"}'), ('tool', 'Ulm'), ('assistant', ANSWER)]),
    'empty tools': (dict(messages=[dict(role='user', content='Hi', tool_calls=None), dict(role='assistant', content='Ho', tool_calls=[])], tools='[]'),
                    [('user', 'Hi'), ('assistant', 'Ho')]),
}


@pytest.mark.parametrize('name', TAKEN)
def test_columns_of_the_prompt_are_asked(tmp_path, name):
    row, wanted = TAKEN[name]
    assert texts(load_one(tmp_path, row)) == wanted


CALL = dict(function=dict(name='get', arguments='{}'))
REFUSED = {
    'tools': (dict(prompt='Weather?', tools=[dict(type='function')]), 'field tools is not empty'),
    'tools as text': (dict(prompt='Weather?', tools='[{"name": "get"}]'), 'field tools is not empty'),
    'tool calls without content': (dict(messages=[dict(role='user', content='Weather?'), dict(role='assistant', content=None, tool_calls=[CALL])]),
                                   'messages[1].tool_calls'),
    'a call of the older kind': (dict(messages=[dict(role='user', content='Weather?'), dict(role='assistant', content='', function_call=CALL)]),
                                 'messages[1].function_call'),
    'a picture': (dict(image='cat.png', conversations=TALK), 'field image is not empty'),
    'a picture in a message': (dict(messages=[dict(role='user', content='What is it?', images=['cat.png'])]), 'messages[0].images'),
    'a passage that is no text': (dict(question='Who?', context=dict(title=['a'])), 'field context must be text'),
    'a history that is no pairs': (dict(prompt='Who?', history=['a', 'b', 'c']), 'no pairs of turns'),
    'a history that is a text': (dict(prompt='Who?', history='A: Hi. B: Ho.'), 'field history must be a list of messages'),
    'a conversation that is a text': (dict(conversations='A: Hi. B: Ho.'), 'field conversations must be a list of messages'),
    'the number of a choice': (dict(question='Who?', choices=['a', 'b'], answer=1), 'the number of a choice'),
    'an answer that is a question': (dict(prompt='Hi', response=[dict(role='user', content='Hi')]), 'field response is an answer'),
    'two spellings': (dict(prompt='a', Prompt='b'), 'in two spellings'),
    'a role that is a list': (dict(messages=[dict(role=['user'], content='Hi')]), "role is ['user']"),
    'a role that is an object': (dict(messages=[dict(role={'a': 1}, content='Hi')]), 'messages[0].role'),
    'a content of numbers': (dict(messages=[dict(role='user', content=[1, 2])]), 'messages[0].content'),
    'half a character in metadata': (dict(prompt='Hi', source='\ud83d'), 'half a character'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_what_would_change_the_meaning_is_refused(tmp_path, name):
    row, says = REFUSED[name]
    assert says in refusal(tmp_path, row)
    assert len(load_conversations(write(tmp_path, [row, dict(prompt='Hi')]), on_error='skip')) == 1


def test_an_unasked_column_is_said_once_a_file(tmp_path, caplog):
    rows = [dict(prompt=f'{i}?', hint=f'hint {i}', rationale='so', empty='') for i in range(5)]
    rows.append(dict(messages=[dict(role='user', content='Hi'), dict(role='assistant', content='Ho', reasoning_content='Hm.', weight=0)]))
    with caplog.at_level(logging.WARNING, 'opd_nb'): conversations = load_conversations(write(tmp_path, rows))
    assert [r.getMessage().partition(': ')[2] for r in caplog.records] == [
        'columns that are not asked, and kept as metadata: hint, rationale',
        'keys of messages that are not read: messages[].reasoning_content, messages[].weight']
    assert conversations[0].metadata['hint'] == 'hint 0'


def test_names_of_columns_are_cut_and_cleaned_before_they_are_shown(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, 'opd_nb'): load_one(tmp_path, {'prompt': 'Hi', 'x\x1b[2J' + 'y' * 10**6: 'z'})
    said, = (r.getMessage() for r in caplog.records)
    assert '\x1b' not in said and len(said) < 500


# turns as text

def as_pandas(folder, row):
    path = folder / 'pandas.csv'
    pd.DataFrame([row]).to_csv(path, index=False)
    return path


def as_datasets(folder, row):
    datasets = pytest.importorskip('datasets')
    datasets.disable_progress_bars()
    path = folder / 'datasets.csv'
    datasets.Dataset.from_list([row]).to_csv(str(path))
    return path


def as_numpy(folder, row):
    "As pandas writes what it read from a parquet file."
    pd.DataFrame([row]).to_parquet(folder / 'x.parquet')
    path = folder / 'numpy.csv'
    pd.read_parquet(folder / 'x.parquet').to_csv(path, index=False)
    return path


def as_json_cell(folder, row):
    path = folder / 'json.csv'
    with open(path, 'w', newline='', encoding='utf-8') as f:
        writer = csv.writer(f)
        writer.writerows([row.keys(), [json.dumps(v) if isinstance(v, list) else v for v in row.values()]])
    return path


@pytest.mark.parametrize('save', [as_pandas, as_datasets, as_numpy, as_json_cell])
@pytest.mark.parametrize('row', [dict(conversations=TALK), dict(messages=[dict(role='user', content=QUESTION), dict(role='assistant', content=ANSWER)]),
                                 dict(prompt=TALK[:1], completion=TALK[1:]), dict(prompt=QUESTION, chosen=TALK, rejected=TALK[:1]),
                                 dict(question=TALK[:1], answer=ANSWER)], ids=lambda row: '-'.join(row))
def test_a_list_of_messages_in_a_cell(tmp_path, save, row):
    conversation, = load_conversations(save(tmp_path, row))
    assert texts(conversation) == [('user', QUESTION), ('assistant', ANSWER)]


@pytest.mark.parametrize('text', [json.dumps(TALK)[:-9], str(TALK)[:40], "[{'role': 'user', 'content': open('x')}]",
                                  "[{'role': 'user', 'content': 'Hi', 'at': datetime.now()}]", "[{'role': 'user', 'content': __import__('os')}]",
                                  "array([{'role': 'user', 'content': 'Hi'}], dtype=object)"])
@pytest.mark.parametrize('column', ['prompt', 'conversations', 'messages', 'text'])
def test_what_looks_like_messages_and_is_none_is_refused(tmp_path, text, column):
    assert 'looks like a list of messages' in refusal(tmp_path, {column: text})


@pytest.mark.parametrize('text', ['What is [1, 2] + [3]?', '[{"name": "Ann", "age": 3}]', '[{"from": "Ulm", "to": "Bern"}]', 'role: user\nHi',
                                  json.dumps(TALK) + '\nWhich format is this?', '{"messages": [{"role": "user", "content": "Hi"}]}'])
def test_a_question_about_json_stays_a_question(tmp_path, text):
    assert texts(load_one(tmp_path, dict(prompt=text))) == [('user', text)]


def test_nothing_in_a_cell_is_evaluated(tmp_path):
    flag = tmp_path / 'flag'
    cell = f"[{{'role': 'user', 'content': open({str(flag)!r}, 'w')}}]"
    refusal(tmp_path, dict(conversations=cell))
    assert not flag.exists()


# one record alone

@pytest.mark.parametrize('record', [TALK, dict(conversations=TALK), dict(conversations=TALK, system='S'), dict(messages=TALK, tags=['a']),
                                    dict(prompt=TALK[:1], completion=TALK[1:]), dict(prompt=QUESTION, chosen=TALK, rejected=TALK[:1]),
                                    dict(prompt=QUESTION, answer=ANSWER), dict(instruction=QUESTION, output=ANSWER, history=[['a', 'b']])],
                         ids=lambda r: 'list' if isinstance(r, list) else '-'.join(r))
def test_one_record_alone_in_a_json_file(tmp_path, record):
    (tmp_path / 'x.json').write_text(json.dumps(record))
    conversation, = load_conversations(tmp_path / 'x.json')
    assert texts(conversation)[-2:] == [('user', QUESTION), ('assistant', ANSWER)]


def test_a_list_of_records_stays_a_list(tmp_path):
    for whole in ([dict(conversations=TALK)] * 3, dict(conversations=[dict(conversations=TALK)] * 3), dict(data=[dict(prompt='a')] * 3), [TALK] * 3):
        (tmp_path / 'x.json').write_text(json.dumps(whole))
        assert len(load_conversations(tmp_path / 'x.json')) == 3


# hostile files

@pytest.mark.parametrize('text', ['[' * 100_000, '{"a":' * 100_000, '{"prompt": "Hi", "x": ' + '[' * 500 + ']' * 500 + '}',
                                  '{"prompt": ' + '{"a": ' * 300 + '1' + '}' * 301])
@pytest.mark.parametrize('suffix', ['json', 'jsonl'])
def test_deep_nesting_is_refused(tmp_path, text, suffix):
    (tmp_path / f'x.{suffix}').write_text(text)
    with pytest.raises(BadInput, match='nested too deeply'): load_conversations(tmp_path / f'x.{suffix}')


def test_deep_nesting_in_a_cell_is_refused(tmp_path):
    for cell in ('[{"role": "user", "content": ' + '[' * 5000, "[{'role': 'user', 'content': " + '(' * 5000, '[' * 100_000):
        with pytest.raises(BadInput): load_conversations(as_json_cell(tmp_path, dict(conversations=cell)))


def test_a_text_that_no_model_reads_is_refused(tmp_path):
    path = write(tmp_path, [dict(prompt='a ' * 6_000_000), dict(prompt='Hi')])
    with pytest.raises(BadInput) as e: load_conversations(path)
    assert 'field prompt has 12,000,000 characters' in str(e.value) and len(str(e.value)) < 1000
    assert len(load_conversations(path, on_error='skip')) == 1


def test_a_line_that_no_prompt_fills_is_not_parsed(tmp_path, monkeypatch):
    from opd_nb.data import formats
    monkeypatch.setattr(formats, 'MAX_LINE_CHARS', 1000)
    with pytest.raises(BadInput, match='at most 1,000 are read'): load_conversations(write(tmp_path, [dict(prompt='x' * 2000)]))


def test_values_that_json_does_not_have_survive_a_round_trip(tmp_path):
    "Dates in a parquet file are metadata; they become text when they are saved."
    when = pd.Timestamp('2026-11-03 12:00')
    pd.DataFrame([dict(prompt='Hi', answer='Ho', when=when, score=float('nan'))]).to_parquet(tmp_path / 'x.parquet')
    conversations = load_conversations(tmp_path / 'x.parquet')
    assert conversations[0].reference == 'Ho' and 'score' not in conversations[0].metadata
    for ending in ('jsonl', 'json', 'csv'):
        again, = load_conversations(save_conversations(conversations, tmp_path / f'y.{ending}'))
        assert again.messages == conversations[0].messages and again.metadata['when'].startswith('2026-11-03')


def test_a_file_without_permission(tmp_path, monkeypatch):
    def refuse(*args, **kwargs): raise PermissionError(13, 'Permission denied')
    path = write(tmp_path, [dict(prompt='Hi')])
    monkeypatch.setattr(Path, 'read_text', refuse)
    with pytest.raises(BadInput, match=r'could not be read \(Permission denied\)'): load_conversations(path)


def test_paths_that_no_file_has(tmp_path):
    for path in (tmp_path / ('x' * 5000 + '.jsonl'), 'a\0b.jsonl', tmp_path / 'x.jsonl' / 'y.jsonl'):
        with pytest.raises(BadInput): load_conversations(path)


# skipping

def test_skipped_rows_are_counted_by_reason_and_kept(tmp_path, caplog):
    rows = [dict(prompt='Hi'), dict(prompt=' '), dict(messages=[dict(role='user')]), dict(prompt=''), dict(prompt='x', tools=[1])]
    with caplog.at_level(logging.WARNING, 'opd_nb'): assert len(load_conversations(write(tmp_path, rows), on_error='skip')) == 1
    said, = (r.getMessage() for r in caplog.records)
    assert '4 of 5 rows skipped' in said and '2 times, first in row 2' in said and 'messages[0].content' in said and 'field tools' in said
    kept = read_rows(tmp_path / 'data.jsonl.skipped.jsonl')
    assert [r['row'] for r in kept] == [2, 3, 4, 5] and [r['content'] for r in kept] == rows[1:]


def test_skipped_rows_that_cannot_be_kept_do_not_end_the_loading(tmp_path, caplog):
    (tmp_path / 'data.jsonl.skipped.jsonl').mkdir()
    with caplog.at_level(logging.WARNING, 'opd_nb'):
        assert len(load_conversations(write(tmp_path, [dict(prompt='Hi'), 7]), on_error='skip')) == 1
    assert 'could not be kept' in caplog.text


# tables that a spreadsheet opens

FORMULAS = ['=1+1', '+1+1', '-1+cmd|x', '@SUM(A1)', "=cmd|' /C calc'!A0", '\t=1', "'=1", "''@a"]


def test_no_cell_that_we_write_is_a_formula(tmp_path):
    conversations = [Conversation((dict(role='user', content=a), dict(role='assistant', content=b))) for a, b in zip(FORMULAS, FORMULAS[::-1])]
    path = save_conversations(conversations, tmp_path / 'x.csv')
    cells = [cell for row in csv.reader(path.read_text(encoding='utf-8').splitlines()) for cell in row]
    assert not [cell for cell in cells if cell.strip()[:1] in ('=', '+', '-', '@') and cell]
    assert load_conversations(path) == conversations
    (tmp_path / 'foreign.csv').write_text('prompt,answer\n\'=1,"\'@a"\n')
    assert texts(load_conversations(tmp_path / 'foreign.csv')[0]) == [('user', "'=1"), ('assistant', "'@a")]


# whatever a file holds

def refused(path, words, data):
    path.write_bytes(data)
    with pytest.raises(BadInput, match=words): load_conversations(path)


def test_a_key_with_two_values_is_refused(tmp_path):
    refused(tmp_path / 'x.jsonl', "'prompt' is there twice", b'{"prompt": "a", "prompt": "b"}')
    assert load_conversations(write(tmp_path, [dict(prompt='a')])) and loaded('{"a": 1, "a": 1}') == {'a': 1}


@pytest.mark.parametrize('name', ['x.txt', 'x.csv', 'x.jsonl'])
@pytest.mark.parametrize('code', ['utf-16-le', 'utf-32-be'])
def test_text_of_another_encoding_is_refused(tmp_path, name, code): refused(tmp_path / name, 'NUL', 'prompt,answer\nHi,4\n'.encode(code))


@pytest.mark.parametrize('part', [dict(type='image', text=''), dict(type='image_url', text='see', image_url={'url': 'x'}), dict(text='see', image='x.png')])
def test_a_picture_with_a_text_is_a_picture(tmp_path, part):
    with pytest.raises(BadInput, match='no text'): load_one(tmp_path, dict(messages=[dict(role='user', content=[part, dict(type='text', text='What?')])]))


def test_half_a_character_in_metadata_can_be_saved(tmp_path):
    found = load_conversations(write(tmp_path, [{'prompt': 'a', '\ud83d': 1}]))
    for ending in ('csv', 'jsonl'): assert load_conversations(save_conversations(found, tmp_path / f'again.{ending}'))[0].messages == found[0].messages


@pytest.mark.parametrize('text', ['-' + ' ' * 50_000 + 'x', '[}' + '\n' * 50_000 + 'x'])
def test_no_text_takes_long(text):
    start = time.monotonic()
    as_cell(text), loaded(text)
    assert time.monotonic() - start < 1


NAMES = ['prompt', 'Prompt', 'instruction', 'input', 'messages', 'conversations', 'history', 'context', 'chosen', 'answer', 'completion', 'system',
         'metadata', 'tools', 'choices', 'target', 'text', 'x', '', 'role']
WORDS = ['Hi', '', ' ', '[]', '{}', 'null', "[{'role': 'user', 'content': 'Hi'}]", '[{"from": "human", "value": "Hi"}]', '\n\nHuman: a\n\nAssistant: b',
         '=1', '\ud83d', '\0', '\x1b[2J', "[{'role': 'user'", '[' * 300]
ROLES = ['user', 'assistant', 'system', 'gpt', 'observation', 'User', 'x', None, ['user'], {'a': 1}, 7]
scalars = st.one_of(st.none(), st.booleans(), st.integers(-3, 10**20), st.floats(), st.sampled_from(WORDS), st.text(max_size=8))
contents = st.one_of(st.sampled_from(['Hi', 'Ho', '=1', "- 'a'"]), st.text(max_size=8), scalars)
message = st.fixed_dictionaries({'role': st.sampled_from(ROLES[:3] * 4 + ROLES), 'content': contents},
                                optional={'tool_calls': st.sampled_from([None, [], [1]]), 'name': scalars, 'value': scalars})
values = st.recursive(st.one_of(scalars, message), lambda x: st.one_of(st.lists(x, max_size=3), st.dictionaries(st.sampled_from(NAMES), x, max_size=3)), max_leaves=6)
turns = st.one_of(st.lists(message, min_size=1, max_size=4), st.lists(st.lists(contents, min_size=2, max_size=2), max_size=2), values)
asking = st.one_of(st.fixed_dictionaries({'messages': turns}), st.fixed_dictionaries({'prompt': contents}), st.fixed_dictionaries({'prompt': turns}),
                   st.fixed_dictionaries({'instruction': contents, 'input': contents}), st.fixed_dictionaries({'chosen': turns, 'prompt': contents}))
others = st.one_of(st.just({}), st.dictionaries(st.sampled_from(NAMES), values, max_size=2), st.fixed_dictionaries({'history': turns}), st.fixed_dictionaries({'answer': contents}),
                   st.fixed_dictionaries({'context': contents}), st.fixed_dictionaries({'metadata': values}))
rows = st.one_of(st.builds(lambda a, b: {**a, **b}, asking, others), st.builds(lambda a, b: {**a, **b}, asking, others), values)
FUZZ = dict(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)


def read_or_refuse(path):
    "Read a file in all ways; what is read can be saved, and says the same when it is read again."
    for on_error in ('raise', 'skip'):
        try: conversations = load_conversations(path, on_error)
        except BadInput as e:
            assert len(str(e)) < 3000
            continue
        for ending in ('jsonl', 'csv'):
            again = load_conversations(save_conversations(conversations, path.parent / f'again.{ending}'))
            assert [c.messages for c in again] == [c.messages for c in conversations]


@settings(max_examples=300, **FUZZ)
@given(data=st.lists(rows, min_size=1, max_size=3))
def test_any_rows_are_read_or_refused(tmp_path, data):
    path = tmp_path / 'x.jsonl'
    path.write_text(''.join(json.dumps(row) + '\n' for row in data), encoding='utf-8')
    read_or_refuse(path)
    path = tmp_path / 'x.json'
    path.write_text(json.dumps(data if len(data) > 1 else data[0]), encoding='utf-8')
    read_or_refuse(path)


@settings(max_examples=150, **FUZZ)
@given(table=st.lists(st.lists(st.sampled_from(NAMES[:-1] + WORDS), min_size=1, max_size=4), min_size=1, max_size=4), quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
def test_any_table_is_read_or_refused(tmp_path, table, quoting):
    path = tmp_path / 'x.csv'
    with open(path, 'w', newline='', encoding='utf-8', errors='replace') as f: csv.writer(f, quoting=quoting).writerows(table)
    read_or_refuse(path)


SEEDS = {'x.jsonl': json.dumps(dict(messages=TALK)).encode() + b'\n' + json.dumps(dict(prompt='Hi', answer=4)).encode(),
         'x.json': json.dumps([dict(conversations=TALK), dict(prompt='Hi')]).encode(),
         'x.csv': b'prompt,answer\n"Hi, you",4\nb,"c\nd"\n', 'x.tsv': b'prompt\tanswer\na\tb\n', 'x.txt': b'Hi\n\nHo\n'}


@pytest.mark.parametrize('seconds', [10, pytest.param(60, marks=slow)])
def test_any_damage_is_read_or_refused(tmp_path, seconds):
    "Flipped, cut and inserted bytes, in files of every kind."
    pd.DataFrame([dict(prompt='Hi', answer='4', n=7)] * 3).to_parquet(tmp_path / 'x.parquet')
    seeds = SEEDS | {'x.parquet': (tmp_path / 'x.parquet').read_bytes()}
    for rng in attempts(seconds):
        name = rng.choice(list(seeds))
        data = damaged(rng, seeds[name])
        (tmp_path / name).write_bytes(data)
        try: read_or_refuse(tmp_path / name)
        except Exception:
            print(name, data)
            raise
