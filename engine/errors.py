"""Every error a user can meet: what happened (with the value and the rule), and the remedy.

`code` is a stable word for scripts, `exit_code` what the command line returns for it.
"""


class UnipicError(Exception):
    """Base of all our errors. `str(error)` is `what: remedy`."""

    code = "error"
    exit_code = 1

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(f"{what}: {remedy}" if remedy else what)
        self.what = what
        self.remedy = remedy


class UsageError(UnipicError, ValueError):
    """A request that cannot be carried out as asked."""

    code = "usage"
    exit_code = 2


class ImageError(UsageError):
    """An image that cannot be read or used."""

    code = "image"


class OutputError(UnipicError, OSError):
    """A place we must write to cannot be written, or would be overwritten."""

    code = "output"
    exit_code = 2


class BudgetError(UnipicError):
    """The request does not fit the memory it may use."""

    code = "memory"
    exit_code = 3


class HostMemoryError(BudgetError):
    """The memory of the machine itself does not suffice, whatever a GPU has left."""

    code = "host-memory"


class ModelMissingError(UnipicError):
    """The model is not on disk and cannot be fetched."""

    code = "model-missing"
    exit_code = 4


class CorruptWeightsError(UnipicError):
    """A weight file is damaged, hostile, or not of the expected model."""

    code = "corrupt-weights"
    exit_code = 5


class UnsupportedDeviceError(UnipicError):
    """The device, precision or backend asked for does not exist here."""

    code = "device"
    exit_code = 6


class Cancelled(UnipicError):
    """The caller asked to stop; nothing half-done is left behind."""

    code = "cancelled"
    exit_code = 130


class UnipicWarning(UserWarning):
    """Something the user should know that does not stop the work."""
