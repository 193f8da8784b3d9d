"""Descriptions of tools as harmony's system and developer messages hold them: a notation like TypeScript, made from JSON schemas.

The models were trained on this text, so blank lines, comments and quotes are what openai/harmony writes, to the byte
(`template_tools_section` and `json_schema_to_typescript` in src/encoding.rs).
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Schema = Mapping[str, Any]


@dataclass(frozen=True)
class Tool:
    """A function that the model may call."""

    name: str
    description: str
    parameters: Schema | None = None  # JSON schema of an object; None: the function takes nothing


@dataclass(frozen=True)
class Namespace:
    """Tools under one name; a message `to=name.tool` calls one of them. Without tools the name itself is the recipient."""

    name: str
    description: str = ""
    tools: tuple[Tool, ...] = ()


def tools_section(namespaces: Iterable[Namespace]) -> str:
    """Write the `# Tools` section of a system or developer message."""
    return "\n\n".join(["# Tools", *map(namespace_section, namespaces)])


def namespace_section(namespace: Namespace) -> str:
    """Write one namespace. Its description is a comment where tools follow, and plain text where it stands alone."""
    if not namespace.tools:
        return f"## {namespace.name}\n\n" + namespace.description.removesuffix("\n")
    lines = [f"## {namespace.name}\n", *comment(namespace.description), f"namespace {namespace.name} {{\n"]
    for tool in namespace.tools:
        argument = "" if tool.parameters is None else f"_: {typescript(tool.parameters)}"
        lines += [*comment(tool.description), f"type {tool.name} = ({argument}) => any;\n"]
    return "\n".join([*lines, f"}} // namespace {namespace.name}"])


def comment(text: str) -> Iterator[str]:
    """Make every line of a text a comment; an empty text has none."""
    return (f"// {line}" for line in text.removesuffix("\n").split("\n") if text)


def typescript(schema: Schema, indent: str = "") -> str:
    """Write a JSON schema as a type. What the notation has no word for is `any`."""
    if "oneOf" in schema:
        alternatives = map(subschema, schema["oneOf"])
        return "".join(f"\n{indent} | {alternative(each, indent)}{trailing(each, text_of(each))}" for each in alternatives)
    kind = schema.get("type")
    if isinstance(kind, list | tuple):
        return " | ".join("number" if each == "integer" else each for each in kind) or "any"
    if kind == "object":
        return object_type(schema, indent)
    if kind == "array":
        return typescript(subschema(schema["items"]), indent) + "[]" if "items" in schema else "Array<any>"
    if kind == "string":
        return " | ".join(f'"{value}"' for value in schema.get("enum", ()) if isinstance(value, str)) or "string"
    return {"number": "number", "integer": "number", "boolean": "boolean"}.get(str(kind), "any")


def object_type(schema: Schema, indent: str) -> str:
    """Write an object: its own description, then its properties, each behind its comments."""
    required = schema.get("required", ())
    text = f"{indent}// {text_of(schema)}\n{{\n" if text_of(schema) else "{\n"
    for name, value in schema.get("properties", {}).items():
        lines = property_lines(name if name in required else f"{name}?", subschema(value), indent)
        text += "".join(f"{indent}{line}\n" for line in lines)
    return text + f"{indent}}}"


def property_lines(name: str, schema: Schema, indent: str) -> Iterator[str]:
    """Write one property. The alternatives of a `oneOf` have a line each, and its description and default stand above them."""
    description, alternatives = text_of(schema), [subschema(each) for each in schema.get("oneOf", ())]
    if "title" in schema:
        yield from (f"// {schema['title']}", "//")
    if description and not alternatives:
        yield f"// {description}"
    if schema.get("examples"):
        yield from ("// Examples:", *(f'// - "{example}"' for example in schema["examples"] if isinstance(example, str)))
    if not alternatives:
        yield f"{name}: {nullable(schema, typescript(schema, indent + '    '))},{trailing(schema, '')}"
        return
    above = description if description != text_of(alternatives[0]) else ""
    if above:
        yield f"// {above}"
    if "default" in schema:
        yield f"// {default(schema)}"
    yield f"{name}:"
    for i, each in enumerate(alternatives):
        said = text_of(each) == description or (i == 0 and above)
        yield f" | {alternative(each, indent)}{trailing(each, '' if said else text_of(each))}"
    yield ","


def alternative(schema: Schema, indent: str) -> str:
    """Write one type of a `oneOf`."""
    return nullable(schema, typescript(schema, indent + "   "))


def nullable(schema: Schema, text: str) -> str:
    """Add the null that a schema's `nullable` asks for."""
    return f"{text} | null" if schema.get("nullable") is True and "null" not in text else text


