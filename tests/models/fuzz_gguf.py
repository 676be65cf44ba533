"Opens damaged GGUF files until the time is up, in a process of its own: llama.cpp may end it. Writes the seed before each, and what escaped."
import random
import struct
import sys
import time
import traceback
from pathlib import Path

from opd_nb.core.errors import BadInput
from opd_nb.core.types import Conversation
from opd_nb.teachers.gguf import FileCodec, GGUFTeacher

PUZZLE = Conversation(({'role': 'user', 'content': 'Make 31 from 3 7 10.'},))
SIZES = [0, 1, 2, 7, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1]


def strings_of(data, rng):
    "The place of one of the texts of the header, with its length before it."
    for _ in range(20):
        at = rng.randrange(24, len(data) - 16)
        size, = struct.unpack_from('<Q', data, at)
        if 0 < size < 2000 and at + 8 + size < len(data): return at, size
    return 24, 1


def damaged(data, header, rng):
    "A file with one to four changes, most of them in its header."
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        kind = rng.choice(['byte', 'byte', 'bit', 'size', 'counts', 'cut', 'swap', 'text', 'type', 'noise', 'name', 'weights'])
        at = rng.randrange(4, min(header, len(data) - 9)) if rng.random() < .6 else rng.randrange(4, min(2000, len(data) - 9))
        if kind == 'byte': data[at] = rng.randrange(256)
        if kind == 'bit': data[at] ^= 1 << rng.randrange(8)
        if kind == 'size': struct.pack_into('<Q', data, strings_of(data[:header], rng)[0], rng.choice(SIZES))
        if kind == 'counts': struct.pack_into('<Q', data, rng.choice([8, 16]), rng.choice(SIZES + [3, 47, 20]))
        if kind == 'cut': del data[rng.randrange(4, len(data)):]
        if kind == 'swap': data[at:at + 8] = data[at:at + 8][::-1]
        if kind == 'type': struct.pack_into('<I', data, at, rng.choice([0, 1, 4, 7, 8, 9, 12, 13, 99, 2**31]))
        if kind == 'noise': data[at:at + 40] = rng.randbytes(40)
        if kind == 'text':
            start, size = strings_of(data[:header], rng)
            data[start + 8:start + 8 + size] = rng.choice([bytes(size), b'\xff' * size, rng.randbytes(size), b'{' * size])
        if kind == 'name':
            found = data.find(rng.choice([b'tokenizer.', b'general.', b'llama.', b'qwen', b'token_embd', b'blk.0', b'.weight', b'{%', b'}}', b'<|im']), 0, header)
            if found > 0: data[found] = rng.randrange(256)
        if kind == 'weights' and len(data) > header + 100:
            place = rng.randrange(header, len(data) - 50)
            data[place:place + 40] = rng.choice([b'\xff' * 40, rng.randbytes(40)])
        if len(data) < 40: break
    return bytes(data)


def opened(path, whole):
    "A file as teacher; whole, it scores and writes too."
    if not whole: return FileCodec(path).prompt(PUZZLE.prompt)
    teacher = GGUFTeacher(path, n_ctx=128)
    teacher.score([PUZZLE], [(b'7*3=21', True)], on_error='return')
    return teacher.generate([PUZZLE], 3)


def main(first, seconds, folder, *files):
    seed, end, results = int(first), time.monotonic() + float(seconds), Path(folder) / 'results'
    whole = [(Path(f).read_bytes(), int(header)) for f, header in (x.rsplit('=', 1) for x in files)]
    with results.open('a') as out:
        while time.monotonic() < end:
            rng = random.Random(seed)
            path = Path(folder) / 'x.gguf'
            path.write_bytes(damaged(*rng.choice(whole), rng))
            print(f'seed {seed}', file=out, flush=True)
            try: opened(path, rng.random() < .3); said = 'opened'
            except BadInput: said = 'refused'
            except Exception: said = 'escaped ' + traceback.format_exc().replace('\n', ' | ')[-600:]
            print(f'{said}', file=out, flush=True)
            seed += 1


if __name__ == '__main__': main(*sys.argv[1:])
