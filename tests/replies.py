"""Replies of real servers, recorded: llama.cpp's own, and the contracts of vLLM, SGLang and OpenAI's form kept by a
model of ours. `python tests/replies.py` records them anew, into data/replies.json."""
import copy
import json
from pathlib import Path

from opd_nb.core.types import Conversation

FILE = Path(__file__).with_name('data') / 'replies.json'
MODES = ['prompt_logprobs', 'sglang', 'echo', 'prefix_walk', 'continuation', 'llama_cpp']
PUZZLE = Conversation(({'role': 'user', 'content': 'Make 31 from 3 7 10.'},))
RECORDS = [PUZZLE], [(b'7*3=21 21+10=31', True)]


class Replay:
    "Stands in for the SDK's client: gives recorded replies, or records those of a real one."
    def __init__(self, replies, real=None, change=lambda n, reply: reply):
        self.replies, self.real, self.change, self.asked = replies, real, change, 0

    def with_options(self, **options): return self
    async def close(self): pass
    async def post(self, path, body, cast_to):
        key = json.dumps([path.rpartition('/')[2], body], sort_keys=True)
        if self.real: self.replies[key] = await self.real.post(path, body=body, cast_to=object)
        self.asked += 1
        return self.change(self.asked - 1, copy.deepcopy(self.replies.get(key, {})))


def rounded(reply):
    "A reply with six digits a number, and without what is of one server at one time."
    if isinstance(reply, float): return round(reply, 6)
    if isinstance(reply, list): return [rounded(x) for x in reply]
    if not isinstance(reply, dict): return reply
    return {k: rounded(v) for k, v in reply.items() if k not in ('created', 'id', 'timings', 'system_fingerprint') or k == 'id' and type(v) is int}


def recorded():
    "For each mode the replies to its probe and to one completion, by request."
    return json.loads(FILE.read_text(encoding='utf-8'))


def record(folder):
    "The same, from servers that are started now."
    from opd_nb.hosted.client import Endpoint
    from opd_nb.hosted.store import ReplyStore
    from opd_nb.teachers.api import APITeacher
    from opd_nb.teachers.base import load_teacher
    from servers import contract_server, served
    found, codec = {}, load_teacher('tiny:').codec
    with contract_server('tiny:teacher') as stand_in, served('tiny:teacher') as (llama, _):
        for mode in MODES:
            endpoint = Endpoint(llama if mode == 'llama_cpp' else stand_in, 'teacher', cache=ReplyStore(folder / mode), retries=0)
            endpoint.client = Replay(found.setdefault(mode, {}), endpoint.client)
            APITeacher(endpoint, codec, mode, 8).score(*RECORDS)
    return {mode: {key: rounded(reply) for key, reply in replies.items()} for mode, replies in found.items()}


if __name__ == '__main__':
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        text = json.dumps(record(Path(folder)), ensure_ascii=False, separators=(',', ':'))
    FILE.write_text(text.replace('},"', '},\n"') + '\n', encoding='utf-8')
