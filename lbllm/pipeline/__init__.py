"""The pipeline: all stages over all blocks, the process that runs them, and starting from a checkpoint."""
