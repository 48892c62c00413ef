"""Filters: which items may be hits, as a tree of conditions on payload columns.

    {"label": 3}                            the column equals a value; `$ne`: differs from it
    {"year": {"$gte": 1990, "$lt": 2000}}   compares; several conditions must all hold
    {"label": {"$in": [1, 2]}}              is one of several values; `$nin`: is none of them
    {"note": {"$exists": true}}             has a value
    {"$or": [{...}, {...}]}                 one of several filters lets it through; `$and`: all of them
    {"$not": {...}}                         a filter does not

`id` is a column like any other. As in SQL a condition on a null is neither met nor unmet, and neither is its negation:
such an item is no hit. What columns there are, and of which type, is for whoever holds them to check.

Source: the operators of MongoDB's query language, as vector stores use them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gsl_dist.errors import QueryError

MAX_DEPTH, MAX_CLAUSES, MAX_VALUES = 16, 1_000, 100_000

_COMPARING = ("$eq", "$ne", "$gt", "$gte", "$lt", "$lte")
_AMONG = ("$in", "$nin")
_GROUPING = ("$and", "$or", "$not")
_OPERATORS = (*_COMPARING, *_AMONG, "$exists")

Value = str | int | float | bool


class Condition(NamedTuple):
    """What a column must be.

    Args:
        column: its name.
        operator: one of `$eq $ne $gt $gte $lt $lte $in $nin $exists`.
        value: what it is compared with: values for `$in` and `$nin`, whether there is one for `$exists`.
    """

    column: str
    operator: str
    value: Any


class Group(NamedTuple):
    """Several clauses as one: `$and`, `$or`, or `$not` of a single one."""

    operator: str
    clauses: tuple[Clause, ...]


Clause = Condition | Group


def parse_where(where: Any) -> Clause:
    """Read a filter.

    Raises:
        QueryError: it is no filter; the error names the place.
    """
    clause = _parse(where, "where", MAX_DEPTH)
    if _count(clause) > MAX_CLAUSES:
        raise QueryError("where", f"{_count(clause)} conditions", f"a filter has at most {MAX_CLAUSES}")
    return clause


def list_columns(clause: Clause) -> set[str]:
    """Give the columns that a filter looks at."""
    if isinstance(clause, Condition):
        return {clause.column}
    return set[str]().union(*map(list_columns, clause.clauses))


def _parse(where: Any, place: str, depth: int) -> Clause:
    if not isinstance(where, Mapping) or not where:
        raise QueryError(place, where, 'it must be an object such as {"label": 3} or {"year": {"$gte": 1990}}')
    if depth == 0:
        raise QueryError(place, where, f"a filter is at most {MAX_DEPTH} levels deep")
    clauses = [_parse_entry(key, value, f"{place}.{key}", depth) for key, value in where.items()]
    return clauses[0] if len(clauses) == 1 else Group("$and", tuple(clauses))


def _parse_entry(key: Any, value: Any, place: str, depth: int) -> Clause:
    if not isinstance(key, str):
        raise QueryError(place, key, "the names of columns are strings")
    if key == "$not":
        return Group("$not", (_parse(value, place, depth - 1),))
    if key in _GROUPING:
        if not _is_list(value) or not value:
            raise QueryError(place, value, "it must be a list of filters")
        return Group(key, tuple(_parse(part, f"{place}[{at}]", depth - 1) for at, part in enumerate(value)))
    if key.startswith("$"):
        raise QueryError(place, value, f"around filters stand {', '.join(_GROUPING)}; {key} belongs inside a column")
    conditions = value if isinstance(value, Mapping) else {"$eq": value}
    if not conditions:
        raise QueryError(place, value, f"it must be a value, or conditions by {', '.join(_OPERATORS)}")
    parsed = [_parse_condition(key, name, wanted, f"{place}.{name}") for name, wanted in conditions.items()]
    return parsed[0] if len(parsed) == 1 else Group("$and", tuple(parsed))


def _parse_condition(column: str, operator: Any, value: Any, place: str) -> Condition:
    if operator in _COMPARING:
        return Condition(column, operator, _check_value(value, place))
    if operator in _AMONG:
        if not _is_list(value) or len(value) > MAX_VALUES:
            raise QueryError(place, value, f"it must be a list of at most {MAX_VALUES} values")
        return Condition(column, operator, tuple(_check_value(one, place) for one in value))
    if operator == "$exists":
        if not isinstance(value, bool):
            raise QueryError(place, value, "it must be true or false")
        return Condition(column, operator, value)
    raise QueryError(place, operator, f"a column is compared by {', '.join(_OPERATORS)}")


def _check_value(value: Any, place: str) -> Value:
    if not isinstance(value, (str, int, float)) or (isinstance(value, float) and not math.isfinite(value)):
        raise QueryError(place, value, "it must be a string, a finite number, true or false")
    return value


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _count(clause: Clause) -> int:
    return 1 if isinstance(clause, Condition) else sum(map(_count, clause.clauses))
