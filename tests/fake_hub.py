"""A Hugging Face hub of one repository, on this machine: what `huggingface_hub` asks of one. And worse ones."""

import hashlib
import json
import socket
import threading
import time
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c" * 40


def point_libraries_at(monkeypatch, address: str, cache: Path) -> None:
    """Have huggingface_hub and transformers ask `address`, and keep what they fetch in `cache`."""
    # Seconds, which tests that only serve need not wait for.
    from huggingface_hub import HfApi, constants
    from transformers import tokenization_utils_base
    from transformers.utils import hub

    for name, value in {
        "ENDPOINT": address,
        "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(constants, name, value)
    # Made once, and asked for the names of templates and of files.
    for module in (hub, tokenization_utils_base):
        monkeypatch.setattr(module, "hf_api", lambda: HfApi(endpoint=address))


@contextmanager
def fake_hub(repository: str, folder: Path, *, dripping: float = 0.0):
    """Serve `folder` as `repository`; gives the address and the list of what was asked for, such as `GET vae/x`.

    With `dripping`, files come one byte in so many seconds, until whoever asks hangs up, which the list says: `GONE`.
    Whoever asks for `/mark/NAME` puts `MARK NAME` into the list.
    """
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self.answer(with_body=False)

        def do_GET(self):
            self.answer(with_body=True)

        def answer(self, with_body):
            path = self.path.partition("?")[0]
            if path.startswith("/mark/"):
                asked.append(f"MARK {path.removeprefix('/mark/')}")
                return self.send(b"", with_body, {})
            if "/tree/" in path:
                return self.send(b"{}", with_body, {"X-Error-Code": "EntryNotFound"}, status=404)
            if path.startswith(f"/api/models/{repository}"):
                files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
                siblings = [
                    {"rfilename": str(path.relative_to(folder)), "size": path.stat().st_size, "blobId": "0"}
                    for path in files
                ]
                return self.send(json.dumps({"id": repository, "sha": COMMIT, "siblings": siblings}).encode(), True, {})
            name = path.partition(f"/{repository}/resolve/")[2].partition("/")[2]
            file = folder / name
            if not name or not file.is_file():
                # With the commit, by which the library remembers that there is no such file.
                absent = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
                return self.send(b"{}", with_body, absent, status=404)
            asked.append(f"{self.command}{' part of' if 'Range' in self.headers else ''} {name}")
            content = file.read_bytes()
            etag = hashlib.sha256(content).hexdigest()
            return self.send(content, with_body, {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'})

        def send(self, content, with_body, headers, status=200):
            asked_range = self.headers.get("Range")
            if asked_range and status == 200:
                first, _, last = asked_range.removeprefix("bytes=").partition("-")
                total = len(content)
                content = content[int(first) : int(last) + 1 if last else None]
                headers = headers | {"Content-Range": f"bytes {first}-{int(first) + len(content) - 1}/{total}"}
                status = 206
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(content)), "Accept-Ranges": "bytes"}).items():
                self.send_header(name, value)
            self.end_headers()
            if with_body and dripping and "ETag" in headers:
                self.drip(content)
            elif with_body:
                self.wfile.write(content)

        def drip(self, content):
            for position in range(len(content)):
                try:
                    self.wfile.write(content[position : position + 1])
                except OSError:
                    asked.append("GONE")
                    return
                time.sleep(dripping)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def silent_hub():
    """A hub that takes connections and never answers; gives its address."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@contextmanager
def no_hub():
    """An address at which connections are refused."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{unused.getsockname()[1]}"


@contextmanager
def unreachable_hub():
    """An address to which no connection is made and none is refused, as behind a firewall: its queue is full."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server, ExitStack() as waiting:
        for _ in range(8):
            connection = waiting.enter_context(socket.socket())
            connection.setblocking(False)
            connection.connect_ex(server.getsockname())
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
