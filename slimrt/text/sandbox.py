"""A Jinja environment for templates out of model files, which anybody may have written.

Jinja's own sandbox keeps a template away from Python's internals, but not from the machine's time and memory: two
nested loops, ``'a' * 10**10`` or a string that is doubled forty times hang the program. Here every loop pass, call and
produced value draws on a budget, operations that multiply (``*``, ``**``, ``%``, replace, join, format, indent) are
priced before they run (``template_budget``), and only those filters and string methods exist that chat templates use
and whose cost is known. That gives the usual excesses a reason and ends them soon; the limits that hold in any case are
those of the process that all of this runs in, see ``template_worker``.
"""

from __future__ import annotations

import json
import types
from collections.abc import Callable, Mapping
from datetime import datetime
from string import Formatter
from typing import Any, NoReturn

import jinja2.ext
from jinja2 import TemplateError, nodes, pass_context
from jinja2.filters import FILTERS, do_indent, do_round
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from slimrt.text.template_budget import (
    BUDGET,
    Budget,
    BudgetError,
    check_bits,
    check_product,
    check_width,
    percent_format,
)

__all__ = ["ChatEnvironment", "RefusalError"]

_SCOPES = ("_loop_vars", "_block_vars")  # what compiled templates add to every call; Context.call takes it away

_FILTERS = (
    "abs capitalize count d default dictsort e escape first float groupby int items last length list lower map max min "
    "reject rejectattr reverse safe select selectattr sort string title trim truncate unique upper wordcount"
)
_STR_METHODS = (
    "capitalize casefold count endswith find format format_map index isalnum isalpha isascii isdecimal isdigit "
    "isidentifier islower isnumeric isspace istitle isupper join lower lstrip partition removeprefix removesuffix "
    "replace rfind rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title upper"
)
_METHODS: Mapping[type, frozenset[str]] = {
    str: frozenset(_STR_METHODS.split()),
    dict: frozenset(("copy", "get", "items", "keys", "values")),
    list: frozenset(("copy", "count", "index")),
    tuple: frozenset(("count", "index")),
    int: frozenset(),
    float: frozenset(),
    bytes: frozenset(),
    complex: frozenset(),
    type: frozenset(),
}


class RefusalError(TemplateError):
    """The template called ``raise_exception``: the messages are not what it takes."""


