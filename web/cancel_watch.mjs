// ComfyUI's two routes that end a running prompt; the second names it.
const ROUTE = /\/(?:interrupt|jobs\/([^/]+)\/cancel)$/

/**
 * Tell when this page asks the server to cancel. The page has no event for it before the server has done so, which
 * may take as long as a step of a large model.
 * @param {(promptId: string | null) => void} onCancel
 */
export function watchCancel(onCancel) {
  const observer = new PerformanceObserver((list) => {
    for (const { name } of list.getEntries()) {
      const found = ROUTE.exec(new URL(name).pathname)
      if (found) onCancel(found[1] ? decodeURIComponent(found[1]) : null)
    }
  })
  observer.observe({ type: 'resource' })
}
