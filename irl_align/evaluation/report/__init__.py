"""The report of a run or a comparison: one HTML file that needs nothing else."""
