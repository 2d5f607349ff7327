"""The page in a real browser: Chromium, driven by Playwright, on the running service."""

import base64
import csv
import io
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from tests.serving import HOSTILE, Process

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
def open_page(browser, server):
    """Opens the page in a fresh context; afterwards nothing may have been asked of elsewhere, or gone wrong in it."""
    contexts, asked, errors = [], [], []

    def open_page(script="", **options):
        context = browser.new_context(**{"locale": "en-US", **options})
        context.add_init_script(script)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(server.url)
        expect(page.locator("#model option")).to_have_count(2)
        return page

    open_page.asked = asked
    yield open_page
    for context in contexts:
        context.close()
    assert not errors
    assert not [url for url in asked if not url.startswith((server.url, "blob:", "data:"))]


@pytest.fixture
def page(open_page):
    return open_page()


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
    assert shown.locator("img").evaluate("image => image.naturalWidth") == 256
    canvas = shown.locator("canvas")
    assert canvas.evaluate("canvas => [canvas.width, canvas.height]") == [64, 64]
    assert canvas.bounding_box() == shown.locator("img").bounding_box()
    colours = canvas.evaluate(
        "c => new Set(Array.from(new Uint32Array(c.getContext('2d').getImageData(0, 0, 64, 64).data.buffer))).size"
    )
    assert colours > 10


def test_the_heat_map_has_the_colours_of_infer(page):
    scored(page, GOOD)
    png = io.BytesIO()
    Image.frombytes("L", (3, 1), bytes([0, 128, 255])).save(png, "PNG")
    pixels = page.evaluate(
        """async (png) => {
            const canvas = document.createElement("canvas");
            await drawHeat(canvas, png);
            return Array.from(canvas.getContext("2d").getImageData(0, 0, 3, 1).data);
        }""",
        base64.b64encode(png.getvalue()).decode(),
    )
    blue, green, red = pixels[0:3], pixels[4:7], pixels[8:11]
    assert blue[2] > 100 > blue[0] + blue[1]
    assert green[1] == 255
    assert red[0] > 100 > red[1] + red[2]


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


def test_the_session_is_downloaded_as_csv(page, tmp_path):
    risky = tmp_path / '=1+1,"quoted".png'
    risky.write_bytes(b"no picture")
    scored(page, BAD)
    upload(page, risky)
    expect(card(page, risky.name).locator("strong")).to_have_text("error")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download CSV").click()
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
    expect(page.locator("#camera")).not_to_be_visible()
    assert page.evaluate("document.getElementById('video').srcObject") is None


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
    assert page.evaluate("sending") == 0


def test_the_keyboard_is_enough(page):
    names = []
    for _ in range(7):
        page.keyboard.press("Tab")
        names.append(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
    assert names == ["API", "language", "pick", "shoot", "model", "threshold", "opacity"]
    with page.expect_file_chooser() as chooser:
        page.locator("#pick").focus()
        page.keyboard.press("Enter")
    chooser.value.set_files(BAD)
    expect(page.locator("article .score")).to_have_text(re.compile(r"\d"))
    page.locator("#threshold").focus()
    page.keyboard.press("End")
    expect(page.locator("#threshold-value")).to_have_text("1.000")
    expect(page.locator("article strong")).to_have_text("Normal")


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
    shown = scored(page, BAD)
    for threshold in (0, 1):
        set_slider(page, "Threshold", threshold)
        for place in (shown.locator("strong"), shown.locator(".time"), page.locator("#status"), page.locator("h1")):
            assert contrast(place) >= 4.5  # WCAG AA
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


def test_a_phone_shows_all_of_it_without_scrolling_sideways(open_page):
    page = open_page(viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True, locale="en-US")
    scored(page, BAD)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    for name in ("Choose pictures", "Camera", "Download CSV"):
        box = page.get_by_role("button", name=name).bounding_box()
        assert box["height"] >= 40
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360


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
    page.route("**/*:predict", lambda route: route.abort())
    upload(page, BAD)
    expect(card(page, BAD.name).locator(".error")).to_contain_text("cannot be reached")


def test_the_docs_work_offline(page, server):
    page.goto(f"{server.url}/docs")
    expect(page.get_by_text("/v1/models/{name}:predict")).to_be_visible()
