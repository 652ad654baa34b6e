"""The HTML pages in a browser without a network. Skipped where no browser with a driver is installed."""

import shutil
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from test_interpret import SCRIPT, hostile_trace, random_trace

from interpret import charts, page
from interpret.trace import KINDS

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs Chromium or Chrome with chromedriver"),
]

VIEWS = ("ribbons", "candidates", "gallery", "heat_map", "top_keys", "bars")
COLORS_OF = """
const canvas = document.querySelector(`#${arguments[0]} canvas`);
const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data, colors = new Set();
for (let i = 0; i < data.length; i += 4) colors.add((data[i] << 16) | (data[i + 1] << 8) | data[i + 2]);
return colors.size;
"""  # the number of colors on a canvas; 1 on a blank one


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = tmp_path_factory.mktemp("profile")
    flags = "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-component-update disable-sync"
    flags += " disable-background-networking hide-scrollbars window-size=1440,900"
    for flag in [*flags.split(), f"user-data-dir={profile}"]:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.execute_cdp_cmd("Network.enable", {})
    offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    driver.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    yield driver
    driver.quit()


def window(browser, width: int, height: int) -> None:
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def wait_until(browser, condition: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not browser.execute_script(f"return {condition}"):
        assert time.monotonic() < end, f"not true after {seconds} s: {condition}"
        time.sleep(0.02)


def open_page(browser, path: Path, views: int = len(VIEWS)) -> float:
    """Seconds from opening the page until all charts are drawn."""
    browser.get_log("performance")
    browser.get_log("browser")
    start = time.perf_counter()
    browser.get(path.as_uri())
    wait_until(browser, f"typeof views !== 'undefined' && Object.keys(views).length === {views}")
    return time.perf_counter() - start


def click_head(browser, layer: int, head: int) -> None:
    """Clicks a thumbnail; waits until the head is selected."""
    from selenium.webdriver import ActionChains

    place = f"""
        const view = views.gallery, box = document.querySelector("#gallery canvas").getBoundingClientRect();
        document.querySelector("#gallery").scrollIntoView({{block: "center"}});
        return [view.origin()[0] + view.scale("x")({head} + 0.5) - box.width / 2,
                view.origin()[1] + view.scale("y")({layer} + 0.5) - box.height / 2];"""
    x, y = browser.execute_script(place)
    canvas = browser.find_element("css selector", "#gallery canvas")
    ActionChains(browser).move_to_element_with_offset(canvas, round(x), round(y)).click().perform()
    wait_until(browser, f"state.picked.join() === '{layer}.{head}'")


@pytest.mark.parametrize("tokens", [20, 60])
def test_page_of_48_heads_opens_offline_and_a_click_selects_a_head(browser, tmp_path, tokens):
    path = tmp_path / "page.html"
    page.save_page(random_trace(L=6, H=8, S=tokens, T=tokens), path)
    window(browser, 1440, 900)
    seconds = [open_page(browser, path) for _ in range(3)]
    requests = [e["message"] for e in browser.get_log("performance") if '"Network.requestWillBeSent"' in e["message"]]
    assert [message for message in requests if "http://" in message or "https://" in message] == []
    assert browser.get_log("browser") == []
    for layer, head in ((1, 2), (4, 7)):
        click_head(browser, layer, head)
        assert browser.find_element("id", "head").text == f"Cross-attention, layer {layer}, head {head}"
    print(f"{tokens} tokens: open {min(seconds):.2f} s, {path.stat().st_size / 1e6:.2f} MB")
    assert path.stat().st_size < (2e6 if tokens == 20 else 6e6)
    assert min(seconds) < 15  # on a busy machine; half a second on a free one


@pytest.mark.parametrize(("width", "height"), [(1440, 900), (390, 844)])
def test_no_view_is_blank_and_nothing_is_wider_than_the_window(browser, tmp_path, width, height):
    """With three encoder and one decoder layers, and with a long title."""
    trace = random_trace(L=3, decoder_L=1, S=30, T=24)
    page.save_page(
        [trace, replace(trace, src_tokens=["[SOS]", *["incomprehensibilities"] * 28, "[EOS]"])], tmp_path / "p.html"
    )
    window(browser, width, height)
    open_page(browser, tmp_path / "p.html")
    for sentence in (0, 1):
        browser.execute_script(f"choose({sentence})")
        for kind in KINDS:
            browser.find_element("css selector", f"#kind [value={kind}]").click()
            wait_until(browser, f"state.kind === '{kind}' && Object.keys(views).length === {len(VIEWS)}")
            assert browser.execute_script("return document.documentElement.scrollWidth") <= width
            for view in VIEWS if kind != "encoder" else set(VIEWS) - {"candidates"}:
                assert browser.execute_script(COLORS_OF, view) > 3, (kind, view)
            assert browser.execute_script("return Number(state.picked[0].split('.')[0]) < state.layers[state.kind]")


def test_another_sentence_shows_a_layer_that_its_kind_has(browser, tmp_path):
    trace = random_trace(L=1, decoder_L=3)
    page.save_page([trace, trace], tmp_path / "p.html")
    window(browser, 1440, 900)
    open_page(browser, tmp_path / "p.html")
    browser.find_element("css selector", "#kind [value=encoder]").click()
    wait_until(browser, "state.kind === 'encoder'")
    browser.execute_script("choose(1)")
    assert browser.execute_script("return [state.kind, ...state.picked]") == ["encoder", "0.mean"]


def test_film_moves_without_jumps_and_stops_at_the_last_row(browser, tmp_path):
    from selenium.webdriver.common.keys import Keys

    page.save_page(random_trace(T=4), tmp_path / "p.html")
    window(browser, 1440, 900)
    open_page(browser, tmp_path / "p.html")
    body, play = browser.find_element("tag name", "body"), browser.find_element("id", "play")
    body.send_keys(Keys.ARROW_RIGHT)
    wait_until(browser, "state.t === 1 && state.film")
    body.send_keys(Keys.ARROW_LEFT)
    wait_until(browser, "state.t === 0")
    sizes = "Object.values(views).map((view) => [view.width(), view.height()].join()).join()"
    browser.execute_script(
        f"window.seen = []; const move = set; set = (changes) => {{ move(changes); seen.push([state.t, {sizes}]); }}"
    )
    play.click()
    assert play.text == "Pause"
    wait_until(browser, "!playing && state.t === rows().length - 1 && !state.film")
    places, sizes = zip(*browser.execute_script("return seen"), strict=True)
    assert list(places) == sorted(places)
    assert any(place % 1 for place in places)  # frames between two rows
    assert len(set(sizes)) == 1
    play.click()
    wait_until(browser, "playing && state.t > 0")
    play.click()
    assert browser.execute_script("return playing") is False


def test_weights_of_the_row_are_those_of_the_trace(browser, tmp_path):
    """The data of the drawn bars, at the last step, with two heads selected."""
    trace = random_trace()
    page.save_page(trace, tmp_path / "p.html")
    window(browser, 1440, 900)
    open_page(browser, tmp_path / "p.html")
    for t in (1.5, 3, 2.6, 3.4):  # what is drawn does not depend on the way there
        browser.execute_script("set({ t: arguments[0] }); return views.bars.runAsync().then(() => null)", t)
    browser.execute_script("set({ picked: ['0.1', '1.2'] }); focusRow(3, 1)")
    wait_until(browser, "state.t === 3")
    find = """
        const found = {}, visit = (item) => {
          if (item.datum && item.datum.weight !== undefined) found[item.datum.column] = item.datum.weight;
          (item.items || []).forEach(visit); };
        visit(views.bars.scenegraph().root); return found;"""
    drawn = browser.execute_script(find)
    expected = (trace.weights["cross"][0, 1, 3] + trace.weights["cross"][1, 2, 3]) / 2
    assert [drawn[str(i)] for i in range(len(expected))] == pytest.approx(expected.tolist(), abs=1e-4)
    assert browser.find_element("id", "row").text == "Row 3: t1 → t1 · sum 1.0000"


def test_theme_follows_the_preference_and_the_switch(browser, tmp_path):
    page.save_page(random_trace(), tmp_path / "p.html")
    background = "getComputedStyle(document.body).backgroundColor"
    for preference, color, other in (("dark", "rgb(13, 16, 21)", "rgb(244, 245, 247)"),
                                     ("light", "rgb(244, 245, 247)", "rgb(13, 16, 21)")):  # fmt: skip
        media = {"features": [{"name": "prefers-color-scheme", "value": preference}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        open_page(browser, tmp_path / "p.html")
        assert browser.execute_script(f"return {background}") == color
        browser.find_element("id", "theme").click()
        assert browser.execute_script(f"return {background}") == other


def test_no_script_in_a_token_or_name_runs(browser, tmp_path):
    """In the attention page, in the report of experiments.py and in the notebook output for Colab."""
    trace = hostile_trace()
    page.save_page([trace, trace], tmp_path / "attention.html")
    steps = pd.DataFrame(
        [{"step": 0, "label": SCRIPT, "word": SCRIPT, "logit": 1.0, "probability": 0.5, "chosen": True}]
    )
    variants = pd.DataFrame([{"variant": SCRIPT, "translation": SCRIPT, "change": -1.0, "description": SCRIPT}])
    importance = pd.DataFrame([{"kind": "cross", "layer": 0, "head": i, "bleu_drop": float(i)} for i in range(3)])
    page.save_report(tmp_path / "report.html", SCRIPT, trace, trace, steps, variants, importance)
    notebook = charts.render_html(charts.grid(trace, "cross").to_dict())["text/html"]
    (tmp_path / "notebook.html").write_text(f"<!DOCTYPE html><body>{notebook}</body>", encoding="utf8")
    window(browser, 1440, 900)
    for name, views in (("attention", len(VIEWS)), ("report", 4), ("notebook", None)):
        if views:
            open_page(browser, tmp_path / f"{name}.html", views)
        else:
            browser.get((tmp_path / f"{name}.html").as_uri())
        time.sleep(0.5)
        assert browser.execute_script("return window.attacked") is None, name
        assert browser.find_elements("css selector", "img[src=x]") == [], name
        if views:
            assert SCRIPT in browser.find_element("id", "title").text
            assert SCRIPT in browser.find_element("css selector", ".about").text
