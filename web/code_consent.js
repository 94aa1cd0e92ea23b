// Asks, after a run that was refused, whether the code that a model brings may run on this machine.
import { app } from '/scripts/app.js'
import { api } from '/scripts/api.js'

import { makeQuestion } from './code_question.mjs'
import { text } from './messages.mjs'
import { refusalOf } from './steering.mjs'

app.registerExtension({
  name: 'StreamBlocks.CodeConsent',

  setup() {
    api.addEventListener('streamblocks.code', ({ detail }) => ask(detail))
  }
})

async function ask({ id, token }) {
  // In another site's frame, that site could lead a click onto the button.
  if (window.top !== window.self) return
  const shown = await send(id, 'show', { token })
  // On another machine the server does not show it; the run's error says what to do.
  if (shown.error) return console.info(`StreamBlocks: ${shown.error}`)
  document.querySelector('.streamblocks-code')?.close()
  const answer = { token, nonce: shown.nonce, digest: shown.digest }
  const dialog = makeQuestion(shown, async () => (await send(id, 'allow', answer)).error)
  document.body.append(dialog)
  dialog.showModal()
}

/** The server's answer, or an object with an error's sentence. */
async function send(id, action, body) {
  let answer
  try {
    answer = await api.fetchApi(`/streamblocks/code/${encodeURIComponent(id)}/${action}`, {
      method: 'POST',
      headers: { 'Content-Type': 'application/json' },
      body: JSON.stringify(body)
    })
  } catch {
    return { error: text('page.no_answer') }
  }
  const told = await answer.json().catch(() => ({}))
  return answer.ok ? told : { error: refusalOf(answer.status, told) }
}
