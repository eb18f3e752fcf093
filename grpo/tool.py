"""key=value arguments of the tools that are not runs: python -m grpo.grade, grpo.evaluate, grpo.generate."""

from typing import TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from grpo.config import check_keys, readable
from grpo.errors import ConfigError

T = TypeVar("T")


def parse_arguments(typed: list[str], own: dict[str, bool], section: type[T], name: str) -> tuple[dict[str, str], T]:
    """The tool's `own` arguments (true: must be given) and the configuration `section`, whose keys are `name`.KEY.

    Raises ConfigError in one line for anything else.
    """
    arguments, config = {}, OmegaConf.structured(section)
    for item in typed:
        key, found, value = item.partition("=")
        if not found:
            raise ConfigError(f"{item}: write key=value")
        if key in own:
            arguments[key] = value
            continue
        if not key.startswith(f"{name}."):
            raise ConfigError(f"{key} is not an argument here: there are {', '.join(own)} and {name}.KEY")
        check_keys([key], [])
        try:
            OmegaConf.update(config, key.removeprefix(f"{name}."), OmegaConf.from_dotlist([f"x={value}"]).x)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{key}: {readable(error)}") from None
    missing = [key for key, needed in own.items() if needed and key not in arguments]
    if missing:
        raise ConfigError(f"{missing[0]}= is missing")
    return arguments, OmegaConf.to_object(config)
