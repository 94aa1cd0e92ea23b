/** Language -> kind ("page" or "says") -> id -> template, as `locales/<language>/main.json` has them. */
let templates = {}
let localeNow = () => 'en'
/** @type {Promise<void> | null} */
let reading = null

/**
 * Read the pack's texts in all languages, once for all that ask.
 * @param {(route: string) => Promise<Response>} fetchApi ComfyUI's own
 * @param {() => string} locale the page's language, which may change at any time
 */
export function loadMessages(fetchApi, locale) {
  localeNow = locale
  return (reading ??= readMessages(fetchApi))
}

async function readMessages(fetchApi) {
  const answer = await fetchApi('/i18n')
  if (!answer.ok) return
  const all = await answer.json()
  templates = Object.fromEntries(Object.entries(all).map(([language, { streamblocks }]) => [language, streamblocks ?? {}]))
}

/**
 * A text in the page's language, else in English; the id itself where nobody wrote one.
 * @param {string} id such as "page.pause" or "says.loading"
 * @param {Record<string, string | number>} values for the places in braces
 */
export function text(id, values = {}) {
  const template = find(localeNow(), id) ?? find('en', id) ?? id
  return template.replace(/\{(\w+)\}/g, (place, name) => values[name] ?? place)
}

/** Whether somebody wrote a text for `id`. */
export function knows(id) {
  return find('en', id) !== undefined
}

function find(language, id) {
  const [kind, name] = id.split('.')
  return templates[language]?.[kind]?.[name]
}
