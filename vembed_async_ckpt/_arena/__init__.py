"""The arena: one host memory region shaped like the files of a checkpoint, and the copying of a state into it."""
