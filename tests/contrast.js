// Contrast as WCAG 2 defines it; what falls short of AA, as lines of text. Run inside a page
const canvas = Object.assign(document.createElement('canvas'), {width: 1, height: 1});
const pen = canvas.getContext('2d', {willReadFrequently: true}), known = {};
function rgba(colour) {                                 // any CSS colour: three times 0 to 255, alpha 0 to 1
  if (!known[colour]) {
    pen.clearRect(0, 0, 1, 1);
    pen.fillStyle = colour;
    pen.fillRect(0, 0, 1, 1);
    known[colour] = [...pen.getImageData(0, 0, 1, 1).data].map((v, i) => i < 3 ? v : v / 255);
  }
  return known[colour];
}
const over = (a, b) => [0, 1, 2].map(i => a[i] * a[3] + b[i] * (1 - a[3])).concat(1);
function luminance(colour) {
  const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const [r, g, b] = colour.slice(0, 3).map(v => linear(v / 255));
  return .2126 * r + .7152 * g + .0722 * b;
}
function ratio(a, b) {
  const [light, dark] = [luminance(a), luminance(b)].sort((p, q) => q - p);
  return (light + .05) / (dark + .05);
}
function ground(element) {                              // what is behind: the page's own ground at last
  const layers = [];
  for (let e = element; e; e = e.parentElement) layers.unshift(rgba(getComputedStyle(e).backgroundColor));
  return layers.reduce((below, layer) => over(layer, below), rgba('Canvas'));
}
const seen = e => e.checkVisibility({opacityProperty: true, visibilityProperty: true})
  && e.getBoundingClientRect().width > 1 && e.getBoundingClientRect().height > 1;
const said = (e, k) => `${e.tagName}.${e.className} "${e.textContent.trim().slice(0, 30)}" ${k.toFixed(2)}`;
const still = () => document.head.append(Object.assign(document.createElement('style'),
  {textContent: '* { transition: none !important; animation: none !important }'}));

function faintText() {
  still();
  const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; node = walker.nextNode();) {
    const e = node.parentElement;
    if (!node.data.trim() || !seen(e)) continue;
    const style = getComputedStyle(e), size = parseFloat(style.fontSize), below = ground(e);
    const large = size >= 24 || size >= 18.66 && style.fontWeight >= 700;
    const k = ratio(over(rgba(style.color), below), below);
    if (k < (large ? 3 : 4.5)) found.push(said(e, k));
  }
  return [...new Set(found)];
}

function faintFocus() {
  still();
  const found = [];
  const controls = 'a[href], button, input, select, textarea, summary, [tabindex="0"]';
  for (const e of document.querySelectorAll(controls)) {
    if (e.matches('[type=file]') || !e.checkVisibility({visibilityProperty: true})) continue;
    e.focus({preventScroll: true});
    if (document.activeElement !== e) continue;         // a template's, a closed dialog's
    const style = getComputedStyle(e), below = ground(e.parentElement), mark = style.outlineStyle;
    const k = ratio(over(rgba(style.outlineColor), below), below);
    const drawn = mark === 'auto' || mark !== 'none' && parseFloat(style.outlineWidth) >= 2;
    if (!e.matches(':focus-visible') || !drawn || k < 3 || !seen(e)) found.push(said(e, k));
  }
  return [...new Set(found)];
}
