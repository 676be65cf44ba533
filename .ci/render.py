"Notebooks as readers see them: every one as HTML, and index.ipynb as README.md. Needs no Quarto."
import argparse, difflib, re, sys
from pathlib import Path

import nbformat
from latex2mathml.converter import convert
from nbconvert import HTMLExporter, MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]


def as_read(nb):
    "A notebook without the cells and directives that are for nbdev only."
    cells = []
    for c in nb.cells:
        if c.cell_type == 'raw' or re.search(r'^\s*#\s*\|\s*(hide|default_exp)\b', c.source, re.M): continue
        c.source = re.sub(r'^\s*#\s*\|.*\n?', '', c.source, flags=re.M)
        cells.append(c)
    nb.cells = cells
    return nb


STYLE = """<style>
pre { white-space: pre-wrap !important; overflow-wrap: anywhere; word-break: normal !important }
.jp-Cell-inputWrapper, .jp-InputArea-editor { overflow: visible !important }
math { font-size: 1.05em }
.jp-RenderedMarkdown .highlight { background: #f5f5f5; margin: .8em 0; padding: .4em .8em }
.jp-RenderedMarkdown .highlight pre { background: none }
.jp-RenderedHTML table.dataframe { display: block; overflow-x: auto }
</style></head>"""
CODE = r'(```.*?```|`[^`\n]*`)'
FORMULA = r'\$\$(.+?)\$\$|(?<![\\\w$])\$([^\s$](?:[^$\n]*?[^\s$])?)\$(?![\w$])'


def with_formulas(
    text: str,             # markdown
    formulas: dict[str, str],  # filled: placeholder -> MathML
) -> str:
    "Markdown with a placeholder for each formula: nbconvert's sanitizer would empty MathML elements, so they come in afterwards."
    def keep(m):
        placeholder = f'FORMULA{len(formulas)}X'
        formulas[placeholder] = convert(m[1] or m[2], display='block' if m[1] else 'inline')
        return placeholder
    return ''.join(part if i % 2 else re.sub(FORMULA, keep, part, flags=re.S) for i, part in enumerate(re.split(CODE, text, flags=re.S)))


def empty_formulas(page: str) -> list[str]:
    "MathML elements that should hold something and hold nothing."
    return [m[0] for m in re.finditer(r'<(math|mi|mn|mo|mrow|mfrac|msub|msup|msubsup|munder|mover|msqrt)\b[^>]*(?:/>|>\s*</\1>)', page)]


def links_of(page):
    "Where a page's relative links lead."
    return [h.partition('#')[0] for h in re.findall(r'<(?:a|img)\b[^>]*?(?:href|src)="([^"]+)"', page) if h.partition('#')[0] and not re.match(r'[a-z]+:', h)]


def without_outside_links(
    page: str,      # HTML
    folder: Path,   # of its notebook
) -> str:
    "The page with links to files outside nbs/, which are no part of the rendered pages, as plain text."
    def kept(m):
        file = (folder / m[1]).resolve()
        is_page = re.match(r'[a-z]+:', m[1]) or file.is_relative_to(ROOT / 'nbs')
        return m[0] if is_page or not file.exists() else m[2]
    return re.sub(r'<a href="([^"#]+)[^"]*"[^>]*>(.*?)</a>', kept, page, flags=re.S)


