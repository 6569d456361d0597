"""The metrics that a PromQL expression asks for, by a real parser; and those that a server exposes."""

import re

import promql_parser

GRAFANA_WORDS = {"$__rate_interval": "5m", "$instance": ".*"}


def selectors(expression):
    """(metric, {label: matched value}) of each selector. Raises ValueError for what is no PromQL."""
    for word, value in GRAFANA_WORDS.items():
        expression = expression.replace(word, value)
    return list(_walk(promql_parser.parse(expression)))


def _walk(node):
    if isinstance(node, promql_parser.VectorSelector):
        yield node.name, {matcher.name: matcher.value for matcher in node.matchers.matchers}
    inner = [getattr(node, name, None) for name in ("lhs", "rhs", "expr", "vector_selector")]
    for child in [*inner, *(getattr(node, "args", None) or [])]:
        if child is not None and not isinstance(child, (str, float)):
            yield from _walk(child)


def exposed(text):
    """{metric: {label: {values}}} of what a server answers on /metrics."""
    found = {}
    for name, labels in re.findall(r"^(\w+)(?:\{(.*?)\})? \S+$", text, flags=re.MULTILINE):
        known = found.setdefault(name, {})
        for label, value in re.findall(r'(\w+)="(.*?)"', labels):
            known.setdefault(label, set()).add(value)
    return found
