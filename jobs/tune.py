"""The tune stage as a Ray job.

ray job submit --working-dir . -- python jobs/tune.py CONFIG [key=value ...]
"""

from gsl_dist.cluster.job import run_job
from gsl_dist.cluster.tune import TuneConfig, run_tune

if __name__ == "__main__":
    run_job(TuneConfig, run_tune)
