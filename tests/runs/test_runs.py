"The run notebooks, run as people run them: by papermill, in a process of their own."
import ast, json, re, shutil, subprocess, sys
from pathlib import Path
from urllib.parse import unquote

import pytest

from conftest import real, slow

ROOT = Path(__file__).resolve().parents[2]
RUNS = sorted((ROOT / 'nbs' / 'runs').glob('*.ipynb'))
SHORT = ['-p', 'max_steps', '20', '-p', 'n_eval', '60', '-p', 'n_train', '300', '-p', 'control', 'False', '-p', 'seed', '3']


def papermill(folder, *words, notebook='quickstart', wrap=()):
    nb = ROOT / 'nbs' / 'runs' / f'{notebook}.ipynb'
    return subprocess.run([*wrap, sys.executable, '-m', 'papermill', str(nb), str(folder / 'out.ipynb'), '-p', 'output_dir', str(folder), *words], cwd=folder, capture_output=True, text=True, timeout=900)


def cut_off():
    "Words that run a command with no network but loopback, or nothing where that cannot be done."
    words = ['unshare', '-rn', 'sh', '-c', 'ip link set lo up && exec "$@"', 'sh']
    can = shutil.which('unshare') and shutil.which('ip') and subprocess.run([*words, 'true'], capture_output=True).returncode == 0
    return words if can else []


@pytest.fixture(scope='module')
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp('first')
    done = papermill(folder, *SHORT)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.mark.parametrize('nb', RUNS, ids=lambda p: p.stem)
def test_parameters_cell(nb):
    import papermill
    found = papermill.inspect_notebook(str(nb))
    assert found and all(p['help'] and p['default'] for p in found.values()), f'{nb.name}: each parameter needs a default and a comment'
    assert 'output_dir' in found and 'seed' in found


def test_quickstart_leaves_what_it_promises(first):
    m = json.loads((first / 'metrics.json').read_text())
    assert {'student_before', 'student_after', 'teacher', 'n_eval', 'steps', 'seconds_train'} <= set(m)
    assert (m['n_eval'], m['steps']) == (60, 20) and m['teacher'] > m['student_before']
    assert 'control_after' not in m and not (first / 'control').exists()
    assert 'data:image/png' in (first / 'report.html').read_text() and (first / 'run' / 'final' / 'model.safetensors').exists()
    from transformers import AutoModelForCausalLM
    assert AutoModelForCausalLM.from_pretrained(first / 'run' / 'final').num_parameters() > 1e5


@slow
def test_same_seed_same_figures_without_network(first, tmp_path):
    "The second run has no network; the first may have had one."
    wrap = cut_off()
    done = papermill(tmp_path, *SHORT, wrap=wrap)
    assert done.returncode == 0, done.stderr[-2000:]
    a, b = (json.loads((f / 'metrics.json').read_text()) for f in (first, tmp_path))
    for m in (a, b):
        m.pop('seconds_train')
        m.pop('run')
        for k in [k for k in m['health'] if k.startswith('seconds')]: m['health'].pop(k)
    assert a == b
    if not wrap: pytest.skip('same figures, but this machine cannot take the network away (unshare, ip)')


