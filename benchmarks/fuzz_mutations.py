"""Hostile inputs made of good ones: JSON, texts and bytes, changed by a seeded generator."""

from __future__ import annotations

import json
from random import Random
from typing import Any

# Put into JSON as they are, in the place of any value.
RAW_VALUES = (
    *(
        "null",
        "true",
        "false",
        "0",
        "-1",
        "1",
        "2",
        "3",
        "7",
        "64",
        "1000000000",
        "-1000000000",
        "0.5",
        "1e999",
        "-1e999",
    ),
    *(
        "NaN",
        "Infinity",
        "1e-400",
        "9223372036854775807",
        "9223372036854775808",
        "1" + "0" * 40,
        "9" * 5000,
        "01",
        "1.",
        "+1",
    ),
    *(
        '""',
        '"a"',
        '"\\u0000"',
        '"\\ud800"',
        '"\\n"',
        '"../../etc/passwd"',
        '"nan"',
        '"WanModel"',
        '"a\\\\"',
        '"\\"',
        "'a'",
    ),
    *(
        "[]",
        "{}",
        "[[]]",
        "[1]",
        "[1, 2, 2]",
        "[1, 1, 1, 1, 1, 1, 1, 1, 1]",
        "[0]",
        "[-1]",
        "[null]",
        "[1e9, 1e9]",
        '["a"]',
        "[{}]",
    ),
    *(
        '{"a": 1}',
        '{"a": 1, "a": 2}',
        "[true]",
        "[1.5]",
        "[false, true, true]",
        "[1, 2, 4, 4]",
        "[4294967296, 4294967296]",
    ),
    *("[" * 40 + "]" * 40, "[" * 3000 + "]" * 3000, "[" * 200_000, '{"a":' * 3000 + "1" + "}" * 3000),
    *(
        '"' + "x" * 100_000 + '"',
        '"\\u00e4\\ud83d\\ude00' + "y" * 5000 + '"',
        "[" + "0," * 20_000 + "0]",
        "",
        ",",
        "}",
        "]",
    ),
)
TEXT_PIECES = (
    *(
        "0",
        "-1",
        "999999999",
        "9999999999",
        "1e999",
        "nan",
        "inf",
        ":",
        ": :",
        "->",
        "-",
        " - ",
        "s",
        "0-3",
        "4 cut",
        "cut",
        "||",
    ),
    *(
        " :0.7",
        " :nan",
        " :-1",
        ":1e308",
        "strength",
        "strength 0.5",
        "strength nan",
        "#",
        "\n",
        "\r\n",
        "\u2028",
        "\x00",
        "\x1b[31m",
    ),
    *(
        "\u0663",
        "\U0001f600",
        "\ud800",
        "\u202e",
        " " * 3000,
        "\t" * 200,
        "a" * 20_000,
        "0: a\n" * 3000,
        "=",
        "= drop",
        "= share",
    ),
    *(
        "= copy",
        "videos",
        "=" * 500,
        "1 " * 2000,
        "2.5s-4s: fog",
        "8->11: calm",
        "0.0000000001s",
        "%s",
        "{}",
        "\\",
        "'",
        '"',
    ),
)
_SENTINEL = "\x01raw\x01"
_NUMBERS = (0, 1, -1, 2, 3, 8, 127, 128, 1000, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**18, 10**30)


def change_bytes(random: Random, content: bytes) -> bytes:
    """`content` with some bytes flipped, inserted, deleted, doubled or cut off."""
    changed = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 4, 16))):
        place = random.randrange(len(changed) + 1)
        what = random.randrange(6)
        if what == 0 and changed:
            changed[min(place, len(changed) - 1)] = random.randrange(256)
        elif what == 1:
            changed[place:place] = random.randbytes(random.choice((1, 2, 8, 100)))
        elif what == 2:
            del changed[place : place + random.choice((1, 2, 8, 100))]
        elif what == 3:
            changed[place:place] = changed[place : place + random.choice((1, 8, 64))]
        elif what == 4:
            del changed[place:]
        elif changed:
            changed[min(place, len(changed) - 1)] ^= 1 << random.randrange(8)
    return bytes(changed)


def change_text(random: Random, text: str) -> str:
    """`text` with pieces of it moved, and with others that such texts may have put in."""
    for _ in range(random.choice((1, 1, 2, 3, 6))):
        start, end = sorted(random.randrange(len(text) + 1) for _ in range(2))
        what = random.randrange(5)
        if what == 0:
            text = text[:start] + text[min(end, start + 20) :]
        elif what == 1:
            text = text[:end] + text[start:end][:200] + text[end:]
        elif what == 2:
            lines = text.split("\n")
            random.shuffle(lines)
            text = "\n".join(lines)
        else:
            text = text[:start] + random.choice(TEXT_PIECES) + text[start:]
    return text


def change_json(random: Random, value: Any) -> str:  # noqa: ANN401
    """JSON text of `value` with some values replaced, removed, renamed, doubled, wrapped, moved or made huge."""
    tree = json.loads(json.dumps(value))
    raws: list[str] = []
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        places = list(_places(tree))
        if not places:
            break
        container, key = random.choice(places)
        _change_one(random, container, key, tree, raws)
    text = json.dumps(tree)
    for raw in raws:
        text = text.replace(json.dumps(_SENTINEL), raw, 1)
    return text


def _places(tree: Any) -> Any:  # noqa: ANN401
    """Each container in a tree with each of its keys or indexes."""
    waiting = [tree]
    while waiting:
        container = waiting.pop()
        keys = list(container) if isinstance(container, dict) else range(len(container))
        for key in keys:
            yield container, key
            if isinstance(container[key], (dict, list)):
                waiting.append(container[key])


def _change_one(random: Random, container: Any, key: Any, tree: Any, raws: list[str]) -> None:  # noqa: ANN401
    value = container[key]
    what = random.randrange(8)
    if what == 0:
        del container[key]
    elif what == 1 and isinstance(container, dict):
        container[
            random.choice((str(key) + "x", "", "a" * 600, "\x00", "\u202e", str(key).upper(), _next_number(str(key))))
        ] = container.pop(key)
    elif what == 2:
        other, place = random.choice(list(_places(tree)))
        if not isinstance(other[place], (dict, list)):
            container[key] = other[place]
    elif what == 3 and type(value) is int:
        container[key] = random.choice(
            (value + 1, value - 1, -value, value * 2, value * 10**9, float(value), str(value), True)
        )
    elif what == 4 and type(value) is int:
        container[key] = random.choice(_NUMBERS)
    elif what == 5:
        container[key] = random.choice(([value], {"a": value}, str(value)))
    elif what == 6 and isinstance(value, list):
        container[key] = random.choice((value * 2, value[:-1], value[::-1], [*value, 1], [*value, *value, *value]))
    else:
        container[key] = _SENTINEL
        raws.append(random.choice(RAW_VALUES))


def _next_number(name: str) -> str:
    return "".join(str((int(letter) + 1) % 10) if letter in "0123456789" else letter for letter in name)
