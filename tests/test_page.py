"""The page in a real browser: Chromium, driven by Playwright, on the running service."""

import base64
import csv
import io
import re
import shutil
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import uvicorn
from PIL import Image

from benchmarks.uploads import (
    bmp_of_runs,
    jpeg_of_scans,
    jpeg_of_segments,
    png_chunk,
    png_of_chunks,
    segment,
    tiff_of_strips,
    tiff_of_tile,
    webp,
    webp_chunk,
)
from deploy.common.cli import UserError
from deploy.common.imaging import read_rgb
from deploy.common.tiles import Layout
from deploy.service.app import ServedModel, create_app
from deploy.service.batching import Batcher
from deploy.service.uploads import Limits
from tests.serving import HOSTILE, MB, Process

ROOT = Path(__file__).resolve().parent.parent
GOOD, BAD = ROOT / "images/bottle_good.png", ROOT / "images/bottle_bad.png"
pytestmark = pytest.mark.slow

sync_api = pytest.importorskip("playwright.sync_api", reason="the Python package playwright is not installed")
expect = sync_api.expect
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def server(exported):
    with Process("--models", f"{exported},second={exported}") as process:
        yield process


RED = {"category": "red", "input_size": [60, 60], "mean": [0.0] * 3, "std": [1.0] * 3}
RED |= {"image_threshold": 0.5, "pixel_threshold": 0.6, "white_level": None}
RED |= {"threshold_rule": "published", "pixel_threshold_rule": "published", "min_area": 0}
RED |= {"image_score": "max", "top_share": None, "tile": None}
LAYOUT = Layout((60, 60))


@pytest.fixture(scope="module")
def red_server():
    """The address of the service on a stand-in for a model: the score of a pixel is its red."""

    def run(batch):
        return batch[:, :1], batch[:, :1], batch[:, 0].max(axis=(1, 2))

    models = {
        name: ServedModel({**RED, **more}, Batcher(run, 8, 0.005, 64), LAYOUT) for name, more in RED_MODELS.items()
    }
    config = uvicorn.Config(create_app(models, Limits(upload_bytes=MB, pixels=1_000_000)), port=0, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


RED_MODELS = {"red": {}, "strict": {"image_threshold": 0.9, "pixel_threshold": 0.95}}


@pytest.fixture(scope="module")
def browser():
    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync"]
    flags += ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]  # a drawn picture as the camera
    with sync_api.sync_playwright() as playwright:
        path = CHROMIUM or playwright.chromium.executable_path  # where playwright would install its own
        if not Path(path).exists():
            pytest.skip("no chromium here (Debian: apt-get install chromium; else playwright install chromium)")
        browser = playwright.chromium.launch(executable_path=path, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, server, red_server):
    """Opens the page in a fresh context; afterwards nothing may have been asked of elsewhere, or gone wrong in it."""
    contexts, asked, errors = [], [], []

    def open_page(script="", url=server.url, **options):
        context = browser.new_context(**{"locale": "en-US", **options})
        context.add_init_script(script)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda line: errors.append(line.text) if "Content Security" in line.text else None)
        page.goto(url)
        expect(page.locator("#model option")).to_have_count(2)
        return page

    open_page.asked = asked
    yield open_page
    for context in contexts:
        context.close()
    assert not errors
    assert not [url for url in asked if not url.startswith((server.url, red_server, "blob:", "data:"))]


@pytest.fixture
def page(open_page):
    return open_page()


@pytest.fixture
def red_page(open_page, red_server):
    return open_page(url=red_server)


def upload(page, *files):
    page.set_input_files("#files", files)


def card(page, name):
    return page.locator("article", has=page.get_by_role("heading", name=name, exact=True))


def scored(page, path):
    """Upload a picture and return its card once it is answered."""
    upload(page, path)
    expect(card(page, path.name).locator(".score")).to_have_text(re.compile(r"^\d\.\d{3}$"))
    return card(page, path.name)


def set_slider(page, name, value):
    page.get_by_role("slider", name=name).evaluate(
        "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input')); }", str(value)
    )


def test_a_picture_gets_score_label_time_and_heat_map(page):
    shown = scored(page, BAD)
    assert shown.locator("strong").inner_text() in ("Anomaly", "Normal")
    assert re.fullmatch(r"\d+ ms", shown.locator(".time").inner_text())
    expect(shown.locator("img")).to_have_js_property("naturalWidth", 256)
    canvas = shown.locator("canvas")
    assert canvas.evaluate("canvas => [canvas.width, canvas.height]") == [320, 320]
    assert canvas.bounding_box() == shown.locator("img").bounding_box()
    assert shown.locator(".model").inner_text() == "bottle"


