"""Training workers: workloads, baselines and comparisons for the asynchronous preconditioner."""
