"""The page of `toyllm trace --html`: what is in it, that nothing in a token can get out of it, and how a browser shows it."""

import base64
import hashlib
import html.parser
import json
import re
import runpy
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import toyllm as package
from toyllm.cli import trace_page
from toyllm.models.trace import Layer, trace

BROWSER = runpy.run_path(str(Path(__file__).parents[1] / "browser.py"))
GOLDENS = Path(__file__).parents[1] / "models" / "goldens"
STORY = (
    "Once upon a time there lived in the forest an old woodcutter and his three daughters, and the youngest of them was so beautiful "
    "that the sun himself, who had seen so much, wondered whenever he shone upon her face.\n\n"
)
EVIL = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    "<!-- {{data}} ]]> &lt; \u202e\x1b[31m 狐🦊\n"
)
MODELS = ("tales-gpt2", "tales-gpt-oss")


def in_a_browser(test: Any) -> Any:
    """Mark a test that needs one."""
    return pytest.mark.browser(pytest.mark.skipif(BROWSER["CHROMIUM"] is None, reason="no Chromium is installed")(test))


@pytest.fixture
def write(toyllm: Any, tmp_path: Path) -> Callable[..., Path]:
    """The page of a trace."""

    def write(prompt: str | list[int], *arguments: str) -> Path:
        path = tmp_path / "trace.html"
        given = (prompt,) if isinstance(prompt, str) else ("--prompt-ids", " ".join(map(str, prompt)))
        code, out, err = toyllm("trace", *given, *arguments, "--html", str(path), "--force")
        assert (code, out) == (0, "")
        assert f"wrote {path}: {path.stat().st_size:,} bytes" in err
        return path

    return write


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A tab of a browser."""
    with BROWSER["browser"](tmp_path_factory.mktemp("browser")) as page:
        yield page


def ids(name: str, count: int, text: str = STORY) -> list[int]:
    """So many tokens of a text, over and over."""
    return (300 * package.load(name).tokenizer.encode(text))[:count]


class Parts(html.parser.HTMLParser):
    """Elements of a page with their attributes, and the text of its style and scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[str, str] = {}
        self.open = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.open = f"{tag} {dict(attrs).get('type', '')}".strip() if tag in ("style", "script", "title") else ""

    def handle_endtag(self, tag: str) -> None:
        self.open = ""

    def handle_data(self, data: str) -> None:
        if self.open:
            self.inside[self.open] = self.inside.get(self.open, "") + data


def content(path: Path) -> Any:
    """The data of a page."""
    return json.loads(Parts(path.read_text(encoding="utf-8")).inside["script application/json"])


def unpacked(array: dict[str, str]) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(array["packed"])), f"<{array['type']}")


