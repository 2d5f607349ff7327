"""The HTTP service: its application on a stand-in for the model, then deploy/serve.py as a process on a real export."""

import asyncio
import base64
import http.client
import io
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from deploy.service.app import ServedModel, create_app
from deploy.service.batching import Batcher
from deploy.service.uploads import Limits
from tests.serving import HOSTILE, MB, PREDICT, Process, picture_file

ROOT = Path(__file__).resolve().parent.parent


def brightness_model(batch):
    """A stand-in for the model: its map is 0.75 where red is full, else 0."""
    maps = np.float32(batch[:, :1] > 2.2) * 0.75
    return maps, maps, maps.max(axis=(1, 2, 3))


def served(run=brightness_model, places=64, **description):
    description = {
        "category": "bottle",
        "input_size": [16, 8],
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "white_level": None,
        "image_score": "max",
        "top_share": None,
        "threshold_rule": "published",
        "pixel_threshold_rule": "published",
        "min_area": 0,
        "image_threshold": 0.5,
        "pixel_threshold": 0.6,
        **description,
    }
    return ServedModel(description, Batcher(run, 8, 0.005, places))


@pytest.fixture
def client():
    with TestClient(create_app({"bottle": served()}, Limits(upload_bytes=MB, pixels=1_000_000))) as client:
        yield client


def post(client, content, name="picture.png", path=PREDICT, **fields):
    return client.post(path, files={"image": (name, content)}, data=fields)


# ---- predictions


def test_a_form_is_scored(client):
    answer = post(client, picture_file(255))
    assert answer.status_code == 200
    said = answer.json()
    times = said.pop("time_ms")
    assert said == {
        "model": "bottle",
        "score": 0.75,
        "label": "Anomaly",
        "image_threshold": 0.5,
        "pixel_threshold": 0.6,
        "anomalous_share": 1.0,
        "size": [30, 40],
        "orientation": 1,
        "min_area": 0,
        "regions": [{"box": [0, 0, 40, 30], "area": 1200, "centre": [19.5, 14.5], "highest": 0.75, "mean": 0.75}],
        "map": None,
        "batch_size": 1,
    }
    assert set(times) == {"upload", "preprocess", "queue", "inference", "total"}
    assert 0 < sum(value for name, value in times.items() if name != "total") <= times["total"]


def test_json_says_the_same_as_a_form(client):
    content = picture_file(0)
    form = post(client, content).json()
    answer = client.post(PREDICT, json={"image": base64.b64encode(content).decode()})
    assert answer.status_code == 200
    assert {**answer.json(), "time_ms": 0} == {**form, "time_ms": 0}
    assert form["label"] == "Normal"


def test_thresholds_of_the_request_win(client):
    said = post(client, picture_file(), image_threshold="0.75", pixel_threshold="0.8").json()
    assert (said["label"], said["image_threshold"]) == ("Normal", 0.75)  # not above it
    assert (said["anomalous_share"], said["pixel_threshold"]) == (0.0, 0.8)
    said = client.post(PREDICT, json={"image": base64.b64encode(picture_file()).decode(), "image_threshold": 0}).json()
    assert said["label"] == "Anomaly"


def test_the_map_is_a_picture_of_the_models_size(client):
    half = np.zeros((30, 40, 3), np.uint8)
    half[:, 20:] = 255
    file = io.BytesIO()
    Image.fromarray(half).save(file, "PNG")
    said = post(client, file.getvalue(), map="true").json()
    grey = np.asarray(Image.open(io.BytesIO(base64.b64decode(said["map"]))))
    assert grey.shape == (16, 8)
    np.testing.assert_array_equal(grey, np.repeat([[0, 191]], 4, axis=1).repeat(16, axis=0))
    assert said["anomalous_share"] == 0.5
    assert [region["box"] for region in said["regions"]] == [[22, 0, 18, 30]]  # 0.6 of the 0.75
    assert post(client, file.getvalue(), min_area="541").json()["regions"] == []


