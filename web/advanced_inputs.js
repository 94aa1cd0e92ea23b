// Advanced inputs are folded away on classic nodes, too, as the page does by itself on Vue nodes.
import { app } from '/scripts/app.js'

import { text } from './messages.mjs'

const PREFIX = 'StreamBlocks'
const ALWAYS_SHOWN = 'Comfy.Node.AlwaysShowAdvancedWidgets'

app.registerExtension({
  name: 'StreamBlocks.AdvancedInputs',

  nodeCreated(node) {
    if (!node.comfyClass?.startsWith(PREFIX)) return
    if (app.extensionManager?.setting?.get(ALWAYS_SHOWN)) return
    const advanced = (node.widgets ?? []).filter((widget) => widget.options?.advanced)
    if (!advanced.length) return
    for (const widget of advanced) fold(node, widget)
    addButton(node)
  }
})

/** Vue nodes read `widget.options`; classic ones read the widget itself, where the page writes nothing. */
function fold(node, widget) {
  // For the node's menu. It also hides the widget, but leaves its room empty.
  widget.advanced = true
  const linked = () => node.inputs?.some((input) => input.widget?.name === widget.name && input.link != null)
  Object.defineProperty(widget, 'hidden', { get: () => !node.showAdvanced && !linked(), set: () => {} })
}

function addButton(node) {
  const button = node.addWidget('button', 'advanced', '', () => {
    node.toggleAdvanced()
    if (!node.showAdvanced) node.setSize([node.size[0], node.computeSize()[1]])
  })
  // Vue nodes have a button of their own.
  button.options.canvasOnly = true
  // Neither saved nor sent: it would shift the values of other widgets.
  button.serialize = false
  button.options.serialize = false
  // A saved node may come back unfolded.
  Object.defineProperty(button, 'label', {
    get: () => text(node.showAdvanced ? 'page.hide_advanced' : 'page.show_advanced'),
    set: () => {}
  })
}
