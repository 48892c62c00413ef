"""Train an encoder and its index's codebook together, encode a corpus in shards, serve it from a few bytes an item.

Importing this package loads neither torch, Ray nor faiss.
"""

from gsl_dist.codebook import Codebook
from gsl_dist.errors import ArtefactError, BadInput, ConfigError, DataError, GslError, QueryError, ShardUnavailable
from gsl_dist.hits import Hits, merge_topk

__version__ = "0.1.0"

__all__ = [
    "ArtefactError",
    "BadInput",
    "Codebook",
    "ConfigError",
    "DataError",
    "GslError",
    "Hits",
    "QueryError",
    "ShardUnavailable",
    "merge_topk",
]
