"""The service under attack: slow pictures, slow clients, other origins, a disk that cannot be written to."""

import asyncio
import base64
import contextlib
import gc
import http.client
import io
import json
import os
import re
import resource
import signal
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from benchmarks.uploads import bmp_of_runs, jpeg_of_scans, saved, tiff_of_tile
from deploy.common.cli import UserError
from deploy.common.imaging import preprocess, read_rgb
from deploy.service import app as service
from deploy.service.app import create_app
from deploy.service.decoding import Decoders
from deploy.service.uploads import Limits
from tests.serving import MB, PREDICT, Process, picture_file
from tests.test_serve import brightness_model, post, served

SOON = 20  # seconds; far beyond what anything here takes
DESCRIPTION = {"input_size": [16, 8], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "white_level": None}
# Decodes for seconds: what the default limits refuse, and these do not.
SLOW = bmp_of_runs(4700, 4700, b"\1\0\0\0" * 4700)
PATIENT = Limits(pixels=400_000_000, decode_seconds=60)


# ---- decoders


def with_decoders(limits, use, count=1):
    """Run the coroutine function `use` on so many decoders."""

    async def run():
        decoders = Decoders(count, limits)
        try:
            return await asyncio.wait_for(use(decoders), 3 * SOON)
        finally:
            await decoders.close()

    return asyncio.run(run())


def decoder_pids():
    """The decoders of this process."""
    children = Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split()
    return {int(pid) for pid in children if b"decoder.py" in Path(f"/proc/{pid}/cmdline").read_bytes()}


def test_a_decoder_says_what_reading_in_the_process_says():
    async def use(decoders):
        first = await decoders.decode(picture_file(200), DESCRIPTION)
        pids = decoder_pids()
        with pytest.raises(UserError, match=r"^image: cannot be read as a picture \(not a picture, or damaged\)$"):
            await decoders.decode(b"no picture", DESCRIPTION)
        second = await decoders.decode(picture_file(0), DESCRIPTION)
        assert decoder_pids() == pids  # an error costs no process
        return first, second

    for brightness, decoded in zip((200, 0), with_decoders(Limits(), use), strict=True):
        picture = read_rgb(Path("image"), io.BytesIO(picture_file(brightness)))
        np.testing.assert_array_equal(decoded.item, preprocess(picture, 16, 8)[0])


def test_a_decoder_that_nobody_waits_for_is_killed():
    async def use(decoders):
        slow = asyncio.ensure_future(decoders.decode(SLOW, DESCRIPTION))
        await asyncio.sleep(1)
        pids = decoder_pids()
        begun = time.monotonic()
        slow.cancel()
        await decoders.decode(picture_file(), DESCRIPTION)
        assert pids
        assert not pids & decoder_pids()
        return time.monotonic() - begun

    assert with_decoders(PATIENT, use) < 5


def test_a_decoder_that_is_nearly_done_may_finish():
    async def use(decoders):
        await decoders.decode(picture_file(), DESCRIPTION)
        pids = decoder_pids()
        for _ in range(5):
            quick = asyncio.ensure_future(decoders.decode(picture_file(), DESCRIPTION))
            await asyncio.sleep(0)
            quick.cancel()
            with pytest.raises(asyncio.CancelledError):
                await quick
        await decoders.decode(picture_file(), DESCRIPTION)
        assert decoder_pids() == pids

    with_decoders(Limits(), use)


def test_a_picture_that_takes_too_long_is_refused_and_the_next_is_decoded():
    async def use(decoders):
        with pytest.raises(UserError, match=r"^image: takes more than 1 seconds to decode"):
            await decoders.decode(SLOW, DESCRIPTION)
        await decoders.decode(picture_file(), DESCRIPTION)

    with_decoders(Limits(pixels=400_000_000, decode_seconds=1), use)


def test_a_picture_that_takes_too_much_memory_is_refused_and_the_next_is_decoded(monkeypatch):
    monkeypatch.setattr(Limits, "decoder_bytes", 50 * MB)

    async def use(decoders):
        with pytest.raises(UserError, match=r"\(MemoryError\)"):
            await decoders.decode(picture_file(size=(5000, 5000)), DESCRIPTION)
        await decoders.decode(picture_file(), DESCRIPTION)

    with_decoders(Limits(), use)


