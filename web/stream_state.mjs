import { MemoryPoints } from './memory_points.mjs'
import { PicturePlayer, makeClip } from './picture_player.mjs'
import { isEnded } from './stream_news.mjs'

/** What can be changed while a stream runs, by the names of the node's widgets and of the server's schema alike. */
export const STEERED = ['prompt', 'strength', 'attention_bias']

/**
 * What the page knows of the newest stream of one node. It outlives the node's own object, which undo and other
 * workflow tabs make anew.
 */
export class StreamState {
  /**
   * @param {string | null} workflow
   * @param {string} node an execution id
   */
  constructor(workflow, node) {
    Object.assign(this, { workflow, node })
    this.points = new MemoryPoints()
    this.player = new PicturePlayer()
    /** Which parts are unfolded; remembered for as long as the page is open. */
    this.shows = { pictures: true, chart: false }
    /** What shows this: at most one node of the page. */
    this.view = null
    /** @type {import('./stream_watch.mjs').StreamWatch | null} */
    this.watch = null
    this.begin('')
    /** What the node itself said when it had run. */
    this.result = null
  }

  /** Another stream of this node. */
  begin(promptId) {
    this.watch?.stop()
    this.watch = null
    this.promptId = promptId
    this.header = this.result = null
    this.isGone = this.isSilent = this.isCancelled = this.isOver = false
    /** Behind which block (from 1) it stops, once someone has asked for that. */
    this.lastBlock = null
    /** A sentence for people, such as why the server refused something. */
    this.problem = ''
    /** The node's values that the stream has, as far as this page knows: others are offered as edits. */
    this.applied = {}
    this.points.clear()
    this.player.clear()
  }

  /** Whether it can still be steered. */
  get isLive() {
    return this.header !== null && !isEnded(this.header) && !this.isGone
  }

  /** Its pictures' width by height; null before there are any. */
  get ratio() {
    const { clip } = this.player
    return clip && clip.width / clip.height
  }

  /** Once it has ended, its track where people changed something: text, interpolation and how many blocks it is for. */
  get track() {
    if (this.isLive) return null
    const known = this.header?.track ? { ...this.header, blocks: this.header.blocks_made } : this.result
    return known?.edited ? { text: known.track, interpolation: known.interpolation, blocks: known.blocks } : null
  }

  /** @param {import('./stream_news.mjs').News} news */
  take({ header, pictures }) {
    // Some that the page has not seen are dropped by now: these are all there are.
    if (header.points_from === 0) this.points.clear()
    for (const point of header.memory ?? []) this.points.add(point)
    if (pictures.length) this.player.add(makeClip(header, pictures))
    // What was taken out above would be kept alive by the header.
    // The track comes when it changes: it may be long.
    this.header = { ...header, track: header.track ?? this.header?.track ?? '', memory: null, pictures: null }
    this.isSilent = false
    if (header.state === 'stopping') this.lastBlock ??= header.blocks_made + 1
    if (isEnded(header)) this.isCancelled = false
  }
}

/** Streams by workflow and node: node ids repeat from one workflow to the next. */
export class StreamStore {
  constructor() {
    /** @type {Map<string, StreamState>} */
    this.states = new Map()
  }

  find(workflow, node) {
    return this.states.get(keyOf(workflow, node)) ?? null
  }

  /** The state of a node, made where there is none. */
  of(workflow, node) {
    const key = keyOf(workflow, node)
    let state = this.states.get(key)
    if (!state) {
      state = new StreamState(workflow, node)
      this.states.set(key, state)
      this.forgetOldest()
    }
    return state
  }

  all() {
    return [...this.states.values()]
  }

  forgetOldest() {
    for (const [key, state] of this.states) {
      if (this.states.size <= MOST_STATES) return
      if (state.view || state.isLive) continue
      state.begin('')
      this.states.delete(key)
    }
  }
}

const MOST_STATES = 32

function keyOf(workflow, node) {
  return JSON.stringify([workflow, String(node)])
}
