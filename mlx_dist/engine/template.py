"""Chat templates within bounds: each is a program that came with the model. Knows no tokens.

transformers runs them in Jinja's sandbox, which keeps them from files and from Python's inside,
and neither from running on nor from filling the memory. Here every step of one is counted: each
turn of a loop, call, filter and output is charged to an allowance of characters and of
processor time, and what a single step would make is known before it is made. No time limit from
outside could do that: one multiplication that asks for 10 GB is one step to Python, too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import chain
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.filters import FILTERS as DEFAULT_FILTERS
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer
from transformers.utils import chat_template_utils

from mlx_dist.engine.allowance import (
    SIZED,
    TEXT,
    Allowance,
    check_call,
    check_made,
    check_numbers,
    check_operation,
    current,
    pieces_of,
)
from mlx_dist.errors import ModelError

# The longest template known has 60,000 characters.
_MOST_SOURCE = 1 << 18
# What goes out is kept until the end, and then made into tokens.
_OUTPUT_WEIGHT = 2
# What takes time beyond the length of its text; no chat needs them.
_SLOW_FILTERS = {"pprint", "striptags", "urlize", "wordwrap", "xmlattr"}
_SLOW_METHODS = ("encode", "decode", "striptags", "translate")


def _tick(size: int) -> None:
    """Runs at each turn of a loop, whose literal text has `size` characters."""
    current().spend(_OUTPUT_WEIGHT * size)


def _checked(value: Any) -> Any:
    """`value`, a container or a part of one that the template has just made."""
    allowance = current()
    allowance.checked(value)
    allowance.spend(len(value))
    return value


def _joined(*values: Any) -> str:
    """What the operator ~ makes."""
    allowance = current()
    allowance.spend(allowance.fitting(sum(map(allowance.checked, values))))
    return "".join(map(str, values))


class _Counting(NodeTransformer):
    """Has a template's code call `_tick`, `_checked` and `_joined`."""

    def visit_For(self, node: nodes.For) -> Any:
        return self._ticking(node)

    def visit_Macro(self, node: nodes.Macro) -> Any:
        return self._ticking(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> Any:
        return self._ticking(node)

    def visit_Block(self, node: nodes.Block) -> Any:
        return self._ticking(node)

    def visit_List(self, node: nodes.List) -> Any:
        return _call("checked", self.generic_visit(node))

    def visit_Dict(self, node: nodes.Dict) -> Any:
        return _call("checked", self.generic_visit(node))

    def visit_Tuple(self, node: nodes.Tuple) -> Any:
        self.generic_visit(node)
        return _call("checked", node) if node.ctx == "load" else node

    def visit_Getitem(self, node: nodes.Getitem) -> Any:
        self.generic_visit(node)
        return _call("checked", node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Concat(self, node: nodes.Concat) -> Any:
        self.generic_visit(node)
        return _call("joined", *node.nodes)

    def _ticking(self, node: Any) -> Any:
        texts = chain(
            (data.data for data in node.find_all(nodes.TemplateData)),
            (const.value for const in node.find_all(nodes.Const) if isinstance(const.value, str)),
        )
        tick = _call("tick", nodes.Const(sum(map(len, texts)), lineno=node.lineno))
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(tick, lineno=node.lineno))
        return node


def _call(name: str, *arguments: Any) -> nodes.Call:
    line = arguments[0].lineno
    function = nodes.EnvironmentAttribute(name, lineno=line)
    return nodes.Call(function, list(arguments), [], None, None, lineno=line)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which nothing is made before it is known to fit.

    What does not is a SecurityError.
    """

    intercepted_binops = frozenset({"+", "-", "*", "**", "%"})
    tick = staticmethod(_tick)
    checked = staticmethod(_checked)
    joined = staticmethod(_joined)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.finalize = _written
        self.globals.pop("lipsum", None)
        self.filters = _Filters()
        for name in DEFAULT_FILTERS.keys() - _SLOW_FILTERS:
            self.filters[name] = DEFAULT_FILTERS[name]

    def compile(self, source: Any, *args: Any, **kwargs: Any) -> Any:
        """Raises SecurityError for a template too long to be one."""
        if isinstance(source, str) and len(source) > _MOST_SOURCE:
            raise SecurityError(f"it has {len(source)} characters, more than {_MOST_SOURCE}")
        return super().compile(source, *args, **kwargs)

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_Counting().visit(source), *args, **kwargs)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        is_slow = isinstance(obj, TEXT) and attr in _SLOW_METHODS
        return not is_slow and super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        allowance = current()
        check_operation(allowance, operator, left, right)
        result = super().call_binop(context, operator, left, right)
        # Of a list that is one more than another, only the places are new.
        allowance.spend(len(result) if isinstance(result, SIZED) else 1)
        if operator == "+" and isinstance(result, list | tuple):
            allowance.remember(result, allowance.checked(left) + allowance.checked(right))
        else:
            check_made(allowance, result)
        return result

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        if __obj is _tick or __obj is _checked or __obj is _joined:
            return __obj(*args)
        allowance = current()
        # The sandbox wraps `format`.
        bound = getattr(__obj, "__wrapped__", __obj)
        text = getattr(bound, "__self__", None)
        if not isinstance(text, TEXT):
            check_numbers((*args, *kwargs.values()))
            allowance.checked([*args, *kwargs.values()])
        elif bound.__name__ == "join" and args:
            args = (pieces_of(allowance, args[0], text), *args[1:])
        else:
            check_call(allowance, bound.__name__, text, (*args, *kwargs.values()))
        return _paid(allowance, super().call(__context, __obj, *args, **kwargs))


class _Filters(dict[str, Callable[..., Any]]):
    """Filters, each of them checked before it runs."""

    def __setitem__(self, name: str, function: Callable[..., Any]) -> None:
        # Some are given the environment or the context ahead of their value.
        first = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)
        def bounded_filter(*args: Any, **kwargs: Any) -> Any:
            allowance = current()
            before, own = args[:first], args[first:]
            if name == "join" and own:
                separator = kwargs.get("d", own[1] if len(own) > 1 else "")
                own = (pieces_of(allowance, own[0], separator), *own[1:])
            elif own:
                check_call(allowance, name, own[0], (*own[1:], *kwargs.values()))
            return _paid(allowance, function(*before, *own, **kwargs))

        super().__setitem__(name, bounded_filter)


def _paid(allowance: Allowance, made: Any) -> Any:
    """`made`, once it is charged."""
    allowance.spend(check_made(allowance, made))
    return made


def _written(value: Any) -> Any:
    """`value`, about to be written out."""
    allowance = current()
    allowance.spend(_OUTPUT_WEIGHT * allowance.checked(value))
    return value


# Where transformers finds the sandbox that it compiles all chat templates in.
chat_template_utils.ImmutableSandboxedEnvironment = BoundedEnvironment


def check_in_use() -> None:
    """Raise ModelError unless transformers compiles chat templates in this sandbox."""
    compiled = chat_template_utils._compile_jinja_template("")
    if not isinstance(compiled.environment, BoundedEnvironment):
        raise ModelError(
            "this version of transformers runs chat templates without bounds; "
            "install the one that mlx_dist was tested with"
        )
