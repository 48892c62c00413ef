"""The train stage as a Ray job.

ray job submit --working-dir . -- python jobs/train.py CONFIG [key=value ...]
"""

from gsl_dist.cluster.job import run_job
from gsl_dist.cluster.train import TrainConfig, run_train

if __name__ == "__main__":
    run_job(TrainConfig, run_train)
