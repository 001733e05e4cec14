"""What failed while measuring, told by its type."""


class MeasuringError(RuntimeError):
    """Something that was started for a measurement failed: a server, a client, an engine.

    The text holds its last words. A command ends with them and without a traceback, which would
    show where the measurement waited and not what went wrong.
    """
