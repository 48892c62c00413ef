import pickle

import pytest

from gsl_dist.errors import (
    ArtefactError,
    BadInput,
    ConfigError,
    DataError,
    Denied,
    GslError,
    Overloaded,
    QueryError,
    ShardUnavailable,
    Unwritable,
    shorten,
)

ERRORS = [
    GslError("the loss is not finite"),
    BadInput("k", 0, "it must be 1 to 9"),
    ConfigError("fit.epochs", -1, "it must be above 0"),
    DataError("id", 7, "each id may occur once"),
    QueryError("vectors", [1, 2], "the index holds 3 numbers", status=413),
    ArtefactError("/index/v1", "no such file"),
    Unwritable("/index/v1/a.bin", "No space left on device"),
    ShardUnavailable(["shard-00001"], 3),
    Overloaded(256, 2.0),
    Denied("this needs a token of scope admin", 403),
]


def all_errors(root=GslError):
    return {root}.union(*(all_errors(kind) for kind in root.__subclasses__() if kind.__module__ == root.__module__))


def test_every_class_is_tried_here():
    assert {type(error) for error in ERRORS} == all_errors()


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_survives_pickling_with_its_fields(error):
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - what Ray does between workers
    assert (type(copy), str(copy), copy.args, vars(copy)) == (type(error), str(error), error.args, vars(error))


def test_a_cause_added_later_survives_pickling():
    error = ConfigError("k", 0, "it must be 1 to 9")
    error.shard = "shard-00001"
    assert pickle.loads(pickle.dumps(error)).shard == "shard-00001"  # noqa: S301


@pytest.mark.parametrize("kind", [BadInput, ConfigError, DataError, QueryError])
@pytest.mark.parametrize("value", [0, "a\nb", [1] * 1000, None, "x" * 500])
def test_a_mistake_is_one_line_that_names_field_value_and_what_is_allowed(kind, value):
    message = str(kind("fit.epochs", value, "it must be 1 to 9"))
    assert message.startswith("fit.epochs: got ") and message.endswith("it must be 1 to 9")
    assert shorten(value) in message and "\n" not in message and len(message) < 130


def test_a_callers_mistake_is_a_value_error():
    assert all(issubclass(kind, ValueError) for kind in (BadInput, ConfigError, DataError, QueryError))
    assert not issubclass(ArtefactError, ValueError)


def test_a_damaged_file_is_named_with_the_reason():
    error = ArtefactError("/index/v1/shard-00000.faiss", "it has 3 bytes, but 4 were written")
    assert str(error) == "/index/v1/shard-00000.faiss: it has 3 bytes, but 4 were written"


def test_missing_shards_are_counted_and_named():
    assert str(ShardUnavailable(["s1", "s2"], 5)) == "2 of 5 shards did not answer: s1, s2"


@pytest.mark.parametrize("value", ["x" * 79, "x" * 78, "x", list(range(100))])
def test_a_shown_value_has_at_most_80_characters(value):
    shown = shorten(value)
    head, _, tail = shown.partition("...")
    assert len(shown) <= 80 and (shown == repr(value) or (repr(value).startswith(head) and repr(value).endswith(tail)))


def test_of_a_long_path_the_name_of_the_file_is_shown():
    shown = shorten("/data/" + "deep/" * 30 + "queries.npy")
    assert len(shown) == 80 and shown.startswith("'/data/deep/") and shown.endswith("/queries.npy'")
