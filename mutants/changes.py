"""The faults to put into a file: those of mutmut's operators, and removed statements.

mutmut itself can't run here. It keeps all mutants of a function in one file and switches between
them. That changes things which this package's tests check: names, signatures, imports, and programs
in other processes. Also, it can't draw a sample or remove statements.
"""

import difflib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import libcst as cst
import libcst.matchers as m
from mutmut.mutation import mutators

#: Imports, and code that is only for type checkers or names of types.
_LEFT_OUT = (
    m.Annotation()
    | m.Subscript(m.Name("Literal"))
    | m.Call(m.Name("TypeVar") | m.Name("cast"))
    | m.Assign(value=m.BinaryOperation(operator=m.BitOr()))  # an alias, such as str | None
    | m.If(m.Name("TYPE_CHECKING"))
    | m.Arg(keyword=m.Name("slots"))  # slots only save memory
    | m.ConcatenatedString()  # a message of several lines
    | m.Assert()
    | m.Import()
    | m.ImportFrom()
)

#: Assignments to names and yields stay, because any test would notice their absence.
_REMOVABLE = (
    m.Expr(m.Call() | m.Await())
    | m.AugAssign()
    | m.Assign(targets=[m.AssignTarget(m.Attribute() | m.Subscript())])
    | m.Return()
    | m.Raise()
    | m.Del()
)


def _removed(line: cst.SimpleStatementLine) -> Iterator[cst.CSTNode]:
    if m.matches(line, m.SimpleStatementLine(body=[_REMOVABLE])):
        yield line.with_changes(body=[cst.Pass()])


def _other_name(text: cst.SimpleString) -> Iterator[cst.CSTNode]:
    # Headers, options and paths only. A text with a space or a % is a message: its wording is free.
    if not {" ", "%"} & set(text.raw_value):
        yield from islice(mutators.operator_string(text), 1)


def _never_entered(loop: Any) -> Iterator[cst.CSTNode]:  # both a while and an IfExp have a test
    yield from islice(mutators.operator_if_exp(loop), 1)


_OPERATORS: tuple[tuple[type | tuple[type, ...], Callable[[Any], Iterable[cst.CSTNode]]], ...] = (
    (cst.CSTNode, mutators.operator_swap_op),  # + becomes -, < becomes <=, and becomes or
    (cst.CSTNode, mutators.operator_keywords),  # in becomes not in, continue becomes break
    (cst.UnaryOperation, mutators.operator_remove_unary_ops),  # not x becomes x
    (cst.BaseNumber, mutators.operator_number),  # 1 becomes 2
    (cst.Name, mutators.operator_name),  # True becomes False
    (cst.SimpleString, _other_name),
    ((cst.If, cst.IfExp, cst.CompIf), mutators.operator_if_exp),  # always one branch
    (cst.While, _never_entered),
    (cst.SimpleStatementLine, _removed),
)


@dataclass(frozen=True, slots=True)
class Mutant:
    """A file with one fault."""

    file: str
    """The path below the root of the repository."""
    before: str
    after: str

    @property
    def diff(self) -> str:
        """The fault as a unified diff, without context."""
        names = f"a/{self.file}", f"b/{self.file}"
        before, after = (text.splitlines(keepends=True) for text in (self.before, self.after))
        return "".join(difflib.unified_diff(before, after, *names, n=0))

    @property
    def line(self) -> int:
        """The number of the first line that differs."""
        pairs = zip(self.before.splitlines(), self.after.splitlines(), strict=False)
        return next(number for number, (old, new) in enumerate(pairs, 1) if old != new)


class Faults:
    """All faults that a file can have; ``faults[n]`` is the mutant with one of them."""

    def __init__(self, file: str, text: str) -> None:
        self._file, self._module = file, cst.parse_module(text)
        self._found = list(_faults(self._module))

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, number: int) -> Mutant:
        old, new = self._found[number]
        mutated = self._module.deep_replace(old, new)
        assert isinstance(mutated, cst.Module)  # noqa: S101 - still a module
        return Mutant(self._file, self._module.code, mutated.code)


def _faults(node: cst.CSTNode) -> Iterator[tuple[cst.CSTNode, cst.CSTNode]]:
    if m.matches(node, _LEFT_OUT):
        return
    for types, operator in _OPERATORS:
        if isinstance(node, types):
            yield from ((node, changed) for changed in operator(node))
    for child in node.children:
        yield from _faults(child)
