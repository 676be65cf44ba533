"Evaluation as its users meet it: real questions, real models, the command, the report in a browser."

import json, os, re, shutil, signal, subprocess, sys, time
from pathlib import Path

import numpy as np
import pytest

from conftest import ROOT, real

pytest.importorskip('lm_eval', reason='pip install "opd_nb[eval]"')
pytest.importorskip('rouge_score', reason='pip install "opd_nb[eval]"')
from opd_nb.core.errors import BadInput
from opd_nb.models.lm import LM, tiny_folder
from opd_nb.eval.questions import Options
from opd_nb.eval.evaluate import evaluate, read_records
from opd_nb.eval.models import lineup
from opd_nb.eval.tasks import tasks_for

LOCAL = (
    'arc_easy_local',
    'arc_challenge_local',
    'hellaswag_local',
    'truthfulqa_mc1_local',
    'truthfulqa_mc2_local',
    'gsm8k_local',
)


def opd(*words, **env):
    return subprocess.run(
        [
            sys.executable,
            '-c',
            'import sys; from opd_nb.cli.app import main; sys.exit(main(sys.argv[1:]))',
            *map(str, words),
        ],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | dict(HF_HUB_OFFLINE='1', PYTHONPATH=str(ROOT)) | env,
    )


@pytest.fixture
def here(monkeypatch, capsys):
    "The command in this process, which has imported everything already: status, output, errors."
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')

    def run(*words, **env):
        from opd_nb.cli.app import main

        for k, v in env.items():
            monkeypatch.setenv(k, v)
        return main([*map(str, words)]), *capsys.readouterr()

    return run