@pytest.fixture(scope='module')
def demonstration(tmp_path_factory):
    "What `opd demo` prints and leaves, in small, in a folder with a blank in its name."
    folder = tmp_path_factory.mktemp('demo') / 'my demo'
    words = ['--output-dir', str(folder), '--max-steps', '4', '--n-eval', '40', '--n-train', '60',
             '--control-steps', '2', '--seed', '3']
    command = [sys.executable, '-c', 'import sys; from opd_nb.cli.app import main; sys.exit(main())']
    done = subprocess.run([*command, 'demo', *words], cwd=folder.parent, capture_output=True,
                          text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, done.stdout


def test_demo_says_what_it_will_do_and_the_result_before_the_control(demonstration):
    folder, said = demonstration
    beginning = said.partition('== 1 of')[0]
    for words in ('trained for 4 steps', '2 steps with the scores of other puzzles', 'minutes'):
        assert words in beginning
    headlines = re.findall(r'^== (\d+) of (\d+)  (.*?)  \(\d+ s\)$', said, re.M)
    assert [int(n) for n, _, _ in headlines] == [*range(1, int(headlines[0][1]) + 1)]
    result = json.loads((folder / 'metrics.json').read_text())['result']
    order = [said.index(x) for x in ('== 1 of', 'Training', result, 'This is a control', 'no rise')]
    assert order == sorted(order) and said.count(result) == 2
    assert 'One seed' in said and '44.6%' in said and '47.2%' in said


def test_demo_leaves_a_notebook_to_read(demonstration):
    import nbformat
    folder, _ = demonstration
    cells = nbformat.read(folder / 'quickstart.ipynb', 4).cells
    assert cells[0].cell_type == 'markdown'
    printed = [o.text for c in cells for o in c.get('outputs', []) if o.output_type == 'stream']
    assert printed and not any('\r' in text or '%|' in text for text in printed)
    prose = ''.join(c.source for c in cells if c.cell_type == 'markdown')
    links = re.findall(r'\]\(([^)#]+)[^)]*\)', prose)
    assert len(links) > 3
    for link in links: assert (folder / unquote(link)).is_file(), link


def test_demo_leaves_a_page_with_its_circumstances(demonstration):
    folder, _ = demonstration
    page = (folder / 'report.html').read_text(encoding='utf-8')
    shown, _, folded = page.partition('<details>')
    for name in ('batch', 'max_steps', 'temperature'): assert f'<td>{name}</td>' in shown
    for name in ('weight_decay', 'top_p'):
        assert f'<td>{name}</td>' in folded and f'<td>{name}</td>' not in shown
    for what in ('date', 'versions', 'machine', 'duration'): assert f'<td>{what}</td>' in shown
    for package in ('opd_nb', 'torch', 'transformers'): assert re.search(rf'{package} \d', shown)
    assert re.search(r'\d+ cores?, \d+ used', shown) and 'One seed' in shown


def test_the_quickstart_trains_as_the_laptop_preset_does():
    import papermill as pm
    from opd_nb.core.sources import read_preset
    found = pm.inspect_notebook(str(ROOT / 'nbs' / 'runs' / 'quickstart.ipynb'))
    defaults = {name: ast.literal_eval(p['default']) for name, p in found.items()}
    preset = read_preset('laptop')
    same = ('loss', 'temperature', 'batch', 'learning_rate', 'max_new_tokens')
    assert {k: float(defaults[k]) if k != 'loss' else defaults[k] for k in same} == {
        k: float(preset[k]) if k != 'loss' else preset[k] for k in same}
    prompts = Path(preset['data']).read_text(encoding='utf-8').splitlines()
    assert len(prompts) == defaults['n_train'] and 'beta' not in preset
    assert Path(preset['data']).stat().st_size < 1.2e6 and 'assistant' not in prompts[0]


@pytest.mark.parametrize('words', [['-p', 'control_steps', '-1'], ['-p', 'n_eval', '0']])
def test_quickstart_refuses_a_number_that_means_nothing(words, tmp_path):
    done = papermill(tmp_path, *SHORT, *words)
    assert done.returncode != 0 and f'{words[1]} = {words[2]}' in done.stderr


@pytest.mark.parametrize('words, says', [(['-p', 'max_stepz', '5'], "'max_steps'")] + [pytest.param(*wrong, marks=slow) for wrong in (
    (['-p', 'loss', 'gkd'], 'different ones'), (['-p', 'loss', 'golden'], "'gold'"), (['-p', 'max_steps', '0'], 'max_steps'), (['-p', 'teacher', 'tinny:'], 'tiny:'), (['-p', 'student', './nowhere'], 'nothing is there'))])
def test_quickstart_refuses(words, says, tmp_path):
    done = papermill(tmp_path, *SHORT, *words)
    assert done.returncode != 0 and says in done.stderr and 'BadInput' in done.stderr


@pytest.mark.parametrize('loss', [pytest.param('strict', marks=slow), pytest.param('uld', marks=slow)])
def test_quickstart_with_another_loss(loss, tmp_path):
    done = papermill(tmp_path, *SHORT, '-p', 'loss', loss, '-p', 'max_steps', '3')
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / 'metrics.json').read_text())['loss'] == loss


@slow
def test_tiny_models_in_small(tmp_path):
    done = papermill(tmp_path, '-p', 'fraction', '0.002', '-p', 'n_eval', '10', notebook='tiny_models')
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / 'metrics.json').read_text())['n_eval'] == 10


