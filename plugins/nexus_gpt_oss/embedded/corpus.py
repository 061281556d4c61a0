"""What every Python installation holds to learn from: its documentation as prose, its standard library as code.

Prose and code are split into a training and a held-out part by what the text is about (a language topic, a module or
package, a built-in type), so a held-out module is new in both; a held-out text that repeats much of the training part
is left out all the same.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

SKIPPED_FOLDERS = {"test", "tests", "site-packages", "__pycache__", "pydoc_data"}
# Documented, but as source text they are tools, tables made by programs or jokes.
SKIPPED_CODE = {
    *("lib2to3", "idlelib", "ensurepip", "turtledemo", "distutils", "encodings"),
    *("keyword", "token", "stringprep", "this"),
}
COMPILED_MODULES = """
    array binascii builtins cmath itertools math select sys time unicodedata zlib _bisect _bz2 _codecs _collections
    _csv _datetime _decimal _functools _hashlib _heapq _io _json _lzma _operator _pickle _random _socket _sqlite3
    _sre _ssl _struct _thread _weakref atexit fcntl gc grp marshal mmap posix pwd resource signal
""".split()  # noqa: SIM905

SHORTEST_DOCSTRING = 60
SHORTEST_PIECE = 200
PIECE_CHARACTERS = (500, 3000)
HELD_OUT_SHARE = 0.15
SHINGLE_WORDS = 8
MAX_REPEATED_SHARE = 0.15


@dataclass(frozen=True)
class Text:
    """One piece of text; `group` names the topic, package or type it belongs to, `title` what it begins with."""

    group: str
    title: str
    text: str


@dataclass(frozen=True)
class Split:
    """The training and the held-out part of one source."""

    train: tuple[Text, ...]
    held_out: tuple[Text, ...]


def prose() -> Split:
    """Language topics and docstrings of the running Python, longest shared texts once."""
    return split(_once([*_topics(), *_docstrings(), *_compiled_docstrings()]))


def code() -> Split:
    """Source of the standard library without its docstrings (those are prose), in pieces of whole statements."""
    return split(_once(list(_sources())))


def split(texts: list[Text]) -> Split:
    """Training and held-out part by group; held-out texts are 500-3000 characters long and new to the training part.

    What is a tool rather than a library (an IDE's docstrings are a quarter of the held-out ones) is in neither part if
    its turn is to be held out.
    """
    train = tuple(text for text in texts if not _is_held_out(text.group))
    known = {shingle for text in train for shingle in _shingles(text.text)}
    shortest, longest = PIECE_CHARACTERS
    held_out = tuple(
        text
        for text in texts
        if _is_held_out(text.group)
        and text.group not in SKIPPED_CODE
        and shortest <= len(text.text) <= longest
        and repeated_share(text.text, known) <= MAX_REPEATED_SHARE
    )
    return Split(train, held_out)


def repeated_share(text: str, known: set[int]) -> float:
    """Share of the text's runs of eight words that are in `known`."""
    shingles = _shingles(text)
    return len(shingles & known) / max(1, len(shingles))


def _shingles(text: str) -> set[int]:
    words = re.findall(r"\w+", text.lower())
    return {
        int.from_bytes(hashlib.blake2b(" ".join(words[i : i + SHINGLE_WORDS]).encode(), digest_size=8).digest(), "big")
        for i in range(max(1, len(words) - SHINGLE_WORDS + 1))
    }


def _is_held_out(group: str) -> bool:
    digest = hashlib.sha256(group.encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


def _once(texts: list[Text]) -> list[Text]:
    """The texts without those whose words came before (inherited docstrings, twins such as posixpath and ntpath)."""
    seen: set[str] = set()
    kept = []
    for text in texts:
        key = " ".join(text.text.split())
        if key not in seen:
            seen.add(key)
            kept.append(text)
    return kept


def _topics() -> Iterator[Text]:
    from pydoc_data.topics import topics

    seen: set[str] = set()
    for title, text in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
        # Short topics repeat sections of long ones: a paragraph stays with the longest topic that has it.
        paragraphs = [part for part in text.strip().split("\n\n") if part.strip() and part not in seen]
        seen.update(part for part in paragraphs if len(part) > 60)
        for piece in pieces(paragraphs, "\n\n"):
            if len(piece) >= SHORTEST_PIECE:
                yield Text(f"topic {title}", title, piece)


def _docstrings() -> Iterator[Text]:
    for module, path in _library_files():
        docstrings = (
            (title, ast.get_docstring(documented, clean=True) or "")
            for title, documented in _documented(module, _tree(path))
        )
        yield from _documentation(_group(module), docstrings)


def _documented(
    title: str, node: ast.AST
) -> Iterator[tuple[str, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield title, node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _documented(f"{title}.{child.name}", child)
        elif isinstance(child, ast.If | ast.Try):
            yield from _documented(title, child)


def _compiled_docstrings() -> Iterator[Text]:
    for name in COMPILED_MODULES:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        yield from _documentation(_group(name), [(name, inspect.getdoc(module) or "")])
        for member_name, member in sorted(vars(module).items()):
            if not (inspect.isroutine(member) or inspect.isclass(member)):
                continue
            title = member_name if name == "builtins" else f"{name.removeprefix('_')}.{member_name}"
            named = [(title, member)]
            if inspect.isclass(member):
                named += [(f"{title}.{key}", value) for key, value in sorted(vars(member).items()) if key[0] != "_"]
            group = f"builtins {member_name}" if name == "builtins" else _group(name)
            yield from _documentation(group, ((title, inspect.getdoc(value) or "") for title, value in named))


def _documentation(group: str, docstrings: Iterable[tuple[str, str]]) -> Iterator[Text]:
    """The docstrings under their names, neighbours joined, as `help()` would show them one after the other."""
    seen: set[str] = set()
    entries = []
    for title, docstring in docstrings:
        if len(docstring) >= SHORTEST_DOCSTRING and docstring not in seen:
            seen.add(docstring)
            entries.append(f"{title}\n\n{docstring.strip()}")
    for piece in pieces(entries, "\n\n\n"):
        if len(piece) >= SHORTEST_PIECE:
            yield Text(group, piece.split("\n", 1)[0], piece)


def _group(module: str) -> str:
    """The package a module belongs to; an accelerator such as _json belongs to json."""
    return module.removeprefix("_").split(".")[0]


def _sources() -> Iterator[Text]:
    for module, path in _library_files():
        if not SKIPPED_CODE & set(module.split(".")) and not module.startswith("_sysconfigdata"):
            # Blank lines before an unindented line end a statement of the module: pieces are made of such blocks.
            blocks = re.split(r"\n\n+(?=\S)", _without_docstrings(path).strip("\n"))
            for piece in pieces([part for block in blocks for part in _parts_of(block)], "\n\n"):
                if len(piece) >= SHORTEST_PIECE:
                    yield Text(_group(module), module, piece)


def _parts_of(block: str) -> list[str]:
    """The block itself, or its methods where it is longer than a piece may be."""
    return [block] if len(block) <= PIECE_CHARACTERS[1] else re.split(r"\n\n+(?=    \S)", block)


def _without_docstrings(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="strict").splitlines()
    for _, documented in _documented("", _tree(path)):
        first = documented.body[0] if documented.body else None
        is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
        # The only statement of a body has to stay, or what is left would be no Python.
        if first is not None and is_docstring and (len(documented.body) > 1 or isinstance(documented, ast.Module)):
            for line in range(first.lineno - 1, first.end_lineno or first.lineno):
                lines[line] = "\0"
    return "\n".join(line.rstrip() for line in lines if line != "\0")


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _library_files() -> Iterator[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if not any(part in SKIPPED_FOLDERS or part.startswith("config-") for part in inside.parts):
            yield ".".join(inside.with_suffix("").parts).removesuffix(".__init__"), path


def pieces(parts: Iterable[str], joint: str) -> Iterator[str]:
    """Neighbouring parts joined up to 3000 characters; a longer part alone is cut at the end of a line."""
    longest = PIECE_CHARACTERS[1]
    piece = ""
    for part in parts:
        if piece and len(piece) + len(joint) + len(part) > longest:
            yield piece
            piece = ""
        piece = f"{piece}{joint}{part}" if piece else part
        while len(piece) > longest:
            cut = piece.rfind("\n", 0, longest)
            cut = cut if cut > 0 else longest
            yield piece[:cut]
            piece = piece[cut:].lstrip("\n")
    if piece:
        yield piece
