"""The routes by which pages steer, on a real aiohttp server without ComfyUI."""

from __future__ import annotations

import json
import socket
from functools import partial
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
from fuzz_routes import fuzz_routes
from mutated_requests import RequestMaker

from streamblocks.stream.live_control import Allowed, Edit, Refusal

from live_client import LiveClient
from live_pages import ListInbox, asking, open_stream, serve_pages, wait_until, waiting

WRONG_TOKENS = ("", "x", "ü", "A" * 43)


@pytest.fixture(scope="module")
def server():
    yield from serve_pages()


@pytest.fixture
def opened(server):
    """Opens streams."""
    return partial(open_stream, server)


def test_edits_reach_the_stream_and_all_pages(opened):
    with opened() as stream:
        version = stream.news.version
        others = [asking(lambda: stream.page.news(version).news[0]) for _ in range(2)]
        answer = stream.page.steer(action="edit", prompt="rain", attention_bias=1)
        assert answer.json == {"version": version + 1}
        assert stream.control.pending == Edit(prompt="rain", attention_bias=1)
        assert [one.result(10)["pending"] for one in others] == [{"prompt": "rain", "attention_bias": 1.0}] * 2
        # The last one wins, and both see it.
        stream.page.steer(action="edit", prompt="snow")
        assert stream.page.news().news[0]["pending"] == {"prompt": "snow", "attention_bias": 1.0}
        for action, state in (("pause", "pausing"), ("resume", "loading"), ("stop", "stopping")):
            assert stream.page.steer(action=action).status == 200
            assert stream.page.news().news[0]["state"] == state
        assert stream.control.is_stopped


def test_a_thousand_edits(server, opened):
    with opened() as stream:
        first = stream.news.version
        late = asking(lambda: stream.page.news(first).news[0])
        wait_until(lambda: waiting(server))
        body = {"token": stream.page.token, "action": "edit"}
        sent = [json.dumps(body | {"prompt": f"prompt {n}"}).encode() for n in range(1000)]
        head = f"POST {stream.page.path}/control HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        got = b""
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
            for n in range(0, 1000, 50):
                pieces = (f"{head}Content-Length: {len(one)}\r\n\r\n".encode() + one for one in sent[n : n + 50])
                connection.sendall(b"".join(pieces))
                while got.count(b"HTTP/1.1 200 OK") < n + 50:
                    got += connection.recv(65536)
        assert stream.news.version == first + 1000
        assert stream.control.pending == Edit(prompt="prompt 999")
        assert late.result(10)["version"] > first


@pytest.mark.parametrize("token", [None, *WRONG_TOKENS])
def test_without_the_token_nothing_changes(opened, token):
    with opened(inbox=ListInbox()) as stream:
        before = stream.asked()
        given = {} if token is None else {"token": token}
        for request in ({"action": "edit", "prompt": "x"}, *({"action": name} for name in ("pause", "resume", "stop"))):
            answer = stream.page.post(json.dumps(given | request).encode())
            assert answer.status == (400 if token is None else 403)
            assert "token" in answer.error.lower()
        assert stream.page.give(b"\xff\xd8\xff", token="").status == 403
        assert stream.asked() == before


REFUSED = [
    (b"", 400),
    (b"[]", 400),
    (b"[" * 65_536, 400),
    (b'{"a":' * 10_000, 400),
    (b"\xff\xfe", 400),
    (b'\xef\xbb\xbf{"token":"TOKEN","action":"stop"}', 400),
    (b'{"token":"TOKEN","action":"stop"} {}', 400),
    (b'{"token":"TOKEN","action":"stop","action":"stop"}', 400),
    (b'{"token":"TOKEN","action":"stop","more":1}', 400),
    (b'{"token":"TOKEN","action":"stop","prompt":"x"}', 400),
    (b'{"token":"TOKEN","action":"stop","prompt":null}', 400),
    (b'{"token":"TOKEN","action":"Stop"}', 400),
    (b'{"token":"TOKEN"}', 400),
    (b'{"token":["TOKEN"],"action":"stop"}', 400),
    (b'{"token":"TOKEN","action":"edit"}', 400),
    (b'{"token":"TOKEN","action":"edit","prompt":""}', 400),
    (b'{"token":"TOKEN","action":"edit","prompt":"\\ud800"}', 400),
    (b'{"token":"TOKEN","action":"edit","prompt":"\xed\xa0\x80"}', 400),
    (b'{"token":"TOKEN","action":"edit","prompt":1}', 400),
    (b'{"token":"TOKEN","action":"edit","prompt":"%b"}' % (b"x" * 10_001), 400),
    (b'{"token":"TOKEN","action":"edit","strength":true}', 400),
    (b'{"token":"TOKEN","action":"edit","strength":"0.5"}', 400),
    (b'{"token":"TOKEN","action":"edit","strength":NaN}', 400),
    (b'{"token":"TOKEN","action":"edit","strength":-Infinity}', 400),
    (b'{"token":"TOKEN","action":"edit","strength":1e999}', 400),
    (b'{"token":"TOKEN","action":"edit","strength":1.0000001}', 400),
    (b'{"token":"TOKEN","action":"edit","strength":%b}' % (b"1" * 400), 400),
    (b'{"token":"TOKEN","action":"edit","strength":%b}' % (b"1" * 60_000), 400),
    (b'{"token":"TOKEN","action":"edit","attention_bias":0}', 400),
    (b'{"token":"TOKEN","action":"edit","attention_bias":0.5,"strength":-0.1}', 400),
    (b" " * 65_537, 413),
    (b" " * 10_000_000, 413),
]


