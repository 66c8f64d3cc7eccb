"""The disk: read, write, publish, list, lock and delete checkpoints.

Every call that changes a checkpoint goes through `filesystem.Filesystem`. `commit` publishes a checkpoint. This folder
does not import torch.
"""
