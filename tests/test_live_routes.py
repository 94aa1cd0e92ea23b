"""The routes by which pages watch and steer, on a real aiohttp server without ComfyUI."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import jsonschema
import pytest
import torch
from aiohttp import web
from fuzz_routes import fuzz_routes
from live_server import LiveServer
from mutated_requests import RequestMaker

from streamblocks.stream.live_control import Allowed, Edit, LiveControl
from streamblocks.stream.live_news import LiveNews

from live_client import LiveClient

WRONG_TOKENS = ("", "x", "ü", "A" * 43)


@dataclass
class OpenStream:
    control: LiveControl
    news: LiveNews
    page: LiveClient
    inbox: SimpleNamespace

    def asked(self):
        """All that can be asked of the stream."""
        control = self.control
        return control.pending.values(), control.is_paused, control.is_stopped, self.news.version, self.inbox.taken


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with LiveServer() as server:
        yield server
    assert server.failures == []


@pytest.fixture
def opened(server):
    """Opens streams, each of a prompt of its own."""

    @contextmanager
    def open_stream(prompt_id="prompt", node="12:5", **more):
        control, news = LiveControl(), LiveNews()
        taken: list[bytes] = []
        inbox = SimpleNamespace(taken=taken, put=taken.append)
        with server.module("live_streams").running(prompt_id, node, "flow", control, news, **more) as token:
            yield OpenStream(control, news, LiveClient(server.port, prompt_id, node, token), inbox)

    return open_stream


def frames(count=3, height=16, width=24):
    return torch.zeros(count, height, width, 3, dtype=torch.uint8)


def asking(work):
    """Something that waits, in a thread."""
    threads = ThreadPoolExecutor(1)
    found = threads.submit(work)
    threads.shutdown(wait=False)
    return found


def wait_until(holds):
    end = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


def waiting(server, prompt_id="prompt", node="12:5"):
    streams = server.stub.app[server.module("live_routes").STREAMS]
    return streams.find(prompt_id, node).waiting


def test_the_token_goes_to_the_page_that_queued_the_prompt(server, opened):
    server.stub.sent.clear()
    with opened() as stream:
        told = {"prompt_id": "prompt", "node": "12:5", "workflow": "flow", "token": stream.page.token}
        assert server.stub.sent == [("streamblocks.stream", told, "the page")]
        assert len(stream.page.token) >= 43
        listed = stream.page.ask("GET", "/streamblocks/streams")
        assert {"prompt_id": "prompt", "node": "12:5", "workflow": "flow", "running": True} in listed.json["streams"]
        assert stream.page.token.encode() not in listed.body + stream.page.news().body


def test_without_a_client_nobody_gets_a_token(server, opened, monkeypatch):
    monkeypatch.setattr(server.stub, "client_id", None)
    server.stub.sent.clear()
    with opened():
        assert server.stub.sent == []


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
    with opened() as stream:
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
        stream.control.allowed = Allowed(strength="No video is connected.")
        version = stream.news.version
        answer = stream.page.steer(action="edit", prompt="x", strength=0.5)
        assert (answer.status, answer.error) == (409, "No video is connected.")
        assert stream.control.pending == Edit() and stream.news.version == version


def test_unknown_streams_and_numbers_that_are_none(server, opened):
    with opened() as stream:
        for prompt_id, node in (("other", "12:5"), ("prompt", "12"), ("..", ".."), ("%00", "%ed%a0%80")):
            page = LiveClient(server.port, prompt_id, node, stream.page.token)
            assert [page.news().status, page.steer(action="stop").status, page.give(b"").status] == [404] * 3
            assert page.news().error
        for query in ("version=x", "block=1.5", "points=" + "9" * 30, "version=%D9%A1", "version="):
            answer = stream.page.ask("GET", f"{stream.page.path}/news?{query}")
            assert (answer.status, bool(answer.error)) == (400, True)
        assert not stream.control.is_stopped


def test_pictures_come_once_and_late_pages_get_all(opened):
    with opened() as stream:
        stream.news.add_memory({"block": 0, "owners": [["latents", 5]], "peak": 1})
        stream.news.show_block(frames(20), block=3, blocks_made=4, state="running", track="0: a sea")
        header, jpegs = stream.page.news().news
        assert header["pictures"] == {
            "block": 3,
            "of": 20,
            "width": 24,
            "height": 16,
            "lengths": [len(jpeg) for jpeg in jpegs],
        }
        assert len(jpegs) == 16 and all(jpeg.startswith(b"\xff\xd8") for jpeg in jpegs)
        assert (header["prompt_id"], header["node"], header["workflow"]) == ("prompt", "12:5", "flow")
        assert (header["state"], header["blocks_made"], header["track"]) == ("running", 4, "0: a sea")
        assert len(header["memory"]) == header["points"] == 1
        stream.news.update(rate=3.5)
        again, none = stream.page.news(header["version"], block=3, points=1).news
        assert (again["pictures"], none, again["memory"], again["rate"]) == (None, [], [], 3.5)


def test_nothing_new_is_204(server, opened, monkeypatch):
    monkeypatch.setattr(server.module("live_waiting"), "SECONDS_TO_WAIT", 0.05)
    with opened() as stream:
        answer = stream.page.news(stream.news.version)
        assert (answer.status, answer.body) == (204, b"")
        assert waiting(server) == 0 and stream.news._listeners == ()


def test_few_wait_and_those_that_go_are_forgotten(server, opened, monkeypatch):
    monkeypatch.setattr(server.module("live_waiting"), "_SECONDS_BETWEEN_LOOKS", 0.05)
    with opened() as stream:
        ask = f"GET {stream.page.path}/news?version={stream.news.version} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        connections = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(64)]
        for connection in connections:
            connection.sendall(ask)
        wait_until(lambda: waiting(server) == 64)
        assert stream.page.news(stream.news.version).status == 503
        # Other streams' pages, and those that steer, are not held up.
        with opened("second") as second:
            assert second.page.news().status == 200
        assert stream.page.steer(action="pause").status == 200
        for connection in connections:
            assert b" 200 OK" in connection.recv(65536)
            connection.sendall(ask.replace(b"version=", b"version=1&v="))
            connection.close()
        wait_until(lambda: waiting(server) == 0 and stream.news._listeners == ())


def test_a_page_that_stops_reading_holds_up_nobody(server, opened, encodings):
    with opened("still") as stream:
        picture = torch.randint(0, 255, (16, 512, 512, 3), dtype=torch.uint8)
        stream.news.show_block(picture, block=0)
        with socket.socket() as stuck:
            stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            stuck.connect(("127.0.0.1", server.port))
            stuck.sendall(f"GET {stream.page.path}/news HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            wait_until(lambda: encodings)
            for block in range(1, 201):
                stream.news.show_block(frames(), block=block)
            header, jpegs = stream.page.news().news
            assert (header["pictures"]["block"], len(jpegs)) == (200, 3)
            # Of 201 blocks, those that were asked for; none waits in a queue.
            assert len(encodings) == 2
            assert stuck.recv(12) == b"HTTP/1.1 200"


def test_pages_share_an_encoding(server, opened, encodings):
    with opened("shared") as stream:
        version = stream.news.version
        pages = [asking(lambda: stream.page.news(version).news[1]) for _ in range(20)]
        stream.news.show_block(frames(), block=0)
        assert len({tuple(page.result(10)) for page in pages}) == 1 and len(encodings) == 1
        for block in range(1, 5):
            stream.news.show_block(frames(), block=block)
            assert len(stream.page.news().news[1]) == 3
        assert len(encodings) == 5
        # Those of earlier blocks are gone, or this table would grow with the stream.
        wait_until(lambda: len(server.stub.app[server.module("live_routes")._ENCODINGS]) <= 1)


def test_ended_streams_stay_without_pictures_and_without_a_hand_on_them(server, opened):
    kept = []
    for number in range(10):
        with opened(f"ended {number}") as stream:
            stream.page.path = stream.page.path.replace(" ", "%20")
            stream.news.show_block(frames(), block=0)
            if number == 8:
                stream.news.update(state="stopped")
            kept.append(stream)
    with pytest.raises(KeyError), opened("failed") as failed:
        raise KeyError
    assert failed.page.news().news[0]["state"] == "failed"
    assert [one.page.news().status for one in kept] == [404] * 3 + [200] * 7
    assert [one.page.news().news[0]["state"] for one in kept[7:]] == ["finished", "stopped", "finished"]
    answer = kept[9].page.steer(action="stop")
    assert (answer.status, "ended" in answer.error) == (409, True)
    assert kept[9].page.give(b"\xff\xd8\xff").status == 409
    kept[9].page.token = "x"
    assert kept[9].page.steer(action="stop").status == 403
    assert not kept[9].control.is_stopped
    listed = kept[9].page.ask("GET", "/streamblocks/streams").json["streams"]
    assert len(listed) == 8 and not any(one["running"] for one in listed)


def test_the_last_block_can_still_be_seen_then_is_dropped(server, opened, monkeypatch):
    monkeypatch.setattr(server.module("live_streams"), "_SECONDS_WITH_PICTURES", 0.2)
    with opened("last") as stream:
        stream.news.show_block(frames(), block=0)
    assert len(stream.page.news().news[1]) == 3
    wait_until(lambda: stream.news.since().pictures is None)


def test_a_page_that_waits_is_told_of_the_end(server, opened):
    with opened("end") as stream:
        version = stream.news.version
        page = asking(lambda: stream.page.news(version).news[0])
        wait_until(lambda: waiting(server, "end"))
    assert page.result(10)["state"] == "finished"


def test_a_node_that_runs_twice_is_the_newer_stream(opened):
    with opened("twice") as first:
        with opened("twice") as second:
            assert first.page.steer(action="stop").status == 403
        # The end of the older one does not end or move the newer one's.
        assert second.page.steer(action="stop").status == 409
    assert second.page.news().news[0]["state"] == "finished"


def test_frames_go_to_the_inbox(server, opened):
    with opened() as stream:
        assert stream.page.give(b"\xff\xd8\xff").error == "This stream takes no frames."
    with opened(inbox=stream.inbox) as stream:
        assert stream.page.news().news[0]["takes_frames"]
        whole = b"\xff\xd8\xff".ljust(2 * 2**20, b"x")
        assert stream.page.give(whole).status == 200
        refused = ((whole + b"x", "image/jpeg"), (b"PNG", "image/jpeg"), (b"", "image/jpeg"), (whole, "image/png"))
        assert [stream.page.give(*one).status for one in refused] == [413, 400, 400, 415]
        assert stream.page.give(whole, token="x").status == 403

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


def test_routes_are_added_once(server):
    routes, app = web.RouteTableDef(), web.Application()
    live_routes = server.module("live_routes")
    live_routes.add_routes(routes, app)
    count, streams = len(routes), app[live_routes.STREAMS]
    live_routes.add_routes(routes, app)
    assert (len(routes), app[live_routes.STREAMS]) == (count, streams)


def test_routes_that_cannot_be_added_stop_no_import(server, monkeypatch, caplog):
    monkeypatch.setattr(server.stub, "routes", object())
    with caplog.at_level(logging.WARNING):
        server.module("server_routes").register_routes()
    assert "cannot be watched" in caplog.text


def test_without_a_server_streams_run_as_ever(server, opened, monkeypatch):
    live_streams = server.module("live_streams")
    bare = SimpleNamespace(client_id="x", send_sync=lambda *_: pytest.fail("told a page"))
    monkeypatch.setattr(live_streams.PromptServer, "instance", bare)
    news = LiveNews()
    with live_streams.running("p", "1", None, LiveControl(), news) as token:
        news.show_block(frames(), block=0)
        assert token
    assert news.since().header["state"] == "finished" and news.since().pictures is None
    monkeypatch.setattr(live_streams.PromptServer, "instance", server.stub)
    server.stub.sent.clear()
    with opened(None):
        assert server.stub.sent == []


def test_a_loop_that_has_ended_stops_no_stream(server):
    """The server may go while a stream runs."""
    loop = asyncio.new_event_loop()
    changed = asyncio.Event()
    wake = server.module("live_waiting")._waker(loop, changed)
    loop.close()
    news = LiveNews()
    news.add_listener(wake)
    assert news.update() == 1
