"""harmony held against the vectors of openai/harmony's own tests, in gpt-oss's own ids: texts rendered, and ids read."""

from pathlib import Path

import pytest

import toyllm
from toyllm.models.harmony import DeveloperContent, Message, SystemContent, parse, render, stop_ids
from toyllm.models.harmony_tools import BROWSER, PYTHON, Tool
from toyllm.models.tokenizer import Tokenizer

VECTORS = Path(toyllm.__file__).parent.parent / "shared" / "assets" / "tokenizer-vectors" / "harmony"


def user(text: str) -> Message:
    return Message("user", text)


def assistant(text: str, channel: str | None = None, **header: str) -> Message:
    return Message("assistant", text, channel, **header)


# What the tests of that library render, by the vector's name


QUESTION = "What is the capital of the largest country in the world?"
ROBOT = Message("developer", DeveloperContent("Answer the user's questions like a robot."))
DATE = "2025-06-28"
FORMAT = {"type": "string", "enum": ["celsius", "fahrenheit"], "default": "celsius"}
CITY = {"type": "string", "description": "The city and state, e.g. San Francisco, CA"}
CITIES = {"type": "array", "items": {"type": "string"}, "description": 'List of city and state, e.g. ["San Francisco, CA", "New York, NY"]'}
SINK = {
    "string": {"type": "string", "title": "STRING", "description": "A string", "examples": ["hello", "world"]},
    "string_nullable": {"type": "string", "nullable": True, "description": "A nullable string", "default": "the default"},
    "string_enum": {"type": "string", "enum": ["a", "b", "c"]},
    "oneof_string_or_number": {
        "oneOf": [{"type": "string", "default": "default_string_in_oneof"}, {"type": "number", "description": "numbers can happen too"}],
        "description": "a oneof",
        "default": 20,
    },
}


def parameters(required: list[str] | None = None, description: str | None = None, /, **properties: dict) -> dict:
    """A JSON schema of an object."""
    schema = {"type": "object", "properties": properties}
    return schema | ({"required": required} if required else {}) | ({"description": description} if description else {})


FUNCTIONS = (
    Tool("get_location", "Gets the location of the user."),
    Tool(
        "get_current_weather", "Gets the current weather in the provided location.", parameters(["location"], location=CITY, format=FORMAT)
    ),
    Tool(
        "get_multiple_weathers",
        "Gets the current weather in the provided list of locations.",
        parameters(["locations"], locations=CITIES, format=FORMAT),
    ),
    Tool("kitchensink", "A function with various complex schemas.", parameters(None, "params object", **SINK)),
)
LOOKUP = Tool(
    "lookup_weather",
    "Use this tool to lookup the weather in a given location. "
    "Call it with the parameter 'location', can be any textual description of a location.",
    parameters(["location"], location={"type": "string"}),
)
WEATHER = "User asks: “What is the weather in SF?” We need to use lookup_weather tool."
SF_CALL = assistant('{"location": "San Francisco"}', "commentary", recipient="functions.lookup_weather", content_type="<|constrain|>json")
SF_ANSWER = Message("tool", '{"temperature": 20, "description": "sunny"}', name="functions.lookup_weather")
THOUGHT = 'User asks a simple question: "What is 2 + 2?" The answer: 4.'


def system(**says) -> Message:
    return Message("system", SystemContent(**says))


