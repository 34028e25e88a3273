"""A router between WAHA and the backend of many tenants that share one WhatsApp number."""

VERSION = "0.1.0"
