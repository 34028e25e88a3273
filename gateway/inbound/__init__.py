"""From a webhook, or from what WAHA still has, to the store."""
