"""Lines that tell how far a long piece of work is, and when it will be done."""

import time

SECONDS_BETWEEN_LINES = 5.0


def track(items, say, name, unit, total, size=lambda item: 1, clock=time.monotonic):
    """Passes items on, and says every few seconds how far they are.

    Args:
      say: takes a line: "NAME: 2,048 of 20,000 UNIT 10%  0:01:35 left".
      total: of the sizes of all items.
      size: of an item, in units.
      clock: seconds, from any origin.
    """
    done, start = 0, clock()
    last = start
    for item in items:
        yield item
        done += size(item)
        now = clock()
        if now - last >= SECONDS_BETWEEN_LINES:
            last = now
            left = format_duration((now - start) / done * (total - done))
            say(f"{name}: {done:,} of {total:,} {unit} {done / total:>4.0%}  {left} left")


def format_duration(seconds):
    """H:MM:SS, always with the hour, so that 0:41 is never read as hours."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
