"""The job that a run is on a cluster: SLURM's commands, the history of its starts, and what is decided after each."""
