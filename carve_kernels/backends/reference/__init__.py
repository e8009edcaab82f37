"""The reference backend: plain torch and numpy. It defines the results of the other backends."""


def unavailable() -> str | None:
    """The reference always serves."""
    return None


def devices() -> tuple[str, ...]:
    """Empty: tensors may be on any device."""
    return ()
