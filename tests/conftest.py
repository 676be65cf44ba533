"Shared by the tests: where real material lies, and what counts as slow."
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
slow = pytest.mark.slow


def pytest_collection_modifyitems(items):
    "A slow test is skipped, and says so, unless OPD_SLOW is set."
    if os.environ.get('OPD_SLOW'): return
    for item in items:
        if item.get_closest_marker('slow'): item.add_marker(pytest.mark.skip(reason='takes minutes; make test-slow runs it'))


def pytest_terminal_summary(terminalreporter):
    "What `make test-slow` ran, by name."
    if not os.environ.get('OPD_SLOW'): return
    reports = [r for kind in ('passed', 'failed') for r in terminalreporter.stats.get(kind, []) if r.when == 'call']
    terminalreporter.section('slow tests that ran')
    for r in sorted(reports, key=lambda r: -r.duration): terminalreporter.line(f'{r.duration:7.1f} s  {r.outcome}  {r.nodeid}')


def real(*parts):
    "A path in the real test material, or a skip that says what is missing."
    folder = Path(os.environ.get('OPD_REAL_DATA') or ROOT.parent / 'shared' / 'real')
    path = folder.joinpath(*parts)
    if not path.exists(): pytest.skip(f'no real test material ({"/".join(parts)}); set OPD_REAL_DATA to a folder that has it')
    return path
