"""The exceptions that are meant for people: what was wrong, where, and what to do about it."""


def first_line(error: object) -> str:
    """Return the first line of what an error says; its class, where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class UserError(Exception):
    """Something the user can put right. Recipes print it without a traceback and leave with status 2."""


class NotFinite(UserError):
    """A loss, reward or gradient is NaN or infinite; the text says which. PPO skips such a step."""
