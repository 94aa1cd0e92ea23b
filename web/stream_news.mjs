/** @typedef {{header: object, pictures: Blob[]}} News */

/**
 * Take apart what the server sends: a length (uint32, big-endian), a header in JSON, JPEGs one behind the other.
 * @param {ArrayBuffer} buffer
 * @returns {News}
 */
export function readNews(buffer) {
  const length = new DataView(buffer).getUint32(0)
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)))
  let place = 4 + length
  const pictures = (header.pictures?.lengths ?? []).map((bytes) => {
    place += bytes
    return new Blob([buffer.slice(place - bytes, place)], { type: 'image/jpeg' })
  })
  return { header, pictures }
}

const ENDED = new Set(['finished', 'stopped', 'cancelled', 'failed'])

/** Whether nothing new will come. */
export function isEnded(header) {
  return ENDED.has(header?.state)
}
