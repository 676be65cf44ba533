"""Run every notebook's cells, two notebooks at a time, and print the thirty slowest.

Several notebooks share a process, so what one leaves behind could make the next pass or fail. After each notebook its
traces are looked for: torch's defaults, environment variables, the working directory, names in the package's registries."""
import argparse, os, sys, time
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
    for name, module in list(sys.modules.items()):
        if not name.startswith('opd_nb.'): continue
        for registry in [v for v in vars(module).values() if type(v).__name__ == 'Registry']: found[f'registry of each {registry.kind}'] = sorted(k for k, v in registry.items() if getattr(v, '__module__', '').startswith('__main__'))
    return found


def run(notebook: Path) -> tuple[Path, bool, float, list[str]]:
    "One notebook: whether it passed, its seconds, and what it left behind."
    from nbdev.test import test_nb
    before = state()
    passed, seconds = test_nb(notebook, skip_flags=['slow', 'gpu'], basepath=ROOT)
    after = state()
    traces = [f'{k}: {before.get(k, [])} before, {after[k]} after' for k in after if k in before and before[k] != after[k] or k not in before and k.startswith('registry') and after[k]]
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
    name = lambda p: p.relative_to(ROOT / 'nbs')
    for notebook, _, seconds, _ in sorted(results, key=lambda r: -r[2])[:30]: print(f'{seconds:6.1f} s  {name(notebook)}')
    for notebook, _, _, traces in results:
        for trace in traces: print(f'{name(notebook)} leaves something behind: {trace}')
    failed = [str(name(p)) for p, passed, _, _ in results if not passed]
    print(f'{len(results)} notebooks in {time.perf_counter() - start:.0f} s;', f'failed: {", ".join(failed)}' if failed else 'all passed')
    return int(bool(failed or any(traces for *_, traces in results)))


if __name__ == '__main__': sys.exit(main())
