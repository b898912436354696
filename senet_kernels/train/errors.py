"""The error of the training recipe."""


class TrainError(Exception):
    """What the user can put right: the command line prints the message and ends with status 2."""
