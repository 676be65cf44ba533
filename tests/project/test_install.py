"What is built from the sources installs and works: sdist, the wheel made from it, and the notebooks that it copies out."
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from conftest import ROOT, slow


def run(*words, cwd, **env):
    done = subprocess.run([str(w) for w in words], cwd=cwd, capture_output=True, text=True, env=os.environ | env)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def links(notebook):
    "Relative links in the text of a notebook."
    cells = json.loads(notebook.read_text(encoding='utf-8'))['cells']
    text = '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
    found = re.findall(r'\]\(([^)\s]+)\)', re.sub(r'```.*?```|`[^`\n]*`', '', text, flags=re.S))
    return [link.partition('#')[0] for link in found if ':' not in link and not link.startswith('#')]


def test_copied_notebooks_lead_somewhere(tmp_path, monkeypatch, capsys):
    from opd_nb.cli.app import main
    monkeypatch.chdir(tmp_path)
    assert main(['notebooks', 'a/b/mine']) == 0
    copies = sorted((tmp_path / 'a/b/mine').glob('*.ipynb'))
    assert {p.name for p in copies} == {p.name for p in (ROOT / 'nbs' / 'runs').glob('*.ipynb')}
    seen = [(p, link) for p in copies for link in links(p)]
    assert len(seen) > 20 and not [(p.name, link) for p, link in seen if not (p.parent / link).exists()]
    between = [link for p, link in seen if link.endswith(('distill.ipynb', 'quickstart.ipynb'))]
    assert between and all('/' not in link for link in between), 'from one copy to another'
    kept = {str(p.relative_to(ROOT / 'nbs/runs')) for p in (ROOT / 'nbs/runs/results').rglob('*.json')}
    assert kept == {str(p.relative_to(tmp_path / 'a/b/mine')) for p in (tmp_path / 'a/b/mine/results').rglob('*.json')}
    before = {p: p.stat().st_mtime_ns for p in copies}
    assert main(['notebooks', 'a/b/mine']) == 0 and 'left alone' in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in copies}


@slow
def test_a_copied_notebook_runs_where_it_is(tmp_path, monkeypatch):
    from opd_nb.cli.app import main
    from opd_nb.data.formats import save_conversations
    from opd_nb.lab import countdown
    monkeypatch.chdir(tmp_path)
    assert main(['notebooks', 'mine']) == 0
    save_conversations(countdown.draw(20), tmp_path / 'mine' / 'p.jsonl')
    small = dict(student='tiny:', teacher='tiny:', data='p.jsonl', max_steps=2, batch=4, max_new_tokens=8, output_dir='run', device='cpu')
    words = [w for k, v in small.items() for w in ('-p', k, v)]
    run(sys.executable, '-m', 'papermill', 'distill.ipynb', 'out.ipynb', *words, cwd=tmp_path / 'mine')
    assert (tmp_path / 'mine' / 'run' / 'final').is_dir()


@slow
def test_sdist_and_wheel_install(tmp_path):
    python = sys.executable
    run(python, 'setup.py', '-q', 'egg_info', '--egg-base', tmp_path, 'sdist', '-d', tmp_path, cwd=ROOT)
    archive, = tmp_path.glob('opd_nb-*.tar.gz')
    with tarfile.open(archive) as f: f.extractall(tmp_path / 'sources', filter='data')
    sources, = (tmp_path / 'sources').iterdir()
    run(python, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', tmp_path, '.', cwd=sources)
    wheel, = tmp_path.glob('opd_nb-*.whl')
    run(python, '-m', 'pip', 'install', '-q', '--no-deps', '--target', tmp_path / 'site', wheel, cwd=tmp_path)
    away = dict(PYTHONPATH=str(tmp_path / 'site'))
    where = run(python, '-c', 'import opd_nb; print(opd_nb.__file__)', cwd=tmp_path, **away).stdout
    assert str(tmp_path / 'site') in where
    import opd_nb
    assert run(python, '-m', 'opd_nb', '--version', cwd=tmp_path, **away).stdout == f'opd_nb {opd_nb.__version__}\n'
    run(python, '-m', 'opd_nb', 'train', '--preset', 'laptop', '--max-steps', '1', '--batch', '2', '--val-max-samples', '2',
        '--output-dir', 'runs/laptop', cwd=tmp_path, **away)
    assert (tmp_path / 'runs/laptop/final/model.safetensors').is_file()
    run(python, '-m', 'opd_nb', 'notebooks', 'mine', cwd=tmp_path, **away)
    copies = list((tmp_path / 'mine').glob('*.ipynb'))
    assert len(copies) == len(list((ROOT / 'nbs/runs').glob('*.ipynb'))) and (tmp_path / 'mine/results/countdown').is_dir()
    assert not [(p.name, link) for p in copies for link in links(p) if not (p.parent / link).exists()]
    old = 'import warnings; warnings.simplefilter("error", DeprecationWarning); from opd_nb.experiment import Experiment'
    done = subprocess.run([python, '-c', old], cwd=tmp_path, capture_output=True, text=True, env=os.environ | away)
    assert 'opd_nb.experiment is opd_nb.lab.run and opd_nb.lab.arms now' in done.stderr
