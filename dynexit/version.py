"""The version of this program."""

from importlib import metadata


def installed_version(package: str = "dynexit") -> str:
    """Returns the installed version; `unknown` for a source folder that is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"
