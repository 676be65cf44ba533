"Files of settings that were damaged, or edited by somebody: settings, or a `BadInput`, and nothing else."
import pytest
import yaml

from conftest import slow
from fuzz import PIECES, VALUES, attempts, damaged
from opd_nb.core.config import OPDConfig
from opd_nb.core.errors import BadInput
from opd_nb.core.settings import Settings
from opd_nb.training.checkpoints import check_resumable, earlier_settings

WHOLE = yaml.safe_dump(OPDConfig(_env_file=None).kept()).encode()
NAMES = list(Settings.model_fields)


def odd_file(rng):
    "A config that was damaged; one with odd values; or pieces of YAML alone."
    kind = rng.randrange(3)
    if kind == 0: return damaged(rng, WHOLE)
    if kind == 1: return b''.join(rng.choice(PIECES + [b'max_steps: ', b'data: ', b'template: ']) for _ in range(rng.randint(1, 12)))
    values = {rng.choice(NAMES): rng.choice(VALUES) for _ in range(rng.randint(1, 4))}
    if rng.random() < .1: values[rng.choice([1, None, (1, 2), 'max_step', 'x' * 500])] = 1
    return yaml.dump(values, allow_unicode=True).encode('utf-8', errors='surrogatepass')


def settings_of(path):
    try: return OPDConfig(_config=path, _env_file=None)
    except BadInput as e:
        assert len(str(e)) < 3000, len(str(e))
        return None


@pytest.mark.parametrize('seconds', [10, pytest.param(60, marks=slow)])
def test_any_file_of_settings(tmp_path, seconds):
    path, read = tmp_path / 'config.yaml', 0
    (tmp_path / 'step-1').mkdir()
    (tmp_path / 'step-1' / 'run.pt').touch()
    for rng in attempts(seconds):
        data = odd_file(rng)
        path.write_bytes(data)
        try:
            config = settings_of(path)
            earlier_settings(tmp_path)
            try: check_resumable(OPDConfig(_env_file=None, output_dir=tmp_path))
            except BadInput: pass
            if config:
                read += 1
                config.save(tmp_path / 'again.yaml')  # what was read can be written, and is the same
                assert settings_of(tmp_path / 'again.yaml').kept() == config.kept()
        except Exception:
            print(data[:3000])
            raise
    assert read
