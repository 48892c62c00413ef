"""What the OpenAPI page says of each route: bodies, answers and examples."""

from __future__ import annotations

from typing import Any

from gsl_dist.hits import Effort
from gsl_dist.service.reading import ARROW_TYPE
from gsl_dist.wire import HITS_TYPE, QUERY_TYPE

Schema = dict[str, Any]


def _object(properties: Schema, required: tuple[str, ...] = ()) -> Schema:
    named: Schema = {"required": list(required)} if required else {}
    return {"type": "object", "additionalProperties": False, "properties": properties, **named}


def _list(items: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": items, "minItems": 1, **more}


def _tell(kind: str | list[str], about: str, **more: Any) -> Schema:
    return {"type": kind, "description": about, **more}


def _rows(items: Schema, about: str) -> Schema:
    return _tell("array", about, items={"type": "array", "items": items})


_COUNT: Schema = {"type": "integer", "minimum": 1}
_ID: Schema = {"type": "integer", "minimum": 0, "maximum": 2**63 - 1}
_VECTOR: Schema = {"type": "array", "items": {"type": "number"}}
_COLUMNS: Schema = {
    "type": "array",
    "items": {"type": "string"},
    "description": "payload columns to give with each hit",
}
_PAYLOAD: Schema = {"type": "object", "description": "values by column; dates and times as ISO 8601"}

_SEARCH = _object(
    {
        "vectors": _list(_VECTOR, description="what is searched for; or `ids`, or `items`"),
        "ids": _list(_ID, description="items like which others are wanted"),
        "items": _list(
            {},
            description="raw items for the encoder: files in base64, numbers in lists, or "
            "objects with either for each modality",
        ),
        "k": {**_COUNT, "default": Effort().k, "description": "hits wanted for each query"},
        "probes": {**_COUNT, "description": "lists to look into; by default 16 cells, or every one"},
        "refine": {
            **_COUNT,
            "description": "candidates a hit, ranked by the vectors kept; by default 4 where they are",
        },
        "recall": {
            "type": "number",
            "exclusiveMinimum": 0,
            "maximum": 1,
            "description": "share of the true neighbours, instead of probes and refine: gsl tune",
        },
        "where": {
            "type": "object",
            "description": 'which items may be hits: {"label": 3, "year": {"$gte": 1990}}; $ne $gt $gte $lt $lte $in '
            "$nin $exists on columns, $and $or $not around filters",
        },
        "within": {"type": "number", "description": "how far off a hit may be: at most, or at least for ip and cosine"},
        "offset": {
            "type": "integer",
            "minimum": 0,
            "default": 0,
            "description": "hits to leave out, for the next page",
        },
        "group_by": {"type": "string", "description": "a payload column of whose values no one fills the answer"},
        "group_size": {**_COUNT, "default": 1, "description": "hits that may share a value of it"},
        "payload": _COLUMNS,
        "require_all": {"type": "boolean", "default": False, "description": "503 over a partial answer"},
        "version": {"type": "string", "description": "404 unless this is the version served"},
        "timeout_s": {"type": "number", "exclusiveMinimum": 0, "description": "how long the caller waits for shards"},
    }
)

_REFUSED: Schema = _object(
    {
        "code": {"type": "string"},
        "message": {"type": "string"},
        "field": {"type": ["string", "null"]},
        "value": {"type": ["string", "null"], "description": "what was given, shortened"},
        "allowed": {"type": "string"},
        "missing": {"type": "array", "items": {"type": "string"}, "description": "shards that did not answer"},
        "total": {"type": "integer"},
    },
    ("code", "message"),
)
_ERRORS: dict[str, tuple[str, Schema]] = {
    "400": ("Something in the request is not as it should be.", {"code": "bad_input", "message": "...", "field": "k"}),
    "401": ("A token is needed.", {"code": "unauthorized", "message": "...", "field": None}),
    "403": ("The token does not allow this.", {"code": "forbidden", "message": "...", "field": None}),
    "404": ("There is no such thing.", {"code": "not_found", "message": "...", "field": "version"}),
    "413": ("The request asks for too much.", {"code": "too_large", "message": "...", "field": "vectors"}),
    "429": (
        "Too much is asked at once; Retry-After says when.",
        {"code": "overloaded", "message": "...", "field": None},
    ),
    "503": ("Shards did not answer.", {"code": "shards_unavailable", "message": "...", "missing": ["shard-00001"]}),
}

_SHARE: Schema = {"shards_answered": 4, "shards_total": 4, "version": "v-3f2a90b1c5d7"}
_HITS: Schema = {"ids": [[17, 4]], "distances": [[0.25, 0.5]], **_SHARE}

_SHARES: Schema = {
    "shards_answered": _tell("integer", "shards that answered"),
    "shards_total": _tell("integer", "shards of the version; where fewer answered, the answer is partial"),
    "version": _tell("string", "the version that answered"),
    "missing": _tell("array", "shards that did not answer, if any", items={"type": "string"}),
}
_NEEDED = ("shards_answered", "shards_total", "version")
_FOUND = _object(
    {
        "ids": _rows({"type": "integer"}, "a row for each query, nearest first; -1 where there is no further hit"),
        "distances": _rows(
            {"type": ["number", "null"]}, "squared L2; products or cosines for ip and cosine; null beside id -1"
        ),
        "payload": _rows({"type": "object"}, "of each hit the columns asked for"),
        **_SHARES,
    },
    ("ids", "distances", *_NEEDED),
)
_READ_BACK = _object({"queries": _COUNT, "k": _COUNT, "version": {"type": "string"}}, ("queries", "k", "version"))
_FETCHED = _object(
    {
        "items": _tell(
            "array",
            "in the order of the ids; null where there is no such item",
            items={**_object({"id": _ID, "payload": _PAYLOAD}, ("id", "payload")), "type": ["object", "null"]},
        ),
        "version": _SHARES["version"],
    },
    ("items", "version"),
)
_WRITTEN = _object(
    {"written": _tell("integer", "how many"), "seq": _tell("integer", "the commit of the write log; on the disk")},
    ("written", "seq"),
)
_SERVED: Schema = {
    "served": _tell("string", "the version that queries are answered from"),
    "rows": _tell("integer", "of that version"),
}
_PROMOTED = _object(_SERVED, ("served", "rows"))
_COMPACTED = _object(
    {**_SERVED, "seq": _tell("integer", "the last commit that the version holds")}, ("served", "rows", "seq")
)
_REPLICAS: Schema = {
    "connected": _tell("integer", "replicas that can be asked"),
    "replicas": _tell("integer", "replicas there are"),
}
_LISTED = _object(
    {
        "versions": _tell("array", "all that the index folder holds", items={"type": "string"}),
        "promoted": _tell(["string", "null"], "the version that the pointer names"),
        **_SERVED,
        "dim": _tell("integer", "dimensions of a vector"),
        "metric": _tell("string", "l2, ip or cosine"),
        "cells": _tell("integer", "lists of the coarse partition"),
        "sub_vectors": _tell("integer", "parts of a code"),
        "bits": _tell("integer", "of each part"),
        "bytes_per_item": _tell("integer", "of a code"),
        "vectors": _tell(["string", "null"], "precision of the vectors kept, if any"),
        "fingerprint": _tell("string", "of the codebook"),
        "created": _tell("string", "when the version was made"),
        "shards": _tell("integer", "of the version"),
        **_REPLICAS,
        "new_rows": _tell("integer", "rows written over the version"),
        "hidden_rows": _tell("integer", "rows of the version deleted or replaced since"),
        "seq": _tell("integer", "the last commit of the write log that queries see"),
        "columns": _tell("object", "payload columns and their types"),
    },
    ("versions", "promoted", "served", "rows", "dim", "metric", "shards", "columns"),
)
_STATUS: Schema = {"status": {"type": "string"}}
_READY = _object({**_STATUS, **_REPLICAS}, ("status", "connected", "replicas"))


def _describe(
    answer: Schema,
    gives: Schema,
    body: Schema | None = None,
    example: Schema | None = None,
    errors: tuple[str, ...] = (),
) -> Schema:
    """Give what a route says of itself.

    Args:
        answer: an example of its answer.
        gives: the schema of that.
        body: the schema of what it takes.
        example: one of that.
        errors: the statuses by which it fails.
    """
    given = {"application/json": {"schema": gives, "example": answer}}
    responses: Schema = {"200": {"description": "As asked.", "content": given}}
    for status in errors:
        said, shown = _ERRORS[status]
        told = {"application/json": {"schema": _REFUSED, "example": shown}}
        responses[status] = {"description": said, "content": told}
    page: Schema = {"responses": responses, "security": [{"bearer": []}, {}]}
    if body is not None:
        page["requestBody"] = {"required": True, "content": {"application/json": {"schema": body, "example": example}}}
    return page


SECURITY: dict[str, Schema] = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "as `gsl token` makes them"}
}