# ---- the file ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_it_holds_the_trace(write: Any, name: str) -> None:
    given = ids(name, 40)
    found = content(write(given, "-m", name))
    expected = trace(package.load(name), given, top=5, maps=True)
    arrays = {key: unpacked(array) for key, array in found["arrays"].items()}
    assert found["ids"] == given
    assert found["layers"] == [layer.number for layer in expected.layers]
    for i, layer in enumerate(expected.layers):
        T, H = len(given), len(layer.entropy)

        def of(key: str, *shape: int, i: int = i) -> np.ndarray:
            return arrays[key].reshape(-1, *shape)[i]

        np.testing.assert_array_equal(of("lensIds", T, 5), layer.lens.ids)
        np.testing.assert_allclose(of("lensProbs", T, 5), layer.lens.probabilities, rtol=1e-6)
        np.testing.assert_allclose(of("entropy", H, T), layer.entropy, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(of("out", T), layer.out, rtol=1e-6)
        np.testing.assert_allclose(of("mid", T), layer.resid_mid, rtol=1e-6)
        np.testing.assert_array_equal(of("rank", T), layer.lens.rank)
        assert layer.maps is not None
        np.testing.assert_array_equal(unpacked(found["maps"][i]).reshape(H, -1), layer.maps)
        if layer.routing:
            np.testing.assert_array_equal(of("experts", T, found["chosen"]), layer.routing.experts)
            np.testing.assert_array_equal(of("counts", found["experts"]), layer.routing.counts)
    assert ("experts" in arrays) == ("sink" in arrays) == (name == "tales-gpt-oss")


def test_nothing_in_a_token_becomes_a_part_of_the_page(write: Any) -> None:
    path = write(EVIL)
    text = path.read_text(encoding="utf-8")
    parts = Parts(text)
    assert [tag for tag, _ in parts.elements].count("script") == 2
    assert not [tag for tag, _ in parts.elements if tag in ("img", "link", "iframe") and dict(parts.elements)[tag].get("href") != "data:,"]
    data = parts.inside["script application/json"]
    assert not set("<>&\x1b\u202e") & set(data)
    assert "".join(content(path)["pieces"][str(i)] for i in content(path)["ids"]).startswith("</script><script>document.title='owned'")
    shown = "".join(content(path)["pieces"].values())
    assert [c for c in shown if unicodedata.category(c) in ("Cc", "Cf") and c not in "\n\t"] == []


def test_its_policy_lets_only_its_own_style_and_script_run(write: Any) -> None:
    text = write("The fox").read_text(encoding="utf-8")
    parts = Parts(text)
    (policy,) = (a["content"] for _, a in parts.elements if a.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.strip().split(" ", 1) for rule in str(policy).split(";"))
    assert rules.pop("default-src") == "'none'"
    for kind, name in (("style-src", "style"), ("script-src", "script")):
        digest = base64.b64encode(hashlib.sha256(parts.inside[name].encode()).digest()).decode()
        assert rules.pop(kind) == f"'sha256-{digest}'"
    assert rules == {"img-src": "data:", "base-uri": "'none'", "form-action": "'none'"}
    assert not re.search(r"""(?i)https?:|@import|url\(|\bon\w+\s*=\s*["']|\bstyle\s*=\s*["']|innerHTML|\beval\b""", text)
    assert [a for tag, a in parts.elements if "src" in a or ("href" in a and tag != "link")] == []


def test_the_title_is_text(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = package.load("tales-gpt2")
    object.__setattr__(loaded.files, "name", "</title><script>{{data}}")
    text = trace_page.page(loaded, trace(loaded, [1, 2]))
    assert Parts(text).inside["title"] == "trace of </title><script>{{data}}, 2 tokens"
    assert [tag for tag, _ in Parts(text).elements].count("script") == 2


@pytest.mark.parametrize("name", MODELS)
def test_300_tokens_are_a_megabyte_or_so(pages: dict[str, tuple[Path, Any]], name: str) -> None:
    assert 200_000 < pages[name][0].stat().st_size < 1_200_000


# ---- in a browser -----------------------------------------------------------------------------------------------------------


def shade(page: Any, selector: str) -> float:
    return float(page.evaluate(f"document.querySelector({selector!r}).style.getPropertyValue('--a')"))


class Opened(NamedTuple):
    """What the page that is open shows."""

    ids: list[int]
    layers: list[Layer]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Opened]]:
    """Traces of 300 tokens."""
    folder, pages = tmp_path_factory.mktemp("pages"), {}
    for name in MODELS:
        loaded, given = package.load(name), ids(name, 300)
        found = trace(loaded, given, top=5, maps=True)
        trace_page.write_page(folder / f"{name}.html", False, loaded, found)
        pages[name] = folder / f"{name}.html", Opened(given, found.layers)
    return pages


@pytest.fixture
def opened(page: Any, pages: dict[str, tuple[Path, Opened]], name: str) -> Opened:
    """The trace of this model in the browser."""
    path, shown = pages[name]
    page.look(1360, 900)
    page.open(path.as_uri())
    return shown


@in_a_browser
@pytest.mark.parametrize("name", MODELS)
def test_it_opens_without_a_word_on_the_console_and_fetches_nothing(opened: Opened, page: Any, name: str) -> None:
    assert page.evaluate("document.title") == f"trace of {name}, 300 tokens"
    assert page.text("#model") == name
    assert page.evaluate("document.querySelectorAll('#prose [role=option]').length") == 300
    for view in range(1, 6):
        page.press(str(view))
    page.press("?", "Escape")
    for theme in (True, False):
        page.look(390, 800, dark=theme)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.complaints() == []


