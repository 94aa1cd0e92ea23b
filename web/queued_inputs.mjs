/**
 * What a stream's node was queued with; the page's widgets may say something else by now, the seed above all.
 * @param {(route: string) => Promise<Response>} fetchApi
 * @param {{promptId: string, node: string}} stream
 * @returns {Promise<Record<string, unknown>>} by input; {} where ComfyUI no longer knows
 */
export async function queuedInputs(fetchApi, { promptId, node }) {
  const entry = await queuedEntry(fetchApi, promptId)
  return entry?.[2]?.[node]?.inputs ?? {}
}

/**
 * The workflow that a prompt was queued with.
 * @param {(route: string) => Promise<Response>} fetchApi
 * @param {string} promptId
 * @returns {Promise<object | null>} null where ComfyUI does not know the prompt, or a program queued it
 */
export async function queuedWorkflow(fetchApi, promptId) {
  const entry = await queuedEntry(fetchApi, promptId)
  return entry?.[3]?.extra_pnginfo?.workflow ?? null
}

async function queuedEntry(fetchApi, promptId) {
  const history = await readJson(fetchApi, `/history/${encodeURIComponent(promptId)}`)
  const queue = history?.[promptId] ? null : await readJson(fetchApi, '/queue')
  return history?.[promptId]?.prompt ?? queue?.queue_running.find(([, id]) => id === promptId)
}

async function readJson(fetchApi, route) {
  const answer = await fetchApi(route)
  return answer.ok ? answer.json() : null
}
