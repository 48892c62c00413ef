"""A coordinator driven by hand over the rows of several workers."""

import itertools
import pickle

from gsl_dist.quantizers import Rows, answer, coordinate
from gsl_dist.quantizers.coordinate import join_answers


def share_rows(x, bounds):
    return [Rows(x[a:b], a, len(x)) for a, b in itertools.pairwise(bounds)]


def drive(quantizer, shares, lloyd, *, seed=0, start=None, fan_in=None, sizes=None):
    """Drive the coordinator, through pickle as over a wire; give what it trained and its questions.

    With a `fan_in` so many answers are joined at a time until no more than that are left; `sizes` notes what the
    coordinator sent to each worker and took in from all, in bytes, by what it asked for.
    """
    coordination = coordinate(quantizer, lloyd, seed=seed, start=start)
    ask, asked = next(coordination), []
    while True:
        asked.append(ask)
        sent = pickle.loads(pickle.dumps(ask))  # noqa: S301 - our own bytes
        answers = [answer(sent, rows, quantizer) for rows in shares]
        while fan_in and len(answers) > fan_in:
            groups = [answers[first : first + fan_in] for first in range(0, len(answers), fan_in)]
            answers = [join_answers(ask.what, group) for group in groups]
        given = pickle.dumps(answers)
        if sizes is not None:
            sizes.append((ask.what, len(pickle.dumps(ask)), len(given)))
        try:
            ask = coordination.send(pickle.loads(given))  # noqa: S301 - our own bytes
        except StopIteration as end:
            return end.value, asked
