"""The stages of a folder of configs, one after another, as one Ray job.

ray job submit --working-dir . -- python jobs/pipeline.py FOLDER [key=value ...] [stage.key=value ...]
"""

from gsl_dist.cluster.pipeline import main

if __name__ == "__main__":
    main()
