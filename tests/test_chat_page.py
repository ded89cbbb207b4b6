"""
The chat page in a real headless Chromium: streaming, colours, stop, edit, regenerate, history, a phone's width, dark,
keyboard.

Needs playwright (`pip install playwright`) and a Chromium: the system's, or what `playwright install chromium` fetches.
"""
import os
import shutil

import pytest
from conftest import randomize
from test_chat_web import expected, serve
from test_chat_web import model as model
from test_chat_web import tokenizer as tokenizer

from nanochat.checkpoint_manager import build_model
from nanochat.gpt import GPTConfig
from nanochat.hybrid_gpt import HybridConfig

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as p:
        try:
            browser = p.chromium.launch(executable_path=shutil.which("chromium") or shutil.which("chromium-browser"),
                                        args=["--no-sandbox"])
        except sync_api.Error as e:
            pytest.skip(f"no Chromium could be started: {str(e).splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(model, tokenizer):
    with serve(model, tokenizer) as running:
        yield running


@pytest.fixture
def page(browser, server):
    context = browser.new_context(viewport={"width": 1100, "height": 800})
    page = context.new_page()
    page.faults = []
    page.on("pageerror", lambda e: page.faults.append(str(e)))
    page.on("console", lambda m: page.faults.append(m.text) if m.type == "error" else None)
    open_page(page, server[0])
    yield page
    assert not page.faults, page.faults
    context.close()


def open_page(page, url):
    page.goto(url)
    page.wait_for_function("document.querySelectorAll('#mode option').length > 1")


def set_to(page, name, value):
    page.eval_on_selector(f"#{name}", "(e, v) => { e.value = v; e.dispatchEvent(new Event('input')); }", value)


def ask(page, text):
    """Types and sends; waits for the whole answer, which it returns."""
    page.fill("#text", text)
    page.press("#text", "Enter")
    page.wait_for_function("document.querySelector('#send').textContent === 'Send' && "
                           "[...document.querySelectorAll('.meta button')].some(b => b.textContent === 'Regenerate')")
    return answers(page)[-1]


def answers(page):
    return page.eval_on_selector_all(".answer", "nodes => nodes.map(n => n.textContent)")


def shot(page, name):
    """A screenshot where the tester asks for them: CHAT_PAGE_SHOTS=FOLDER."""
    if folder := os.environ.get("CHAT_PAGE_SHOTS"):
        page.screenshot(path=f"{folder}/{name}.png")


def test_an_answer_streams_is_coloured_and_is_the_engines(page, model, tokenizer):
    assert page.eval_on_selector_all("#mode option", "o => o.map(x => x.value)") == [*model.config.distinct_modes, "auto"]
    set_to(page, "temperature", "0")
    for mode in ("ghost", "think"):
        page.click("#new")
        page.select_option("#mode", mode)
        got = ask(page, "Hello, how are you?")
        assert got == expected(model, tokenizer, 128, temperature=0, mode=mode)
        titles = page.eval_on_selector_all(".answer span", "nodes => nodes.map(n => n.title)")
        width = 8 if mode == "ghost" else 32
        assert titles and set(titles) == {f"4 of 4 blocks, mean width {width}"}
        figures = page.text_content("section:last-child .meta")
        assert figures.startswith(mode) and "tokens/s" in figures
        shot(page, f"answer_{mode}")
    assert "% of compute saved" in page.text_content("section:last-child .meta")
    assert page.text_content("#status") == got  # what a screen reader hears
    colours = {mode: page.evaluate(f"colour({{d: 4, w: {w}}})") for mode, w in (("ghost", 8), ("think", 32))}
    assert colours["ghost"] != colours["think"]


def test_edit_regenerate_and_history(page, server):
    set_to(page, "temperature", "0")
    first, second = ask(page, "the fox"), ask(page, "the dog")
    page.click("text=Regenerate")
    page.wait_for_function("document.querySelector('#send').textContent === 'Send'")
    assert answers(page) == [first, second]
    page.reload()
    page.wait_for_function("document.querySelectorAll('#mode option').length > 1")
    assert answers(page) == [first, second]  # the history is in the browser
    page.click("section:first-child >> text=Edit")
    assert page.input_value("#text") == "the fox" and answers(page) == []
    set_to(page, "temperature", "0")
    assert ask(page, "the fox") == first
    page.click("#new")
    assert ask(page, "lazy") and page.locator("#chats .chat").count() == 2
    page.click("#chats .chat:last-child button:first-child")
    assert answers(page) == [first]
    page.click("#chats .chat:last-child [aria-label='Delete this conversation']")
    assert page.locator("#chats .chat").count() == 1


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop_ends_the_answer_here_and_in_the_server(browser, tokenizer, how):
    config = GPTConfig(4096, tokenizer.get_vocab_size(), 2, 4, 4, 32)
    endless = randomize(build_model(HybridConfig.from_base(config))).requires_grad_(False)
    endless.lm_head.weight[tokenizer.encode_special("<|assistant_end|>")] = 0
    with serve(endless, tokenizer) as (url, worker):
        page = browser.new_page()
        open_page(page, url)
        page.fill("#text", "the fox")
        page.press("#text", "Enter")
        page.wait_for_selector(".answer span:nth-child(5)")
        page.click("#send") if how == "button" else page.keyboard.press("Escape")
        page.wait_for_function("document.querySelector('#send').textContent === 'Send'")
        for _ in range(100):
            if not worker.batches:
                break
            page.wait_for_timeout(50)
        assert not worker.batches and 5 <= page.locator(".answer span").count() < 512
        page.close()


def test_a_phones_width_and_dark(browser, server):
    seen = {}
    for scheme in ("light", "dark"):
        page = browser.new_page(viewport={"width": 390, "height": 780}, color_scheme=scheme)
        open_page(page, server[0])
        ask(page, "the quick brown fox " * 8)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.locator("#side").is_hidden()
        page.click("#menu")
        assert page.locator("#side").is_visible() and page.get_attribute("#menu", "aria-expanded") == "true"
        page.click("#chats .chat button:first-child")
        assert page.locator("#side").is_hidden()
        seen[scheme] = page.evaluate("(s => [s.backgroundColor, s.color])(getComputedStyle(document.body))")
        shot(page, f"phone_{scheme}")
        page.close()
    assert seen["light"] != seen["dark"]


def test_everything_can_be_reached_by_keyboard_and_has_a_name(page):
    ask(page, "the fox")
    unnamed = page.evaluate("""[...document.querySelectorAll('button, select, input, textarea')].filter(e =>
        !(e.getAttribute('aria-label') || e.ariaLabel || e.textContent.trim() || e.labels?.length)).map(e => e.outerHTML)""")
    assert unnamed == []
    page.focus("#new")
    reached = set()
    for _ in range(25):
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
        page.keyboard.press("Tab")
    assert {"new", "mode", "temperature", "text", "send", "Edit", "Regenerate"} <= reached


def test_an_error_of_the_server_is_shown(page):
    page.eval_on_selector("#mode", "e => { e.append(new Option('huge', 'huge')); e.value = 'huge'; }")
    page.fill("#text", "hello")
    page.press("#text", "Enter")
    page.wait_for_selector(".error")
    assert "unknown mode" in page.text_content(".error")
    page.faults.clear()  # the browser notes the reply's status 400 as an error of its own