@in_a_browser
@pytest.mark.parametrize("name", MODELS)
def test_a_token_under_the_mouse_shows_what_it_attends_to(opened: Opened, page: Any, name: str) -> None:
    layer = opened.layers[-1]
    assert layer.maps is not None
    for t in (20, 120):
        page.mouse(f"#t{t}")
        weights = layer.maps[0, t * (t + 1) // 2 :][: t + 1]
        shades = page.evaluate("[...document.querySelectorAll('#prose .t')].map((e) => +e.style.getPropertyValue('--a'))")
        np.testing.assert_allclose(shades, [*(weights / 255).tolist(), *[0] * (299 - t)], atol=6e-4)
        best = int(weights.argmax())
        assert page.text("#token .bars .piece").startswith(f"{best} ")
        assert page.text("#token .bars .value") == f"{100 * (weights[best] / 255) ** 2:.{0 if weights[best] > 80 else 1}f} %"
    page.mouse("#t7", click=True)
    page.mouse("#model")
    assert page.evaluate("document.querySelector('#prose .now').id") == "t7"


@in_a_browser
@pytest.mark.parametrize("name", MODELS)
def test_arrows_move_in_what_has_the_focus(opened: Opened, page: Any, name: str) -> None:
    heads, last = len(opened.layers[0].entropy), len(opened.layers) - 1

    def place() -> Any:
        return page.text("#title"), page.evaluate("document.querySelector('#prose').getAttribute('aria-activedescendant')")

    assert place() == (f"Layer {last}, head 0", "t299")
    page.press("ArrowLeft", "ArrowLeft")
    assert place()[1] == "t297"
    page.press("Home", "ArrowLeft", "ArrowRight")
    assert place()[1] == "t1"
    page.press("ArrowDown")
    below = int(place()[1][1:])
    assert 1 < below < 40
    page.press("ArrowUp", "End", "w", "d")
    assert place() == (f"Layer {last - 1}, head 1", "t299")
    page.press("s", "s", "a", "a")
    assert place() == (f"Layer {last}, head 0", "t299")
    page.evaluate("document.querySelector('#picker').focus()")
    page.press("ArrowUp", "ArrowRight", "ArrowRight")
    assert place()[0] == f"Layer {last - 1}, head 2"
    page.press(*["ArrowRight"] * heads, *["ArrowUp"] * 9)
    assert place()[0] == f"Layer 0, head {heads - 1}"
    page.evaluate("document.querySelector('[role=tab][aria-selected=true]').focus()")
    page.press("ArrowRight")
    assert page.text("#title") == "Logit lens"
    assert page.evaluate("document.activeElement.id") == "tab-lens"
    page.press("Tab", "Tab")
    assert page.evaluate("document.activeElement.id") == "lens"
    page.press("ArrowUp", "ArrowRight")
    assert page.evaluate("document.querySelector('#lens').getAttribute('aria-activedescendant')") == "lens-298-1"


@in_a_browser
@pytest.mark.parametrize("name", MODELS)
def test_the_picker_and_the_map_answer_the_mouse(opened: Opened, page: Any, name: str) -> None:
    page.mouse("#p1-2", click=True)
    assert page.text("#title") == "Layer 1, head 2"
    page.mouse("#map canvas", at=(30.5 / 300, 150.5 / 300))
    assert re.match(r"(149|150) \S+ attends to (29|30) \S+: [\d.]+ %$", page.text("#map figcaption").strip())
    page.mouse("#map canvas", at=(0.9, 60.5 / 300), click=True)
    assert page.evaluate("document.querySelector('#prose .now').id") in ("t59", "t60")
    painted = page.evaluate(
        "((c) => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some((x) => x))(document.querySelector('#map canvas'))"
    )
    assert painted


@in_a_browser
@pytest.mark.parametrize("name", MODELS)
def test_the_lens_has_a_cell_a_token_and_layer(opened: Opened, page: Any, name: str) -> None:
    page.press("2")
    cells = page.evaluate(
        "[...document.querySelectorAll('#lens .cell')].map((e) => [e.querySelector('b').textContent, e.classList.contains('hit')])"
    )
    assert len(cells) == 300 * len(opened.layers)
    tokenizer = package.load(name).tokenizer
    for i, layer in enumerate(opened.layers):
        for t in (0, 57, 298):
            text, hit = cells[t * len(opened.layers) + i]
            best = int(layer.lens.ids[t, 0])
            assert text == tokenizer.decode([best]).replace(" ", "·").replace("\n", "↵")
            assert hit == (best == opened.ids[t + 1])
            assert shade(page, f"#lens-{t}-{i}") == pytest.approx(layer.lens.probabilities[t, 0], abs=6e-4)
    page.mouse("#lens-298-1", click=True)
    page.mouse("#model")
    assert page.text("#token .note").startswith("token 298,")
    assert "behind layer 1" in page.text("#token h3")
    assert f"rank {opened.layers[1].lens.rank[298]}." in page.text("#token .bars + .note")


@in_a_browser
@pytest.mark.parametrize("name", MODELS)
def test_figures_are_those_of_the_trace(opened: Opened, page: Any, name: str) -> None:
    page.press("4" if name == "tales-gpt-oss" else "3")
    page.mouse("#choices [data-figure=entropy]", click=True)

    def shown() -> float:
        return float(page.evaluate("document.querySelector('#figures-200-1').textContent"))

    assert shown() == pytest.approx(opened.layers[1].entropy[:, 200].mean(), rel=6e-3)
    page.mouse("#choices [data-figure=mid]", click=True)
    assert shown() == pytest.approx(opened.layers[1].resid_mid[200], rel=6e-3)
    assert page.evaluate("document.querySelectorAll('#choices [data-figure=sink]').length") == (name == "tales-gpt-oss")


@in_a_browser
@pytest.mark.parametrize("name", MODELS)
def test_routing_shades_the_tokens_of_an_expert(opened: Opened, page: Any, name: str) -> None:
    if name == "tales-gpt2":
        assert page.evaluate("document.querySelector('#tab-routing')") is None
        return
    page.press("3")
    routing = opened.layers[2].routing
    assert routing is not None
    expert = int(routing.counts.argmax())
    page.mouse(f"#p2-{expert}", click=True)
    page.mouse("#model")
    assert page.text("#subtitle") == f"takes {routing.counts[expert]} of 300 tokens, shaded by its weight"
    shades = page.evaluate("[...document.querySelectorAll('#prose .t')].map((e) => +e.style.getPropertyValue('--a'))")
    np.testing.assert_allclose(shades, np.where(routing.experts == expert, routing.weights, 0).sum(1), atol=6e-4)
    assert [int(line.split()[-1]) for line in page.text("#loads .bars").replace("\n", " ").split("expert ")[1:]] == routing.counts.tolist()
    assert f"Most over mean: {routing.imbalance:.2f}." in page.text("#loads .note")


@in_a_browser
def test_tokens_that_look_like_html_are_shown_as_they_are(page: Any, write: Any) -> None:
    page.open(write(EVIL).as_uri())
    assert page.evaluate("document.title").startswith("trace of")
    assert page.text("#prose").startswith("</script><script>document.title='owned'</script><img src=x")
    assert page.complaints() == []


@in_a_browser
def test_a_script_that_someone_adds_does_not_run(page: Any, write: Any) -> None:
    path = write("The fox")
    text = path.read_text(encoding="utf-8").replace("</body>", "<script>document.title = 'owned'</script></body>")
    path.write_text(text, encoding="utf-8")
    page.open(path.as_uri())
    assert page.evaluate("document.title").startswith("trace of")
    assert any("Content Security Policy" in complaint for complaint in page.complaints())


@in_a_browser
def test_one_token_is_a_page_too(page: Any, write: Any) -> None:
    for name in MODELS:
        page.open(write([5], "-m", name).as_uri())
        page.press("2", "3", "4", "1", "ArrowRight", "ArrowDown")
        assert page.complaints() == []


@in_a_browser
def test_chosen_layers_keep_their_numbers_and_a_model_without_tokenizer_shows_ids(page: Any, write: Any) -> None:
    page.open(write(list(range(30)), "-m", str(GOLDENS / "gpt2" / "baseline"), "--layers", "-1").as_uri())
    assert page.text("#title") == "Layer 2, head 0"
    assert page.text("#prose").startswith("0")
    page.press("2", "ArrowLeft")
    assert page.text(".head").split() == ["token", "layer", "2"]
    assert page.complaints() == []


@in_a_browser
def test_a_trace_without_maps_says_so(page: Any, write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toyllm.models.trace.MAPS", 10_000)
    page.open(write(ids("tales-gpt2", 80)).as_uri())
    assert page.text("#notice").startswith("The attention maps of this trace are too large for a page")
    page.mouse("#t9")
    assert page.text("#subtitle").startswith("·")
    page.press("2", "3", "w", "1")
    assert not page.evaluate("document.querySelector('#map').offsetParent")
    assert page.complaints() == []
