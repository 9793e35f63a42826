"""The page as a person uses it, in a real browser."""

import shutil

import httpx
import pytest
from playwright.sync_api import Page, expect, sync_playwright

from tests.api.media import mp4, png, wav

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine (apt-get install chromium)")


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Opens the page; afterwards it must have made no error and asked nobody but its own server."""
    contexts, errors, asked = [], [], set()

    def opener(url: str, width: int = 1280, height: int = 800, scheme: str = "light") -> Page:
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on(
            "request", lambda request: asked.add(request.url.split("/")[2] if request.url.startswith("http") else "")
        )
        page.goto(url)
        opener.host = url.split("/")[2]
        return page

    opener.errors = errors
    yield opener
    for context in contexts:
        context.close()
    assert errors == []
    assert asked <= {opener.host, ""}


@pytest.fixture
def page(open_page, server):
    page = open_page(server.url)
    expect(page.locator("#model")).to_contain_text("tiny")
    page.fill("#max_tokens", "40")
    return page


def answers(page):
    return page.locator(".turn.assistant:not(.busy)")


@pytest.mark.parametrize(
    "label, kind",
    [("Who are you", None), ("How many shapes", "image"), ("How many beeps", "audio"), ("Which way", "video")],
)
def test_every_kind_of_example_gets_an_answer(page, label, kind):
    page.locator(".example", has_text=label).click()
    counts = answers(page).locator(".counts")
    expect(counts).to_contain_text("answer tokens")
    if kind:
        expect(counts).to_contain_text(f" {kind})")
        expect(page.locator(".turn.user .media > *")).to_have_count(1)


def test_a_conversation_by_keyboard(page):
    page.click("h1")
    page.keyboard.press("/")
    expect(page.locator("#text")).to_be_focused()
    page.keyboard.type("first line")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("second line, and on it goes for a while so that a page is full")
    page.keyboard.press("Enter")
    expect(answers(page)).to_have_count(1)
    expect(page.locator(".turn.user .said")).to_contain_text("first line\nsecond line")
    page.keyboard.type("and now?")
    page.keyboard.press("Enter")
    expect(answers(page)).to_have_count(2)
    hits = page.locator(".counts").nth(1).inner_text().split("cache: ")[1].split(" hit")[0]
    assert int(hits) > 0  # the conversation so far was in the cache
    page.click("#fresh")
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.locator("#welcome")).to_be_visible()


def test_attached_files_are_shown_sent_and_removable(page):
    page.set_input_files("#files", [
        {"name": "a.png", "mimeType": "image/png", "buffer": png()},
        {"name": "b.wav", "mimeType": "audio/wav", "buffer": wav()},
        {"name": "c.mp4", "mimeType": "video/mp4", "buffer": mp4()},
        {"name": "d.png", "mimeType": "image/png", "buffer": png()},
    ])  # fmt: skip
    expect(page.locator(".chip")).to_have_count(4)
    page.get_by_role("button", name="Remove d.png").click()
    expect(page.locator(".chip audio")).to_have_count(1)
    expect(page.locator(".chip video")).to_have_count(1)
    page.fill("#text", "what are these?")
    page.click("#send")
    counts = answers(page).locator(".counts")
    for kind in ("image", "audio", "video"):
        expect(counts).to_contain_text(kind)
    expect(page.locator(".chip")).to_have_count(0)


def test_dropping_a_file_attaches_it(page):
    page.evaluate("""() => {
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array([1, 2])], "note.txt", { type: "text/plain" }));
        document.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
    }""")
    expect(page.locator(".failure")).to_contain_text("note.txt: attach images, videos or sounds")


def test_thinking_is_shown_apart(page):
    page.get_by_label("Think before answering").check(force=True)
    page.fill("#temperature", "1")
    page.fill("#seed", "1")
    page.fill("#text", "hello")
    page.keyboard.press("Enter")
    expect(page.locator(".reasoning .thought")).not_to_be_empty()
    expect(page.locator(".counts")).to_contain_text("thinking")


def test_stop_keeps_the_page_usable(page, server):
    page.fill("#max_tokens", "450")
    page.fill("#temperature", "1")
    page.fill("#seed", "2")
    page.fill("#text", "go on")
    page.keyboard.press("Enter")
    expect(page.locator(".turn.assistant .said")).not_to_be_empty()
    page.click("#stop")
    expect(page.locator(".usage", has_text="Stopped.")).to_be_visible()
    expect(page.locator("#send")).to_be_visible()
    page.wait_for_timeout(300)
    assert httpx.get(f"{server.url}/health").json()["running"] == 0
    page.fill("#max_tokens", "2")
    page.fill("#text", "again")
    page.keyboard.press("Enter")
    expect(answers(page)).to_have_count(2)


def test_a_refusal_is_shown_in_the_servers_words(page, open_page):
    page.fill("#max_tokens", "100000")
    page.fill("#text", "hello")
    page.keyboard.press("Enter")
    expect(page.locator(".failure")).to_contain_text("max_tokens: is 100000")
    open_page.errors.clear()  # the browser reports the 400 as well


def test_the_code_is_the_request(page):
    page.fill("#seed", "7")
    page.fill("#text", 'say "hi"')
    expect(page.locator("#code")).to_contain_text('"seed": 7')
    expect(page.locator("#code")).to_contain_text('say \\"hi\\"')
    page.get_by_role("tab", name="Python").click()
    source = page.locator("#code").inner_text()
    compile(source, "snippet", "exec")
    assert "seed=7" in source and "from openai import OpenAI" in source


@pytest.mark.parametrize("width", [360, 390, 768, 1440])
def test_nothing_is_cut_off_at_any_width(open_page, server, width):
    page = open_page(server.url, width=width)
    page.locator(".example", has_text="How many shapes").click()
    expect(page.locator(".turn.user")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    if width <= 900:
        page.click("#toggle")
        expect(page.locator("#thinking")).to_be_attached()
        expect(page.locator("#code")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") == width


def test_dark_and_light(open_page, server):
    def brightness(scheme):
        colour = open_page(server.url, scheme=scheme).evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(int(part) for part in colour.strip("rgb()").split(","))

    assert brightness("dark") < 120 < 600 < brightness("light")


def test_a_key_is_asked_for_and_used(open_page, start):
    page = open_page(start("--api-key", "sesame").url)
    expect(page.locator("#model")).to_have_text("needs an API key")
    open_page.errors.clear()  # the browser reports the 401
    page.fill("#key", "sesame")
    page.keyboard.press("Enter")
    expect(page.locator("#model")).to_contain_text("tiny")
    page.fill("#max_tokens", "3")
    page.fill("#text", "hello")
    page.locator("#text").press("Enter")
    expect(page.locator(".counts")).to_be_visible()
