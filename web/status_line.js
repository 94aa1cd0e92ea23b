// What a node of the pack says while it runs and how it ended, as a line on the node.
import { app } from '/scripts/app.js'
import { api } from '/scripts/api.js'

import { findNode } from './execution_id.mjs'
import { loadMessages, text } from './messages.mjs'
import { placeBelowInputs } from './node_lines.mjs'
import { SaidLines, isIn, makeLine, wordsOf } from './said_lines.mjs'

const WIDGET = 'streamblocks_says'
/** A node with this widget shows itself what it says. */
const PLAYER = 'stream_player'
/** In the node's own pixels: height of one line and of each further one, width of a character and around a line. */
const [HEIGHT, ROW, CHARACTER, AROUND] = [24, 16, 6.5, 24]
const MOST_ROWS = 3

const lines = new SaidLines()

app.registerExtension({
  name: 'StreamBlocks.StatusLine',

  async setup() {
    api.addEventListener('streamblocks.says', ({ detail }) => {
      lines.add(detail)
      const graph = app.rootGraph ?? app.graph
      if (isIn(detail, graph?.id)) show(findNode(graph, detail.node), detail.id === null ? null : detail)
    })
    await loadMessages(
      (route) => api.fetchApi(route),
      () => app.extensionManager?.setting?.get('Comfy.Locale') ?? 'en'
    )
    showAll()
  },

  /** Undo and other workflow tabs make the nodes anew. */
  afterConfigureGraph: showAll
})

function showAll() {
  const graph = app.rootGraph ?? app.graph
  for (const line of lines.all()) if (isIn(line, graph?.id)) show(findNode(graph, line.node), line)
}

/** Put the line on the node in place of an earlier one, or take that away. */
function show(node, line) {
  if (!node) return
  const shown = node.widgets?.find(({ name }) => name === WIDGET)
  const words = line && !node.widgets?.some(({ name }) => name === PLAYER) ? wordsOf(line, text) : null
  const rows = words === null ? 0 : rowsOf(words, node.size[0] - AROUND)
  if (shown && words !== null && shown.rows === rows) {
    // The same widget: another one for each step of a load would have the node laid out anew.
    shown.element.title = shown.element.textContent = words
    return
  }
  if (shown) node.removeWidget(shown)
  if (words === null) return
  const height = HEIGHT + ROW * (rows - 1)
  const widget = node.addDOMWidget(WIDGET, 'STREAMBLOCKS_SAYS', makeLine(words), {
    serialize: false,
    hideOnZoom: false,
    margin: 4,
    getMinHeight: () => height,
    getMaxHeight: () => height,
    getValue: () => '',
    setValue: () => {}
  })
  widget.rows = rows
  placeBelowInputs(node, widget)
}

/** In how many lines the words are shown in a width; characters of Chinese, Japanese and Korean count twice. */
function rowsOf(words, width) {
  const characters = words.length + (words.match(/[\u2e80-\uffff]/g)?.length ?? 0)
  return Math.min(MOST_ROWS, Math.ceil((characters * CHARACTER) / width))
}
