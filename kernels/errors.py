"""The one error of toyllm. It lives in the lowest package so that every package above may raise it."""


class ToyllmError(ValueError):
    """Something the user gave does not hold. The message is one line: what, where, expected and found, what to do next."""
