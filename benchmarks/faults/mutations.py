"""Ways to spoil files, each a function of a seeded `random.Random`: bytes, JSON, safetensors, journals, folders."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63), 10**400, 0.5, -0.0, 1e308, 5e-324, float("nan"), float("inf"),
    "", "x", "0", "é", "\ud800", "\x00", "\u2028", "..", "../../../etc/passwd", "/dev/zero", "x" * 5000, "a\nb\x1b[31m",
    [], {}, [None], [[]], {"": None}, [1, "2", None], {"image": 3}, [0] * 1000,
]  # fmt: skip
"""Values that a field of the right name may hold: wrong types, extremes, and text that a terminal or path minds."""

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 123\n"


AUTO_MAP = {
    name: "evil.Config" for name in ("AutoConfig", "AutoProcessor", "AutoTokenizer", "AutoModelForImageTextToText")
}
"""Names a module `evil.py` beside the config, which transformers runs if it is allowed to."""


class Bomb:
    """Unpickled, it leaves a file: the proof that something was executed."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return (
            (os.close, (os.open(self.canary, os.O_CREAT | os.O_WRONLY),)) if False else (open, (str(self.canary), "w"))
        )


def spoil(path: Path, draw: random.Random, canary: Path) -> str:
    """Change the file in one way that suits its kind, or in one that suits any; returns what was done."""
    ways: list[Callable[[Path, random.Random], None]] = [_bytes, _bytes, _whole]
    if path.suffix == ".json":
        ways += [_json] * 6 + [_text]
    elif path.suffix == ".jsonl":
        ways += [_lines] * 6 + [_text]
    elif path.suffix == ".safetensors":
        ways += [_tensors] * 5
    elif path.suffix == ".sqlite":
        ways += [_records] * 5
    way = draw.choice(ways)
    if draw.random() < 0.03:
        if draw.random() < 0.5:
            path.write_bytes(pickle.dumps(Bomb(canary)))
        else:
            torch.save(Bomb(canary), path)
        return "pickle"
    if path.name == "config.json" and draw.random() < 0.1:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model": str(path.parent), "auto_map": AUTO_MAP}))
        return "auto_map"
    way(path, draw)
    return way.__name__.strip("_")


