"""Settings as files: those a user writes, and config.yaml, by which a run goes on as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from fastlm.training.config import ConfigError, TrainConfig

CONFIG = "config.yaml"
TOKENS = "tokens"


class Plain(Protocol):
    """Settings that can be told as plain values."""

    def to_dict(self) -> dict[str, Any]: ...


def before_flags(file: str | None, *, out: str | None, resume: str | None) -> TrainConfig:
    """The settings that the flags of a command line are laid over.

    For a new run these are the settings in ``file``, over the defaults.  A run that goes on keeps
    its own settings: its config.yaml stands in for the defaults.

    Args:
        file: The settings file, if one is named.  It may be the config.yaml of the run to resume;
            that run is then the one in its folder, wherever the folder was moved or copied to.
        out: The flag of that name; None for that of the file.
        resume: Likewise.

    Raises:
        ConfigError: A file cannot be used, or there is no run to resume.
    """
    given = {} if file is None else read_settings(file)
    config = TrainConfig.from_dict(given)
    if resume is None and config.resume is None:
        return config
    if out is None:
        out = config.out if file is None or not _is_of_a_run(Path(file)) else str(Path(file).parent)
    return TrainConfig.from_dict({**read_run(out).to_dict(), **given, "out": out})


def read_run(out: str | Path) -> TrainConfig:
    """The settings of the run in a folder.

    Raises:
        ConfigError: There is no run, or its config.yaml cannot be used.
    """
    file = Path(out) / CONFIG
    if not file.exists():
        raise ConfigError(f"train: out must hold the run to resume, got {out} without one")
    return read_config(file)


def _is_of_a_run(file: Path) -> bool:
    return file.name == CONFIG and (file.parent / TOKENS).is_dir()


def read_config(path: str | Path) -> TrainConfig:
    """Read a config.yaml.

    Raises:
        ConfigError: No such file, not UTF-8, not YAML, a key twice, a key that is no setting, a
            value out of range.
    """
    return TrainConfig.from_dict(read_settings(path))


def read_settings(path: str | Path, command: str = "train") -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: No such file, not UTF-8, not YAML, or a key twice.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    def mapping(loader: Loader, node: yaml.MappingNode) -> dict[Any, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = loader.construct_object(key_node)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise ConfigError(f"{command}: {path}: {key!r} appears twice, again on line {line}")
            seen.add(key)
        return loader.construct_mapping(node)

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        values = yaml.load(Path(path).read_text("utf-8-sig"), Loader)
    except OSError as error:
        raise ConfigError(f"{command}: config {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{command}: config {path} is not UTF-8 at byte {error.start}") from None
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{command}: config {path} is not YAML: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(values, dict):
        raise ConfigError(f"{command}: config {path} must hold 'name: value' lines")
    return values


def write_config(config: Plain, path: str | Path) -> None:
    """Write every setting, in the order of the fields."""
    import yaml

    Path(path).write_text(yaml.safe_dump(config.to_dict(), sort_keys=False), "utf-8")
