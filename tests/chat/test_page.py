"""The chat page in a real browser, headless Chromium; skipped where there is none."""

import threading

import pytest

from megatron_ft.chat.server import PageServer
from tests.chat.browser import CHROMIUM, Browser
from tests.chat.stand_ins import SETTINGS, Echo

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
IDLE = "!running && document.querySelectorAll('.said.open').length === 0"
SAID = "[...document.querySelectorAll('.said')].map((one) => one.textContent).join('|')"


@pytest.fixture(scope="module")
def servers():
    """names of models -> a server, answered by a thread as the main thread does."""
    made = {}
    for names in (("echo",), ("runs/a", "runs/<b>b</b>")):
        models = Echo(list(names), pause=0.002)
        server = PageServer(0, models, SETTINGS, "Be brief.")
        server.models = models
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def work(server=server, models=models):
            while True:
                server.answer_next(models)

        threading.Thread(target=work, daemon=True).start()
        made[len(names)] = server
    yield made
    for server in made.values():
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def page(servers):
    browser = Browser(f"http://127.0.0.1:{servers[1].server_port}/")
    browser.until("document.readyState === 'complete' && models.length && turns.length")
    yield browser
    browser.close()


def ask(browser, text):
    browser.js("document.getElementById('text').focus()")
    browser.type(text)
    browser.press("Enter")


def test_questions_answers_and_html_as_text(page, servers, tmp_path):
    """What a user or a model says is shown as it is, and Enter sends it."""
    ask(page, "<img src=x onerror=alert(1)> <b>plum</b>")
    page.until(f"{IDLE} && {SAID} === '<IMG SRC=X ONERROR=ALERT(1)> <B>PLUM</B>'")
    assert page.js("document.querySelectorAll('#talk img, #talk b').length") == 0
    messages = servers[1].models.asked[-1][1]
    assert [message["role"] for message in messages] == ["system", "user"]  # the system message of the command line
    page.picture(tmp_path / "page.png")
    assert (tmp_path / "page.png").read_bytes()[:4] == b"\x89PNG" and page.console == []


def test_the_stop_button(page):
    ask(page, "go on forever")
    page.until("/ON ON ON/.test(document.body.innerText) && !document.getElementById('stop').hidden")
    page.js("document.getElementById('stop').click()")
    page.until(f"{IDLE} && /stopped/.test(document.body.innerText)")
    ask(page, "next")
    page.until(f"{IDLE} && {SAID}.endsWith('|NEXT')")


def test_retry_settings_and_a_new_conversation(page, servers):
    page.js("document.getElementById('new').click()")
    page.js("document.getElementById('temperature').value = '0.5'; document.getElementById('system').value = ''")
    ask(page, "plum")
    page.until(f"{IDLE} && {SAID} === 'PLUM'")
    page.js("document.getElementById('retry').click()")
    page.until(f"{IDLE} && turns[0].length === 2 && tries === 1")
    (_, before, first), (_, after, second) = servers[1].models.asked[-2:]
    assert before == after == [{"role": "user", "content": "plum"}]
    assert (first.sampling.temperature, second.seed) == (0.5, first.seed + 1)
    assert page.js("document.querySelectorAll('.turn').length") == 1
    page.js("document.getElementById('top_p').value = '7'")
    ask(page, "again")
    page.until(f"{IDLE} && /top_p 7: give a number above 0/.test(document.body.innerText)")
    assert page.js("turns[0].length") == 2  # the question that failed is in its field again
    assert page.js("document.getElementById('text').value") == "again"
    page.js("document.getElementById('top_p').value = '1'; document.getElementById('retry').click()")
    page.until(f"{IDLE} && tries === 1 && {SAID} === 'PLUM'")  # of the question that was answered


def test_two_models_on_a_phone_in_the_dark(servers):
    browser = Browser(f"http://localhost:{servers[2].server_port}/", (390, 780), dark=True)
    try:
        browser.until("document.readyState === 'complete' && models.length === 2 && turns.length")
        ask(browser, "plum " * 60)
        browser.until(f"{IDLE} && {SAID} === Array(2).fill('PLUM PLUM PLUM PLUM PLUM PLUM PLUM PLUM').join('|')")
        assert browser.js("document.documentElement.scrollWidth <= innerWidth")
        assert browser.js("[...document.querySelectorAll('.name')].map((one) => one.textContent)") == [
            "runs/a", "runs/<b>b</b>",
        ]  # fmt: skip
        assert browser.js("getComputedStyle(document.body).backgroundColor") == "rgb(21, 24, 28)"
        first, second = (
            browser.js(f"document.querySelectorAll('.answer')[{i}].getBoundingClientRect().top") for i in (0, 1)
        )
        assert first < second and browser.console == []
    finally:
        browser.close()
