import numpy as np
import pytest

from gsl_dist.errors import QueryError
from gsl_dist.filters import MAX_CLAUSES, MAX_DEPTH, MAX_VALUES, Condition, Group, list_columns, parse_where


@pytest.mark.parametrize(
    "where, clause",
    [
        ({"label": 3}, Condition("label", "$eq", 3)),
        ({"label": {"$in": ["a", "b"]}}, Condition("label", "$in", ("a", "b"))),
        ({"a": {"$gte": 1, "$lt": 2.5}}, Group("$and", (Condition("a", "$gte", 1), Condition("a", "$lt", 2.5)))),
        ({"a": True, "b": "x"}, Group("$and", (Condition("a", "$eq", True), Condition("b", "$eq", "x")))),
        ({"$not": {"a": 1}}, Group("$not", (Condition("a", "$eq", 1),))),
        (
            {"$or": [{"a": 1}, {"a": {"$exists": False}}]},
            Group("$or", (Condition("a", "$eq", 1), Condition("a", "$exists", False))),
        ),
    ],
)
def test_a_filter_is_read_as_a_tree_of_conditions(where, clause):
    assert parse_where(where) == clause


def test_every_column_that_a_filter_looks_at_is_listed():
    where = {"$or": [{"a": 1, "b": 2}, {"$not": {"$and": [{"c": {"$gt": 1, "$lt": 5}}]}}]}
    assert list_columns(parse_where(where)) == {"a", "b", "c"}


@pytest.mark.parametrize(
    "where, place",
    [
        (3, "where: got 3"),
        ({}, "where: got {}"),
        ([{"a": 1}], "where: "),
        ({"$or": []}, r"where\.\$or: got \[\]"),
        ({"$or": {"a": 1}}, r"where\.\$or: "),
        ({"$or": [{"a": 1}, 3]}, r"where\.\$or\[1\]: got 3"),
        ({"$gt": 3}, r"where\.\$gt: .* belongs inside a column"),
        ({"$nor": [{"a": 1}]}, r"where\.\$nor: "),
        ({"a": {}}, r"where\.a: got {}"),
        ({"a": {"$near": 3}}, r"where\.a\.\$near: got '\$near', but a column is compared by \$eq"),
        ({"a": {"b": 3}}, r"where\.a\.b: "),
        ({"a": {"$in": 3}}, r"where\.a\.\$in: got 3, but it must be a list"),
        ({"a": {"$in": "abc"}}, r"where\.a\.\$in: "),
        ({"a": {"$in": [[1]]}}, r"where\.a\.\$in: "),
        ({"a": {"$in": [0] * (MAX_VALUES + 1)}}, r"where\.a\.\$in: .*at most 100000 values"),
        ({"a": {"$exists": 1}}, r"where\.a\.\$exists: got 1, but it must be true or false"),
        ({"a": None}, r"where\.a\.\$eq: got None"),
        ({"a": float("nan")}, r"where\.a\.\$eq: "),
        ({"a": np.int64(3)}, r"where\.a\.\$eq: "),
        ({1: 2}, r"where\.1: got 1, but the names of columns are strings"),
        ({"$or": [{"a": 1}] * (MAX_CLAUSES + 1)}, "where: got '1001 conditions'"),
    ],
)
def test_what_is_no_filter_is_refused_at_its_place(where, place):
    with pytest.raises(QueryError, match=place):
        parse_where(where)


def test_a_filter_is_only_so_deep():
    where = {"a": 1}
    for _ in range(MAX_DEPTH - 1):
        where = {"$not": where}
    assert list_columns(parse_where(where)) == {"a"}
    with pytest.raises(QueryError, match="at most 16 levels deep"):
        parse_where({"$not": where})
