"""Items for `prefetch` that know how many were drawn, and what prepares and measures them."""

SECONDS = 30
"""After this long, a test that waits for a thread fails."""


def one_byte(result):
    return 1


def double(index, item):
    return 2 * item


class Counted:
    """An iterator of the integers from 0 that knows how many were drawn."""

    def __init__(self, stop=10**6):
        self.drawn, self.stop = 0, stop

    def __iter__(self):
        return self

    def __next__(self):
        if self.drawn == self.stop:
            raise StopIteration
        self.drawn += 1
        return self.drawn - 1
