import { STEERED } from './stream_state.mjs'

export const TRACK_CLASS = 'StreamBlocksPromptTrack'
const GAP = 60

/**
 * Put the track of what people changed into the graph, so that the next run makes the same pictures.
 * @param node the sampler's
 * @param {{text: string, interpolation: string, blocks: number}} track
 * @param {Record<string, unknown>} queued the node's inputs as they were queued; links are arrays
 * @param {() => object} makeNode makes a Stream Prompt Track
 */
export function useTrack(node, track, queued, makeNode) {
  const written = { text: escapeDynamic(track.text), interpolation: track.interpolation }
  setWidgets(linkedTrackNode(node) ?? addTrackNode(node, makeNode), written)
  const before = [...STEERED, 'seed'].filter((name) => name in queued && !Array.isArray(queued[name]))
  setWidgets(node, {
    ...Object.fromEntries(before.map((name) => [name, queued[name]])),
    ...{ blocks: track.blocks, seconds: 0, endless: false, control_after_generate: 'fixed' }
  })
}

/** Those of the widgets that are there. */
function setWidgets(node, values) {
  for (const widget of node.widgets ?? []) {
    if (!(widget.name in values)) continue
    widget.value = values[widget.name]
    widget.callback?.(widget.value)
  }
}

function linkedTrackNode(node) {
  const input = trackInput(node)
  const link = input?.link == null ? null : node.graph.getLink(input.link)
  const origin = link && node.graph.getNodeById(link.origin_id)
  if (origin?.comfyClass !== TRACK_CLASS) return null
  // Its text comes from elsewhere.
  if (origin.inputs?.some(({ name, link }) => name === 'text' && link != null)) return null
  return origin
}

function addTrackNode(node, makeNode) {
  const made = makeNode()
  node.graph.add(made)
  made.pos = freePlace(node, made)
  made.connect(0, node, node.inputs.indexOf(trackInput(node)))
  return made
}

function trackInput(node) {
  return node.inputs?.find(({ name }) => name === 'track')
}

/** To the left of the sampler, below what is there. */
function freePlace(node, made) {
  const [x, width, height] = [node.pos[0] - made.size[0] - GAP, ...made.size]
  const others = node.graph.nodes.filter((other) => other !== made)
  const isBeside = ({ pos, size }) => pos[0] < x + width && x < pos[0] + size[0]
  let y = node.pos[1]
  for (const { pos, size } of others.filter(isBeside).sort((a, b) => a.pos[1] - b.pos[1])) {
    if (pos[1] < y + height + GAP && y < pos[1] + size[1] + GAP) y = pos[1] + size[1] + GAP
  }
  return [x, y]
}

/**
 * What the page's dynamic prompts would change in a text is written in another way: "{a|b}" chooses, "//" is a comment.
 * @param {string} track
 */
export function escapeDynamic(track) {
  return track.split('\n').map(escapeLine).join('\n')
}

function escapeLine(line) {
  const exact = /^([^":]*\bexact\b[^":]*:)(.*)$/.exec(line)
  if (!exact) return line.replace(/[{}]/g, '\\$&')
  // A string in JSON, which has a way to write each character by its number.
  const byNumber = (sign) => `\\u${sign.charCodeAt(0).toString(16).padStart(4, '0')}`
  return exact[1] + exact[2].replace(/[{}|/]/g, byNumber)
}
