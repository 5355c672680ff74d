"""What the docstring of a config says of each of its fields, which is their help on the command line too."""

import re


def help_of_fields(docstring: str | None) -> dict[str, str]:
    """The text of each field under `Parameters:`, on one line."""
    described = re.findall(r"^ {8}(\w+) \(.*\):\n((?: {12}.*\n)+)", docstring or "", re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in described}
