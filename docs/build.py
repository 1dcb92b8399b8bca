"""Builds the site, _docs/, and README.md from the notebooks: nbdev processes them, translate.py turns Quarto's flavour into MyST, Sphinx renders

    python docs/build.py             both
    python docs/build.py --readme    README.md and its figures only
"""
import argparse, base64, os, re, shutil, sys
from configparser import ConfigParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import nbformat
from bs4 import BeautifulSoup
from nbconvert import MarkdownExporter
from nbformat.v4 import new_markdown_cell, output_from_msg
from translate import front_matter, page_name, pop_options, translate

ROOT = Path(__file__).resolve().parent.parent


def settings(root=ROOT):
    "settings.ini"
    config = ConfigParser(delimiters=['='], interpolation=None)
    config.read(root/'settings.ini', encoding='utf-8')
    return config['DEFAULT']


def pages(cfg, processed, out):
    "Translate every processed notebook into a page for Sphinx; the first page links to the others in the order of the notebooks"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    notebooks = {}
    for path in sorted(processed.glob('*.ipynb')):
        nb = nbformat.read(path, as_version=4)
        front = front_matter(nb)
        notebooks[page_name(path, front)] = translate(nb, front, path, cfg)
    others = '\n'.join(name for name in notebooks if name != 'index')
    notebooks['index'].cells.append(new_markdown_cell(f'```{{toctree}}\n:hidden:\n\n{others}\n```'))
    for name, nb in notebooks.items(): nbformat.write(nb, out/f'{name}.ipynb')


def problems(site, host):
    "Duplicate anchors, links that lead nowhere, and everything that a page would fetch from elsewhere"
    soups = {p: BeautifulSoup(p.read_text(encoding='utf-8'), 'lxml') for p in sorted(site.glob('*.html'))}
    ids = {p: [t['id'] for t in soup.find_all(id=True)] for p, soup in soups.items()}
    for page, soup in soups.items():
        yield from (f'{page.name}: anchor #{i} occurs twice' for i in set(ids[page]) if ids[page].count(i) > 1)
        fetched = [t.get('src') or t.get('href') for t in soup.find_all(['script', 'img', 'iframe', 'link']) if t.get('rel') != ['canonical']]
        yield from (f'{page.name}: fetches {url}' for url in fetched if url and urlsplit(url).netloc)
        yield from (f'{page.name}: an image has no alt text' for t in soup.find_all('img') if not t.get('alt'))
        for url in {t['href'] for t in soup.find_all('a', href=True)}:
            path, anchor = urldefrag(url)
            target = site/unquote(path) if path else page
            if url.startswith(host): yield f'{page.name}: {url} should be a link within the site'
            elif urlsplit(url).scheme: continue
            elif not target.is_file(): yield f'{page.name}: {url} leads nowhere'
            elif anchor and target in ids and anchor not in ids[target]: yield f'{page.name}: no anchor {url}'
    for css in site.glob('_static/*.css'):
        yield from (f'{css.name}: fetches {url}' for url in re.findall(r'(?:@import|url\()\s*["\']?((?:https?:)?//[^"\')]+)', css.read_text()))


def build_site(out=ROOT/'_docs'):
    "Build the whole site into `out`; anything doubtful is an error"
    from nbdev.serve import proc_nbs
    from sphinx.cmd.build import main as sphinx
    os.chdir(ROOT)
    os.environ['CIFAR_NBDEV_DATA'] = 'shapes10'
    cfg = settings()
    proc_nbs(n_workers=2, force=True)
    pages(cfg, ROOT/'_proc', ROOT/'_proc'/'pages')
    shutil.rmtree(out, ignore_errors=True)
    if status := sphinx(['-W', '--keep-going', '-q', '-c', 'docs', '-d', '_proc/doctrees', '_proc/pages', str(out)]): sys.exit(status)
    found = list(problems(out, cfg['doc_host']))
    if found: sys.exit('\n'.join(found))