def trailing(schema: Schema, description: str) -> str:
    """Write the comment behind a type: the description given, and the default."""
    words = [description] if description else []
    words += [default(schema)] if "default" in schema else []
    return f" // {' '.join(words)}" if words else ""


def default(schema: Schema) -> str:
    """Write a default: as JSON, but that the value of an enum stands without its quotes."""
    value = schema["default"]
    if isinstance(value, str):
        return f"default: {value}" if schema.get("enum") else f'default: "{value}"'
    return "default: " + json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def text_of(schema: Schema) -> str:
    """Return a schema's description, empty where there is none."""
    return schema.get("description", "")


def subschema(value: object) -> Schema:
    """Read a schema inside another: JSON schema writes "anything" as `true` too."""
    return value if isinstance(value, Mapping) else {}


BROWSER = Namespace(
    "browser",
    "Tool for browsing.\n"
    "The `cursor` appears in brackets before each browsing display: `[{cursor}]`.\n"
    "Cite information from the tool using the following format:\n"
    "`【{cursor}†L{line_start}(-L{line_end})?】`, for example: `【6†L9-L11】` or `【8†L3】`.\n"
    "Do not quote more than 10 words directly from the tool output.\n"
    "sources=web (default: web)",
    (
        Tool(
            "search",
            "Searches for information related to `query` and displays `topn` results.",
            {
                "type": "object",
                "properties": {
                    "query": {"type": "string"},
                    "topn": {"type": "number", "default": 10},
                    "source": {"type": "string"},
                },
                "required": ["query"],
            },
        ),
        Tool(
            "open",
            "Opens the link `id` from the page indicated by `cursor` starting at line number `loc`, showing `num_lines` lines.\n"
            "Valid link ids are displayed with the formatting: `【{id}†.*】`.\n"
            "If `cursor` is not provided, the most recent page is implied.\n"
            "If `id` is a string, it is treated as a fully qualified URL associated with `source`.\n"
            "If `loc` is not provided, the viewport will be positioned at the beginning of the document or centered on the most "
            "relevant passage, if available.\n"
            "Use this function without `id` to scroll to a new location of an opened page.",
            {
                "type": "object",
                "properties": {
                    "id": {"type": ["number", "string"], "default": -1},
                    "cursor": {"type": "number", "default": -1},
                    "loc": {"type": "number", "default": -1},
                    "num_lines": {"type": "number", "default": -1},
                    "view_source": {"type": "boolean", "default": False},
                    "source": {"type": "string"},
                },
            },
        ),
        Tool(
            "find",
            "Finds exact matches of `pattern` in the current page, or the page given by `cursor`.",
            {
                "type": "object",
                "properties": {"pattern": {"type": "string"}, "cursor": {"type": "number", "default": -1}},
                "required": ["pattern"],
            },
        ),
    ),
)

PYTHON = Namespace(
    "python",
    "Use this tool to execute Python code in your chain of thought. The code will not be shown to the user. This tool should be used "
    "for internal reasoning, but not for code that is intended to be visible to the user (e.g. when creating plots, tables, or files).\n"
    "\n"
    "When you send a message containing Python code to python, it will be executed in a stateful Jupyter notebook environment. python "
    "will respond with the output of the execution or time out after 120.0 seconds. The drive at '/mnt/data' can be used to save and "
    "persist user files. Internet access for this session is UNKNOWN. Depends on the cluster.",
)
