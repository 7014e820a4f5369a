"""The chat page's server: who may use it, what it answers, and that a closed connection ends an answer."""

import http.client
import json
import socket
import threading
import time

import pytest

from megatron_ft.chat.ports import check_port
from megatron_ft.chat.server import FILES, LARGEST, PageServer, about, serve
from megatron_ft.errors import ConfigError
from tests.chat.stand_ins import SETTINGS, Echo

PLUM = [{"role": "user", "content": "a plum"}]


@pytest.fixture(scope="module")
def page():
    """A server with two models, answered by a thread as the main thread does."""
    models = Echo(["runs/a", "runs/<b>"], pause=0.002)
    server = PageServer(0, models, SETTINGS, "Be <brief>.")
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def work():
        while True:
            server.answer_next(models)

    threading.Thread(target=work, daemon=True).start()
    server.models = models
    yield server
    server.shutdown()
    server.server_close()


def request(page, method, path, body=None, **headers):
    """(status, headers, body) of an answer; the host is this machine unless it is given."""
    link = http.client.HTTPConnection("127.0.0.1", page.server_port, timeout=60)
    sent = {"Host": f"127.0.0.1:{page.server_port}", "Content-Type": "application/json"}
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    link.request(method, path, body, {name: value for name, value in sent.items() if value is not None})
    reply = link.getresponse()
    found = reply.status, reply.headers, reply.read()
    link.close()
    return found


def ask(page, **entry):
    status, _, body = request(page, "POST", "/answer", json.dumps({"messages": PLUM, **entry}))
    assert status == 200, body
    return [json.loads(line) for line in body.splitlines()]


def test_an_answer_comes_in_pieces(page):
    found = ask(page, model=1)
    assert [entry["more"] for entry in found[:-1]] == ["A", " PLUM"]
    assert found[-1] == {"end": "end", "text": "A PLUM", "tokens": 2, "dropped": 0}
    assert page.models.asked[-1][0] == 1


def test_values_are_those_of_the_page(page):
    ask(page, values={"temperature": 0.5, "max_new_tokens": 1, "seed": 7})
    settings = page.models.asked[-1][2]
    assert (settings.sampling.temperature, settings.max_new_tokens, settings.seed, settings.sampling.top_p) == (
        0.5,
        1,
        7,
        1,
    )
    assert ask(page, values={"max_new_tokens": 1})[-1]["end"] == "length"


def test_the_page_and_what_it_needs(page):
    for path, (_, kind) in FILES.items():
        status, headers, body = request(page, "GET", path)
        assert status == 200 and headers["Content-Type"] == f"{kind}; charset=utf-8" and body
        assert headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self'")
        assert b"http://" not in body and b"https://" not in body  # nothing from elsewhere
    assert json.loads(request(page, "GET", "/about")[2]) == about(page.models, SETTINGS, "Be <brief>.")
    assert request(page, "GET", "/../server.py")[0] == request(page, "GET", "/page.py")[0] == 404
    assert request(page, "PUT", "/answer")[0] == 501


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example:7860"},  # a name that was rebound to this machine
        {"Host": "127.0.0.1.evil.example"},
        {"Host": ""},
        {"Host": "[::1"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "https://127.0.0.1:1"},
    ],
)
def test_pages_of_others_are_refused(page, headers):
    count = len(page.models.asked)
    assert request(page, "POST", "/answer", json.dumps({"messages": PLUM}), **headers)[0] == 403
    assert request(page, "GET", "/", **headers)[0] == 403
    assert len(page.models.asked) == count


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_a_link_elsewhere_leads_to_the_page_and_asks_nothing(page, site):
    assert request(page, "GET", "/", Sec_Fetch_Site=site)[0] == 200
    assert request(page, "POST", "/answer", json.dumps({"messages": PLUM}), Sec_Fetch_Site=site)[0] == 403


