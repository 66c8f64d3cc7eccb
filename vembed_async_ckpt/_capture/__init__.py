"""Capture the caller's objects: models, optimizers, processors and configs become one `Request`.

A request names every tensor that a save copies and every file that it writes. Nothing here touches the checkpoints on disk.
"""
