"""Why a demo run was not begun."""


class Refused(ValueError):
    """The run was not begun and nothing was touched: the options make no sense, or other checkpoints are in the way."""
