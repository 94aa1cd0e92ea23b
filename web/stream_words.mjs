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
  const parts = [stageWords(header)]
  if (header.pictures_made) parts.push(text('page.seconds', { seconds: header.seconds.toFixed(1) }))
  if (header.rate && header.pictures_made && state.isLive) parts.push(text('page.rate', { rate: threeDigits(header.rate) }))
  if (state.isSilent) parts.push(text('page.silent'))
  return parts.join(' · ')
}

function stageWords(header) {
  const { state, blocks, blocks_made: made, says } = header
  // How far loading is, or where the pictures of a stream that was cancelled or failed lie.
  const tells = says && knows(`says.${says.id}`) && (state === 'loading' || says.id.startsWith('stopped'))
  if (tells && ['loading', 'cancelled', 'failed'].includes(state)) return text(`says.${says.id}`, says.values)
  // The block being made; people count from 1.
  const number = blocks === null ? made + 1 : Math.min(made + 1, blocks)
  const place = text(blocks === null ? 'page.block_endless' : 'page.block', { number, blocks })
  return text(`page.${state}`, { place, made })
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
  if (!state.isLive) return ''
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