def test_a_decoder_that_dies_costs_one_picture_and_between_pictures_none():
    async def use(decoders):
        slow = asyncio.ensure_future(decoders.decode(SLOW, DESCRIPTION))
        await asyncio.sleep(1)
        os.kill(decoder_pids().pop(), signal.SIGKILL)
        with pytest.raises(UserError, match="makes its decoder fail"):
            await slow
        await decoders.decode(picture_file(), DESCRIPTION)
        os.kill(decoder_pids().pop(), signal.SIGKILL)
        await asyncio.sleep(0.5)
        await decoders.decode(picture_file(), DESCRIPTION)

    with_decoders(PATIENT, use)


def test_what_the_default_limits_let_pass_fits_into_the_memory_of_a_decoder():
    async def use(decoders):
        for mode, file_format in (("RGBA", "PNG"), ("CMYK", "JPEG"), ("CMYK", "TIFF"), ("RGBA", "WEBP")):
            options = {"TIFF": {"compression": "tiff_adobe_deflate"}, "WEBP": {"method": 0}}.get(file_format, {})
            content = saved(Image.new(mode, (6400, 5000)), file_format, turned=True, **options)
            assert (await decoders.decode(content, DESCRIPTION)).size == (6400, 5000)

    with_decoders(Limits(), use)


# ---- uploads


class RawClient:
    """A client of the application that sends what it is told to, when it is told to."""

    def __init__(self, app, kind="application/json", path=PREDICT):
        self.messages, self.sent = asyncio.Queue(), []
        headers = [(b"content-type", kind.encode())]
        scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}
        self.task = asyncio.ensure_future(app(scope, self.messages.get, self._send))

    async def _send(self, message):
        self.sent.append(message)

    def body(self, content, more=False):
        self.messages.put_nowait({"type": "http.request", "body": content, "more_body": more})

    def hang_up(self):
        self.messages.put_nowait({"type": "http.disconnect"})

    async def status(self):
        await asyncio.wait_for(self.task, SOON)
        return self.sent[0]["status"]


def with_app(limits, use, **kind):
    """Run the coroutine function `use` on the application and its model."""
    model = served(**kind)

    async def run():
        app = create_app({"bottle": model}, limits)
        async with app.router.lifespan_context(app):
            return await asyncio.wait_for(use(app, model), 3 * SOON)

    return asyncio.run(run())


BODY = json.dumps({"image": base64.b64encode(picture_file()).decode()}).encode()


def test_whoever_announces_a_body_and_sends_nothing_takes_no_place():
    async def use(app, model):
        silent = [RawClient(app) for _ in range(10)]
        for client in silent[:5]:
            client.body(BODY[:-1], more=True)
        await asyncio.sleep(0.1)
        assert model.batcher.taken == 0
        client = RawClient(app)
        client.body(BODY)
        assert await client.status() == 200
        for client in silent:
            client.hang_up()
            assert await client.status() == 400

    with_app(Limits(), use, places=1)


def test_the_oldest_of_the_bodies_that_are_coming_gives_way():
    async def use(app, _):
        stalled = [RawClient(app) for _ in range(3)]
        for client in stalled:
            client.body(BODY[:-1], more=True)
            await asyncio.sleep(0.05)
        honest = RawClient(app)
        honest.body(BODY)
        assert await honest.status() == 200
        assert await stalled[0].status() == 503
        assert dict(stalled[0].sent[0]["headers"])[b"retry-after"] == b"1"
        stalled[1].body(BODY[-1:])
        assert await stalled[1].status() == 200  # it did not have to
        stalled[2].hang_up()
        assert await stalled[2].status() == 400
        for _ in range(10):  # nothing of all that still counts
            client = RawClient(app)
            client.body(BODY)
            assert await client.status() == 200

    with_app(Limits(held_bytes=3 * len(BODY)), use)


def test_a_body_that_finds_room_nowhere_is_told_to_come_again():
    free = threading.Event()

    def stuck(batch):
        assert free.wait(SOON)
        return brightness_model(batch)

    async def use(app, model):
        waiting = [RawClient(app) for _ in range(2)]
        for client in waiting:
            client.body(BODY)
        while model.batcher.taken < 2:
            await asyncio.sleep(0.01)
        refused = RawClient(app)
        refused.body(BODY)
        assert await refused.status() == 503
        free.set()
        assert [await client.status() for client in waiting] == [200, 200]

    with_app(Limits(held_bytes=int(2.5 * len(BODY))), use, run=stuck)


