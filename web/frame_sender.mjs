import { pathOf, refusalOf } from './steering.mjs'

const MOST_PIXELS_A_SIDE = 832
const QUALITY = 0.85
/** Before the stream says how many pictures a second it shows. */
const FIRST_FPS = 8
const MS_UNTIL_READY = 200
const [FIRST_RETRY_MS, LAST_RETRY_MS] = [1000, 15000]

/** Draws what a video shows, as a JPEG. */
export class FrameGrabber {
  constructor() {
    this.canvas = document.createElement('canvas')
  }

  /** @param {HTMLVideoElement} video @returns {Promise<Blob | null>} */
  grab(video) {
    const { videoWidth, videoHeight } = video
    const scale = Math.min(1, MOST_PIXELS_A_SIDE / Math.max(videoWidth, videoHeight))
    const [width, height] = [Math.round(videoWidth * scale), Math.round(videoHeight * scale)]
    if (this.canvas.width !== width || this.canvas.height !== height) Object.assign(this.canvas, { width, height })
    this.canvas.getContext('2d', { alpha: false }).drawImage(video, 0, 0, width, height)
    return new Promise((done) => this.canvas.toBlob(done, 'image/jpeg', QUALITY))
  }
}

/**
 * Gives one stream the newest picture, again and again: at most as many as it shows, one request at a time, so that
 * no picture waits for another.
 */
export class FrameSender {
  /**
   * @param {(route: string, options: object) => Promise<Response>} fetchApi
   * @param {{promptId: string, node: string, token: string}} stream
   * @param {import('./page_video.mjs').PageVideo} source
   * @param {() => void} onChange
   */
  constructor(fetchApi, stream, source, onChange) {
    Object.assign(this, { fetchApi, stream, source, onChange })
    this.grabber = new FrameGrabber()
    this.fps = FIRST_FPS
    this.sent = this.dropped = 0
    /** Why the server took no picture; "" where it did, null where it does not answer. */
    this.problem = ''
    /** Whether the stream takes no more. */
    this.hasEnded = false
    this.abort = new AbortController()
    this.finished = this.run()
  }

  stop() {
    this.abort.abort()
  }

  async run() {
    const { signal } = this.abort
    let retry = FIRST_RETRY_MS
    while (!signal.aborted && !this.hasEnded) {
      const began = performance.now()
      const picture = this.source.isReady ? await this.grabber.grab(this.source.video) : null
      if (signal.aborted) break
      if (!picture) {
        await pause(MS_UNTIL_READY, signal)
        continue
      }
      await this.send(picture, signal)
      if (signal.aborted) break
      this.onChange()
      if (this.problem === '') retry = FIRST_RETRY_MS
      await pause(this.problem === '' ? 1000 / this.fps - (performance.now() - began) : retry, signal)
      if (this.problem !== '') retry = Math.min(2 * retry, LAST_RETRY_MS)
    }
  }

  async send(picture, signal) {
    const headers = { 'Content-Type': 'image/jpeg', 'X-StreamBlocks-Token': this.stream.token }
    const request = { method: 'POST', headers, body: picture, signal }
    const answer = await this.fetchApi(`${pathOf(this.stream)}/frames`, request).catch(() => null)
    const said = await answer?.json().catch(() => null)
    if (!said) this.problem = null
    else if (answer.ok) this.take(said)
    else this.refuse(answer.status, said)
  }

  take({ dropped, fps }) {
    this.problem = ''
    this.sent++
    this.dropped += dropped
    if (fps > 0) this.fps = fps
  }

  refuse(status, said) {
    this.problem = refusalOf(status, said)
    // Of another browser, forgotten, or over: none of it changes.
    this.hasEnded = [403, 404, 409].includes(status)
  }
}

/** Wait; not at all where `signal` is given. */
function pause(ms, signal) {
  return new Promise((done) => {
    const end = () => {
      clearTimeout(timer)
      signal.removeEventListener('abort', end)
      done()
    }
    const timer = setTimeout(end, Math.max(0, ms))
    signal.addEventListener('abort', end)
    if (signal.aborted) end()
  })
}
