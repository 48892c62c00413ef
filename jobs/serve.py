"""The serve stage as a Ray job: `ray job submit --working-dir . -- python jobs/serve.py CONFIG [key=value ...]`.

The service outlives the job: it runs until `serve shutdown`, or until another version is served in its place.
"""

from gsl_dist.cluster.job import run_job
from gsl_dist.cluster.serve import ServeConfig, run_serve

if __name__ == "__main__":
    run_job(ServeConfig, run_serve)
