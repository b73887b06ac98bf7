"""A sweep as a Ray job: the same as `flywheel sweep`, on the cluster it is submitted to.

    ray job submit --address http://HEAD:8265 -- python experiments/sweep.py configs/sweeps/demo.yaml --runs /nfs/runs

`ray job submit` sets RAY_ADDRESS; `--runs` must be a folder that every node sees. Submitted again after it was killed,
it skips the trials that had finished.
"""

from flywheel_ray.cli import main

if __name__ == "__main__":
    import sys

    main(["sweep", *sys.argv[1:]])
