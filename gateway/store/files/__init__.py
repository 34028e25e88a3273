"""The embedded store: SQLite with group commit, and router_mappings.json."""
