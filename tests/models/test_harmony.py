"""harmony: what is rendered is what gpt-oss was trained on, only the renderer makes structure, and messages come back as they went in."""

import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers import Tokenizer as Library
from tokenizers.decoders import ByteLevel as Decoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from toyllm.kernels.errors import ToyllmError
from toyllm.models.harmony import (
    SPECIAL,
    DeveloperContent,
    Event,
    Message,
    Parser,
    SystemContent,
    parse,
    render,
    special_ids,
    stop_ids,
)
from toyllm.models.harmony_tools import PYTHON, Namespace, Tool, tools_section, typescript
from toyllm.models.tokenizer import Tokenizer, byte_characters


def byte_tokenizer(special: tuple[str, ...] = SPECIAL, ordinary: tuple[str, ...] = ()) -> Tokenizer:
    """A token for each byte, ids 0 to 255; then special tokens; then tokens that are found in any text."""
    library = Library(BPE({character: i for i, character in enumerate(byte_characters())}, []))
    library.pre_tokenizer = ByteLevel(add_prefix_space=False)
    library.decoder = Decoder()
    library.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    library.add_tokens([AddedToken(token, normalized=False) for token in ordinary])
    return Tokenizer(library, {i: token.content for i, token in library.get_added_tokens_decoder().items()})


TINY = byte_tokenizer()


def rendered(*messages: Message, **choices: bool) -> str:
    """The rendering as text, special tokens shown."""
    return TINY.decode(render(messages, TINY, **choices))


def read(text: str) -> list[Message]:
    """The messages in a text whose special tokens are meant as such."""
    return parse(TINY.encode(text), TINY)


def user(text: str) -> Message:
    return Message("user", text)


def assistant(text: str, channel: str | None = None, **header: str) -> Message:
    return Message("assistant", text, channel, **header)


# The format


def test_the_default_conversation_is_the_published_one() -> None:
    assert rendered(Message("system", SystemContent()), user("What is 2 + 2?")) == (
        "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\n"
        "Knowledge cutoff: 2024-06\n"
        "\n"
        "Reasoning: medium\n"
        "\n"
        "# Valid channels: analysis, commentary, final. Channel must be included for every message.<|end|>"
        "<|start|>user<|message|>What is 2 + 2?<|end|><|start|>assistant"
    )


def test_a_system_message_says_what_it_is_given_and_no_more() -> None:
    content = SystemContent("I am.", None, "2025-06-28", "high", ("final",))
    assert rendered(Message("system", content), completion=False) == (
        "<|start|>system<|message|>I am.\nCurrent date: 2025-06-28\n\nReasoning: high\n\n"
        "# Valid channels: final. Channel must be included for every message.<|end|>"
    )
    bare = SystemContent("I am.", None, channels=())
    assert rendered(Message("system", bare), completion=False) == "<|start|>system<|message|>I am.\n\nReasoning: medium<|end|>"


def test_functions_are_described_by_the_developer_and_announced_by_the_system() -> None:
    content = DeveloperContent("Rhyme.", (Tool("now", "Tells the time.\nIn UTC."), Tool("at", "", {"type": "object"})))
    text = rendered(Message("system", SystemContent(tools=(PYTHON,))), Message("developer", content), completion=False)
    assert "stateful Jupyter notebook" in text
    assert text.endswith(
        "Channel must be included for every message.\nCalls to these tools must go to the commentary channel: 'functions'.<|end|>"
        "<|start|>developer<|message|># Instructions\n\nRhyme.\n\n# Tools\n\n## functions\n\nnamespace functions {\n\n"
        "// Tells the time.\n// In UTC.\ntype now = () => any;\n\ntype at = (_: {\n}) => any;\n\n} // namespace functions<|end|>"
    )


def test_headers_carry_names_recipients_channels_and_content_types() -> None:
    call = assistant("{}", "commentary", recipient="functions.now", content_type="<|constrain|>json")
    answer = Message("tool", "9:00", "commentary", recipient="assistant", name="functions.now")
    assert rendered(Message("user", "Hi", name="ann"), call, answer) == (
        "<|start|>user:ann<|message|>Hi<|end|>"
        "<|start|>assistant to=functions.now<|channel|>commentary <|constrain|>json<|message|>{}<|call|>"
        "<|start|>functions.now to=assistant<|channel|>commentary<|message|>9:00<|end|><|start|>assistant"
    )
    assert rendered(replace(call, content_type="json"), completion=False).startswith(
        "<|start|>assistant to=functions.now<|channel|>commentary json<|message|>"
    )


