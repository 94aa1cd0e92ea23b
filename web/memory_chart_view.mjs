import { formatBytes } from './memory_points.mjs'
import { text } from './messages.mjs'
import { ownerWords } from './owner_words.mjs'

// Okabe and Ito's palette, as in the report's plot.
const COLOURS = ['#0072b2', '#e69f00', '#009e73', '#cc79a7']
const SMALLER = '#9aa0a6'
const LIMIT = '#d55e00'
/** In the node's own pixels; Vue nodes read it from the element's style, classic ones from the widget. */
export const MIN_HEIGHT = 180

const FONT_SIZE = 11
const LINE = 15
const FEWEST_COLUMNS = 8
// The card's size is drawn as a line where the peak fills this share of it.
const CARD_LINE_FROM = 0.3

/** A canvas in an element: stacked owners over the blocks, the peak, and a line on where the stream is. */
export class MemoryChart {
  /** @param {import('./memory_points.mjs').MemoryPoints} points which outlive the chart */
  constructor(points) {
    this.points = points
    this.element = document.createElement('div')
    this.element.className = 'streamblocks-memory-chart'
    this.element.setAttribute('role', 'img')
    // Nothing to click: the pointer belongs to the node behind it.
    Object.assign(this.element.style, {
      position: 'relative',
      width: '100%',
      height: '100%',
      minHeight: `${MIN_HEIGHT}px`,
      overflow: 'hidden',
      pointerEvents: 'none',
      color: 'var(--input-text, #ddd)'
    })
    this.canvas = document.createElement('canvas')
    // Out of the layout flow: otherwise a canvas as large as its element would keep it from shrinking.
    Object.assign(this.canvas.style, { position: 'absolute', inset: '0', width: '100%', height: '100%' })
    this.element.append(this.canvas)
    this.frame = 0
    // The page may move the element to another parent: sizes are read when drawing.
    this.observer = new ResizeObserver(() => this.redraw())
    this.observer.observe(this.element)
  }

  /** Draw with the next frame, once. */
  redraw() {
    this.frame ||= requestAnimationFrame(() => {
      this.frame = 0
      this.draw()
    })
  }

  /** Release everything. */
  destroy() {
    this.observer.disconnect()
    cancelAnimationFrame(this.frame)
    this.element.remove()
  }

  draw() {
    const { clientWidth: width, clientHeight: height } = this.element
    if (width === 0 || height === 0) return
    const ratio = Math.max(window.devicePixelRatio || 1, 2)
    this.canvas.width = Math.round(width * ratio)
    this.canvas.height = Math.round(height * ratio)
    const context = this.canvas.getContext('2d')
    context.scale(ratio, ratio)
    context.font = `${FONT_SIZE}px sans-serif`
    context.textBaseline = 'middle'
    const ink = getComputedStyle(this.element).color
    const { latest } = this.points
    const words = latest ? this.describe(latest) : text('page.chart_idle')
    this.element.setAttribute('aria-label', words)
    write(context, words, 6, LINE / 2 + 2, width - 12, ink)
    if (!latest) return
    const names = this.points.ownerNames(COLOURS.length)
    const rows = Math.ceil((names.length + 1) / 2)
    const box = { left: 58, top: LINE + 8, right: width - 8, bottom: height - LINE * (rows + 1) - 4 }
    if (box.bottom - box.top < 20) return
    const scale = this.makeScale(box)
    this.drawAxes(context, box, scale, ink)
    this.drawColumns(context, scale, names)
    this.drawLines(context, box, scale, ink)
    this.drawLegend(context, names, box, width, ink)
  }

  /** Where the stream is and what it holds, as a line. */
  describe(latest) {
    const { blocks, largestPeak } = this.points
    const sizes = { allocated: formatBytes(latest.allocated), peak: formatBytes(largestPeak) }
    const id = blocks ? 'page.chart_words' : 'page.chart_words_endless'
    return text(id, { ...sizes, number: latest.block + 1, blocks })
  }

