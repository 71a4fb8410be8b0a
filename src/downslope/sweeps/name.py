"""The name of a job's folder: its overrides, where a file system and a person can read them."""

import hashlib
import re

LONGEST = 100
ODD = re.compile(r"[^\w.,=+\-@~]+")


def job_name(overrides: str) -> str:
    """Returns the overrides as they are, or, where they are long or odd, what is readable of them and a hash.

    Example:
        >>> job_name("device=cpu,lr=0.01")
        'device=cpu,lr=0.01'
        >>> job_name("data.path=tables/houses.csv")
        'data.path=tables-houses.csv@7dc9c5923e'
    """
    plain = ODD.sub("-", overrides)
    if plain == overrides and 0 < len(plain) <= LONGEST and plain.strip(".") and "@" not in plain:
        return plain
    digest = hashlib.sha256(overrides.encode()).hexdigest()[:10]
    return f"{plain[: LONGEST - 11] or 'defaults'}@{digest}"
