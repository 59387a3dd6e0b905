"""The chat page: its files and headers; and, where there is a Chromium, what it does."""

import importlib.util
import json
import pathlib
import re
import shutil

import pytest

from nautilus.serve.api.keys import Keys
from nautilus.serve.api.page import FOLDER, PAGE

spec = importlib.util.spec_from_file_location("browser", pathlib.Path(__file__).with_name("browser.py"))
browser = importlib.util.module_from_spec(spec)
spec.loader.exec_module(browser)

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
KEY = "a-key-of-some-length"
SCRIPTS = "".join(file.read_text() for file in FOLDER.glob("*.js"))

# ----- files and headers ---------------------------------------------------------------------------------------------


def test_every_file_of_the_page_is_there_with_strict_headers(api):
    assert {"/", "/page.js", "/page.css"} < PAGE.keys() and len(PAGE) == len([*FOLDER.iterdir()])
    for path, file in PAGE.items():
        answer = api.get(path)
        assert answer.status_code == 200 and answer.content == file.read_bytes()
        rules = dict(rule.split(maxsplit=1) for rule in answer.headers["content-security-policy"].split("; "))
        assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == rules["frame-ancestors"] == "'none'"
        assert rules["script-src"] == rules["style-src"] == rules["connect-src"] == "'self'"
        assert rules["img-src"] == "'self' data:"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
    kinds = [api.get(path).headers["content-type"] for path in ("/", "/page.js", "/page.css")]
    assert kinds == [f"text/{kind}; charset=utf-8" for kind in ("html", "javascript", "css")]


@pytest.mark.parametrize("path", ["/index.html", "/page.py", "/page/", "/../keys.py", "/page.js/x"])
def test_nothing_else_is_served(api, path):
    assert api.get(path).status_code == 404


def test_the_page_needs_no_key_and_what_it_asks_does(serve):
    with serve(keys=Keys([KEY])) as here, here.client() as api:
        assert all(api.get(path).status_code == 200 for path in PAGE)
        assert api.get("/v1/models").status_code == api.get("/models").status_code == 401
        assert api.get("/nowhere").status_code == 401


def test_the_page_is_refused_under_a_strange_name(serve):
    with serve(local_only=True) as here, here.client() as api:
        assert api.get("/", headers={"host": "evil.example"}).status_code == 403
        assert api.get("/").status_code == 200


