"""`toyllm trace`: its tables on terminals and off, the JSON document, layers and tables chosen, files, and every refusal."""

import dataclasses
import importlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import toyllm as package
from toyllm.cli import output
from toyllm.models.activations import record
from toyllm.models.trace import trace

GOLDENS = Path(__file__).parents[1] / "models" / "goldens"
BASELINE = str(GOLDENS / "gpt2" / "baseline")  # no tokenizer, 64 positions
FOX = "The fox and the crow.\n"
TITLES = ["lens", "norms of the residual stream", "attention of each token", "attention of each head"]
ROUTED = ["routing", "load"]


@pytest.fixture
def document(toyllm: Any) -> Callable[..., Any]:
    """Run trace with --json, which must succeed without a word on stderr."""

    def document(*arguments: str, **options: Any) -> Any:
        code, out, err = toyllm("trace", *arguments, "--json", **options)
        assert (code, err) == (0, "")
        assert out.count("\n") == 1
        return json.loads(out, parse_constant=lambda constant: pytest.fail(constant))

    return document


@pytest.fixture
def width(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Terminals of so many columns."""
    return lambda columns: monkeypatch.setattr("shutil.get_terminal_size", lambda *_: os.terminal_size((columns, 24)))


def tables(out: str) -> dict[str, list[str]]:
    """The lines under each title, the header among them."""
    blocks = [block.splitlines() for block in plain(out).strip("\n").split("\n\n")]
    return {title.split(":")[0]: lines for title, *lines in blocks}


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[\d;]*[A-Za-z]", "", text)


# ---- tables -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "titles"), [("tales-gpt2", TITLES), ("tales-gpt-oss", TITLES + ROUTED)])
def test_off_a_terminal_every_layer_of_every_table_is_there(toyllm: Any, name: str, titles: list[str]) -> None:
    code, out, err = toyllm("trace", FOX, "-m", name)
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    assert list(tables(out)) == titles
    layers = [str(i) for i in range(len(package.load(name).weights.blocks))]
    for title, (header, *_) in tables(out).items():
        assert header.split()[1:] == (["embed"] if title.startswith("norms") else []) + layers


def test_rows_hold_what_was_measured(toyllm: Any) -> None:
    found = tables(toyllm("trace", FOX, "-m", "tales-gpt-oss").out)
    loaded = package.load("tales-gpt-oss")
    ids = loaded.tokenizer.encode(FOX)
    expected = trace(loaded, ids)
    heads, experts = len(expected.layers[0].entropy), 8
    assert [len(lines) - 1 for lines in found.values()] == [len(ids), len(ids), len(ids) + 1, heads + 1, len(ids), experts + 1]
    for t, line in enumerate(found["lens"][1:]):
        cells = re.findall(r"(\S+) +(\d+)(\*?)", line.split(maxsplit=2)[2])
        for layer, (piece, share, mark) in zip(expected.layers, cells, strict=True):
            best = int(layer.lens.ids[t, 0])
            assert piece == loaded.tokenizer.decode([best]).replace(" ", "·").replace("\n", "↵")
            assert int(share) == round(100 * layer.lens.probabilities[t, 0])
            assert (mark == "*") == (t + 1 < len(ids) and best == ids[t + 1])
    for t, line in enumerate(found["norms of the residual stream"][1:]):
        norms = [expected.embed[t], *(norms[t] for layer in expected.layers for norms in (layer.resid_mid, layer.out))]
        assert line.split()[2:] == [f"{x:#.3g}".rstrip(".") for x in norms]
    *by_head, means = [line.split()[1:] for line in found["attention of each head"][1:]]
    for h, line in enumerate(by_head):
        parts = [(layer.entropy[h].mean(), layer.sink[h].mean()) for layer in expected.layers if layer.sink is not None]
        assert line == [text for entropy, sink in parts for text in (f"{entropy:.2f}", f"{100 * sink:.0f}")]
    assert means[0] == f"{expected.layers[0].entropy.mean():.2f}"
    routings = [layer.routing for layer in expected.layers if layer.routing]
    for t, line in enumerate(found["routing"][1:]):
        pairs = [(e, w) for routing in routings for e, w in zip(routing.experts[t], routing.weights[t], strict=True)]
        assert line.split()[2:] == [f"{e}:{100 * w:.0f}" for e, w in pairs]
    for e, line in enumerate(found["load"][1:-1]):
        assert re.findall(r"\d+", line) == [str(e), *(str(routing.counts[e]) for routing in routings)]
    assert found["load"][-1].split() == ["max/mean", *(f"{routing.imbalance:.2f}" for routing in routings)]
    longest = max(re.findall(r"█*[▏▎▍▌▋▊▉]?", "\n".join(found["load"])), key=len)
    assert longest == "█" * 8


@pytest.mark.parametrize("columns", [40, 80, 120, 200])
def test_a_terminal_gets_as_many_layers_as_fit_and_is_told(on_terminal: Any, width: Any, columns: int) -> None:
    width(columns)
    code, out, err = on_terminal("trace", FOX, "-m", "tales-gpt-oss")
    assert code == 0
    for title, lines in tables(out).items():
        assert max(map(output.display_width, lines)) <= columns
        assert lines[0].split()[-1] == "3"
        if columns == 200:
            assert lines[0].split()[-4:] == list("0123")
        if columns == 40 and title == "lens":
            assert lines[0].split()[1:] == ["0", "3"]
    note = f"note: not all layers fit in {columns} columns; --layers names those to show"
    assert (note in plain(err)) == (columns < 80)


def test_layers_that_were_asked_for_are_wrapped(on_terminal: Any, width: Any) -> None:
    width(40)
    code, out, err = on_terminal("trace", FOX, "--layers", "0,2-4,-1", "--show", "lens")
    assert code == 0
    blocks = [block.splitlines() for block in plain(out).split("\n\n")]
    assert [number for _, header, *_ in blocks for number in header.split()[1:]] == ["0", "2", "3", "4", "5"]
    assert all(output.display_width(line) <= 40 for _, *lines in blocks for line in lines)
    assert "note" not in err


def test_colours_are_by_probability(on_terminal: Any, width: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    width(200)
    out = on_terminal("trace", "Once upon a time", "--show", "lens").out
    shares = re.findall(r"\x1b\[38;5;16;48;5;(\d+)m\S+ +(\d+)", out)
    assert shares
    assert all(int(share) in range(9, 91) for _, share in shares)
    assert [colour for colour, _ in sorted(shares, key=lambda pair: int(pair[1]))] == sorted(
        (colour for colour, _ in shares), key=["189", "153", "117", "75"].index
    )
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in on_terminal("trace", FOX, "--show", "lens").out


def test_tables_come_as_chosen_in_their_own_order(toyllm: Any) -> None:
    assert list(tables(toyllm("trace", FOX, "-m", "tales-gpt-oss", "--show", "routing, lens").out)) == ["lens", *ROUTED]
    code, out, err = toyllm("trace", FOX, "--show", "routing")
    assert (code, out, err) == (0, "", "note: tales-gpt2 has no experts: nothing is routed\n")


def test_odd_tokens_are_one_visible_word(toyllm: Any) -> None:
    out = toyllm("trace", "a\n\tb \x1b[31m🦊", "--show", "norms").out
    pieces = [line.split()[1] for line in tables(out)["norms of the residual stream"][1:]]
    assert "↵" in pieces
    assert "⇥" in pieces
    assert "\\x1b" in pieces
    assert "".join(pieces).endswith("\\xf0\\x9f\\xa6\\x8a")
    assert "\x1b" not in out


def test_a_model_without_tokenizer_shows_ids(toyllm: Any) -> None:
    out = toyllm("trace", "--prompt-ids", "3 1 4", "-m", BASELINE, "--show", "lens").out
    assert [line.split()[1] for line in tables(out)["lens"][1:]] == ["3", "1", "4"]


def test_prompts_come_from_a_pipe_too(toyllm: Any) -> None:
    assert toyllm("trace", "-", stdin=FOX.encode()).out == toyllm("trace", FOX.rstrip("\n")).out
    assert toyllm("trace", stdin=FOX.encode()).out == toyllm("trace", FOX.rstrip("\n")).out


# ---- the document -----------------------------------------------------------------------------------------------------------


def test_the_document_has_exactly_these_keys(document: Any) -> None:
    found = document(FOX, "-m", "tales-gpt-oss", "--top", "2")
    T = len(found["tokens"])
    assert list(found) == ["schema", "tokens", "layers", "timings", "settings"]
    assert found["schema"] == "toyllm.trace/1"
    assert [list(token) for token in found["tokens"]] == [["id", "text", "embed"]] * T
    assert "".join(token["text"] for token in found["tokens"]) == FOX
    assert list(found["timings"]) == ["load_s", "trace_s", "tok_s"]
    assert all(value > 0 for value in found["timings"].values())
    assert {"model": "tales-gpt-oss", "context": T}.items() <= found["settings"].items()
    assert [layer["layer"] for layer in found["layers"]] == [0, 1, 2, 3]
    for layer in found["layers"]:
        assert list(layer) == ["layer", "resid_mid", "out", "lens", "attention", "routing"]
        assert len(layer["resid_mid"]) == len(layer["out"]) == len(layer["lens"]) == T
        for token in layer["lens"]:
            assert list(token) == ["top", "entropy", "next"]
            assert [list(top) for top in token["top"]] == [["id", "text", "prob"]] * 2
        assert [token["next"] is None for token in layer["lens"]] == [False] * (T - 1) + [True]
        assert list(layer["lens"][0]["next"]) == ["prob", "rank"]
        assert list(layer["attention"]) == ["entropy", "head_entropy", "mean_entropy", "sink", "head_sink"]
        assert np.shape(layer["attention"]["entropy"]) == np.shape(layer["attention"]["sink"]) == (8, T)
        assert layer["attention"]["head_entropy"] == pytest.approx(np.mean(layer["attention"]["entropy"], 1).tolist())
        assert layer["attention"]["mean_entropy"] == pytest.approx(np.mean(layer["attention"]["entropy"]))
        assert list(layer["routing"]) == ["experts", "weights", "counts", "shares", "max_over_mean"]
        assert sum(layer["routing"]["counts"]) == 2 * T


def test_the_document_is_what_the_activations_say(document: Any) -> None:
    found = document(FOX)
    loaded = package.load("tales-gpt2")
    arrays, _ = record(loaded, [token["id"] for token in found["tokens"]], lambda name: True)
    last = found["layers"][-1]
    logits = arrays["logits"].astype(np.float64)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    assert [token["top"][0]["id"] for token in last["lens"]] == p.argmax(-1).tolist()
    assert [token["top"][0]["prob"] for token in last["lens"]] == pytest.approx(p.max(-1).tolist(), rel=1e-9)
    weights = arrays["blocks.5.attn.weights"].astype(np.float64)
    assert np.allclose(last["attention"]["entropy"], -(weights * np.log(np.where(weights > 0, weights, 1))).sum(-1), atol=1e-6)
    assert [layer["routing"] for layer in found["layers"]] == [None] * 6
    assert [layer["attention"]["sink"] for layer in found["layers"]] == [None] * 6


def test_what_is_not_finite_is_null(document: Any, monkeypatch: pytest.MonkeyPatch, toyllm: Any) -> None:
    def damaged(*arguments: Any, **options: Any) -> Any:
        loaded = package.load("tales-gpt2")
        first, *rest = loaded.weights.blocks
        norm = dataclasses.replace(first.norm_2, bias=first.norm_2.bias + np.float32("inf"))
        loaded.weights = dataclasses.replace(loaded.weights, blocks=(dataclasses.replace(first, norm_2=norm), *rest))
        return loaded

    monkeypatch.setattr(importlib.import_module("toyllm.cli.trace"), "load", damaged)
    first, *rest = document("The fox")["layers"]
    assert None not in first["resid_mid"]
    assert first["out"] == [None, None]
    assert first["lens"] == [{"top": [], "entropy": None, "next": None}] * 2
    assert rest[0]["attention"]["mean_entropy"] is None
    assert "NaN" in toyllm("trace", "The fox").out


def test_chosen_layers_are_all_there_is(document: Any) -> None:
    assert [layer["layer"] for layer in document(FOX, "--layers", "-1,0,3-4,3")["layers"]] == [0, 3, 4, 5]


# ---- changed runs -----------------------------------------------------------------------------------------------------------


def test_what_is_changed_is_seen_from_there_on(document: Any) -> None:
    plain, found = document(FOX), document(FOX, "--ablate", "blocks.2.out[-1]")
    T = len(plain["tokens"])
    assert found["settings"]["changes"] == [{"kind": "ablate", "where": "blocks.2.out[-1]", "value": None}]
    assert plain["settings"]["changes"] == []
    assert found["layers"][:2] == plain["layers"][:2]
    assert found["layers"][2]["out"] == [*plain["layers"][2]["out"][:-1], 0]
    for i in (3, 4, 5):
        assert [a == b for a, b in zip(found["layers"][i]["out"], plain["layers"][i]["out"], strict=True)] == [True] * (T - 1) + [False]


def test_a_runs_own_activations_in_their_place_change_nothing(toyllm: Any, document: Any, tmp_path: Path) -> None:
    own = tmp_path / "own.npz"
    assert toyllm("dump-tensor", "*", "--prompt", FOX, "-m", "tales-gpt-oss", "--save", str(own)).code == 0
    plain = document(FOX, "-m", "tales-gpt-oss")
    code, out, _ = toyllm("trace", FOX, "-m", "tales-gpt-oss", "--patch", f"blocks.1.*={own}", "--json")
    assert code == 0
    assert json.loads(out)["layers"] == plain["layers"]


def test_experts_that_are_not_allowed_have_no_load(document: Any, toyllm: Any) -> None:
    found = document(FOX, "-m", "tales-gpt-oss", "--experts", "3,7")
    T = len(found["tokens"])
    for layer in found["layers"]:
        assert {e for e, count in enumerate(layer["routing"]["counts"]) if count} == {3, 7}
    code, out, _ = toyllm("trace", FOX, "-m", "tales-gpt-oss", "--experts", "5")
    assert code == 0
    assert re.search(rf"^5 +{T} █{{8}} +{T} █{{8}}", out, re.MULTILINE)
    assert re.search(r"^max/mean  8.00 +8.00 +8.00 +8.00$", out, re.MULTILINE)


def test_the_lens_reads_the_stream_not_the_logits(document: Any) -> None:
    plain, found = document(FOX), document(FOX, "--patch", "logits=0")
    assert found["layers"] == plain["layers"]


def test_weights_that_are_no_shares_have_no_entropy(document: Any) -> None:
    first, *_ = document(FOX, "--patch", "blocks.0.attn.weights[1]=-0.5")["layers"]
    assert [None in head for head in first["attention"]["entropy"]] == [False, True, False, False]


def test_a_page_says_what_was_changed(toyllm: Any, tmp_path: Path) -> None:
    for name, changes in (("a", ()), ("b", ("--scale", "blocks.0.mlp.out=0.5", "--ablate", "embed[0]"))):
        assert toyllm("trace", FOX, *changes, "--html", str(tmp_path / name) + ".html").code == 0
    assert "Changed as it ran: --scale blocks.0.mlp.out=0.5, --ablate embed[0]." in (tmp_path / "b.html").read_text()
    assert '"notices": []' in (tmp_path / "a.html").read_text()


def test_8_bit_weights_are_traced_to_their_own_logits(document: Any) -> None:
    found = document(FOX, "--weights", "q8")
    p = np.exp(package.load("tales-gpt2", weights="q8").logits([token["id"] for token in found["tokens"]]).astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    assert [token["top"][0]["prob"] for token in found["layers"][-1]["lens"]] == pytest.approx(p.max(-1).tolist(), rel=1e-9)


# ---- statistics -------------------------------------------------------------------------------------------------------------


def test_statistics_go_to_stderr(toyllm: Any) -> None:
    code, out, err = toyllm("trace", FOX, "-m", "tales-gpt-oss", "--show", "lens", "--stats")
    assert code == 0
    assert list(tables(out)) == ["lens"]
    assert [line.split(":")[0] for line in err.splitlines()][:5] == [
        "total duration",
        "load duration",
        "trace duration",
        "trace rate",
        "mixture of experts",
    ]
    assert "memory" in err


# ---- files and refusals -----------------------------------------------------------------------------------------------------


def test_a_page_is_written_once(toyllm: Any, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    code, out, err = toyllm("trace", FOX, "--html", str(path))
    assert (code, out) == (0, "")
    assert err == f"wrote {path}: {path.stat().st_size:,} bytes, {len(package.load('tales-gpt2').tokenizer.encode(FOX))} tokens, 6 layers\n"
    before = path.read_bytes()
    assert toyllm("trace", FOX, "--html", str(path)).error == f"{path}: is there already; --force writes over it"
    assert toyllm("trace", FOX, "--html", str(path), "--force").code == 0
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


def test_a_page_and_the_document_come_of_one_run(toyllm: Any, tmp_path: Path) -> None:
    code, out, _ = toyllm("trace", FOX, "--html", str(tmp_path / "page.html"), "--json")
    assert code == 0
    assert json.loads(out)["schema"] == "toyllm.trace/1"
    assert (tmp_path / "page.html").is_file()


def test_maps_that_are_too_large_are_left_out_with_a_note(toyllm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toyllm.models.trace.MAPS", 5_000)
    ids = " ".join(["7"] * 40)  # 3,280 bytes a layer
    code, _, err = toyllm("trace", "--prompt-ids", ids, "--html", str(tmp_path / "a.html"))
    assert code == 0
    assert (
        "note: no attention maps in the page: 0 MiB for 40 tokens and 6 layers; --layers with up to 1 of them, or a shorter prompt" in err
    )
    assert "note" not in toyllm("trace", "--prompt-ids", ids, "--html", str(tmp_path / "b.html"), "--layers", "2").err
    assert "take a shorter prompt" in toyllm("trace", "--prompt-ids", f"{ids} {ids}", "--html", str(tmp_path / "c.html")).err
    assert "note" not in toyllm("trace", "--prompt-ids", ids).err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--layers", "x"], 2, "Invalid value for --layers: 'x': expected layers such as 0,3-5 or -1"),
        (["--layers", "3-1"], 2, "'3-1': expected layers"),
        (["--layers", "-2-3"], 2, "'-2-3': expected layers"),
        (["--layers", ""], 2, "'': expected layers"),
        (["--layers", "0,6"], 1, "layer 6: expected 0 to 5"),
        (["--layers", "-7"], 1, "layer -7: expected 0 to 5"),
        (["--show", "lens,all"], 2, "Invalid value for --show: 'all': expected lens, norms, attention, routing"),
        (["--top", "0"], 2, "Invalid value for '--top': 0 is not in the range x>=1"),
        (["--html", "page.txt"], 1, "page.txt: expected a name that ends in .html, .htm"),
        (["--html", "nowhere/page.html"], 1, "nowhere/page.html: no folder nowhere to write to"),
        (["--prompt-ids", "5"], 2, "give a text or ids, not both"),
        (["--exact", "--activations", "bf16"], 1, "--exact is f32 throughout"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(toyllm: Any, arguments: list[str], code: int, said: str) -> None:
    outcome = toyllm("trace", FOX, *arguments)
    assert said in outcome.error
    assert outcome.code == code


def test_prompts_that_cannot_be_run_are_refused(toyllm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "none given; try: toyllm trace" in toyllm("trace", stdin=None).error
    assert "no tokenizer" in toyllm("trace", FOX, "-m", BASELINE).error
    assert toyllm("trace", "--prompt-ids", "1 " * 65, "-m", BASELINE).error.startswith("a prompt of 65 tokens: expected 1 to 64")
    monkeypatch.setattr("toyllm.cli.trace_page.TOKENS", 10)
    page = str(tmp_path / "page.html")
    assert toyllm("trace", "--prompt-ids", "1 " * 11, "--html", page).error.startswith("--html: 11 tokens: a page holds up to 10")
    assert not Path(page).exists()


def test_a_refusal_needs_no_kernels(process: Any) -> None:
    child = process("trace", "x", "--layers", "y", env=os.environ | {"PYTHONPROFILEIMPORTTIME": "1"})
    err = child.communicate(timeout=60)[1]
    assert child.returncode == 2
    assert b"toyllm.cli.trace" in err
    assert b"numba" not in err
