"""What an instrument raises that this machine does not have."""

from __future__ import annotations


class Unavailable(Exception):
    """A quantity cannot be measured here; the message is the reason, as a table shows it."""
