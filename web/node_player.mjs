import { useTrack, TRACK_CLASS } from './applied_track.mjs'
import { text } from './messages.mjs'
import { saveWithout } from './saved_values.mjs'
import { asSent, ask, editsOf, steeredWidgets, valuesOf } from './steering.mjs'
import { shareLink } from './stream_tokens.mjs'
import { StreamView } from './stream_view.mjs'
import { queuedInputs } from './queued_inputs.mjs'

const WIDGET = 'stream_player'
const MARGIN = 10
/** What Vue nodes keep free on both sides of a widget. */
const VUE_MARGINS = 24

/** The player's widget on one node: shows a `StreamState`, and asks for what is clicked. */
export class NodePlayer {
  /**
   * @param node the sampler's
   * @param {{app: object, fetchApi: Function, tokens: import('./stream_tokens.mjs').StreamTokens,
   *   update: (state: object) => void}} page
   */
  constructor(node, page) {
    Object.assign(this, { node, page })
    this.state = null
    this.isOnScreen = false
    this.view = new StreamView({
      pause: () => this.ask({ action: 'pause' }),
      resume: () => this.ask({ action: 'resume' }),
      stop: () => this.ask({ action: 'stop' }),
      apply: () => this.apply(),
      track: () => this.useTrack(),
      share: () => this.share(),
      foldPictures: () => this.fold('pictures'),
      foldChart: () => this.fold('chart')
    })
    this.shownHeight = this.view.idleHeight
    this.addWidget()
    this.listenToWidgets()
    this.observer = new IntersectionObserver(([entry]) => {
      this.isOnScreen = entry.isIntersecting
      this.update()
    })
    this.observer.observe(this.view.element)
    // Wider pictures are higher, whether or not anything new comes.
    this.widths = new ResizeObserver(() => this.fit())
    this.widths.observe(this.view.element)
    this.leaveToCanvas()
  }

  /** Turning the wheel zooms and the middle button moves the canvas, here as beside a classic node. */
  leaveToCanvas() {
    const { element } = this.view
    const isClassic = () => !globalThis.LiteGraph?.vueNodesMode
    const { app } = this.page
    const forward = {
      wheel: (event) => app.canvas.processMouseWheel(event),
      pointerdown: (event) => event.button === 1 && app.canvas.processMouseDown(event),
      pointermove: (event) => (event.buttons & 4) === 4 && app.canvas.processMouseMove(event),
      pointerup: (event) => event.button === 1 && app.canvas.processMouseUp(event)
    }
    for (const [name, hand] of Object.entries(forward)) {
      element.addEventListener(name, (event) => isClassic() && hand(event), { passive: false })
    }
  }

  addWidget() {
    const { node, view } = this
    const widget = node.addDOMWidget(WIDGET, 'STREAMBLOCKS_PLAYER', view.element, {
      serialize: false,
      hideOnZoom: false,
      margin: MARGIN,
      getValue: () => '',
      setValue: () => {}
    })
    // Not in the saved workflow either.
    widget.serialize = false
    // Of its own height in both renderers: room that is left over goes to the prompt.
    widget.computeLayoutSize = undefined
    widget.computeSize = (width) => [width ?? node.size[0], this.height() + 2 * MARGIN]
    const widgets = node.widgets
    widgets.splice(widgets.indexOf(widget), 1)
    widgets.splice(widgets.findIndex(({ name }) => name === 'prompt') + 1, 0, widget)
    saveWithout(node, () => this.shownHeight - view.idleHeight)
  }

  listenToWidgets() {
    for (const widget of steeredWidgets(this.node)) {
      const { callback } = widget
      widget.callback = (...args) => {
        const result = callback?.apply(widget, args)
        this.update()
        return result
      }
    }
  }

  height() {
    const margins = globalThis.LiteGraph?.vueNodesMode ? VUE_MARGINS : 2 * MARGIN
    return this.view.height(this.node.size[0] - margins)
  }

  /** Whether someone can see it. */
  get isSeen() {
    return this.isOnScreen && !document.hidden
  }

  get token() {
    return this.state?.isLive ? this.page.tokens.find(this.state.promptId, this.state.node) : null
  }

  get canSteer() {
    return this.token !== null
  }

