"""The errors of mlx_dist. Every message names the value that is wrong and the remedy.

MlxDistError
├── ConfigError         a flag, variable or file asks for something impossible
├── LaunchError         the ranks cannot be started
├── WorldError          the ranks cannot meet, or do not agree
│   └── AgreedError     a failure of some rank that every rank has been told of
├── ModelError          the model's files are missing, damaged or not what was asked for
│   └── FamilyError     a model family that is not proven to run split
├── PlacementError      the layers cannot be placed on the ranks as asked
├── RequestError        a prompt or a sampling value that cannot be served
│   └── PromptTooLongError  more tokens than the model or the memory takes
├── QueueFullError      a request that cannot be taken just now
├── NotReadyError       a server that takes no requests, for it ends or is not up
└── ProtocolError       a message between ranks is not the one that was due
"""

from __future__ import annotations


class MlxDistError(Exception):
    """What a user can put right; printed as one line without a traceback."""


class ConfigError(MlxDistError):
    """A flag, variable or file asks for something impossible."""


class LaunchError(MlxDistError):
    """The ranks cannot be started."""


class WorldError(MlxDistError):
    """The ranks cannot meet, or do not agree."""


class AgreedError(WorldError):
    """A failure of some rank that every rank has been told of: all of them end, in order."""


class ModelError(MlxDistError):
    """The model's files are missing, damaged or not what was asked for."""


class FamilyError(ModelError):
    """A model family that is not proven to run split."""


class PlacementError(MlxDistError):
    """The layers cannot be placed on the ranks as asked."""


class RequestError(MlxDistError):
    """A prompt or a sampling value that cannot be served."""


class PromptTooLongError(RequestError):
    """A prompt, with its answer, of more tokens than the model or the memory takes."""


class QueueFullError(MlxDistError):
    """A request that cannot be taken just now; try again after `retry_after_s`."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NotReadyError(MlxDistError):
    """A server that takes no requests, for it ends or is not up."""


class ProtocolError(MlxDistError):
    """A message between ranks is not the one that was due. The world cannot go on."""
