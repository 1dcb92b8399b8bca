"""Takes out of a built site what the theme brings and no page uses: icon fonts and their script, most of its
style sheets, the search on pages that do not search, source maps, translations
"""
import os, re
from pathlib import Path
from urllib.parse import unquote

import tinycss2

_REF = re.compile(r'(?:\b(?:src|href)="|url\(["\']?|@import ")([^"\')#?]+)')
_MADE = ('bs-', 'kind-')                                # classes that scripts put together while they run


def tidy(text, search=False):
    "A page without scripts and parts that it does not use; heads of columns say that they are"
    unused = 'fontawesome' if search else 'fontawesome|searchtools|language_data|searchindex'
    text = re.sub(rf'<script[^>]*["/](?:{unused})\.js[^>]*></script>\s*', '', text)
    text = re.sub(r'<div id="jb-print-docs-body".*?(?=<div id="searchbox")', '', text, flags=re.S)
    empty = r'<thead>\s*<tr[^>]*>(?:<th[^>]*><p></p></th>\s*)*</tr>\s*</thead>\s*'
    return re.sub(empty, '', text).replace('<th class="head', '<th scope="col" class="head')


def _alive(selector, words):
    "Whether there can be an element with all classes and ids of a selector"
    plain = re.sub(r':(?:not|is|where|has)\([^)]*\)', '', selector)
    names = re.findall(r'[.#](-?[A-Za-z_][\w-]*)', plain)
    return all(name in words or name.startswith(_MADE) for name in names)


def style(rules, words):
    "A style sheet's rules as text, without those whose classes are not among `words`; licences stay"
    kept = []
    for rule in rules:
        if rule.type == 'qualified-rule':
            selectors = re.split(r',(?![^(]*\))', tinycss2.serialize(rule.prelude))
            if alive := ','.join(s for s in selectors if _alive(s, words)):
                kept.append(f'{alive}{{{tinycss2.serialize(rule.content)}}}')
        elif rule.type == 'at-rule' and rule.lower_at_keyword in ('media', 'supports'):
            inner = style(tinycss2.parse_rule_list(rule.content, skip_comments=True), words)
            if inner.strip(): kept.append(f'@{rule.at_keyword}{tinycss2.serialize(rule.prelude)}{{{inner}}}')
        elif rule.type == 'at-rule' and rule.lower_at_keyword != 'font-face' or \
                rule.type == 'comment' and re.search('licen[sc]e|copyright', rule.value, re.I):
            kept.append(rule.serialize())
    return '\n'.join(kept)


def asked(site):
    "Files that the pages ask for, and the style sheets that those name"
    found, new = set(), set(site.glob('*.html'))
    while new:
        found |= new
        refs = {(f.parent, ref) for f in new if f.suffix in ('.html', '.css')
                for ref in _REF.findall(f.read_text(encoding='utf-8'))}
        paths = {Path(os.path.normpath(folder/unquote(ref))) for folder, ref in refs}
        new = {path for path in paths if path.is_file()} - found
    return found


def slim(site):
    "Make a built site small"
    for page in site.glob('*.html'):
        text = tidy(page.read_text(encoding='utf-8'), page.stem == 'search')
        page.write_text(text, encoding='utf-8', newline='\n')
    texts = (f.read_text(encoding='utf-8') for f in asked(site) if f.suffix in ('.html', '.js'))
    words = {word for text in texts for word in re.findall(r'[\w-]+', text)}
    for css in site.glob('_static/**/*.css'):
        rules = tinycss2.parse_stylesheet(css.read_text(encoding='utf-8'))
        css.write_text(style(rules, words), encoding='utf-8', newline='\n')
    names = {str(path) for path in asked(site)}
    for path in sorted((site/'_static').rglob('*'), reverse=True):
        if path.is_dir() and not any(path.iterdir()): path.rmdir()
        elif path.is_file() and str(path).removesuffix('.LICENSE.txt') not in names: path.unlink()
