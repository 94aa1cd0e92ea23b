import { text } from './messages.mjs'

/** In the node's own pixels. */
const [LINES, BUTTONS, GAP, PICTURE] = [34, 26, 4, 130]
export const MIN_HEIGHT = LINES + BUTTONS + PICTURE + 2 * GAP

/** What a live input shows on its node: the picture, a line of words, and buttons. */
export class LiveView {
  /** @param {{choose: (file: File) => void, start: () => void, stop: () => void}} actions */
  constructor(actions) {
    this.element = make('div', 'streamblocks-live', {
      ...{ display: 'flex', flexDirection: 'column', gap: `${GAP}px`, boxSizing: 'border-box', width: '100%' },
      ...{ height: '100%', minHeight: `${MIN_HEIGHT}px`, overflow: 'hidden', fontSize: '12px' },
      ...{ color: 'var(--input-text, #ddd)', pointerEvents: 'none' }
    })
    this.screen = make('div', 'streamblocks-live-screen', {
      ...{ flex: '1 1 0', minHeight: '0', borderRadius: '6px', overflow: 'hidden', background: '#000' }
    })
    this.line = make('div', 'streamblocks-live-line', {
      ...{ flex: 'none', height: `${LINES}px`, lineHeight: `${LINES / 2}px`, padding: '0 4px', overflow: 'hidden' }
    })
    this.picker = make('input', 'streamblocks-live-file', { display: 'none' })
    Object.assign(this.picker, { type: 'file', accept: 'video/*' })
    this.picker.addEventListener('change', () => {
      const [file] = this.picker.files
      // The same one may be chosen again.
      if (file) actions.choose(file)
      this.picker.value = ''
    })
    this.row = make('div', '', { display: 'flex', gap: '6px', flex: 'none', height: `${BUTTONS}px` })
    this.buttons = {
      choose: makeButton('choose', () => this.picker.click()),
      start: makeButton('start', actions.start),
      stop: makeButton('stop', actions.stop)
    }
    this.row.append(...Object.values(this.buttons), this.picker)
    this.element.append(this.screen, this.line, this.row)
  }

  /** Show this video from now on. @param {HTMLVideoElement} video */
  take(video) {
    Object.assign(video.style, { width: '100%', height: '100%', objectFit: 'contain', display: 'block' })
    this.screen.replaceChildren(video)
  }

  /**
   * @param {{words: string, isProblem: boolean, offers: Record<"choose" | "start" | "stop", boolean>}} state
   */
  render({ words, isProblem, offers }) {
    if (this.line.textContent !== words) this.line.textContent = this.line.title = words
    this.line.style.color = isProblem ? 'var(--error-text, #ff6e6e)' : 'var(--descrip-text, #999)'
    for (const [name, button] of Object.entries(this.buttons)) {
      button.style.display = offers[name] ? '' : 'none'
      button.textContent = text(`page.live_${name}`)
      button.title = text(`page.live_${name}_title`)
    }
  }
}

function make(tag, name, style) {
  const element = document.createElement(tag)
  element.className = name
  Object.assign(element.style, style)
  return element
}

function makeButton(name, onClick) {
  const button = make('button', `streamblocks-live-${name}`, {
    ...{ pointerEvents: 'auto', cursor: 'pointer', padding: '0 8px', fontSize: '12px', whiteSpace: 'nowrap' },
    ...{ color: 'inherit', background: 'var(--comfy-input-bg, #222)', borderRadius: '6px' },
    ...{ border: '1px solid var(--border-color, #4e4e4e)' }
  })
  button.type = 'button'
  button.addEventListener('click', (event) => {
    event.stopPropagation()
    onClick()
  })
  return button
}
