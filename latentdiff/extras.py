"""What has to be installed for a feature that not everybody wants."""


def how_to_install(extra: str) -> str:
    """The command that installs an extra of this package: by the names of what is in it, which are in every index."""
    from importlib.metadata import PackageNotFoundError, requires

    mark = f'; extra == "{extra}"'
    try:
        found = [one.removesuffix(mark).strip() for one in requires("latentdiff") or () if one.endswith(mark)]
    except PackageNotFoundError:
        found = []
    if not found:
        return f"pip install -e '.[{extra}]' in the folder of this package"
    return "pip install " + " ".join(f"'{one}'" for one in found)
