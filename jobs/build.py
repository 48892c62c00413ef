"""The build stage as a Ray job.

ray job submit --working-dir . -- python jobs/build.py CONFIG [key=value ...]
"""

from gsl_dist.cluster.build import BuildConfig, run_build
from gsl_dist.cluster.job import run_job

if __name__ == "__main__":
    run_job(BuildConfig, run_build)
