"Reads everything from settings.ini, so that nothing is written down twice"
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

config = ConfigParser(delimiters=['='], interpolation=None)
config.read('settings.ini', encoding='utf-8')
cfg = config['DEFAULT']

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=Path('README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    url=cfg['git_url'],
    author=cfg['author'],
    author_email=cfg['author_email'],
    license='Apache-2.0',
    license_files=['LICENSE'],
    keywords=cfg['keywords'].split(),
    packages=[cfg['lib_name']],
    package_data={cfg['lib_name']: ['py.typed', '*.html', '*.js', '*.css']},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg['requirements'].split(),
    extras_require={e: cfg[f'{e}_requirements'].split()
                    for e in ('dev', 'doc', 'cluster', 'export', 'peers')},
    entry_points={'console_scripts': cfg['console_scripts'].split(),
                  'nbdev': [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]},
    classifiers=['Intended Audience :: Education', 'Programming Language :: Python :: 3',
                 'Framework :: Jupyter', 'Typing :: Typed'],
)
