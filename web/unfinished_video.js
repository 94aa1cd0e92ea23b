// The link on the Streaming Block Sampler's node to the video of a stream that was cancelled or failed.
import { app } from '/scripts/app.js'
import { api } from '/scripts/api.js'

import { findNode } from './execution_id.mjs'
import { placeBelowInputs } from './node_lines.mjs'
import { UnfinishedLinks, makeLine } from './unfinished_links.mjs'

const WIDGET = 'unfinished_video'
/** In the node's own pixels; the margin is part of the height. */
const [HEIGHT, MARGIN] = [32, 4]

const links = new UnfinishedLinks(sessionStorage)

app.registerExtension({
  name: 'StreamBlocks.UnfinishedVideo',

  setup() {
    api.addEventListener('streamblocks.unfinished', ({ detail }) => {
      links.add(detail)
      show(detail)
    })
  },

  /** Undo and other workflow tabs make the nodes anew. */
  afterConfigureGraph() {
    for (const video of links.all()) show(video)
  }
})

/** Put the line on the node that it is of, in place of an earlier one. */
function show(video) {
  const graph = app.rootGraph ?? app.graph
  // Node ids repeat from one workflow to the next.
  if (video.workflow && graph?.id !== video.workflow) return
  const node = findNode(graph, video.node)
  if (!node) return
  remove(node)
  const line = makeLine(video, (path) => api.apiURL(path), () => {
    links.drop(video)
    remove(node)
  })
  const widget = node.addDOMWidget(WIDGET, 'STREAMBLOCKS_UNFINISHED_VIDEO', line, {
    serialize: false,
    hideOnZoom: false,
    margin: MARGIN,
    getMinHeight: () => HEIGHT,
    getMaxHeight: () => HEIGHT,
    getValue: () => '',
    setValue: () => {}
  })
  placeBelowInputs(node, widget)
}

function remove(node) {
  const widget = node.widgets?.find(({ name }) => name === WIDGET)
  if (widget) node.removeWidget(widget)
}
