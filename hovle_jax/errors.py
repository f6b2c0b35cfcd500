"""The one exception for a user's mistake. Commands print it as one line and exit with status 2."""


class UserError(Exception):
    """Something the user can put right; the message names the thing, the number and the remedy."""
