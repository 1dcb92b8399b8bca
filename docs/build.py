"""Builds the site in _docs/, and README.md: translate.py turns the notebooks' Quarto flavour into MyST,
Sphinx renders

    python docs/build.py             both
    python docs/build.py --readme    only README.md and its figures
"""
import os, re, shutil, sys
from configparser import ConfigParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import nbformat
from bs4 import BeautifulSoup
from nbformat.v4 import new_markdown_cell
from readme import write_readme
from slim import slim
from translate import Page, Translator

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {0: 'The report', 4: 'Beyond it', 10: 'Under the hood'}        # by the number of the first notebook


def settings():
    "settings.ini"
    config = ConfigParser(delimiters=['='], interpolation=None)
    config.read(ROOT/'settings.ini', encoding='utf-8')
    return config['DEFAULT']


def floors(pages):
    "What the sidebar lists: the pages' names by floor, in the order of their notebooks"
    found = {caption: [] for caption in FLOORS.values()}
    for page in pages:
        if number := re.match(r'\d+', page.path.name):
            found[FLOORS[max(n for n in FLOORS if n <= int(number[0]))]].append(page.name)
    return {caption: names for caption, names in found.items() if names}


def write_pages(cfg, notebooks, out, root=ROOT):
    "Translate every notebook into a page for Sphinx; the home page lists the others"
    out.mkdir(parents=True)
    pages = [Page(nbformat.read(path, as_version=4), path) for path in sorted(notebooks)]
    translator = Translator(cfg, root, pages)
    for page in pages:
        nb = translator.notebook(page)
        if page.name == 'index':
            trees = [f':caption: {caption}\n:hidden:\n\n' + '\n'.join(names)
                     for caption, names in floors(pages).items()]
            nb.cells += [new_markdown_cell(f'```{{toctree}}\n{tree}\n```') for tree in trees]
        nbformat.write(nb, out/f'{page.name}.ipynb')


def write_nets(folder, root=ROOT):
    "What the page with the live net loads: nets of the report's recipe, as they were after some epochs"
    from cifar_nbdev.data import is_cifar10
    from cifar_nbdev.live import RUNS, write_live
    from cifar_nbdev.model import ImageClassifier
    from cifar_nbdev.report import REPORT, shared
    from cifar_nbdev.results import KEPT, weights_file
    from cifar_nbdev.runs import load_runs, load_weights
    from cifar_nbdev.sources import CLASSES
    stored = root/'nbs'/RUNS
    runs = [r for lr in REPORT for r in load_runs(stored, reading='gate', init='pytorch', lr=lr, seed=0)]
    if not is_cifar10(shared(runs, 'data', 'name')): sys.exit(f'{stored} is not of CIFAR-10, wanted that')
    def net(lr, epoch): return load_weights(ImageClassifier(), weights_file(stored, lr, epoch))
    write_live(folder, runs, {lr: {epoch: net(lr, epoch) for epoch in KEPT} for lr in REPORT}, CLASSES)


def _links(page, soup, ids, host):
    "Links of a page that lead nowhere, or out of the site and back"
    for url in {t['href'] for t in soup.find_all('a', href=True)}:
        path, anchor = urldefrag(url)
        target = page.parent/unquote(path) if path else page
        if url.startswith(host): yield f'{url} should be a link within the site'
        elif urlsplit(url).scheme: continue
        elif not target.is_file(): yield f'{url} leads nowhere'
        elif anchor and target in ids and anchor not in ids[target]: yield f'{url}: there is no such anchor'


def problems(site, host):
    "Dead links, anchors that occur twice, images without a text, and what a page would fetch from elsewhere"
    soups = {p: BeautifulSoup(p.read_text(encoding='utf-8'), 'html.parser')
             for p in sorted(site.glob('*.html'))}
    ids = {p: [t['id'] for t in soup.find_all(id=True)] for p, soup in soups.items()}
    for page, soup in soups.items():
        found = [*_links(page, soup, ids, host),
                 *(f'anchor #{i} occurs twice' for i in set(ids[page]) if ids[page].count(i) > 1)]
        found += ['an image has no alt text' for t in soup.find_all('img') if not t.get('alt')]
        loaders = soup.select('script, img, iframe, link:not([rel=canonical])')
        fetched = {t.get('src') or t.get('href') for t in loaders} - {None, '#'}
        found += [f'fetches {url}' for url in fetched if urlsplit(url).netloc]
        found += [f'{url} is missing' for url in fetched
                  if not urlsplit(url).netloc and not (page.parent/unquote(urlsplit(url).path)).is_file()]
        yield from (f'{page.name}: {f}' for f in found)
    for css in site.glob('_static/**/*.css'):
        urls = re.findall(r'(?:@import|url\()\s*["\']?((?:https?:)?//[^"\')]+)', css.read_text())
        yield from (f'{css.name}: fetches {url}' for url in urls)


def build_site(out, notebooks=None, root=ROOT):
    "Build the whole site anew; anything doubtful is an error. Only a site without problems replaces `out`"
    from sphinx.cmd.build import main as sphinx
    cfg, made = settings(), Path(out).with_name('_proc')
    html = made/'html'
    shutil.rmtree(made, ignore_errors=True)
    write_pages(cfg, notebooks or (root/cfg['nbs_path']).glob('[!._]*.ipynb'), made/'pages', root)
    args = ['-W', '--keep-going', '-q', '-c', ROOT/'docs', '-d', made/'doctrees', made/'pages', html]
    if status := sphinx([*map(str, args)]): sys.exit(status)
    slim(html)
    if (html/'live.html').exists(): write_nets(html/'live')
    if found := list(problems(html, cfg['doc_host'])): sys.exit('\n'.join(found))
    shutil.rmtree(out, ignore_errors=True)
    html.rename(out)


if __name__ == '__main__':
    os.chdir(ROOT)
    write_readme(ROOT)
    if '--readme' not in sys.argv[1:]: build_site(ROOT/'_docs')
