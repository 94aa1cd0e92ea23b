/**
 * @typedef {object} Clip a block's pictures
 * @property {number} block which one
 * @property {number} first the place of the first picture in the block: others than the first part follow what came
 * @property {number} of how many pictures the block has
 * @property {Blob[]} pictures JPEGs, of all of the block or as many as have come
 * @property {number} each how many pictures of the block one of these stands for
 * @property {number} width in pixels
 * @property {number} height in pixels
 * @property {number} seconds how long it took to make, and so lasts when nothing newer is there
 * @property {number} shortest how long it lasts when something newer is: its length in the video
 */

/**
 * Plays the newest blocks on a canvas, in the page's own time. At most two are held, the one that plays and the newest:
 * what comes in between is dropped. They stay compressed until they are shown.
 */
export class PicturePlayer {
  constructor() {
    /** @type {Clip | null} */
    this.clip = null
    /** @type {Clip | null} */
    this.next = null
    /** Of the picture to be shown next. */
    this.index = 0
    this.canvas = null
    this.timer = 0
    // Counts up, so that a picture that was decoded too late is not shown.
    this.turn = 0
  }

  /** Take a block, or some more of its pictures; it plays when the one before has. */
  add(clip) {
    if (clip.pictures.length === 0) return
    const begun = [this.next, this.clip].find((one) => one && clip.first > 0 && one.block === clip.block)
    if (begun) {
      begun.pictures.push(...clip.pictures)
      // It may have shown all that it had.
      if (begun === this.clip) this.schedule()
      return
    }
    if (this.clip && this.index < this.clip.pictures.length && this.canvas) {
      this.next = clip
      this.schedule()
      return
    }
    this.start(clip)
  }

  /** The canvas to draw on; null for none, which also stops the clock. */
  showOn(canvas) {
    this.canvas = canvas
    clearTimeout(this.timer)
    if (!canvas || !this.clip) return
    if (this.next) this.start(this.next)
    else this.draw(Math.max(this.index - 1, 0)).then(() => this.schedule())
  }

  /** Forget all pictures. */
  clear() {
    clearTimeout(this.timer)
    this.turn += 1
    this.clip = this.next = null
  }

  start(clip) {
    Object.assign(this, { clip, next: null, index: 0 })
    this.step()
  }

  step() {
    if (!this.canvas || !this.clip) return
    if (this.index >= this.clip.pictures.length) {
      if (this.next) this.start(this.next)
      return
    }
    this.draw(this.index)
    this.index += 1
    this.shownAt = performance.now()
    this.schedule()
  }

  /** Set the clock for the next picture; faster where a newer block waits. */
  schedule() {
    clearTimeout(this.timer)
    if (!this.canvas || !this.clip) return
    const lasts = this.next ? this.clip.shortest : Math.max(this.clip.seconds, this.clip.shortest)
    const due = (this.shownAt ?? 0) + (1000 * lasts * this.clip.each) / this.clip.of
    this.timer = setTimeout(() => this.step(), Math.max(due - performance.now(), 0))
  }

  async draw(index) {
    this.turn += 1
    const turn = this.turn
    const bitmap = await createImageBitmap(this.clip.pictures[index]).catch(() => null)
    if (!bitmap) return
    const { canvas } = this
    if (canvas && turn === this.turn) {
      if (canvas.width !== bitmap.width) canvas.width = bitmap.width
      if (canvas.height !== bitmap.height) canvas.height = bitmap.height
      canvas.getContext('2d').drawImage(bitmap, 0, 0)
    }
    bitmap.close()
  }
}

/**
 * A clip of what the server sent.
 * @param {{pictures: {block: number, first: number, end: number, of: number, width: number, height: number},
 *   fps: number, rate: number | null}} header where `of` is how many pictures the block has in the video, of which those
 *   from `first` up to `end` are meant; fewer may be sent
 * @param {Blob[]} pictures
 * @returns {Clip}
 */
export function makeClip(header, pictures) {
  const { block, first = 0, of, end = of, width, height } = header.pictures
  const shortest = of / header.fps
  const seconds = header.rate ? of / header.rate : shortest
  return { block, first, of, pictures, each: (end - first) / pictures.length, width, height, shortest, seconds }
}
