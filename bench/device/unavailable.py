"""Error of a measuring instrument that this machine lacks."""

from __future__ import annotations


class Unavailable(Exception):
    """A quantity cannot be measured on this machine; tables show the message as the reason."""