def test_benchmark_in_small(tmp_path):
    "Sizes of a toy: the figures mean nothing, but all of them are there, and both sides ran."
    small = dict(lengths='16,32', student_vocab=2000, teacher_vocab=1500, dims='16', rows=16, repeats=1, text_mb=.02, copy_runs=1, copy_steps=2)
    done = papermill(tmp_path, *(w for k, v in small.items() for w in ('-p', k, str(v))), notebook='benchmark')
    assert done.returncode == 0, done.stderr[-2000:]
    m = json.loads((tmp_path / 'metrics.json').read_text())
    wanted = {'gold_time_ratio_16', 'gold_mem_ratio_32', 'align_time_ratio', 'phi_seconds', 'w_seconds', *(f'{x}_over_floor' for x in ('gold', 'strict', 'bpm', 'escd', 'uld'))} | {'solved_own_text', 'solved_copy_text'}
    assert wanted <= set(m) and all(m[k] > 0 for k in wanted - {'gold_mem_ratio_32', 'solved_own_text', 'solved_copy_text'}), wanted - set(m)


@slow
def test_two_real_models_in_small(tmp_path):
    "Three steps of two losses on models that others trained (the first, at the foot of the warm-up, has a rate of 0); the hundred steps are in the notebook."
    done = papermill(tmp_path, '-p', 'real_data', str(real('models').parent), '-p', 'losses', 'bpm,control', '-p', 'steps', '3', '-p', 'batch', '2', '-p', 'evaluated', '2', '-p', 'max_new_tokens', '24', notebook='real_pair')
    assert done.returncode == 0, done.stderr[-2000:]
    m = json.loads((tmp_path / 'metrics.json').read_text())
    assert {'start', 'bpm', 'control'} == set(m) and m['start']['teacher_nll'] > 0 and m['bpm']['divergence_bpm'] != m['control']['divergence_bpm']


def test_teachers_in_small(tmp_path):
    "Three backends on four completions and in three steps of `opd train`: every loss is compared, and the notebook's own limits hold."
    pytest.importorskip('llama_cpp', reason='pip install opd_nb[gguf]')
    pytest.importorskip('xllamacpp', reason="llama.cpp's server comes with the dev requirements")
    done = papermill(tmp_path, '-p', 'n', '4', '-p', 'k', '20', '-p', 'real', 'False', '-p', 'seed', '3', '-p', 'train_steps', '3', '-p', 'batch', '4', '-p', 'n_eval', '20', notebook='teachers')
    assert done.returncode == 0, done.stderr[-2000:]
    m = json.loads((tmp_path / 'metrics.json').read_text())
    assert m['embedded']['losses_compared'] == 12 and m['embedded']['largest_loss_difference'] < 1e-3 and 'babyllama105' not in m
    assert m['embedded']['largest_logprob_difference'] < 1e-4 and m['embedded']['least_same_likeliest'] == 1 and (tmp_path / 'time.png').exists()
    assert [len(t['losses']) for t in m['training'].values()] == [0, 3, 3, 3]
    first, *others = (t['losses'] for t in list(m['training'].values())[1:])
    assert all(abs(a - b) < 1e-3 * b for a, b in zip(others[0], first)) and all(abs(a - b) < .3 * b for a, b in zip(others[1], first))


def test_context_in_small(tmp_path):
    "The embedded student, a rule and three steps: every part runs, and a second run finds what the first one wrote."
    small = dict(fast=True, n_choose=4, n_eval=6, n_train=20, max_steps=3, batch=2, max_new_tokens=12)
    words = [w for k, v in small.items() for w in ('-p', k, str(v))]
    done = papermill(tmp_path, *words, notebook='context')
    assert done.returncode == 0, done.stderr[-2000:]
    m = json.loads((tmp_path / 'metrics.json').read_text())
    assert m['steps'] == 3 and {'before', 'after', 'told the rule'} == set(m['result']) and set(m['by_rule']) == {'list', 'letter', 'capitals', 'short'}
    assert len(json.loads((tmp_path / 'completions-after.json').read_text())['result']) == 6


@slow
def test_positions_in_small(tmp_path):
    small = dict(budget=2, seeds=1, n_eval=10, repeats=1)
    done = papermill(tmp_path, *(w for k, v in small.items() for w in ('-p', k, str(v))), notebook='positions')
    assert done.returncode == 0, done.stderr[-2000:]
    runs = json.loads((tmp_path / 'metrics.json').read_text())['runs']
    by_arm = {r['arm']: r['trained'] / r['steps'] for r in runs}
    assert len(runs) == 6 and by_arm['first:0.3'] < by_arm['entropy:0.5'] < by_arm['all']


