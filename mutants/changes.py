"""The faults that are put into a file: mutmut's operators, and statements that are removed.

mutmut itself can't run here. It keeps all mutants of a function in one file and switches between
them, which changes what the tests of this package look at: names, signatures, imports, and
programs that run in processes of their own. It has neither a sample nor removed statements.
"""

import difflib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import libcst as cst
import libcst.matchers as m
from mutmut.mutation import mutators

#: Imports, what holds names of types only, and what tells a type checker something.
_LEFT_OUT = (
    m.Annotation()
    | m.Subscript(m.Name("Literal"))
    | m.Call(m.Name("TypeVar") | m.Name("cast"))
    | m.Assign(value=m.BinaryOperation(operator=m.BitOr()))  # an alias, such as str | None
    | m.If(m.Name("TYPE_CHECKING"))
    | m.Arg(keyword=m.Name("slots"))  # of a dataclass: it saves memory, and does no more
    | m.ConcatenatedString()  # a message of several lines
    | m.Assert()
    | m.Import()
    | m.ImportFrom()
)

#: Assignments to names and yields stay: without them nothing runs, which any test notices.
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
    # A header, an option, a path. What has spaces or a % is a message, which may be worded anew.
    if not {" ", "%"} & set(text.raw_value):
        yield from islice(mutators.operator_string(text), 1)


def _never_entered(loop: Any) -> Iterator[cst.CSTNode]:  # treated as an IfExp: both have a test
    yield from islice(mutators.operator_if_exp(loop), 1)


_OPERATORS: tuple[tuple[type | tuple[type, ...], Callable[[Any], Iterable[cst.CSTNode]]], ...] = (
    (cst.CSTNode, mutators.operator_swap_op),  # + is -, < is <=, and is or
    (cst.CSTNode, mutators.operator_keywords),  # in is not in, continue is break
    (cst.UnaryOperation, mutators.operator_remove_unary_ops),  # not x is x
    (cst.BaseNumber, mutators.operator_number),  # one more
    (cst.Name, mutators.operator_name),  # True is False
    (cst.SimpleString, _other_name),
    ((cst.If, cst.IfExp, cst.CompIf), mutators.operator_if_exp),  # each branch in all cases
    (cst.While, _never_entered),
    (cst.SimpleStatementLine, _removed),
)


@dataclass(frozen=True, slots=True)
class Mutant:
    """A file with one fault."""

    file: str
    """Its path below the root of the repository."""
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
    """All the faults that a file can have; ``faults[n]`` is the mutant with one of them."""

    def __init__(self, file: str, text: str) -> None:
        self._file, self._module = file, cst.parse_module(text)
        self._found = list(_faults(self._module))

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, number: int) -> Mutant:
        old, new = self._found[number]
        mutated = self._module.deep_replace(old, new)
        assert isinstance(mutated, cst.Module)  # noqa: S101 - what is replaced is in it
        return Mutant(self._file, self._module.code, mutated.code)


def _faults(node: cst.CSTNode) -> Iterator[tuple[cst.CSTNode, cst.CSTNode]]:
    if m.matches(node, _LEFT_OUT):
        return
    for types, operator in _OPERATORS:
        if isinstance(node, types):
            yield from ((node, changed) for changed in operator(node))
    for child in node.children:
        yield from _faults(child)
