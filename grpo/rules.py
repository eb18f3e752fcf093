"""Rules of configuration keys, and the one line that a value which breaks one ends in: key, value, rule."""

import math
from typing import Any

from grpo.errors import ConfigError


def check(rule_holds: bool, key: str, value: Any, rule: str) -> None:
    """Raise ConfigError `key (value) rule` unless it holds."""
    if not rule_holds:
        raise ConfigError(f"{key} ({value}) {rule}")


def at_least(section: str, config: Any, minimum: float, *names: str) -> None:
    """Each of the keys `names` of `config`, whose section is `section`, is finite and not below `minimum`."""
    for name in names:
        value, key = getattr(config, name), f"{section}.{name}" if section else name
        check(math.isfinite(value) and value >= minimum, key, value, f"must be at least {minimum}")


def one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    check(value in allowed, key, value, f"must be one of {', '.join(allowed)}")
