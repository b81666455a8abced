"""The control plane: reconciles DistillationJobs and DistillationChains."""
