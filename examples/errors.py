"""The one exception for mistakes of the person at the keyboard."""


class UserError(Exception):
    """A wrong argument or input. Its message names the flag and says what to do."""