def _budget(context: Context) -> Budget:
    return context.parent[BUDGET]


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """Renders as Transformers' ``apply_chat_template`` does: same whitespace rules, tags, globals and ``tojson``.

    ``parse`` and ``compile`` go through ``bounded``; templates made any other way do not run here.
    """

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            finalize=_finalize,
            extensions=[jinja2.ext.loopcontrols, _GenerationTag],
        )
        del self.globals["lipsum"]
        self.globals |= {"namespace": _Namespace, "raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self.filters = {name: FILTERS[name] for name in _FILTERS.split()} | _OWN_FILTERS

    def bounded(self, source: str) -> jinja2.Template:
        """``source`` compiled with its budget woven in. Raises jinja2.TemplateSyntaxError."""
        tree = _Weaver().visit(self.parse(source))
        return jinja2.Template.from_code(self, self.compile(tree), self.make_globals(None))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        for kind, names in _METHODS.items():
            if isinstance(obj, kind):
                return attr in names
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Any:
        wrapped = super().wrap_str_format(value)
        return None if wrapped is None else _StrFormat(self, value.__self__, value.__name__ == "format_map")

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        budget = _budget(context)
        budget.step()
        given = {name: value for name, value in kwargs.items() if name not in _SCOPES}
        if isinstance(obj, _StrFormat):
            return obj.run(budget, args, given)
        if isinstance(obj, types.BuiltinMethodType) and isinstance(obj.__self__, str):
            if obj.__name__ == "replace":
                return _replace(context, obj.__self__, *args, **given)
            if obj.__name__ == "join" and len(args) == 1:
                return _join(context, args[0], obj.__self__)
        result = super().call(context, obj, *args, **kwargs)
        budget.spend_value(result)
        return result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = _budget(context)
        if operator == "%" and isinstance(left, str):
            return percent_format(budget, left, right)
        if operator == "*":
            check_product(budget, left, right)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            check_bits(left.bit_length() * max(right, 1))
        result = super().call_binop(context, operator, left, right)
        budget.spend_value(result)
        return result


class _Namespace(Namespace):
    def __repr__(self) -> str:  # Jinja's shows the contents, of exponential size where namespaces are nested
        return "<Namespace>"


class _StrFormat:
    """A ``str.format`` that is priced; it runs by way of ``ChatEnvironment.call`` alone, which knows the budget."""

    def __init__(self, environment: ChatEnvironment, text: str, mapping: bool) -> None:
        self._environment, self._text, self._mapping = environment, text, mapping

    def run(self, budget: Budget, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        if self._mapping:
            kwargs, args = args[0], ()
        budget.spend(len(self._text))
        return _BoundedFormatter(self._environment, budget).vformat(self._text, args, kwargs)


class _BoundedFormatter(SandboxedFormatter, Formatter):
    def __init__(self, environment: ChatEnvironment, budget: Budget) -> None:
        super().__init__(environment)
        self._budget = budget

    def format_field(self, value: Any, format_spec: str) -> str:
        check_width(format_spec)
        text = super().format_field(value, format_spec)
        self._budget.spend(len(text))
        return text


def _raise_exception(message: str) -> NoReturn:
    raise RefusalError(message)


def _strftime_now(format: str) -> str:
    check_width(format)
    return datetime.now().strftime(format)


# -- filters: those that multiply, and those that the weaver puts into the template


@pass_context
def _finalize(context: Context, value: Any) -> Any:
    _budget(context).spend_value(value)
    return value


@pass_context
def _result(context: Context, value: Any) -> Any:
    _budget(context).spend_value(value)
    return value


@pass_context
def _step(context: Context, units: int) -> bool:
    _budget(context).step(units)
    return True


@pass_context
def _join(context: Context, value: Any, d: Any = "", attribute: str | None = None) -> str:
    if attribute is not None:
        value = context.environment.call_filter("map", value, kwargs={"attribute": attribute}, context=context)
    budget, texts, glue = _budget(context), [], str(d)
    for item in value:
        texts.append(str(item))
        budget.spend(len(texts[-1]) + len(glue) + 1)
    return glue.join(texts)


@pass_context
def _replace(context: Context, s: Any, old: Any, new: Any, count: int | None = None) -> str:
    text, old, new = str(s), str(old), str(new)
    times = text.count(old) if count is None or count < 0 else min(count, text.count(old))
    _budget(context).spend(len(text) + times * len(new))
    return text.replace(old, new, times)


@pass_context
def _indent(context: Context, s: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    text = str(s)
    _budget(context).spend((text.count("\n") + 1) * (len(width) if isinstance(width, str) else abs(width)))
    return do_indent(text, width, first, blank)


@pass_context
def _format(context: Context, value: Any, *args: Any, **kwargs: Any) -> str:
    return percent_format(_budget(context), str(value), kwargs or args)


@pass_context
def _round(context: Context, value: float, precision: int = 0, method: Any = "common") -> float:
    if abs(precision) > 100:
        raise BudgetError(f"it rounds to {precision} digits")
    return do_round(value, precision, method)


@pass_context
def _sum(context: Context, iterable: Any, attribute: str | None = None, start: float = 0) -> float:
    if attribute is not None:
        iterable = context.environment.call_filter("map", iterable, kwargs={"attribute": attribute}, context=context)
    return sum((number + 0.0 if isinstance(number, float) else int(number) for number in iterable), start)


@pass_context
def _tojson(
    context: Context,
    x: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own escapes HTML and sorts; Transformers' does not.
    if (indent or 0) > 16 or any(len(text) > 16 for text in separators or ()):
        raise BudgetError("tojson indents or separates by more than 16 characters")
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


_OWN_FILTERS: dict[str, Callable[..., Any]] = {
    "format": _format,
    "indent": _indent,
    "join": _join,
    "replace": _replace,
    "round": _round,
    "sum": _sum,
    "tojson": _tojson,
    "budget:result": _result,
    "budget:step": _step,
}


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}``: marks the assistant's text for training; here it is just its contents."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Weaver(NodeTransformer):
    """Puts the budget into a template's syntax tree.

    A step opens every loop pass, filtered loop, macro and block, and costs what the body writes; ``budget:result``
    prices what list, tuple and dict displays, ``~`` and filters produce. Calls and operators go through
    ``ChatEnvironment``, printed values through ``_finalize``.
    """

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self._step_first(node)
        if node.test is not None:
            node.test = nodes.And(self._filter("budget:step", nodes.Const(0), node), node.test)
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._step_first(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._step_first(node)

    def visit_Block(self, node: nodes.Block) -> nodes.Node:
        return self._step_first(node)

    def _step_first(self, node: Any) -> nodes.Node:
        written = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        step = self._filter("budget:step", nodes.Const(written), node)
        node.body.insert(0, nodes.ExprStmt(step, lineno=node.lineno))
        return node

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:
        return self._priced(node)

    def visit_List(self, node: nodes.List) -> nodes.Node:
        return self._priced(node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        return self._priced(node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        return self._priced(node) if node.ctx == "load" else self.generic_visit(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._filter("join", nodes.List(node.nodes, lineno=node.lineno), node)

    def _priced(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        return self._filter("budget:result", node, node)

    @staticmethod
    def _filter(name: str, operand: nodes.Expr, at: nodes.Node) -> nodes.Expr:
        return nodes.Filter(operand, name, [], [], None, None, lineno=at.lineno, environment=at.environment)
