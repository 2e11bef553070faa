"""The one exception that means "the caller can mend this": commands turn it into a sentence and exit status 2."""


class UsageError(ValueError):
    """A mistake in what the user asked for; the message says what was expected, what came and what to try."""