def test_whoever_hangs_up_gives_up_the_place():
    free = threading.Event()

    def stuck(batch):
        assert free.wait(SOON)
        return brightness_model(batch)

    async def use(app, model):
        for _ in range(3):
            client = RawClient(app)
            client.body(BODY)
            while model.batcher.taken < 1:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            client.hang_up()
            assert await client.status() == 400
            assert model.batcher.taken == 0
        free.set()

    with_app(Limits(), use, run=stuck, places=1)


def test_what_was_refused_is_held_no_longer():
    body = json.dumps({"image": base64.b64encode(bytes(6 * MB)).decode()}).encode()

    def memory():
        return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024

    async def use(app, _):
        for i in range(12):
            client = RawClient(app)
            client.body(body)
            assert await client.status() == 422
            if i == 3:
                before = memory()
        assert memory() - before < 25  # of 48 MB that came since

    gc.disable()  # which would free circles at some time
    try:
        with_app(Limits(), use)
    finally:
        gc.enable()


def test_uploads_need_no_disk(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/absent")
    content = picture_file(size=(1000, 1000), file_format="BMP")
    with TestClient(create_app({"bottle": served()}, Limits())) as client:
        assert len(content) > 2 * MB
        assert post(client, content).json()["score"] == 0.75


def test_a_form_in_a_charset_that_is_slow_to_decode_is_refused_at_once():
    field = b'--b\r\nContent-Disposition: form-data; name="map"\r\n\r\na-' + b"b" * 1_000_000 + b"\r\n--b--\r\n"
    with TestClient(create_app({"bottle": served()}, Limits())) as client:
        begun = time.process_time()
        kind = "multipart/form-data; boundary=b; charset=punycode"
        answer = client.post(PREDICT, content=field, headers={"Content-Type": kind})
        assert (answer.status_code, "4KB" in answer.json()["detail"]) == (400, True)
        assert time.process_time() - begun < 2


def test_regions_and_maps_are_made_beside_the_event_loop(monkeypatch):
    decide = service.decide

    def decide_beside(*args):
        with pytest.raises(RuntimeError, match="no running event loop"):
            asyncio.get_running_loop()
        return decide(*args)

    monkeypatch.setattr(service, "decide", decide_beside)
    with TestClient(create_app({"bottle": served()}, Limits())) as client:
        assert post(client, picture_file(), map="true").json()["map"]


# ---- other origins


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),  # no browser
        ({"Origin": "http://testserver"}, 200),
        ({"Origin": "http://testserver", "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Origin": "https://proxied.example", "Sec-Fetch-Site": "same-origin"}, 200),  # the proxy changes Host
        ({"Sec-Fetch-Site": "none"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://testserver:8000"}, 403),
        ({"Origin": "http://testserver.evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://[", "Sec-Fetch-Site": ""}, 403),
        ({"Origin": "http://testserver", "Sec-Fetch-Site": "same-site"}, 403),
        ({"Origin": "http://evil.example", "Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Origin": "https://friend.example", "Sec-Fetch-Site": "cross-site"}, 200),
    ],
)
def test_pages_of_other_origins_may_not_post_unless_they_are_allowed_to(headers, status):
    with TestClient(create_app({"bottle": served()}, Limits(), ["https://friend.example"])) as client:
        answer = client.post(PREDICT, files={"image": ("a.png", picture_file())}, headers=headers)
        assert answer.status_code == status, answer.text
        friend = headers.get("Origin") == "https://friend.example"
        assert (answer.headers.get("access-control-allow-origin") == "https://friend.example") == friend


def test_all_pages_may_post_where_that_is_asked_for():
    with TestClient(create_app({"bottle": served()}, Limits(), ["*"])) as client:
        answer = client.post(
            PREDICT, files={"image": ("a.png", picture_file())}, headers={"Origin": "http://a", "Sec-Fetch-Site": "x"}
        )
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "*")


# ---- the process


class Honest:
    """A client that asks at once and counts on an answer."""

    def __init__(self, url):
        self.host = url.removeprefix("http://")

    def get(self, path):
        with contextlib.closing(http.client.HTTPConnection(self.host, timeout=SOON)) as connection:
            connection.request("GET", path)
            return connection.getresponse().status

    def post(self, content):
        body = json.dumps({"image": base64.b64encode(content).decode()})
        with contextlib.closing(http.client.HTTPConnection(self.host, timeout=SOON)) as connection:
            connection.request("POST", PREDICT, body, {"Content-Type": "application/json"})
            return connection.getresponse().status


