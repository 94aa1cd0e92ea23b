import { MIN_HEIGHT as CHART_HEIGHT, MemoryChart } from './memory_chart_view.mjs'
import { text } from './messages.mjs'
import { comingLine, endWords, problemLine, progressLine, promptLine } from './stream_words.mjs'

/** In the node's own pixels. */
const [LINE, BUTTONS, GAP] = [20, 26, 4]
/** Higher pictures are shown smaller, with room beside them. */
const LOWEST_RATIO = 1
const FOLD = { border: 'none', background: 'none', flex: 'none', padding: '0 2px' }
/** How elements are laid out while they are shown. */
const SHOWN_AS = new WeakMap()

/**
 * The player on a node: pictures, lines, buttons, and the chart of memory, folded up.
 * What it shows is of a `StreamState`; what is clicked goes to `actions`.
 */
export class StreamView {
  /** @param {Record<"pause" | "resume" | "stop" | "apply" | "track" | "share" | "foldPictures" | "foldChart", () => void>} actions */
  constructor(actions) {
    this.element = make('div', 'streamblocks-player', {
      ...{ display: 'flex', flexDirection: 'column', gap: `${GAP}px`, boxSizing: 'border-box', width: '100%' },
      ...{ overflow: 'hidden', fontSize: '12px', color: 'var(--input-text, #ddd)' }
    })
    this.canvas = make('canvas', 'streamblocks-pictures', {
      ...{ position: 'absolute', inset: '0', width: '100%', height: '100%', objectFit: 'contain' }
    })
    this.screen = make('div', 'streamblocks-screen', {
      ...{ position: 'relative', width: '100%', flex: 'none', borderRadius: '6px', overflow: 'hidden', background: '#000' }
    })
    this.screen.append(this.canvas)
    this.progress = makeLine('streamblocks-progress')
    this.progress.setAttribute('role', 'status')
    this.foldPictures = makeButton('fold-pictures', actions.foldPictures, FOLD)
    this.foldChart = makeButton('fold-chart', actions.foldChart, FOLD)
    const head = make('div', '', { display: 'flex', gap: '8px', flex: 'none', height: `${LINE}px` })
    head.append(this.progress, this.foldPictures, this.foldChart)
    this.prompt = makeLine('streamblocks-prompt')
    this.coming = makeLine('streamblocks-coming')
    this.row = make('div', 'streamblocks-buttons', { display: 'flex', gap: '6px', flex: 'none', height: `${BUTTONS}px` })
    this.buttons = Object.fromEntries(
      ['pause', 'resume', 'stop', 'apply', 'track', 'share'].map((name) => [name, makeButton(name, actions[name])])
    )
    Object.assign(this.buttons.apply.style, { borderColor: 'currentcolor', fontWeight: '600' })
    this.buttons.share.style.marginLeft = 'auto'
    this.row.append(...Object.values(this.buttons))
    this.chartBox = make('div', '', { flex: 'none', height: `${CHART_HEIGHT}px` })
    this.chart = null
    this.element.append(this.screen, head, this.prompt, this.coming, this.row, this.chartBox)
    this.ratio = null
    this.render(null, {})
  }

  /**
   * @param {import('./stream_state.mjs').StreamState | null} state
   * @param {Record<string, boolean>} offers which buttons there are
   */
  render(state, offers) {
    const live = state?.isLive ?? false
    this.ratio = state?.ratio ?? null
    show(this.screen, this.ratio !== null && state.shows.pictures)
    renderFold(this.foldPictures, 'page.video', this.ratio !== null, state?.shows.pictures)
    if (this.ratio) this.screen.style.aspectRatio = String(Math.max(this.ratio, LOWEST_RATIO))
    writeLine(this.progress, progressLine(state), state ? endWords(state) : '')
    writeLine(this.prompt, state ? promptLine(state) : '')
    const problem = state ? problemLine(state) : ''
    writeLine(this.coming, problem || (state ? comingLine(state, Boolean(offers.stop)) : ''))
    this.coming.style.color = problem ? 'var(--error-text, #ff6e6e)' : 'var(--descrip-text, #999)'
    // Their room stays while a stream runs, so that nothing jumps.
    show(this.prompt, live || this.prompt.textContent !== '')
    show(this.coming, live || this.coming.textContent !== '')
    const focused = Object.values(this.buttons).find((button) => button === document.activeElement)
    for (const [name, button] of Object.entries(this.buttons)) {
      show(button, Boolean(offers[name]))
      write(button, text(`page.${name}`))
      button.title = text(`page.${name}_title`)
    }
    show(this.row, Object.values(offers).some(Boolean))
    if (focused && !isShown(focused)) this.focusAnother()
    this.renderChart(state)
  }

