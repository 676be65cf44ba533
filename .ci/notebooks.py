"""Run every notebook's cells, two notebooks at a time, and print the thirty slowest.

Several notebooks share a process, so what one leaves behind could make the next pass or fail. After each notebook its
traces are looked for: torch's defaults, environment variables, the working directory, names in the package's registries."""
import argparse
import json
import os
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
THEIRS = ('PYTEST', 'IN_TEST', 'TOKENIZERS_PARALLELISM', 'KMP_', 'TORCH', 'TRITON', 'CUDA', 'OMP_', 'MPL', 'JPY_', 'PJRT', 'TQDM', 'HF_', 'WANDB', 'ACCELERATE', 'TRANSFORMERS', 'TF_', 'XDG_', 'COLUMNS', 'LINES', 'BNB_')


def state() -> dict:
    "What a notebook may change in its process, without importing anything that is not there yet."
    found = dict(cwd=os.getcwd(), environment={k: v for k, v in os.environ.items() if not k.startswith(THEIRS)})
    if torch := sys.modules.get('torch'):
        found['torch'] = dict(dtype=str(torch.get_default_dtype()), threads=torch.get_num_threads(), device=str(torch.get_default_device()),
                              grad=torch.is_grad_enabled(), deterministic=torch.are_deterministic_algorithms_enabled())
    return found


def registries() -> list:
    "The registries of all modules that are imported."
    modules = [m for name, m in list(sys.modules.items()) if name.startswith('opd_nb.')]
    return list({id(v): v for m in modules for v in vars(m).values() if type(v).__name__ == 'Registry'}.values())


def exported(notebook: Path) -> str:
    "The text of the cells that a notebook exports."
    cells = json.loads(notebook.read_text(encoding='utf-8'))['cells']
    texts = [''.join(c['source']) for c in cells if c['cell_type'] == 'code']
    return '\n'.join(t for t in texts if re.search(r'^#\|\s*export', t, re.M))


def put_back(known: dict[int, dict], notebook: Path) -> list[str]:
    """Take out of the registries what this notebook registered, and name what it does not export.

    A notebook of a loss registers that loss, as its module will; the next notebook shall find the module's."""
    traces, own = [], exported(notebook)
    for registry in registries():
        before = known.get(id(registry), {})
        for name, value in list(registry.items()):
            if not getattr(value, '__module__', '').startswith('__main__') or before.get(name) is value: continue
            if f"'{name}'" not in own and f'def {name}' not in own: traces.append(f'{name!r} is left in the registry of each {registry.kind}')
            if name in before: registry[name] = before[name]
            else: del registry[name]
    return traces


def run(notebook: Path) -> tuple[Path, bool, float, list[str]]:
    "One notebook: whether it passed, its seconds, and what it left behind."
    from nbdev.test import test_nb
    before, known = state(), {id(r): dict(r) for r in registries()}
    passed, seconds = test_nb(notebook, skip_flags=['slow', 'gpu'], basepath=ROOT)
    after = state()
    if 'torch' in after: before.setdefault('torch', after['torch'] | dict(dtype='torch.float32', grad=True, deterministic=False))  # as torch begins
    traces = [f'{k}: {before[k]} before, {after[k]} after' for k in before if before[k] != after[k]] + put_back(known, notebook)
    return notebook, passed, seconds, traces


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('paths', metavar='notebook', nargs='*', type=Path, help='these only')
    parser.add_argument('--workers', type=int, default=2)
    args = parser.parse_args()
    paths = [p.resolve() for p in args.paths] or [p for p in sorted((ROOT / 'nbs').rglob('[0-9]*.ipynb')) if '.ipynb_checkpoints' not in p.parts]
    os.chdir(ROOT / 'nbs')
    start = time.perf_counter()
    import notebooks as module  # by name: a notebook replaces `__main__` in its process, and `__main__.run` would not be found
    with ProcessPoolExecutor(args.workers, mp_context=get_context('spawn')) as pool: results = list(pool.map(module.run, paths))
    def name(p): return os.path.relpath(p, ROOT / 'nbs')
    for notebook, _, seconds, _ in sorted(results, key=lambda r: -r[2])[:30]: print(f'{seconds:6.1f} s  {name(notebook)}')
    for notebook, _, _, traces in results:
        for trace in traces: print(f'{name(notebook)} leaves something behind: {trace}')
    failed = [str(name(p)) for p, passed, _, _ in results if not passed]
    print(f'{len(results)} notebooks in {time.perf_counter() - start:.0f} s;', f'failed: {", ".join(failed)}' if failed else 'all passed')
    return int(bool(failed or any(traces for *_, traces in results)))


if __name__ == '__main__': sys.exit(main())
