"""The page: what it is made of, and that it works in a browser, where there is one."""

import base64
import hashlib
import re
from io import BytesIO

import httpx
import pytest
from PIL import Image as Picture

from codebook.inference.ask import ask
from codebook.miniature.examples import examples
from codebook.pruning import Schedule
from codebook.pruning.presets import DEFAULT
from codebook.serving.page import FILE
from tests.serving.browser import CHROMIUM, Browser
from tests.serving.running import Service

HTML = FILE.read_text()
ANSWERED = "document.querySelector('#way-unpruned .answer')?.textContent && !document.querySelector('.waiting')"


@pytest.fixture(scope="module")
def service(loaded):
    running = Service(*loaded, examples=examples())
    yield running
    running.stop()


def policy(answer):
    parts = [part.split() for part in answer.headers["content-security-policy"].split(";")]
    return {name: values for name, *values in parts}


def test_its_own_script_and_style_run_and_nothing_else(service):
    answer = httpx.get(service.url).raise_for_status()
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    allowed = policy(answer)
    for tag, rule in (("script", "script-src"), ("style", "style-src")):
        [inside] = [piece.split(f"</{tag}>")[0] for piece in answer.text.split(f"<{tag}>")[1:]]
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert allowed[rule] == [f"'sha256-{digest}'"]
    assert allowed["default-src"] == allowed["base-uri"] == allowed["frame-ancestors"] == ["'none'"]
    assert allowed["connect-src"] == ["'self'"]


def test_it_loads_nothing_and_makes_no_html_of_text():
    addresses = re.findall(r"(?:https?:)?//[\w.]+", HTML.replace("http://www.w3.org/2000/svg", ""))
    assert not addresses and not re.findall(r"(?:src|href)=\"(?!data:)", HTML)
    assert not re.findall(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function| on\w+=\"| style=\"", HTML
    )


def test_only_the_page_needs_no_key(loaded):
    running = Service(*loaded, api_key="secret")
    try:
        assert 'data-key="needed"' in httpx.get(running.url).raise_for_status().text
        assert httpx.get(f"{running.url}/v1/compare").status_code == 401
        known = httpx.get(f"{running.url}/v1/compare", headers={"Authorization": "Bearer secret"})
        assert known.raise_for_status().json()["examples"] == []
    finally:
        running.stop()


browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")

# Which cells of a way's canvas show, in their middle, what the unpruned one shows there: those that are kept.
DRAWN = """(way => {
  const pixels = name => {
    const canvas = document.querySelector(`#way-${name} canvas`), {width, height} = canvas;
    const copy = new OffscreenCanvas(width, height).getContext("2d", {willReadFrequently: true});
    copy.drawImage(canvas, 0, 0);
    return copy.getImageData(0, 0, width, height);
  };
  const plain = pixels("unpruned"), shown = pixels(way), found = [];
  for (let row = 0; row < 12; row++) for (let col = 0; col < 12; col++) {
    const [y, x] = [[row, plain.height], [col, plain.width]].map(([cell, side]) => Math.round((cell + .5) / 12 * side));
    const at = 4 * (y * plain.width + x);
    if ([0, 1, 2].every(i => plain.data[at + i] === shown.data[at + i])) found.push(12 * row + col);
  }
  return found;
})"""


def decoded(example):
    return Picture.open(BytesIO(base64.b64decode(example["image"].partition(",")[2]))).convert("RGB")


def text(tab, selector):
    return tab.run(f"document.querySelector({selector!r}).textContent")


