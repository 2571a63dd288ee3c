"""The errors a user can meet. Each message says what was found, what was expected and what to do."""


class LieqError(Exception):
    """Base of all expected errors: the command line prints the message in one line and exits with 1."""


class SourceError(LieqError):
    """The model to read is missing, incomplete or damaged."""


class ArchitectureError(LieqError):
    """The model's architecture, or a variant of it, is not supported."""


class TokenizerError(LieqError):
    """The tokenizer cannot be carried over faithfully."""


class CalibrationError(LieqError):
    """The calibration text, or an importance matrix made from one, cannot be used."""


class ScoringError(LieqError):
    """A layer score cannot be computed."""


class BudgetError(LieqError):
    """The bit budget cannot be met with the types that fit the model."""


class QuantizationError(LieqError):
    """A tensor cannot be stored in the requested type."""


class OutputError(LieqError):
    """The result cannot be written to the place you asked for."""


class FormatError(LieqError):
    """A file to read is not of the expected kind, or is damaged."""


class EvaluationError(LieqError):
    """Two models cannot be compared on a text."""


class VerificationError(LieqError):
    """A written file differs from the plan, or llama.cpp does not load it."""
