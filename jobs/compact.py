"""The compact stage as a Ray job.

ray job submit --working-dir . -- python jobs/compact.py CONFIG [key=value ...]
"""

from gsl_dist.cluster.compact import CompactConfig, run_compact
from gsl_dist.cluster.job import run_job

if __name__ == "__main__":
    run_job(CompactConfig, run_compact)
