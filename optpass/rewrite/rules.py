"""Rules: pattern → replacement, with a check that declines for a stated reason."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

from torch import Tensor
from torch.fx import Node

from optpass.errors import OptpassError
from optpass.ir.graph import Graph, path_of
from optpass.ir.program import Program
from optpass.ir.sizes import sizes_of
from optpass.pipeline.passes import Context
from optpass.rewrite.pattern import Match, Pattern

GROWTH = 20
"""Rewrites per node of the original graph after which the rules are taken to undo each other."""


class Rule(ABC):
    """One rewrite. Subclass and write three methods, of which the check has a default.

    >>> class TimesOne(Rule):
    ...     def pattern(self, x):
    ...         return aten.mul.Tensor(x, 1)
    ...
    ...     def rewrite(self, graph, match):
    ...         return match["x"]
    """

    @abstractmethod
    def pattern(self, *wildcards: Any) -> Any:
        """The expression to find, over ATen operators; parameters are wildcards."""

    def patterns(self) -> Sequence[Callable[..., Any]]:
        """Several spellings of one thing, with the same parameters; by default :meth:`pattern` alone."""
        return (self.pattern,)

    def concerns(self, match: Match) -> bool:
        """Whether this place is the rule's business at all; where it is not, nothing is reported."""
        return True

    def check(self, match: Match) -> str | None:
        """Why this place is left alone, for the report; ``None`` to rewrite it."""
        return None

    @abstractmethod
    def rewrite(self, graph: Graph, match: Match) -> Node:
        """The value to put in place of ``match.root``, of its shape and dtype.

        New nodes come from ``graph.call(operator, …, like=match.root)`` and stand in front of the root.
        """

    @cached_property
    def compiled(self) -> tuple[Pattern, ...]:
        """The traced patterns."""
        return tuple(map(Pattern, self.patterns()))

    @property
    def name(self) -> str:
        return type(self).__name__


def apply_rules(program: Program, rules: Sequence[Rule], context: Context | None = None) -> int:
    """Rewrite every entry in place until no rule applies; the number of rewrites.

    Every rewritten root and every refusal is reported to ``context``. Linear in the nodes: a rule is
    tried only where its last operator stands, and again only around what changed. Leaves no dead code.

    Raises:
        OptpassError: a replacement has another shape or dtype, or the rules never come to an end.
    """
    return sum(_Sweep(graph, rules, context, entry).run() for entry, graph in program.entries.items())


class _Sweep:
    """One graph and its work list."""

    def __init__(self, graph: Graph, rules: Sequence[Rule], context: Context | None, entry: str) -> None:
        self.graph, self.context, self.entry = graph, context, entry
        self.by_root: dict[Any, list[tuple[Rule, Pattern]]] = defaultdict(list)
        for rule in rules:
            for pattern in rule.compiled:
                self.by_root[pattern.root.target].append((rule, pattern))
        self.pending = deque(graph.calls)
        self.limit = GROWTH * (len(self.pending) + 1)
        self.gone: set[Node] = set()
        self.refused: set[tuple[Node, str]] = set()

    def run(self) -> int:
        count = 0
        while self.pending:
            node = self.pending.popleft()
            if node in self.gone or not self._visit(node):
                continue
            count += 1
            if count > self.limit:
                names = ", ".join(sorted({rule.name for rules in self.by_root.values() for rule, _ in rules}))
                raise OptpassError(
                    f"rules {names} keep rewriting %{node.name} ({path_of(node)}): do they undo each other?"
                )
        return count

    def _visit(self, node: Node) -> bool:
        for rule, match in self._matches(node):
            if reason := rule.check(match):
                if self.context and (node, reason) not in self.refused:
                    self.refused.add((node, reason))
                    self.context.decline(node, reason, self.entry)
                continue
            if self.context:
                self.context.rewrote(node, self.entry)
            self._replace(rule, match)
            return True
        return False

    def _matches(self, node: Node) -> Iterator[tuple[Rule, Match]]:
        for rule, pattern in self.by_root.get(node.target, ()):
            match = pattern.match(self.graph, node)
            if match and rule.concerns(match):
                yield rule, match

    def _replace(self, rule: Rule, match: Match) -> None:
        root = match.root
        anchor = root.prev
        with self.graph.before(root):
            result = rule.rewrite(self.graph, match)
        if layout(result) != layout(root):
            raise OptpassError(
                f"rule {rule.name} replaces %{root.name} ({path_of(root)}), {layout(root)}, "
                f"by %{result.name}, {layout(result)}"
            )
        while (anchor := anchor.next) is not root:
            self.pending.append(anchor)
        self.pending.extend(user for user in root.users if user.op == "call_function")
        self.gone |= replace(root, result)


def layout(node: Node) -> Any:
    """Shape and dtype of a node's result, or of each of its results."""
    value = node.meta["val"]
    values = value if isinstance(value, (list, tuple)) else [value]
    return [(sizes_of(item), item.dtype) if isinstance(item, Tensor) else type(item) for item in values]


def replace(node: Node, result: Node) -> set[Node]:
    """Let ``result`` take ``node``'s place everywhere and erase what that leaves dead; the erased nodes."""
    node.replace_all_uses_with(result, delete_user_cb=lambda user: user is not result)
    gone: set[Node] = set()
    pending = [node]
    while pending:
        dead = pending.pop()
        if dead in gone or dead.users or dead.op not in ("call_function", "get_attr"):
            continue
        pending.extend(dead.all_input_nodes)
        dead.graph.erase_node(dead)
        gone.add(dead)
    return gone