def save_turned(picture, path, orientation):
    """Save an upright picture as a camera would that was held otherwise."""
    undone = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE"}
    undone |= {6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270"}
    if orientation in undone:
        picture = picture.transpose(Image.Transpose[undone[orientation]])
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(path, exif=exif)


def quarters(*colours):
    """A picture of 120x80 of four colours: above left and right, below left and right."""
    small = np.uint8(colours).reshape(2, 2, 3)
    return Image.fromarray(small.repeat(40, axis=0).repeat(60, axis=1))


def shot(place):
    """The pixels of a page or an element as they are on the screen."""
    return np.asarray(Image.open(io.BytesIO(place.screenshot())).convert("RGB")).astype(int)


def middles(pixels, box=None):
    """The colours in the middle of its four quarters, or of those of a box in it."""
    box = box or {"x": 0, "y": 0, "width": pixels.shape[1], "height": pixels.shape[0]}
    xs = [int(box["x"] + box["width"] * share) for share in (0.25, 0.75)]
    return [pixels[int(box["y"] + box["height"] * share), x] for share in (0.25, 0.75) for x in xs]


RED_QUARTER = quarters((255, 0, 0), (0, 200, 0), (0, 0, 200), (100, 100, 100))
TURNED = [("jpg", turn) for turn in range(1, 9)] + [(kind, turn) for kind in ("png", "webp") for turn in (3, 5, 6)]


def test_a_picture_stands_upright_under_its_map_whatever_exif_says(open_page, red_server, tmp_path):
    page = open_page(url=red_server, viewport={"width": 1280, "height": 1600})
    paths = [tmp_path / f"{turn}.{kind}" for kind, turn in TURNED]
    for path, (_, turn) in zip(paths, TURNED, strict=True):
        save_turned(RED_QUARTER, path, turn)
    upload(page, *paths)
    expect(page.locator("article[data-state=Anomaly]")).to_have_count(len(paths))
    yellow = np.add([255, 0, 0], [240, 249, 33]) // 2  # half of plasma's last colour over the red
    drawn = [yellow, (0, 200, 0), (0, 0, 200), (100,) * 3]
    pixels = shot(page)
    for path in paths:
        box = card(page, path.name).locator(".picture").bounding_box()
        assert box["width"] / box["height"] == pytest.approx(1.5, abs=0.02)
        np.testing.assert_allclose(middles(pixels, box), drawn, atol=6, err_msg=path.name)
    save_turned(RED_QUARTER, tmp_path / "6.tif", 6)  # which Chromium does not show: the map has its form all the same
    box = scored(page, tmp_path / "6.tif").locator("canvas").bounding_box()
    assert box["width"] / box["height"] == pytest.approx(1.5, abs=0.02)
    card(page, "6.jpg").locator(".enlarge").click()
    np.testing.assert_allclose(middles(shot(page.locator("#large .picture"))), drawn, atol=6)


def test_the_colours_are_those_of_infer_from_the_pixel_threshold_to_one(page):
    """Of OpenCV's plasma, at the place between the two; at the threshold and below nothing is drawn."""
    png = io.BytesIO()
    Image.fromarray(np.arange(256, dtype=np.uint8)[None]).save(png, "PNG")
    scores = np.arange(256) / 255
    for threshold in (0, 0.6, 1, 1.5):
        drawn = page.evaluate(
            """async ([png, threshold]) => {
                const canvas = document.createElement("canvas");
                drawHeat(canvas, await readMap(png), threshold, 256);
                return Array.from(canvas.getContext("2d").getImageData(0, 0, 256, 1).data);
            }""",
            [base64.b64encode(png.getvalue()).decode(), threshold],
        )
        drawn = np.reshape(drawn, (256, 4))
        above = scores > threshold
        np.testing.assert_array_equal(drawn[:, 3], 255 * above)
        if above.any():
            places = np.uint8(np.round((scores[above] - threshold) / (1 - threshold) * 255))
            plasma = cv2.applyColorMap(places[None], cv2.COLORMAP_PLASMA)[0, :, ::-1]
            np.testing.assert_allclose(drawn[above, :3], plasma, atol=4)


def test_the_outline_parts_what_is_above_the_pixel_threshold(red_page, tmp_path):
    RED_QUARTER.save(tmp_path / "red.png")
    shown = scored(red_page, tmp_path / "red.png")
    numbers = [float(n) for n in re.findall(r"[\d.]+", shown.locator("path").get_attribute("d"))]
    assert shown.locator("svg").get_attribute("viewBox") == "0 0 60 60"
    xs, ys = numbers[::2], numbers[1::2]
    assert max(min(xs), min(ys)) < 0.5  # it closes at the edge of the picture
    assert max(xs) == pytest.approx(30, abs=0.5)
    assert max(ys) == pytest.approx(30, abs=0.5)
    set_slider(red_page, "Heat map", 0)
    pixels = shot(shown.locator(".picture"))
    height, width = pixels.shape[:2]
    np.testing.assert_allclose(middles(pixels)[0], (255, 0, 0), atol=2)  # the slider fades the colours, not the line
    assert pixels[height // 4, width // 2 - 3 : width // 2 + 3].min(axis=1).max() > 180  # white


def test_the_boxes_of_regions_can_be_shown_and_say_their_numbers(red_page, tmp_path):
    save_turned(RED_QUARTER, tmp_path / "red.jpg", 6)
    shown = scored(red_page, tmp_path / "red.jpg")
    box = shown.locator("rect")
    expect(box).to_have_count(1)
    expect(box).to_be_hidden()
    red_page.get_by_role("checkbox", name="Boxes").check()
    expect(box).to_be_visible()
    sides = shown.locator(".picture").bounding_box(), box.bounding_box()
    for name, share in (("x", 0), ("y", 0), ("width", 0.5), ("height", 0.5)):
        start = sides[0][name] if name in "xy" else 0
        whole = sides[0]["width" if name in ("x", "width") else "height"]
        assert (sides[1][name] - start) / whole == pytest.approx(share, abs=0.03)
    title = box.locator("title")
    assert re.fullmatch(r"1: score 0.99\d, mean 0.9\d\d; 6\d × 4\d at 0, 0; area 2\d{3} pixels", title.text_content())
    red_page.get_by_role("button", name="中文").click()
    assert title.text_content().startswith("1：分数 0.99")
    box.click(position={"x": 5, "y": 5})  # as the picture below it
    expect(red_page.locator("#large rect")).to_be_visible()


def test_an_anomaly_without_a_pixel_above_the_threshold_says_so(red_page, tmp_path):
    red_page.get_by_role("combobox", name="Model").select_option("strict")
    upload(red_page, *shades(tmp_path, between=235, above=250, normal=20))
    expect(red_page.locator("article[data-state=waiting]")).to_have_count(0)
    assert card(red_page, "between.png").locator(".error").inner_text().startswith("No pixel is above")
    assert red_page.locator("article .error:not(:empty)").count() == 1


def test_the_legend_has_the_pixel_threshold_of_the_model(red_page):
    expect(red_page.locator("#pixel-threshold")).to_have_text("0.600")
    red_page.get_by_role("combobox", name="Model").select_option("strict")
    expect(red_page.locator("#pixel-threshold")).to_have_text("0.950")
    bar = shot(red_page.locator(".settings .colours"))
    middle = bar[bar.shape[0] // 2]
    np.testing.assert_allclose(middle[2], (0x0D, 0x08, 0x87), atol=12)
    np.testing.assert_allclose(middle[-3], (0xF0, 0xF9, 0x21), atol=12)


def shades(folder, **reds):
    """Pictures by name whose score is so many of 255; none: no picture. Their paths, in the order given."""
    for name, red in reds.items():
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30, 20), (red, 90, 90)).save(path) if red is not None else path.write_bytes(b"no picture")
    return [folder / f"{name}.png" for name in reds]


def shown_names(page):
    """The names of the cards that are to be seen, and of the rows, which must be the same."""
    names = page.locator("article:visible h3").all_text_contents()
    assert page.locator("#rows tr:visible td:first-child").all_text_contents() == names
    return [name.removesuffix(".png") for name in names]


def test_results_are_sorted_and_filtered(red_page, tmp_path):
    upload(red_page, *shades(tmp_path, good=20, bad=200, broken=None, worse=250, fine=40))
    expect(red_page.locator("#status")).to_have_text("5 of 5 pictures, 2 with an anomaly, 1 with an error")
    assert shown_names(red_page) == ["fine", "worse", "broken", "bad", "good"]
    sort, show = (red_page.get_by_role("combobox", name=name) for name in ("Sort", "Show"))
    sort.select_option("anomalies first")
    assert shown_names(red_page) == ["worse", "bad", "broken", "fine", "good"]
    upload(red_page, *shades(tmp_path, bad2=220))
    expect(red_page.locator("article[data-state=Anomaly]")).to_have_count(3)
    assert shown_names(red_page) == ["worse", "bad2", "bad", "broken", "fine", "good"]
    show.select_option("anomalies")
    assert shown_names(red_page) == ["worse", "bad2", "bad"]
    set_slider(red_page, "Threshold", 0.9)
    assert shown_names(red_page) == ["worse"]
    show.select_option("errors")
    assert shown_names(red_page) == ["broken"]
    show.select_option("all")
    red_page.get_by_role("button", name="Reset threshold").click()
    expect(red_page.locator("#threshold-value")).to_have_text("0.500")
    assert shown_names(red_page) == ["worse", "bad2", "bad", "broken", "fine", "good"]
    boxes = [red_page.locator(place).bounding_box()["y"] for place in ("#status", "#csv", "#cards", "table")]
    assert boxes == sorted(boxes)


def test_a_picture_is_enlarged_by_click_and_by_key(red_page, tmp_path):
    upload(red_page, *shades(tmp_path, one=200, broken=None, two=20, three=250))
    expect(red_page.locator("article[data-state=waiting]")).to_have_count(0)
    large = red_page.locator("#large")
    card(red_page, "two.png").get_by_role("button", name="Enlarge two.png").click()
    expect(large.get_by_role("heading")).to_have_text("two.png")
    assert large.locator(".picture").bounding_box()["width"] > 500
    for key, name in (("ArrowRight", "one.png"), ("ArrowRight", "one.png"), ("ArrowLeft", "two.png")):
        red_page.keyboard.press(key)  # past the one that cannot be read, and no further than the last
        expect(large.get_by_role("heading")).to_have_text(name)
    large.get_by_role("button", name="Previous picture").click()
    expect(large.get_by_role("heading")).to_have_text("three.png")
    expect(large.get_by_role("button", name="Previous picture")).to_be_disabled()
    for key, name in (("ArrowRight", "two.png"), ("ArrowLeft", "three.png")):
        red_page.keyboard.press(key)  # although the button has the focus no more
        expect(large.get_by_role("heading")).to_have_text(name)
    expect(large.locator(".verdict")).to_have_text(re.compile(r"Anomaly\s+0\.980\s+red"))
    red_page.keyboard.press("Escape")
    expect(large).not_to_be_visible()
    # The dialog gives the focus back, and its "close" event comes a moment after it has vanished.
    expect(red_page.get_by_role("button", name="Enlarge three.png")).to_be_focused()
    red_page.keyboard.press("Enter")
    expect(large).to_be_visible()
    red_page.mouse.click(5, 5)  # beside it
    expect(large).not_to_be_visible()


def test_a_tall_picture_does_not_fill_the_page(red_page, tmp_path):
    RED_QUARTER.resize((100, 3000)).save(tmp_path / "tall.png")
    shown = scored(red_page, tmp_path / "tall.png")
    box = shown.locator(".picture").bounding_box()
    assert (box["height"], box["width"]) == (pytest.approx(320, abs=1), pytest.approx(320 / 30, abs=1))
    shown.locator(".enlarge").click()
    assert red_page.locator("#large").bounding_box()["height"] < 700


def test_a_folder_is_picked_with_the_names_of_its_folders(red_page, tmp_path):
    shades(tmp_path / "set", **{"day10/a": 20, "day2/a": 200, "b": 20})
    (tmp_path / "set/notes.txt").write_text("no picture")
    (tmp_path / "set/.hidden.png").write_bytes(b"")
    red_page.set_input_files("#folder", tmp_path / "set")
    expect(red_page.locator("#status")).to_contain_text("3 of 3 pictures, 1 with an anomaly, 0 with an error")
    assert shown_names(red_page) == ["set/day10/a", "set/day2/a", "set/b"]  # the newest first
    expect(red_page.locator("#notice")).to_contain_text("3 pictures in the folder; 2 files left out")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/notes.txt").write_text("no picture")
    red_page.set_input_files("#folder", tmp_path / "empty")
    expect(red_page.locator("#notice")).to_contain_text("0 pictures in the folder; 1 files left out")


def test_a_folder_is_dropped_with_the_names_of_its_folders(red_page, tmp_path):
    shades(tmp_path / "set", **{f"many/{i}": 20 for i in range(101)})  # more than a browser hands out at once
    shades(tmp_path, single=200)
    devtools = red_page.context.new_cdp_session(red_page)
    for kind in ("dragEnter", "dragOver", "drop"):
        files = [str(tmp_path / "set"), str(tmp_path / "single.png")]
        data = {"items": [], "files": files, "dragOperationsMask": 1}
        devtools.send("Input.dispatchDragEvent", {"type": kind, "x": 200, "y": 100, "data": data})
    expect(red_page.locator("#status")).to_contain_text("102 of 102 pictures, 1 with an anomaly", timeout=20000)
    names = shown_names(red_page)
    assert names == ["single", *(f"set/many/{i}" for i in reversed(range(101)))]


def test_the_threshold_slider_flips_the_label_without_asking_the_server(page, open_page):
    shown = scored(page, BAD)
    score = float(shown.locator(".score").inner_text())
    asked = len(open_page.asked)
    for threshold, label in [(max(score - 0.05, 0), "Anomaly"), (min(score + 0.05, 1), "Normal")]:
        set_slider(page, "Threshold", threshold)
        expect(shown.locator("strong")).to_have_text(label)
        expect(page.locator("#rows tr td").nth(4)).to_have_text(label)
        expect(page.locator("#threshold-value")).to_have_text(f"{threshold:.3f}")
    assert len(open_page.asked) == asked


def test_each_model_keeps_its_own_threshold(page):
    set_slider(page, "Threshold", 0.25)
    page.get_by_role("combobox", name="Model").select_option("second")
    expect(page.locator("#threshold-value")).to_have_text("0.800")
    scored(page, GOOD)
    page.get_by_role("combobox", name="Model").select_option("bottle")
    expect(page.locator("#threshold-value")).to_have_text("0.250")
    assert page.locator("#rows tr td").all_inner_texts()[1:4:2] == ["second", "0.800"]


def test_the_opacity_slider_fades_the_heat_map(page):
    canvas = scored(page, BAD).locator("canvas")
    for percent in (0, 100):
        set_slider(page, "Heat map", percent)
        assert canvas.evaluate("canvas => getComputedStyle(canvas).opacity") == str(percent // 100)


def test_a_file_that_cannot_be_read_shows_its_error_and_the_others_their_scores(page, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    large = tmp_path / "large.png"
    large.write_bytes(HOSTILE["20 MB"][1])
    upload(page, broken, GOOD, large, BAD)
    expect(card(page, "broken.png").locator(".error")).to_contain_text("Not a readable picture")
    expect(card(page, "broken.png").locator("strong")).to_have_text("error")
    expect(card(page, "large.png").locator(".error")).to_contain_text("too large", timeout=20000)
    for path in (GOOD, BAD):
        expect(card(page, path.name).locator(".score")).to_have_text(re.compile(r"\d"))
    expect(page.locator("#status")).to_contain_text("4 of 4 pictures")
    expect(page.locator("#status")).to_contain_text("2 with an error")


def test_the_name_of_a_file_is_text_whatever_it_says(page, tmp_path):
    name = "<img src=x onerror=document.title='hacked'>.png"
    shutil.copy(GOOD, tmp_path / name)
    scored(page, tmp_path / name)
    assert page.locator("h3").inner_text() == name
    assert page.locator("h3 img, td img").count() == 0
    assert page.title() == "FastFlow"


def test_the_session_is_downloaded_as_csv_in_english(open_page, tmp_path):
    risky = tmp_path / '=1+1,"quoted".png'
    risky.write_bytes(b"no picture")
    page = open_page(locale="zh-CN")  # the CSV is English all the same
    scored(page, BAD)
    upload(page, risky)
    expect(card(page, risky.name).locator("strong")).to_have_text("错误")
    with page.expect_download() as download:
        page.get_by_role("button", name="下载 CSV").click()
    assert re.fullmatch(r"fastflow-[\dT-]+\.csv", download.value.suggested_filename)
    content = Path(download.value.path()).read_bytes()
    assert content.startswith(b"\xef\xbb\xbf")
    rows = list(csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline="")))
    assert [row["File"] for row in rows] == [BAD.name, "'" + risky.name]
    assert rows[0]["Model"] == "bottle"
    assert f"{float(rows[0]['Score']):.3f}" == card(page, BAD.name).locator(".score").inner_text()
    assert rows[0]["Label"] == ("Anomaly" if float(rows[0]["Score"]) > float(rows[0]["Threshold"]) else "Normal")
    assert float(rows[0]["Time (ms)"]) > 0
    assert rows[0]["Error"] == ""
    assert rows[1]["Score"] == ""
    assert "Not a readable picture" in rows[1]["Error"]


def test_clear_empties_the_session(page):
    scored(page, GOOD)
    page.get_by_role("button", name="Clear").click()
    assert page.locator("article").count() == page.locator("#rows tr").count() == 0
    assert page.locator("#session").is_hidden()
    scored(page, GOOD)  # the same file can be picked again


def test_pictures_can_be_dropped(page):
    handle = page.evaluate_handle(
        """(bytes) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], "dropped.png", { type: "image/png" }));
            return data;
        }""",
        list(GOOD.read_bytes()),
    )
    page.dispatch_event("#drop", "dragover", {"dataTransfer": handle})
    expect(page.locator("#drop")).to_have_class("over")
    page.dispatch_event("#drop", "drop", {"dataTransfer": handle})
    expect(card(page, "dropped.png").locator(".score")).to_have_text(re.compile(r"\d"))


def test_the_camera_takes_a_picture(page):
    page.get_by_role("button", name="Camera").click()
    page.get_by_role("button", name="Take picture").click()
    expect(page.locator("article .score")).to_have_text(re.compile(r"\d"))
    assert page.locator("h3").inner_text().startswith("camera-")
    page.keyboard.press("Escape")
    expect(page.locator("#video")).to_have_js_property("srcObject", None)
    expect(page.locator("#camera")).not_to_be_visible()


def test_a_picture_that_the_browser_cannot_show_still_has_its_heat_map(page, tmp_path):
    Image.open(GOOD).save(tmp_path / "scan.tiff")
    shown = scored(page, tmp_path / "scan.tiff")
    expect(shown.locator(".error")).to_contain_text("cannot show")
    assert shown.locator("canvas").bounding_box()["height"] > 100
    assert not shown.locator("img").is_visible()


def test_a_heat_map_that_cannot_be_drawn_holds_nothing_up(page):
    page.evaluate("HTMLCanvasElement.prototype.getContext = () => null")
    for _ in range(5):  # more than are sent at once
        upload(page, BAD)
    expect(page.locator("article .error", has_text="heat map cannot be drawn")).to_have_count(5)
    assert all(re.fullmatch(r"\d\.\d{3}", score) for score in page.locator("article .score").all_inner_texts())
    page.wait_for_function("sending === 0")


def test_the_keyboard_is_enough(page):
    names = []
    for _ in range(8):
        page.keyboard.press("Tab")
        names.append(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
    assert names == ["API", "language", "pick", "pick-folder", "shoot", "model", "threshold", "opacity"]
    with page.expect_file_chooser() as chooser:
        page.locator("#pick").focus()
        page.keyboard.press("Enter")
    chooser.value.set_files(BAD)
    expect(page.locator("article .score")).to_have_text(re.compile(r"\d"))
    page.locator("#threshold").focus()
    page.keyboard.press("End")
    expect(page.locator("#threshold-value")).to_have_text("1.000")
    expect(page.locator("article strong")).to_have_text("Normal")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # on the button that takes it back
    expect(page.locator("#threshold-value")).to_have_text("0.800")
    names = []
    for _ in range(7):
        page.keyboard.press("Tab")
        names.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
    assert names == ["opacity", "boxes", "sort", "filter", "csv", "clear", "enlarge"]
    page.keyboard.press("Enter")
    expect(page.locator("#large")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#large")).not_to_be_visible()
    expect(page.locator(".enlarge")).to_be_focused()


def test_every_control_has_a_name(page):
    scored(page, GOOD)
    tree = page.locator("body").aria_snapshot()
    for role in ("button", "combobox", "slider", "link"):
        assert not re.findall(rf"- {role}(?: \[|:|$)", tree, re.M), tree
    assert len(re.findall(r"- slider \"", tree)) == 2


def test_chinese_and_english(open_page):
    page = open_page(locale="zh-CN")
    assert page.locator("html").get_attribute("lang") == "zh-CN"
    expect(page.get_by_role("button", name="选择图片")).to_be_visible()
    shown = scored(page, BAD)
    assert shown.locator("strong").inner_text() in ("异常", "正常")
    page.get_by_role("button", name="English").click()
    assert page.locator("html").get_attribute("lang") == "en"
    assert shown.locator("strong").inner_text() in ("Anomaly", "Normal")
    page.reload()
    expect(page.get_by_role("button", name="Choose pictures")).to_be_visible()  # the choice is remembered


def said_of(content):
    """What the service says of a picture file that it refuses."""
    with pytest.raises(UserError) as error:
        read_rgb(Path("image"), io.BytesIO(content), 1_000_000)
    return str(error.value)


def refused_files():
    """Files of every kind that are refused."""
    paths = ("path", "absolute path", "windows path", "dots")  # it is their name that is refused
    yield from (content for trouble, (_, content, status) in HOSTILE.items() if status == 422 and trouble not in paths)
    beyond = io.BytesIO()
    Image.fromarray(np.full((4, 4), 70_000, np.int32)).save(beyond, "TIFF")
    yield beyond.getvalue()
    yield jpeg_of_scans(101, 64)
    yield jpeg_of_segments(segment(1), 2000)
    yield png_of_chunks(png_chunk(b"tEXt", b"a\0b"), 2000, Image.new("L", (8, 8)))
    yield bmp_of_runs(900, 900, b"\1\0\0\0" * 900)
    yield tiff_of_tile(2000)
    yield tiff_of_strips(100_001)
    yield webp(webp_chunk(b"JUNK", b"") * 2000)


NAMES = "https://shop.example --allow_origins allow origins cup bottle second"
SAID = [
    (403, "pages of https://shop.example may not post pictures here; --allow_origins lets them"),
    (404, "no model cup; there are: bottle, second"),
    (408, "the upload took more than 30 seconds"),
    (413, "the upload is larger than 10 MB; scale the picture down"),
    (422, "image: takes more than 10 seconds to decode; save it in another format"),
    (422, "image: makes its decoder fail; save it in another format"),
    (422, "image: cannot be read as a picture (MemoryError)"),
    (500, "the server failed; its log says why"),
    (503, "busy; come again"),
]


def test_errors_are_chinese_through_and_through(page):
    said = [*SAID, *((422, said_of(content)) for content in refused_files())]
    assert len({re.sub(r"\d+|\(.*", "", detail) for _, detail in said}) > 17
    for status, detail in said:
        told, english = page.evaluate(
            "problem => ['zh', 'en'].map(language => errorText(problem, TEXTS[language]))",
            {"status": status, "detail": detail},
        )
        words = set(re.findall(r"[A-Za-z]{2,}", told))
        assert words <= {"JPEG", "PNG", "TIFF", "WebP", "MB", *re.findall(r"\w+", NAMES)}, told
        assert re.sub(r"^image: (cannot be read as a picture \((.*)\)$)?", r"\2", detail) in english
    told = page.evaluate("errorText({ status: 502 }, TEXTS.zh)"), page.evaluate("errorText({ status: 0 }, TEXTS.zh)")
    assert told == ("服务器拒绝了请求", "无法连接服务器")
    unknown = {"status": 422, "detail": "image: something $1 new"}
    assert page.evaluate("problem => errorText(problem, TEXTS.zh)", unknown) == "不是可读的图片（something $1 new）"


def test_a_browser_that_lets_pages_store_nothing_shows_the_page_all_the_same(open_page):
    blocked = "Object.defineProperty(window, 'localStorage', { get() { throw new DOMException(); } })"
    page = open_page(script=blocked, locale="zh-CN")
    page.get_by_role("button", name="English").click()
    shown = scored(page, GOOD)
    assert shown.locator("strong").inner_text() in ("Anomaly", "Normal")


def test_a_page_of_another_origin_cannot_make_the_browser_post_a_picture(browser, server):
    context = browser.new_context()
    page = context.new_page()
    page.goto(f"{server.url.replace('127.0.0.1', 'localhost')}/health/live")  # another origin, of the same machine
    with page.expect_response(re.compile("predict")) as answer:
        page.evaluate(
            """url => {
                const form = new FormData();
                form.append("image", new File(["x"], "x.png"));
                fetch(url, { method: "POST", body: form, mode: "no-cors" });
            }""",
            f"{server.url}/v1/models/bottle:predict",
        )
    assert answer.value.status == 403
    context.close()


def test_both_languages_have_every_text(page):
    assert page.evaluate("Object.keys(TEXTS.en).join()") == page.evaluate("Object.keys(TEXTS.zh).join()")
    assert page.evaluate("Object.keys(TEXTS.en.errors).join()") == page.evaluate("Object.keys(TEXTS.zh.errors).join()")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_stand_out_in_light_and_dark(open_page, scheme):
    page = open_page(color_scheme=scheme)
    scored(page, BAD)
    for threshold in (0, 1):
        set_slider(page, "Threshold", threshold)
        for place in ("article strong", "article .time", "article .model", "#status", ".settings p", "td:nth-child(5)"):
            assert contrast(page.locator(place)) >= 4.5, place  # WCAG AA
    dark = luminance(page.locator("body").evaluate("node => getComputedStyle(node).backgroundColor")) < 0.2
    assert dark == (scheme == "dark")


def luminance(colour):
    """Relative luminance of `rgb(r, g, b)`, as WCAG 2 defines it."""
    channels = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(place):
    text, back = place.evaluate(
        """node => {
            const text = getComputedStyle(node).color;
            while (getComputedStyle(node).backgroundColor === "rgba(0, 0, 0, 0)") node = node.parentElement;
            return [text, getComputedStyle(node).backgroundColor];
        }"""
    )
    low, high = sorted([luminance(text), luminance(back)])
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("language", ["en-US", "zh-CN"])
def test_a_phone_shows_all_of_it_without_scrolling_sideways(open_page, tmp_path, language):
    page = open_page(viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True, locale=language)
    shutil.copy(BAD, tmp_path / f"{'a-long-name-' * 6}.png")
    shown = scored(page, tmp_path / f"{'a-long-name-' * 6}.png")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.locator(".scroll").evaluate("node => node.scrollWidth <= node.clientWidth")  # nor within the table
    for place in page.locator("button:visible, select:visible").all():
        box = place.bounding_box()
        assert box["height"] >= 40
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360
    with page.expect_file_chooser():
        page.get_by_text({"en-US": "Tap to choose pictures", "zh-CN": "点按选择图片"}[language]).tap()
    assert not page.locator(".sources .drop").is_visible()
    shown.locator(".enlarge").tap()
    box = page.locator("#large").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 360
    assert page.locator("#large-close").bounding_box()["y"] < 740


def test_a_busy_or_absent_server_is_waited_for_or_named(page):
    answers = iter([503, 503])

    def busy(route):
        status = next(answers, None)
        if status:
            route.fulfill(status=status, headers={"Retry-After": "0.01"}, json={"detail": "busy"})
        else:
            route.continue_()

    page.route("**/*:predict", busy)
    scored(page, GOOD)
    page.unroute("**/*:predict")
    page.route("**/*:predict", lambda route: route.fulfill(status=408, json={"detail": "more than 30 seconds"}))
    upload(page, GOOD)
    expect(card(page, GOOD.name).first.locator(".error")).to_contain_text("upload took too long")
    page.unroute("**/*:predict")
    page.route("**/*:predict", lambda route: route.fulfill(status=413, body="<html>of a proxy</html>"))
    upload(page, GOOD)
    expect(card(page, GOOD.name).first.locator(".error")).to_have_text("The file is too large")
    page.unroute("**/*:predict")
    page.route("**/*:predict", lambda route: route.abort())
    upload(page, BAD)
    expect(card(page, BAD.name).locator(".error")).to_contain_text("cannot be reached")


def test_a_server_that_was_away_when_the_page_came_is_asked_again(page):
    page.route("**/v1/models", lambda route: route.abort())
    page.reload()
    expect(page.locator("#notice")).to_have_text("The server cannot be reached")
    upload(page, GOOD)
    expect(page.locator("#notice")).to_have_text("The server cannot be reached")
    assert page.locator("article").count() == 0
    page.unroute("**/v1/models")
    scored(page, GOOD)
    expect(page.locator("#notice")).to_be_empty()


def test_the_docs_work_offline(page, server):
    page.goto(f"{server.url}/docs")
    expect(page.get_by_text("/v1/models/{name}:predict")).to_be_visible()
