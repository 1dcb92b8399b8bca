// The report's net in a page: give it a picture, and every layer shows what it makes of it. A page has an
// element of class `live-net` and this script. In live/ beside it are net.js (classes, curves, drawn shapes)
// and a file of weights for each net, loaded when asked for, as <script> elements: a page that was opened as
// a file can load nothing else. Nothing is sent anywhere. Texts stay texts: nothing is parsed as HTML.
'use strict'
const liveNet = (() => {
const SIDE = 32, AREA = SIDE * SIDE, FOLDER = 'live/', LARGEST = 150e6          // pixels of a picture
const BLUE = [0, 114, 178], ORANGE = [213, 94, 0]
const INKS = {black: '#000000', white: '#ffffff', grey: '#808080', red: '#d02020', orange: '#f09020',
              green: '#2e8b3d', blue: '#2050c0', sky: '#8cc8f0', brown: '#7a5030'}

// The net, as cifar_nbdev.model has it. Images and maps are flat arrays: channel, then row, then column
function convolve(x, weight, bias, k) {         // each kernel slides over the image, adding up what it covers
  const side = SIDE - k + 1, out = new Float32Array(bias.length * side * side)
  for (let c = 0, o = 0; c < bias.length; c++)
    for (let i = 0; i < side; i++)
      for (let j = 0; j < side; j++, o++) {
        let sum = bias[c]
        for (let rgb = 0; rgb < 3; rgb++)
          for (let r = 0; r < k; r++)
            for (let s = 0; s < k; s++)
              sum += weight[((c * 3 + rgb) * k + r) * k + s] * x[(rgb * SIDE + i + r) * SIDE + j + s]
        out[o] = sum
      }
  return out
}
const linear = (x, weight, bias) =>
  Array.from(bias, (b, i) => x.reduce((sum, v, j) => sum + weight[i * x.length + j] * v, b))
function forward(net, x) {                      // pixels / 255 -> all that the page shows
  const mean = [0, 1, 2].map(c => x.subarray(c * AREA, (c + 1) * AREA).reduce((a, b) => a + b) / AREA)
  const gates = linear(mean, net['gate.weight'], net['gate.bias'])              // one for each branch
  const responses = convolve(x, net['conv.weight'], net['conv.bias'], net.kernel).map(v => Math.max(v, 0))
  const n = responses.length / gates.length     // numbers in a branch
  const weighted = responses.map((v, i) => v * gates[Math.floor(i / n)])
  const sum = weighted.slice(0, n).map((_, i) => gates.reduce((s, _, k) => s + weighted[k * n + i], 0))
  const logits = linear(sum, net['fc.weight'], net['fc.bias'])
  const powers = logits.map(v => Math.exp(v - Math.max(...logits))), total = powers.reduce((a, b) => a + b)
  return {mean, gates, responses, weighted, sum, logits, probs: powers.map(v => v / total)}
}

// A picture of any size as 3 * 32 * 32 bytes: upright, on white, its centre square, averaged over blocks.
// n numbers of `from`, `step` apart, become 32 averages in `to`: rounded as by PIL's BOX filter
function average(n, from, at, step, to, start, jump) {
  const scale = n / SIDE, half = Math.max(scale, 1) / 2
  for (let i = 0; i < SIDE; i++) {
    const middle = (i + .5) * scale + .5, first = Math.floor(middle - half), last = Math.floor(middle + half)
    let sum = 0
    for (let j = first; j < last; j++) sum += from[at + j * step]
    to[start + i * jump] = Math.floor((sum * Math.floor(.5 + 2 ** 22 / (last - first)) + 2 ** 21) / 2 ** 22)
  }
}
function shrink(source, w, h) {
  const n = Math.min(w, h), left = (w - n) >> 1, top = (h - n) >> 1, tall = Math.min(n, 64)
  const strip = el('canvas', {width: n, height: tall}).getContext('2d', {willReadFrequently: true})
  const narrow = new Uint8Array(3 * SIDE * n), out = new Uint8Array(3 * AREA)
  strip.fillStyle = '#fff'
  for (let y = 0; y < n; y += tall) {           // a strip of rows at a time, to keep memory small
    const rows = Math.min(tall, n - y)
    strip.fillRect(0, 0, n, rows)
    strip.drawImage(source, left, top + y, n, rows, 0, 0, n, rows)
    const rgba = strip.getImageData(0, 0, n, rows).data
    for (let r = 0; r < rows; r++)
      for (let c = 0; c < 3; c++) average(n, rgba, 4 * r * n + c, 4, narrow, c * SIDE * n + y + r, n)
  }
  for (let j = 0; j < 3 * SIDE; j++)            // then each column
    average(n, narrow, j * n, 1, out, Math.floor(j / SIDE) * AREA + j % SIDE, SIDE)
  return out
}
async function readPicture(file) {
  if (!file) throw Error('That holds no picture file: save the picture, then drop or choose it.')
  if (!file.size) throw Error(`${file.name} is empty, wanted a picture.`)
  const img = new Image(), url = URL.createObjectURL(file)
  try {
    await new Promise(done => { Object.assign(img, {onload: done, onerror: done, src: url}) })
    const {naturalWidth: w, naturalHeight: h} = img
    if (!w || !h) throw Error(`${file.name} is no picture that this browser can read.`)
    if (w * h > LARGEST) throw Error(`${file.name} has ${w}×${h} pixels: more than ${LARGEST / 1e6} million.`)
    // colours as they are stored: PIL does not convert them either
    const options = {imageOrientation: 'from-image', colorSpaceConversion: 'none'}
    return shrink(await createImageBitmap(file, options).catch(() => img), w, h)
  } finally { URL.revokeObjectURL(url) }
}

// The files beside the page: each calls `liveNet.file` with its name and what it holds
const files = {}
async function load(name) {
  const src = `${FOLDER}${name}.js`, script = done => el('script', {src, onload: done, onerror: done})
  if (!files[name]) await new Promise(done => document.head.append(script(done)))
  if (files[name]) return files[name]
  throw Error(`${src} is not there: the folder ${FOLDER} belongs beside this page.`)
}
const bytes = base64 => Uint8Array.from(atob(base64), c => c.charCodeAt(0))
function unpack({shapes, floats}) {             // arrays by name, from little-endian floats in the same order
  const view = new DataView(bytes(floats).buffer), net = {kernel: shapes['conv.weight'][3]}
  let at = -4
  for (const [name, shape] of Object.entries(shapes))
    net[name] = Float32Array.from(Array(shape.reduce((a, b) => a * b)), () => view.getFloat32(at += 4, true))
  return net
}

// What is on the page
function el(tag, attributes = {}, ...children) {
  const svg = /^(svg|path|circle|line|text)$/.test(tag) && 'http://www.w3.org/2000/svg'
  const e = svg ? document.createElementNS(svg, tag) : document.createElement(tag)
  for (const [k, v] of Object.entries(attributes)) typeof v == 'function' ? e[k] = v : e.setAttribute(k, v)
  e.append(...children)
  return e
}
const card = (title, ...children) => el('section', {class: 'live-card'}, el('h3', {}, title), ...children)
const button = (text, onclick) => el('button', {type: 'button', class: 'live-button', onclick}, text)
const alarm = text => el('p', {class: 'live-alarm', role: 'alert'}, text)
const radio = (name, attributes, on) => Object.assign(el('input', {type: 'radio', name, ...attributes}), on)
const indexed = (letter, k) => el('i', {}, letter, el('sub', {}, k + 1))
const fixed = v => (Math.round(100 * v) / 100 || 0).toFixed(2).replace('-', '−')     // no −0
const term = v => ` ${v < 0 ? '−' : '+'} ${fixed(Math.abs(v))}`
const percent = p => `${(100 * p).toFixed(1)} %`
const most = values => values.reduce((m, v) => Math.max(m, Math.abs(v)), 1e-9)
function paint(canvas, value) {                 // value(i, c): of pixel i, its red, green, blue or opacity
  const image = new ImageData(canvas.width, canvas.height)
  image.data.forEach((_, i) => { image.data[i] = value(i >> 2, i & 3) })
  canvas.getContext('2d').putImageData(image, 0, 0)
  return canvas
}
const paintPicture = (canvas, p) => paint(canvas, (i, c) => c < 3 ? p[c * AREA + i] : 255)
const paintMap = (canvas, v, full) => paint(canvas, (i, c) =>                   // the ground at 0
  c < 3 ? (v[i] < 0 ? ORANGE : BLUE)[c] : 255 * Math.abs(v[i]) / full)

// The picture as the net sees it, to draw on; `changed(pixels, drawing)` is told of every change
function pictureCard(shapes, changed) {
  const pixels = new Uint8Array(3 * AREA), trouble = alarm(''), spot = el('span', {class: 'live-spot'})
  const canvas = el('canvas', {width: SIDE, height: SIDE, tabindex: 0, role: 'application', 'aria-label':
    'The picture, 32 by 32 pixels. Draw with the pointer, or move with the arrow keys and draw with space'})
  let ink = INKS.black, last, turn = 0, at = AREA / 2 + SIDE / 2     // `at`: where the keyboard draws
  function show(drawing = false) { paintPicture(canvas, pixels); changed(pixels, drawing) }
  function put(picture) { turn++; pixels.set(picture); trouble.textContent = ''; show() }
  async function given({files: [file]}) {
    const mine = ++turn                         // another picture may come before this one is read
    const got = await readPicture(file).catch(e => e)
    if (mine == turn) got instanceof Error ? trouble.textContent = got.message : put(got)
  }
  function dot(cx, cy) {                        // three pixels wide
    for (let i = 0; i < AREA; i++)
      if ((i % SIDE + .5 - cx) ** 2 + (Math.floor(i / SIDE) + .5 - cy) ** 2 < 2.3)
        for (let c = 0; c < 3; c++) pixels[c * AREA + i] = parseInt(ink.slice(2 * c + 1, 2 * c + 3), 16)
  }
  function draw(e) {                            // from the last point to this one
    const box = canvas.getBoundingClientRect()
    const [x, y] = [e.clientX - box.x, e.clientY - box.y].map(v => v * SIDE / box.width)
    const [x0, y0] = last ?? [x, y], steps = Math.ceil(Math.hypot(x - x0, y - y0)) || 1
    for (let i = 0; i <= steps; i++) dot(x0 + (x - x0) * i / steps, y0 + (y - y0) * i / steps)
    last = [x, y]
    show(true)
  }
  function key(e) {
    const move = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -SIDE, ArrowDown: SIDE, ' ': 0}[e.key]
    if (move === undefined) return
    e.preventDefault()
    at = (at + move + AREA) % AREA
    spot.style.translate = `${(at % SIDE - 1) * 100 / 3}% ${(Math.floor(at / SIDE) - 1) * 100 / 3}%`
    if (!move) { turn++; dot(at % SIDE + .5, Math.floor(at / SIDE) + .5); show() }
  }
  Object.assign(canvas, {onkeydown: key, onpointermove: e => last && draw(e),
    onpointerdown: e => { turn++; canvas.setPointerCapture(e.pointerId); draw(e) },
    onlostpointercapture: () => { last = null; show() }})
  const drag = e => { e.preventDefault(); canvas.dataset.over = e.type == 'dragover' }
  for (const type of ['dragover', 'dragleave', 'drop']) document.addEventListener(type, drag)
  document.addEventListener('drop', e => given(e.dataTransfer))
  document.addEventListener('paste', e => e.target.closest?.('[type=search]') || given(e.clipboardData))
  const picker = (text, more) => el('label', {class: 'live-button', ...more}, text, el('input', {...more,
    type: 'file', accept: 'image/*', onchange: ({target}) => { given(target); target.value = '' }}))
  const palette = Object.entries(INKS).map(([title, value]) => el('label', {title, style: `--ink: ${value}`},
    radio('live-ink', {'aria-label': title}, {checked: value == ink, onchange: () => { ink = value }})))
  const drawn = Object.entries(shapes).map(([title, base64]) =>
    el('button', {type: 'button', title, onclick: () => put(bytes(base64))}, paintPicture(
      el('canvas', {width: SIDE, height: SIDE, role: 'img', 'aria-label': title}), bytes(base64))))
  drawn[0].click()
  return card('What the net sees', el('div', {class: 'live-picture'}, canvas, spot), trouble,
    el('div', {class: 'live-row'}, picker('Choose a picture'), picker('Take a photograph', {capture: ''})),
    el('p', {}, 'Or drop or paste one. It stays in this browser; nothing is sent anywhere.'),
    el('fieldset', {class: 'live-row'}, el('legend', {}, 'Draw on it'), ...palette,
       button('Clear', () => put(new Uint8Array(3 * AREA).fill(255)))),
    el('div', {class: 'live-row', role: 'group', 'aria-label': 'Drawn shapes'}, ...drawn))
}

// Values over epochs, training dashed, test solid, with a mark at the epoch of the net
function chart(what, [train, test], epoch, highest) {
  const step = 10 ** Math.floor(Math.log10(highest)) / 2, top = step * Math.ceil(highest / step)
  const n = train.length, x = e => 26 + 210 * e / n, y = v => 84 - 78 * v / top
  const line = (kind, v) => el('path', {class: kind, d: `M${v.map((v, i) => [x(i + 1), y(v)]).join('L')}`})
  const label = (x, y, text) => el('text', {x, y, 'text-anchor': y > 90 ? 'middle' : 'end'}, text)
  const now = epoch ? [train[epoch - 1], test[epoch - 1]] : [], [a, b] = now.map(v => v.toPrecision(3))
  const said = epoch ? ` training ${a}, test ${b}` : ' not trained yet'
  return el('figure', {}, el('figcaption', {}, el('b', {}, what), said),
    el('svg', {viewBox: '0 0 244 100', role: 'img', 'aria-label': `${what} of training and test by epoch`},
       el('path', {class: 'axis', d: 'M26 6V84H236'}), label(23, 10, +top.toFixed(2)), label(23, 87, 0),
       label(26, 96, 0), label(236, 96, n), line('train', train), line('test', test),
       el('line', {class: 'mark', x1: x(epoch), x2: x(epoch), y1: 4, y2: 84}),
       ...now.map(v => el('circle', {cx: x(epoch), cy: y(v), r: 3}))))
}

// Learning rate and epoch; `changed(net)` is told of every choice, with null if it cannot be had
function netCard({nets, data}, changed) {
  const charts = el('div', {class: 'live-charts'}), trouble = alarm(''), said = el('output')
  const top = what => Math.max(...nets.flatMap(n => n.curves[what].flat())), last = nets[0].epochs.length - 1
  let of = nets[0], wanted
  async function pick() {
    const epoch = of.epochs[slider.value], file = wanted = of.files[slider.value]
    slider.setAttribute('aria-valuetext', said.textContent = `epoch ${epoch}`)
    charts.replaceChildren(...Object.entries(of.curves).map(([what, c]) => chart(what, c, epoch, top(what))))
    const [net, e] = await load(file).then(f => [unpack(f), ''], e => [null, e.message])
    if (file == wanted) { trouble.textContent = e; changed(net) }
  }
  const slider = el('input', {type: 'range', max: last, value: last, 'aria-label': 'Epoch', oninput: pick})
  const rates = nets.map(n => el('label', {},
    radio('live-lr', {}, {checked: n == of, onchange: () => { of = n; pick() }}), n.lr))
  pick()
  return card('The net', el('p', {}, `Trained on ${data}. Curves: training dashed, test solid.`),
    el('fieldset', {class: 'live-rates'}, el('legend', {}, 'Learning rate'), ...rates),
    el('div', {class: 'live-epoch'}, 'After ', said, ...last ? [slider,
      el('div', {}, ...of.epochs.map(e => el('span', {}, e)))] : []), trouble, charts)
}

// Every class with its probability and logit; the likeliest in large letters
function answerCard(classes) {
  const says = el('p', {class: 'live-says', 'aria-live': 'polite'}), took = el('p'), body = el('tbody')
  const head = ['Class', '', 'Probability', 'Logit'].map(text => el('th', {scope: 'col'}, text))
  const table = el('table', {}, el('thead', {}, el('tr', {}, ...head)), body)
  function show({probs, logits}, drawing, ms) {
    const [best, second] = probs.map((_, i) => i).sort((i, j) => probs[j] - probs[i])
    says.setAttribute('aria-busy', drawing)     // while one draws, it is not read out
    says.replaceChildren(el('b', {}, classes[best]), ` ${percent(probs[best])}`)
    if (second >= 0) says.append(el('small', {}, `then ${classes[second]}, ${percent(probs[second])}`))
    body.replaceChildren(...classes.map((title, i) => el('tr', {class: i == best ? 'best' : 'other'},
      el('th', {scope: 'row', title}, title), ...[el('span', {style: `width: ${100 * probs[i]}%`}),
        el('data', {value: probs[i]}, percent(probs[i])), el('data', {value: logits[i]}, fixed(logits[i]))]
        .map(cell => el('td', {}, cell)))))
    took.textContent = `Computed here in ${Math.ceil(ms)} ms.`
  }
  return {section: card('Its answer', says, table, took), show}
}

// What happens between: gates, responses, weighted responses, their sum, and what speaks for a class
function insideCard(classes) {
  const gates = el('div', {class: 'live-gates'}), maps = el('div', {class: 'live-maps'}), rows = {}
  const of = el('select', {onchange: () => show(...now)}, ...['the answer', ...classes].map((name, i) =>
    el('option', {value: i - 1}, name))), speaksFor = el('label', {}, 'What speaks for ', of)
  let now                                       // net and answer
  function row(name, title, values, full, note) {                          // made once, then painted over
    const side = SIDE - now[0].kernel + 1, count = values.length / side ** 2
    if (!rows[name]) maps.append(rows[name] = el('figure', {style: `--count: ${count}`},
      el('figcaption', {}, ...title, el('small')), ...Array.from({length: count}, (_, i) =>
        el('canvas', {width: side, height: side, role: 'img', 'aria-label': `${name}, channel ${i + 1}`}))))
    rows[name].querySelector('small').textContent = note
    rows[name].querySelectorAll('canvas').forEach((canvas, i) =>
      paintMap(canvas, values.slice(i * side ** 2, (i + 1) * side ** 2), full))
  }
  function show(net, y) {
    now = [net, y]
    const n = y.sum.length, full = most(y.responses), both = Math.max(most(y.weighted), most(y.sum))
    const [r, g, b] = y.mean.map(fixed), colour = `--ink: rgb(${y.mean.map(v => 255 * v)})`
    gates.replaceChildren(el('p', {}, 'Mean colour ', el('span', {class: 'live-swatch', style: colour}),
      ` red ${r}, green ${g}, blue ${b}. From these each branch has its gate:`))
    y.gates.forEach((a, k) => {
      const products = y.mean.map((m, c) => `${term(net['gate.weight'][3 * k + c])}·${fixed(m)}`).join('')
      const bar = {class: a < 0 ? 'below' : '', style: `width: ${50 * Math.abs(a) / most(y.gates)}%`}
      gates.append(el('p', {}, el('span', {class: 'live-gauge'}, el('span', bar)), indexed('a', k),
        ` = ${products.replace(/^ (\+ |(−) )/, '$2')}${term(net['gate.bias'][k])} = `, el('b', {}, fixed(a))))
      const part = values => values.slice(k * n, (k + 1) * n)
      row(`relu(c${k + 1})`, ['relu(', indexed('c', k), ')'], part(y.responses), full, `0 to ${fixed(full)}`)
      row(`a${k + 1} relu(c${k + 1})`, ['times ', indexed('a', k)], part(y.weighted), both, `= ${fixed(a)}`)
    })
    row('sum', ['Added up'], y.sum, both, `${fixed(-both)} to ${fixed(both)}`)
    const i = of.value >= 0 ? of.value : y.probs.indexOf(Math.max(...y.probs))
    const speaks = y.sum.map((v, j) => v * net['fc.weight'][i * n + j]), bias = net['fc.bias'][i]
    row('what speaks for a class', [speaksFor], speaks, most(speaks),
        `sum and bias: ${fixed(y.logits[i] - bias)}${term(bias)} = ${fixed(y.logits[i])}`)
  }
  const legend = el('p', {}, 'A column is a channel, c a convolution. Blue is above 0, orange below.')
  return {section: card('What it computes', gates, legend, maps), show}
}

async function mount(root) {
  const about = await load('net'), answer = answerCard(about.classes), inside = insideCard(about.classes)
  let net, pixels
  function show(drawing) {
    answer.section.hidden = inside.section.hidden = !net
    if (!net) return
    const start = performance.now(), y = forward(net, Float32Array.from(pixels, v => v / 255))
    answer.show(y, drawing, performance.now() - start)
    inside.show(net, y)
  }
  const picture = pictureCard(about.shapes, (p, drawing) => { pixels = p; show(drawing) })
  const choice = netCard(about, n => { net = n; show(false) })
  root.replaceChildren(el('div', {class: 'live-top'}, picture, choice, answer.section), inside.section)
}
addEventListener('DOMContentLoaded', () => document.querySelectorAll('.live-net').forEach(root =>
  mount(root).catch(e => root.append(alarm(e.message)))))
return {file: (name, content) => { files[name] = content }}
})()