def test_the_map_comes_at_the_pictures_size_and_as_bytes(client):
    half = np.zeros((30, 40, 3), np.uint8)
    half[:, 20:] = 255
    file = io.BytesIO()
    Image.fromarray(half).save(file, "PNG")
    said = post(client, file.getvalue(), map="true", map_size="original").json()
    content = base64.b64decode(said["map"])
    grey = np.asarray(Image.open(io.BytesIO(content)))
    assert grey.shape == (30, 40)
    assert (grey[:, :17] == 0).all() and (grey[:, 23:] == 191).all()
    upload = {"image": ("picture.png", file.getvalue())}
    answer = client.post(PREDICT, files=upload, data={"map_size": "original"}, headers={"Accept": "image/png"})
    assert (answer.status_code, answer.headers["Content-Type"], answer.content) == (200, "image/png", content)
    assert (float(answer.headers["X-Score"]), answer.headers["X-Label"]) == (0.75, "Anomaly")
    assert post(client, file.getvalue(), map_size="huge").status_code == 422


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "BMP", "TIFF", "WEBP"])
def test_kinds_of_pictures(client, file_format):
    assert post(client, picture_file(file_format=file_format)).json()["score"] == 0.75


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_the_answer_says_how_the_file_lies_and_how_large_the_upright_picture_is(client, file_format):
    for orientation, size in ((1, [30, 40]), (3, [30, 40]), (5, [40, 30]), (6, [40, 30]), (9, [30, 40])):
        exif = Image.Exif()
        exif[0x0112] = orientation
        said = post(client, picture_file(file_format=file_format, exif=exif)).json()
        assert (said["size"], said["orientation"]) == (size, orientation if orientation < 9 else 1)


def test_pictures_that_come_together_run_together_and_each_gets_its_own_answer():
    sizes = []

    def slow(batch):
        sizes.append(len(batch))
        time.sleep(0.02)
        return brightness_model(batch)

    with TestClient(create_app({"bottle": served(slow)}, Limits())) as client, ThreadPoolExecutor(16) as pool:
        shades = [0, 255] * 32
        answers = list(pool.map(lambda shade: post(client, picture_file(shade)).json(), shades))
    assert [answer["score"] for answer in answers] == [0.75 * (shade > 0) for shade in shades]
    assert sum(sizes) == len(shades)
    assert max(sizes) > 1


def test_several_models_by_name():
    models = {"bottle": served(), "瓶-2": served(lambda b: [m / 3 for m in brightness_model(b)], category="own")}
    with TestClient(create_app(models, Limits())) as client:
        listed = client.get("/v1/models").json()["models"]
        assert [(model["name"], model["category"]) for model in listed] == [("bottle", "bottle"), ("瓶-2", "own")]
        assert listed[0]["input_size"] == [16, 8]
        assert [listed[0][key] for key in ("image_score", "top_share", "image_threshold")] == ["max", None, 0.5]
        assert post(client, picture_file()).json()["score"] == 0.75
        assert post(client, picture_file(), path="/v1/models/瓶-2:predict").json()["score"] == 0.25


# ---- bad uploads


@pytest.mark.parametrize("trouble", HOSTILE)
def test_a_bad_upload_is_a_clear_4xx(client, trouble):
    name, content, status = HOSTILE[trouble]
    answer = post(client, content, name)
    assert answer.status_code == status, answer.text
    assert is_clear(answer.json())
    if status == 422:
        as_json = client.post(PREDICT, json={"image": base64.b64encode(content).decode()})
        assert as_json.status_code == (200 if content == picture_file() else 422)
        assert "Traceback" not in as_json.text


def is_clear(said):
    return set(said) == {"detail"} and isinstance(said["detail"], str) and 10 < len(said["detail"]) <= 500