def html(target: Path) -> int:
    target.mkdir(parents=True, exist_ok=True)
    notebooks = [p for p in sorted((ROOT / 'nbs').rglob('*.ipynb')) if '.ipynb_checkpoints' not in p.parts]
    pages = {}
    for path in notebooks:
        nb = nbformat.read(path, 4)
        bad = [o for c in nb.cells if c.cell_type == 'code' for o in c.outputs if o.output_type == 'error']
        if bad: print(f'{path.relative_to(ROOT)}: error cell: {bad[0].ename}: {bad[0].evalue}'); return 1
        formulas = {}
        for c in as_read(nb).cells:
            if c.cell_type == 'markdown': c.source = with_formulas(c.source, formulas)
        front = path.stem == 'index'  # what its cells show is of interest, the cells are not
        page, _ = HTMLExporter(embed_images=True, exclude_input=front, exclude_input_prompt=True, exclude_output_prompt=True).from_notebook_node(nb, resources={'metadata': {'path': str(path.parent), 'name': path.stem}})
        page = re.sub(r'<script[^>]*\bsrc="https?:[^>]*>\s*</script>|<script type="text/x-mathjax-config">.*?</script>', '', page, flags=re.S).replace('</head>', STYLE, 1)  # nothing is fetched
        page = re.sub(r'FORMULA\d+X', lambda m: formulas[m[0]], page)
        if bad := empty_formulas(page): print(f'{path.relative_to(ROOT)}: empty formula: {bad[0]}'); return 1
        page = without_outside_links(page, path.parent)
        page = re.sub(r'(href="(?![a-z]+:)[^"#]*)\.ipynb(["#])', r'\1.html\2', page)                       # notebooks name each other as files
        out = target / path.relative_to(ROOT / 'nbs').with_suffix('.html')
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding='utf-8')
        pages[out] = page
    dead = [f'{out.relative_to(target)}: {link}' for out, page in pages.items() for link in links_of(page) if not (out.parent / link).exists()]
    if dead: print('Links that lead nowhere:', *dead, sep='\n'); return 1
    print(f'{len(notebooks)} notebooks rendered to {target}')
    return 0


def check() -> int:
    "Error cells, and links between notebooks that lead nowhere, without rendering anything."
    wrong = []
    notebooks = [p for p in sorted((ROOT / 'nbs').rglob('*.ipynb')) if '.ipynb_checkpoints' not in p.parts]
    for path in notebooks:
        for c in nbformat.read(path, 4).cells:
            if c.cell_type == 'code': wrong += [f'{path.relative_to(ROOT)}: error cell: {o.ename}: {o.evalue}' for o in c.outputs if o.output_type == 'error']
            if c.cell_type != 'markdown': continue
            text = re.sub(CODE, '', c.source, flags=re.S)
            links = [link.partition('#')[0] for link in re.findall(r'\]\(([^)\s]+)\)', text) if not re.match(r'[a-z]+:|#', link)]
            wrong += [f'{path.relative_to(ROOT)}: a link leads nowhere: {link}' for link in links if not (path.parent / link).exists()]
    if wrong: print(*wrong, sep='\n'); return 1
    print(f'{len(notebooks)} notebooks: no error cell, all links lead somewhere')
    return 0


def readme() -> str:
    nb = as_read(nbformat.read(ROOT / 'nbs' / 'index.ipynb', 4))
    text, _ = MarkdownExporter(exclude_input=True).from_notebook_node(nb)  # what a cell shows is of interest here, the cell is not
    text = re.sub(r'\]\((images/)', r'](nbs/\1', text)
    text = re.sub(r'\]\(((?:\w+/)*\w+\.ipynb)', r'](nbs/\1', text)
    head = '<!-- Made from nbs/index.ipynb by `make readme`; edit that notebook. -->\n\n'
    return head + re.sub(r'\n{3,}', '\n\n', text).strip() + '\n'


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('what', choices=['html', 'readme', 'check'])
    parser.add_argument('target', type=Path, nargs='?')
    parser.add_argument('--check', action='store_true', help='compare instead of writing')
    a = parser.parse_intermixed_args()
    if a.what == 'html': return html(a.target)
    if a.what == 'check': return check()
    new = readme()
    if not a.check: a.target.write_text(new, encoding='utf-8'); return 0
    from opd_nb.core.config import env_example
    for path, want in ((a.target, new), (ROOT / '.env.example', env_example())):
        have = path.read_text(encoding='utf-8')
        if have != want:
            sys.stdout.writelines(difflib.unified_diff(have.splitlines(1), want.splitlines(1), str(path), 'generated'))
            print(f'{path.name} is stale: run make readme.'); return 1
    return 0


if __name__ == '__main__': sys.exit(main())
