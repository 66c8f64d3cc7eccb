"""Host memory for a save: the arena that is shaped like the files, and the copies of tensors into it."""