@slow
def test_loops_side_by_side_in_small(tmp_path):
    "Our loop and TRL's for two seconds each: the figures mean nothing, but all sides ran, and what TRL refuses it still refuses."
    small = dict(n_train=100, n_eval=10, batch=8, rate_steps=1, repeats=1, seconds=1, marks=1, max_new_tokens=8)
    done = papermill(tmp_path, *(w for k, v in small.items() for w in ('-p', k, str(v))), notebook='benchmark_loop')
    assert done.returncode == 0, done.stderr[-2000:]
    m = json.loads((tmp_path / 'metrics.json').read_text())
    assert all('NotImplementedError' in m['refused'][who] for who in ('student', 'teacher')) and (tmp_path / 'loops.png').exists()
    assert all(m['tokens_per_second'][side] > 0 and m['curves'][side]['steps'] > 1 for side in ('opd_nb', 'opd_nb, gold', 'TRL', 'TRL, mended', 'opd_nb, SentencePiece', 'TRL positional, SentencePiece'))


@slow
def test_gpu_in_small(tmp_path):
    "Shapes of a toy, on a CPU: each phase has its time, for adapters and for all weights."
    from opd_nb.models.lm import tiny_folder
    small = dict(student_shape='2,32,2,1,64', teacher_shape='2,64,2,1,96', student_vocab=512, teacher_vocab=512, tokenizer=tiny_folder('teacher'), batch=4, micro_batch=2, max_new_tokens=6, steps=2, at_once='2,4', repeats=1, device='cpu')
    done = papermill(tmp_path, *(w for k, v in small.items() for w in ('-p', k, str(v))), notebook='gpu')
    assert done.returncode == 0, done.stderr[-2000:]
    m = json.loads((tmp_path / 'metrics.json').read_text())
    assert set(m['modes']) == {'lora', 'whole'} and all(x[k] > 0 for x in m['modes'].values() for k in ('rollout', 'teacher', 'student', 'tokens_per_second', 'peak_gb')) and set(m['writing']) == {'whole, 2', 'whole, 4', 'lora, 2', 'lora, 4'} and not (tmp_path / 'student').exists()


@slow
def test_spelling_in_small(tmp_path):
    "Four steps of each; what four hundred come to is in the notebook."
    done = papermill(tmp_path, '-p', 'max_steps', '4', '-p', 'batch', '4', '-p', 'marks', '2', '-p', 'n_train', '40', '-p', 'n_eval', '20', notebook='spelling')
    assert done.returncode == 0, done.stderr[-2000:]
    m = json.loads((tmp_path / 'metrics.json').read_text())
    assert [p['step'] for p in m['marks']['cover@1e-3']] == [0, 2, 4] and m['marks']['bpm@1e-4'][1]['teacher_nll'] > 0


def test_trl_in_small(tmp_path):
    "Three steps in each loop: the figures mean nothing, but both ran on the same loss, and all of them are there."
    pytest.importorskip('trl', reason='pip install opd_nb[trl]')
    small = dict(max_steps=3, batch=4, n_train=40, n_eval=20, max_new_tokens=8)
    done = papermill(tmp_path, *(w for k, v in small.items() for w in ('-p', k, str(v))), notebook='trl')
    assert done.returncode == 0, done.stderr[-2000:]
    m = json.loads((tmp_path / 'metrics.json').read_text())
    assert m['loss'] == 'cover' and all(m['last_loss'][who] > 0 for who in ('trl', 'ours')) and {'before', 'after_TRL', 'after_ours'} <= set(m)
    assert (tmp_path / 'curves.png').exists() and (tmp_path / 'trl' / 'final' / 'model.safetensors').exists()


def test_real_in_small(tmp_path):
    "The embedded pair in place of the real one: every arm and every measure runs."
    small = dict(student='tiny:student', teacher='tiny:teacher', arms='cover,sft,control,sft_cover,gold', tokens=60, held_out=4, batch=2, max_new_tokens=24, threads=1)
    words = [w for k, v in small.items() for w in ('-p', k, str(v))]
    done = papermill(tmp_path, *words, notebook='real')
    assert done.returncode == 0, done.stderr[-2000:]
    m = json.loads((tmp_path / 'metrics.json').read_text())
    assert {'before', 'teacher', 'cover', 'sft', 'control', 'sft_cover', 'gold'} == set(m['figures']) and all(a['steps'] > 1 and a['tokens'] > 0 for a in m['arms'].values())
    assert m['figures']['before']["teacher's text under it"] > m['figures']['teacher']["teacher's text under it"] and 'cover:' in m['result']
    assert {'nll, equally long', 'stopped'} <= set(m['against']['cover − before'])
    assert len(json.loads((tmp_path / 'cover.json').read_text())['result']['answers']) == 4