  makeScale(box) {
    const { card, columns, largestPeak, latest, stride } = this.points
    this.showsCard = card !== null && largestPeak >= CARD_LINE_FROM * card
    const top = 1.05 * (this.showsCard ? Math.max(card, largestPeak) : largestPeak) || 1
    const first = columns[0]?.block ?? latest.block
    const span = Math.max(latest.block + stride - first, FEWEST_COLUMNS)
    return {
      top,
      first,
      span,
      x: (block) => box.left + ((box.right - box.left) * (block - first)) / span,
      y: (bytes) => box.bottom - ((box.bottom - box.top) * Math.max(bytes, 0)) / top
    }
  }

  drawAxes(context, box, scale, ink) {
    context.textAlign = 'right'
    for (const share of [0, 0.5, 1]) {
      const bytes = (scale.top / 1.05) * share
      const y = scale.y(bytes)
      context.globalAlpha = share ? 0.25 : 0.7
      context.fillStyle = ink
      context.fillRect(box.left, y, box.right - box.left, 1)
      context.globalAlpha = 1
      context.fillText(share ? formatBytes(bytes) : '0', box.left - 4, y)
    }
    context.textAlign = 'center'
    const step = Math.max(1, Math.ceil(scale.span / 8))
    // Blocks are counted from 1 wherever people read them.
    for (let number = Math.ceil((scale.first + 1) / step) * step; number <= scale.first + scale.span; number += step) {
      context.fillText(String(number), scale.x(number - 1 + this.points.stride / 2), box.bottom + LINE / 2)
    }
    context.textAlign = 'left'
    context.fillText(text('page.chart_block'), 6, box.bottom + LINE / 2)
  }

  drawColumns(context, scale, names) {
    const { columns, now, stride } = this.points
    const column = (block, low, high, colour) => {
      const [x, y] = [scale.x(block), scale.y(high)]
      context.fillStyle = colour
      // A hair wider, so that neighbours leave no seam.
      context.fillRect(x, y, scale.x(block + stride) - x + 0.5, scale.y(low) - y)
    }
    for (const { block, allocated, owners } of columns) {
      const named = names.reduce((sum, name) => sum + (owners.get(name) ?? 0), 0)
      let low = Math.max(allocated - named, 0)
      column(block, 0, low, SMALLER)
      names.forEach((name, index) => {
        const high = low + (owners.get(name) ?? 0)
        column(block, low, high, COLOURS[index])
        low = high
      })
    }
    if (now) {
      context.globalAlpha = 0.6
      column(now.block, 0, now.allocated, SMALLER)
      context.globalAlpha = 1
    }
  }

  drawLines(context, box, scale, ink) {
    const { card, columns, now, stride } = this.points
    context.strokeStyle = ink
    context.lineWidth = 1.5
    context.beginPath()
    for (const { block, peak } of now ? [...columns, now] : columns) {
      context.lineTo(scale.x(block), scale.y(peak))
      context.lineTo(scale.x(block + stride), scale.y(peak))
    }
    context.stroke()
    context.fillStyle = LIMIT
    if (this.showsCard) context.fillRect(box.left, scale.y(card), box.right - box.left, 1.5)
    for (const { block, event } of columns) {
      if (event && event !== 'cache emptied') context.fillRect(scale.x(block + stride / 2) - 2, box.bottom - 5, 4, 5)
    }
  }

  drawLegend(context, names, box, width, ink) {
    const last = this.points.columns.at(-1)?.owners ?? new Map()
    const entries = names.map((name, index) => [`${formatBytes(last.get(name) ?? 0)} ${ownerWords(name)}`, COLOURS[index], 8]).reverse()
    entries.push([text('page.chart_peak'), ink, 2])
    const rows = Math.ceil(entries.length / 2)
    const column = (width - 12) / 2
    entries.forEach(([text, colour, thickness], index) => {
      const x = 6 + column * Math.floor(index / rows)
      const y = box.bottom + LINE * (1.5 + (index % rows))
      context.fillStyle = colour
      context.fillRect(x, y - thickness / 2, 8, thickness)
      write(context, text, x + 12, y, column - 16, ink)
    })
  }
}

/** Write `text`, cut with an ellipsis where it is wider than `width`. */
function write(context, text, x, y, width, ink) {
  let shown = text
  while (shown && context.measureText(shown === text ? shown : `${shown}…`).width > width) shown = shown.slice(0, -1)
  context.fillStyle = ink
  context.fillText(shown === text ? shown : `${shown}…`, x, y)
}
