// The choices of lists, and what an empty text box says, in the page's language.
// The page itself translates titles, names, tooltips and outputs out of `locales/`, but not these.
import { app } from '/scripts/app.js'
import { api } from '/scripts/api.js'

const PREFIX = 'StreamBlocks'

/** By language, then as in `nodeDefs.json`. */
let languages = {}

app.registerExtension({
  name: 'StreamBlocks.TranslatedChoices',

  /** The page makes no node before this has ended. */
  async init() {
    languages = await api.getCustomNodesI18n()
  },

  nodeCreated(node) {
    if (!node.comfyClass?.startsWith(PREFIX)) return
    const texts = languages[app.extensionManager?.setting?.get('Comfy.Locale')]?.nodeDefs?.[node.comfyClass]
    if (!texts) return
    for (const widget of node.widgets ?? []) {
      labelChoices(widget, texts.inputs?.[widget.name]?.options)
      // Classic nodes show the input's name as it is in the workflow.
      if (widget.element?.placeholder === widget.name) widget.element.placeholder = widget.label ?? widget.name
    }
  }
})

/** Values stay what they are: workflows hold them. */
function labelChoices(widget, labels) {
  // The menu of a classic node has no filter once there are labels.
  if (!labels || Object.entries(labels).every(([value, label]) => value === label)) return
  widget.options.getOptionLabel = (value) => labels[value] ?? value
}
