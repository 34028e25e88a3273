"""The page at /router/, for the office manager: what stands here is drawn on the server."""