  /** Show this stream from now on. */
  attach(state) {
    if (this.state !== state) {
      if (this.state) this.state.view = null
      this.state = state
    }
    if (state.view !== this) {
      state.view?.detach()
      state.view = this
    }
    this.page.update(state)
  }

  detach() {
    this.state?.player.showOn(null)
    if (this.state?.view === this) this.state.view = null
    this.state = null
    this.update()
  }

  /** Show what is known now. */
  update() {
    const { state, view } = this
    if (state?.isLive) state.applied = { ...valuesOf(this.node), ...state.applied }
    view.render(state, this.offers())
    const canvas = this.isSeen && state?.ratio && state.shows.pictures ? view.canvas : null
    if (state && state.player.canvas !== canvas) state.player.showOn(canvas)
    if (this.wasSeen !== this.isSeen) {
      this.wasSeen = this.isSeen
      if (state) this.page.update(state)
    }
    this.fit()
  }

  offers() {
    const { state, token } = this
    const offers = { track: Boolean(state?.track) }
    if (token === null) return offers
    const stage = state.header.state
    const isPaused = stage === 'paused' || stage === 'pausing'
    const isEnding = stage === 'stopping' || state.isCancelled
    const hasEdits = Object.keys(editsOf(state, this.node)).length > 0
    const steering = { pause: !isPaused && !isEnding, resume: isPaused, stop: !isEnding, apply: hasEdits && !isEnding }
    return { ...offers, ...steering, share: !isEnding }
  }

  /** Have the node grow and shrink with what the player shows. */
  fit() {
    const { node } = this
    const height = this.height()
    const more = height - this.shownHeight
    // A node that is drawn wider has been made as high as it must be by the page itself.
    const isResized = this.shownWidth !== undefined && this.shownWidth !== node.size[0]
    this.shownWidth = node.size[0]
    if (more === 0) return
    this.shownHeight = height
    const least = isResized && !globalThis.LiteGraph?.vueNodesMode ? node.computeSize()[1] : 0
    const now = node.size[1]
    node.setSize([node.size[0], isResized && more > 0 ? Math.max(now, least) : now + more])
    node.setDirtyCanvas?.(true, true)
  }

  async ask(request) {
    const { state, token } = this
    if (token === null) return false
    state.problem = await ask(this.page.fetchApi, state, { token, ...request })
    this.page.update(state)
    return state.problem === ''
  }

  async apply() {
    const { state, node } = this
    const edits = editsOf(state, node)
    if (Object.keys(edits).length === 0) return
    if (await this.ask({ action: 'edit', ...(await asSent(edits, node)) })) {
      Object.assign(state.applied, edits)
      this.page.update(state)
    }
  }

  /** The text that is typed into is this node's prompt. */
  ownsText(element) {
    if (element?.tagName !== 'TEXTAREA') return false
    if (this.node.widgets.some((widget) => widget.element?.contains?.(element))) return true
    const inside = element.closest('[data-node-id]')
    return inside?.contains(this.view.element) ?? false
  }

  async useTrack() {
    const { state, node } = this
    const { track } = state
    const { app, fetchApi } = this.page
    const queued = await queuedInputs(fetchApi, state)
    app.canvas.emitBeforeChange()
    useTrack(node, track, queued, () => globalThis.LiteGraph.createNode(TRACK_CLASS))
    app.canvas.emitAfterChange()
    node.setDirtyCanvas?.(true, true)
  }

  async share() {
    const { state, token } = this
    const link = shareLink(location, state.promptId, state.node, token)
    // Without HTTPS the page has no clipboard.
    const copied = navigator.clipboard?.writeText(link).then(() => true, () => false)
    if (await copied) this.page.app.extensionManager?.toast?.add({ severity: 'success', summary: text('page.shared'), life: 3000 })
    else prompt(text('page.share_title'), link)
  }

  /** @param {"pictures" | "chart"} part */
  fold(part) {
    this.state.shows[part] = !this.state.shows[part]
    this.update()
  }

  /** @param {{track: string, interpolation: string, blocks: number, edited: boolean}} result */
  takeResult(result) {
    if (!this.state) return
    this.state.result = result
    this.update()
  }

  destroy() {
    this.observer.disconnect()
    this.widths.disconnect()
    const { state } = this
    this.detach()
    if (state) this.page.update(state)
    this.view.destroy()
  }
}