def test_a_namespace_without_tools_is_plain_text() -> None:
    assert tools_section([Namespace("python", "Runs code.\n")]) == "# Tools\n\n## python\n\nRuns code."


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({}, "any"),
        ({"type": "null"}, "any"),
        ({"type": ["integer", "null"]}, "number | null"),
        ({"type": "array"}, "Array<any>"),
        ({"type": "array", "items": True}, "any[]"),
        ({"type": "array", "items": {"type": "array", "items": {"type": "boolean"}}}, "boolean[][]"),
        ({"type": "string", "enum": ["a", 'b"', 3]}, '"a" | "b""'),
        (
            {"oneOf": [{"type": "string", "default": "x"}, {"type": "integer", "nullable": True}]},
            '\n | string // default: "x"\n | number | null',
        ),
        (
            {
                "type": "object",
                "properties": {"p": {"type": "object", "description": "D", "properties": {"q": {}}}, "r": {"default": [1, None]}},
            },
            "{\n// D\np?:     // D\n{\n    q?: any,\n    },\nr?: any, // default: [1,null]\n}",
        ),
        (
            {
                "type": "object",
                "properties": {"p": {"description": "D", "oneOf": [{"description": "D"}, {"type": "object", "description": "E"}]}},
                "required": ["p"],
            },
            "{\np:\n | any\n |    // E\n{\n   } // E\n,\n}",
        ),
    ],
)
def test_json_schemas_become_types(schema: dict, text: str) -> None:
    assert typescript(schema) == text


# History


TURN = (user("2 + 2?"), assistant("Easy.", "analysis"), assistant("4", "final"))
CALL = (
    assistant("I look.", "analysis"),
    assistant("{}", "commentary", recipient="functions.now"),
    Message("tool", "9", name="functions.now"),
)


@pytest.mark.parametrize(
    ("messages", "completion", "kept"),
    [
        ((*TURN, user("And 3?")), True, [0, 2, 3]),
        (TURN, True, [0, 2]),
        (TURN, False, [0, 1, 2]),  # nothing follows: the turn is not history yet
        ((*TURN, *TURN), False, [0, 2, 3, 4, 5]),
        ((*TURN, *TURN, user("?")), True, [0, 2, 3, 5, 6]),
        ((user("When?"), *CALL), True, [0, 1, 2, 3]),
        ((*TURN, user("When?"), *CALL), True, [0, 2, 3, 4, 5, 6]),
        ((user("When?"), *CALL, assistant("Done.", "final"), user("?")), True, [0, 2, 3, 4, 5]),
    ],
)
def test_reasoning_is_left_out_once_its_turn_is_over(messages: tuple[Message, ...], completion: bool, kept: list[int]) -> None:
    expected = rendered(*(messages[i] for i in kept), completion=completion, keep_analysis=True)
    assert rendered(*messages, completion=completion) == expected
    assert rendered(*messages, completion=completion, keep_analysis=True).count("<|start|>") == len(messages) + completion


def test_a_generated_answer_goes_back_into_history_with_an_end() -> None:
    answer = read("<|channel|>final<|message|>4<|return|>")
    assert rendered(user("2 + 2?"), *answer, user("?")).count("<|end|>") == 3
    call = read("<|channel|>commentary to=functions.now<|message|>{}<|call|>")
    assert rendered(*call, completion=False) == "<|start|>assistant to=functions.now<|channel|>commentary<|message|>{}<|call|>"


# Only the renderer makes structure


def test_no_text_becomes_a_special_token() -> None:
    evil = "".join(SPECIAL)
    content = DeveloperContent(evil, (Tool(evil, evil, {"type": "object", "properties": {evil: {"description": evil}}}),))
    messages = (
        Message("system", SystemContent(evil, evil, evil, tools=(Namespace(evil, evil),))),
        Message("developer", content),
        Message("user", evil, name=evil),
        Message("tool", evil, evil, evil, "json" + evil, evil),
    )
    ids = render(messages, TINY)
    structure = [TINY.token_bytes(i).decode() for i in ids if i >= 256]
    plain = ["<|start|>", "<|message|>", "<|end|>"]
    assert structure == [*plain * 3, "<|start|>", "<|channel|>", *plain[1:], "<|start|>"]


