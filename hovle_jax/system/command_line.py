"""What all commands share: how flags are parsed and errors printed."""

import errno
import functools
import logging
import os
import pathlib
import re
import sys
from collections.abc import Callable
from typing import Any

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from hovle_jax.errors import UserError
from hovle_jax.system import accelerators, config_help, malloc
from hovle_jax.system.files import reason_of
from hovle_jax.system.printable import printable

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # what a command did not do wrong


def run(
    main: Callable,
    usage: str | None = None,
    memory: Callable = malloc.keep_freed_memory,
    config: type | None = None,
    platform: str = "",
) -> None:
    """Runs main() with parsed absl flags; a user's mistake becomes one line on stderr and status 2.

    Args:
      usage: describes the arguments, of a command that has any besides its flags; main gets them as a list.
      memory: sets how the host's memory is used; called first.
      config: the dataclass of --config, if the command has that flag: a mistyped key is compared with its keys.
      platform: the only platform of JAX that the command needs; empty = JAX's choice, or JAX_PLATFORMS.
    """
    if platform:
        os.environ["JAX_PLATFORMS"] = platform
    without_tpu = accelerators.choose_cpu()
    memory()
    call = (lambda rest: main(rest[1:])) if usage else (lambda _: main())
    if without_tpu:
        call = _saying("no TPU found, though libtpu is installed: using the CPU (else set JAX_PLATFORMS)", call)
    try:
        app.run(lambda rest: _call(call, rest), flags_parser=lambda argv: _parse_flags(argv, usage, config))
    except KeyboardInterrupt:
        _fail("interrupted", status=130)


def _saying(line, call):
    """`call`, preceded by a line on stderr."""

    def after_the_line(rest):
        print(line, file=sys.stderr)
        call(rest)

    return after_the_line


def _call(main, rest):
    absl_logging.set_verbosity(absl_logging.FATAL)  # orbax logs, with a stack trace, errors that it also raises
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # the line above resets it if absl's handler is the root's
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # a failed save is said once, not once for each array
    sys.unraisablehook = functools.partial(_unraisable, sys.unraisablehook)
    try:
        main(rest)
    except UserError as error:
        _fail(error)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        _fail(
            f"cannot write {error.filename or 'a file'}: {reason_of(error)}; put that right, and give the command again"
        )


def _unraisable(hook, found):
    """Drops what tensorstore's threads say of a failed save, once for each array, when Orbax listens no longer."""
    if not (isinstance(found.exc_value, RuntimeError) and str(found.exc_value) == "Event loop is closed"):
        hook(found)


def _parse_flags(argv, usage, config):
    try:
        rest = flags.FLAGS(argv)
    except UserError as error:  # raised inside a config file
        _fail(error)
    except FileNotFoundError as error:
        _fail(f"no config file at {error.filename}; the project's own are in configs/")
    except flags.UnrecognizedFlagError as error:
        _fail(_unknown_flag(error, config))
    except flags.Error as error:
        _fail(error)
    except (AttributeError, KeyError) as error:
        _fail(_unknown_key(argv, str(error), config))
    if len(rest) > 1 and not usage:
        _fail(f"unexpected argument {rest[1]!r}; every option starts with --")
    return rest


def _unknown_flag(error, config):
    """An unknown flag may be a key of the config without its 'config.'."""
    near = config_help.nearest(error.flagname.removeprefix("config."), config) if config else []
    return _did_you_mean(f"unknown flag --{error.flagname}", near) if near else error


def _unknown_key(argv, text, config):
    """A message about an override of an unknown key, as one sentence.

    Args:
      text: ml_collections' nested message, used if the command's keys are not known.
    """
    matches = map(re.compile(r"--?(?:no)?config\.([\w.]+)").match, argv)
    given = [match[1] for match in matches if match]
    known = {entry.key.removeprefix("config.") for entry in config_help.entries_of(config)} if config else set()
    unknown = [key for key in given if key not in known]
    if not known or not unknown:
        return "unknown config key " + re.sub(r"[\"'\\]", "", text.replace("\\n", "; "))
    return _did_you_mean(f"unknown config key {unknown[0]!r}", config_help.nearest(unknown[0], config))


def _did_you_mean(problem, near):
    if not near:
        return f"{problem}; train --show lists them all"
    return f"{problem}; did you mean {' or '.join(f'--{key}' for key in near)}?"


@functools.cache  # once for each message
def warn(message: str) -> None:
    """Prints a warning on stderr: something is allowed, but hardly what was meant."""
    print(f"warning: {printable(message, lines=True)}", file=sys.stderr)


def _fail(message, status=2):
    text = printable(" ".join(str(message).split()))
    print(f"error: {text}", file=sys.stderr)
    sys.exit(status)


def dispatch(actions: dict, arguments: list[str], usage: str) -> None:
    """Calls the action that the first argument names, with the other arguments.

    Args:
      actions: {name: (function, number of its arguments)}.
    Raises:
      UserError: the action is unknown, or the number of arguments is wrong.
    """
    if not arguments or arguments[0] not in actions:
        raise UserError(f"usage: {usage}")
    action, count = actions[arguments[0]]
    if len(arguments) != 1 + count:
        raise UserError(f"{arguments[0]} takes {count} argument{'s' * (count != 1)}; usage: {usage}")
    action(*arguments[1:])


def config_file() -> pathlib.Path:
    """The path given with --config, without the preset. Raises UserError if it is missing."""
    if not flags.FLAGS["config"].present:
        raise UserError("--config is missing; for example --config configs/instruct.py")
    path = pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"]).split(":")[0])
    if not path.is_file():
        raise UserError(f"no config file at {path}; the project's own are in configs/")
    return path


def required(flag: str) -> Any:
    """The value of a flag that must be given."""
    value = flags.FLAGS[flag].value
    if value in (None, "", [], [""]):
        raise UserError(f"--{flag} is missing; see --help")
    return value


def local_folder(flag: str) -> str:
    """The value of a flag that names a folder of this machine. Raises UserError if it is missing or a URL."""
    value = str(required(flag))
    if "://" in value:
        raise UserError(f"--{flag}={value}: only folders of this machine are used; mount it (docs/launch.md)")
    return value