@pytest.fixture(scope='module')
def reports(tmp_path_factory):
    "The example of the README, on the embedded pair and on real questions."
    folder = tmp_path_factory.mktemp('reports')
    data = real('benchmarks')
    done = opd(
        'eval',
        '--models',
        'base=tiny:student',
        'best=tiny:teacher',
        '--tasks',
        'countdown,arc_easy_local',
        '--limit',
        50,
        '--data',
        data,
        '--out',
        folder,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done, folder


def test_the_command_compares_and_reports(reports):
    done, folder = reports
    (out,) = folder.glob('2*')
    assert {
        'report.html',
        'results.csv',
        'results.json',
        'differences.csv',
        'samples.jsonl',
        'task-countdown.png',
        'task-arc_easy_local.png',
    } <= {p.name for p in out.iterdir()}
    whole = json.loads((out / 'results.json').read_text())
    (d,) = [d for d in whole['differences'] if d['task'] == 'countdown']
    assert d['shown'] and d['value'] > 0.5 and d['low'] < d['value'] < d['high'] and d['n'] == 50
    assert len((out / 'samples.jsonl').read_text().splitlines()) == 200
    said = [json.loads(line) for line in (out / 'samples.jsonl').read_text().splitlines()]
    assert all(
        (s['answer'] == s['target']) == bool(s['figures']['acc_norm'])
        for s in said
        if s['task'] == 'arc_easy_local'
    )
    assert (
        str(out / 'report.html') in done.stdout
        and '100%' in done.stderr
        and 'fatal' not in done.stderr
        and 'Warning' not in done.stderr
    )


def test_a_second_time_asks_nothing(reports, tmp_path):
    "Other names, another task list, the same answers: no file of answers grows."
    _, folder = reports
    kept = {p: p.stat().st_size for p in (folder / 'answers').rglob('*.jsonl')}
    again = evaluate(
        {'x': 'tiny:teacher'},
        ['arc_easy_local', 'countdown'],
        Options(50, data=real('benchmarks')),
        folder,
        progress=False,
    )
    assert {p: p.stat().st_size for p in (folder / 'answers').rglob('*.jsonl')} == kept and len(
        kept
    ) == 4
    whole = json.loads(next(folder.glob('2*/results.json')).read_text())
    value = lambda task: next(
        r['value']
        for r in whole['results']
        if (r['task'], r['model']) == (task, 'best') and r['main']
    )
    assert again.table.set_index('task')[again.table.main.values].value.to_dict() == {
        t: value(t) for t in ('arc_easy_local', 'countdown')
    }


def test_the_report_opens_in_a_browser(reports, tmp_path):
    "Headless Chromium, no network: no error in its console, and the numbers are in the text that it laid out."
    browser = next(
        filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None
    )
    if not browser:
        pytest.skip('no Chromium here; apt-get install chromium')
    _, folder = reports
    (page,) = folder.glob('2*/report.html')
    words = [
        browser,
        '--headless=new',
        '--no-sandbox',
        '--disable-gpu',
        f'--user-data-dir={tmp_path}',
        '--enable-logging=stderr',
        '--host-resolver-rules=MAP * ~NOTFOUND',
    ]
    done = subprocess.run(
        [*words, '--dump-dom', page.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and not re.search(
        r'CONSOLE.*(error|failed|refused)|net::ERR', done.stderr, re.I
    ), done.stderr[-1000:]
    text = re.sub(r'<[^>]+>', ' ', done.stdout)
    for r in json.loads((page.parent / 'results.json').read_text())['results']:
        if r['main']:
            assert f"{r['value'] * 100:.1f} [{r['low'] * 100:.1f}, {r['high'] * 100:.1f}]" in text
    assert (
        done.stdout.count('data:image/png') == 2
        and 'no difference shown' in text
        and 'Failed' not in text
    )
    subprocess.run(
        [*words, '--window-size=1100,2400', f"--screenshot={tmp_path / 'shot.png'}", page.as_uri()],
        capture_output=True,
        timeout=120,
        check=True,
    )
    assert (tmp_path / 'shot.png').stat().st_size > 50_000


def test_local_tasks_on_real_models(tmp_path):
    "ARC, HellaSwag, TruthfulQA and GSM8K from files, two models that others trained, without a chat template."
    names = ('babyllama105', 'bitllama3M')
    found = evaluate(
        {n: str(real('models', n)) for n in names},
        list(LOCAL),
        Options(4, data=real('benchmarks'), max_new_tokens=16),
        tmp_path,
        progress=False,
        dtype='float32',
    )
    assert not found.failures and len(found.table[found.table.main]) == 2 * len(LOCAL)
    assert ((found.table.value >= 0) & (found.table.value <= 1)).all() and (
        found.table.questions == 4
    ).all()
    gsm = found.records['bitllama3M', 'gsm8k_local'][0]
    assert gsm['cut'] and set(gsm['figures']) == {
        'exact_match (strict-match)',
        'exact_match (flexible-extract)',
    }  # five examples are longer than its context
    assert (
        'WikiHow' not in str(found)
        and '[title]' not in found.records['babyllama105', 'hellaswag_local'][0]['prompt']
    )


@pytest.mark.parametrize('name, chat', [('babyllama105', 'on'), ('babyllama105', 'off')])
def test_chat_template_is_on_or_off(name, chat, tmp_path):
    found = evaluate(
        {'base': str(real('models', name)), 'tiny': 'tiny:student'},
        ['arc_easy_local'],
        Options(2, chat=chat, data=real('benchmarks')),
        tmp_path,
        progress=False,
    )
    assert ('tiny', 'arc_easy_local') in found.records and (
        '[INST]' in found.records['tiny', 'arc_easy_local'][0]['prompt']
    ) == (chat == 'on')
    assert found.status == (chat == 'on') and (
        not found.failures or 'has no chat template' in found.failures[0]['why']
    )


def test_figures_are_lm_evals_own(tmp_path):
    "What is kept question by question adds up to what lm-eval reports by itself."
    import datasets, lm_eval
    from lm_eval.models.huggingface import HFLM
    from opd_nb.eval.tasks import SHIPPED, question_rows
    import yaml

    path = real('models', 'babyllama105')
    found = evaluate(
        {'m': str(path)},
        ['arc_easy_local'],
        Options(12, data=real('benchmarks')),
        tmp_path,
        progress=False,
    )
    config = yaml.safe_load(SHIPPED['arc_easy_local'].read_text())
    rows = question_rows(real('benchmarks', 'arc_easy.jsonl'), config.pop('local'))
    theirs = lm_eval.simple_evaluate(
        HFLM(str(path), device='cpu', dtype='float32', batch_size=1),
        tasks=[
            config
            | dict(
                custom_dataset=lambda **_: dict(test=datasets.Dataset.from_list(rows)),
                test_split='test',
            )
        ],
        limit=12,
        bootstrap_iters=0,
    )
    mine = found.table.set_index('figure').value
    assert {f: mine[f] for f in ('acc', 'acc_norm')} == {
        f: theirs['results']['arc_easy_local'][f'{f},none'] for f in ('acc', 'acc_norm')
    }


def test_adapters_are_evaluated_as_adapters(tmp_path):
    "Adapters that do nothing give the base's answers under another content; adapters that do something give others; the base stays as it was."
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model

    for name, scale in (('nothing', 0.0), ('something', 0.3)):
        base = LM.load('tiny:student')
        tuned = get_peft_model(
            base.model, LoraConfig(r=2, target_modules=['q_proj', 'v_proj'], task_type='CAUSAL_LM')
        )
        torch.manual_seed(0)
        with torch.no_grad():
            [
                p.normal_(0, scale) if scale else p.zero_()
                for n, p in tuned.named_parameters()
                if 'lora_B' in n
            ]
        tuned.save_pretrained(tmp_path / name)
        base.codec.tok.save_pretrained(tmp_path / name)
    assert isinstance(LM.load(str(tmp_path / 'nothing')).model, PeftModel)
    found = evaluate(
        {'base': 'tiny:student', **{n: str(tmp_path / n) for n in ('nothing', 'something')}},
        ['countdown', 'arc_easy_local'],
        Options(20, data=real('benchmarks')),
        tmp_path,
        progress=False,
    )
    said = lambda m, t: [(r['answer'], r['figures']) for r in found.records[m, t]]
    for t in ('countdown', 'arc_easy_local'):
        assert said('base', t) == said('nothing', t) != said('something', t)
    assert len(set(found.keys.values())) == 3


def test_your_own_data_and_a_judge(tmp_path):
    "References give exact, normalised and ROUGE-L; a judge gives a mark, through a server that speaks for one."
    from servers import Handler, http_server
    from opd_nb.core.config import OPDConfig
    from opd_nb.lab.countdown import draw
    from opd_nb.data.formats import save_conversations
    from opd_nb.eval.tasks import load_judge

    class Marks(Handler):  # a marker that can tell: an answer that reaches its target gets 10
        def do_GET(self):
            self.send(200, dict(data=[dict(id='judge')]))

        def do_POST(self):
            body = json.loads(self.body())
            quoted = json.loads(body['messages'][-1]['content'])
            wanted = re.search(r'Make (\d+)', quoted['task'])
            right = (
                quoted['answer'].endswith(f'={wanted[1]}')
                if wanted
                else quoted['answer'] in ('42', 'Paris', 'pots')
            )  # the probe's plain tasks
            self.send(
                200,
                dict(
                    choices=[
                        dict(
                            index=0,
                            message=dict(
                                role='assistant', content=json.dumps(dict(score=10 if right else 0))
                            ),
                            finish_reason='stop',
                        )
                    ],
                    usage=dict(prompt_tokens=9, completion_tokens=3),
                ),
            )

    data = save_conversations(draw(12, split='held_out', answers=True), tmp_path / 'mine.csv')
    plain = evaluate(
        {'base': 'tiny:student', 'best': 'tiny:teacher'},
        [str(data)],
        Options(),
        tmp_path,
        progress=False,
    )
    mean = plain.table.set_index(['model', 'figure']).value
    assert (
        set(plain.table.figure) == {'exact', 'normalised', 'rougeL'}
        and mean['best', 'rougeL'] > mean['base', 'rougeL']
        and (plain.table.questions == 12).all()
    )
    with http_server(Marks) as url:
        config = OPDConfig(
            _env_file=None, teacher_cache=tmp_path / 'answers.sqlite', teacher_retries=0
        )
        spec = f'api:{url}/v1#judge'
        judged = evaluate(
            {'base': 'tiny:student', 'best': 'tiny:teacher'},
            [str(data)],
            Options(),
            tmp_path,
            progress=False,
            judge=dict(judged=load_judge(spec, config), who=spec),
        )
    marks = judged.table[judged.table.figure == 'judge'].set_index('model').value
    assert judged.tasks[0].main == 'judge' and marks['best'] > 0.6 and not judged.failures


def test_a_failed_task_loses_no_other(here, tmp_path):
    "A task of the Hub, offline: it says what to do, the others are there, and the exit status says so."
    status, said, _ = here(
        'eval',
        '--models',
        'base=tiny:student',
        '--tasks',
        'arc_easy,countdown',
        '--limit',
        5,
        '--out',
        tmp_path,
    )
    assert (
        status == 1
        and 'failed: arc_easy: ' in said
        and 'arc_easy_local=FILE' in said
        and re.search(r'countdown +base', said)
    )
    page = next(tmp_path.glob('2*/report.html')).read_text()
    assert 'Failed' in page and 'arc_easy_local=FILE' in page and '1 failed: arc_easy.' in page


def test_a_choice_that_is_longer_than_the_context(tmp_path):
    "lm-eval asserts and says nothing."
    found = evaluate(
        [f"short={real('models', 'babyllama105')}"],
        ['hellaswag_local'],
        Options(limit=50, data=real('benchmarks')),
        tmp_path,
        progress=False,
        device='cpu',
    )
    assert 'context of 256 tokens' in found.failures[0]['why'] and not found.records


@pytest.mark.parametrize(
    'words, says',
    [
        (['--tasks', 'arc_esy_local'], "'arc_easy_local'"),
        (['--tasks', 'hellaswag_local', '--data', 'nowhere'], '--data DIR'),
        (['--models', 'a=tiny:teecher', '--tasks', 'countdown'], "'teacher'"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(here, words, says, tmp_path):
    status, _, said = here('eval', '--models', 'base=tiny:student', '--out', tmp_path, *words)
    assert status == 2 and says in said and '%|' not in said and not list(tmp_path.iterdir())


def test_settings_name_the_models(here, tmp_path):
    "BASE_MODEL_ID and KD_MODEL_PATH, the latter the folder of a run."
    from opd_nb.models.lm import tiny_folder

    run = tmp_path / 'run'
    for n, source in (('step-2', 'student'), ('best', 'teacher'), ('final', 'teacher')):
        shutil.copytree(tiny_folder(source), run / n)
    (run / 'config.yaml').write_text('student: tiny:student\n')
    (run / 'log.jsonl').write_text('{"event": "step", "step": 4}\n')
    status, _, said = here(
        'eval',
        EVAL_TASKS='countdown',
        EVAL_MAX_SAMPLES='8',
        EVAL_OUTPUT_DIR=str(tmp_path / 'out'),
        BASE_MODEL_ID='tiny:student',
        KD_MODEL_PATH=str(run),
    )
    assert status == 0, said[-2000:]
    (out,) = (tmp_path / 'out').glob('2*')
    whole = json.loads((out / 'results.json').read_text())
    assert [(m['name'], m['step']) for m in whole['models']] == [
        ('base', 0),
        ('step-2', 2),
        ('best', None),
        ('final', 4),
    ]
    assert (out / 'learning-curve.png').exists() and 'best and final have the same content' in (
        out / 'report.html'
    ).read_text()
    assert len(list((tmp_path / 'out' / 'answers').iterdir())) == 2  # four models, two contents


def test_an_interrupted_evaluation_goes_on(tmp_path):
    "Interrupted while it asks, it keeps whole pieces; the same call asks the rest and ends as if nothing had been."
    code = (
        "import sys; from opd_nb.eval import evaluate as e; from opd_nb.eval.questions import Options; from functools import partial\n"
        "e.asked = partial(e.asked, block=3)\n"
        "e.evaluate({'base': 'tiny:student'}, ['countdown'], Options(300), sys.argv[1], progress=False)"
    )
    run = lambda: subprocess.Popen(
        [sys.executable, '-c', code, str(tmp_path)],
        env=os.environ | dict(PYTHONPATH=str(ROOT)),
        stderr=subprocess.DEVNULL,
    )
    process, end = run(), time.monotonic() + 120
    while not (files := list(tmp_path.rglob('*.jsonl'))) and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = files[0].read_text().splitlines()
    assert 0 < len(before) < 300
    assert run().wait() == 0
    after = files[0].read_text().splitlines()
    whole = {json.loads(line)['question'] for line in after if line.endswith('}')}
    assert len(whole) == 300 and after[: len(before) - 1] == before[:-1]
    straight = evaluate(
        {'base': 'tiny:student'}, ['countdown'], Options(300), tmp_path / 'new', progress=False
    )
    resumed = evaluate(
        {'again': 'tiny:student'}, ['countdown'], Options(300), tmp_path, progress=False
    )
    assert straight.records['base', 'countdown'] == resumed.records['again', 'countdown']


def test_the_run_notebook_in_small(tmp_path):
    "Papermill, a run of four steps, two tasks that need no file: metrics, report and checkpoints are there."
    words = [
        '-p',
        'output_dir',
        tmp_path,
        '-p',
        'max_steps',
        4,
        '-p',
        'batch',
        8,
        '-p',
        'n_train',
        100,
        '-p',
        'limit',
        8,
        '-p',
        'tasks',
        'countdown,teacher_answers',
        '-p',
        'seed',
        3,
    ]
    done = subprocess.run(
        [
            sys.executable,
            '-m',
            'papermill',
            str(ROOT / 'nbs' / 'runs' / 'evaluate.ipynb'),
            str(tmp_path / 'out.ipynb'),
            *map(str, words),
        ],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    m = json.loads((tmp_path / 'metrics.json').read_text())
    assert (
        {'base', 'best', 'final', 'sft', 'teacher'} <= set(m['models'])
        and m['failures'] == 0
        and (tmp_path / 'report.html').exists()
    )
    assert (
        m['figures']['countdown teacher']['value'] > m['figures']['countdown base']['value']
        and m['figures']['teacher_answers teacher']['value'] == 1
    )


@pytest.mark.parametrize('config', [b'student: [', b'student: caf\xe9', b'[1]', b'beta: 1', b'student: [1]'])
def test_a_run_whose_settings_cannot_be_read(tmp_path, config):
    (tmp_path / 'config.yaml').write_bytes(config)
    (tmp_path / 'log.jsonl').touch()
    with pytest.raises(BadInput, match='config.yaml'): lineup([str(tmp_path)])


def test_odd_lines_of_a_log_have_no_step(tmp_path):
    shutil.copytree(tiny_folder('student'), tmp_path / 'final')
    (tmp_path / 'config.yaml').write_text('student: "tiny:"')
    (tmp_path / 'log.jsonl').write_bytes(b'{"step": "x"}\n[{"step": 1}]\n\xff\n{"x": {"step": 9}}\n{"event": "step", "step": 3}\n{"step": 4')
    assert [(e.name, e.step) for e in lineup([str(tmp_path)])] == [('base', 0), ('final', 3)]


def test_odd_lines_of_kept_records_are_asked_again(tmp_path):
    good = [dict(question='a', answer='x', figures=dict(acc=1)), dict(question='b', answer='y', figures=dict(acc=float('nan'))), dict(question='c', answer='z')]
    odd = [b'{"question": ["a"], "answer": 1}', b'[' * 10**5, b'\xff', b'9' * 5000, *(b'{"question": "d", "answer": "", "figures": ' + x + b'}' for x in (b'[1]', b'{"acc": "x"}', b'{"acc": 1' + b'0' * 400 + b'}'))]
    (tmp_path / 'r.jsonl').write_bytes(b'\n'.join([*odd, *(json.dumps(r).encode() for r in good)]))
    found = read_records(tmp_path / 'r.jsonl')
    assert list(found) == ['a', 'b', 'c'] and np.isnan(found['b']['figures']['acc'])


@pytest.mark.parametrize('line', ['doc_to_text: !function mine.f', "doc_to_text: \"{{ cycler.__init__.__globals__.os.system('touch ran') }}\""])
def test_a_task_file_of_somebody_is_not_run(tmp_path, monkeypatch, line):
    "Its functions, and its templates too, are code."
    pytest.importorskip('lm_eval', reason='pip install "opd_nb[eval]"')
    monkeypatch.chdir(tmp_path)
    Path('mine.py').write_text("open('ran', 'w').close()\ndef f(x): return x")
    Path('q.jsonl').write_text('{"question": "q", "answer": "a"}\n')
    Path('t.yaml').write_text(f'task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: q.jsonl}}\ntest_split: train\noutput_type: generate_until\n{line}\ndoc_to_target: "{{{{answer}}}}"\nmetric_list: [{{metric: exact_match}}]\n')
    with pytest.raises(BadInput, match='TRUST_REMOTE_CODE'): tasks_for(str(tmp_path / 't.yaml'), Options())
    assert not Path('ran').exists()
