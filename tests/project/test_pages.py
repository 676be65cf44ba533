"The rendering of notebooks as pages: formulas without a network, links that lead somewhere."
import importlib.util
import subprocess
import sys

import nbformat
import pytest

from conftest import ROOT

spec = importlib.util.spec_from_file_location('render', ROOT / '.ci' / 'render.py')
render = importlib.util.module_from_spec(spec)
spec.loader.exec_module(render)


@pytest.fixture
def site(tmp_path, monkeypatch):
    "Makes pages of notebooks with one markdown cell each."
    monkeypatch.setattr(render, 'ROOT', tmp_path)
    def made(**texts):
        for name, text in texts.items():
            path = tmp_path / 'nbs' / f"{name.replace('_', '/')}.ipynb"
            path.parent.mkdir(parents=True, exist_ok=True)
            nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)]), path)
        return render.html(tmp_path / 'site'), tmp_path / 'site'
    return made


def test_formulas_are_shown_by_the_browser_alone():
    kept = {}
    assert render.with_formulas('as $p$ is $$\\frac{p}{q}$$', kept) == 'as FORMULA0X is FORMULA1X'
    assert kept['FORMULA0X'].startswith('<math') and 'display="block"' in kept['FORMULA1X']
    for plain in ('from $5 to $6', 'a `$HOME$` b', '```sh\necho $A$B$\n```', r'\$p\$'): assert render.with_formulas(plain, {}) == plain


def test_a_fraction_is_a_fraction_on_the_page(site):
    status, pages = site(a='As $$\\frac{p}{q}$$ is.')
    page = (pages / 'a.html').read_text()
    assert status == 0 and '<mfrac><mrow><mi>p</mi></mrow><mrow><mi>q</mi></mrow></mfrac>' in page.replace('\n', '') and not render.empty_formulas(page)


def test_an_empty_formula_is_found():
    assert render.empty_formulas('<math><mfrac><mrow></mrow><mi>q</mi></mfrac></math>') and not render.empty_formulas('<math><mi>p</mi></math>')


def test_a_notebook_names_another_as_a_file_and_pages_name_pages(site):
    status, pages = site(a='see [b](runs/b.ipynb#there) and [out](https://x.org/c.ipynb)', runs_b='back to [a](../a.ipynb)')
    assert status == 0 and 'href="runs/b.html#there"' in (pages / 'a.html').read_text() and 'https://x.org/c.ipynb' in (pages / 'a.html').read_text()
    assert 'href="../a.html"' in (pages / 'runs' / 'b.html').read_text()


def test_a_link_that_leads_nowhere_fails_the_build(site, capsys):
    status, _ = site(a='see [b](b.ipynb)')
    assert status == 1 and 'a.html: b.html' in capsys.readouterr().out


def test_a_link_to_a_file_that_is_no_page_is_text(site, tmp_path):
    (tmp_path / 'code.py').touch()
    status, pages = site(a='see [the code](../code.py) and [b](b.ipynb)', b='here')
    page = (pages / 'a.html').read_text()
    assert status == 0 and 'see the code and' in page and 'code.py' not in page and 'href="b.html"' in page


def test_pages_fetch_nothing(site):
    _, pages = site(a='$x$')
    assert 'src="http' not in (pages / 'a.html').read_text()


LEAVES = """import os, torch
from opd_nb.losses.registry import LOSSES
os.environ['LEFT_BEHIND'] = '1'
torch.set_default_dtype(torch.float64)
LOSSES['left'] = abs"""
FINDS_NOTHING = """import os, torch
from opd_nb.losses.registry import LOSSES
assert 'left' not in LOSSES and 'LEFT_BEHIND' not in os.environ and torch.get_default_dtype() == torch.float32"""


def test_the_runner_gives_each_notebook_a_process(tmp_path):
    "What a notebook leaves behind, the next does not find; a failure and a crash fail the run, and no other notebook."
    cells = dict(a_leaves=LEAVES, b_finds=FINDS_NOTHING, c_fails='assert 1 == 2', d_ends='import os; os._exit(3)', e_passes='1')
    paths = [tmp_path / f'{name}.ipynb' for name in cells]
    for path, cell in zip(paths, cells.values()):
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)]), path)
    done = subprocess.run([sys.executable, ROOT / '.ci' / 'notebooks.py', *paths, '--workers', '1'], capture_output=True, text=True)
    failed = done.stdout.split('failed: ')[1]
    assert done.returncode == 1 and '5 notebooks' in done.stdout and 'ended with code 3' in done.stdout
    assert [name for name in cells if name in failed] == ['c_fails', 'd_ends'], done.stdout + done.stderr[-1000:]
