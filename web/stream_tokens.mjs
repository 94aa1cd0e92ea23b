import { StoredList } from './stored_list.mjs'

const KEY = 'streamblocks.tokens'
const HASH = '#streamblocks='
// Streams that ended while no page looked leave theirs behind.
const MOST_TOKENS = 16

/** What allows this browser to steer a stream; shared by its tabs. */
export class StreamTokens {
  /** @param {Storage} storage */
  constructor(storage) {
    /** Of [name of the stream, token]. */
    this.kept = new StoredList(storage, KEY, MOST_TOKENS)
  }

  /** @returns {string | null} */
  find(promptId, node) {
    return this.kept.read().find(([name]) => name === nameOf(promptId, node))?.[1] ?? null
  }

  keep(promptId, node, token) {
    const others = this.kept.read().filter(([name]) => name !== nameOf(promptId, node))
    this.kept.write([...others, [nameOf(promptId, node), token]])
  }

  drop(promptId, node) {
    const all = this.kept.read()
    const others = all.filter(([name]) => name !== nameOf(promptId, node))
    if (others.length < all.length) this.kept.write(others)
  }
}

function nameOf(promptId, node) {
  return `${promptId}/${node}`
}

/** A link that lets another browser steer. */
export function shareLink(page, promptId, node, token) {
  return `${page.origin}${page.pathname}${page.search}${HASH}${[promptId, node, token].map(encodeURIComponent).join('/')}`
}

/**
 * Take the token out of the page's address, where a link brought one.
 * @param {Location} location
 * @param {History} history
 * @param {StreamTokens} tokens
 * @returns {string | null} the stream's prompt
 */
export function takeSharedToken(location, history, tokens) {
  if (!location.hash.startsWith(HASH)) return null
  const parts = location.hash.slice(HASH.length).split('/').map(decode)
  // Neither seen, nor copied on with the address, nor taken for the page's own place in a subgraph.
  history.replaceState(history.state, '', location.pathname + location.search)
  if (parts.length !== 3 || !parts.every(Boolean)) return null
  tokens.keep(...parts)
  return parts[0]
}

/** "" where somebody cut the link within a character. */
function decode(part) {
  try {
    return decodeURIComponent(part)
  } catch {
    return ''
  }
}
