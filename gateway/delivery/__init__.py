"""The tenants' side: claim a delivery, send it, settle it."""
