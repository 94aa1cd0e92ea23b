import { text } from './messages.mjs'
import { StoredList } from './stored_list.mjs'

const KEY = 'streamblocks.unfinished'
const MOST_LINKS = 16

/** The newest unfinished video of each node, as the server sent it; behind a reload of the page, too. */
export class UnfinishedLinks {
  /** @param {Storage} storage of this tab */
  constructor(storage) {
    this.kept = new StoredList(storage, KEY, MOST_LINKS)
  }

  /** @param {{node: string, workflow: string | null, filename: string, subfolder: string, type: string, pictures: number}} video */
  add(video) {
    this.kept.write([...this.others(video), video])
  }

  drop(video) {
    this.kept.write(this.others(video))
  }

  /** Whether it is still the newest of its node. */
  has(video) {
    return this.all().some((other) => keyOf(other) === keyOf(video) && other.filename === video.filename)
  }

  all() {
    return this.kept.read()
  }

  others(video) {
    return this.all().filter((other) => keyOf(other) !== keyOf(video))
  }
}

function keyOf({ node, workflow }) {
  return JSON.stringify([workflow, node])
}

/** The path of ComfyUI's route that sends the file. */
export function viewPath({ filename, subfolder, type }) {
  return `/view?${new URLSearchParams({ filename, subfolder, type })}`
}

/**
 * Whether the server still has the file: a stream that was resumed takes its file along when it is finished.
 * @param {(path: string) => string} urlOf makes the address of a path on the server
 */
export async function isThere(video, urlOf) {
  try {
    // Not from the browser's cache, where a video that was played may still be.
    const { status } = await fetch(urlOf(viewPath(video)), { headers: { Range: 'bytes=0-0' }, cache: 'no-store' })
    return status !== 404
  } catch {
    // The server does not answer: nobody knows.
    return true
  }
}

/**
 * The line on the node: how many pictures there are, links to play and to save them, and one to put the line away.
 * @param {(path: string) => string} urlOf makes the address of a path on the server
 * @param {() => void} putAway
 */
export function makeLine(video, urlOf, putAway) {
  const line = document.createElement('div')
  line.className = 'streamblocks-unfinished'
  line.title = text('page.unfinished_title', { file: `${video.subfolder}/${video.filename}` })
  Object.assign(line.style, {
    display: 'flex',
    boxSizing: 'border-box',
    minHeight: '20px',
    gap: '8px',
    alignItems: 'center',
    padding: '0 6px',
    fontSize: '12px',
    whiteSpace: 'nowrap',
    overflow: 'hidden',
    color: 'var(--input-text, #ddd)'
  })
  const url = urlOf(viewPath(video))
  const words = document.createElement('span')
  words.textContent = text('page.unfinished', { pictures: video.pictures })
  line.append(
    words,
    makeLink(text('page.unfinished_play'), { href: url, target: '_blank', rel: 'noopener' }),
    makeLink(text('page.unfinished_save'), { href: url, download: video.filename }),
    makeButton('×', text('page.unfinished_put_away'), putAway)
  )
  return line
}

function makeLink(words, attributes) {
  const link = Object.assign(document.createElement('a'), attributes)
  link.textContent = words
  Object.assign(link.style, { color: 'inherit', textDecoration: 'underline' })
  return link
}

function makeButton(words, title, onClick) {
  const button = document.createElement('button')
  button.textContent = words
  button.title = title
  button.setAttribute('aria-label', title)
  Object.assign(button.style, { marginLeft: 'auto', background: 'none', border: 'none', color: 'inherit', cursor: 'pointer' })
  button.addEventListener('click', onClick)
  return button
}
