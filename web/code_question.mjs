import { text } from './messages.mjs'

/** Nobody allows by a click that was meant for something else. */
const MILLISECONDS_BEFORE = 1500

/**
 * A dialog with all files of a repository's code, and the question whether it may run.
 * @param {{place: string, commit: string | null, digest: string, files: {path: string, size: number, digest: string, text: string}[]}} code
 * @param {() => Promise<string>} allow writes the consent; gives an error's sentence, or nothing
 */
export function makeQuestion(code, allow) {
  const dialog = document.createElement('dialog')
  dialog.className = 'streamblocks-code'
  Object.assign(dialog.style, {
    width: 'min(900px, 90vw)',
    maxHeight: '85vh',
    padding: '16px',
    overflow: 'auto',
    color: 'var(--input-text, #ddd)',
    background: 'var(--comfy-menu-bg, #222)',
    border: '1px solid var(--border-color, #555)'
  })
  const [read, allowButton, refuseButton, said] = [makeBox(), makeButton('allow'), makeButton('refuse'), paragraph('')]
  said.className = 'streamblocks-code-said'
  refuseButton.autofocus = true
  dialog.append(
    heading(text('page.code_title')),
    paragraph(text('page.code_intro')),
    paragraph(text('page.code_place', { place: code.place })),
    ...(code.commit ? [paragraph(text('page.code_commit', { commit: code.commit }))] : []),
    ...code.files.map(fileOf),
    paragraph(text('page.code_digest', { digest: code.digest })),
    labelled(read, text('page.code_read')),
    said,
    allowButton,
    refuseButton
  )
  const opened = performance.now()
  const update = () => {
    allowButton.disabled = !read.checked || performance.now() - opened < MILLISECONDS_BEFORE
  }
  read.addEventListener('change', update)
  setTimeout(update, MILLISECONDS_BEFORE + 50)
  update()
  refuseButton.addEventListener('click', () => dialog.close())
  allowButton.addEventListener('click', async (event) => {
    // Not a click that a script made.
    if (!event.isTrusted || !read.checked) return
    allowButton.disabled = read.disabled = true
    const error = await allow()
    said.textContent = error || text('page.code_allowed')
    refuseButton.textContent = text('page.code_close')
  })
  dialog.addEventListener('close', () => dialog.remove())
  return dialog
}

function fileOf(file) {
  const [details, summary, lines] = ['details', 'summary', 'pre'].map((name) => document.createElement(name))
  summary.textContent = text('page.code_file', { path: file.path, size: file.size, digest: file.digest })
  Object.assign(summary.style, { cursor: 'pointer', overflowWrap: 'anywhere', fontFamily: 'monospace' })
  // Text, never markup: it comes from who wrote the code.
  lines.textContent = file.text
  Object.assign(lines.style, { maxHeight: '40vh', overflow: 'auto', whiteSpace: 'pre-wrap', overflowWrap: 'anywhere' })
  details.append(summary, lines)
  return details
}

function makeBox() {
  const box = document.createElement('input')
  box.type = 'checkbox'
  return box
}

function makeButton(name) {
  const button = document.createElement('button')
  button.type = 'button'
  button.dataset.answer = name
  button.textContent = text(`page.code_${name}`)
  Object.assign(button.style, { margin: '8px 8px 0 0', padding: '6px 12px' })
  return button
}

function heading(words) {
  return Object.assign(document.createElement('h3'), { textContent: words })
}

function paragraph(words) {
  const line = Object.assign(document.createElement('p'), { textContent: words })
  line.style.overflowWrap = 'anywhere'
  return line
}

function labelled(box, words) {
  const label = document.createElement('label')
  label.append(box, ` ${words}`)
  return label
}