_READ = ("400", "401", "404", "413", "429", "503")
_WRITE = ("400", "401", "403", "413", "429", "503")
_RAW: Schema = {"schema": {"type": "string", "format": "binary"}}

DOCS: dict[str, Schema] = {
    "search": _describe(_HITS, _FOUND, _SEARCH, {"vectors": [[0.1, 0.2]], "k": 2}, _READ),
    "echo": _describe(
        {"queries": 1, "k": 2, "version": "v-3f2a90b1c5d7"},
        _READ_BACK,
        _SEARCH,
        {"vectors": [[0.1, 0.2]], "k": 2},
        _READ,
    ),
    "fetch": _describe(
        {"items": [{"id": 17, "payload": {"title": "a coat"}}, None], "version": "v-3f2a90b1c5d7"},
        _FETCHED,
        _object({"ids": _list(_ID), "payload": _COLUMNS}, ("ids",)),
        {"ids": [17, 18], "payload": ["title"]},
        _READ,
    ),
    "upsert": _describe(
        {"written": 1, "seq": 42},
        _WRITTEN,
        _object(
            {"items": _list(_object({"id": _ID, "vector": _VECTOR, "payload": _PAYLOAD}, ("id", "vector")))}, ("items",)
        ),
        {"items": [{"id": 17, "vector": [0.1, 0.2], "payload": {"title": "a coat"}}]},
        _WRITE,
    ),
    "payload": _describe(
        {"written": 1, "seq": 43},
        _WRITTEN,
        _object({"items": _list(_object({"id": _ID, "payload": _PAYLOAD}, ("id", "payload")))}, ("items",)),
        {"items": [{"id": 17, "payload": {"title": "a red coat"}}]},
        _WRITE,
    ),
    "delete": _describe(
        {"written": 1, "seq": 44}, _WRITTEN, _object({"ids": _list(_ID)}, ("ids",)), {"ids": [17]}, _WRITE
    ),
    "versions": _describe(
        {
            "versions": ["v1", "v2"],
            "promoted": "v2",
            "served": "v2",
            "rows": 7000,
            "dim": 48,
            "metric": "l2",
            "shards": 4,
            "columns": {"title": "string"},
        },
        _LISTED,
        errors=("401", "429"),
    ),
    "promote": _describe(
        {"served": "v1", "rows": 7000},
        _PROMOTED,
        _object({"version": {"type": "string"}}, ("version",)),
        {"version": "v1"},
        ("400", "401", "403", "404", "429", "503"),
    ),
    "compact": _describe(
        {"served": "v-91c04e77a2b3", "rows": 7010, "seq": 44}, _COMPACTED, errors=("401", "403", "404", "429", "503")
    ),
    "livez": _describe({"status": "ok"}, _object(_STATUS, ("status",))),
    "readyz": _describe({"status": "ok", "connected": 2, "replicas": 2}, _READY, errors=("503",)),
    "healthz": _describe(
        {"status": "ok", **_SHARE}, _object({**_STATUS, **_SHARES}, ("status", *_NEEDED)), errors=("503",)
    ),
    "metrics": _describe({}, {}, errors=("401", "429")),
}
for _name in (QUERY_TYPE, ARROW_TYPE):
    for _route in ("search", "echo"):
        DOCS[_route]["requestBody"]["content"][_name] = _RAW
for _name in (HITS_TYPE, ARROW_TYPE):
    DOCS["search"]["responses"]["200"]["content"][_name] = _RAW
DOCS["readyz"]["responses"]["503"] = {
    "description": "Not every shard can be asked yet.",
    "content": {
        "application/json": {"schema": _READY, "example": {"status": "starting", "connected": 1, "replicas": 2}}
    },
}
DOCS["metrics"]["responses"]["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
