"""See ../README.md."""

from stand_in import stand_in_for

stand_in_for(__name__)