def _bytes(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(draw.choice((1, 1, 2, 8))):
        at, size = draw.randrange(len(data) + 1), draw.choice((1, 2, 4, 64))
        match draw.randrange(6):
            case 0 if at < len(data):
                data[at] ^= 1 << draw.randrange(8)
            case 1:
                data[at : at + size] = draw.randbytes(size)
            case 2:
                del data[at:]
            case 3:
                del data[at : at + size]
            case 4:
                data[at:at] = data[at : at + size]
            case _:
                data[at : at + size] = bytes(size)
    path.write_bytes(data)


def _whole(path: Path, draw: random.Random) -> None:
    """The file is missing, is something else, or has other content altogether."""
    data = path.read_bytes()
    path.unlink()
    match draw.randrange(11):
        case 0:
            pass
        case 1:
            path.mkdir()
        case 2:
            os.mkfifo(path)
        case 3:
            path.symlink_to("/dev/zero")
        case 4:
            path.symlink_to(path.name)
        case 5:
            path.write_bytes(b"")
        case 6:
            path.write_text(POINTER)
        case 7:
            with path.open("wb") as file:  # sparse: costs no disk, but reading it whole would cost memory
                file.truncate(3 * 2**30)
        case 8:
            path.write_bytes(draw.randbytes(draw.choice((1, 8, 100, 10_000))))
        case 9:
            path.write_bytes(b"\xef\xbb\xbf" + data)
        case _:
            path.write_bytes(data.decode("utf-8", "replace").encode("utf-16"))


def _text(path: Path, draw: random.Random) -> None:
    """Valid or not, but unusual as text: nesting, line ends, repeated keys."""
    text = path.read_text()
    deep = draw.choice((10, 1000, 100_000))
    path.write_text(
        draw.choice((
            "[" * deep + "]" * deep, '{"a":' * deep + "1" + "}" * deep, text.replace("\n", "\r\n"), text + "\n\n",
            text.replace("\n", "\n\n"), text.rstrip(), text.replace(" ", "\u2028", 1), text.replace(" ", "\u0085", 1),
            text + text, " " * 3000 + text, text.replace(":", ": " + "9" * 5000, 1), "\ufeff" + text,
        )),
        encoding="utf-8",
    )  # fmt: skip


def _json(path: Path, draw: random.Random) -> None:
    path.write_text(json.dumps(changed(json.loads(path.read_text()), draw)))


def _lines(path: Path, draw: random.Random) -> None:
    lines = path.read_text().splitlines()
    at = draw.randrange(len(lines))
    match draw.randrange(8):
        case 0:
            lines.insert(draw.randrange(len(lines) + 1), lines[at])
        case 1:
            del lines[at]
        case 2:
            draw.shuffle(lines)
        case 3:
            lines[at] = json.dumps(draw.choice(ODD))
        case _:
            lines[at] = json.dumps(changed(json.loads(lines[at]), draw), ensure_ascii=draw.random() < 0.5)
    path.write_bytes("".join(line + "\n" for line in lines).encode("utf-8", "surrogatepass"))


def changed(value: Any, draw: random.Random) -> Any:
    """The value with one place in it changed: another value, a key gone, renamed or new, an element twice."""
    places = list(_places(value, ()))
    for _ in range(draw.choice((1, 1, 1, 3))):
        where = draw.choice(places)
        value = _changed_at(value, where, draw)
        places = list(_places(value, ()))
    return value


def _places(value: Any, at: tuple[Any, ...]) -> Any:
    yield at
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in list(inside)[:50]:
        yield from _places(part, (*at, key))


def _changed_at(value: Any, at: tuple[Any, ...], draw: random.Random) -> Any:
    if at:
        value[at[0]] = _changed_at(value[at[0]], at[1:], draw)
        return value
    if isinstance(value, dict) and value and draw.random() < 0.6:
        key = draw.choice(list(value))
        match draw.randrange(3):
            case 0:
                del value[key]
            case 1:
                value[key + draw.choice(("_", " ", "\x00"))] = value.pop(key)
            case _:
                value[draw.choice(("auto_map", "__class__", "x", ""))] = draw.choice(ODD)
        return value
    if isinstance(value, list) and value and draw.random() < 0.6:
        return draw.choice((value + value[-1:], value[:-1], value[::-1], value * 50))
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300 and draw.random() < 0.5:
        return draw.choice((value + 1, -value, value * 1000, float(value), str(value), value / 3))
    return json.loads(json.dumps(draw.choice(ODD)))


def _tensors(path: Path, draw: random.Random) -> None:
    """The header's length, the header itself, or the numbers behind it."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, numbers = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    match draw.randrange(5):
        case 0:
            size = draw.choice((0, 1, length - 1, length + 1, len(data), 100 * 2**30, 2**63, 2**64 - 1))
            path.write_bytes(size.to_bytes(8, "little") + data[8:])
            return
        case 1 if len(numbers) >= 4:
            at = 4 * draw.randrange(len(numbers) // 4)
            numbers[at : at + 4] = draw.choice(
                (b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\x7f\x7f", bytes(4))
            )
        case 2:
            name = draw.choice(list(header))
            tensor = header[name]
            if "dtype" in tensor:
                tensor["dtype"] = draw.choice(("F16", "BF16", "F64", "I64", "U8", "BOOL", "F8_E4M3", "C64", "Q4", ""))
            if draw.random() < 0.5 and "shape" in tensor:
                tensor["shape"] = draw.choice(
                    ([], [0], [0, 0], tensor["shape"][::-1], [1, *tensor["shape"]], [2**40, 2**40])
                )
        case 3:
            name = draw.choice(list(header))
            header[draw.choice(("other", "", "../x", "a.index", "x" * 300))] = header.pop(name)
        case _:
            header = changed(header, draw)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + numbers)


def _records(path: Path, draw: random.Random) -> None:
    """A row of a journal's database, or its tables."""
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        rows = database.execute("SELECT rowid, key, value FROM records").fetchall()
        row, key, value = draw.choice(rows)
        odd = draw.choice((None, 1, 0.5, b"", b"\xff", pickle.dumps({"value": 1}), "[" * 100_000, json.dumps(key)))
        match draw.randrange(6):
            case 0:
                database.execute("DELETE FROM records WHERE rowid = ?", (row,))
            case 1:
                database.execute("UPDATE records SET key = ? WHERE rowid = ?", (odd, row))
            case 2:
                database.execute("UPDATE records SET value = ? WHERE rowid = ?", (odd, row))
            case 3:
                table = draw.choice(("x", "unnamed"))
                database.execute(f"CREATE {draw.choice(('TABLE', 'VIEW'))} {table} AS SELECT * FROM records")
            case _:
                text = json.dumps(changed(json.loads(value), draw))
                database.execute("UPDATE records SET value = ? WHERE rowid = ?", (text, row))


def copied(source: Path, target: Path) -> Path:
    """A fresh copy of a file or folder."""
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True)
    else:
        shutil.copyfile(source, target)
    return target
