"Each command that README.md shows exists, with the flags it shows."
import json, re, shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / 'README.md').read_text(encoding='utf-8')
LINES = [line.split('#')[0].strip().removeprefix('$ ') for block in re.findall(r'```(?:sh|bash)\n(.*?)```', README, re.S) for line in block.replace('\\\n', ' ').splitlines()]


def lines(start): return [line for line in LINES if line.split()[:1] == [start]]


def test_readme_shows_commands(): assert len(lines('make')) >= 2 and lines('opd') and lines('papermill')


@pytest.mark.parametrize('line', lines('make'))
def test_make_targets(line): assert re.search(rf'^{line.split()[1]}:', (ROOT / 'Makefile').read_text(), re.M)


@pytest.mark.parametrize('line', lines('opd'))
def test_opd_commands(line, capsys):
    from opd_nb.cli.commands import COMMANDS
    from opd_nb.cli.app import main
    words = line.split()
    assert words[1] in COMMANDS, line
    flags = [w.partition('=')[0] for w in words if w.startswith('--')]
    if flags:
        try: main([words[1], '--help'])
        except SystemExit: pass
        shown = capsys.readouterr().out
        assert all(f in shown or f == '--config' for f in flags), f'{line}: not all of {flags}'


@pytest.mark.parametrize('line', lines('papermill'))
def test_papermill_parameters(line):
    nb = ROOT / line.split()[1]
    cell, = [c for c in json.loads(nb.read_text())['cells'] if 'parameters' in c['metadata'].get('tags', [])]
    for name in re.findall(r'-p (\w+)', line): assert re.search(rf'^{name}\b', ''.join(cell['source']), re.M), name


def test_blocks_open_and_close():
    "A block that lost its fence swallows the prose after it."
    fences = [line for line in README.splitlines() if line.startswith('```')]
    assert len(fences) % 2 == 0 and all(f != '```' for f in fences[::2]) and all(f == '```' for f in fences[1::2])
    assert len(re.findall(r'^```python', README, re.M)) >= 4


def test_python_blocks_run(tmp_path, monkeypatch):
    "In the order of the page, after the command that makes their data; with fewer steps and puzzles."
    from opd_nb.cli.app import main
    monkeypatch.chdir(tmp_path)
    def smaller(text): return re.sub(r'max_steps=\d+', 'max_steps=5', text.replace('8000', '200'))
    assert main(shlex.split(smaller(next(line for line in lines('opd') if 'synth' in line)))[1:]) == 0
    names = {}
    for block in re.findall(r'```python\n(.*?)```', README, re.S): exec(smaller(block), names)
    assert names['done'].steps == 5 and (names['done'].student / 'model.safetensors').exists()


def test_links_lead_somewhere():
    for link in re.findall(r'\]\(([^)#:]+)\)', README): assert (ROOT / link).exists(), link
