"What a notebook cannot test about the package it exports."
import configparser, json, re, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / 'nbs').glob('[0-9]*.ipynb'))
MODULES = sorted(p for p in (ROOT / 'opd_nb').glob('*.py') if not p.name.startswith('_'))


def source(nb): return ''.join(''.join(c['source']) + '\n' for c in json.loads(nb.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code')
def module_of(nb): return re.search(r'#\|\s*default_exp\s+(\w+)', source(nb))[1]


def test_import_is_light():
    heavy = ('torch', 'transformers', 'pandas', 'matplotlib', 'papermill')
    code = f'import sys, opd_nb; print([m for m in {heavy} if m in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'


def test_no_orphan_module():
    "A deleted notebook leaves its module behind, and its entries in the index."
    expected = {module_of(nb) for nb in NOTEBOOKS}
    assert {p.stem for p in MODULES} == expected
    index = (ROOT / 'opd_nb' / '_modidx.py').read_text()
    assert set(re.findall(r"'opd_nb\.(\w+)': \{", index)) == expected


@pytest.mark.parametrize('nb', NOTEBOOKS, ids=lambda p: p.stem)
def test_imports_only_from_lower_rooms(nb):
    order = {module_of(p): int(p.name[:2]) for p in NOTEBOOKS}
    text = (ROOT / 'opd_nb' / f'{module_of(nb)}.py').read_text()
    upward = [m for m in re.findall(r'^from opd_nb\.(\w+) import', text, re.M) if order[m] > int(nb.name[:2])]
    assert not upward, f'{nb.name} imports from {upward}, which come later'


@pytest.mark.parametrize('path', MODULES, ids=lambda p: p.stem)
def test_modules_stay_readable(path):
    assert len(path.read_text().splitlines()) <= 360, 'split the notebook: one room, one idea'


@pytest.mark.parametrize('nb', sorted((ROOT / 'nbs').rglob('*.ipynb')), ids=lambda p: p.stem)
def test_notebooks_hold_no_secret_path_or_error(nb):
    text = nb.read_text(encoding='utf-8')
    cells = json.loads(text)['cells']
    assert not [o for c in cells for o in c.get('outputs', []) if o['output_type'] == 'error']
    assert not re.search(r'hf_[A-Za-z]{20,}|sk-[A-Za-z0-9]{20,}', text)
    assert not re.search(r'/(home|root|work|Users)/', text), 'a path of one machine'


def test_wheel_carries_notebooks_and_models(tmp_path):
    subprocess.run([sys.executable, 'setup.py', '-q', 'build', '--build-base', str(tmp_path / 'b'), 'egg_info', '--egg-base', str(tmp_path)], cwd=ROOT, check=True, capture_output=True)
    built = next((tmp_path / 'b').glob('lib*')) / 'opd_nb'
    runs = {p.name for p in (ROOT / 'nbs' / 'runs').glob('*.ipynb')}
    assert runs and {p.name for p in (built / 'notebooks').glob('*.ipynb')} == runs
    assert {'laptop.yaml', 'countdown.jsonl', 'cluster.yaml'} <= {p.name for p in (built / 'presets').iterdir()} and (built / 'constraints.txt').is_file()
    for name in ('teacher', 'student', 'student-bpe'):
        assert {'config.json', 'model.safetensors', 'tokenizer.json', 'README.md'} <= {p.name for p in (built / 'tiny' / name).iterdir()}
    assert sum(p.stat().st_size for p in (built / 'tiny').rglob('*')) < 6e6


def test_extras():
    ini = configparser.ConfigParser(delimiters=['=']); ini.read(ROOT / 'settings.ini', encoding='utf-8')
    assert {'extra_' + e for e in 'gguf nemo eval trl vllm track'.split()} | {'dev_requirements'} <= set(ini['DEFAULT'])
