"""The reference backend: plain torch and numpy. It defines every number of the other backends."""


def unavailable() -> str | None:
    """The reference is always here."""
    return None


def devices() -> tuple[str, ...]:
    """None is named: tensors may be anywhere."""
    return ()
