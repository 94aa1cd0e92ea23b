import { text } from './messages.mjs'

/** The kinds of `memory/owners.py`. */
const KINDS = {
  weights: 'page.owner_weights',
  state: 'page.owner_state',
  module: 'page.owner_module',
  'block masks': 'page.owner_block_masks',
  pictures: 'page.owner_pictures',
  'other models': 'page.owner_other_models',
  rest: 'page.owner_rest'
}

/**
 * An owner of memory as people read it: its kind in the page's language, its name as code has it.
 * @param {string} label such as "weights: transformer bfloat16" or "rest"
 */
export function ownerWords(label) {
  const [kind, ...name] = label.split(': ')
  return [kind in KINDS ? text(KINDS[kind]) : kind, ...name].join(': ')
}
