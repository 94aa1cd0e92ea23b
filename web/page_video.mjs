const MS_FOR_REASONS = 50

/** What the page shows and may send: a camera, or a video file that its user chose. */
export class PageVideo {
  constructor() {
    /** Goes from one node's object to the next, as undo makes nodes anew. */
    this.video = document.createElement('video')
    Object.assign(this.video, { muted: true, playsInline: true, loop: true })
    // A page pauses what is taken out of it, and it moves when it is put elsewhere.
    this.video.addEventListener('pause', () => this.isStarted && this.play())
    this.video.addEventListener('error', () => this.doubtFile())
    // A server may say what its pages play; the page is told so before or behind the error.
    this.onViolation = ({ effectiveDirective: what, blockedURI: from }) => {
      if (what === 'media-src' && from.startsWith('blob')) this.refuseFile('live_file_forbidden')
    }
    /** Whether its user wants pictures sent. */
    this.isStarted = false
    /** @type {File | null} */
    this.file = null
    /** Why there are no pictures: a message of the page and its values. */
    this.problem = null
    this.onChange = () => {}
    this.url = ''
    this.stream = null
    // Who is asked for a camera may press stop before he answers.
    this.asked = 0
  }

  get hasFile() {
    return this.file !== null
  }

  /** Whether there is a picture to send. */
  get isReady() {
    return this.isStarted && this.video.readyState >= HTMLMediaElement.HAVE_CURRENT_DATA && this.video.videoWidth > 0
  }

  /** Ask the browser for a camera, and show it. */
  async startCamera() {
    this.stop()
    // Browsers have none for pages that others could have changed on their way.
    if (!navigator.mediaDevices?.getUserMedia) return this.fail('live_insecure')
    const asked = ++this.asked
    this.set({ isStarted: true, problem: null })
    try {
      const stream = await navigator.mediaDevices.getUserMedia({ video: { width: { ideal: 832 } }, audio: false })
      if (asked !== this.asked) return endTracks(stream)
      this.takeCamera(stream)
    } catch (error) {
      if (asked === this.asked) this.fail(...whyNoCamera(error))
    }
  }

  takeCamera(stream) {
    this.stream = stream
    for (const track of stream.getTracks()) track.addEventListener('ended', () => this.fail('live_camera_ended'))
    this.video.srcObject = stream
    this.play()
    this.onChange()
  }

  /** Show a file's first picture. @param {File} file */
  chooseFile(file) {
    this.release()
    this.file = file
    document.addEventListener('securitypolicyviolation', this.onViolation)
    this.url = URL.createObjectURL(file)
    this.video.src = this.url
    this.set({ problem: null })
  }

  startFile() {
    if (!this.hasFile) return
    this.set({ isStarted: true, problem: null })
    this.play()
  }

  /** Send no more; the camera's light goes out. */
  stop() {
    this.asked++
    this.isStarted = false
    if (this.stream) {
      endTracks(this.stream)
      this.stream = null
      this.video.srcObject = null
    }
    this.video.pause()
    this.onChange()
  }

  /** Stop, and keep nothing. */
  release() {
    this.file = null
    this.stop()
    if (!this.url) return
    document.removeEventListener('securitypolicyviolation', this.onViolation)
    URL.revokeObjectURL(this.url)
    this.url = ''
    this.video.removeAttribute('src')
    this.video.load()
  }

  play() {
    // One that is stopped at once rejects, and so does one that fails, which says so by itself.
    this.video.play().catch(() => {})
  }

  fail(id, values = {}) {
    this.stop()
    this.set({ problem: { id, values } })
  }

  /** Say that the file cannot be played, unless something better is to be said. */
  doubtFile() {
    const { file } = this
    if (file) setTimeout(() => this.file === file && this.refuseFile('live_bad_file', { name: file.name }), MS_FOR_REASONS)
  }

  refuseFile(id, values) {
    this.release()
    this.set({ problem: { id, values } })
  }

  set(values) {
    Object.assign(this, values)
    this.onChange()
  }
}

function endTracks(stream) {
  for (const track of stream.getTracks()) track.stop()
}

function whyNoCamera(error) {
  if (error.name === 'NotAllowedError' || error.name === 'SecurityError') return ['live_denied']
  if (error.name === 'NotFoundError' || error.name === 'OverconstrainedError') return ['live_no_camera']
  return ['live_camera_failed', { reason: error.message }]
}