def test_the_page_makes_no_markup_of_text_and_names_no_other_place():
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|Function\(", SCRIPTS)
    assert "localStorage" not in SCRIPTS and "cookie" not in SCRIPTS
    for file in FOLDER.iterdir():
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", file.read_text())
    page = (FOLDER / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*src=)|<style|\son\w+=|\sstyle=", page)  # the policy would stop them


# ----- in a browser --------------------------------------------------------------------------------------------------

absent = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on PATH")
in_browser = lambda test: pytest.mark.slow(absent(test))


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser.Browser(CHROMIUM, tmp_path_factory.mktemp("chromium")) as running:
        yield running


@pytest.fixture
def page(chromium, here):
    with chromium.page(here.url + "/") as tab:
        tab.until("document.getElementById('model')?.textContent === 'tiny'")
        yield tab
        assert tab.complaints == []
        assert all(url.startswith(here.url + "/") for url in tab.requests)


def say(page, words):
    page.run("document.getElementById('words').focus()")
    page.type(words)
    page.press("Enter")


DONE = "document.querySelectorAll('article.assistant').length === {} && document.getElementById('stop').hidden"


@in_browser
def test_an_answer_is_shown_with_its_thinking_and_how_fast_it_came(page, here):
    here.service.answers = ["Let me see.\n</think>\n\nHello **you**:\n\n- `a`\n- b\n\n```py\nx = 1\n```\n<b>no</b>"]
    here.service.pause, here.service.cached = 0.002, 7
    say(page, "Hi there")
    page.until(DONE.format(1))
    assert page.text("article.user .text") == "Hi there"
    assert page.run("document.querySelector('.thinking .text').textContent") == "Let me see."
    assert page.run("document.querySelector('.thinking').open") is False
    assert page.text("article.assistant strong") == "you" and page.text("article.assistant pre") == "x = 1"
    assert page.run("[...document.querySelectorAll('li')].map(li => li.textContent)") == ["a", "b"]
    assert page.run("document.querySelector('article b')") is None and "<b>no</b>" in page.text("article.assistant")
    assert re.fullmatch(
        r"[\d.e+]+ tokens/s · \d+ tokens in \(7 cached\) · \d+ out · first token after [\d.]+ s", page.text(".status")
    )
    page.reload()
    page.until(DONE.format(1))
    assert page.text("article.user .text") == "Hi there" and "7 cached" in page.text(".status")


@in_browser
def test_thinking_is_open_while_it_is_written_and_escape_stops(page, here):
    here.service.answers, here.service.pause = [None], 0.01
    say(page, "Hi")
    page.until("document.querySelector('.thinking')?.open && document.querySelector('.thinking .text').textContent")
    assert page.run("document.getElementById('log').getAttribute('aria-busy')") == "true"
    page.press("Escape")
    page.until(DONE.format(1))
    assert page.text(".status").endswith("stopped") and here.until(lambda: here.service.replies[-1].closed)


@in_browser
def test_an_answer_is_asked_for_again_and_a_message_changed(page, here):
    here.service.answers = ["</think>One", "</think>Two", "</think>Three", "</think>Four"]
    say(page, "First")
    page.until(DONE.format(1))
    page.click("Regenerate")
    page.until(DONE.format(1) + " && document.body.textContent.includes('Two')")
    say(page, "Second")
    page.until(DONE.format(2))
    page.click("Edit")
    page.run("document.activeElement.select()")
    page.type("Changed")
    page.press("Enter")
    page.until(DONE.format(1) + " && document.body.textContent.includes('Four')")
    assert page.run("[...document.querySelectorAll('article .text')].map(n => n.textContent)") == ["Changed", "Four"]
    page.click("New chat")
    assert page.run("document.querySelectorAll('article').length") == 0


@in_browser
def test_an_error_is_told_and_can_be_tried_again(page, here):
    here.service.busy = 1.0
    say(page, "Hi")
    page.until("document.querySelector('.error')")
    assert page.text(".error") == "the server is busy; try again later"
    page.complaints.clear()  # the browser tells of the status, too
    here.service.busy = None
    page.click("Retry")
    page.until(DONE.format(1) + " && !document.querySelector('.error')")
    assert page.text("article.assistant .text:not(.thinking *)") == "Hello."


@in_browser
def test_a_tool_is_called_and_its_result_sent(page, here):
    call = "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"
    here.service.answers = ["</think>" + call, "</think>It is 2."]
    tool = {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
    tools = json.dumps([{"type": "function", "function": tool}])
    page.run(f"document.querySelector('[name=tools]').value = {json.dumps(tools)}")
    say(page, "Add")
    page.until(DONE.format(1))
    assert page.text(".call strong") == "add" and json.loads(page.text(".call pre")) == {"a": 1}
    page.run("document.querySelector('form.call textarea').focus()")
    page.type("2")
    page.click("Send results")
    page.until(DONE.format(2))
    assert page.text("article.tool pre") == "2" and "It is 2." in page.text("article:last-child")
    assert not page.run("document.querySelector('form.call')")


@in_browser
def test_what_the_panel_says_is_asked(page, here):
    for name, value in {"temperature": "0.25", "longest": "9", "budget": "3", "system": "Be brief."}.items():
        page.run(f"document.querySelector('[name={name}]').value = {json.dumps(value)}")
    say(page, "Hi")
    page.until(DONE.format(1))
    job = here.service.jobs[0]
    assert (job.sampling.temperature, job.sampling.max_tokens, job.sampling.thinking_budget) == (0.25, 9, 3)
    assert "Be brief." in here.service.engine.tokenizer.decode(job.tokens)
    assert "cut off" in page.text(".status")


# What is read in a place, character by character, with the source that it is marked with.
SEEN = """(place => {
    const found = [], walker = document.createTreeWalker(document.querySelector(place), NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const from = walker.currentNode.parentNode.closest('.from')?.dataset.source ?? 'plain';
        for (const char of walker.currentNode.data) found.push([from, char]);
    }
    return found;
})"""
LINES = """[...document.querySelectorAll('article .text .from')].map(
    span => [getComputedStyle(span).textDecorationLine, span.title])"""
STYLES = "[...document.querySelectorAll('.legend .from')].map(n => getComputedStyle(n).textDecorationStyle)"


def switch(page):
    """The sources on or off, by keys."""
    page.run("document.getElementById('panel').open = true; document.querySelector('[name=sources]').focus()")
    page.press(" ")


TURNS = ("plain", "cache", "cache", "mtp")


def drafted(here):
    """An answer with markup of all kinds, and what is read of it with the source of each character."""
    parts = ["**", "é", "**", "😀 ab", "\n\n```py\n", "pyth", "\n```\n\n- ", "p", "\n- ", "q ", "`", "r", "`"]
    here.service.answers = ["Aha.</think>\n\n" + "".join(parts)]
    here.service.sources, here.service.arms, here.service.width, here.service.pause = TURNS, {}, 3, 0.001
    at, seen = len("Aha.\n\n"), []  # the tag is a token too, and so is every byte
    for number, part in enumerate(parts):
        for char in part:
            at += len(char.encode())
            seen += [[TURNS[at % 4], char]] if number % 2 else []
    return seen


@in_browser
def test_text_that_was_foretold_is_marked_where_one_wants_to_see_it(page, here):
    read = drafted(here)
    say(page, "Hi")
    page.until(DONE.format(1))
    assert page.run(f"{SEEN}('article.assistant > .text')") == read
    assert page.run(f"{SEEN}('.thinking .text')") == [["plain", "A"], ["cache", "h"], ["cache", "a"], ["mtp", "."]]
    hidden = page.run(LINES)
    height = "document.querySelector('.legend').offsetHeight"
    assert {*map(tuple, hidden)} == {("none", "")} and page.run(height) == 0
    switch(page)
    lines = page.run(LINES)
    assert {line for line, _ in lines} == {"underline"} and len(lines) == len(hidden)
    about = {"cache: copied from known text", "mtp: foretold by the model's own heads"}
    assert {title for _, title in lines} == about
    legend = page.text(".legend")
    assert page.run(height) > 0
    assert re.fullmatch(r"Tokens: plain \d+ \(.+\) · cache \d+ \(copied from known text\) · mtp \d+ \(.+\)", legend)
    assert page.run(STYLES)[1:] == ["solid", "dashed"]  # not told by colour alone
    page.reload()
    page.until(DONE.format(1))
    assert page.run(LINES) == lines and page.text(".legend") == legend
    say(page, "And?")
    page.until(DONE.format(2))
    assert len(page.run(LINES)) == 2 * len(lines) and {title for _, title in page.run(LINES)} == about
    switch(page)
    assert {*map(tuple, page.run(LINES))} == {("none", "")}


@in_browser
def test_how_much_drafts_gave_is_told_beside_the_speed(page, here):
    drafted(here)
    say(page, "Hi")
    page.until(DONE.format(1))
    out, accepted = re.search(r"(\d+) out", page.text(".status"))[1], re.search(r"(\d+) acc", page.text(".status"))[1]
    assert re.match(r"[\d.e+]+ tokens/s · \d+ accepted from drafts · [\d.]+ tokens per pass · ", page.text(".status"))
    assert int(accepted) == sum(at % 4 > 0 for at in range(int(out)))
    assert f"{int(out) / (int(out) - int(accepted)):.2f} tokens per pass" in page.text(".status")


@in_browser
def test_sources_need_no_sideways_scrolling_and_no_template(page, here, monkeypatch):
    monkeypatch.setattr(here.service.engine.tokenizer, "template", None)
    page.size(390, 844)
    here.service.answers, here.service.sources, here.service.arms = ["x" * 200], ("plain", *["eagle"] * 99), {}
    page.run("document.getElementById('panel').open = true; document.querySelector('[name=sources]').click()")
    say(page, "x")
    page.until(DONE.format(1))
    assert "eagle" in page.text(".legend") and page.run(SEEN + "('article.assistant .text')")[1] == ["eagle", "x"]
    assert page.run("document.documentElement.scrollWidth") <= 390
    assert page.run("log.scrollWidth <= log.clientWidth")
    page.complaints.clear()  # the browser tells of the status with which chats are refused


@in_browser
def test_without_a_template_the_text_goes_on(page, here, monkeypatch):
    monkeypatch.setattr(here.service.engine.tokenizer, "template", None)
    here.service.answers = [" upon a time"]
    say(page, "Once")
    page.until(DONE.format(1))
    assert "no chat template" in page.text("#note") and page.text("article.assistant .text").strip() == "upon a time"
    page.complaints.clear()


@in_browser
def test_a_key_is_asked_for_and_kept_in_the_tab_only(chromium, serve):
    with serve(keys=Keys([KEY])) as here, chromium.page(here.url + "/") as page:
        page.until("document.getElementById('ask')?.open")
        page.run("document.getElementById('key').focus()")
        page.type(KEY)
        page.press("Enter")
        page.until("document.getElementById('model')?.textContent === 'tiny'")
        assert page.run("[localStorage.length, document.cookie]") == [0, ""]
        say(page, "Hi")
        page.until(DONE.format(1))
        assert "Hello." in page.text("article.assistant")


@in_browser
def test_a_phone_needs_no_sideways_scrolling(page, here):
    page.size(390, 844)
    here.service.answers = ["</think>" + "long" * 100 + "\n\n```\n" + "wide " * 60 + "\n```"]
    say(page, "x" * 300)
    page.until(DONE.format(1))
    page.run("document.getElementById('panel').open = true")
    assert page.run("document.documentElement.scrollWidth") <= 390
    assert page.run("document.getElementById('log').scrollWidth <= document.getElementById('log').clientWidth")
    assert page.run("document.getElementById('send').getBoundingClientRect().bottom") <= 844
