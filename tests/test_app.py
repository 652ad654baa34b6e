"""The live explorer: its logic without a browser, and driven by real clicks in one.

Skipped without Streamlit (requirements-app.txt); the tests in a browser also without Chromium or Chrome with a driver.
"""

import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
import tomllib
import urllib.request
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from dataset import SOS
from interpret.stage import Stage
from interpret.theme import DARK, LIGHT
from interpret.trace import merge_bytes, record_trace, recorded_pass
from runs.checkpoint import load_checkpoint, save_checkpoint, without_optimizer
from runs.folder import RunFolder
from train import train_model
from translate import Translator

pytest.importorskip("streamlit")
from streamlit.testing.v1 import AppTest

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
in_browser = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs Chromium or Chrome with chromedriver")
SENTENCE = "I can eat an apple."
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> ![a](http://example.com/a.png)"
RUN = "<img src=x onerror=alert(3)>"  # the name of the run's folder


@pytest.fixture(scope="module")
def workplace(trained_run, tmp_path_factory) -> Path:
    """A folder with the trained run under weights/ and the app's settings."""
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "weights").mkdir()
    (folder / "weights" / RUN).symlink_to(trained_run, target_is_directory=True)
    shutil.copytree(ROOT / ".streamlit", folder / ".streamlit")
    return folder


# ---------------------------------------------------------------------------- without a browser


def test_the_settings_keep_the_app_on_this_machine_and_in_the_colors_of_the_theme():
    settings = tomllib.loads((ROOT / ".streamlit" / "config.toml").read_text(encoding="utf8"))
    assert settings["server"]["address"] == "localhost"
    assert settings["browser"]["gatherUsageStats"] is False
    for name, palette in (("light", LIGHT), ("dark", DARK)):
        colors = settings["theme"][name]
        assert colors["backgroundColor"] == palette.page
        assert (colors["primaryColor"], colors["textColor"]) == (palette.read, palette.text)


@pytest.mark.slow
def test_python_names_the_command_that_starts_the_app():
    done = subprocess.run([sys.executable, ROOT / "app.py"], capture_output=True, text=True)
    assert "streamlit run app.py" in done.stdout
    assert done.returncode == 0


def test_without_a_run_the_app_says_how_to_train_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    app = AppTest.from_file(ROOT / "app.py", default_timeout=120).run()
    assert not app.exception
    assert "no trained run" in app.error[0].value.replace("\\", "")


@pytest.mark.slow
def test_without_a_trained_run_the_app_offers_the_pretrained_ones(tmp_path, monkeypatch):
    (tmp_path / "pretrained").symlink_to(ROOT / "pretrained")
    monkeypatch.chdir(tmp_path)
    app = AppTest.from_file(ROOT / "app.py", default_timeout=120).run()
    assert not app.exception
    assert not app.error
    runs, weights = app.selectbox[:2]
    assert runs.options == [str(Path("pretrained/toy.en-it")), str(Path("pretrained/toy.en-de"))]
    assert weights.options == ["best"]


@pytest.mark.slow
def test_a_run_restored_from_a_mirror_can_be_opened(trained_run, tmp_path, monkeypatch):
    run = tmp_path / "weights" / "restored"
    shutil.copytree(trained_run, run)
    for path in RunFolder(run).epoch_checkpoints():
        save_checkpoint(path.with_stem(f"{path.stem}_weights"), without_optimizer(load_checkpoint(path)))
        path.unlink()
    monkeypatch.chdir(tmp_path)
    app = AppTest.from_file(ROOT / "app.py", default_timeout=120).run()
    assert not app.exception
    assert app.selectbox[1].options == ["best", "latest", "epoch 0"]


def test_a_run_that_is_trained_anew_has_another_version(tmp_path):
    from app import version_of

    run = RunFolder(tmp_path)
    for path in (run.checkpoint(epoch=1), run.config_file):
        path.write_bytes(b"a")
    before = version_of(run)
    assert version_of(run) == before
    run.checkpoint(epoch=1).write_bytes(b"bb")
    assert version_of(run) != before
    before = version_of(run)
    run.scores_file.write_bytes(b"")
    assert version_of(run) != before


@pytest.mark.parametrize(
    ("tokens", "shown"),
    [
        (["▁Ein", "▁ge", "bä", "ude", ".", "[EOS]"], "Ein ge<mark>bä</mark>ude."),
        (["Ein", "großes", "&", "Haus", "[EOS]"], "Ein großes <mark>&amp;</mark> Haus"),
    ],
)
def test_what_has_changed_in_a_translation_is_marked(tokens, shown):
    from app import translation_html

    marks = [token in ("bä", "&") for token in tokens]
    view = SimpleNamespace(marks=lambda: marks, trace=SimpleNamespace(next_tokens=tokens))
    assert translation_html(view) == shown


