"""The version, in one place: package metadata, CMake and ``normkernels.__version__`` read it from here."""

__version__ = "0.1.0"
