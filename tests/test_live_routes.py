"""The routes by which pages watch, on a real aiohttp server without ComfyUI."""

from __future__ import annotations

import asyncio
import logging
import socket
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from aiohttp import web

from streamblocks.stream.live_control import LiveControl
from streamblocks.stream.live_news import LiveNews

from live_client import LiveClient
from live_pages import asking, frames, open_stream, serve_pages, wait_until, waiting


@pytest.fixture(scope="module")
def server():
    yield from serve_pages()


@pytest.fixture
def opened(server):
    """Opens streams."""
    return partial(open_stream, server)


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


def test_unknown_streams_and_numbers_that_are_none(server, opened):
    with opened() as stream:
        for prompt_id, node in (("other", "12:5"), ("prompt", "12"), ("..", ".."), ("%00", "%ed%a0%80")):
            page = LiveClient(server.port, prompt_id, node, stream.page.token)
            assert [page.news().status, page.steer(action="stop").status, page.give(b"").status] == [404] * 3
            assert page.news().error
        for query in ("version=x", "block=1.5", "points=" + "9" * 30, "version=%D9%A1", "version=", "pictures=x"):
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
            "first": 0,
            "end": 20,
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


def test_parts_of_a_block_come_as_they_are_decoded(opened):
    with opened() as stream:
        for first in (0, 4):
            stream.news.show_part(frames(4), block=3, first=first, of=12)
        header, jpegs = stream.page.news(block=2, pictures=12).news
        told = header["pictures"]
        assert (told["block"], told["first"], told["end"], told["of"], len(jpegs)) == (3, 0, 8, 12, 8)
        assert told["lengths"] == [len(jpeg) for jpeg in jpegs]
        stream.news.show_part(frames(4), block=3, first=8, of=12)
        header, jpegs = stream.page.news(header["version"], block=3, pictures=8).news
        assert (header["pictures"]["first"], header["pictures"]["end"], len(jpegs)) == (8, 12, 4)


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
    table = server.stub.app[server.module("live_routes")._ENCODINGS]
    before = len(table)
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
        wait_until(lambda: len(table) <= before + 1)


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
