"""qwenvit inside other frameworks; each module imports its own."""
