"""The page's clock for blocks that come in parts, in node."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

PROGRAM = """
import assert from 'node:assert'
import {{ PicturePlayer, makeClip }} from '{player}'
import {{ StreamWatch }} from '{watch}'
globalThis.createImageBitmap = async (picture) => ({{ width: 1, height: 1, close() {{}}, picture }})
const drawn = []
const player = new PicturePlayer()
const context = {{ drawImage: (bitmap) => drawn.push(bitmap.picture) }}
player.showOn({{ width: 1, height: 1, getContext: () => context }})
// As if no time passed between two pictures.
let due = []
globalThis.setTimeout = (step) => {{ due.push(step); return step }}
globalThis.clearTimeout = (step) => {{ due = due.filter((other) => other !== step) }}
const settled = () => new Promise((done) => setImmediate(done))
const play = async (most) => {{
  await settled()
  for (let n = 0; n < most && due.length; n++) {{
    due.shift()()
    await settled()
  }}
}}
const part = (block, first, of = 6) => {{
  const pictures = {{ block, first, end: first + 2, of, width: 1, height: 1 }}
  return makeClip({{ fps: 16, rate: 16, pictures }}, [0, 1].map((n) => `${{block}}.${{first + n}}`))
}}
player.add(part(0, 0))
await play(9)
assert.deepStrictEqual(drawn, ['0.0', '0.1'])
// What comes later goes on where it stood, also behind a newer block that waits.
player.add(part(0, 2))
await play(1)
player.add(part(0, 4))
player.add(part(1, 0))
player.add(part(1, 2))
await play(9)
assert.deepStrictEqual(drawn.slice(2), ['0.2', '0.3', '0.4', '0.5', '1.0', '1.1', '1.2', '1.3'])
// Whose beginning was not seen begins there; pictures are as long as in a block that comes whole.
player.add(part(2, 2))
await play(9)
assert.deepStrictEqual(drawn.slice(-2), ['2.2', '2.3'])
const whole = makeClip({{ fps: 16, rate: null, pictures: {{ block: 0, of: 6, width: 1, height: 1 }} }}, ['a', 'b', 'c'])
assert.deepStrictEqual([whole.first, whole.each, whole.seconds, part(0, 2).each], [0, 2, 6 / 16, 1])
const told = new StreamWatch(() => null, '', {{}})
const pictures = {{ block: 3, end: 8, lengths: [] }}
const text = JSON.stringify({{ version: 7, points: 1, state: 'running', pictures }})
const answer = new Uint8Array(4 + text.length)
new DataView(answer.buffer).setUint32(0, text.length)
answer.set(new TextEncoder().encode(text), 4)
told.listener.onNews = () => {{}}
told.fetchApi = async (path) => {{
  assert.strictEqual(path, '/news?version=-1&block=-1&points=0&pictures=0')
  return {{ status: 200, ok: true, arrayBuffer: async () => answer.buffer }}
}}
await told.ask(new AbortController().signal)
assert.deepStrictEqual(told.cursor, {{ version: 7, block: 3, points: 1, pictures: 8 }})
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed: the page's clock is not tested")
def test_parts_of_a_block_play_one_behind_the_other(tmp_path: Path) -> None:
    program = tmp_path / "parts.mjs"
    player, watch = ((ROOT / "web" / name).as_uri() for name in ("picture_player.mjs", "stream_watch.mjs"))
    program.write_text(PROGRAM.format(player=player, watch=watch))
    done = subprocess.run(["node", str(program)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
