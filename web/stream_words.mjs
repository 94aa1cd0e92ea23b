import { knows, text } from './messages.mjs'

/**
 * Where the stream is, as a line.
 * @param {import('./stream_state.mjs').StreamState | null} state
 */
export function progressLine(state) {
  if (state?.isGone) return text('page.gone')
  const { header } = state ?? {}
  if (!header) return text(state?.promptId ? 'page.joining' : 'page.idle')
  if (state.isCancelled) return text('page.cancelling')
  const parts = [stageWords(state)]
  if (header.pictures_made) parts.push(text('page.seconds', { seconds: header.seconds.toFixed(1) }))
  const isMoving = header.state === 'running' && !state.isSilent
  if (header.rate && header.pictures_made && isMoving) parts.push(text('page.rate', { rate: threeDigits(header.rate) }))
  return parts.join(' · ')
}

/** Why something did not work, as a line of its own; "" where all is well. */
export function problemLine(state) {
  if (state.problem) return state.problem
  return state.isSilent && !state.isGone ? text('page.silent') : ''
}

function stageWords({ header, lastBlock }) {
  const { state, blocks, blocks_made: made, says } = header
  // How far loading is.
  if (state === 'loading' && says && knows(`says.${says.id}`)) return text(`says.${says.id}`, says.values)
  if (says?.id === 'stopped_empty') return text('says.stopped_empty')
  // The block being made; people count from 1.
  const number = Math.min(made + 1, blocks ?? Infinity, lastBlock ?? Infinity)
  const place = text(blocks === null ? 'page.block_endless' : 'page.block', { number, blocks })
  return text(`page.${state}`, { place, made })
}

/** Where the pictures of a stream that was cancelled or failed lie; "" for other streams. The node has a link to them. */
export function endWords({ header }) {
  const { state, says } = header ?? {}
  const tells = ['cancelled', 'failed'].includes(state) && says?.id.startsWith('stopped') && knows(`says.${says.id}`)
  return tells ? text(`says.${says.id}`, says.values) : ''
}

/** What the stream shows, as a line; "" where it has no prompt to show, or shows nothing more. */
export function promptLine({ header, isLive }) {
  return isLive && header.prompt ? text('page.prompt_now', { prompt: header.prompt }) : ''
}

/**
 * What comes: an edit that waits, else the track's next prompt, else how to change something; "" where nothing does.
 * @param {import('./stream_state.mjs').StreamState} state
 * @param {boolean} canSteer
 */
export function comingLine(state, canSteer) {
  const { header } = state
  // Not where it belongs: more than the link can say.
  if (!state.isLive) return ['stopped', 'stopped_empty'].includes(header?.says?.id) ? '' : endWords(state)
  if (header.pending) return text('page.pending', { values: valuesLine(header.pending) })
  if (header.next) return text('page.prompt_next', { number: header.next.block + 1, prompt: header.next.prompt })
  return canSteer && header.allowed?.prompt === '' ? text('page.hint') : ''
}

/** @param {{prompt?: string, strength?: number, attention_bias?: number}} values */
function valuesLine({ prompt, ...numbers }) {
  const words = Object.entries(numbers).map(([name, value]) => `${text(`page.${name}`)} ${threeDigits(value)}`)
  return [...(prompt ? [prompt] : []), ...words].join(', ')
}

function threeDigits(number) {
  return String(Number(number.toPrecision(3)))
}
