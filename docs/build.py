"""Builds the site in _docs/, and README.md: nbdev processes the notebooks, translate.py turns Quarto's
flavour into MyST, Sphinx renders

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
from translate import Translator, front_matter, page_name

ROOT = Path(__file__).resolve().parent.parent


def settings():
    "settings.ini"
    config = ConfigParser(delimiters=['='], interpolation=None)
    config.read(ROOT/'settings.ini', encoding='utf-8')
    return config['DEFAULT']


def pages(cfg, processed, out):
    "Translate every processed notebook into a page for Sphinx; the first lists the others, in their order"
    out.mkdir(parents=True)
    notebooks, translator = {}, Translator(cfg, ROOT/cfg['lib_path'])
    for path in sorted(processed.glob('*.ipynb')):
        nb = nbformat.read(path, as_version=4)
        notebooks[page_name(path, front_matter(nb))] = translator.notebook(nb, path)
    others = '\n'.join(name for name in notebooks if name != 'index')
    notebooks['index'].cells.append(new_markdown_cell(f'```{{toctree}}\n:hidden:\n\n{others}\n```'))
    for name, nb in notebooks.items(): nbformat.write(nb, out/f'{name}.ipynb')


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


def build_site(out):
    "Build the whole site anew; anything doubtful is an error. Only a site without problems replaces `out`"
    from nbdev.serve import proc_nbs
    from sphinx.cmd.build import main as sphinx
    cfg, processed = settings(), ROOT/'_proc'
    os.environ['CIFAR_NBDEV_DATA'] = 'shapes10'
    shutil.rmtree(processed, ignore_errors=True)
    proc_nbs(n_workers=2)
    pages(cfg, processed, processed/'pages')
    html = processed/'html'
    args = ['-W', '--keep-going', '-q', '-c', 'docs', '-d', str(processed/'doctrees'),
            str(processed/'pages'), str(html)]
    if status := sphinx(args): sys.exit(status)
    for path in (html/'_static'/'mathjax').iterdir():                   # 20 MB of other formats
        if path.name != 'tex-svg.js': shutil.rmtree(path) if path.is_dir() else path.unlink()
    if found := list(problems(html, cfg['doc_host'])): sys.exit('\n'.join(found))
    shutil.rmtree(out, ignore_errors=True)
    html.rename(out)


if __name__ == '__main__':
    os.chdir(ROOT)
    write_readme(ROOT)
    if '--readme' not in sys.argv[1:]: build_site(ROOT/'_docs')
