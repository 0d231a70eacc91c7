"""Which decisions of the model's code are mere checks: with another answer the code raises, or only reports.

Read from the source, by the line and the place in it where a frame asks for a truth value.
"""

from __future__ import annotations

import ast
import functools
import itertools
import linecache
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, NamedTuple

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
_REPORTS = {"print", "warn", "warning", "debug", "info", "error", "exception", "critical", "log"}


class Answer(NamedTuple):
    """A value with which the code goes on, and whether it raises otherwise."""

    value: Any
    raises: bool


@functools.lru_cache(maxsize=64)
def _nodes(file: str) -> tuple[ast.AST, ...]:
    """The syntax of a file; none where its source is not there."""
    try:
        return tuple(ast.walk(ast.parse("".join(linecache.getlines(file)))))
    except SyntaxError:
        return ()


@functools.lru_cache(maxsize=64)
def _statements(file: str) -> tuple[ast.stmt, ...]:
    """Checks and branches of a file."""
    return tuple(node for node in _nodes(file) if isinstance(node, (ast.Assert, ast.If, ast.Expr)))


def raises_otherwise(file: str, line: int, outcome: bool) -> bool:
    """Whether a line only checks: with another outcome of its condition the code raises."""
    for node in _statements(file):
        if isinstance(node, ast.If):
            other = node.orelse if outcome else node.body
            if _spans(node.test, line) and other and isinstance(other[-1], ast.Raise):
                return True
        elif _spans(node, line) and (isinstance(node, ast.Assert) or {"assert", "check"} & _words(node)):
            return True
    return False


@functools.cache
def catches(file: str, line: int, error: str) -> bool:
    """Whether a line is in a `try` that handles this error, by its name."""
    tries = (node for node in _nodes(file) if isinstance(node, ast.Try))
    handlers = (h for node in tries if any(_spans(part, line) for part in node.body) for h in node.handlers)
    return any(isinstance(n, ast.Name) and n.id == error for h in handlers if h.type for n in ast.walk(h.type))


@functools.cache
def kept_between_calls(file: str, line: int) -> bool:
    """Whether a line reads an attribute that a method of the same file sets, other than `__init__`."""
    read = {node.attr for node in _nodes(file) if isinstance(node, ast.Attribute) and _spans(node, line)}
    methods = (node for node in _nodes(file) if isinstance(node, ast.FunctionDef) and node.name != "__init__")
    parts = (part for method in methods for part in ast.walk(method) if isinstance(part, ast.Attribute))
    return any(part.attr in read and isinstance(part.ctx, ast.Store) for part in parts)


def only_called(file: str, name: str) -> bool:
    """Whether the functions of a file do no more with a name than to call it, unlike `type(n) is int`."""
    return bool(_nodes(file)) and name not in _names_not_called(file)


@functools.cache
def _names_not_called(file: str) -> set[str]:
    bodies = [body for node in _nodes(file) if isinstance(node, _FUNCTIONS) for body in _body(node)]
    used = {part for body in bodies for part in ast.walk(body)}
    called: set[ast.AST] = set()
    for node in used:
        if isinstance(node, ast.Call):
            called.add(node.func)
            function = getattr(node.func, "id", "")
            called.update(node.args[:1] if function == "map" else ())
            called.update(ast.walk(node.args[1]) if function == "isinstance" and len(node.args) == 2 else ())
        annotation = getattr(node, "annotation", None)
        called.update(ast.walk(annotation) if isinstance(annotation, ast.AST) else ())
    return {node.id for node in used - called if isinstance(node, ast.Name)}