  /** A button that goes leaves the keyboard with the row: resume takes the place of pause. */
  focusAnother() {
    Object.values(this.buttons).find(isShown)?.focus({ preventScroll: true })
  }

  renderChart(state) {
    const hasPoints = Boolean(state?.points.latest)
    const isOpen = hasPoints && state.shows.chart
    renderFold(this.foldChart, 'page.memory', hasPoints, isOpen)
    show(this.chartBox, isOpen)
    if (this.chart?.points !== state?.points || !isOpen) {
      this.chart?.destroy()
      this.chart = null
    }
    if (!isOpen) return
    if (!this.chart) {
      this.chart = new MemoryChart(state.points)
      this.chartBox.append(this.chart.element)
    }
    this.chart.redraw()
  }

  /**
   * How high all of it is.
   * @param {number} width
   */
  height(width) {
    const parts = [LINE]
    if (isShown(this.screen)) parts.push(width / Math.max(this.ratio, LOWEST_RATIO))
    for (const line of [this.prompt, this.coming]) if (isShown(line)) parts.push(LINE)
    if (isShown(this.row)) parts.push(BUTTONS)
    if (isShown(this.chartBox)) parts.push(CHART_HEIGHT)
    return Math.ceil(parts.reduce((sum, part) => sum + part + GAP, -GAP))
  }

  /** How high it is on a node that was just opened. */
  get idleHeight() {
    return LINE
  }

  destroy() {
    this.chart?.destroy()
    this.element.remove()
  }
}

function make(tag, name, style) {
  const element = document.createElement(tag)
  element.className = name
  Object.assign(element.style, style)
  SHOWN_AS.set(element, style.display ?? 'block')
  return element
}

function makeLine(name) {
  return make('div', name, {
    ...{ flex: '1 1 auto', minWidth: '0', height: `${LINE}px`, lineHeight: `${LINE}px`, padding: '0 4px' },
    ...{ whiteSpace: 'nowrap', overflow: 'hidden', textOverflow: 'ellipsis' }
  })
}

function makeButton(name, onClick, style = {}) {
  const button = make('button', `streamblocks-${name}`, {
    ...{ cursor: 'pointer', padding: '0 8px', fontSize: '12px', whiteSpace: 'nowrap' },
    ...{ color: 'inherit', background: 'var(--comfy-input-bg, #222)', borderRadius: '6px' },
    ...{ border: '1px solid var(--border-color, #4e4e4e)', ...style }
  })
  button.type = 'button'
  button.addEventListener('click', (event) => {
    event.stopPropagation()
    onClick()
  })
  return button
}

/** All of a line that is cut short is in its title. */
function writeLine(line, words, more = '') {
  write(line, words)
  const title = more || words
  if (line.title !== title) line.title = title
}

function renderFold(button, id, isThere, isOpen) {
  show(button, isThere)
  write(button, `${text(id)} ${isOpen ? '▾' : '▸'}`)
  button.setAttribute('aria-expanded', String(Boolean(isOpen)))
}

function write(element, words) {
  if (element.textContent !== words) element.textContent = words
}

function show(element, isShown) {
  element.style.display = isShown ? SHOWN_AS.get(element) : 'none'
}

function isShown(element) {
  return element.style.display !== 'none'
}
