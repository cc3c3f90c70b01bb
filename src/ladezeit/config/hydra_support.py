"""Hydra's side of the config; the one module of `config` that imports it.

Schemas are put where Hydra finds them; its and OmegaConf's errors become one message: what was asked, what was found,
the nearest valid name.
"""

import re
import traceback

from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    KeyValidationError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

from ladezeit.config.run import RunConfig
from ladezeit.config.schema import GROUPS, schema_groups, schemas_of
from ladezeit.errors import LadezeitError, did_you_mean


def is_usage_error(error: BaseException) -> bool:
    """Say whether an error comes of what a user wrote; what Hydra raises while it reads that has types of all kinds."""
    if isinstance(error, LadezeitError | HydraException | OmegaConfBaseException | OSError):
        return True
    frames = list(traceback.walk_tb(error.__traceback__))
    return bool(frames) and frames[-1][0].f_globals.get("__name__", "").partition(".")[0] in ("hydra", "omegaconf")


def explain_error(error: BaseException) -> str:
    """Return the message for a usage error, complete without a stack trace."""
    if isinstance(error, LadezeitError):
        return str(error)
    if isinstance(error, MissingConfigException):  # which is an OSError too
        return _missing_option(error)
    if isinstance(error, OSError):
        return _system(error)
    if isinstance(error, OverrideParseException):
        return f"'{error.override}' is no override: write key=value, in quotes where it has spaces. ({_first(error)})"
    cause = _omegaconf_cause(error)
    if cause is not None:
        return _value(cause)
    return _hydra(error)


def _system(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}. Choose a folder that can be written with outputs=FOLDER"


def _missing_option(error: MissingConfigException) -> str:
    options = [str(option) for option in error.options or []]
    asked = str(error.missing_cfg_file)
    group, _, name = asked.rpartition("/")
    if not options:
        return _first(error)
    return f"'{name}' is no option of '{group}': there are {', '.join(options)}." + did_you_mean(name, options)


def _omegaconf_cause(error: BaseException | None) -> OmegaConfBaseException | None:
    while error is not None:
        if isinstance(error, OmegaConfBaseException):
            return error
        error = error.__cause__
    return None


def _value(cause: OmegaConfBaseException) -> str:
    key = cause.full_key or ""
    if isinstance(cause, KeyValidationError):
        return f"{_first(cause)}: on the command line write a number as a key of its own, +{key}=VALUE"
    if isinstance(cause, MissingMandatoryValue):
        return f"{key} has no value and needs one: give it as {key}=VALUE"
    if isinstance(cause, ConfigKeyError | ConfigAttributeError):
        return _unknown_key(cause)
    if isinstance(cause, ValidationError):
        return _wrong_type(cause, key)
    return _first(cause)


def _unknown_key(cause: OmegaConfBaseException) -> str:
    asked = str(cause.full_key or cause.key)
    name = asked.rpartition(".")[2]
    parent = cause.parent_node
    if isinstance(parent, DictConfig) and OmegaConf.get_type(parent) is dict:
        return f"'{asked}' is not there yet: add it with +{asked}=VALUE"
    valid = (
        [str(key) for key in parent] if isinstance(parent, DictConfig) and not OmegaConf.is_missing(parent, "") else []
    )
    valid = [key for key in valid if key != "hydra"]
    if "." not in asked:
        valid = sorted({*valid, *GROUPS})
    known = f" There are {', '.join(valid)}." if valid else ""
    return f"'{asked}' is no key of the config.{known}{did_you_mean(name, valid)}"


def _wrong_type(cause: ValidationError, key: str) -> str:
    text = _first(cause)
    found = re.search(r"expected one of \[(.*)\]", text)
    if found:
        valid = [name.strip() for name in found.group(1).split(",")]
        asked = re.search(r"Invalid value '(.*?)'", text)
        value = asked.group(1) if asked else ""
        return f"{key}={value} is not possible: use {', '.join(valid)}." + did_you_mean(value, valid)
    where = f"{key}: " if key else ""
    return f"{where}{text}"


def _hydra(error: BaseException) -> str:
    text = str(error).strip()
    group = re.search(r"Could not override '([^']+)'", text)
    if group:
        asked = group.group(1)
        return f"'{asked}' is neither an option group nor a key of the config.{did_you_mean(asked, GROUPS)}"
    if "group override must be a string" in text:
        return f"{text}: an option group needs the name of one of its options, GROUP=OPTION"
    return text if isinstance(error, HydraException) else " ".join(text.split())


def _first(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]


def register_schemas() -> None:
    """Store the schemas where option files find them; under ``schema/`` so that `glob(*)` of a group never sees one."""
    store = ConfigStore.instance().store
    store(name="run", group="schema", node=RunConfig)
    for group in schema_groups():
        for name, node in schemas_of(group).items():
            store(name=name, group=f"schema/{group}", node=node)
