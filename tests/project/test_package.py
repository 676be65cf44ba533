"What a notebook cannot test about the package it exports: its layout, its order, what a wheel carries."
import ast, configparser, json, re, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted(p for p in (ROOT / 'nbs').rglob('*.ipynb') if re.match(r'\d', str(p.relative_to(ROOT / 'nbs'))) and '.ipynb_checkpoints' not in p.parts)
MODULES = sorted(p for p in (ROOT / 'opd_nb').rglob('*.py') if p.name != '_modidx.py')
READ = {p: json.loads(p.read_text(encoding='utf-8')) for p in NOTEBOOKS}


def code(nb): return [''.join(c['source']) for c in READ[nb]['cells'] if c['cell_type'] == 'code']
def module_of(nb): return re.search(r'#\|\s*default_exp\s+([\w.]+)', '\n'.join(code(nb)))[1]
def exported(nb): return [c for c in code(nb) if re.search(r'^#\|\s*export', c, re.M)]
def place(nb): return nb.relative_to(ROOT / 'nbs').with_suffix('').parts


PLACE = {f'opd_nb.{module_of(p)}'.removesuffix('.__init__'): place(p) for p in NOTEBOOKS}


def imported(cells):
    "Every module and name that these cells import, in functions too: `from a.b import c` is a.b and a.b.c."
    for node in (n for c in cells for n in ast.walk(ast.parse(re.sub(r'^\s*[%!].*$', 'pass', c, flags=re.M)))):
        if isinstance(node, ast.Import): yield from (x.name for x in node.names)
        if isinstance(node, ast.ImportFrom): yield from (node.module, *(f'{node.module}.{x.name}' for x in node.names))


def upward(here, cells):
    "What these cells import of notebooks that do not come before `here`."
    return sorted({m for m in imported(cells) if m != 'opd_nb' and m in PLACE and PLACE[m] >= here})


@pytest.mark.parametrize('nb', NOTEBOOKS, ids=lambda p: '/'.join(place(p)))
def test_imports_only_from_earlier_notebooks(nb):
    assert not upward(place(nb), exported(nb)), f'{nb.name} imports from notebooks that come later'


@pytest.mark.parametrize('planted', ['from opd_nb.training.loop import train', 'from opd_nb.training import loop', 'import opd_nb.training.loop', 'import opd_nb.training.loop as it',
                                     'def late():\n    from opd_nb.training import loop', 'from opd_nb.losses.matched import gold'])
def test_the_guard_sees_a_planted_import(planted):
    "In a notebook of 04_losses, `training` comes later; `matched` is the notebook itself."
    here = PLACE['opd_nb.losses.matched']
    assert upward(here, exported(ROOT / 'nbs' / Path(*here).with_suffix('.ipynb'))) == []
    assert upward(here, [planted]) == (['opd_nb.losses.matched'] if 'gold' in planted else ['opd_nb.training.loop'])


def test_every_notebook_has_a_number_of_its_own():
    "In its folder; so the order in JupyterLab is the reading order and the import order."
    numbers = [tuple(re.match(r'\d+', part)[0] for part in place(p)) for p in NOTEBOOKS]
    assert len(numbers) == len(set(numbers)) and sorted(numbers) == [n for _, n in sorted(zip(map(place, NOTEBOOKS), numbers))]
    assert all(re.fullmatch(r'\d\d_\w+', part) for p in NOTEBOOKS for part in place(p))


def test_a_folder_is_a_package_of_that_name():
    for p in NOTEBOOKS:
        name, here = module_of(p), place(p)
        if name not in ('__init__', '__main__', 'training.__main__'): assert name.split('.') == [part[3:] for part in here], p


def test_no_package_is_crowded():
    sizes = {d.name: len(list(d.glob('*.ipynb'))) for d in (ROOT / 'nbs').glob('[0-9]*') if d.is_dir()}
    assert 10 <= len(sizes) <= 15 and max(sizes.values()) <= 14, sizes
    assert {p.name for p in (ROOT / 'opd_nb').glob('*.py')} == {'__init__.py', '__main__.py', '_modidx.py'}


