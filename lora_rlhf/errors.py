"""The one exception that is meant for people: what was wrong, where, and what to do about it."""


class UserError(Exception):
    """Something the user can put right. Recipes print it without a traceback and leave with status 2."""


class NotFinite(UserError):
    """A loss, reward or gradient is NaN or infinite; the text says which. PPO skips such a step."""