@pytest.fixture
def app(workplace, monkeypatch) -> AppTest:
    monkeypatch.chdir(workplace)
    app = AppTest.from_file(ROOT / "app.py", default_timeout=120).run()
    assert not app.exception
    return app


def stage_of(app: AppTest) -> Stage:
    return app.session_state["stage"]


def texts(app: AppTest) -> str:
    return " ".join(element.proto.body for element in app.get("html"))


@pytest.mark.slow
def test_a_sentence_is_translated_and_the_state_goes_into_the_link(app, trained_run):
    app.text_input[0].set_value("We sleep.").run()
    assert Translator.load(trained_run, "cpu").translate(["We sleep."])[0] in texts(app)
    assert Stage.from_query(dict(app.query_params)) == stage_of(app)


@pytest.mark.slow
def test_steps_and_search_change_the_stage(app):
    app.button(key="next").click().run()
    assert stage_of(app).row == 2
    app.button(key="back").click().run()
    assert stage_of(app).row == 1
    app.selectbox(key="w_beam").set_value(3).run()
    assert stage_of(app).beam == 3
    assert not app.exception


@pytest.mark.slow
def test_every_kind_panel_and_kind_of_change_can_be_shown(app):
    shown = [
        ("Change the model", ("no positions",)),
        ("Beam search", ("decoder: source copied",)),
        ("Inside the head", ("decoder: no cross-attention",)),
    ]
    for kind in ("encoder", "decoder", "cross"):
        for panel, changes in shown:
            app.session_state["stage"] = Stage(
                run=stage_of(app).run, heads=("0.1", "1.2"), kind=kind, panel=panel, changes=changes, beam=3, row=99
            )
            app.run()
            assert not app.exception


@pytest.mark.slow
def test_a_wrong_link_and_a_long_sentence_are_one_error_each(app):
    app.text_input[0].set_value("word " * 200).run()
    assert "exceeds the limit of 64" in app.error[0].value.replace("\\", "")
    app.text_input[0].set_value("").run()
    assert "empty" in app.error[0].value
    app.text_input[0].set_value(SENTENCE).run()
    assert not app.error
    app.session_state["stage"] = Stage.from_query({"run": "/etc", "prefix": "99999999", "weights": "77"})
    app.run()
    assert "no token 99999999" in app.error[0].value
    assert not app.exception


@pytest.mark.slow
def test_a_film_ends_at_the_last_step(app, monkeypatch):
    app.button(key="play").click().run()
    assert app.session_state["playing"]
    assert app.button(key="play").label == "Pause"
    for _ in range(12):
        app.session_state["ticked"] -= 10
        app.run()
    assert not app.session_state["playing"]
    assert not app.exception


