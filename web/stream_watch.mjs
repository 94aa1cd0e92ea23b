import { isEnded, readNews } from './stream_news.mjs'

// A fast stream has hundreds of stages a second.
const MS_BETWEEN = 150
const [FIRST_RETRY_MS, LAST_RETRY_MS] = [1000, 15000]

/**
 * Asks the server for what is new of one stream, one request at a time, until the stream has ended.
 * Asleep it asks nothing, and so is sent no pictures.
 */
export class StreamWatch {
  /**
   * @param {(route: string, options: object) => Promise<Response>} fetchApi
   * @param {string} path of the stream's routes
   * @param {{onNews: (news: import('./stream_news.mjs').News) => void, onGone: () => void, onSilence: () => void}} listener
   */
  constructor(fetchApi, path, listener) {
    Object.assign(this, { fetchApi, path, listener })
    /** What this page has; `pictures` is how many of the block's. */
    this.cursor = { version: -1, block: -1, points: 0, pictures: 0 }
    this.awake = this.stopped = this.isRunning = false
    this.abort = new AbortController()
  }

  /** Ask, or go on asking. */
  wake() {
    this.awake = true
    if (this.isRunning || this.stopped) return
    this.isRunning = true
    this.run().finally(() => {
      this.isRunning = false
      // Woken while the last request was given up.
      if (this.awake) this.wake()
    })
  }

  /** Ask no more for now; an answer on its way is given up. */
  sleep() {
    if (!this.awake) return
    this.awake = false
    this.abort.abort()
  }

  /** Ask now, where the server was silent and the next try would come later. */
  hurry() {
    if (!this.awake || this.stopped) return
    this.sleep()
    this.wake()
  }

  /** For good. */
  stop() {
    this.stopped = true
    this.sleep()
  }

  async run() {
    this.abort = new AbortController()
    const { signal } = this.abort
    let retry = FIRST_RETRY_MS
    while (!signal.aborted) {
      try {
        await this.ask(signal)
        retry = FIRST_RETRY_MS
        await pause(MS_BETWEEN, signal)
      } catch (error) {
        if (signal.aborted) return
        this.listener.onSilence(error)
        await pause(retry, signal)
        retry = Math.min(2 * retry, LAST_RETRY_MS)
      }
    }
  }

  async ask(signal) {
    const answer = await this.fetchApi(`${this.path}/news?${new URLSearchParams(this.cursor)}`, { signal, cache: 'no-store' })
    if (answer.status === 204) return
    if (answer.status === 404) {
      this.stop()
      this.listener.onGone()
      return
    }
    if (!answer.ok) throw new Error(`status ${answer.status}`)
    const news = readNews(await answer.arrayBuffer())
    if (signal.aborted) return
    const { version, points, pictures } = news.header
    const seen = pictures ? { block: pictures.block, pictures: pictures.end } : {}
    this.cursor = { ...this.cursor, version, points, ...seen }
    if (isEnded(news.header)) this.stop()
    this.listener.onNews(news)
  }
}

/** Wait; less where `signal` is given meanwhile. */
function pause(ms, signal) {
  return new Promise((done) => {
    const end = () => {
      clearTimeout(timer)
      signal.removeEventListener('abort', end)
      done()
    }
    const timer = setTimeout(end, ms)
    signal.addEventListener('abort', end)
    if (signal.aborted) end()
  })
}
