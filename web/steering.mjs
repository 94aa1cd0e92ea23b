import { STEERED } from './stream_state.mjs'
import { knows, text } from './messages.mjs'

/** The path of a stream's routes. */
export function pathOf({ promptId, node }) {
  return `/streamblocks/streams/${encodeURIComponent(promptId)}/${encodeURIComponent(node)}`
}

/**
 * Ask something of a running stream.
 * @param {(route: string, options: object) => Promise<Response>} fetchApi
 * @param {{promptId: string, node: string}} state
 * @param {{token: string, action: "edit" | "pause" | "resume" | "stop"}} request and the edited values
 * @returns {Promise<string>} "" when it is done, else a sentence that says why not
 */
export async function ask(fetchApi, state, request) {
  let answer
  try {
    const headers = { 'Content-Type': 'application/json' }
    answer = await fetchApi(`${pathOf(state)}/control`, { method: 'POST', headers, body: JSON.stringify(request) })
  } catch {
    return text('page.no_answer')
  }
  if (answer.ok) return ''
  return refusalOf(answer.status, await answer.json().catch(() => ({})))
}

/**
 * Why the server refused something, in the page's language where it has a text for it.
 * @param {number} status
 * @param {{error?: string, id?: string}} answer
 */
export function refusalOf(status, { error, id }) {
  return id && knows(`page.${id}`) ? text(`page.${id}`) : (error ?? text('page.refused', { status }))
}

/** The node's widgets that can be steered: not those whose value comes from another node. */
export function steeredWidgets(node) {
  const isLinked = ({ name }) => node.inputs?.some((input) => input.widget?.name === name && input.link != null)
  return (node.widgets ?? []).filter((widget) => STEERED.includes(widget.name) && !isLinked(widget))
}

/** The values of the node's widgets now. */
export function valuesOf(node) {
  return Object.fromEntries(steeredWidgets(node).map(({ name, value }) => [name, value]))
}

/**
 * What was typed into the node and is not yet in the stream.
 * @param {import('./stream_state.mjs').StreamState} state
 * @returns {Record<string, string | number>}
 */
export function editsOf(state, node) {
  if (!state.isLive) return {}
  const allowed = state.header.allowed ?? {}
  const isNew = ([name, value]) => allowed[name] === '' && name in state.applied && value !== state.applied[name]
  // A bias of 0 and an empty prompt mean something to the node only.
  const says = ([name, value]) => (name === 'strength' ? Number.isFinite(value) : Boolean(value))
  return Object.fromEntries(Object.entries(valuesOf(node)).filter(isNew).filter(says))
}

/**
 * The edits as the node would send them when it is queued: with one choice of "{a|b}", without comments.
 * @param {Record<string, string | number>} edits
 */
export async function asSent(edits, node) {
  if (!('prompt' in edits)) return edits
  const widget = steeredWidgets(node).find(({ name }) => name === 'prompt')
  return { ...edits, prompt: (await widget.serializeValue?.()) ?? edits.prompt }
}
