// The player on the Streaming Block Sampler's node: watch the stream while it is made, and steer it.
import { app } from '/scripts/app.js'
import { api } from '/scripts/api.js'

import { watchCancel } from './cancel_watch.mjs'
import { findNode } from './execution_id.mjs'
import { loadMessages, text } from './messages.mjs'
import { NodePlayer } from './node_player.mjs'
import { queuedWorkflow } from './queued_inputs.mjs'
import { StreamStore } from './stream_state.mjs'
import { StreamTokens, takeSharedToken } from './stream_tokens.mjs'
import { Streams } from './streams.mjs'

const NODE_CLASS = 'StreamBlocksSampler'
/** The page is not done with a workflow when it tells that its nodes are there. */
const MS_TO_OPEN_OWN = 500

const fetchApi = (route, options) => api.fetchApi(route, options)
const rootGraph = () => app.rootGraph ?? app.graph
const tokens = new StreamTokens(localStorage)
const store = new StreamStore()
/** By node; the entry of a removed node is collected with it. */
const players = new Map()
const streams = new Streams(fetchApi, store, tokens, () => (players.size ? rootGraph()?.id : null))

// Before the page takes it for a place of its own.
let sharedPrompt = takeSharedToken(location, history, tokens)

app.registerExtension({
  name: 'StreamBlocks.Player',

  async setup() {
    api.addEventListener('streamblocks.stream', ({ detail }) => {
      tokens.keep(detail.prompt_id, detail.node, detail.token)
      streams.join(detail)
      attachAll()
    })
    // Sent to all pages when anything is queued or has ended.
    api.addEventListener('status', ({ detail }) => streams.lookWhile(detail?.exec_info?.queue_remaining > 0))
    api.addEventListener('execution_start', () => streams.look())
    api.addEventListener('reconnected', () => streams.returnTo())
    streams.onJoin = attachAll
    document.addEventListener('visibilitychange', () => players.forEach((player) => player.update()))
    document.addEventListener('keydown', applyOnEnter, { capture: true })
    watchCancel((promptId) => {
      for (const state of store.all()) if (!promptId || state.promptId === promptId) streams.markCancelled(state)
    })
    await loadMessages(fetchApi, () => app.extensionManager?.setting?.get('Comfy.Locale') ?? 'en')
    players.forEach((player) => player.update())
    await streams.look()
  },

  nodeCreated(node) {
    if (node.comfyClass !== NODE_CLASS) return
    const player = new NodePlayer(node, { app, fetchApi, tokens, update: (state) => streams.changed(state) })
    players.set(node, player)
    const { onRemoved, onExecuted } = node
    node.onRemoved = function (...args) {
      players.delete(node)
      player.destroy()
      return onRemoved?.apply(this, args)
    }
    node.onExecuted = function (output, ...more) {
      const [result] = output?.streamblocks ?? []
      if (result) player.takeResult(result)
      return onExecuted?.call(this, output, ...more)
    }
  },

  /** Undo and other workflow tabs make the nodes anew. */
  async afterConfigureGraph() {
    attachAll()
    await streams.look()
    if (sharedPrompt !== null) setTimeout(openShared, MS_TO_OPEN_OWN)
  }
})

/** A link shows its stream: in a tab of its own, beside the workflow that the page opens by itself. */
async function openShared() {
  const promptId = sharedPrompt
  sharedPrompt = null
  if (promptId === null) return
  const workflow = await queuedWorkflow(fetchApi, promptId)
  if (!workflow) {
    app.extensionManager?.toast?.add({ severity: 'warn', summary: text('page.shared_gone'), life: 10000 })
    return
  }
  if (workflow.id !== rootGraph()?.id) await app.loadGraphData(workflow)
}

/** Have each stream of this workflow shown on its node. */
function attachAll() {
  const graph = rootGraph()
  for (const state of store.all()) {
    if (state.workflow !== null && state.workflow !== graph?.id) continue
    players.get(findNode(graph, state.node))?.attach(state)
  }
}

/** Ctrl or Cmd and Enter in the prompt of a running stream applies it, in place of queueing the workflow again. */
function applyOnEnter(event) {
  if (event.key !== 'Enter' || !(event.ctrlKey || event.metaKey) || event.shiftKey || event.altKey) return
  for (const player of players.values()) {
    if (!player.canSteer || !player.ownsText(event.target)) continue
    event.preventDefault()
    event.stopImmediatePropagation()
    // A value that is taken over when the field is left must be there.
    player.apply()
  }
}