def connected(url, data):
    """A connection on which the data was sent."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=SOON)
    connection.sendall(data)
    return connection


def head(length):
    return f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"


def test_slow_pictures_whose_clients_hang_up_keep_nobody_and_the_end_waiting(exported):
    body = json.dumps({"image": base64.b64encode(SLOW).decode()}).encode()
    with Process("--models", exported, "--max_pixels", 400_000_000, "--upload_seconds", 3) as process:
        honest = Honest(process.url)
        assert honest.post(picture_file()) == 200
        for _ in range(4):
            connected(process.url, head(len(body)).encode() + body).close()
        begun = time.monotonic()
        assert honest.post(picture_file()) == 200
        assert time.monotonic() - begun < 5
        with connected(process.url, head(len(body)).encode() + body):
            time.sleep(1)  # the decoder is at work
            begun = time.monotonic()
            assert process.end() == (0, "")
            assert time.monotonic() - begun < 5


def test_the_bombs_cost_the_process_nothing(exported):
    with Process("--models", exported) as process:
        honest = Honest(process.url)
        begun = time.monotonic()
        for bomb in (jpeg_of_scans(4000, 5600), tiff_of_tile(12_000)):
            assert honest.post(bomb) == 422
        assert honest.post(picture_file()) == 200
        assert time.monotonic() - begun < 5


@pytest.fixture
def few_files():
    """Lets this process open many files; gives what starts another that may open 256."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2000:
        pytest.skip("this process may open too few files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2000), hard))
    yield ["bash", "-c", 'ulimit -n 256; exec "$@"', "-"]
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    "sent",
    [b"GET / HTTP/1.1\r\nHost: x\r\n", head(MB).encode(), head(MB).encode() + bytes(1000)],
    ids=["half of the headers", "no body", "half of a body"],
)
def test_three_hundred_connections_that_wait_keep_nobody_out(exported, few_files, sent):
    options = ("--models", exported, "--upload_seconds", 4)
    with Process(*options, before=few_files) as process, contextlib.ExitStack() as open_ones:
        honest = Honest(process.url)
        for _ in range(300):
            open_ones.enter_context(connected(process.url, sent))
        begun = time.monotonic()
        for _ in range(3):
            assert honest.get("/health/live") == 200
            assert honest.post(picture_file()) == 200
        assert time.monotonic() - begun < 5
        assert process.end() == (0, "")


def test_headers_have_a_deadline(exported):
    with Process("--models", exported) as process, connected(process.url, b"GET / HTTP/1.1\r\n") as connection:
        begun = time.monotonic()
        assert connection.recv(1) == b""
        assert 8 < time.monotonic() - begun < 15


def test_those_who_ask_for_files_and_do_not_read_keep_nobody_out(exported, few_files):
    ask = b"GET /static-offline-docs/swagger-ui-bundle.js HTTP/1.1\r\nHost: x\r\n\r\n"
    options = ("--models", exported, "--upload_seconds", 2)
    with Process(*options, before=few_files) as process, contextlib.ExitStack() as open_ones:
        for _ in range(300):
            open_ones.enter_context(connected(process.url, ask))
        assert Honest(process.url).post(picture_file()) == 200
        time.sleep(3)  # then the files are closed
        assert Honest(process.url).get("/static-offline-docs/swagger-ui-bundle.js") == 200


READ_ONLY = """for folder in $(cut -d' ' -f2 /proc/self/mounts); do
  mount -o remount,bind,ro "$folder" 2> /dev/null
done
if touch /tmp/written 2> /dev/null; then exit 3; fi
exec env -i "$@"
"""


def test_it_runs_without_home_on_a_disk_that_cannot_be_written_to(exported):
    before = ["unshare", "--map-root-user", "--mount", "sh", "-c", READ_ONLY, "-"]
    if subprocess.run([*before, "true"], capture_output=True).returncode:
        pytest.skip("no namespaces to mount in")
    with Process("--models", exported, before=before) as process:
        assert Honest(process.url).post(picture_file(size=(1000, 1000), file_format="BMP")) == 200
        form = b'--b\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n'
        form += picture_file(size=(1000, 1000), file_format="BMP") + b"\r\n--b--\r\n"
        with contextlib.closing(http.client.HTTPConnection(Honest(process.url).host, timeout=SOON)) as connection:
            connection.request("POST", PREDICT, form, {"Content-Type": "multipart/form-data; boundary=b"})
            assert connection.getresponse().status == 200
