"""The servers' page at the entrance: it shows one replica, and whoever looks says which."""

import chromium
import pytest
from live_server import wait_until


def test_in_a_browser(before_engines, tmp_path):
    if chromium.PATH is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    browser = chromium.Chromium(tmp_path)
    try:
        browser.ask("Page.navigate", url=before_engines.url + "/")
        wait_until(lambda: browser.run("document.getElementById('replica')?.value") == "m/0")
        assert browser.run("[...$('replica').options].map(o => o.value).join()") == "m/0,m/1"
        other = before_engines.replicas["m/1"]
        other.completions(prompt="add", max_tokens=30)
        finished = other.llm.stats()["finished_requests"]
        browser.run("$('replica').value = 'm/1'; $('replica').dispatchEvent(new Event('change'))")
        row = "[...document.querySelectorAll('#all tr')].find(r => r.cells[0].textContent === 'finished_requests')"
        wait_until(lambda: browser.run(f"last?.replica === 'm/1' && {row}?.cells[1].textContent") == str(finished))
        assert browser.run("$('state').textContent") == "live" and not browser.run("$('replica').hidden")
    finally:
        browser.close()
