"""The engine: options, handles, the supervisor of the writer, one save's way, and the checkpointer that wires them."""
