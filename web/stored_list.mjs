/** A list of JSON values that the browser keeps, without its oldest entries once there are many. */
export class StoredList {
  /**
   * @param {Storage} storage
   * @param {string} key
   * @param {number} most entries
   */
  constructor(storage, key, most) {
    Object.assign(this, { storage, key, most })
  }

  read() {
    try {
      const entries = JSON.parse(this.storage.getItem(this.key) ?? '[]')
      return Array.isArray(entries) ? entries : []
    } catch {
      // Someone else's, or cut short: begin anew.
      return []
    }
  }

  write(entries) {
    this.storage.setItem(this.key, JSON.stringify(entries.slice(-this.most)))
  }
}
