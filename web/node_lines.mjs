/** Lines of the pack on nodes: DOM widgets that hold no value. */

/**
 * Put a widget below those of the node's inputs, above chart and preview; among the inputs it would shift their saved
 * values. The widget itself is not saved either.
 */
export function placeBelowInputs(node, widget) {
  widget.serialize = false
  const names = new Set(node.inputs?.map((input) => input.widget?.name))
  const last = node.widgets.findLastIndex(({ name }) => names.has(name))
  if (last >= 0) {
    node.widgets.splice(node.widgets.indexOf(widget), 1)
    node.widgets.splice(last + 1, 0, widget)
  }
  node.setDirtyCanvas?.(true, true)
}