@pytest.mark.parametrize(
    ("kind", "body", "status", "words"),
    [
        ("", b"", 415, "multipart/form-data"),
        ("image/png", picture_file(), 415, "image/png"),
        ("multipart/form-data", b"x", 400, "boundary"),
        ("multipart/form-data; boundary=b", b"no form", 400, "form"),
        ("multipart/form-data; boundary=b", b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--", 400, "name"),
        ("multipart/form-data; boundary=b", b"--b--\r\n", 422, "image"),
        (
            "multipart/form-data; boundary=b; charset=undefined",
            b'--b\r\nContent-Disposition: form-data; name="\xff"\r\n\r\nx\r\n--b--\r\n',
            400,
            "form",
        ),
        (
            "multipart/form-data; boundary=b; charset=utf-7",  # a name that is no Unicode
            b'--b\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\nx\r\n'
            b'--b\r\nContent-Disposition: form-data; name="+2AA-"\r\n\r\nx\r\n--b--\r\n',
            422,
            "unicode",
        ),
        ("application/json", b"", 422, "JSON"),
        ("application/json", b"{", 422, "JSON"),
        ("application/json", b"[" * 100_000, 422, "JSON"),
        ("application/json", b"\xff\xfe", 422, "JSON"),
        ("application/json", b"[]", 422, "body"),
        ("application/json", b"{}", 422, "image"),
        ("application/json", b'{"image": 5}', 422, "image"),
        ("application/json", b'{"image": "%%%"}', 422, "base64"),
        ("application/json", '{"image": "é"}'.encode(), 422, "base64"),
        ("application/json", b'{"image": "\\ud800"}', 422, "JSON"),
        ("application/json", b'{"image": ""}', 422, "image"),
        ("application/json", b'{"image": "", "image_threshold": NaN}', 422, "image_threshold"),
        ("application/json", b'{"image": "", "image_threshold": 1e999}', 422, "image_threshold"),
        ("application/json", b'{"image": "", "image_threshold": -1}', 422, "image_threshold"),
        ("application/json", b'{"image": "", "image_threshold": 1.5}', 422, "less than or equal to 1"),
        ("application/json", b'{"image": "", "pixel_threshold": "high"}', 422, "pixel_threshold"),
        ("application/json", b'{"image": "", "map": "maybe"}', 422, "map"),
        ("application/json", b'{"image": "", "color": 1}', 422, "color"),
        ("application/json", b'{"image": "' + b"A" * MB + b'"}', 413, "1 MB"),
    ],
)
def test_a_bad_body_is_a_clear_4xx(client, kind, body, status, words):
    answer = client.post(PREDICT, content=body, headers={"Content-Type": kind})
    assert answer.status_code == status, answer.text
    assert is_clear(answer.json())
    assert words in answer.json()["detail"]


def test_a_form_with_wrong_fields(client):
    assert "image" in client.post(PREDICT, data={"image": "text"}, files={"other": b"x"}).json()["detail"]
    assert "image_threshold" in post(client, picture_file(), image_threshold="nan").json()["detail"]
    assert "colour" in post(client, picture_file(), colour="red").json()["detail"]
    two = client.post(PREDICT, files=[("image", ("a.png", picture_file()))] * 2)
    assert (two.status_code, is_clear(two.json())) == (400, True)


def test_a_body_without_a_length_is_counted(client):
    def chunks():
        yield b'--b\r\nContent-Disposition: form-data; name="image"; filename="x.png"\r\n\r\n'
        for _ in range(20):
            yield bytes(MB // 10)

    answer = client.post(PREDICT, content=chunks(), headers={"Content-Type": "multipart/form-data; boundary=b"})
    assert answer.status_code == 413


def test_a_slow_upload_gives_up_its_place():
    model = served()
    app = create_app({"bottle": model}, Limits(upload_seconds=0.1))
    sent = []

    async def receive():
        await asyncio.sleep(60)

    async def send(message):
        sent.append(message)

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": PREDICT, "headers": headers, "query_string": b""}
    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 408
    assert model.batcher.taken == 0
    model.batcher.close()


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_files_are_never_the_servers_fault(client):
    """Single bytes of real files changed, at random but the same each time: each is answered 200 or 422."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8))
    for file_format, options in [
        ("PNG", {}),
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "jpeg"}),
        ("WEBP", {"exif": Image.Exif()}),
        ("WEBP", {"lossless": True}),
    ]:
        file = io.BytesIO()
        noise.save(file, file_format, **options)
        for _ in range(60):
            damaged = bytearray(file.getvalue())
            for place in rng.integers(0, min(len(damaged), 400), 3):
                damaged[place] = rng.integers(256)
            answer = post(client, bytes(damaged))
            assert answer.status_code in (200, 422), (file_format, answer.text)


# ---- full, failing, unknown


def test_a_full_queue_answers_503_and_says_when_to_come_again():
    free = threading.Event()

    def stuck(batch):
        assert free.wait(10)
        return brightness_model(batch)

    model = served(stuck, places=2)
    with TestClient(create_app({"bottle": model}, Limits())) as client, ThreadPoolExecutor(2) as pool:
        taken = [pool.submit(post, client, picture_file()) for _ in range(2)]
        while model.batcher.taken < 2:
            time.sleep(0.01)
        refused = post(client, picture_file())
        assert refused.status_code == 503
        assert int(refused.headers["Retry-After"]) >= 1
        assert is_clear(refused.json())
        assert client.get("/health/live").status_code == 200
        free.set()
        assert [answer.result().status_code for answer in taken] == [200, 200]
        assert post(client, picture_file()).status_code == 200


def test_a_failing_model_is_a_500_in_json_and_the_next_picture_is_served():
    def fails_on_white(batch):
        if batch.max() > 2:
            raise RuntimeError("secret detail")
        return brightness_model(batch)

    app = create_app({"bottle": served(fails_on_white)}, Limits())
    with TestClient(app, raise_server_exceptions=False) as client:
        failed = post(client, picture_file(255))
        assert (failed.status_code, is_clear(failed.json())) == (500, True)
        assert "secret" not in failed.text
        assert post(client, picture_file(0)).status_code == 200


@pytest.mark.parametrize("name", ["cup", "..%2F..%2Fetc%2Fpasswd", "%00", "瓶", "a" * 3000])
def test_an_unknown_model_is_a_404(client, name):
    answer = client.post(f"/v1/models/{name}:predict", files={"image": ("a.png", picture_file())})
    assert answer.status_code == 404
    assert set(answer.json()) == {"detail"}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", PREDICT, 405),
        ("POST", "/v1/models", 405),
        ("GET", "/absent.html", 404),
        ("GET", "/page/%2e%2e/service.py", 404),
        ("GET", "/page/..%2fservice.py", 404),
        ("PUT", "/", 405),
    ],
)
def test_other_errors_are_json_too(client, method, path, status):
    answer = client.request(method, path)
    assert answer.status_code == status
    assert set(answer.json()) == {"detail"}


# ---- health, metrics, description


def test_health():
    model = served()
    with TestClient(create_app({"bottle": model}, Limits())) as client:
        assert client.get("/health/live").json() == {"status": "live"}
        assert client.get("/health/ready").json() == {"status": "ready"}
        model.batcher.close()
        refused = client.get("/health/ready")
        assert (refused.status_code, "bottle" in refused.json()["detail"]) == (503, True)
        assert client.get("/health/live").status_code == 200


def test_the_end_closes_the_queues():
    model = served()
    with TestClient(create_app({"bottle": model}, Limits())):
        assert model.batcher.alive
    assert not model.batcher.alive


def test_metrics_count_requests_errors_and_times(client):
    for shade in (0, 255, 255):
        post(client, picture_file(shade))
    post(client, b"no picture")
    post(client, picture_file(), path="/v1/models/made-up:predict")
    answer = client.get("/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain")
    figures = dict(re.findall(r"^(\w+(?:\{.*\})?) (\S+)$", answer.text, re.M))
    assert float(figures['fastflow_requests_total{model="bottle"}']) == 4
    assert float(figures['fastflow_errors_total{model="bottle",status="422"}']) == 1
    assert float(figures['fastflow_errors_total{model="unknown",status="404"}']) == 1
    assert float(figures['fastflow_request_seconds_count{model="bottle"}']) == 4
    assert float(figures['fastflow_request_seconds_bucket{le="10.0",model="bottle"}']) == 4
    assert float(figures['fastflow_batch_size_count{model="bottle"}']) == 3
    assert float(figures['fastflow_pictures_in_progress{model="bottle"}']) == 0
    assert float(figures['fastflow_anomalies_total{model="bottle"}']) == 2
    assert float(figures['fastflow_score_sum{model="bottle"}']) == 1.5
    buckets = {
        le: float(figures[f'fastflow_score_bucket{{le="{le}",model="bottle"}}']) for le in ("0.05", "0.7", "0.75")
    }
    assert buckets == {"0.05": 1, "0.7": 1, "0.75": 3}
    assert float(figures["process_resident_memory_bytes"]) > 0
    assert "made-up" not in answer.text


def test_the_docs_load_nothing_from_elsewhere(client):
    page = client.get("/docs")
    assert page.status_code == 200
    links = re.findall(r"(?:src|href)=\"([^\"]+)\"", page.text)
    assert len(links) >= 2
    for link in links:
        assert link.startswith("/"), link
        assert client.get(link).status_code == 200, link
    assert not re.findall(r"https?://", page.text)


def test_the_description_names_what_the_service_takes_and_answers(client):
    described = client.get("/openapi.json").json()
    post = described["paths"]["/v1/models/{name}:predict"]["post"]
    form = post["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert set(form["properties"]) == {"image", "image_threshold", "pixel_threshold", "min_area", "map", "map_size"}
    assert set(post["requestBody"]["content"]["application/json"]["schema"]["properties"]) == set(form["properties"])
    assert set(post["responses"]) == {"200", "400", "403", "404", "408", "413", "415", "422", "503"}
    assert {"/v1/models", "/health/live", "/health/ready", "/metrics"} <= set(described["paths"])


# ---- the process


@pytest.fixture(scope="module")
def server(exported, tmp_path_factory):
    """The service on two models; only deploy/ and the exports are there."""
    folder = tmp_path_factory.mktemp("alone")
    shutil.copytree(ROOT / "deploy", folder / "deploy")
    with Process("--models", f"{exported},second={exported}", deploy=folder / "deploy") as process:
        yield process


@pytest.mark.slow
def test_it_says_what_it_serves_and_where(server):
    assert re.fullmatch(r"serving bottle, second at http://127\.0\.0\.1:\d+\n", server.line)


@pytest.mark.slow
def test_its_scores_are_those_of_infer(server, exported):
    pictures = sorted((ROOT / "images").glob("bottle_*.png"))
    command = [sys.executable, ROOT / "deploy/infer.py", "--save_inference_dir", exported]
    command += ["--image_path", ROOT / "images/bottle_*.png"]
    *printed, _ = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()  # the sum
    with httpx2.Client(base_url=server.url) as client:
        for path, line in zip(pictures, printed, strict=True):
            for name in ("bottle", "second"):
                said = post(client, path.read_bytes(), path.name, f"/v1/models/{name}:predict").json()
                assert line.endswith(f"{said['label']} - score:  {said['score']:.3f}")


@pytest.mark.slow
def test_sixteen_clients_get_the_answers_that_one_gets(server):
    pictures = [path.read_bytes() for path in sorted((ROOT / "lite_data/bottle/test").glob("*/*.png"))]
    with httpx2.Client(base_url=server.url, timeout=60) as client, ThreadPoolExecutor(16) as pool:
        alone = [post(client, picture).json()["score"] for picture in pictures]
        together = list(pool.map(lambda picture: post(client, picture).json(), pictures * 4))
    np.testing.assert_allclose([said["score"] for said in together], alone * 4, atol=1e-5)
    assert max(said["batch_size"] for said in together) > 1


@pytest.mark.slow
def test_it_outlives_hostile_uploads(server):
    with httpx2.Client(base_url=server.url, timeout=60) as client:
        for trouble, (name, content, status) in HOSTILE.items():
            answer = post(client, content, name)
            assert (answer.status_code, is_clear(answer.json())) == (status, True), trouble
        assert post(client, (ROOT / "images/bottle_bad.png").read_bytes()).status_code == 200


def load(*options):
    command = [sys.executable, "-m", "benchmarks.load", "--clients", "4", "--warmup", "0", "--seconds", "1", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.slow
def test_the_load_of_the_benchmark_counts_answers_and_errors(server):
    done = load("--url", server.url)
    assert done.returncode == 0, done.stderr
    assert int(re.search(r"clients: 4, seconds: 1, requests: (\d+), errors: 0\n", done.stdout)[1]) >= 4
    assert re.search(r"^cpu_memory\(MB\): \d+\.\d at the start, \d+\.\d at the end", done.stdout, re.M)
    done = load("--url", server.url, "--model", "absent")
    assert (done.returncode, "[404]" in done.stdout) == (1, True)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free = taken.getsockname()[1]
    done = load("--url", f"http://127.0.0.1:{free}")
    assert (done.returncode, str(free) in done.stderr) == (2, True)


@pytest.mark.slow
def test_at_sigterm_it_answers_what_it_took_on_and_ends_with_0(exported):
    with Process("--models", exported) as process:
        host, port = process.url.removeprefix("http://").split(":")
        body = json.dumps({"image": base64.b64encode(picture_file()).decode()}).encode()
        head = f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head.encode() + body[:10])
            time.sleep(0.5)
            process.process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            with pytest.raises(OSError):
                socket.create_connection((host, int(port)))
            connection.sendall(body[10:])
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            assert answer.status == 200
            assert json.loads(answer.read())["model"] == "bottle"
        assert process.end() == (0, "")


@pytest.mark.slow
def test_how_long_an_upload_may_take_is_an_option(exported):
    with Process("--models", exported, "--upload_seconds", 1) as process:
        connection = http.client.HTTPConnection(process.url.removeprefix("http://"), timeout=20)
        connection.putrequest("POST", PREDICT)
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", "1000")
        connection.endheaders(b"{")
        answer = connection.getresponse()
        assert (answer.status, json.loads(answer.read())["detail"]) == (408, "the upload took more than 1 seconds")


@pytest.mark.slow
def test_more_than_one_signal_does_not_kill_it(exported):
    with Process("--models", exported) as process:
        given_up = time.monotonic() + 30
        while process.process.poll() is None and time.monotonic() < given_up:
            process.process.send_signal(signal.SIGTERM)  # at every moment of its end
            time.sleep(0.001)
        assert (process.process.wait(1), process.process.stderr.read()) == (0, "")


def failing(*options):
    """Run it with options that must fail with one line on stderr; return the line."""
    command = [sys.executable, ROOT / "deploy/serve.py", *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


@pytest.mark.slow
def test_bad_options_are_one_line(exported, tmp_path):
    assert str(tmp_path) in failing("--models", tmp_path)
    assert "bottle" in failing("--models", f"{exported},{exported}")
    assert "a/b" in failing("--models", f"a/b={exported}")
    nameless = shutil.copytree(exported, tmp_path / "nameless")
    lines = (nameless / "inference.yml").read_text().splitlines(keepends=True)
    (nameless / "inference.yml").write_text("".join(line for line in lines if not line.startswith("category:")))
    for models in (nameless, f"named={nameless}"):
        assert "inference.yml: has no 'category'; export again" in failing("--models", models)
    assert "--port" in failing("--models", exported, "--port", "70000")
    assert "--max_pixels" in failing("--models", exported, "--max_pixels", "0")
    assert "--host" in failing("--models", exported, "--host", "256.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "in use" in failing("--models", exported, "--port", taken.getsockname()[1])