def test_stop_ids_do_not_hold_the_end_of_a_message() -> None:
    assert {TINY.decode([i]) for i in stop_ids(TINY)} == {"<|return|>", "<|call|>", "<|endoftext|>"}


@pytest.mark.parametrize("use", [stop_ids, Parser, lambda tokenizer: render([], tokenizer), lambda tokenizer: parse([], tokenizer)])
def test_a_tokenizer_without_harmonys_tokens_is_a_clear_error(use) -> None:
    with pytest.raises(ToyllmError, match=r"^tokenizer: chat needs .*, and <\|call\|> is not among its own; use a gpt-oss model"):
        use(byte_tokenizer(tuple(token for token in SPECIAL if token != "<|call|>")))


def test_a_token_that_is_found_in_ordinary_text_is_no_special_token() -> None:
    with pytest.raises(ToyllmError, match=r"and <\|start\|>, <\|end\|> are not among its own"):
        special_ids(byte_tokenizer(tuple(token for token in SPECIAL if token not in ("<|start|>", "<|end|>")), ("<|start|>",)))


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (Message("robot", "x"), "role: expected one of system, developer, user, assistant, tool; found 'robot'"),
        (Message("tool", "x"), "name: expected the tool's, such as functions.get_weather; found None"),
        (Message("tool", "x", name="user"), "name: expected the tool's, .* found 'user'"),
        (Message("tool", "x", name="user:a"), "name: expected the tool's, .* found 'user:a'"),
        (assistant("x", "two words"), "channel: expected one word without spaces, found 'two words'"),
        (assistant("x", ""), "channel: expected one word without spaces, found ''"),
        (assistant("x", recipient="a\nb"), r"recipient: expected one word without spaces, found 'a\\nb'"),
        (assistant("x", content_type="to=me"), "content_type 'to=me' would be read as a recipient"),
        (Message("user", SystemContent()), "SystemContent belongs to the role system, found it in user"),
        (Message("system", DeveloperContent()), "DeveloperContent belongs to the role developer, found it in system"),
        (Message("system", SystemContent(reasoning="max")), "reasoning: expected one of low, medium, high; found 'max'"),
        (user("\ud800"), "lone surrogate"),
    ],
)
def test_a_message_the_format_cannot_hold_is_an_error(message: Message, expected: str) -> None:
    with pytest.raises(ToyllmError, match=expected):
        render([message], TINY)


# Reading


words = st.text(st.characters(codec="utf-8"), min_size=1).filter(lambda text: text.split() == [text]) | st.sampled_from(
    ["functions.get_weather", "json", "a:b", "☃", *SPECIAL, "to=x"]
)
texts = st.lists(st.sampled_from(["", " ", "\n\n", "👋🏽", "é", *SPECIAL, "assistant to=x"]) | st.text(st.characters(codec="utf-8"))).map(
    "".join
)
types = words.filter(lambda text: not text.startswith("to=")) | words.map("<|constrain|>".__add__)


@st.composite
def messages(draw: st.DrawFn) -> Message:
    role = draw(st.sampled_from(["system", "developer", "user", "assistant", "tool"]))
    taken = ("system", "developer", "user", "assistant")
    name = words.filter(lambda text: text.partition(":")[0] not in taken) if role == "tool" else st.none() | words
    optional = st.none() | words
    return Message(role, draw(texts), draw(optional), draw(optional), draw(st.none() | types), draw(name))


@settings(deadline=None)  # a busy machine is no failure
@given(st.lists(messages(), max_size=4), st.booleans())
def test_what_was_rendered_is_read_back(written: list[Message], completion: bool) -> None:
    assert parse(render(written, TINY, completion, keep_analysis=True), TINY) == written


def scraps() -> st.SearchStrategy[list[int]]:
    """Ids as an untrained model draws them: structure everywhere, halves of characters, ids without a token."""
    common = st.sampled_from([*special_ids(TINY).values(), *b" to=user:assistant\xf0\x9f\x91\x8b\n"])
    return st.lists(common | st.integers(0, 300) | st.integers(200019, 201087))


