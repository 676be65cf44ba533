"Damage of every kind to files, for some seconds, from a seed that is printed."
import os
import random
import time

SECONDS = float(os.environ.get('FUZZ_SECONDS') or 0)
PIECES = [b'', b'\n', b'\0', b'\xff\xfe', b'[', b'{', b'}', b'"', b"'", b':', b': ', b'- ', b'&a ', b'*a', b'<<: ', b'!!binary ', b'!!bool x', b'!!float x', b'!!set {a}', b'!!python/name:os.system', b'%TAG', b'---\n', b'...\n', b'|\n', b'>\n', b'#',
          b'null', b'~', b'nan', b'.inf', b'-.inf', b'9' * 400, b'1e999', b'0x' + b'f' * 300, b'2020-99-99', b'12:30:45', b'\t', b'\r\n', b'\xc3\xa4', b'\xf0\x9f\x98\x80', b'\\ud83d', b'true', b'-1', b'[' * 300, b'a: ' * 50]
VALUES = [None, True, False, 0, -1, 1, 10**400, 1e308, float('nan'), float('inf'), '', ' ', 'x', 'x' * 10**5, '\x1b[2J', '😀', '\ud83d', [], [1], [[[]]], {}, {'a': 1}, {1: 2}, b'bytes', {1, 2}, '1', 'tiny:', '../..', '/', '\0', 'all', '1e3']


def attempts(seconds, seed=0):
    "Random generators, one an attempt, until the time is over; at least five."
    seed = int(os.environ.get('FUZZ_SEED', seed))
    end, n = time.monotonic() + (SECONDS or seconds), 0
    while n < 5 or time.monotonic() < end:
        yield random.Random(f'{seed} {n}')
        n += 1
    print(f'{n} inputs from seed {seed}')


def damaged(rng, data):
    "Bytes that were changed, cut, doubled or filled with pieces, in up to four places."
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        how = rng.randrange(6)
        if how == 0 and at < len(data): data[at] ^= 1 << rng.randrange(8)
        elif how == 1: del data[at:at + rng.choice((1, 5, 80, 5000))]
        elif how == 2: data[at:at] = data[at:at + rng.choice((3, 40, 400))]
        elif how == 3: del data[at:]
        elif how == 4: data[at:at + rng.choice((0, 8, 512))] = bytes(rng.choice((1, 9, 512)))
        else: data[at:at + rng.choice((0, 1, 6))] = rng.choice(PIECES)
    return bytes(data)
