"""A coordinator driven by hand over the rows of several workers."""

import itertools
import pickle

from gsl_dist.quantizers import Rows, answer, coordinate


def share_rows(x, bounds):
    return [Rows(x[a:b], a, len(x)) for a, b in itertools.pairwise(bounds)]


def drive(quantizer, shares, lloyd, *, seed=0, start=None):
    """Drive the coordinator, through pickle as over a wire; give what it trained and its questions."""
    coordination = coordinate(quantizer, lloyd, seed=seed, start=start)
    ask, asked = next(coordination), []
    while True:
        asked.append(ask)
        sent = pickle.loads(pickle.dumps(ask))  # noqa: S301 - our own bytes
        answers = [answer(sent, rows, quantizer) for rows in shares]
        try:
            ask = coordination.send(pickle.loads(pickle.dumps(answers)))  # noqa: S301 - our own bytes
        except StopIteration as end:
            return end.value, asked
