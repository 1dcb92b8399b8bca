"Formulas as MathML, made when the site is built: browsers set it themselves, without a script"
import re

from docutils import nodes
from latex2mathml.converter import convert

_SPACING = {                                            # as TeX has it, where the converter differs
    r'<mo>max</mo>': '<mi>max</mi>',
    r'(<mi>log</mi>)(?!<mo stretchy="false">&#x00028;)': r'\1<mspace width="0.167em" />',
    r'<mo stretchy="false">&#x0007C;': '<mo stretchy="false" lspace="0" rspace="0">&#x0007C;',
    r'<mo>&#x0002F;': '<mo lspace="0" rspace="0">&#x0002F;',
    r'<mo>&#x02202;</mo>': '<mi>&#x02202;</mi>',
    r'(?<=<mo>&#x0003D;</mo>)<mo>&#x02212;': '<mo form="prefix">&#x02212;'}


def mathml(
    tex,                # For example r'\log 10'
    display='inline',   # Or 'block'
):                      # HTML
    "A formula in TeX's notation as MathML"
    made = convert(tex, display=display)
    if '\\' in made: raise ValueError(f'the formula {tex!r} has a command that latex2mathml does not know')
    for found, better in _SPACING.items(): made = re.sub(found, better, made)
    return made


def _inline(writer, node):
    "A formula in a line of text"
    writer.body.append(f'<span class="math">{mathml(node.astext())}</span>')
    raise nodes.SkipNode


def _block(writer, node):
    "Formulas in lines of their own; where the screen is narrow they break at a \\qquad"
    made = ''.join(mathml(part, 'block') for part in node.astext().split(r'\qquad'))
    writer.body.append(writer.starttag(node, 'div', CLASS='math') + made + '</div>\n')
    raise nodes.SkipNode


def setup(app):
    "A Sphinx extension"
    app.add_html_math_renderer('mathml', (_inline, None), (_block, None))
    return {'parallel_read_safe': True, 'parallel_write_safe': True}