CONVERSATIONS = {
    "simple_convo": [system(), user("What is 2 + 2?")],
    **{f"simple_convo_{effort}_effort": [system(reasoning=effort), ROBOT, user(QUESTION)] for effort in ("low", "medium", "high")},
    **{f"simple_convo_{effort}_effort_no_instruction": [system(reasoning=effort), user(QUESTION)] for effort in ("low", "medium", "high")},
    "reasoning_system_message": [system(channels=("analysis", "final")), user("What is 2 + 2?")],
    "reasoning_system_message_no_instruction": [
        system(reasoning="high", channels=("analysis", "final")),
        user("What is the best place to eat candy in the world?"),
    ],
    "reasoning_system_message_with_dates": [
        system(knowledge_cutoff="2021-01", current_date="2021-01-01", channels=("analysis", "final")),
        user("What is 42 * pi?"),
    ],
    "no_tools": [system(current_date=DATE)],
    "browser_tool_only": [system(current_date=DATE, tools=(BROWSER,))],
    "browser_and_python_tool": [system(current_date=DATE, tools=(BROWSER, PYTHON))],
    "browser_and_function_tool": [
        system(current_date=DATE, tools=(BROWSER,)),
        Message("developer", DeveloperContent(functions=(LOOKUP,))),
    ],
    "render_functions_with_parameters": [
        system(reasoning="high", current_date=DATE),
        Message("developer", DeveloperContent("Always respond in riddles", FUNCTIONS)),
        user("What is the weather like in SF?"),
    ],
    "dropping_cot_by_default": [
        user("What is 2 + 2?"),
        assistant("User asks: “What is 2 + 2?” Simple arithmetic. Provide answer.", "analysis"),
        assistant("2 + 2 equals 4.", "final"),
        user("What about 9 / 2?"),
    ],
    "preserve_cot": [
        user("What is 2 + 2?"),
        assistant(THOUGHT, "analysis"),
        assistant("2 + 2 equals 4.", "final"),
        user("What about 9 / 2?"),
    ],
    "does_not_drop_if_ongoing_analysis": [
        user("What is the weather in SF?"),
        assistant(WEATHER, "analysis"),
        SF_CALL,
        SF_ANSWER,
    ],
    "keep_analysis_between_finals": [
        user("What is 2 + 2?"),
        assistant("thinking 2+2", "analysis"),
        assistant("4", "final"),
        user("What is 3 + 5?"),
        assistant("thinking 3+5", "analysis"),
        assistant("8", "final"),
    ],
}


def vector(name: str) -> str:
    path = VECTORS / f"test_{name}.txt"
    if not path.is_file():
        pytest.skip(f"no {path}")
    return path.read_text(encoding="utf-8").rstrip()


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_conversation_is_rendered_as_openais_library_renders_it(name: str, o200k: Tokenizer) -> None:
    text = vector(name)
    ids = render(CONVERSATIONS[name], o200k, text.endswith("<|start|>assistant"), keep_analysis=name == "preserve_cot")
    assert o200k.decode(ids) == text
    assert ids == o200k.encode(text)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_conversation_that_was_read_is_rendered_to_the_same_ids(name: str, o200k: Tokenizer) -> None:
    ids = o200k.encode(vector(name))
    completion = ids[-1] != 200007
    assert render(parse(ids, o200k), o200k, completion, keep_analysis=True) == ids


def test_a_tools_answer_is_rendered_and_read_as_openais_library_does(o200k: Tokenizer) -> None:
    answer = Message("tool", '{"result": "https://openai.com/"}', "commentary", "assistant", name="browser.search")
    ids = o200k.encode(vector("tool_response_parsing"))
    assert render([answer], o200k, completion=False) == [*ids, 200007]
    assert parse(ids, o200k) == [answer]


def test_reasoning_and_answer_are_read_from_their_ids(o200k: Tokenizer) -> None:
    ids = [int(i) for i in vector("simple_reasoning_response").split()]
    thought = assistant('User asks: "What is 2 + 2?" Simple arithmetic. Provide answer.', "analysis")
    assert parse(ids, o200k) == [thought, assistant("2 + 2 = 4.", "final")]


def test_a_tool_call_is_read_from_its_ids(o200k: Tokenizer) -> None:
    ids = [int(i) for i in vector("simple_tool_call").split()]
    thought = assistant('User asks: "What is the weather in Tokyo?" We need to use lookup_weather tool.', "analysis")
    call = assistant('{"location": "Tokyo"}', "analysis", recipient="lookup_weather", content_type="code")
    assert parse(ids, o200k) == [thought, call]


def test_three_messages_are_read_from_a_stream(o200k: Tokenizer) -> None:
    thought, call, answer = parse(o200k.encode(vector("streamable_parser")), o200k)
    assert (thought.role, thought.channel, thought.content[-8:]) == ("assistant", "analysis", "confirm.")
    query = '{"query": "current US president July 2025", "topn": 10, "source": "news"}'
    assert call == assistant(query, "commentary", recipient="browser.search", content_type="code")
    assert answer == Message("tool", '{"result": "https://openai.com/"}', "commentary", "assistant", name="browser.search")


def test_no_vector_is_forgotten() -> None:
    read = ["tool_response_parsing", "simple_reasoning_response", "simple_tool_call", "streamable_parser"]
    assert vector("simple_convo")
    assert sorted(path.stem for path in VECTORS.glob("*.txt")) == sorted(f"test_{name}" for name in (*CONVERSATIONS, *read))


def test_generation_stops_on_return_call_and_end_of_text(o200k: Tokenizer) -> None:
    assert stop_ids(o200k) == {200002, 200012, 199999}
