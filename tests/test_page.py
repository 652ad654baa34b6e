"""The HTML page in a browser without a network. Skipped where no browser with a driver is installed."""

import shutil
import time
from pathlib import Path

import pytest
from test_interpret import random_trace

from interpret import page

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs Chromium or Chrome with chromedriver"),
]

# Measures the time from the next click to the first frame in which the canvas has changed.
WATCH = """
const canvas = document.querySelector("canvas"), context = canvas.getContext("2d");
const look = () => { // a checksum of every 97th byte is enough
  const data = context.getImageData(0, 0, canvas.width, canvas.height).data;
  let sum = 0;
  for (let i = 0; i < data.length; i += 97) sum = (sum * 31 + data[i]) >>> 0;
  return sum;
};
window.redrawn = null;
canvas.addEventListener("click", () => {
  const before = look(), start = performance.now();
  const check = () => look() !== before ? window.redrawn = performance.now() - start : requestAnimationFrame(check);
  requestAnimationFrame(check);
}, {capture: true, once: true});
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = tmp_path_factory.mktemp("profile")
    flags = "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-component-update disable-sync"
    flags += " disable-background-networking window-size=1600,1900"
    for flag in [*flags.split(), f"user-data-dir={profile}"]:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.execute_cdp_cmd("Network.enable", {})
    offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    driver.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    yield driver
    driver.quit()


def open_page(browser, path: Path) -> float:
    """Seconds from opening the page until its chart is drawn."""
    browser.get_log("performance")
    browser.get_log("browser")
    start = time.perf_counter()
    browser.get(path.as_uri())
    while not browser.execute_script("const c = document.querySelector('canvas'); return c !== null && c.width > 300"):
        time.sleep(0.01)
    return time.perf_counter() - start


def click_head(browser, layer: int, head: int) -> float:
    """Clicks a thumbnail of the 6 x 8 grid; returns the milliseconds until the canvas changes."""
    from selenium.webdriver import ActionChains

    canvas = browser.find_element("css selector", "canvas")
    browser.execute_script(WATCH)
    x, y = 69 + 65 * head - canvas.size["width"] // 2, 121 + 65 * layer - canvas.size["height"] // 2
    ActionChains(browser).move_to_element_with_offset(canvas, x, y).click().perform()
    for _ in range(300):
        if (redrawn := browser.execute_script("return window.redrawn")) is not None:
            return redrawn
        time.sleep(0.01)
    pytest.fail("the canvas did not change after the click")


def test_page_of_48_heads_opens_offline_and_a_click_redraws_it(browser, tmp_path):
    path = tmp_path / "page.html"
    page.save_page(random_trace(L=6, H=8, S=20, T=20), path)
    assert path.stat().st_size < 2e6
    seconds = [open_page(browser, path)]
    requests = [e["message"] for e in browser.get_log("performance") if '"Network.requestWillBeSent"' in e["message"]]
    assert [message for message in requests if "http://" in message or "https://" in message] == []
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    seconds += [open_page(browser, path) for _ in range(2)]
    redrawn = []
    for layer, head in ((1, 2), (4, 7), (0, 5)):
        redrawn.append(click_head(browser, layer, head))
        slider, menu = (
            browser.find_element("css selector", f".vega-bindings {s}") for s in ("input[name=pick_layer]", "select")
        )
        assert (slider.get_property("value"), menu.get_property("value")) == (str(layer), str(head))
    print(f"open {min(seconds):.2f} s, redraw {min(redrawn):.0f} ms, {path.stat().st_size / 1e6:.2f} MB")
    assert min(seconds) < 1.5  # the best of three, as other processes may slow one down
    assert min(redrawn) < 200


def test_page_of_60_tokens_opens(browser, tmp_path):
    path = tmp_path / "page.html"
    page.save_page(random_trace(L=6, H=8, S=60, T=60), path)
    seconds = min(open_page(browser, path) for _ in range(3))
    print(f"60 tokens: open {seconds:.2f} s, {path.stat().st_size / 1e6:.2f} MB")
    assert seconds < 3
