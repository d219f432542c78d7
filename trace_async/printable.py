"""Texts of models, tools and data, made fit to be shown: the one way to a terminal, a log or a page."""


class _Escapes(dict[int, str]):
    """What `str.translate` asks for each character the first time; it remembers the answer itself."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        shown = character if character.isprintable() or character == "\n" else ascii(character)[1:-1]
        self[code] = shown
        return shown


_ESCAPES = _Escapes()


def printable(text: str, max_chars: int | None = None) -> str:
    """`text` with nothing left in it that could steer a terminal: control characters show as escapes.

    Newlines stay; bidirectional overrides, other format characters and lone surrogates are shown, not obeyed. Of a text
    longer than `max_chars` the beginning is shown, and how much is left out.
    """
    if max_chars is not None and len(text) > max_chars:
        return f"{printable(text[:max_chars])} … {len(text) - max_chars:,} more characters"
    return text if text.isprintable() else text.translate(_ESCAPES)


def one_line(text: str, max_chars: int = 200) -> str:
    """As `printable`, in one line: for names and ids."""
    return printable(text, max_chars).replace("\n", "\\n")
