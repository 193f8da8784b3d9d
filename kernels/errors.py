"""The one error of toyllm. It lives in the lowest package so that every package above may raise it."""


class ToyllmError(ValueError):
    """Something the user gave does not hold. The message is one line: what, where, expected and found, what to do next."""


class OutOfMemory(ToyllmError):  # noqa: N818 - named for what it says
    """A KV cache of `context` positions does not fit: refused beforehand, or failed in allocating."""

    def __init__(self, message: str, context: int) -> None:
        super().__init__(message)
        self.context = context
