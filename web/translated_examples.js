// The titles and notes of the example workflows, in the page's language, where nobody has changed them.
import { app } from '/scripts/app.js'
import { api } from '/scripts/api.js'

const NOTES = ['MarkdownNote', 'Note']

/** By language, then by the English text. */
let languages = {}

app.registerExtension({
  name: 'StreamBlocks.TranslatedExamples',

  /** The page loads no workflow before this has ended. */
  async init() {
    languages = await api.getCustomNodesI18n()
  },

  beforeConfigureGraph(graph) {
    const texts = languages[app.extensionManager?.setting?.get('Comfy.Locale')]?.streamblocks?.examples
    // Other workflows may have such words of their own.
    if (!texts || !graph?.nodes?.some(({ type }) => type?.startsWith('StreamBlocks'))) return
    for (const node of graph.nodes) {
      if (Object.hasOwn(texts, node.title)) node.title = texts[node.title]
      if (NOTES.includes(node.type)) node.widgets_values = node.widgets_values?.map((value) => texts[value] ?? value)
    }
  }
})
