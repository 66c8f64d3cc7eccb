"""How long the ranks of a job wait for each other, in seconds.

The values are read at each use, so tests can set them.
"""

POLL = 0.05  # between two looks into the store while something is awaited
BEAT = 2.0  # between two signs of life
SILENCE = 60.0  # a rank without a sign of life for this long is given up
# a save is held this long, in the background, for a rank that has a checkpointer and did not call save()
HOLD = 10.0
FIRST_HOLD = 1.0  # the same for a rank without a checkpointer for this root: it may be about to make one
# the same for a rank that was missed before: it may call this time, at about the same moment
AGAIN_HOLD = 0.25
LATE = 10.0  # a call that comes this long after a save went on without its rank still belongs to that save
# replaces FIRST_HOLD once an optimizer has stepped since the call: ranks that train together have passed it too
STEP_HOLD = 0.25
PATIENCE = 600.0  # the other ranks wait this long for the first rank to call save(): it may be evaluating
# Sharded saves, in which every rank must take part:
ARRIVAL = 120.0  # a save fails if a rank has not called save() for this long after another one did
RELEASE = 1.0  # after a failed save, the next one waits this long for ranks that may still copy into its arena
AGREE = 10.0  # the ranks that agree on a step wait this long for the position of one that does not answer
