/** What each node said last, as the server sent it, for as long as the page is open. */
export class SaidLines {
  constructor() {
    this.lines = new Map()
  }

  /**
   * Keep what a node says now; a message without an id takes its line away: the node runs again.
   * @param {{node: string, workflow: string | null, id: string | null, values: object, text: string}} line
   */
  add(line) {
    const key = JSON.stringify([line.workflow, line.node])
    if (line.id === null) this.lines.delete(key)
    else this.lines.set(key, line)
  }

  all() {
    return [...this.lines.values()]
  }
}

/** Whether a line is of the workflow; node ids repeat from one to the next. */
export function isIn(line, workflow) {
  return line.workflow === null || line.workflow === workflow
}

/**
 * What a line says in the page's language; in English where that is not known.
 * @param {(id: string, values: object) => string} text see messages.mjs
 */
export function wordsOf(line, text) {
  const id = `says.${line.id}`
  const words = text(id, line.values)
  return words === id ? line.text : words
}

/** The element on the node: more than one line where it is long. All of it is in its title. */
export function makeLine(words) {
  const line = document.createElement('div')
  line.className = 'streamblocks-says'
  line.setAttribute('role', 'status')
  line.title = line.textContent = words
  Object.assign(line.style, {
    boxSizing: 'border-box',
    padding: '0 6px',
    fontSize: '12px',
    lineHeight: '16px',
    overflow: 'hidden',
    overflowWrap: 'anywhere',
    color: 'var(--input-text, #ddd)',
    userSelect: 'text'
  })
  return line
}
