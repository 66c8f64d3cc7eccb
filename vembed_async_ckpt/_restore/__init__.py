"""Restores a checkpoint. Each module plans what one kind of object gets, before anything is changed."""
