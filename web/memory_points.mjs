/** Columns kept before every second one is dropped: a stream may be endless. */
const MOST_COLUMNS = 256

/**
 * What the chart shows: one column per block that has ended, and the block being made.
 * Bytes throughout.
 */
export class MemoryPoints {
  constructor() {
    this.clear()
  }

  clear() {
    /** @type {{block: number, allocated: number, peak: number, owners: Map<string, number>, event: string}[]} */
    this.columns = []
    /** The latest point of the block being made, or null. */
    this.now = null
    this.stride = 1
    this.blocks = 0
    this.card = null
    this.largestPeak = 0
  }

  /** Take a point as the server sends it. */
  add(point) {
    if (point.first) this.clear()
    this.blocks = point.blocks
    this.card = point.card
    this.largestPeak = Math.max(this.largestPeak, point.peak)
    const block = point.block ?? 0
    const same = this.now?.block === block ? this.now : null
    const now = {
      block,
      stage: point.stage,
      allocated: point.allocated,
      peak: Math.max(point.peak, same?.peak ?? 0),
      event: point.event || same?.event || ''
    }
    if (point.owners.length === 0) {
      this.now = now
      return
    }
    this.now = null
    if (block % this.stride === 0) {
      this.columns.push({ ...now, owners: new Map(point.owners) })
    }
    while (this.columns.length > MOST_COLUMNS) {
      this.stride *= 2
      this.columns = this.columns.filter((column) => column.block % this.stride === 0)
    }
  }

  /** The latest point, ended block or not; null before the first. */
  get latest() {
    return this.now ?? this.columns.at(-1) ?? null
  }

  /**
   * Owners by size, the largest first; those after the `most`th are summed up as "smaller ones".
   * @param {number} most
   * @returns {string[]}
   */
  ownerNames(most) {
    const largest = new Map()
    for (const { owners } of this.columns) {
      for (const [name, bytes] of owners) largest.set(name, Math.max(bytes, largest.get(name) ?? 0))
    }
    const names = [...largest.keys()].sort((a, b) => largest.get(b) - largest.get(a)).slice(0, most)
    const first = this.columns[0]?.owners
    // What grew lies on top of what was there from the start.
    return names.sort((a, b) => (first.get(b) ?? 0) - (first.get(a) ?? 0))
  }
}

const UNITS = [
  [2 ** 30, 'GiB'],
  [2 ** 20, 'MiB'],
  [2 ** 10, 'KiB']
]

/** Bytes as people read them, to three digits. */
export function formatBytes(bytes) {
  const [unit, name] = UNITS.find(([size]) => bytes >= size) ?? [1, 'bytes']
  const value = bytes / unit
  return `${unit === 1 ? value : value.toFixed(value < 10 ? 2 : value < 100 ? 1 : 0)} ${name}`
}
