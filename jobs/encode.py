"""The encode stage as a Ray job.

ray job submit --working-dir . -- python jobs/encode.py CONFIG [key=value ...]
"""

from gsl_dist.cluster.encode import EncodeConfig, run_encode
from gsl_dist.cluster.job import run_job

if __name__ == "__main__":
    run_job(EncodeConfig, run_encode)
