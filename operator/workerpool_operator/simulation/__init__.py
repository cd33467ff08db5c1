"""A pool of workers on a recorded day, by event: what the rules order, what jobs wait, what it costs."""
