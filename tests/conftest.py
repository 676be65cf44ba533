"Shared by the tests: where real material lies, and what counts as slow."
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
slow = pytest.mark.skipif(not os.environ.get('OPD_SLOW'), reason='takes minutes; make test-slow runs it')


def real(*parts):
    "A path in the real test material, or a skip that says what is missing."
    folder = Path(os.environ.get('OPD_REAL_DATA') or ROOT.parent / 'shared' / 'real')
    path = folder.joinpath(*parts)
    if not path.exists(): pytest.skip(f'no real test material ({"/".join(parts)}); set OPD_REAL_DATA to a folder that has it')
    return path
