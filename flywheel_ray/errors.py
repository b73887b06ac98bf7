"""Every error the package raises on purpose, named by the boundary that was crossed.

    FlywheelError
    ├── ConfigError          a YAML file, a command line or an environment variable
    ├── DatasetError         records that cannot become a dataset, or a dataset folder that is not whole
    ├── StoreError           the log store
    │   └── StoreUnavailable     … did not answer: the same call may succeed later
    ├── PlatformError        training, hosting or evaluation refused or failed
    │   └── PlatformUnavailable  … did not answer: the same call may succeed later
    ├── ChatError            a model endpoint refused, or answered something that is no completion
    │   └── ChatUnavailable      … did not answer: the same call may succeed later
    ├── JudgeError           a judge endpoint that cannot be used at all (an unreadable verdict is no error)
    ├── LedgerError          results on disk or object storage
    └── GatewayError         the live deployment

A message says what and where, then the remedy: "Lora needs at least 50 training records; workload 'support' has 12.
Widen `since` or drop Lora." Arguments are positional only, so that errors survive pickling between Ray workers.
`…Unavailable` is the only kind that is worth repeating. The command line prints `str(error)` and exits with 1.
"""

from __future__ import annotations


class FlywheelError(Exception):
    """Base of all errors raised on purpose; its text is written for the person who ran the command."""


class ConfigError(FlywheelError):
    """A configuration file, command line or environment variable is wrong."""


class DatasetError(FlywheelError):
    """Records cannot become a dataset, or a dataset folder is damaged."""


class StoreError(FlywheelError):
    """The log store refused or is damaged."""


class StoreUnavailable(StoreError):
    """The log store did not answer; the same call may succeed later."""


class PlatformError(FlywheelError):
    """The platform refused or failed a training, hosting or evaluation job."""


class PlatformUnavailable(PlatformError):
    """The platform did not answer; the same call may succeed later."""


class ChatError(FlywheelError):
    """A model endpoint refused, or answered something that is not a chat completion."""


class ChatUnavailable(ChatError):
    """A model endpoint did not answer; the same call may succeed later."""


class JudgeError(FlywheelError):
    """The judge cannot be used at all. One unreadable verdict is not an error: it is an unscored row."""


class LedgerError(FlywheelError):
    """The ledger cannot be read or written."""


class GatewayError(FlywheelError):
    """The live deployment cannot start or be reached."""
