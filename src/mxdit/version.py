"""The version of mxdit, which checkpoints name as their producer, and the versions of what it runs with."""

from importlib.metadata import PackageNotFoundError, version

__version__ = "0.2.0"


def installed(package: str) -> str | None:
    """The version of an installed package, or None. The package is not imported."""
    if package == "mxdit":
        return __version__
    try:
        return version(package)
    except PackageNotFoundError:
        return None
