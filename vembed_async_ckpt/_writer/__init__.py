"""The writer: takes staged arenas, writes and hashes their files, commits them, and prunes old checkpoints.

No torch here.

It runs as a process of its own (`python -m vembed_async_ckpt._writer`, started by the supervisor) or as a thread. Both
run `server.serve` with the same protocol.
"""
