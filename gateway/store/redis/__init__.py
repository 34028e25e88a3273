"""The store that several routers share: everything in Redis."""