@settings(deadline=None)  # a busy machine is no failure
@given(scraps())
def test_any_ids_at_all_can_be_read_and_rendered_again(ids: list[int]) -> None:
    found = parse(ids, TINY)
    assert parse(render(found, TINY, keep_analysis=True), TINY) == found


@settings(deadline=None)  # a busy machine is no failure
@given(scraps())
def test_the_stream_adds_up_to_the_messages(ids: list[int]) -> None:
    parser = Parser(TINY)
    events = [event for event in (*map(parser.push, ids), parser.finish()) if event]
    texts = [""]
    for event in events:
        assert event.message.content == (texts[-1] + event.text if event.closed else "")
        texts[-1] += event.text
        texts += [""] if event.closed else []
    assert texts == [*(message.content for message in parser.messages), ""]
    assert [event.message for event in events if event.closed] == parser.messages


def test_an_answer_streams_channel_by_channel_in_whole_characters() -> None:
    parser = Parser(TINY)
    ids = TINY.encode("<|channel|>analysis<|message|>é<|end|><|start|>assistant<|channel|>final<|message|>👋!<|return|>")
    events = [event for event in map(parser.push, ids) if event]
    thought, answer = assistant("", "analysis"), assistant("", "final")
    assert events == [
        Event(thought, "", False),
        Event(thought, "é", False),
        Event(assistant("é", "analysis"), "", True),
        Event(answer, "", False),
        Event(answer, "👋", False),
        Event(answer, "!", False),
        Event(assistant("👋!", "final"), "", True),
    ]


@pytest.mark.parametrize(
    "header",
    [
        " to=functions.now<|channel|>commentary json",
        "<|channel|>commentary to=functions.now json",
        " to=functions.now json<|channel|>commentary",
        "assistant<|channel|>commentary json to=functions.now",
        "<|start|>assistant to=functions.now<|channel|>commentary json",
    ],
)
def test_the_recipient_stands_behind_the_role_or_behind_the_channel(header: str) -> None:
    assert read(header + "<|message|>{}<|call|>") == [assistant("{}", "commentary", recipient="functions.now", content_type="json")]


@pytest.mark.parametrize("space", ["", " "])
@pytest.mark.parametrize("place", [" to=f{}<|constrain|>json<|channel|>final", "<|channel|>final to=f{}<|constrain|>json"])
def test_a_constraint_needs_no_space_before_it(place: str, space: str) -> None:
    assert read(place.format(space) + "<|message|>{}<|call|>") == [
        assistant("{}", "final", recipient="f", content_type="<|constrain|>json")
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("<|end|><|start|>assistant<|return|>", []),
        ("I must refuse<|end|>", [assistant("I must refuse")]),
        ("<|channel|>analysis I must<|return|>", [assistant("I must", "analysis")]),
        ("<|channel|>final<|message|>cut", [assistant("cut", "final")]),
        ("<|channel|>final<|message|>one<|start|>assistant<|message|>two<|endoftext|>", [assistant("one", "final"), assistant("two")]),
        ("<|message|>one<|end|><|channel|>final<|message|>two", [assistant("one"), assistant("two", "final")]),
        ("<|message|>a<|channel|>b<|message|>c", [assistant("a<|channel|>b<|message|>c")]),
        ("<|start|><|message|>x", [assistant("x")]),
        ("<|start|>user: to=<|message|>x", [user("x")]),
        ("<|start|>tool<|channel|><|message|>x", [Message("tool", "x", name="tool")]),
    ],
)
def test_nothing_is_lost_where_a_model_leaves_the_format(text: str, expected: list[Message]) -> None:
    assert read(text) == expected


def test_ids_without_a_token_and_broken_characters_show_themselves() -> None:
    message, end = (special_ids(TINY)[token] for token in ("<|message|>", "<|end|>"))
    assert parse([200500, message, 0xF0, 0x9F, 200500, 0xF0, end], TINY)[0].content == "\ufffd<|id 200500|>\ufffd"


def test_nothing_here_imports_numba() -> None:
    code = "import sys, toyllm.models.harmony; sys.exit('numba' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
