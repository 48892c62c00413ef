"""The codebook stage as a Ray job.

ray job submit --working-dir . -- python jobs/codebook.py CONFIG [key=value ...]
"""

from gsl_dist.cluster.codebook import CodebookConfig, run_codebook
from gsl_dist.cluster.job import run_job

if __name__ == "__main__":
    run_job(CodebookConfig, run_codebook)
