"""Many machines: forecasts of a run, checks before it, jobs under Slurm, and a run seen from outside."""
