// The camera or video on a Stream Live Input: given to the stream that asks for it, once its user pressed start.
import { app } from '/scripts/app.js'
import { api } from '/scripts/api.js'

import { findNode } from './execution_id.mjs'
import { loadMessages } from './messages.mjs'
import { NodeLiveInput } from './node_live_input.mjs'
import { StreamTokens } from './stream_tokens.mjs'

const NODE_CLASS = 'StreamBlocksLiveInput'
const MS_BETWEEN_LOOKS = 3000
/** Undo makes nodes anew at once; another workflow's tab lets go of the camera. */
const MS_UNTIL_RELEASED = 1000

const fetchApi = (route, options) => api.fetchApi(route, options)
const rootGraph = () => app.rootGraph ?? app.graph
const tokens = new StreamTokens(localStorage)
/** By node. @type {Map<object, NodeLiveInput>} */
const inputs = new Map()
/** Sources of nodes that are gone just now, by place. */
const given = new Map()
let isQueueBusy = false
let timer = 0

app.registerExtension({
  name: 'StreamBlocks.LiveInput',

  async setup() {
    api.addEventListener('streamblocks.stream', ({ detail }) => {
      tokens.keep(detail.prompt_id, detail.node, detail.token)
      look()
    })
    // Sent to all pages when anything is queued or has ended.
    api.addEventListener('status', ({ detail }) => {
      isQueueBusy = detail?.exec_info?.queue_remaining > 0
      look()
    })
    addEventListener('pagehide', () => inputs.forEach(({ source }) => source.release()))
    await loadMessages(fetchApi, () => app.extensionManager?.setting?.get('Comfy.Locale') ?? 'en')
    inputs.forEach((input) => input.update())
  },

  nodeCreated(node) {
    if (node.comfyClass !== NODE_CLASS) return
    const input = new NodeLiveInput(node, { fetchApi, look, placeOf })
    inputs.set(node, input)
    const { onRemoved } = node
    node.onRemoved = function (...args) {
      inputs.delete(node)
      keepForAMoment(input.place, input.giveUp())
      return onRemoved?.apply(this, args)
    }
  },

  /** Undo and other workflow tabs make the nodes anew. */
  async afterConfigureGraph() {
    for (const [node, input] of inputs) {
      const source = given.get(placeOf(node))
      given.delete(placeOf(node))
      if (source) input.adopt(source)
      else input.update()
    }
    await look()
  }
})

function placeOf(node) {
  return JSON.stringify([(node.graph ?? rootGraph())?.id, node.id])
}

function keepForAMoment(place, source) {
  given.get(place)?.release()
  given.set(place, source)
  setTimeout(() => {
    if (given.get(place) !== source) return
    given.delete(place)
    source.release()
  }, MS_UNTIL_RELEASED)
}

/** Find the streams that take pictures of this workflow's nodes; asks nothing where no node has any to give. */
async function look() {
  clearTimeout(timer)
  const started = () => [...inputs.values()].filter(({ isStarted }) => isStarted)
  if (started().length === 0) return
  const answer = await fetchApi('/streamblocks/streams', { cache: 'no-store' }).catch(() => null)
  if (answer?.ok) feed((await answer.json()).streams)
  // A stream that another page of this browser queued is told to nobody here.
  clearTimeout(timer)
  if (isQueueBusy && started().some(({ isSending }) => !isSending)) timer = setTimeout(look, MS_BETWEEN_LOOKS)
}

/** @param {{prompt_id: string, node: string, workflow: string | null, running: boolean, frames_from?: string}[]} streams */
function feed(streams) {
  const graph = rootGraph()
  for (const { prompt_id: promptId, node, workflow, running, frames_from: from } of streams) {
    if (!running || from === undefined || workflow !== graph?.id) continue
    const token = tokens.find(promptId, node)
    const input = inputs.get(findNode(graph, from))
    if (token !== null && input?.isStarted) input.feed({ promptId, node, token })
  }
}
