"""What the commands share: flags parsed and errors printed in one way."""

import logging
import pathlib
import re
import sys

from absl import app, flags
from absl import logging as absl_logging

from hovle_jax.errors import UserError
from hovle_jax.system import malloc


def run(main, usage=None, memory=malloc.keep_freed_memory):
    """Runs main() with parsed absl flags; a user's mistake becomes one line on stderr and status 2.

    Args:
      memory: how the host's memory is used; called first.
      usage: for a command with arguments beside its flags: main gets them as a list; this text says what they are.
    """
    memory()
    call = (lambda rest: main(rest[1:])) if usage else (lambda _: main())
    try:
        app.run(lambda rest: _call(call, rest), flags_parser=lambda argv: _parse_flags(argv, usage))
    except KeyboardInterrupt:
        _fail("interrupted; the same command continues from the newest checkpoint", status=130)


def _call(main, rest):
    absl_logging.set_verbosity(absl_logging.FATAL)  # orbax logs with a stack trace what it raises anyway
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # the line above undoes it where absl's handler is the root's
    try:
        main(rest)
    except UserError as error:
        _fail(error)


def _parse_flags(argv, usage):
    try:
        rest = flags.FLAGS(argv)
    except UserError as error:  # raised inside a config file
        _fail(error)
    except FileNotFoundError as error:
        _fail(f"no config file at {error.filename}; the project's own are in configs/")
    except flags.Error as error:
        _fail(error)
    except (AttributeError, KeyError) as error:
        _fail(_unknown_key(str(error)))
    if len(rest) > 1 and not usage:
        _fail(f"unexpected argument {rest[1]!r}; every option starts with --")
    return rest


def _unknown_key(text):
    """ml_collections' nested message for an override of a key that is not there, as one sentence."""
    near = re.search(r'Did you mean "(.+?)" instead of "(.+?)"', text)
    if near:
        return f"unknown config key {near.group(2)!r}; did you mean {near.group(1)!r}?"
    return "unknown config key " + re.sub(r"[\"'\\]", "", text)


def _fail(message, status=2):
    text = " ".join(str(message).split())
    print(f"error: {text}", file=sys.stderr)
    sys.exit(status)


def dispatch(actions, arguments, usage):
    """Calls the action that the first argument names, with the others.

    Args:
      actions: {name: (function, number of its arguments)}.
    Raises:
      UserError: an unknown action, or another number of arguments.
    """
    if not arguments or arguments[0] not in actions:
        raise UserError(f"usage: {usage}")
    action, count = actions[arguments[0]]
    if len(arguments) != 1 + count:
        raise UserError(f"{arguments[0]} takes {count} argument{'s' * (count != 1)}; usage: {usage}")
    action(*arguments[1:])


def config_file():
    """The path given with --config, without the preset. Raises UserError when it is missing."""
    if not flags.FLAGS["config"].present:
        raise UserError("--config is missing; for example --config configs/instruct.py")
    path = pathlib.Path(flags.FLAGS["config"].config_filename.split(":")[0])
    if not path.is_file():
        raise UserError(f"no config file at {path}; the project's own are in configs/")
    return path


def required(flag):
    """The value of a flag that must be given."""
    value = flags.FLAGS[flag].value
    if value in (None, ""):
        raise UserError(f"--{flag} is missing; see --help")
    return value
