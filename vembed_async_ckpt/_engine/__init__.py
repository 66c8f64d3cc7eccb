"""The steps of a save, from the call to its end.

`leader` runs a save on the rank that writes, `follower` on the other ranks. `ranks` and `rank_exchange` connect the
ranks. `saving` has the steps of one save. `supervisor` starts and watches the writer.
"""
