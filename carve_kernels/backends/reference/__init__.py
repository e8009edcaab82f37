"""The reference room: plain torch and numpy. It defines every number of the other rooms."""


def unavailable() -> str | None:
    """The reference is always here."""
    return None


def devices() -> tuple[str, ...]:
    """None is named: tensors may be anywhere."""
    return ()
