"""How a string that somebody else chose is shown: one line, which moves no cursor and no text."""


def printable(text: str) -> str:
    r"""Return one line that a reader only sees: characters that do not print are escaped.

    Examples:
        >>> print(printable("birds\n\x1b]0;title\x07 \u202e"))
        birds\n\x1b]0;title\x07 \u202e
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
