"""The page at /router/, for the office manager: it is drawn on the server."""
