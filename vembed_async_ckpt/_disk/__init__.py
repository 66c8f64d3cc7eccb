"""The disk: read, write, publish, list, lock and delete checkpoints.

Every call that changes a checkpoint goes through `filesystem.Filesystem`; `commit` publishes one. Loads no torch.
"""
