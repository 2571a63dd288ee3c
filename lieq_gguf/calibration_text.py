"""The text a model is calibrated on."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from lieq_gguf.errors import CalibrationError

SHIPPED_TEXT = "shipped"


def read_calibration_text(file: Path | None) -> tuple[str, str]:
    """The text of a file, or the one this package ships, and its name.

    Raises:
        CalibrationError: if the file cannot be read, is not UTF-8, or is empty.
    """
    if file is None:
        text = resources.files("lieq_gguf").joinpath("data", "calibration.txt").read_text(encoding="utf-8")
        return text, SHIPPED_TEXT
    try:
        text = file.read_bytes().decode("utf-8")  # bytes, since text mode would change line ends
    except FileNotFoundError:
        raise CalibrationError(f"the calibration file {file} does not exist") from None
    except OSError as error:
        raise CalibrationError(f"the calibration file {file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CalibrationError(f"the calibration file {file} is not UTF-8 text (byte {error.start})") from None
    if not text.strip():
        raise CalibrationError(f"the calibration file {file} is empty; expected text, at least a few pages")
    return text, file.name
