"""Plan: every file of a checkpoint and every tensor's offset, as a pure function of names, dtypes and shapes."""
