"""A run in the browser: while it is under way (`live`) and afterwards (`after`)."""
