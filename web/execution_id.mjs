/**
 * The node of an execution id; inside subgraphs ids are chained, as in "12:5".
 * @param graph the root graph
 * @param {string | number} id
 * @returns the node, or null when it is gone
 */
export function findNode(graph, id) {
  const parts = String(id).split(':')
  let node = null
  for (const part of parts) {
    node = graph?.getNodeById?.(part) ?? null
    graph = node?.subgraph
  }
  return node
}