def _body(function: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> Sequence[ast.AST]:
    return [function.body] if isinstance(function, ast.Lambda) else function.body


def unused_answer(frame: FrameType, convert: Callable[[Any], Any]) -> Answer | None:
    """Returns an answer to what a frame asks for on which no result depends; None where one does.

    A check gets the truth value with which the code goes on, a message or a log any number.
    """
    if convert in (int, float):
        return Answer(convert("nan" if convert is float else 0), False) if _only_shows(frame) else None
    return _check_at(frame) if convert is bool else None


def _check_at(frame: FrameType) -> Answer | None:
    for node in _statements(frame.f_code.co_filename):
        test, answer, raises = _condition(node)
        if test is None or not _spans(test, frame.f_lineno):
            continue
        parts = list(_parts(test, answer))
        here = _asked_at(frame)
        answers = {a for part, a in parts if here and _range(part) <= here[0] and here[1] <= _range(part, end=True)}
        answers = answers or {a for _, a in parts}
        if len(answers) == 1:
            return Answer(answers.pop(), raises)
    return None


def _only_shows(frame: FrameType) -> bool:
    """Whether the number that a frame asks for goes into a text, a log, or an attribute that its file does not read."""
    if frame.f_globals.get("__name__") == "logging":
        return True
    nodes = _nodes(frame.f_code.co_filename)
    for node in nodes:
        if not isinstance(node, (ast.BinOp, ast.Assign, ast.Expr)) or not _spans(node, frame.f_lineno):
            continue
        if isinstance(node, ast.Expr) and _words(node) & _REPORTS:
            return True
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod) and isinstance(node.left, ast.Constant):
            return isinstance(node.left.value, str)
        if isinstance(node, ast.Assign) and isinstance(node.value, (ast.Call, ast.Dict, ast.List, ast.Tuple)):
            names = {t.attr if isinstance(t, ast.Attribute) else None for t in node.targets}
            called = {n.func for n in nodes if isinstance(n, ast.Call)}
            attributes = (n for n in nodes if isinstance(n, ast.Attribute) and n not in called)
            read = {n.attr for n in attributes if isinstance(n.ctx, ast.Load)}
            number = not isinstance(node.value, ast.Call) or getattr(node.value.func, "id", "") in ("float", "int")
            return number and not names & {None, *read}
    return False


def _condition(node: ast.stmt) -> tuple[ast.expr | None, bool, bool]:
    """Returns the condition that a statement checks, the value with which the code goes on, and whether it raises."""
    if isinstance(node, ast.Assert):
        return node.test, True, True
    if isinstance(node, ast.If):
        for body, answer in ((node.body, False), (node.orelse, True)):
            if body and isinstance(body[-1], ast.Raise):
                return node.test, answer, True
        if not node.orelse and all(isinstance(s, ast.Pass) or _words(s) & _REPORTS for s in node.body):
            return node.test, False, False
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and "assert" in _words(node):
        return next(iter(node.value.args), None), True, True
    return None, True, True


def _parts(test: ast.expr, answer: bool) -> Iterator[tuple[ast.expr, bool]]:
    """The conditions of which one is made, and the answers with which it has the given one."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        yield from _parts(test.operand, not answer)
    elif isinstance(test, ast.BoolOp):
        for part in test.values:
            yield from _parts(part, answer)
    else:
        yield test, answer


def _asked_at(frame: FrameType) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Line and column of start and end of what a frame has evaluated last; Python 3.10 does not know them."""
    positions: Any = getattr(frame.f_code, "co_positions", tuple)()
    before = frame.f_lasti // 2 - 1  # a jump itself belongs to the whole statement
    line, end_line, column, end_column = next(itertools.islice(positions, before, None), (None,) * 4)
    if line is None or end_line is None or column is None or end_column is None:
        return None
    return (line, column), (end_line, end_column)


def _range(node: ast.expr, end: bool = False) -> tuple[int, int]:
    return (node.end_lineno or 0, node.end_col_offset or 0) if end else (node.lineno, node.col_offset)


def _spans(node: ast.stmt | ast.expr, line: int) -> bool:
    return node.lineno <= line <= (node.end_lineno or 0)


def _words(node: ast.stmt) -> set[str]:
    """The words in the name of the function that a statement calls."""
    called = getattr(getattr(node, "value", None), "func", None)
    name = str(getattr(called, "id", getattr(called, "attr", "")))
    return {name, *(word for word in ("assert", "check") if word in name)}