@pytest.mark.parametrize('path', MODULES, ids=lambda p: str(p.relative_to(ROOT / 'opd_nb')))
def test_a_module_is_short(path):
    assert len(path.read_text().splitlines()) <= 450, 'split the notebook: one notebook, one idea'


def test_no_orphan_module():
    "A deleted notebook leaves its module behind, and its entries in the index."
    expected = {module_of(nb) for nb in NOTEBOOKS}
    assert {'.'.join(p.relative_to(ROOT / 'opd_nb').with_suffix('').parts) for p in MODULES if p.name != '__init__.py' or p.parent.name == 'opd_nb'} == expected
    index = (ROOT / 'opd_nb' / '_modidx.py').read_text()
    assert set(re.findall(r"'opd_nb\.([\w.]+)': \{", index)) <= expected


def test_import_is_light():
    heavy = ('torch', 'transformers', 'pandas', 'matplotlib', 'papermill')
    code = f'import sys, opd_nb; from opd_nb import BadInput; print([m for m in {heavy} if m in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'


def test_public_names():
    "Names that others rely on; a star import gives them all."
    import opd_nb
    relied_on = 'OPDConfig train load_conversations load_teacher LM rollout align VocabMap get_loss register_loss register_teacher evaluate BadInput'.split()
    assert set(relied_on) <= set(opd_nb.PUBLIC) <= set(dir(opd_nb)) and all(callable(getattr(opd_nb, name)) for name in opd_nb.PUBLIC)


def beside_the_public_api(cells):
    "What these cells import of the package that is not promised to stay; the game of the laboratory may be used."
    import opd_nb
    names, shortcuts = {m for m in imported(cells) if m and m.split('.')[0] == 'opd_nb'}, tuple(f'opd_nb.{name}' for name in opd_nb.SHORTCUTS)
    return sorted(m for m in names if m != 'opd_nb' and not m.startswith('opd_nb.lab') and not m.startswith(shortcuts) and m.removeprefix('opd_nb.') not in opd_nb.PUBLIC)


@pytest.mark.parametrize('name', 'quickstart distill synthesize teachers evaluate validate trl'.split())
def test_run_notebooks_use_the_public_api(name):
    cells = json.loads((ROOT / 'nbs' / 'runs' / f'{name}.ipynb').read_text(encoding='utf-8'))['cells']
    assert not beside_the_public_api(''.join(c['source']) for c in cells if c['cell_type'] == 'code')


def test_readme_uses_the_public_api():
    blocks = re.findall(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(encoding='utf-8'), re.S)
    assert blocks and not beside_the_public_api(blocks)


@pytest.mark.parametrize('planted', ['from opd_nb.models.lm import LM', 'from opd_nb.models import lm', 'import opd_nb.models.lm as it', 'from opd_nb import models', 'def f():\n    from opd_nb import models'])
def test_that_guard_sees_a_planted_import(planted):
    assert beside_the_public_api([planted]) and not beside_the_public_api(['from opd_nb import LM\nfrom opd_nb.lab import countdown'])


@pytest.mark.parametrize('nb', sorted((ROOT / 'nbs' / 'runs').glob('*.ipynb')), ids=lambda p: p.stem)
def test_old_names_are_used_by_nobody(nb):
    import opd_nb
    packages = {p.parent.name for p in MODULES}
    text = nb.read_text(encoding='utf-8')
    assert not [m for m in re.findall(r'opd_nb\.(\w+)', text) if m in opd_nb.MOVED and m not in packages]


