"""See ../README.md."""

from stand_in import stand_in_for

__version__ = "0.0.0"  # transformers reads it, and takes none of its torchvision paths for so old a version
stand_in_for(__name__)