@slow
def test_skill_in_small(tmp_path):
    "The embedded pair, a few tokens an arm: the figures mean nothing, but all of them are there."
    small = dict(fast=True, tokens=150, cold_start=8, puzzles=10, batch=4, threads=1)
    done = papermill(tmp_path, *(w for k, v in small.items() for w in ('-p', k, str(v))), notebook='skill')
    assert done.returncode == 0, done.stderr[-2000:]
    m = json.loads((tmp_path / 'metrics.json').read_text())
    assert {'cover', 'sft', 'gold', 'grpo'} == set(m['arms']) and m['specialist'] > m['before'] and all(a['tokens'] > 0 for a in m['arms'].values())


def test_map_of_what_is_there(tmp_path):
    "The committed runs of the map: each corner that has all three methods is in the table and in the picture."
    done = papermill(tmp_path, '-p', 'results', str(ROOT / 'nbs' / 'runs' / 'results' / 'countdown'), notebook='map')
    assert done.returncode == 0, done.stderr[-2000:]
    m = json.loads((tmp_path / 'metrics.json').read_text())
    assert m['runs'] and all(c['low'] <= c['value'] <= c['high'] for c in m['corners']) and (tmp_path / 'corners.png').exists()


@slow
def test_reuse_in_small(tmp_path):
    "Sixteen completions, scored once: each arm takes the steps that its passes make, and a second call finds its results."
    small = dict(scored=16, passes='1,2', seeds=1, n_eval=8, batch=8)
    words = [w for k, v in small.items() for w in ('-p', k, str(v))]
    for _ in range(2):
        done = papermill(tmp_path, *words, notebook='reuse')
        assert done.returncode == 0, done.stderr[-2000:]
    arms = json.loads((tmp_path / 'metrics.json').read_text())['arms']
    steps = {'fresh': 2, 'stored × 1': 2, 'stored × 2': 4}
    assert {name: a['steps'] for name, a in arms.items()} == {f'{how}, {loss}': n for how, n in steps.items() for loss in ('cover', 'bpm', 'trust')}
    done = papermill(tmp_path, *words[:-1], '4', notebook='reuse')
    assert done.returncode and 'batch = 4: was 8 when' in done.stderr


def test_the_runs_under_lists_that_are_there(tmp_path):
    "The committed runs: `cover` gains where `bpm` unlearns, and the figures are those of the files."
    folder = ROOT / 'nbs' / 'runs' / 'results' / 'lists'
    done = papermill(tmp_path, '-p', 'results', str(folder), notebook='lists')
    assert done.returncode == 0, done.stderr[-2000:]
    m = json.loads((tmp_path / 'metrics.json').read_text())
    after = {(row['pair'], row['loss']): float(row['after'].split('%')[0]) for row in m['table']}
    assert m['runs'] == len(list(folder.glob('*.json'))) and after['crossing', 'cover'] > 20 > after['crossing', 'bpm']


@slow
def test_lists_in_small(tmp_path):
    "Both runs are made, and a second call finds them; with other settings they are refused."
    small = dict(results='results', hours=1, pairs='crossing', cover='1e-3', bpm='1e-4', strict='', pg='', tokens=1500, puzzles=16, prompts=48, course=20, cache='cache')
    words = [w for k, v in small.items() for w in ('-p', k, str(v))]
    for _ in range(2):
        done = papermill(tmp_path, *words, notebook='lists')
        assert done.returncode == 0, done.stderr[-2000:]
    assert len(list((tmp_path / 'results').glob('*.json'))) == 2
    done = papermill(tmp_path, *words, '-p', 'top_k', '4', notebook='lists')
    assert done.returncode and 'top_k = 4: was 16 when' in done.stderr


@slow
def test_serve_in_small(tmp_path):
    "TRL's trainer learns from a server that is a process of its own; the figures mean nothing, but both loops ran."
    pytest.importorskip('trl', reason='pip install opd_nb[trl]')
    small = dict(max_steps=4, batch=8, n_train=100, n_eval=20)
    (tmp_path / 'mine.txt').write_text('a file of the user, in the folder that was named')
    done = papermill(tmp_path, *(w for k, v in small.items() for w in ('-p', k, str(v))), notebook='serve')
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / 'mine.txt').is_file()
    m = json.loads((tmp_path / 'metrics.json').read_text())
    assert m['server']['sequences'] == 32 and m['server']['tokens'] > 32
    assert all(m['last_loss'][who] > 0 for who in ('served', 'ours')) and abs(m['first_loss']['served'] / m['first_loss']['ours'] - 1) < .5
