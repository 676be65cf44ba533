"The exported code stays easy to read: width of lines, size of functions, contents of lists named, one module for a public name."
import ast
import builtins
import re
import symtable
from collections import Counter
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {p: p.read_text(encoding='utf-8') for p in sorted((ROOT / 'opd_nb').rglob('*.py')) if p.name != '_modidx.py'}
TREES = {p: ast.parse(text) for p, text in SOURCES.items()}
BARE = ('list', 'dict', 'tuple', 'set')


def functions(tree):
    "Outermost functions, methods of classes, and those under an `if` or a `try`."
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)): yield node
        if isinstance(node, (ast.ClassDef, ast.If, ast.Try, ast.With)): yield from functions(node)


FUNCTIONS = [(p, f) for p, tree in TREES.items() for f in functions(tree)]


def lines():
    for p, f in FUNCTIONS: yield from (x for x in SOURCES[p].splitlines()[f.lineno - 1:f.end_lineno] if x.strip())


def sizes(): return sorted(sum(1 for _ in ast.walk(f)) for _, f in FUNCTIONS)


def test_lines_are_narrow():
    widths = [len(x.rstrip()) for x in lines()]
    assert len(widths) > 5000
    assert sum(w > 100 for w in widths) <= .02 * len(widths) and sum(w > 120 for w in widths) <= .002 * len(widths)  # the guide: .08 and .015


def test_functions_are_small():
    "Nodes of the syntax tree, so that putting much on one line gains nothing."
    nodes = sizes()
    assert nodes[-1] <= 500 and nodes[int(.9 * (len(nodes) - 1))] <= 270 and median(nodes) <= 90, (median(nodes), nodes[-5:])


def test_lists_say_what_they_hold():
    found = Counter()
    for _, f in FUNCTIONS:
        given = [a.annotation for a in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs)] + [f.returns]
        for annotation in filter(None, given):
            if isinstance(annotation, ast.Name) and annotation.id in BARE: found['bare'] += 1
            if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) in BARE: found['typed'] += 1
    assert found['typed'] >= .8 * (found['typed'] + found['bare']), found


def test_a_public_name_is_defined_once():
    names = Counter(n.name for tree in TREES.values() for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith('_'))
    assert sum(n > 1 for n in names.values()) <= 10, [name for name, n in names.items() if n > 1]


def unused_imports(tree, text):
    "Names that a module imports and never mentions; `noqa: F401` and the reason may stand behind an import that does something."
    lines, mentioned = text.splitlines(), {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    for node in ast.walk(tree):  # annotations in quotes
        for annotation in filter(None, (getattr(node, 'annotation', None), getattr(node, 'returns', None))):
            mentioned |= {w for n in ast.walk(annotation) if isinstance(n, ast.Constant) and isinstance(n.value, str) for w in re.findall(r'\w+', n.value)}
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Import, ast.ImportFrom)) or any('noqa: F401' in line for line in lines[node.lineno - 1:node.end_lineno]): continue
        for alias in node.names:
            if (alias.asname or alias.name).partition('.')[0] not in mentioned: yield alias.name


def test_what_is_imported_is_used():
    found = {str(p.relative_to(ROOT)): names for p, tree in TREES.items() if (names := list(unused_imports(tree, SOURCES[p])))}
    assert not found


def test_an_unused_import_is_seen():
    text = 'import os, json as j\nfrom a import b, c  # noqa: F401; registers itself\nfrom d import e\ndef f(x: "e"): return os.sep'
    assert list(unused_imports(ast.parse(text), text)) == ['json']


def undefined(text):
    "Names that some function takes from the module, and that the module does not have."
    def scopes(scope): yield scope; yield from (x for child in scope.get_children() for x in scopes(child))
    module = symtable.symtable(text, 'module', 'exec')
    known = {s.get_name() for s in module.get_symbols() if s.is_assigned() or s.is_imported()} | {*dir(builtins), '__file__', '__name__', '__path__', '__version__'}
    return sorted({s.get_name() for scope in scopes(module) for s in scope.get_symbols() if s.is_referenced() and s.is_global()} - known)


def test_what_is_used_is_defined():
    "A cell that is tested in its notebook may use what only the notebook imports."
    found = {str(p.relative_to(ROOT)): names for p, text in SOURCES.items() if (names := undefined(text))}
    assert not found


def test_an_undefined_name_is_seen():
    assert undefined('import re\ndef f(x):\n    def g(): return os.sep + x + str(re)\n    return g') == ['os']


def test_the_measures_see_what_they_measure():
    tree = ast.parse('def f(x: list, y: list[int]): return x\nclass A:\n    def g(self): pass')
    assert [f.name for f in functions(tree)] == ['f', 'g']
