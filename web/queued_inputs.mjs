/**
 * What a stream's node was queued with; the page's widgets may say something else by now, the seed above all.
 * @param {(route: string) => Promise<Response>} fetchApi
 * @param {{promptId: string, node: string}} stream
 * @returns {Promise<Record<string, unknown>>} by input; {} where ComfyUI no longer knows
 */
export async function queuedInputs(fetchApi, { promptId, node }) {
  const history = await readJson(fetchApi, `/history/${encodeURIComponent(promptId)}`)
  const queue = history?.[promptId] ? null : await readJson(fetchApi, '/queue')
  const entry = history?.[promptId]?.prompt ?? queue?.queue_running.find(([, id]) => id === promptId)
  return entry?.[2]?.[node]?.inputs ?? {}
}

async function readJson(fetchApi, route) {
  const answer = await fetchApi(route)
  return answer.ok ? answer.json() : null
}
