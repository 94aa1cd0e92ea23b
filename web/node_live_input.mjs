import { FrameSender } from './frame_sender.mjs'
import { LiveView, MIN_HEIGHT } from './live_view.mjs'
import { text } from './messages.mjs'
import { PageVideo } from './page_video.mjs'

const WIDGET = 'live_view'
const CAMERA = 'camera'
const MARGIN = 6

/** The camera or video of one Stream Live Input, and the stream that it gives pictures to. */
export class NodeLiveInput {
  /**
   * @param node
   * @param {{fetchApi: Function, look: () => void, placeOf: (node: object) => string}} page
   */
  constructor(node, page) {
    Object.assign(this, { node, page })
    this.view = new LiveView({
      choose: (file) => this.source.chooseFile(file),
      start: () => this.start(),
      stop: () => this.source.stop()
    })
    /** @type {FrameSender | null} */
    this.sender = null
    const widget = node.addDOMWidget(WIDGET, 'STREAMBLOCKS_LIVE_VIEW', this.view.element, {
      serialize: false,
      hideOnZoom: false,
      margin: MARGIN,
      getMinHeight: () => MIN_HEIGHT + 2 * MARGIN,
      getValue: () => '',
      setValue: () => {}
    })
    // Not in the saved workflow either.
    widget.serialize = false
    this.listenToChoice()
    this.adopt(new PageVideo())
  }

  listenToChoice() {
    const widget = this.choice
    if (!widget) return
    const { callback } = widget
    widget.callback = (...args) => {
      const result = callback?.apply(widget, args)
      if (this.shown !== widget.value) this.source.release()
      this.update()
      return result
    }
  }

  get choice() {
    return this.node.widgets?.find(({ name }) => name === 'source')
  }

  get isCamera() {
    return this.choice?.value === CAMERA
  }

  /** Whether its user wants pictures sent. */
  get isStarted() {
    return this.source.isStarted
  }

  /** Whether a stream takes them. */
  get isSending() {
    return this.sender !== null && !this.sender.hasEnded
  }

  /** Show this source, as the node's earlier object did. @param {PageVideo} source */
  adopt(source) {
    this.source?.release()
    this.source = source
    source.onChange = () => this.update()
    this.view.take(source.video)
    if (source.isStarted) source.play()
    this.update()
  }

  start() {
    // Another run's last words.
    if (!this.isSending) this.sender = null
    if (this.isCamera) this.source.startCamera()
    else this.source.startFile()
    this.page.look()
  }

  /**
   * Give a stream pictures from now on.
   * @param {{promptId: string, node: string, token: string}} stream
   */
  feed(stream) {
    const { promptId, node } = this.sender?.stream ?? {}
    if (promptId === stream.promptId && node === stream.node) return
    this.sender?.stop()
    this.sender = new FrameSender(this.page.fetchApi, stream, this.source, () => this.update())
    this.update()
  }

  update() {
    const { source } = this
    if (!source.isStarted && this.sender) {
      this.sender.stop()
      this.sender = null
    }
    this.shown = this.choice?.value
    // Once it is removed, its graph has no name any more.
    this.place = this.page.placeOf(this.node)
    const words = this.words()
    this.view.render({
      ...words,
      offers: {
        choose: !this.isCamera && !source.isStarted,
        start: !source.isStarted && (this.isCamera || source.hasFile),
        stop: source.isStarted
      }
    })
  }

  words() {
    const { source, sender } = this
    const problem = (words) => ({ words, isProblem: true })
    if (source.problem) return problem(text(`page.${source.problem.id}`, source.problem.values))
    if (!source.isStarted) return { words: text(this.isCamera || source.hasFile ? 'page.live_idle' : 'page.live_no_file') }
    if (sender?.hasEnded) return { words: text('page.live_ended', { sent: sender.sent }) }
    if (sender?.problem === null) return problem(text('page.silent'))
    if (sender?.problem) return problem(sender.problem)
    if (sender?.sent) return { words: text('page.live_sending', { sent: sender.sent, dropped: sender.dropped }) }
    return { words: text('page.live_waiting') }
  }

  /** The source, for the node's next object. */
  giveUp() {
    this.sender?.stop()
    this.sender = null
    const { source } = this
    source.onChange = () => {}
    return source
  }
}
