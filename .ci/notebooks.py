"""Run the cells of every notebook, two notebooks at a time, and print the thirty slowest.

Each notebook has a process of its own, so nothing that one leaves behind (a loss it registered, torch's defaults, an
environment variable) can make the next one pass or fail. The processes are forked from a server that has imported the
heavy libraries once, which spares each notebook their seconds."""
import argparse
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ['torch', 'transformers', 'peft', 'pandas', 'matplotlib.pyplot', 'nbdev.test', 'nbdev.showdoc', 'openai', 'transformers.models.llama.modeling_llama']


@dataclass
class Result:
    notebook: Path
    passed: bool
    seconds: float

    @property
    def name(self) -> str: return os.path.relpath(self.notebook, ROOT / 'nbs')


def run(notebook: Path, end) -> None:
    "In a process of its own: send whether the notebook passed through this end of a pipe."
    from nbdev.test import test_nb
    passed, _ = test_nb(notebook, skip_flags=['slow', 'gpu'], basepath=ROOT)
    end.send(passed)


def run_alone(context, notebook: Path) -> Result:
    "Run a notebook in a process of its own; one that ends its process has failed."
    start = time.perf_counter()
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=run, args=(notebook, theirs))
    process.start()
    theirs.close()
    try: passed = ours.recv()
    except EOFError:
        process.join()
        print(f'{notebook}: the process ended with code {process.exitcode}')
        passed = False
    process.join()
    return Result(notebook, passed, time.perf_counter() - start)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('paths', metavar='notebook', nargs='*', type=Path, help='these only')
    parser.add_argument('--workers', type=int, default=2)
    args = parser.parse_args()
    paths = [p.resolve() for p in args.paths] or [p for p in sorted((ROOT / 'nbs').rglob('[0-9]*.ipynb')) if '.ipynb_checkpoints' not in p.parts]
    os.chdir(ROOT / 'nbs')
    context = get_context('forkserver')
    context.set_forkserver_preload(HEAVY)
    start = time.perf_counter()
    with ThreadPoolExecutor(args.workers) as pool: results = list(pool.map(lambda p: run_alone(context, p), paths))
    for result in sorted(results, key=lambda r: -r.seconds)[:30]: print(f'{result.seconds:6.1f} s  {result.name}')
    failed = [r.name for r in results if not r.passed]
    print(f'{len(results)} notebooks in {time.perf_counter() - start:.0f} s;', f'failed: {", ".join(failed)}' if failed else 'all passed')
    return int(bool(failed))


if __name__ == '__main__': sys.exit(main())
