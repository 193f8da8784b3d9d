"""Damage to bytes and to JSON, as accidents and people who mean harm do it. Everything is drawn from a `Random`.

JSON is mutated as a tree of texts: a `Members` is an object's names and values, a list an array, and bytes any other value as it is
spelled. So a name can occur twice, a number be spelled in many ways, and a string hold what no writer would put there.
"""

import json
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

Tree = Any  # bytes, [Tree, …] or Members


class Members(list[tuple[bytes, Tree]]):
    """An object: (name as it is spelled, value)."""


def chance(rng: Random, share: float) -> bool:
    """True in this share of the cases. The smallest draw is False: an input that is made small is one with little damage."""
    return rng.random() >= 1 - share


# ---- numbers and strings ----------------------------------------------------------------------------------------------------

NUMBERS = [
    *(b"0 -0 -0.0 1 -1 2 3 7 8 64 65 100 4096 1.0 1.5 0.1 1e0 8E0 1e2 1e400 -1e400 08 +1 1. .5 0x10 NaN Infinity -Infinity".split()),
    *(b"%d" % (2**bits + more) for bits in (31, 32, 53, 63, 64) for more in (-1, 0, 1, -8)),
    *(b"-%d" % 2**bits for bits in (31, 63, 64)),
    b"1" * 400,
    b"9" * 5000,
    "٣".encode(),
]
ESCAPES = rb"\u0000 \u0061 \ud83d\ude00 \ud800 \udc00 \ud800\u0061 \x41 \/".split()
INSIDE = [b"", b"a", b"F32", b"f32", b"__metadata__", b"x" * 3000, "é👋".encode(), "\u2028".encode(), "\ufeff".encode(), "\u202e".encode()]
RAW = [b"\x00", b"\x01", b"\x1b[2J", b"\x7f", b"\t", b"\n", b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80"]
STRINGS = [*(b'"%b"' % inside for inside in (*ESCAPES, *INSIDE, *RAW)), b"'a'", b'"a']
OTHERS = [*b"null true false nul True [] {} [[]] undefined /**/1".split(), b'{"":{}}', b"[" * 300 + b"]" * 300, b""]
SPACES = [b" ", b"\t", b"\n", b"\r\n", b"\x0b", b"\x0c", b"\x00", b"\xa0", "\u00a0".encode(), "\u2003".encode(), b"// c\n", b"/* c */"]
TRAILING = [b" ", b"\n", b"\x00", b",", b"}", b"]", b"{}", b"null", b"//", b"\xff", b'"', b"   \t"]


def spelled(rng: Random, text: bytes) -> bytes:
    """A value in another spelling, which may or may not mean the same."""
    if text[:1] == b'"' and len(text) > 2:
        at = rng.randrange(1, len(text) - 1)
        how = rng.randrange(4)
        if how == 0 and text[at] < 0x80 and text[at] not in b'\\"':
            return text[:at] + b"\\u%04x" % text[at] + text[at + 1 :]
        if how == 1:
            return text[:at] + rng.choice(STRINGS)[1:-1] + text[at:]
        if how == 2:
            return text.swapcase()
        return text[:at] + text[at + 1 :]
    if text.lstrip(b"-").isdigit() and len(text) < 100:
        n = int(text)
        near = (n + rng.randint(-9, 9), n + 2**64, n + 2**32, -n, 2 * n, n // 2, 2**64 - n)
        return rng.choice([b"%d" % rng.choice(near), text + b".0", text + b"e0", b"0" + text, b"%de-1" % (10 * n), b'"' + text + b'"'])
    return rng.choice(OTHERS)


def value(rng: Random) -> bytes:
    """Some value."""
    return rng.choice(rng.choice((NUMBERS, NUMBERS, STRINGS, OTHERS)))


# ---- trees ------------------------------------------------------------------------------------------------------------------


def tree(document: Any) -> Tree:
    """A document that json.loads could have made, as a tree."""
    if isinstance(document, dict):
        return Members((tree(name), tree(member)) for name, member in document.items())
    if isinstance(document, (list, tuple)):
        return [tree(item) for item in document]
    return json.dumps(document, ensure_ascii=False).encode("utf-8", "surrogatepass")


def text(node: Tree, rng: Random | None = None) -> bytes:
    """A tree as JSON. With `rng`, spaces and what is taken for such stand here and there."""
    space = (lambda: rng.choice(SPACES[:3]) if chance(rng, 0.9) else rng.choice(SPACES)) if rng else (lambda: b"")
    return b"".join(pieces(node, space))


def pieces(node: Tree, space: Any) -> Iterator[bytes]:
    """The pieces of a tree's text."""
    if isinstance(node, Members):
        for i, (name, member) in enumerate(node):
            yield from (b"," if i else b"{", space(), name, space(), b":", space())
            yield from pieces(member, space)
        yield b"}" if node else b"{}"
    elif isinstance(node, list):
        for i, item in enumerate(node):
            yield from (b"," if i else b"[", space())
            yield from pieces(item, space)
        yield b"]" if node else b"[]"
    else:
        yield node


def places(node: Tree) -> Iterator[tuple[list[Any], int]]:
    """Every value below a tree's root: the list that holds it, and where."""
    if isinstance(node, list):
        for i, item in enumerate(node):
            yield node, i
            yield from places(item[1] if isinstance(node, Members) else item)


def mutate_tree(rng: Random, root: Tree) -> None:
    """Change one value, name, or element somewhere in a tree, in place."""
    found = [*places(root)]
    if not found:
        return
    holder, i = rng.choice(found)
    entry = holder[i]
    name, old = entry if isinstance(holder, Members) else (b"", entry)
    # where there are names, half of the changes are to them or to the set of them
    how = rng.randrange(8 if isinstance(holder, Members) else 6)
    if how == 0:
        new = value(rng)
    elif how == 1:
        new = spelled(rng, old) if isinstance(old, bytes) else value(rng)
    elif how == 2:
        del holder[i]
        return
    elif how == 3:
        again = copy(old) if chance(rng, 0.5) else value(rng)
        holder.insert(rng.randrange(len(holder) + 1), (name, again) if isinstance(holder, Members) else again)
        return
    elif how == 4:
        new = rng.choice([[old], [old, old], Members([(b'"a"', old)]), Members([(old, b"null")] if isinstance(old, bytes) else [])])
    elif how == 5:
        other, k = rng.choice(found)
        new = copy(other[k][1] if isinstance(other, Members) else other[k])
    else:
        names = [n for members, j in found if isinstance(members, Members) for n in [members[j][0]]]
        new_name = rng.choice((spelled(rng, name), rng.choice(STRINGS), rng.choice(names), value(rng)))
        if how == 6:
            holder[i] = (new_name, old)
        else:
            holder.insert(rng.randrange(len(holder) + 1), (new_name, value(rng)))
        return
    holder[i] = (name, new) if isinstance(holder, Members) else new


def copy(node: Tree) -> Tree:
    """A tree of its own."""
    if isinstance(node, Members):
        return Members((name, copy(member)) for name, member in node)
    return [copy(item) for item in node] if isinstance(node, list) else node


def json_text(rng: Random, document: Any, most: int = 3) -> bytes:
    """A document as JSON, up to `most` changes made to its tree and perhaps some to its text."""
    root = tree(document)
    for _ in range(rng.randint(0, most)):
        mutate_tree(rng, root)
    spaced = chance(rng, 0.1)
    made = text(root, rng if spaced else None)
    if chance(rng, 0.1):
        made += rng.choice(TRAILING)
    if chance(rng, 0.05):
        made = rng.choice((b" ", b"\n", b"\xef\xbb\xbf", b"\xff\xfe", b"\x00")) + made
    return mutate_bytes(rng, made) if chance(rng, 0.2) else made


# ---- bytes ------------------------------------------------------------------------------------------------------------------

TOKENS = [b"0", b"1", b"-", b".", b"e9", b",", b":", b'"', b"{", b"}", b"[", b"]", b" ", b"\\", b"\\u", b"\x00", b"\xff", b"null"]


def mutate_bytes(rng: Random, data: bytes, tokens: Sequence[bytes] = TOKENS) -> bytes:
    """Bytes with one to three places changed: a bit, a byte, a piece taken out, doubled or moved, or a token put in."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(found) + 1)
        end = min(len(found), at + (rng.randint(0, 3) if chance(rng, 0.9) else rng.randint(0, 40)))
        how = rng.randrange(6)
        if how == 0 and at < len(found):
            found[at] ^= 1 << rng.randrange(8)
        elif how == 1 and at < len(found):
            found[at] = rng.randrange(256)
        elif how == 2:
            del found[at:end]
        elif how == 3:
            found[at:at] = found[at:end]
        elif how == 4:
            to = rng.randrange(len(found) + 1)
            found[to:to] = found[at:end]
        else:
            found[at : at + rng.randint(0, 1)] = rng.choice(tokens)
    return bytes(found)
