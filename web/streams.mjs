import { pathOf } from './steering.mjs'
import { StreamWatch } from './stream_watch.mjs'

const MS_BETWEEN_LOOKS = 3000

/** Finds the streams of this page's workflow, and has one request open for each that is seen. */
export class Streams {
  /**
   * @param {(route: string, options?: object) => Promise<Response>} fetchApi
   * @param {import('./stream_state.mjs').StreamStore} store
   * @param {import('./stream_tokens.mjs').StreamTokens} tokens
   * @param {() => string | null | undefined} workflowNow null where it has no node that streams
   */
  constructor(fetchApi, store, tokens, workflowNow) {
    Object.assign(this, { fetchApi, store, tokens, workflowNow })
    this.onJoin = () => {}
    this.timer = 0
    this.isQueueBusy = false
  }

  /**
   * Follow a stream, in place of an earlier one of the same node.
   * @param {{prompt_id: string, node: string, workflow: string | null}} stream
   */
  join({ prompt_id: promptId, node, workflow }) {
    const state = this.store.of(workflow ?? null, node)
    if (state.promptId === promptId) return
    state.begin(promptId)
    state.watch = new StreamWatch(this.fetchApi, pathOf(state), {
      onNews: (news) => this.take(state, news),
      onGone: () => this.lose(state),
      onSilence: () => {
        state.isSilent = true
        this.changed(state)
      }
    })
    this.changed(state)
  }

  take(state, news) {
    state.take(news)
    if (!state.isLive) this.tokens.drop(state.promptId, state.node)
    this.changed(state)
  }

  lose(state) {
    state.isGone = true
    this.tokens.drop(state.promptId, state.node)
    this.changed(state)
  }

  markCancelled(state) {
    if (!state.isLive) return
    state.isCancelled = true
    this.changed(state)
  }

  /** Show it, and ask for news where someone sees it. */
  changed(state) {
    state.view?.update()
    if (state.view?.isSeen || state.isOver) state.watch?.wake()
    else state.watch?.sleep()
    this.lookAgain()
  }

  /** Look for streams for as long as the server has something to do: other pages may queue this workflow. */
  lookWhile(isQueueBusy) {
    const hasChanged = isQueueBusy !== this.isQueueBusy
    this.isQueueBusy = isQueueBusy
    if (hasChanged) this.look()
  }

  /** The server is there again. */
  async returnTo() {
    for (const state of this.store.all()) if (state.isSilent) state.watch?.hurry()
    await this.look()
  }

  /** Ask once which streams there are. */
  async look() {
    clearTimeout(this.timer)
    this.timer = 0
    const answer = await this.fetchApi('/streamblocks/streams', { cache: 'no-store' }).catch(() => null)
    if (answer?.ok) this.compare((await answer.json()).streams)
    this.lookAgain()
  }

  lookAgain() {
    const mayBegin = this.isQueueBusy && this.workflowNow()
    if (this.timer || !(mayBegin || this.store.all().some(isAsleep))) return
    this.timer = setTimeout(() => this.look(), MS_BETWEEN_LOOKS)
  }

  /** @param {{prompt_id: string, node: string, workflow: string | null, running: boolean}[]} list the oldest first */
  compare(list) {
    const byPrompt = new Map(list.map((stream) => [nameOf(stream.prompt_id, stream.node), stream]))
    for (const state of this.store.all()) {
      if (isAsleep(state)) this.wakeAtEnd(state, byPrompt.get(nameOf(state.promptId, state.node)))
    }
    const workflow = this.workflowNow()
    if (!workflow) return
    const newest = new Map()
    for (const stream of list) {
      if (stream.workflow === workflow && !(newest.get(stream.node)?.running && !stream.running)) newest.set(stream.node, stream)
    }
    for (const stream of newest.values()) {
      const state = this.store.find(workflow, stream.node)
      // One that is not in the list began after the server was asked.
      if (!state || !isFollowed(state) || byPrompt.has(nameOf(state.promptId, state.node))) this.join(stream)
    }
    if (newest.size) this.onJoin()
  }

  /** A stream that nobody sees asks nothing while it runs; its end is fetched, without pictures. */
  wakeAtEnd(state, listed) {
    if (listed?.running) return
    state.isOver = true
    this.changed(state)
  }
}

function isFollowed({ watch }) {
  return watch !== null && !watch.stopped
}

function isAsleep(state) {
  return isFollowed(state) && !state.watch.awake
}

function nameOf(promptId, node) {
  return JSON.stringify([promptId, node])
}
