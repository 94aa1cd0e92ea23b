"""Code is allowed by the page of this machine, once, behind a refused run: by no workflow, site or machine else."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from live_server import LiveServer

from streamblocks.stream.code_consent import allow_code, forbid_place, read_allowed_code
from streamblocks.stream.code_files import CodeFile, RepositoryCode
from streamblocks.stream.shown_code import shown_text

from live_client import LiveClient
from live_pages import serve_pages

CODE = RepositoryCode("/models/evil", None, (CodeFile("blocks.py", "a = 1  # \u202e x\x1b[2J\n".encode()),))


@pytest.fixture(scope="module")
def server():
    yield from serve_pages()


class Page:
    """A browser's page on ComfyUI's own machine, unless headers say otherwise."""

    def __init__(self, server: LiveServer) -> None:
        self.client = LiveClient(server.port, "", "")
        own = f"127.0.0.1:{server.port}"
        self.headers = {"Host": own, "Origin": f"http://{own}", "Content-Type": "application/json"}
        self.told: dict[str, str] = {}
        self.file = Path()

    def post(self, action, headers=None, **body):
        path = f"/streamblocks/code/{self.told['id']}/{action}"
        kept = {name: value for name, value in (self.headers | (headers or {})).items() if value is not None}
        return self.client.ask("POST", path, json.dumps(body).encode(), kept)

    def show(self, **headers):
        return self.post("show", headers, token=self.told["token"])

    def allow(self, nonce, digest=CODE.digest, **headers):
        return self.post("allow", headers, token=self.told["token"], nonce=nonce, digest=digest)


@pytest.fixture
def page(server, tmp_path, monkeypatch):
    """That has just had a run refused."""
    folders = SimpleNamespace(get_system_user_directory=lambda name: str(tmp_path / f"__{name}"))
    monkeypatch.setitem(sys.modules, "folder_paths", folders)
    monkeypatch.delitem(sys.modules, "streamblocks.host.allowed_code", raising=False)
    server.stub.sent.clear()
    room = server.module("allowed_code")
    room.ask_about_code(CODE)
    ((event, told, client),) = server.stub.sent
    assert (event, client, told["place"]) == ("streamblocks.code", "the page", CODE.place)
    page = Page(server)
    page.told, page.file = told, room.allowed_code_file()
    return page


def test_a_click_allows_what_was_shown(page):
    shown = page.show()
    assert shown.status == 200 and shown.json["digest"] == CODE.digest
    assert shown.json["files"][0]["text"] == "a = 1  # \\u202e x\\x1b[2J\n"
    assert not page.file.exists()
    assert page.allow(shown.json["nonce"]).json == {"allowed": CODE.digest}
    assert read_allowed_code(page.file).admits(CODE)
    # Once.
    assert page.show().status == 403


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": None},
        {"Origin": "null"},
        {"Origin": "http://evil.example"},
        {"Origin": "http://127.0.0.1:1"},
        {"Host": "evil.example", "Origin": "http://evil.example"},
        {"Host": "192.168.1.5:8188", "Origin": "http://192.168.1.5:8188"},
        {"Host": "localhost.evil.example", "Origin": "http://localhost.evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"X-Forwarded-For": "1.2.3.4"},
        {"Via": "1.1 proxy"},
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
    ],
)
def test_other_sites_machines_and_forms_are_refused(page, headers):
    refused = page.show(**headers)
    assert refused.status in (403, 415) and refused.error
    nonce = page.show().json["nonce"]
    assert page.allow(nonce, **headers).status in (403, 415)
    assert not page.file.exists()
    # Nothing of it took the page's own answer.
    assert page.allow(nonce).status == 200


def test_another_machine_is_refused(server):
    check = server.module("code_routes")._check_same_machine
    refusal = server.module("request_bodies").RefusedRequestError
    for peer, may in (("127.0.0.1", True), ("::1", True), ("::ffff:127.0.0.1", True), ("192.168.1.5", False)):
        transport = SimpleNamespace(get_extra_info=lambda _, peer=peer: (peer, 1))
        headers = {"Host": "localhost:8188", "Origin": "http://localhost:8188"}
        request = SimpleNamespace(transport=transport, headers=headers)
        if may:
            check(request)
        else:
            with pytest.raises(refusal, match="own machine"):
                check(request)


def test_a_nonce_counts_once_and_for_what_was_shown(page):
    assert page.post("show", token="x").status == 403
    assert page.allow("x").status == 403
    nonce = page.show().json["nonce"]
    assert page.allow("x").status == 403
    # One wrong try costs it.
    assert page.allow(nonce).status == 403
    first, second = page.show().json["nonce"], page.show().json["nonce"]
    assert page.allow(first).status == 403
    third = page.show().json["nonce"]
    assert page.allow(second).status == 403 and page.allow(third).status == 403
    assert page.allow(page.show().json["nonce"], digest="0" * 64).status == 409
    assert page.post("allow", token=page.told["token"]).status == 400
    assert not page.file.exists()


def test_without_a_page_nobody_is_asked(page, server, monkeypatch):
    monkeypatch.setattr(server.stub, "client_id", None)
    server.stub.sent.clear()
    server.module("allowed_code").ask_about_code(CODE)
    assert server.stub.sent == []


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"version": 2, "allowed": []}', b"[" * 100_000, b"\xff"])
def test_a_list_that_cannot_be_used_allows_nothing_and_stays(tmp_path, content):
    file = tmp_path / "list.json"
    file.write_bytes(content)
    allowed = read_allowed_code(file)
    assert not allowed.consents and str(file) in allowed.problem
    with pytest.raises(ValueError, match="cannot be used"):
        allow_code(file, CODE)
    assert file.read_bytes() == content


def test_consents_are_kept_side_by_side_and_taken_back(tmp_path):
    file = tmp_path / "folder" / "list.json"
    other = RepositoryCode("owner/name", "c" * 40, CODE.files)
    for code in (CODE, other, CODE):
        allow_code(file, code)
    assert len(json.loads(file.read_text())["allowed"]) == 2 and file.stat().st_mode & 0o077 == 0
    assert forbid_place(file, CODE.place) == 1
    allowed = read_allowed_code(file)
    assert allowed.admits(other) and not allowed.admits(CODE)
    assert not allowed.admits(RepositoryCode("owner/name", "d" * 40, CODE.files))
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_nothing_hides():
    assert shown_text("a\tb\n\r\x00\u200b\u2028é中") == "a\tb\n\\x0d\\x00\\u200b\\u2028é中"