@pytest.mark.parametrize("host", ["localhost:9000", "[::1]:7860", "127.0.0.1"])
def test_this_machine_by_any_of_its_names_also_through_a_tunnel(page, host):
    assert request(page, "GET", "/", Host=host)[0] == 200
    assert request(page, "GET", "/", Host=host, Origin=f"http://{host}", Sec_Fetch_Site="same-origin")[0] == 200


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ("{", 400, "must be JSON"),
        ("[" * 100_000, 400, "must be JSON"),
        ("[]", 400, "must be an object"),
        ('{"messages": []}', 400, "last message must be the user's"),
        ('{"messages": [{"role": "cat", "content": ""}]}', 400, "role"),
        ('{"messages": [{"role": "user", "content": 1}]}', 400, "content"),
        ('{"model": 2, "messages": [{"role": "user", "content": "a"}]}', 400, "there are 2, counted from 0"),
        ('{"model": true, "messages": [{"role": "user", "content": "a"}]}', 400, "there are 2"),
        ('{"values": {"top_p": 0}, "messages": [{"role": "user", "content": "a"}]}', 400, "top_p 0: give a number above 0"),
        ('{"values": {"load": 1}, "messages": [{"role": "user", "content": "a"}]}', 400, "give one of temperature"),
        ('{"values": {"seed": true}, "messages": [{"role": "user", "content": "a"}]}', 400, "seed True"),
        ('{"values": {"top_k": 1.5}, "messages": [{"role": "user", "content": "a"}]}', 400, "top_k 1.5: give a whole number"),
        ('{"values": {"temperature": Infinity}, "messages": [{"role": "user", "content": "a"}]}', 400, "temperature inf"),
        ('{"values": {"seed": 1e400}, "messages": [{"role": "user", "content": "a"}]}', 400, "seed inf"),
        ('{"values": {"seed": [1]}, "messages": [{"role": "user", "content": "a"}]}', 400, "seed [1]"),
        ('{"values": 1, "messages": [{"role": "user", "content": "a"}]}', 400, "values must be an object"),
    ],
)  # fmt: skip
def test_questions_that_make_no_sense(page, body, status, said):
    found = request(page, "POST", "/answer", body)
    assert found[0] == status and said in json.loads(found[2])["error"]


def test_halves_of_characters(page):
    ask(page, messages=[{"role": "user", "content": "a \ud83d b \ud83d\ude00"}])
    assert page.models.asked[-1][1][-1]["content"] == "a ? b 😀"


def test_requests_that_make_no_sense(page):
    assert request(page, "POST", "/answer", "{}", Content_Type="text/plain")[0] == 415
    assert request(page, "POST", "/other", "{}")[0] == 404
    assert request(page, "POST", "/answer", "{}", Content_Length=str(LARGEST + 1))[0] == 413
    assert request(page, "POST", "/answer", "{}", Content_Length="-1")[0] == 411


def test_a_closed_connection_ends_the_answer(page):
    """The stop button, and a closed page: the next question is answered soon, although this one has no end."""
    body = json.dumps({"messages": [{"role": "user", "content": "forever"}]}).encode()
    link = socket.create_connection(("127.0.0.1", page.server_port))
    head = f"POST /answer HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    link.sendall(head.encode() + body)
    seen = b""
    while b'"more"' not in seen:
        seen += link.recv(1000)
    link.close()
    assert ask(page)[-1]["text"] == "A PLUM"


def test_questions_wait_for_each_other(page):
    found: list = []
    threads = [threading.Thread(target=lambda: found.append(ask(page)[-1]["text"])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == ["A PLUM"] * 4


def test_an_error_of_the_model_is_shown(page, monkeypatch):
    def refuse(*_):
        raise ConfigError("the message has 9 tokens")

    monkeypatch.setattr(page.models, "ask", refuse)
    assert ask(page) == [{"error": "the message has 9 tokens"}]


def test_a_port_in_use(page):
    for start in (lambda: check_port(page.server_port), lambda: serve(page.models, SETTINGS, None, page.server_port)):
        with pytest.raises(ConfigError, match=rf"--port {page.server_port}: another program uses this port"):
            start()
    with pytest.raises(ConfigError, match="--port 70000: give a number from 1 to 65535"):
        check_port(70000)
    check_port(0)


def test_only_this_machine_reaches_it(page):
    assert page.server_address[0] == "127.0.0.1"


def test_a_connection_that_says_nothing_holds_nobody_up(page):
    with socket.create_connection(("127.0.0.1", page.server_port)):
        time.sleep(0.05)
        assert ask(page)[-1]["text"] == "A PLUM"
