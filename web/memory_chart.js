// The memory chart on the Streaming Block Sampler's node.
import { app } from '/scripts/app.js'
import { api } from '/scripts/api.js'

import { findNode } from './execution_id.mjs'
import { MIN_HEIGHT, MemoryChart } from './memory_chart_view.mjs'

const NODE_CLASS = 'StreamBlocksSampler'
const WIDGET = 'memory_chart'

/** Charts by node; the entry of a removed node is collected with it. */
const charts = new WeakMap()

app.registerExtension({
  name: 'StreamBlocks.MemoryChart',

  setup() {
    api.addEventListener('streamblocks.memory', ({ detail }) => {
      const node = findNode(app.rootGraph ?? app.graph, detail.node)
      if (node) charts.get(node)?.add(detail)
    })
  },

  nodeCreated(node) {
    if (node.comfyClass !== NODE_CLASS) return
    const chart = new MemoryChart()
    // A widget type of its own: classic and Vue nodes both show the element.
    const widget = node.addDOMWidget(WIDGET, 'STREAMBLOCKS_MEMORY_CHART', chart.element, {
      serialize: false,
      hideOnZoom: false,
      getMinHeight: () => MIN_HEIGHT,
      getValue: () => '',
      setValue: () => {}
    })
    // Not in the saved workflow either: it would shift the values of other widgets.
    widget.serialize = false
    charts.set(node, chart)
    const onRemoved = node.onRemoved
    node.onRemoved = function (...args) {
      charts.delete(node)
      chart.destroy()
      return onRemoved?.apply(this, args)
    }
  }
})
