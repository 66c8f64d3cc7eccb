"""The writer: takes staged arenas, writes and hashes their files, commits, and prunes. No torch here.

It runs as a process of its own (`python -m vembed_async_ckpt._writer`, started by the supervisor) or as a thread; both run
`server.serve` over the same protocol.
"""
