"""An artefact whose reader does everything wrong, to see that it is seen."""

import os
import signal
import time

import pyarrow as pa
from damage import Subject, damage, draw_seed

from gsl_dist.errors import GslError

COUNT = 40
VERDICTS = {"flip": "failed", "cut": "unnamed", "longer": "hung", "zeros": "silent", "words": "unnoticed"}
VERDICTS |= {"empty": "crashed", "swap": "unverified"}


def make_subjects(place):
    """Give a file whose reader knows how it was damaged, and does the worst that can be done then."""
    path = place / "frail.bin"
    path.write_bytes(bytes(range(200)))
    subject = Subject([path], {path.name: bytes(300)}, None)
    mutants = [damage(subject, draw_seed(0, "frail", number)) for number in range(COUNT)]
    ways = {after: way for _, way, _, after in mutants}

    def use():
        way = ways.get(path.read_bytes())
        if way == "flip":
            raise ValueError("nobody's error")
        if way == "cut":
            raise GslError("something is wrong")
        if way == "longer":
            time.sleep(3600)
        if way == "empty":
            os.kill(os.getpid(), signal.SIGKILL)
        if way == "swap":
            try:
                pa.ipc.open_file(pa.py_buffer(path.read_bytes()))
            except pa.ArrowInvalid:
                raise GslError(path.name) from None
        return "another" if way == "zeros" else "whole"

    return {"frail": subject._replace(use=use)}
