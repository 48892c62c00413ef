"""The evaluate stage as a Ray job.

ray job submit --working-dir . -- python jobs/evaluate.py CONFIG [key=value ...]
"""

from gsl_dist.cluster.evaluate import EvaluateConfig, run_evaluate
from gsl_dist.cluster.job import run_job

if __name__ == "__main__":
    run_job(EvaluateConfig, run_evaluate)
