"""JSON in files that anyone may have changed, read against a type; only this file knows msgspec."""

from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from cnn_jax.runtime.errors import InputFileError, UsageError

T = TypeVar("T")
Count = Annotated[int, msgspec.Meta(ge=0)]
Seed = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]
Byte = Annotated[int, msgspec.Meta(ge=0, le=255)]
Size = Annotated[int, msgspec.Meta(ge=1)]
Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]
RecipeText = Annotated[str, msgspec.Meta(pattern=r"^\w+(, SHA-256 [0-9a-f]{64})?$")]
Positive = Annotated[float, msgspec.Meta(gt=0)]
Text = Annotated[str, msgspec.Meta(min_length=1)]
Pair = Annotated[str, msgspec.Meta(pattern="^[1-9][0-9]*x[1-9][0-9]*$")]  # such as 32x64
NonEmpty = Annotated[list[T], msgspec.Meta(min_length=1)]
Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
NotNegative = Annotated[float, msgspec.Meta(ge=0)]


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A JSON object with these keys and no others; those with a default may be missing."""


def decode(content: bytes | str, kind: type[T], *, source: object, remedy: str) -> T:
    """Return what JSON holds, of a type: a `Record`, or what msgspec knows.

    Args:
      content: The JSON; in bytes it is UTF-8.
      kind: The type.
      source: Where it is from, for the message.
      remedy: What to do where it is something else.

    Raises:
      InputFileError: naming the source, the key and the remedy.
    """
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise unreadable(source, error, remedy) from error


def convert(values: dict[str, Any], kind: type[T], *, source: object, remedy: str) -> T:
    """Return values of JSON's types as a type, among whose fields may be paths.

    Raises:
      InputFileError: as `decode` does.
    """
    try:
        return msgspec.convert(values, kind, dec_hook=_to_path)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise unreadable(source, error, remedy) from error


def typed_as(kind: type[T], values: dict[str, Any], *, source: str) -> T:
    """Return values that a caller gave as a type, among whose fields may be paths.

    Raises:
      UsageError: naming the source, and the value of another type.
    """
    try:
        return msgspec.convert(values, kind, dec_hook=_to_path)
    except (msgspec.ValidationError, UnicodeEncodeError) as error:  # the latter of text with half a character
        raise UsageError(f"{source}: {error}; give another value") from error


def _to_path(kind: type, value: Any) -> Path:
    assert kind is Path, "what msgspec does not know is a path"
    if not isinstance(value, str) or "\0" in value:
        raise ValueError("a path is text without NUL")
    return Path(value)


def encode(record: object) -> str:
    """Return a record, or a dataclass or dictionary with some, as JSON, which `decode` reads."""
    return msgspec.json.encode(record).decode()


def unreadable(source: object, reason: object, remedy: str) -> InputFileError:
    """Return the failure of a file that does not hold what it should."""
    return InputFileError(f"{source} is damaged or was edited ({reason}); {remedy}")
