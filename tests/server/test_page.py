"""The live page: asks nobody but its own server, shows text as text, works in a real browser."""

import base64
import os
import re

import chromium
import pytest
from live_server import wait_until

from slipstream import tasks
from slipstream.server.app import PAGE

PROBLEM = tasks.make("program", seed=3, steps=3).prompt


@pytest.fixture(scope="module")
def live(serving):
    with serving() as live:
        yield live
        live.at_rest()


def test_it_is_self_contained():
    page = PAGE.read_text(encoding="utf-8")
    assert set(re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", page)) == {"data:,"}
    assert re.findall(r"https?://\S+", page) == ['http://www.w3.org/2000/svg";']  # a name, not an address
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|@import|url\(", page)
    assert re.findall(r'fetch\("([^"]*)"', page) == ["stats", "v1/chat/completions"]


def test_its_policy_forbids_everything_else(live):
    policy = live.http.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "unsafe" not in policy
    assert policy.count("'sha256-") == 4  # one style, one script, each allowed by digest


@pytest.fixture
def browser(live, tmp_path):
    if chromium.PATH is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    browser = chromium.Chromium(tmp_path)
    yield browser
    browser.close()


def test_in_a_browser(live, browser):
    live.completions(prompt="add", max_tokens=30, ignore_eos=True)
    browser.ask("Page.navigate", url=live.url + "/")
    text = "document.body?.innerText ?? ''"
    wait_until(lambda: "live" in browser.run(text) and "slipstream-draft" in browser.run(text))
    wait_until(lambda: " ms" in browser.run(text))
    assert "/ 255" in browser.run(text)  # KV pages

    # the box: thinking streams apart from the answer
    browser.run(f"$('prompt').value = {PROBLEM!r}; $('go').click()")
    wait_until(lambda: browser.run("$('thinking').textContent.length") > 0)
    wait_until(lambda: "tokens in" in browser.run("$('pace').textContent"))
    whole = live.chat(PROBLEM, temperature=0, max_tokens=512)["choices"][0]["message"]
    assert browser.run("$('thinking').textContent") == whole["reasoning"]
    assert browser.run("$('answer').textContent") == whole["content"]
    if folder := os.environ.get("SLIPSTREAM_SCREENSHOTS"):
        shot = browser.ask("Page.captureScreenshot")["data"]
        with open(f"{folder}/page.png", "wb") as file:
            file.write(base64.b64decode(shot))

    # what a model writes is text, whatever it looks like
    markup = "<img src=x onerror=document.title='owned'>"
    browser.run(f"show({{...last, model: {markup!r}, uptime_s: last.uptime_s + 1}})")
    assert markup in browser.run("$('model').textContent") and browser.run("document.images.length") == 0
    assert browser.run("document.title") == "Slipstream"

    # an error is shown, and Stop frees the pages
    browser.run("$('limit').value = 99999; $('go').click()")
    wait_until(lambda: "maximum context length" in browser.run("$('answer').textContent"))
    browser.run("$('limit').value = 1500; $('prompt').value = 'add'; $('go').click()")
    browser.run("new Promise(done => setTimeout(done, 300))")
    browser.run("$('stop').click()")
    live.at_rest()

    wanted = [e["params"]["request"]["url"] for e in browser.seen if e.get("method") == "Network.requestWillBeSent"]
    assert wanted and all(url.startswith((live.url, "data:")) for url in wanted)
    bad = [e for e in browser.seen if e.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded")]
    assert [e for e in bad if "status of 400" not in str(e)] == []
