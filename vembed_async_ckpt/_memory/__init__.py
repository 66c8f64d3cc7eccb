"""Host memory for a save: the arena, laid out like the files, and the copies of tensors into it."""
