// What the page does not translate by itself out of `locales/`: the choices of lists, what an empty text box says, and
// the titles and notes of the example workflows.
import { app } from '/scripts/app.js'
import { api } from '/scripts/api.js'

const PREFIX = 'StreamBlocks'
const NOTES = ['MarkdownNote', 'Note']

/** By language, as `locales/<language>/main.json` and `nodeDefs.json` have it. */
let languages = {}

app.registerExtension({
  name: 'StreamBlocks.TranslatedNodes',

  /** The page makes no node before this has ended. */
  async init() {
    languages = await api.getCustomNodesI18n()
  },

  beforeConfigureGraph(graph) {
    // Other workflows may have such words of their own.
    if (graph?.nodes?.some(({ type }) => type?.startsWith(PREFIX))) translateExample(graph.nodes)
  },

  nodeCreated(node) {
    if (!node.comfyClass?.startsWith(PREFIX)) return
    const texts = ofThePage()?.nodeDefs?.[node.comfyClass]
    if (!texts) return
    for (const widget of node.widgets ?? []) {
      labelChoices(widget, texts.inputs?.[widget.name]?.options)
      // Classic nodes show the input's name as it is in the workflow.
      if (widget.element?.placeholder === widget.name) widget.element.placeholder = widget.label ?? widget.name
    }
  }
})

function ofThePage() {
  return languages[app.extensionManager?.setting?.get('Comfy.Locale')]
}

/** Values stay what they are: workflows hold them. */
function labelChoices(widget, labels) {
  // The menu of a classic node has no filter once there are labels.
  if (!labels || Object.entries(labels).every(([value, label]) => value === label)) return
  widget.options.getOptionLabel = (value) => labels[value] ?? value
}

/** Titles and notes that nobody has changed are known by their English text. */
function translateExample(nodes) {
  const texts = ofThePage()?.streamblocks?.examples
  if (!texts) return
  for (const node of nodes) {
    if (Object.hasOwn(texts, node.title)) node.title = texts[node.title]
    if (NOTES.includes(node.type)) node.widgets_values = node.widgets_values?.map((value) => texts[value] ?? value)
  }
}
