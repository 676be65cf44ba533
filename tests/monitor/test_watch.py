"""Named warnings on a whole training of the embedded pair, as an earlier quickstart had it: none. The run takes minutes; its log is kept in tests/data, where notebook 08_monitor/03_alerts reads it.
To make that file anew: OPD_SLOW=1 OPD_RENEW=1 pytest tests/monitor/test_watch.py."""
import json, os
from pathlib import Path

import pytest

from conftest import slow
from opd_nb.core.config import OPDConfig
from opd_nb.monitor.alerts import RULES, Watch

LOG = Path(__file__).resolve().parents[1] / 'data' / 'quickstart_log.json'
CONFIG = dict(student='tiny:', teacher='tiny:', loss='gold', beta=.5, batch=64, max_steps=700, learning_rate=2e-3, max_new_tokens=24, warmup_steps=20,
              val_max_samples=100, eval_every=116, save_every=10**6, device='cpu', _env_file=None)


def kept_events():
    kept = json.loads(LOG.read_text())
    return [dict(event='step', step=i + 1, **{k: v[i] for k, v in kept['figures'].items()}) for i in range(kept['steps'])] + kept['validations']


def warned(events):
    watch = Watch(OPDConfig(**CONFIG))
    return [w for e in sorted(events, key=lambda e: e['step']) for w in watch.see(e)]


def test_the_kept_quickstart_warns_of_nothing(): assert len(kept_events()) > 700 and warned(kept_events()) == []


@pytest.mark.parametrize('name', RULES)
def test_each_rule_would_see_it_there(name):
    "The same log, spoilt from step 300 on in the figure that the rule looks at: it warns, by that name, and once."
    how = dict(low_overlap=('overlap', lambda x: .05), falling_overlap=('overlap', lambda x: x / 2), falling_coverage=('coverage', lambda x: x / 2), falling_stop_rate=('stop_rate', lambda x: x / 3),
               length_inflation=('length', lambda x: 2 * x), repetition=('repetition', lambda x: .5), entropy_collapse=('entropy', lambda x: x / 10), diversity_loss=('distinct', lambda x: x / 3),
               teacher_nll_rising=('teacher_nll', lambda x: 12 * x), exploding_ratio=('ratio_max', lambda x: 99.), skipped_steps=('skipped', lambda x: 1), texts_left_out=('left_out', lambda x: 3), no_answer_ends=('stop_rate', lambda x: 0), falling_agreement=('top1_agreement', lambda x: x / 2))
    figure, spoil = how[name]
    first = 0 if name == 'low_overlap' else 300
    events = [dict(ratio_max=1., ratio_clipped=.5, left_out=0, scored=32, top1_agreement=.5) | e for e in kept_events()]
    spoilt = [w.name for w in warned([e | {figure: spoil(e.get(figure, 0))} if e['step'] > first else e for e in events])]
    assert spoilt.count(name) == 1 and warned(events) == []


def test_more_answers_in_a_validation_are_no_loss_of_diversity():
    "A batch of 16 has 0.8 distinct pairs where 100 held-out prompts have 0.38; it is the same student."
    events = [dict(event='step', step=i, distinct=.8) for i in range(1, 60)]
    assert warned(events + [dict(event='validation', step=i, distinct=.38) for i in (20, 40)]) == []
    assert [w.name for w in warned(events + [dict(event='validation', step=20, distinct=.38), dict(event='validation', step=40, distinct=.1)])] == ['diversity_loss']


@slow
def test_the_quickstart_warns_of_nothing(tmp_path):
    from opd_nb.lab import countdown
    from opd_nb.data.formats import save_conversations
    from opd_nb.training.loop import train
    save_conversations(countdown.draw(8000), tmp_path / 'prompts.jsonl')
    events = train(OPDConfig(**CONFIG, data=str(tmp_path / 'prompts.jsonl'), output_dir=tmp_path / 'run'), progress=False).events
    assert warned(events) == []
    if not os.environ.get('OPD_RENEW'): return
    steps, rounded = [e for e in events if e['event'] == 'step'], lambda x: float(f'{x:.3g}')
    keep = ['loss', *dict.fromkeys(f for r in RULES.values() for f in r.metrics if f in steps[0])]
    of = lambda e: {k: rounded(e[k]) for k in keep if k in e}
    LOG.write_text(json.dumps(dict(steps=len(steps), figures={k: [rounded(e[k]) for e in steps] for k in keep}, validations=[dict(event=e['event'], step=e['step'], **of(e)) for e in events if e['event'] == 'validation'])))
