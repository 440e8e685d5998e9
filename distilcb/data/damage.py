"""What is wrong with text and is survived: odd bytes, control characters; on request files that are damaged."""

import logging
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import InitVar, dataclass, field
from typing import IO

from distilcb.errors import DataError

log = logging.getLogger(__name__)

# Of a damaged file what comes before the damage is kept to within so much.
_READ_AT_ONCE = 1 << 16

# What the file system and the decompressors raise.
_DAMAGES = (OSError, EOFError, lzma.LZMAError, zlib.error)


@dataclass
class Damage:
    """What was survived while reading: counted, and reported in the description of the blocks.

    skips: whether files that end in the middle and records that are no JSON are survived too.
    tells: whether damaged files are logged; those who read only a little of them do not.
    damaged: names of these files. Several parts may meet the damage of one.
    """

    empty_documents: int = 0
    undecodable_documents: int = 0
    control_characters: int = 0
    damaged_records: int = 0
    damaged: list[str] = field(default_factory=list)
    skips: InitVar[bool] = False
    tells: InitVar[bool] = True

    def __post_init__(self, skips: bool, tells: bool) -> None:
        self.may_skip, self._tells = skips, tells

    def survive(self, source: object, fault: object) -> None:
        """Note a file that is damaged."""
        self.damaged.append(str(source))
        if self._tells:
            log.warning("%s is damaged (%s): what was read before that showed is kept", source, fault)


def _is_damage(error: BaseException) -> bool:
    """Whether the file itself is at fault, and not the file system."""
    return getattr(error, "errno", None) is None


def _words_of(error: BaseException) -> str:
    return str(error) or "the file ends in the middle"


@contextmanager
def naming(source: object, damage: Damage | None = None) -> Iterator[None]:
    """Let what the file system or a decompressor says name the source; damage that may be survived is counted."""
    try:
        yield
    except _DAMAGES as error:
        if damage is not None and damage.may_skip and _is_damage(error):
            damage.survive(source, _words_of(error))
            return
        raise DataError(
            f"{source}: {_words_of(error)}. Fetch or make the file again; launch/prepare.py --skip_damaged takes what "
            "comes before the damage."
        ) from error


class UntilDamage:
    """A stream that ends where the one below it is damaged, if damage is to be survived."""

    def __init__(self, stream: IO[bytes], *, survives: bool) -> None:
        self._stream, self._survives, self.fault = stream, survives, ""

    def read(self, size: int) -> bytes:
        pieces = []
        while size and (piece := self._get(self._stream.read, min(size, _READ_AT_ONCE))):
            pieces.append(piece)
            size -= len(piece)
        return b"".join(pieces)

    def readline(self) -> bytes:
        return self._get(self._stream.readline, -1)

    def _get(self, read: Callable[[int], bytes], size: int) -> bytes:
        if self.fault:
            return b""
        try:
            return read(size)
        except _DAMAGES as error:
            if not self._survives or not _is_damage(error):
                raise
            self.fault = _words_of(error)
            return b""


# Every control character but tab and line ends, which are spaces. They are always replaced: SentencePiece would drop
# most and make one wrong word of "chat\x01noir", and the rest would be unknown tokens.
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]")

# Decoding turns bytes that are no UTF-8 into these, and JSON can spell them ("\\ud83d"); no tokenizer takes one.
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")

_EITHER = re.compile(f"{_CONTROL.pattern}|{_LONE_SURROGATE.pattern}")

# What str.split() takes for spaces, but the plain one.
_OTHER_SPACE = re.compile("[\t-\r\x1c-\x1f\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]")


# Spaces of _OTHER_SPACE that are no control characters, and so are not counted.
_ENDS = " \t\n\v\f\r"


def clean(text: str | bytes, damage: Damage) -> str:
    """The text in valid UTF-8 without control characters, its words one space apart."""
    if isinstance(text, bytes):
        text = text.decode(errors="surrogateescape").removeprefix("\ufeff")
    text = text.strip(_ENDS)  # most lines are printable but for their end
    if not text.isprintable():
        if _EITHER.search(text):
            text, undecodable = _LONE_SURROGATE.subn("\ufffd", text)
            damage.undecodable_documents += undecodable > 0
            text, controls = _CONTROL.subn(" ", text)
            damage.control_characters += controls
        text = _OTHER_SPACE.sub(" ", text)
    while "  " in text:  # three times as fast as splitting and joining
        text = text.replace("  ", " ")
    return text.strip(" ")
