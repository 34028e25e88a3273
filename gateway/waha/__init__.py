"""The WhatsApp side: what WAHA sends us, and what we ask of it. Its names stay in here."""