@browser
def test_ask_slide_and_compare_in_a_browser(service, loaded):
    model, processor, _ = loaded
    first, second, *_ = service.state.examples

    def expected(example, method, keep, question=None):
        schedule = None if method == "unpruned" else Schedule.for_model(model, method, keep)
        [answer] = ask(model, processor, [[decoded(example)]], [question or example["question"]], schedule)
        return answer

    def check(tab, way, example, method, keep, question=None):
        answer = expected(example, method, keep, question)
        assert text(tab, f"#way-{way} .answer") == answer.text
        assert f"{len(answer.kept[0])} of 144 tokens kept" in text(tab, f"#way-{way} .facts")
        assert tab.run(f"{DRAWN}({way!r})") == answer.kept[0]
        return set(answer.kept[0])

    with Browser() as tab:
        tab.open(service.url)
        tab.wait(ANSWERED)  # the page begins with its first example
        a, b = check(tab, "a", first, DEFAULT, 0.2), check(tab, "b", first, "random", 0.2)
        assert text(tab, "#way-unpruned .answer") == expected(first, "unpruned", 1).text
        assert f"agree on {round(100 * len(a & b) / len(a | b))}%" in text(tab, "#agreement")
        assert (text(tab, "#onlya"), text(tab, "#common")) == (f"{len(a - b)} only {DEFAULT}", f"{len(a & b)} both")

        tab.run("document.getElementById('keep').focus()")
        for _ in range(5):
            tab.key("ArrowRight")
        assert text(tab, "#kept") == "25%"
        tab.wait(f"{ANSWERED} && document.querySelector('#way-b canvas').dataset.kept > {len(b)}")
        check(tab, "a", first, DEFAULT, 0.25)

        tab.run(
            "{ const b = document.getElementById('b'); b.value = 'divprune'; b.dispatchEvent(new Event('change')); }"
        )
        tab.wait(f"{ANSWERED} && document.querySelector('#way-b .title').textContent === 'divprune'")
        check(tab, "b", first, "divprune", 0.25)

        tab.run("document.querySelectorAll('#examples button')[1].click()")
        tab.wait(
            f"{ANSWERED} && document.querySelector('#way-unpruned .facts').textContent.includes({second['answer']!r})"
        )
        tab.run("document.getElementById('question').focus()")
        tab.type("how many objects are there?")
        tab.key("Enter")
        tab.wait(f"{ANSWERED} && !document.querySelector('#way-unpruned .facts').textContent.includes('right')")
        check(tab, "a", second, DEFAULT, 0.25, "how many objects are there?")

        # A picture that is dropped on the page: the first one again.
        code = first["image"].partition(",")[2]
        tab.run(f"""{{ const data = new DataTransfer(), bytes = Uint8Array.from(atob("{code}"), c => c.charCodeAt(0));
            data.items.add(new File([bytes], "dropped.png", {{type: "image/png"}}));
            document.dispatchEvent(new DragEvent("drop", {{dataTransfer: data}})); }}""")
        tab.wait("document.querySelector('#examples [aria-pressed=true]') === null && picture.example === undefined")
        tab.key("Enter")
        tab.wait(f"{ANSWERED} && asked.url === picture.url && results.unpruned")
        check(tab, "a", first, DEFAULT, 0.25, "how many objects are there?")
        assert tab.messages == []

        # A question that is refused leaves no other question's answers. (The browser itself notes such a status.)
        tab.run("document.getElementById('question').value = 'what is the weather?'")
        tab.key("Enter")
        tab.wait("document.querySelector('#status.wrong')")
        assert "'weather'" in text(tab, "#status")
        assert not tab.run("[...document.querySelectorAll('figure, #agree')].some(part => part.checkVisibility())")


@browser
def test_a_key_is_asked_for_where_one_is_needed(loaded):
    running = Service(*loaded, api_key="secret", examples=examples())
    running.state.name = "<b>miniature</b>"  # what the server says is shown as text
    try:
        with Browser(390, 844, mobile=True) as tab:
            tab.open(running.url)
            tab.wait("document.getElementById('key')?.checkVisibility()")
            tab.run("document.getElementById('key').focus()")
            tab.type("secret")
            tab.key("Tab")
            tab.wait(ANSWERED)
            assert text(tab, "#model") == "<b>miniature</b>"
            assert tab.run("document.documentElement.scrollWidth") == 390
            assert tab.messages == []
    finally:
        running.stop()
