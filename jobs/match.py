"""The match stage as a Ray job.

ray job submit --working-dir . -- python jobs/match.py CONFIG [key=value ...]
"""

from gsl_dist.cluster.job import run_job
from gsl_dist.cluster.match import MatchConfig, run_match

if __name__ == "__main__":
    run_job(MatchConfig, run_match)
