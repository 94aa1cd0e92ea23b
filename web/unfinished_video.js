// The link on the Streaming Block Sampler's node to the video of a stream that was cancelled or failed.
import { app } from '/scripts/app.js'
import { api } from '/scripts/api.js'

import { findNode } from './execution_id.mjs'
import { placeBelowInputs } from './node_lines.mjs'
import { UnfinishedLinks, isThere, makeLine } from './unfinished_links.mjs'

const WIDGET = 'unfinished_video'
/** In the node's own pixels; the margin is part of the height. */
const [HEIGHT, MARGIN] = [32, 4]

const links = new UnfinishedLinks(sessionStorage)
const urlOf = (path) => api.apiURL(path)

app.registerExtension({
  name: 'StreamBlocks.UnfinishedVideo',

  setup() {
    api.addEventListener('streamblocks.unfinished', ({ detail }) => {
      links.add(detail)
      show(detail)
    })
    // It may have been the rest of an unfinished one.
    api.addEventListener('execution_success', dropMissing)
  },

  /** Undo and other workflow tabs make the nodes anew. */
  afterConfigureGraph() {
    for (const video of links.all()) show(video)
    dropMissing()
  }
})

/** Put away the lines whose files have gone; nothing is asked about those that are not shown. */
async function dropMissing() {
  for (const video of links.all().filter(nodeOf)) {
    if ((await isThere(video, urlOf)) || !links.has(video)) continue
    links.drop(video)
    const node = nodeOf(video)
    if (node) remove(node)
  }
}

/** The node that the video is of, if its workflow is open: node ids repeat from one workflow to the next. */
function nodeOf(video) {
  const graph = app.rootGraph ?? app.graph
  return video.workflow && graph?.id !== video.workflow ? undefined : findNode(graph, video.node)
}

/** Put the line on the node that it is of, in place of an earlier one. */
function show(video) {
  const node = nodeOf(video)
  if (!node) return
  remove(node)
  const line = makeLine(video, urlOf, () => {
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
