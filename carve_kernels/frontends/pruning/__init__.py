"""Methods that drop visual tokens by their attention; docs/frontends.md lists what is equal and what is refused."""
