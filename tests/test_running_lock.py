"""Of two processes that share an output folder, one runs a saved stream, until it ends, however it does."""

import subprocess
import sys
from pathlib import Path

from streamblocks.stream import running_lock
from streamblocks.stream.running_lock import RunningLock, is_running
from streamblocks.stream.saved_names import names_at_rest, names_of_saved

HOLDER = f"""
import runpy, sys
from pathlib import Path
lock = runpy.run_path({running_lock.__file__!r})["RunningLock"](Path(sys.argv[1]))
print(lock.take(), flush=True)
sys.stdin.read()
"""


def test_a_stream_of_another_process_is_left_to_it(tmp_path):
    for name in ("theirs", "ours", "nobodys"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "block_0000001.safetensors").touch()
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "theirs")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert other.stdout is not None and other.stdout.readline().strip() == b"True"
        theirs, ours = RunningLock(tmp_path / "theirs"), RunningLock(tmp_path / "ours")
        assert not theirs.take() and ours.take() and ours.take()
        assert is_running(tmp_path / "theirs") and is_running(tmp_path / "ours")
        assert names_at_rest(tmp_path) == ["nobodys"] and len(names_of_saved(tmp_path)) == 3
        # Looking leaves no file behind.
        assert list((tmp_path / "nobodys").iterdir()) == [tmp_path / "nobodys/block_0000001.safetensors"]
        other.kill()
        other.wait()
        assert not is_running(tmp_path / "theirs") and theirs.take()
        ours.release()
        assert RunningLock(tmp_path / "ours").take()
    finally:
        other.kill()
        other.communicate()


def test_a_disk_without_locks_hinders_nobody(tmp_path: Path, monkeypatch):
    def no_locks(_):
        raise OSError(95, "Operation not supported")

    (tmp_path / running_lock.LOCK_NAME).touch()
    monkeypatch.setattr(running_lock, "_locked", no_locks)
    assert RunningLock(tmp_path).take() and not is_running(tmp_path)