def test_old_modules_are_found(tmp_path):
    "Each module of the first layout, by its old name, with a warning that says where it is now."
    import opd_nb
    lines = '\n'.join(f'import opd_nb.{old}' for old in opd_nb.MOVED)
    done = subprocess.run([sys.executable, '-W', 'always::DeprecationWarning', '-c', f'{lines}\nfrom opd_nb.types import BadInput\nfrom opd_nb.losses import gold\nfrom opd_nb.engine import LossOutput, get_loss\nfrom opd_nb import countdown\ncountdown.verify'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 'opd_nb.types is opd_nb.core.types and opd_nb.core.errors now' in done.stderr


def test_renamed_functions_are_found():
    "By module and name of the first layout, with a warning that says what they are called now."
    lines = ['import warnings, opd_nb', "warnings.simplefilter('ignore')", 'from importlib import import_module',
             'for old, names in opd_nb.RENAMED.items():', '    for name in names: getattr(import_module(f"opd_nb.{old}"), name)',
             "warnings.simplefilter('always')", 'from opd_nb.engine import over_pieces, inside', 'from opd_nb.models import head_agrees', 'from opd_nb.distil import distil_rows',
             'from opd_nb.losses import chunked', 'from opd_nb.models import lm', 'assert over_pieces is chunked.sum_over_blocks and head_agrees is lm.head_matches']
    done = subprocess.run([sys.executable, '-c', '\n'.join(lines)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for said in ('opd_nb.engine.over_pieces is opd_nb.losses.chunked.sum_over_blocks now', 'opd_nb.models.head_agrees is opd_nb.models.lm.head_matches now', 'opd_nb.distil.distil_rows was divided'):
        assert said in done.stderr


def test_distil_rows_is_called_as_before():
    "Seven arguments by place, as a trainer on another library calls it."
    import opd_nb, torch
    from opd_nb.lab import countdown
    from opd_nb.training.pairs import loss_for
    lm, teacher = opd_nb.LM.load('tiny:student'), opd_nb.load_teacher('tiny:')
    vocab = opd_nb.VocabMap.build(lm.codec, teacher.codec)
    rollouts = [r for r in opd_nb.rollout(lm, countdown.draw(4, 0), 12, 0) if r.ids]
    with pytest.warns(DeprecationWarning): from opd_nb.distil import distil_rows
    out, metrics = distil_rows(lm, teacher, vocab, loss_for('bpm', vocab, teacher), rollouts, 'none', -float('inf'))
    out.total.backward()
    assert out.weight > 0 and torch.isfinite(out.total) and {'teacher_nll', 'dropped', 'overlap'} <= {name for _, named in metrics for name in named}


def test_the_table_of_old_names_is_complete():
    import opd_nb
    rows = re.findall(r'^\| `(\w+)` \| (.*) \|$', (ROOT / 'CONTRIBUTING.md').read_text(encoding='utf-8'), re.M)
    assert {old: re.findall(r'`([\w.]+)`', new) for old, new in rows} == opd_nb.MOVED


@pytest.mark.parametrize('nb', sorted((ROOT / 'nbs').rglob('*.ipynb')), ids=lambda p: '/'.join(p.relative_to(ROOT / 'nbs').parts))
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
    assert runs and {p.name for p in (built / 'run_notebooks').glob('*.ipynb')} == runs
    assert {p.relative_to(ROOT / 'opd_nb') for p in MODULES} <= {p.relative_to(built) for p in built.rglob('*.py')} and (built / 'py.typed').is_file()
    assert {'laptop.yaml', 'countdown.jsonl', 'cluster.yaml'} <= {p.name for p in (built / 'presets').iterdir()} and (built / 'constraints.txt').is_file()
    for name in ('teacher', 'student', 'student-bpe'):
        assert {'config.json', 'model.safetensors', 'tokenizer.json', 'README.md'} <= {p.name for p in (built / 'tiny' / name).iterdir()}
    assert sum(p.stat().st_size for p in (built / 'tiny').rglob('*')) < 6e6


def test_extras():
    ini = configparser.ConfigParser(delimiters=['=']); ini.read(ROOT / 'settings.ini', encoding='utf-8')
    assert {'extra_' + e for e in 'gguf nemo eval trl vllm track'.split()} | {'dev_requirements'} <= set(ini['DEFAULT'])


def test_no_check_is_an_assert():
    "PYTHONOPTIMIZE=1 removes them."
    found = [f'{p.relative_to(ROOT)}:{n.lineno}' for p in MODULES for n in ast.walk(ast.parse(p.read_text(encoding='utf-8'))) if isinstance(n, ast.Assert)]
    assert not found, found