def test_a_run_with_subwords_joins_the_bytes_of_a_character(tiny_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = replace(tiny_config, tokenizer="bpe", vocab_size=400, num_epochs=1, run_dir="weights/tiny")
    train_model(config)
    app = AppTest.from_file(ROOT / "app.py", default_timeout=120).run()
    app.text_input[0].set_value("The café 🍎 is old.").run()
    assert not app.exception
    assert not app.error
    for kind in ("encoder", "decoder", "cross"):
        app.session_state["stage"] = replace(stage_of(app), kind=kind, panel="Inside the head", row=5)
        app.run()
        assert not app.exception
    trace = record_trace(Translator.load("weights/tiny", "cpu"), "The café 🍎 is old.", "")
    assert any(token.startswith("<0x") for token in trace.src_tokens)
    assert "🍎" in merge_bytes(trace).src_tokens


@pytest.mark.slow
def test_hostile_text_is_escaped(app):
    app.text_input[0].set_value(HOSTILE).run()
    assert not app.exception
    for part in ("<script>alert", "<img src=x"):
        assert part not in texts(app)
    for label in [*app.button, *app.caption, *app.markdown]:
        assert "![a]" not in getattr(label, "label", getattr(label, "value", ""))


# ---------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def address(workplace) -> str:
    """The app on a free port."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "streamlit", "run", ROOT / "app.py", "--server.port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([*command, "--server.headless", "true"], cwd=workplace, env=environment) as server:
        address = f"http://localhost:{port}"
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{address}/_stcore/health")
                break
            except OSError:
                time.sleep(0.1)
        yield address
        server.terminate()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    flags = "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-component-update disable-sync"
    flags += f" disable-background-networking window-size=1440,900 user-data-dir={tmp_path_factory.mktemp('profile')}"
    for flag in flags.split():
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


class Page:
    """The app in the browser."""

    def __init__(self, browser, address: str):
        self.browser, self.address = browser, address

    def open(self, query: str = "") -> None:
        self.browser.get("about:blank")
        self.browser.get_log("browser")
        self.browser.get_log("performance")
        self.browser.get(f"{self.address}/{query}")
        self.wait_for(lambda: self.all(".st-key-chart_bars svg text"))
        self.wait()

    def all(self, selector: str) -> list:
        return self.browser.find_elements("css selector", selector)

    def one(self, selector: str):
        self.wait_for(lambda: self.all(selector))
        return self.all(selector)[0]

    def wait_for(self, condition, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"nothing happened for {seconds} s"
            time.sleep(0.02)

    def wait(self) -> None:
        """Waits until the app is idle."""
        time.sleep(0.3)
        self.wait_for(lambda: self.all("[data-test-script-state=notRunning]"))
        time.sleep(0.3)

    def click(self, element) -> None:
        from selenium.webdriver import ActionChains

        self.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        time.sleep(0.2)
        ActionChains(self.browser).move_to_element(element).click().perform()

    def button(self, text: str):
        self.wait_for(lambda: self.browser.find_elements("xpath", f"//button[contains(., '{text}')]"))
        return self.browser.find_element("xpath", f"//button[contains(., '{text}')]")

    def read(self, selector: str, attribute: str = "textContent") -> list[str]:
        """The text, or an attribute, of all elements, in one go: the app may replace elements at any time."""
        of_element = "e => e[arguments[1]] ?? e.getAttribute(arguments[1])"
        script = f"return [...document.querySelectorAll(arguments[0])].map({of_element})"
        return self.browser.execute_script(script, selector, attribute)

    def labels(self, chart: str, start: str) -> list[str]:
        """The descriptions of marks."""
        return self.read(f".st-key-chart_{chart} [aria-label^='{start}']", "aria-label")

    def translation(self) -> str:
        return " ".join(self.read(".said:not(.before)"))

    def type(self, text: str) -> None:
        """Replaces the sentence; no key ends it."""
        from selenium.webdriver.common.keys import Keys

        self.one(".st-key-w_sentence input").send_keys(Keys.CONTROL, "a")
        self.one(".st-key-w_sentence input").send_keys(text)

    def took(self, event: str, selector: str, wanted: list[str], action) -> float:
        """Milliseconds from the last event of the action until the elements have changed, and include `wanted`."""
        self.wait()
        self.browser.execute_script(WATCH, event, selector, wanted)
        action()
        self.wait_for(lambda: self.browser.execute_script("return window.took") is not None)
        return self.browser.execute_script("return window.took")

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.browser.get_log("browser") if entry["level"] == "SEVERE"]

    def addresses(self) -> set[str]:
        """The machines that were asked for something."""
        messages = [json.loads(entry["message"])["message"] for entry in self.browser.get_log("performance")]
        requests = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return {url.split("/")[2] for url in requests if url.startswith(("http", "ws"))}


WATCH = """
const [event, selector, wanted] = arguments;
const look = () => [...document.querySelectorAll(selector)].map(element => element.textContent);
const before = look().join("|");
let start = null;
const begin = () => { start = performance.now(); };
window.took = null;
document.addEventListener(event, begin, {capture: true});
const check = () => {
  const now = look();
  if (start !== null && now.join("|") !== before && wanted.every(text => now.includes(text))) {
    document.removeEventListener(event, begin, {capture: true});
    window.took = performance.now() - start;
  } else requestAnimationFrame(check);
};
requestAnimationFrame(check);
"""


@pytest.fixture
def page(browser, address) -> Page:
    page = Page(browser, address)
    page.open()
    return page


@pytest.mark.slow
@in_browser
def test_typing_translates_and_shows_the_numbers_of_the_model(page, trained_run):
    page.type("You want to read a new book.")
    page.wait_for(lambda: any("book" in label for label in page.labels("ribbons", "key")))
    page.wait()
    translator = Translator.load(trained_run, "cpu")
    assert page.translation() == translator.translate(["You want to read a new book."])[0]
    ids = translator.tokenizer_tgt.encode(page.translation()).ids
    with torch.inference_mode():
        _, weights = recorded_pass(translator, translator.encode("You want to read a new book."), [SOS, *ids])
    heads = Stage.from_query(
        page.browser.execute_script("return Object.fromEntries(new URLSearchParams(location.search))")
    )
    layer, head = map(int, heads.heads[0].split("."))
    cells = page.labels("map", "cell")
    assert len(cells) == weights["cross"][layer, head].size
    for cell in cells:
        row, column, weight = cell.replace(":", "").split()[1:]
        assert abs(float(weight) - weights["cross"][layer, head, int(row), int(column)]) < 5e-4
    assert page.labels("bars", "sum") == ["sum: 1.0000"]
    assert (page.errors(), page.addresses()) == ([], {page.address.split("/")[2]})


@pytest.mark.slow
@in_browser
def test_a_click_on_a_head_switches_it_off_and_the_translation_changes(page):
    page.click(page.button("Switch off"))
    page.wait()
    for head in page.labels("gallery", "head"):
        page.click(page.one(f".st-key-chart_gallery [aria-label='{head}']"))
        page.wait()
        if page.all(".said mark"):
            break
    (before,) = page.read(".said.before")
    assert "baseline" in before
    assert page.translation() not in before
    assert "off" in page.read(".st-key-chart_gallery svg text")
    page.click(page.button("All on"))
    page.wait_for(lambda: not page.all(".said.before"))
    assert page.errors() == []


@pytest.mark.slow
@in_browser
def test_another_candidate_is_taken_and_decoding_continues(page):
    before = page.translation()
    second = page.labels("candidates", "candidate")[1]
    page.click(page.one(f".st-key-chart_candidates [aria-label='{second}']"))
    page.wait_for(lambda: page.translation() != before)
    page.wait()
    token = second.split(":")[0].removeprefix("candidate ")
    assert token in page.translation()
    assert any(label.endswith(f"→ {token}") for label in page.labels("ribbons", "row"))
    link = page.browser.current_url
    continued = page.translation()
    page.click(page.button("Let the model choose"))
    page.wait_for(lambda: page.translation() == before)
    page.open(link.removeprefix(page.address).removeprefix("/"))
    assert page.translation() == continued
    assert page.errors() == []


@pytest.mark.slow
@in_browser
def test_the_film_plays_and_arrow_keys_step(page):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    def hidden() -> bool:
        return "0" in page.read(".st-key-chart_ribbons [aria-label^='row']", "opacity")

    def step() -> str:
        return page.read(".st-key-card_candidates .head")[0].partition(":")[0]

    ActionChains(page.browser).send_keys(Keys.ARROW_RIGHT).perform()
    page.wait_for(lambda: step() == "Step 3")
    ActionChains(page.browser).send_keys(Keys.ARROW_LEFT).perform()
    page.wait_for(lambda: step() == "Step 2")
    page.click(page.button("Play"))
    page.wait_for(hidden)
    page.wait_for(lambda: step() not in ("Step 1", "Step 2"))
    page.wait_for(lambda: not hidden() and page.button("Play"))
    assert step() == f"Step {len(page.labels('ribbons', 'row'))}"
    assert page.errors() == []


@pytest.mark.slow
@in_browser
def test_a_link_restores_the_view(page):
    page.open("?sentence=We+sleep.&beam=3&kind=decoder&heads=0.1~1.2&row=2&panel=Beam+search&changes=no+positions")
    assert page.one(".st-key-w_sentence input").get_property("value") == "We sleep."
    assert "Mean of heads 0.1, 1.2" in page.read(".st-key-card_map .head")
    assert page.read(".st-key-card_panel .head")[0].startswith("Beam of 3")
    assert page.all(".st-key-chart_beam svg path")
    assert page.all(".said.before")
    assert page.errors() == []


@pytest.mark.slow
@in_browser
def test_hostile_text_never_runs(page):
    from selenium.common.exceptions import NoAlertPresentException

    page.type(HOSTILE)
    page.wait_for(lambda: any("script" in label for label in page.labels("ribbons", "key")))
    page.wait()
    page.browser.execute_script(
        "document.querySelectorAll('details, [data-testid=stPopover] button').forEach(e => e.click())"
    )
    page.wait()
    assert page.read(".st-key-w_run input", "value") == [f"weights/{RUN}"]
    assert page.all("img[src='x']") == []
    assert page.browser.execute_script("return [...document.scripts].filter(s => /alert/.test(s.text)).length") == 0
    with pytest.raises(NoAlertPresentException):
        _ = page.browser.switch_to.alert
    assert (page.errors(), page.addresses()) == ([], {page.address.split("/")[2]})


@pytest.mark.slow
@in_browser
def test_the_app_answers_soon(page):
    """The limits are generous, as other processes may slow the app down; -s prints the medians."""
    texts = ".st-key-chart_ribbons svg text"
    things = "an apple", "bread", "the soup", "a cake", "the cheese"
    sentences = [f"{subject} eat {thing}." for thing in things for subject in ("We", "They", "You", "I")]
    typing = [page.took("input", texts, [s.split()[0], "."], lambda s=s: page.type(s)) for s in sentences]
    page.click(page.button("Switch off"))
    page.wait()
    clicks = []
    for head in (page.labels("gallery", "head")[:10]) * 2:  # off, then on again
        element = page.one(f".st-key-chart_gallery [aria-label='{head}']")
        clicks.append(page.took("click", ".note", [], lambda e=element: page.click(e)))
    print(f"sentence {statistics.median(typing):.0f} ms, head {statistics.median(clicks):.0f} ms (medians of 20)")
    assert min(typing) < 3000
    assert min(clicks) < 2000
