"""How long the ranks of a job wait for each other, in seconds. Read when used, so that tests can set them."""

POLL = 0.05  # between looks into the store while something is awaited
BEAT = 2.0  # between signs of life
SILENCE = 60.0  # without a sign of life after which a rank is given up
HOLD = 10.0  # that a save is held, in the background, for a rank that has a checkpointer and did not call save()
FIRST_HOLD = 1.0  # the same for a rank that has no checkpointer here: it may be about to make one
LATE = 10.0  # after a save that went on without a rank, that rank's call still belongs to it
STEP_HOLD = 0.25  # the same once an optimizer has stepped since: ranks that train together have passed the call
PATIENCE = 600.0  # that the others wait for the first rank to call save(): it may be evaluating