def test_what_the_schema_forbids_is_refused_in_one_sentence(opened):
    with opened() as stream:
        before = stream.asked()
        for body, status in REFUSED:
            answer = stream.page.post(body.replace(b"TOKEN", stream.page.token.encode()))
            assert (answer.status, len(answer.error) < 250) == (status, True), body[:100]
        whole = json.dumps({"token": stream.page.token, "action": "stop"}).encode()
        for content_type in ("text/plain", "application/jsonx", "", "multipart/form-data"):
            assert stream.page.post(whole, content_type).status == 415
        assert stream.page.post(whole, **{"Content-Encoding": "gzip"}).status == 415
        assert stream.asked() == before
        assert stream.page.post(whole.rjust(65_536)).status == 200


def test_a_body_is_read_no_further_than_its_limit(opened):
    with opened() as stream:
        head = f"POST {stream.page.path}/control HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n".encode()
        # Answered although most of the body has not come.
        assert b" 413 " in stream.page.raw(head + b"Content-Length: 10000000\r\n\r\n{")
        chunk = b"10001\r\n" + b" " * 65_537
        assert b" 413 " in stream.page.raw(head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk)
        assert b" 400 " in stream.page.raw(head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n")


def test_a_body_that_does_not_come(server, opened, monkeypatch):
    monkeypatch.setattr(server.module("request_bodies"), "SECONDS_TO_SEND", 0.1)
    with opened() as stream:
        head = f"POST {stream.page.path}/control HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n".encode()
        assert b" 408 " in stream.page.raw(head + b"Content-Length: 100\r\n\r\n{")


def test_what_has_no_effect_is_refused_with_its_reason(opened):
    with opened() as stream:
        stream.control.allow(Allowed(strength="No video is connected."))
        version = stream.news.version
        answer = stream.page.steer(action="edit", prompt="x", strength=0.5)
        assert (answer.status, answer.error) == (409, "No video is connected.")
        assert stream.control.pending == Edit() and stream.news.version == version


def test_what_a_page_can_cause_is_refused_with_the_id_of_its_text(opened):
    """The page shows its own language's text; without an id it would show English to everybody."""
    with opened() as stream:
        stream.control.allow(Allowed(strength=Refusal("No video is connected.", "refused_no_video")))
        asked: dict[str, dict[str, Any]] = {
            "refused_no_video": {"action": "edit", "strength": 0.5},
            "refused_too_long": {"action": "edit", "prompt": "x" * 10_001},
            "refused_half_character": {"action": "edit", "prompt": "\ud800"},
            "refused_token": {"action": "pause", "token": "another"},
        }
        assert [stream.page.steer(**one).json["id"] for one in asked.values()] == list(asked)
        assert stream.page.steer(action="edit", prompt="x" * 70_000).json["id"] == "refused_too_long"
        assert "id" not in stream.page.steer(action="jump").json
        assert stream.news.since().header["allowed"]["strength"] == "No video is connected."


def test_frames_go_to_the_inbox(opened):
    with opened() as stream:
        assert stream.page.give(b"\xff\xd8\xff").error == "This stream takes no frames."
    with opened(inbox=ListInbox()) as stream:
        assert stream.page.news().news[0]["takes_frames"]
        whole = b"\xff\xd8\xff".ljust(2 * 2**20, b"x")
        assert stream.page.give(whole).status == 200
        refused = ((whole + b"x", "image/jpeg"), (b"PNG", "image/jpeg"), (b"", "image/jpeg"), (whole, "image/png"))
        assert [stream.page.give(*one).status for one in refused] == [413, 400, 400, 415]
        assert stream.page.give(whole, token="x").status == 403
        assert stream.inbox.taken == [whole]

    def refuse(jpeg):
        raise ValueError("The picture is too wide.")

    with opened(inbox=SimpleNamespace(put=refuse)) as stream:
        answer = stream.page.give(b"\xff\xd8\xff")
        assert (answer.status, answer.error) == (400, "The picture is too wide.")


def test_the_schema_means_what_is_accepted(server):
    control = server.module("control_request")
    schema = LiveClient(server.port, "", "").ask("GET", "/streamblocks/control-schema").json
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    assert set(schema["properties"]) == {"token", "action", "prompt", "strength", "attention_bias"}
    maker, counts = RequestMaker(0, "token", "/x"), {True: 0, False: 0}
    while sum(counts.values()) < 4000:
        value = maker.value()
        text = json.dumps(value, ensure_ascii=False)
        if "\ud800" in text or "NaN" in text or "Infinity" in text:
            continue
        try:
            control.read_control(value)
            accepted = True
        except server.module("request_bodies").RefusedRequestError:
            accepted = False
        assert accepted == validator.is_valid(value), value
        counts[accepted] += 1
    assert min(counts.values()) > 500


def test_a_short_fuzz(server):
    figures, told = fuzz_routes(1500, seed=1)
    assert figures.bodies == 1500 and figures.accepted > 100
    told |= {"figures": figures}
    assert (figures.wrongly_accepted, figures.wrongly_refused, figures.crashes) == (0, 0, 0), told
    assert (figures.hangs_over_1_s, figures.server_errors, figures.changed_without_token) == (0, 0, 0), told
    assert figures.allowed_without_showing == 0
